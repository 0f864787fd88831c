"""Two hosts, as network namespaces with a cable: training and resuming across them, and one cut off in the middle."""

from __future__ import annotations

import pytest
import two_hosts
from trials import hexed, make_recipe, weights, write
from waiting import wait_until

pytestmark = pytest.mark.slow


def test_training_survives_a_host_that_is_cut_off(parts, ranks, tmp_path):
    reason = two_hosts.impossible()
    if reason:
        pytest.skip(reason)
    steps = 24
    recipe = make_recipe(
        parts, tmp_path / "run", "zero2", steps=steps, save_every=1, dropout=0.1, step_timeout_minutes=0.1,
        timeout_minutes=0.3,  # the cut may come while one waits for the other's disk
    )  # fmt: skip
    straight = make_recipe(parts, tmp_path / "straight", "zero2", steps=steps, dropout=0.1)
    run = tmp_path / "run"
    with two_hosts.two_hosts() as hosts:
        group = ranks.start([write(recipe)], hosts=list(hosts))
        wait_until((run / "checkpoint-000002").exists, lambda: group.outputs)
        hosts[1].cable("down")
        ranks.finish(group)
        assert all(code > 0 for code in group.codes), (group.codes, group.outputs)  # and none crashed
        said = group.output(0)
        assert "suspect the network between their hosts" in said or "cannot be reached" in said, group.outputs
        assert not (run / f"checkpoint-{steps:06d}").exists()
        hosts[1].cable("up")
        again = ranks.finish(ranks.start([write(recipe)], hosts=list(hosts)))
        assert again.codes == [0, 0], again.outputs
    ranks.run([write(straight)])
    assert hexed(run) == hexed(tmp_path / "straight")
    assert weights(run, steps) == weights(tmp_path / "straight", steps)
