"""`model.kernels`: Liger's kernels where they can run, PyTorch's elsewhere, with a reason."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

from mm_moslora.config import ModelConfig, Recipe, TrainConfig
from mm_moslora.kernels.fused_ops import liger_availability
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels
from mm_moslora.planning import doctor
from mm_moslora.utils.errors import ConfigError

CPU = torch.device("cpu")
INSTALLED = all(map(importlib.util.find_spec, ("liger_kernel", "triton")))
needs_liger = pytest.mark.skipif(not INSTALLED, reason="liger-kernel and triton are not installed (1 GB)")


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(liger_availability, "version", version)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "liger-kernel is not installed"),
        ("0.8.4", "liger-kernel is 0.8.4, expected >=0.8.5,<0.9"),
        ("0.9.0", "liger-kernel is 0.9.0, expected >=0.8.5,<0.9"),
    ],
)
def test_without_a_liger_that_fits_auto_is_torch_and_liger_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None, reason: str
) -> None:
    pretend(monkeypatch, found)
    chosen = choose_kernels("auto", torch.device("cuda"))
    assert chosen.passes is TORCH_OPS
    assert chosen.words == f"PyTorch's ({reason})"
    assert choose_kernels("torch", CPU).words == "PyTorch's"
    with pytest.raises(ConfigError, match=re.escape(reason) + r".*pip install 'liger-kernel>=0\.8\.5,<0\.9'"):
        choose_kernels("liger", CPU)
    (finding,) = (item for item in doctor.diagnose() if item.name == "kernels")
    assert reason in finding.detail
    assert (finding.status, bool(finding.remedy)) == (("ok", False) if found is None else ("warn", True))


def test_a_liger_that_does_not_import_is_no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "0.8.5")
    monkeypatch.setattr(liger_availability.importlib.util, "find_spec", lambda _: object())

    def broken(name: str) -> None:
        raise RuntimeError(f"{name}: the driver is too old")

    monkeypatch.setattr(liger_availability.importlib, "import_module", broken)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    reason = liger_availability.why_not_liger(torch.device("cuda"))
    assert reason == "liger-kernel 0.8.5 does not import (RuntimeError: liger_kernel.ops: the driver is too old)"


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels is 'liger', but model\.lean_layers is false"):
        ModelConfig(language="x", kernels="liger", lean_layers=False)
    with pytest.raises(ConfigError, match=r"train\.compile is 'inductor'.*Leave train\.compile out"):
        Recipe(model=ModelConfig(language="x", kernels="liger"), train=TrainConfig(compile="inductor"))
    Recipe(model=ModelConfig(language="x"), train=TrainConfig(compile="inductor"))


@needs_liger
def test_without_the_interpreter_a_cpu_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert liger_availability.why_not_liger(CPU) == "Triton does not run on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "needs compute capability 7.0, and the GPU has 6.1" in choose_kernels("auto", torch.device("cuda")).words
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert choose_kernels("auto", torch.device("cuda")).passes is not TORCH_OPS


@needs_liger
@pytest.mark.slow
def test_kernels_give_the_numbers_of_torch_in_tritons_interpreter() -> None:
    worker = Path(__file__).with_name("liger_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(worker)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=540,
        cwd=worker.parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b4\d passed in", done.stdout)
    assert "skipped" not in done.stdout


class _NoGpu:
    """Stands for a GPU of a kind, for compilation alone."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@needs_liger
@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_pass_compiles_for_gpus(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from mm_moslora.kernels.fused_ops.liger_ops import LIGER_OPS

    machine_code: dict[str, int] = {}
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        machine_code[self.fn.__name__] = len(kernel.asm["cubin"])
        return kernel

    monkeypatch.setattr(JITFunction, "run", compiled)
    monkeypatch.setattr(driver, "_active", _NoGpu(capability))
    tokens, width, heads = 7, 80, 3
    x, grad = torch.zeros(tokens, width, dtype=dtype), torch.zeros(tokens, width, dtype=dtype)
    weight, turn = torch.zeros(width, dtype=dtype), torch.zeros(tokens, 1, 16, dtype=dtype)
    _, inverse = LIGER_OPS.rms_norm(x, weight, 1e-5)
    LIGER_OPS.recompute_rms_norm(x, weight, inverse)
    LIGER_OPS.rms_norm_backward(grad, x, weight, inverse)
    h, handed = LIGER_OPS.recompute_gated(x, grad)
    LIGER_OPS.gated_silu_backward(h, x, grad, handed)
    LIGER_OPS.rotary_embedding(torch.zeros(tokens, heads, 16, dtype=dtype), turn, turn)
    assert len(machine_code) == 6
    assert all(size > 1000 for size in machine_code.values())
