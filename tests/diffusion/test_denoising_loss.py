"""The loss of denoisers against its definition, and the batches that it gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed")

from mm_moslora.diffusion import diffusion_setup
from mm_moslora.diffusion.denoising_loss import DenoisingLoss
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe

Make = Callable[..., DiffusionRecipe]


def prepared(recipe: DiffusionRecipe) -> tuple[Any, DenoisingLoss, dict[str, Any]]:
    """A run, its loss, and what its denoiser is called with."""
    run = diffusion_setup.prepare(recipe, Path(recipe.train.output), "fp32")
    seen: dict[str, Any] = {}
    predict = run.family.predict

    def remember(noisy: Any, timesteps: Any, conditioning: Any, sizes: Any) -> torch.Tensor:
        seen.update(noisy=noisy, timesteps=timesteps, conditioning=conditioning, sizes=sizes)
        seen["predicted"] = predict(noisy, timesteps, conditioning, sizes)
        return seen["predicted"]

    run.family.predict = remember
    return run, DenoisingLoss(run.family), seen


@pytest.mark.parametrize(("base", "gamma"), [("tiny-sd", 0.7), ("tiny-sd-v", None), ("tiny-sd-v", 0.7)])
def test_noise_and_v_prediction_have_the_target_and_the_weight_of_their_definition(
    base: str, gamma: float | None, recipe: Make
) -> None:
    weight = () if gamma is None else (f"loss.min_snr_gamma={gamma}",)
    run, loss, seen = prepared(recipe(f"model.base={base}", "train.batch=3", *weight))
    batch = run.batches.batch(0, 0, torch.device("cpu"))
    value = loss(batch)
    alphas = loss.scheduler.alphas_cumprod[seen["timesteps"]]
    a, s = alphas.sqrt().view(-1, 1, 1, 1), (1 - alphas).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], a * batch.latents + s * batch.noise)
    velocity = base.endswith("-v")
    target = a * batch.noise - s * batch.latents if velocity else batch.noise
    snr = alphas / (1 - alphas)
    weights = torch.ones(3)
    if gamma is not None:
        weights = snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    errors = (seen["predicted"] - target).square().flatten(1).mean(1)
    torch.testing.assert_close(value, (weights * errors).mean())


@pytest.mark.parametrize("base", ["tiny-sd3", "tiny-flux"])
def test_flows_learn_the_way_from_picture_to_noise(base: str, recipe: Make) -> None:
    run, loss, seen = prepared(recipe(f"model.base={base}", "train.batch=2", "loss.flow_weighting=none"))
    batch = run.batches.batch(0, 0, torch.device("cpu"))
    value = loss(batch)
    share = (seen["timesteps"] / 1000).view(-1, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], (1 - share) * batch.latents + share * batch.noise)
    target = batch.noise - batch.latents
    torch.testing.assert_close(value, (seen["predicted"] - target).square().mean())
    plain = batch.draws * 1000
    shift = 3.0 if base == "tiny-sd3" else 1.0
    expected = 1000 * shift * (1 - plain.floor() / 1000) / (1 + (shift - 1) * (1 - plain.floor() / 1000))
    torch.testing.assert_close(seen["timesteps"], expected)


def test_prior_preservation_adds_the_weighted_mean_over_the_class(recipe: Make) -> None:
    prior = ("data.prior.prompt=a cat", "data.prior.count=2", "data.prior.weight=0.5", "validate.sampling_steps=1")
    run, loss, seen = prepared(recipe("train.batch=2", *prior))
    batch = run.batches.batch(0, 0, torch.device("cpu"))
    value = loss(batch)
    assert batch.prompts == ["a photo of an ikat cat"] * 2 + ["a cat"] * 2
    errors = (seen["predicted"] - batch.noise).square().flatten(1).mean(1)
    torch.testing.assert_close(value, errors[:2].mean() + 0.5 * errors[2:].mean())


def test_sdxl_is_told_the_sizes_and_latents_are_drawn_anew_with_a_cache(recipe: Make) -> None:
    cached = recipe("data.cache_latents=true", "data.crop=random")
    run, loss, seen = prepared(cached)
    first, again, later = (run.batches.batch(step, 0, torch.device("cpu")) for step in (0, 0, 4))
    loss(first)
    assert seen["sizes"][0].tolist()[0] == 80
    assert seen["sizes"][0].tolist()[4:] == [64, 64]
    assert torch.equal(first.latents, again.latents)
    entry = {tuple(size.tolist()) for step in range(8) for size in run.batches.batch(step, 0, first.noise.device).sizes}
    assert len(entry) <= 4  # one crop of each picture
    assert not torch.equal(first.latents, later.latents)
    family = run.family
    mean, deviation, _ = next(iter(run.batches._latents.values()))
    assert float(deviation.abs().max()) > 0
    assert family.to_latents(mean).shape == first.latents[0].shape
