"""Folders of tiny pipelines and of pictures, and recipes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe, load_diffusion_recipe
from tests.builders.tiny_pipelines import SIDE, TINY_PIPELINES, save_pictures, tiny_pipeline


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline of every family in a folder named after its kind, and `pictures`."""
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in TINY_PIPELINES:
        tiny_pipeline(kind).save_pretrained(folder / kind)
    save_pictures(folder / "pictures")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, pipelines: Path) -> Callable[..., DiffusionRecipe]:
    """Makes the recipe of a run of a few steps in the folder `run`."""

    def make(*changes: str, kind: str = "tiny-sdxl", run: str = "run") -> DiffusionRecipe:
        few = [
            f"model.base={pipelines / kind}", "model.vae=null", f"data.pictures={pipelines / 'pictures'}",
            f"data.resolution={SIDE}", "data.cache_latents=false", "data.crop=centre", "train.steps=4",
            "train.accumulation=2", "train.precision=fp32", "track.trackers=[]", "optim.lr=0.02",
            f"train.output={tmp_path / run}",
        ]  # fmt: skip
        return load_diffusion_recipe("sdxl_subject", [*few, *changes])

    return make
