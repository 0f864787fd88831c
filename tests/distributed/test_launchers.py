"""Two ranks by the launchers that docs/cluster.md lists, stopped by a signal, some started again.

SLURM: `test_slurm.py`.
"""

from __future__ import annotations

import sys

import launchers
import pytest

pytestmark = pytest.mark.slow
STOPS = {name for name, way in launchers.WAYS.items() if not way.refused and not name.startswith("deepspeed")}
"""Ways that save on the signal; DeepSpeed's runner hands none on."""
AGAIN = ("launch", "torchrun")
"""Ways that are started a second time, ours and the launcher below it: the ranks of all others read the same."""


@pytest.mark.parametrize("name", launchers.WAYS)
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
