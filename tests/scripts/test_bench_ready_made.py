"""The benchmark of ready-made models compares like with like."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import ready_made as bench


@pytest.mark.parametrize(("family", "dtype"), [("qwen2_5_vl", "bf16"), ("qwen3_vl", "fp32")])
def test_the_packed_step_is_the_padded_one_and_keeps_less(family: str, dtype: str) -> None:
    row = bench.measure(family, "far", dtype, rounds=1, layers=4, width=64)
    assert row["saved_mib"]["packed"] < row["saved_mib"]["packed stock"] < row["saved_mib"]["padded"]
    assert row["speedup_vs"].keys() == {"padded", "packed stock"}
    assert row.get("gradient_difference", 0) < 1e-5
    assert bench.summarise([row]).keys() == {f"{kind}_{family}_far_{dtype}" for kind in ("speedup", "saved_ratio")}
