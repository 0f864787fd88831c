"""The count of passes: operators and bytes of a layer of Vicuna 7B, by hand where that is short."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from preloaded import Preloaded

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "passes.py"


def test_operators_and_bytes_of_a_layer(python: Preloaded) -> None:
    done = subprocess.run([python.ours, str(SCRIPT), "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rows = {(row["pass"], row["dtype"]): row for row in found["rows"]}
    assert len(rows) == 16
    hidden, inner = 2048 * 4096, 2048 * 11008
    gated_silu = rows["gated", "bf16"]
    # silu reads e and writes; the product in place reads both and writes one, which counts as a result.
    assert (gated_silu["operators"], gated_silu["moved_bytes"], gated_silu["one_kernel_bytes"]) == (
        2,
        2 * inner * 5,
        2 * inner * 3,
    )
    keys, turn = rows["rotated, keys", "fp32"], 2048 * 128
    # cat, mul_ with the sines, addcmul_ with x and the cosines; cat sees both halves.
    assert (keys["operators"], keys["moved_bytes"]) == (3, 4 * (hidden * (2 + 2 + 3) + 2 * turn))
    assert keys["one_kernel_bytes"] == 4 * (hidden * 2 + turn)
    norm = rows["normalise", "bf16"]
    assert norm["one_kernel_bytes"] == 2 * (2 * hidden + 4096) + 4 * 2048
    # What docs/gpu.md says.
    summary = found["summary"]
    assert (summary["operators_bf16"], summary["operators_fp32"]) == (67, 51)
    assert (summary["moved_bytes_bf16"] >> 20, summary["one_kernel_bytes_bf16"] >> 20) == (3221, 827)
