"""The attention benchmark runs, and its two contenders are the same computation."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from preloaded import Preloaded

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "attention.py"


def test_it_prints_ratios_and_errors_of_both(python: Preloaded) -> None:
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
        assert row["time_ratio_vs_kernel"] > 0
        assert row["taken"] in ("kernel", "products")
        assert row["gradient_error"]["products"] != row["gradient_error"]["kernel"]  # not one of them twice
        assert 0 < row["gradient_error"]["products"] < limit
        assert 0 < row["gradient_error"]["kernel"] < limit
    assert found["summary"].keys() == {"time_ratio_vs_kernel_geomean_fp32", "time_ratio_vs_kernel_geomean_bf16"}
