"""The loss of every family against its definition, written here a second time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mm_moslora.diffusion.picture_batches import LatentBatches
from mm_moslora.diffusion.pipeline_families import DenoisingLoss, LatentBatch, load_family
from tests.builders.tiny_pipelines import tiny_pipeline

CPU = torch.device("cpu")
PROMPT = "a photo of ikat cat"


def unet_errors(pipeline: Any, batch: LatentBatch, config: Any, sizes: Tensor | None = None) -> Tensor:
    """The weighted errors of SD or SDXL, from the betas themselves."""
    schedule, n = pipeline.scheduler.config, len(batch.latents)
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, schedule.num_train_timesteps)
    steps = (batch.draws * schedule.num_train_timesteps).floor().long()
    kept = (1 - betas).cumprod(0)[steps].view(-1, 1, 1, 1)
    a, s = kept.sqrt(), (1 - kept).sqrt()
    texts = pipeline.encode_prompt(PROMPT, device=CPU, num_images_per_prompt=n, do_classifier_free_guidance=False)
    told = None if sizes is None else {"text_embeds": texts[2], "time_ids": sizes}
    noisy = a * batch.latents + s * batch.noise
    predicted = pipeline.unet(noisy, steps, texts[0], added_cond_kwargs=told).sample
    velocity = schedule.prediction_type == "v_prediction"
    target = a * batch.noise - s * batch.latents if velocity else batch.noise
    snr, gamma = (a / s).square().flatten(), config.min_snr_gamma
    weights = torch.ones(n) if gamma is None else snr.clamp(max=gamma) / (snr + 1 if velocity else snr)
    return weights * (predicted - target).square().mean((1, 2, 3))


def sdxl(pipeline: Any, batch: LatentBatch, config: Any) -> Tensor:
    """With prior preservation: the weighted mean over the class is added to that over the subject."""
    assert batch.sizes[:, 0].tolist() == [80] * 6  # the height of every drawing
    errors = unet_errors(pipeline, batch, config, batch.sizes)
    return errors[:3] + 0.5 * errors[3:]


def flow(batch: LatentBatch, shift: float) -> tuple[Tensor, Tensor, Tensor]:
    """Shares of the noise (of shifted timesteps), noisy latents and the target."""
    plain = 1 - (batch.draws * 1000).floor() / 1000
    share = shift * plain / (1 + (shift - 1) * plain)
    mixed = share.view(-1, 1, 1, 1)
    return share, (1 - mixed) * batch.latents + mixed * batch.noise, batch.noise - batch.latents


def stable_diffusion_3(pipeline: Any, batch: LatentBatch, _config: Any) -> Tensor:
    share, noisy, target = flow(batch, 3.0)
    options = {"device": CPU, "num_images_per_prompt": len(noisy), "do_classifier_free_guidance": False}
    text, _, pooled, _ = pipeline.encode_prompt(PROMPT, None, None, **options)
    return (pipeline.transformer(noisy, text, pooled, 1000 * share).sample - target).square()


def flux(pipeline: Any, batch: LatentBatch, _config: Any) -> Tensor:
    share, noisy, target = flow(batch, 1.0)
    n, c, h, w = noisy.shape
    text, pooled, _ = pipeline.encode_prompt(PROMPT, None, device=CPU, num_images_per_prompt=n)

    def pack(values: Tensor) -> Tensor:
        """Squares of 2 x 2 latents as tokens."""
        return values.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)

    places = torch.tensor([[0.0, row, column] for row in range(h // 2) for column in range(w // 2)])
    predicted = pipeline.transformer(
        hidden_states=pack(noisy), encoder_hidden_states=text, timestep=share, pooled_projections=pooled,
        img_ids=places, txt_ids=torch.zeros(text.shape[1], 3), guidance=torch.full((n,), 3.5),
    ).sample  # fmt: skip
    return (predicted - pack(target)).square()


CASES = [
    ("tiny-sd", (), unet_errors),
    ("tiny-sd", ("loss.min_snr_gamma=0.7",), unet_errors),
    ("tiny-sd-v", (), unet_errors),
    ("tiny-sd-v", ("loss.min_snr_gamma=0.7",), unet_errors),
    ("tiny-sdxl", ("data.prior.prompt=a photo of ikat cat", "data.prior.weight=0.5", "data.crop=random"), sdxl),
    ("tiny-sd3", ("loss.flow_weighting=none",), stable_diffusion_3),
    ("tiny-flux", ("loss.flow_weighting=none", "loss.flux_guidance=3.5"), flux),
]


@pytest.mark.parametrize(("kind", "changes", "definition"), CASES)
@torch.no_grad()
def test_the_loss_is_that_of_its_definition(
    kind: str, changes: tuple[str, ...], definition: Callable[..., Tensor], recipe: Callable[..., Any], pipelines: Path
) -> None:
    prior = [f"data.prior.pictures={pipelines / 'pictures'}"] if kind == "tiny-sdxl" else []
    own = recipe("train.batch=3", *changes, *prior, kind=kind)
    batches = LatentBatches(load_family(own, dtype=torch.float32, commits={}))
    batches.fill_caches()
    batch = batches.batch(0, 0, CPU)
    assert batch.draws.unique().numel() == len(batch.latents) == 3 * (1 + len(prior))
    expected = definition(tiny_pipeline(kind), batch, own.loss).mean()
    torch.testing.assert_close(DenoisingLoss(batches.family)(batch), expected)


def test_latents_have_the_scale_that_the_pipeline_decodes(recipe: Callable[..., Any]) -> None:
    """SD3's and Flux's VAE has a shift, SDXL's may have statistics of each channel."""
    values = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    shifted, family = (load_family(recipe(kind=k), dtype=torch.float32, commits={}) for k in ("tiny-sd3", "tiny-sdxl"))
    torch.testing.assert_close(shifted.to_latents(values), (values - 0.1) * 1.5)
    vae: Any = family.pipeline.vae
    vae.register_to_config(latents_mean=[0.5, -0.5], latents_std=[2.0, 0.5])
    expected = torch.stack([(values[0] - 0.5) / 2, (values[1] + 0.5) / 0.5])
    torch.testing.assert_close(family.to_latents(values), expected * vae.config.scaling_factor)
