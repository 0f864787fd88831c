"""`model.kernels`: Triton's kernels where they can run, PyTorch's elsewhere, with a reason."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

from mm_moslora.config import ModelConfig, Recipe, TrainConfig
from mm_moslora.kernels import triton_availability
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS
from mm_moslora.kernels.triton_availability import why_not_triton
from mm_moslora.models.memory_efficient import kernel_selection
from mm_moslora.models.memory_efficient.kernel_selection import choose_kernels
from mm_moslora.planning import doctor
from mm_moslora.utils.errors import ConfigError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
INSTALLED = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INSTALLED, reason="triton is not installed (1 GB)")


def pretend(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def version(_: str) -> str:
        if found is None:
            raise PackageNotFoundError
        return found

    monkeypatch.setattr(triton_availability, "version", version)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (None, "liger-kernel is not installed"),
        ("0.8.4", "liger-kernel is 0.8.4, expected >=0.8.5,<0.9"),
        ("0.9.0", "liger-kernel is 0.9.0, expected >=0.8.5,<0.9"),
    ],
)
def test_without_a_liger_that_fits_it_is_refused(
    monkeypatch: pytest.MonkeyPatch, found: str | None, reason: str
) -> None:
    pretend(monkeypatch, found)
    with pytest.raises(ConfigError, match=re.escape(reason) + r".*pip install 'liger-kernel>=0\.8\.5,<0\.9'"):
        choose_kernels("liger", CPU)
    (finding,) = (item for item in doctor.diagnose() if item.name == "kernels")
    assert finding.status == "ok"
    assert (f"{found} is installed" in finding.detail) == (found is not None)


def test_a_liger_that_does_not_import_is_no_liger(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "0.8.5")
    monkeypatch.setattr(triton_availability, "why_not_triton", lambda *_: None)

    def broken(name: str) -> None:
        raise RuntimeError(f"{name}: the driver is too old")

    monkeypatch.setattr(triton_availability.importlib, "import_module", broken)
    reason = triton_availability.why_not_liger(GPU, torch.bfloat16)
    assert reason == "liger-kernel 0.8.5 does not import (RuntimeError: liger_kernel.ops: the driver is too old)"


def test_eager_passes_on_a_gpu_are_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernel_selection._warn_of_eager_passes.cache_clear()
    monkeypatch.setattr(kernel_selection, "why_not_triton", lambda *_: "triton is not installed")
    for _ in range(2):
        assert choose_kernels("auto", GPU).words == "PyTorch's (triton is not installed)"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "Triton is not installed. Norms, activations and rotations run on PyTorch's operators" in record.message
    chosen = choose_kernels("torch", GPU)
    assert (chosen.words, chosen.dropout, chosen.passes) == ("PyTorch's", "torch", TORCH_OPS)
    choose_kernels("auto", GPU, lean=False)  # nothing of it runs there
    assert len(caplog.records) == 1
    with pytest.raises(ConfigError, match=r"'triton', but triton is not installed.*compute capability 7\.0"):
        choose_kernels("triton", GPU)


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"kernels is 'liger', but model\.lean_layers is false"):
        ModelConfig(language="x", kernels="liger", lean_layers=False)
    with pytest.raises(ConfigError, match=r"train\.compile is 'inductor'.*Leave train\.compile out"):
        Recipe(model=ModelConfig(language="x", kernels="liger"), train=TrainConfig(compile="inductor"))
    Recipe(model=ModelConfig(language="x"), train=TrainConfig(compile="inductor"))


@needs_triton
def test_without_the_interpreter_a_cpu_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert why_not_triton(CPU, torch.bfloat16) == "Triton does not run on cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert "needs compute capability 7.0, and the GPU has 6.1" in choose_kernels("auto", GPU).words
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    triton_availability._why_it_fails.cache_clear()
    assert choose_kernels("auto", GPU).words.startswith("PyTorch's (Triton's kernels do not run here (")
    monkeypatch.setattr(triton_availability, "_why_it_fails", lambda *_: None)
    assert choose_kernels("auto", GPU).passes is not TORCH_OPS


@needs_triton
@pytest.mark.slow
def test_kernels_give_the_numbers_of_torch_in_tritons_interpreter() -> None:
    worker = Path(__file__).with_name("triton_worker.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "2", "-p", "no:cacheprovider", str(worker)],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=540,
        cwd=worker.parents[3],
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"\b(\d+) passed in", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= 60  # more with liger-kernel
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 90, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_pass_compiles_for_gpus_without_spilling_registers(
    capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton_compiler import compile_only

    from mm_moslora.kernels.fused_ops.triton_ops import TRITON_OPS as OPS

    found = compile_only(capability, monkeypatch, tmp_path)
    for width in (128, 4096, 8192):
        x, grad = torch.zeros(7, width, dtype=dtype), torch.zeros(7, width, dtype=dtype)
        weight = torch.zeros(width, dtype=dtype)
        _, inverse = OPS.rms_norm(x, weight, 1e-5)
        OPS.recompute_rms_norm(x, weight, inverse)
        OPS.rms_norm_backward(grad, x, weight, inverse)
    OPS.rms_norm_weight_gradient(grad, x, inverse)
    h, handed = OPS.recompute_gated(x, grad)
    OPS.gated_silu_backward(h, x, grad, handed)
    turn = torch.zeros(7, 1, 128, dtype=dtype)
    OPS.rotary_embedding(torch.zeros(7, 32, 128, dtype=dtype), turn, turn)
    assert len(found) == 13
    assert not [name for name, compiled in found if compiled.spilled]
