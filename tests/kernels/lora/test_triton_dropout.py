"""Adapter dropout by Triton: numbers in Triton's interpreter, registers and spills of what is compiled for GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (1 GB)"),
    pytest.mark.slow,
]


def test_masks_and_products_in_tritons_interpreter() -> None:
    worker = Path(__file__).with_name("triton_dropout_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", str(worker)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=540,
        cwd=worker.parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"\b3\d passed in", done.stdout)
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_compile_for_gpus_without_spilling_registers(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton_compiler import compile_only

    from mm_moslora.kernels.lora.triton_dropout import add_kept_products, kept_copies

    found = compile_only(capability, monkeypatch, tmp_path)
    rows, masks = torch.zeros(13, 4096, dtype=dtype), [(2**61 + place, 1638) for place in range(3)]
    u, A = torch.zeros(13, 128, dtype=dtype), torch.zeros(128, 4096, dtype=dtype)
    for count in (1, 3):
        kept_copies(rows, masks[:count])
        add_kept_products(rows, [u] * count, [A] * count, masks[:count])
    assert [name for name, _ in found] == ["_keep", "_add_kept"] * 2
    assert not [name for name, compiled in found if compiled.spilled]
    assert all(compiled.registers <= 64 for name, compiled in found if name == "_keep")
