#!/usr/bin/env python
"""Teach a diffusion model one subject with MoSLoRA (DreamBooth with prior preservation, arXiv 2208.12242).

    python examples/dreambooth.py                                      a tiny model made from a config, on a CPU
    python examples/dreambooth.py --recipe examples/recipes/sdxl_dreambooth_moslora.yaml \
        --model PATH_OR_ID --pictures DIR --class-pictures DIR --out DIR  SDXL, on a GPU

The adapter sits in the attention layers of the denoiser: a UNet (which predicts the noise) or a transformer (which
predicts the velocity of a straight path from data to noise). It is written twice: as a MoSLoRA folder, and as
`pytorch_lora_weights.safetensors`, which stock diffusers reads with `pipeline.load_lora_weights(folder)`.

Shapes: latents ``[N, C, H, W]``, text ``[N, L, D]``, pooled text ``[N, P]``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, export_adapter, save_adapter

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; the defaults are those of the paper's SDXL experiment (arXiv 2406.11909, section 4.3)."""

    rank: int = 4
    """R; alpha is the same, so that s = 1."""
    mixer_init: str = "orthogonal"
    """How M starts."""
    mixer_trainable: bool = True
    """False with mixer_init identity is plain LoRA."""
    init_lora_weights: str = "gaussian"
    """How A starts."""
    targets: tuple[str, ...] = TARGETS
    """Names of the adapted layers."""
    lr: float = 1e-4
    """Constant learning rate."""
    steps: int = 500
    """Optimiser steps."""
    accumulation: int = 4
    """Micro-batches per step."""
    prior_weight: float = 1.0
    """Weight of the loss on pictures of the class, which keeps the model from forgetting it."""
    prompt: str = "a photo of sks subject"
    """Prompt of the subject's pictures."""
    class_prompt: str = "a photo of a subject"
    """Prompt of the class's pictures."""
    resolution: int = 1024
    """Side of a picture, in pixels."""
    seed: int = 0
    """Seed of noise and timesteps."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Latents and their conditioning, ready for the denoiser."""

    latents: Tensor
    """``[N, C, H, W]``."""
    text: Tensor
    """``[N, L, D]``."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of the denoiser."""


Objective = Callable[[nn.Module, Example, torch.Generator], tuple[Tensor, Tensor]]


def noise_objective(scheduler: Any) -> Objective:
    """Predict the noise of a DDPM-like scheduler, as UNets are trained: returns prediction and target."""

    def objective(denoiser: nn.Module, example: Example, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = example.latents
        noise = torch.randn(x.shape, generator=generator).to(x)
        total = scheduler.config.num_train_timesteps
        steps = torch.randint(total, (len(x),), generator=generator).to(x.device)
        noisy = scheduler.add_noise(x, noise, steps)
        return denoiser(noisy, steps, encoder_hidden_states=example.text, **example.extra).sample, noise

    return objective


def flow_objective(denoiser: nn.Module, example: Example, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Predict the velocity from data to noise, as transformer denoisers are trained: returns prediction and target."""
    x = example.latents
    noise = torch.randn(x.shape, generator=generator).to(x)
    sigma = torch.rand(len(x), generator=generator).to(x)
    share = sigma.view(-1, 1, 1, 1)
    noisy = (1 - share) * x + share * noise
    prediction = denoiser(
        hidden_states=noisy, timestep=sigma * 1000, encoder_hidden_states=example.text, **example.extra
    ).sample
    return prediction, noise - x


def adapt(denoiser: nn.Module, recipe: Recipe) -> nn.Module:
    """Put MoSLoRA into the attention layers; everything else is frozen."""
    config = MoSLoRAConfig(
        r=recipe.rank,
        lora_alpha=recipe.rank,
        mixer_init=recipe.mixer_init,  # type: ignore[arg-type]
        mixer_trainable=recipe.mixer_trainable,
        init_lora_weights=recipe.init_lora_weights,  # type: ignore[arg-type]
    )
    return add_moslora(denoiser, config, targets=list(recipe.targets)).train()


def train(
    denoiser: nn.Module, recipe: Recipe, objective: Objective, pairs: Iterator[tuple[Example, Example]]
) -> list[float]:
    """The training loop.

    Args:
        denoiser: adapted with `adapt`.
        recipe: how to train.
        objective: what the denoiser predicts.
        pairs: without end, pictures of the subject and pictures of its class.

    Returns:
        The loss of every step.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0)
    losses = []
    for _ in range(recipe.steps):
        total = 0.0
        for _ in range(recipe.accumulation):
            subject, prior = next(pairs)
            loss = _loss(denoiser, objective, subject, generator)
            loss = loss + recipe.prior_weight * _loss(denoiser, objective, prior, generator)
            (loss / recipe.accumulation).backward()
            total += float(loss.detach()) / recipe.accumulation
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _loss(denoiser: nn.Module, objective: Objective, example: Example, generator: torch.Generator) -> Tensor:
    prediction, target = objective(denoiser, example, generator)
    return F.mse_loss(prediction.float(), target.float())


def write(denoiser: nn.Module, out: Path, *, component: str) -> None:
    """Write the MoSLoRA folder to `out/adapter` and diffusers' file next to it."""
    save_adapter(denoiser, out / "adapter")
    export_adapter(out / "adapter", out, layout="diffusers", component=component)


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML; unknown keys are errors."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = sorted(set(data) - {item.name for item in dataclasses.fields(Recipe)})
    if unknown:
        raise SystemExit(f"{path} has unknown keys {unknown}.")
    return Recipe(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})


