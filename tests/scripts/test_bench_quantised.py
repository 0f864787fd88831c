"""The benchmark of 4-bit bases runs, and its contenders are the same computation."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def test_lean_layers_keep_less_than_modules_and_give_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "bench"))
    for name in ("yardstick", "measuring", "train", "quantised"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import quantised  # of scripts/bench

    base, small = quantised.yardstick.base, quantised.yardstick.Setting(width=128, layers=2)
    monkeypatch.setattr(quantised.yardstick, "base", lambda vocabulary, dtype, _: base(vocabulary, dtype, small))
    monkeypatch.setattr(quantised, "VOCABULARIES", (256,))
    row = quantised.step_row("fp32", 0.0, 1)
    assert 0 <= row["gradient_difference"] < 1e-5
    assert row["saved_mib"]["lean"] < 0.6 * row["saved_mib"]["modules"]
    assert row["saved_mib"]["lean"] == pytest.approx(row["saved_mib"]["unpacked"], rel=0.01)
    assert row["time_ratio"]["modules"] == 1.0
    for name in ("yardstick", "measuring", "train", "quantised"):
        monkeypatch.delitem(sys.modules, name, raising=False)
