"""Triton kernels compiled for a GPU that is not there, with the registers and the spills that the assembler reports."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime import driver
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Compiled:
    """One variant of a kernel."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of registers that a thread stores in memory."""


class _NoGpu:
    """Stands for a GPU of a kind, for compilation alone."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_only(capability: int, monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple[str, Compiled]]:
    """From now on, calls of kernels compile them and run nothing; gives the list that they are added to.

    Args:
        capability: 80 for compute capability 8.0.
        monkeypatch: of the test.
        folder: for Triton's cache.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
    found: list[tuple[str, Compiled]] = []
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        found.append((self.fn.__name__, _assembled(kernel.asm["ptx"], capability, folder)))
        return kernel

    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(driver, "_active", _NoGpu(capability))
    return found


def _assembled(ptx: str, capability: int, folder: Path) -> Compiled:
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    target = re.search(r"^\.target (\w+)", ptx, re.M)
    assert target is not None
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", str(folder / "cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None
    assert spilled is not None
    return Compiled(registers=int(registers[1]), spilled=int(spilled[1]))
