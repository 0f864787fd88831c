"""The attention benchmark runs, and its contenders are the same computation."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from preloaded import Preloaded

from mm_moslora.kernels.native import find_compiler

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "attention.py"


@pytest.mark.skipif(find_compiler() is None, reason="there is no C++ compiler here")
def test_it_prints_ratios_and_errors_of_all(python: Preloaded) -> None:
    arguments = ["--json", "--rounds", "1", "--lengths", "64", "150"]
    done = subprocess.run(
        [python.ours, str(SCRIPT), *arguments], capture_output=True, text=True, check=True, env={**os.environ}
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert [(row["dtype"], row["tokens"]) for row in found["rows"]] == [
        ("fp32", 64), ("fp32", 150), ("bf16", 64), ("bf16", 150),
    ]  # fmt: skip
    for row in found["rows"]:
        limit = 1e-5 if row["dtype"] == "fp32" else 1e-2
        assert row["taken"] in ("ours", "products", "pytorch")
        assert all(ratio > 0 for ratio in row["time_ratio_vs_pytorch"].values())
        errors = row["gradient_error"]
        assert all(0 < error < limit for error in errors.values())
        assert len({errors["ours"], errors["products"], errors["pytorch"]}) == 3  # not one of them twice
    assert found["summary"].keys() == {
        f"time_ratio_{kind}_vs_pytorch_geomean_{name}" for kind in ("ours", "products") for name in ("fp32", "bf16")
    }
