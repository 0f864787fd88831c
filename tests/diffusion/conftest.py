"""Recipes of tiny pipelines, and folders of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, load_diffusion_recipe

Make = Callable[..., DiffusionRecipe]


@pytest.fixture
def recipe(tmp_path: Path) -> Make:
    """Makes a recipe of a few steps that draws nothing."""

    def make(*changes: str, run: str = "run") -> DiffusionRecipe:
        base = [
            f"train.output={tmp_path / run}", "train.steps=4", "train.save_every=0", "train.precision=fp32",
            "track.trackers=[]", "optim.lr=0.02", "validate.prompts=[]",
        ]  # fmt: skip
        return load_diffusion_recipe("tiny_subject", [*base, *changes])

    return make
