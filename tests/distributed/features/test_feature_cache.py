"""A feature cache that several ranks share, on the stage that cuts up the encoder."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trials import losses, make_recipe, metrics, write

pytestmark = pytest.mark.slow


def test_two_ranks_share_a_cache_and_change_no_number(parts, ranks, tmp_path):
    """Ranks find different pictures there, and one step has a rank without any; ZeRO-3 gathers the encoder on all."""
    plain = make_recipe(parts, tmp_path / "plain", "zero3", order="sequential", global_batch=4, micro_batch=1, steps=4)
    vision = replace(plain.model.vision, feature_cache=str(tmp_path / "features"))
    runs = [
        replace(
            plain,
            model=replace(plain.model, vision=vision),
            train=replace(plain.train, output=str(tmp_path / name), steps=steps),
        )
        for name, steps in (("first", 2), ("second", 4), ("third", 4))
    ]
    ranks.run([write(plain), *map(write, runs)])
    for name in ("second", "third"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert 0 < metrics(tmp_path / "second")[-1]["feature_cache_hits"] < 1
    assert metrics(tmp_path / "third")[-1]["feature_cache_hits"] == 1
