"""Two ranks by the launchers that docs/cluster.md lists, stopped by a signal, some started again.

SLURM: `test_slurm.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "soak"))
import launchers

pytestmark = pytest.mark.slow
LEFT_OUT = ("train_deepspeed.sh", "deepspeed-no-local-rank", "ipv6-two-agents", "mpirun-launch-on-each-host")
"""Ways whose parts other ways have, and which take long: `scripts/soak/launchers.py` runs all of them."""
STOPS = {name for name, way in launchers.WAYS.items() if not way.refused and not name.startswith("deepspeed")}
"""Ways that save on the signal; DeepSpeed's runner hands none on."""
AGAIN = ("launch", "torchrun")
"""Ways that are started a second time here: ours, and the launcher below it. What the ranks of all others read is the
same; `scripts/soak/launchers.py` starts all of them again."""


@pytest.mark.parametrize("name", [name for name in launchers.WAYS if name not in LEFT_OUT])
def test_a_launcher_trains_two_ranks_stops_and_goes_on(name, parts, ranks, python, tmp_path):
    if reason := launchers.impossible(name):
        pytest.skip(reason)
    # Where parents and children are the point: what is forked from a process outside of a namespace is outside, too.
    own = sys.executable if name.startswith("ipv6") or "deepspeed" in name else str(python.ours)
    came = launchers.Trial(folder=tmp_path, parts=parts, ranks=ranks, python=own).run(name, again=name in AGAIN)
    assert came["good"], came
    if name in STOPS:
        assert (came["state"], came["mark"]) == ("stopped", True), came
        assert came["saved"] > 0, came
