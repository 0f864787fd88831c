"""Pictures of the untuned pipeline: each is of the model, the prompt and the settings of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers", reason="diffusers is not installed")

from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
from mm_moslora.diffusion.drawing import ValidationPictures, complete_class_pictures, draw, untuned_digests
from mm_moslora.diffusion.pipeline_families import PipelineFamily, load_family
from mm_moslora.diffusion.tiny_pipelines import SIDE
from mm_moslora.utils.errors import ConfigError

Make = Callable[..., DiffusionRecipe]
ONE = ("validate.prompts=[a cat]", "validate.pictures=1", "validate.sampling_steps=1")


def loaded(recipe: DiffusionRecipe) -> PipelineFamily:
    return load_family(recipe, dtype=torch.float32)


def same(first: Path, second: Path) -> bool:
    return bool((np.asarray(Image.open(first)) == np.asarray(Image.open(second))).all())


def test_the_untuned_model_draws_anew_where_its_prompt_or_settings_or_the_model_changed(
    recipe: Make, tmp_path: Path
) -> None:
    found = []
    for change in ("", "validate.prompts=[a dog]", "validate.seed=1", "model.base=tiny-sd", "data.resolution=32", ""):
        pictures = ValidationPictures(loaded(recipe(*ONE, *([change] if change else []))), tmp_path)
        pictures.draw_untuned()
        found += pictures.untuned
    assert len({*found}) == len({path.read_bytes() for path in found}) == 5
    assert found[-1] == found[0]


def test_a_folder_of_a_pipeline_is_known_by_its_contents(recipe: Make, tmp_path: Path) -> None:
    family = loaded(recipe("model.base=tiny-sd"))

    def digest(folder: str) -> str:
        family.recipe = recipe(f"model.base={tmp_path / folder}")
        return untuned_digests(family, [("a cat", 0)])[0]

    for folder in ("here", "moved", "other"):
        (tmp_path / folder / "unet").mkdir(parents=True)
        (tmp_path / folder / "unet" / "weights.safetensors").write_text("other" if folder == "other" else "first")
    assert digest("here") == digest("moved") != digest("other")


def test_class_pictures_of_another_prompt_are_left_alone_and_not_trained_on(recipe: Make, tmp_path: Path) -> None:
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "mine.png")
    drawn: dict[str, list[Path]] = {}
    for prompt in ("a cat", "a dog", "a cat"):
        prior = (f"data.prior.prompt={prompt}", "data.prior.count=2", "validate.sampling_steps=1")
        family = loaded(recipe(*prior))
        (digest,) = untuned_digests(family, [(prompt, 0)])
        found = complete_class_pictures(family, tmp_path, digest)
        assert drawn.setdefault(prompt, found) == found
    assert [path.name for path in drawn["a cat"]][1] == [path.name for path in drawn["a dog"]][1] == "mine.png"
    assert not same(drawn["a cat"][0], drawn["a dog"][0])
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_statistics_of_a_vae_are_applied_as_stock_diffusers_applies_them(recipe: Make) -> None:
    family = loaded(recipe())
    pipeline: Any = family.pipeline
    pipeline.vae.register_to_config(latents_mean=[0.5, -0.5, 1.0, 0.0], latents_std=[2.0, 1.0, 0.5, 1.0])
    own = draw(family, "a cat", 0, sampling_steps=1, guidance=None)
    noise = torch.Generator().manual_seed(0)
    stock = pipeline("a cat", num_inference_steps=1, height=SIDE, width=SIDE, generator=noise).images[0]
    assert np.abs(np.asarray(own, dtype=int) - np.asarray(stock, dtype=int)).max() <= 1
    values = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = (values - torch.tensor([0.5, -0.5, 1, 0]).view(4, 1, 1)) * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(family.to_latents(values), expected / torch.tensor([2, 1, 0.5, 1]).view(4, 1, 1))


def test_a_side_that_the_pipeline_does_not_take_is_one_error_with_the_nearest_good_one(recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"data.resolution is 256, .* takes multiples of 8 up to 128. Choose 128\."):
        loaded(recipe("model.base=tiny-sd3", "data.resolution=256"))
    flux = loaded(recipe("model.base=tiny-flux", "data.resolution=72"))
    flux.pipeline.vae_scale_factor = 8  # of real weights
    with pytest.raises(ConfigError, match=r"data.resolution is 72, .* takes multiples of 16. Choose (64|80)\."):
        flux.check_resolution()
