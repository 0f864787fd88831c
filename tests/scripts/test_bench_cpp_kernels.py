"""The benchmark of the C++ kernels leaves out what it says, and its contenders compute the same."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from native_kernels import needs_kernels

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import cpp_kernels as bench
import yardstick

from mm_moslora.kernels.attention import cpu_segments, native_cpu_attention


@needs_kernels
def test_a_contender_runs_without_what_it_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    step = yardstick.ours(600, torch.float32, yardstick.Setting(layers=2)).step
    ran: list[str] = []
    for module, name in (
        (native_cpu_attention, "attend"),
        (cpu_segments, "attend"),
        (cpu_segments, "attend_by_kernel"),
    ):
        real = getattr(module, name)

        def noted(*args: object, _real=real, _name=f"{module.__name__}.{name}", **options: object) -> object:
            ran.append(_name)
            return _real(*args, **options)

        monkeypatch.setattr(module, name, noted)
    found, losses = {}, []
    for name, left_out in bench.CONTENDERS.items():
        ran.clear()
        losses.append(float(bench.without(left_out, step)()))
        found[name] = set(ran)
    assert found["all"] == found["all again"] == {"mm_moslora.kernels.attention.native_cpu_attention.attend"}
    assert "mm_moslora.kernels.attention.native_cpu_attention.attend" not in found["without attention"]
    assert found["by torch alone"] == {"mm_moslora.kernels.attention.cpu_segments.attend_by_kernel"}
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