def tiny_unet() -> nn.Module:
    """A UNet of a few thousand parameters with cross attention, from a config."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8,
    )  # fmt: skip


def tiny_transformer() -> nn.Module:
    """A transformer denoiser of the Stable Diffusion 3 family, from a config."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=3, out_channels=3, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
    )  # fmt: skip


def tiny_pairs(*, pooled: bool) -> Iterator[tuple[Example, Example]]:
    """Pictures of a red disc (the subject) and of discs of other colours (its class), and made-up text embeddings."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(2, 4, 16, generator=generator)
    summaries = torch.randn(2, 8, generator=generator)
    while True:
        sides = []
        for index in range(2):
            colour = torch.tensor([1.0, -1.0, -1.0]) if index == 0 else torch.rand(3, generator=generator) * 2 - 1
            extra = {"pooled_projections": summaries[index].expand(4, -1)} if pooled else {}
            pictures = _discs(colour, 4, generator)
            sides.append(Example(latents=pictures, text=texts[index].expand(4, -1, -1), extra=extra))
        yield sides[0], sides[1]


def _discs(colour: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    centres = 2.5 + 3 * torch.rand(count, 2, 1, 1, generator=generator)
    inside = ((rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2 < 6).float().unsqueeze(1)
    return inside * colour.view(1, 3, 1, 1)


def main() -> int:
    """Train the tiny model, or hand over to the SDXL script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--model", help="SDXL base: a folder or a hub id")
    parser.add_argument("--pictures", type=Path, help="folder of the subject's pictures")
    parser.add_argument("--class-pictures", type=Path, help="folder of pictures of its class")
    parser.add_argument("--out", type=Path, default=Path("runs/dreambooth"))
    options = parser.parse_args()
    if options.model:
        from sdxl import run

        run(options.model, read_recipe(options.recipe), options.pictures, options.class_pictures, options.out)
        return 0
    from diffusers import DDPMScheduler

    recipe = Recipe(lr=5e-3, steps=60, accumulation=1, rank=4)
    denoiser = adapt(tiny_unet(), recipe)
    losses = train(denoiser, recipe, noise_objective(DDPMScheduler()), tiny_pairs(pooled=False))
    write(denoiser, options.out, component="unet")
    print(f"loss {sum(losses[:10]) / 10:.3f} -> {sum(losses[-10:]) / 10:.3f}; wrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
