"""Optimisers of whole parameters on several ranks."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from trials import full, hexed, losses, make_recipe, with_optimizer, write

from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder
from mm_moslora.training.snapshot import OPTIMIZER
from mm_moslora.training.training_loop import train


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw_8bit", "muon"])
def test_two_ranks_share_the_checkpoint_and_one_goes_on_from_it(name, parts, ranks, tmp_path):
    """`train.zero: auto` is ZeRO-0, and every rank writes the states of its part of the parameters."""

    def recipe(folder):
        return with_optimizer(full(make_recipe(parts, tmp_path / folder, "auto", save_every=2, keep_last=0)), name)

    straight, run, other = map(recipe, ("straight", "run", "other"))
    ranks.run([write(straight), f"{write(run)}@2", write(run), f"{write(other)}@2"])
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    written = [set(load_file(rank_folder(tmp_path / "run" / "checkpoint-000004", rank) / OPTIMIZER)) for rank in (0, 1)]
    assert all(written)
    assert not written[0] & written[1]
    assert train(other).finished
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "straight"), rel=2e-3)
