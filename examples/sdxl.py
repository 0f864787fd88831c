"""SDXL for `dreambooth.py`: encode prompts and pictures once, train the UNet's adapter, write it.

On a GPU in bfloat16; on a CPU in float32, which only a tiny model from a config is small enough for.

Shapes: pictures ``[N, 3, H, W]`` in -1..1, latents ``[N, 4, H / 8, W / 8]``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from dreambooth import Example, Recipe, adapt, noise_objective, train, write
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as pictures_to

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def run(model: str, recipe: Recipe, pictures: Path, class_pictures: Path, out: Path) -> list[float]:
    """Train SDXL's UNet on a subject.

    Args:
        model: folder or hub id of SDXL base.
        recipe: how to train.
        pictures: folder of the subject's pictures.
        class_pictures: folder of pictures of its class, for prior preservation.
        out: folder to write the adapter into.

    Returns:
        The loss of every step.
    """
    from diffusers import DDPMScheduler, StableDiffusionXLPipeline

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=dtype, trust_remote_code=False).to(device)
    pipeline.vae.to(torch.float32)  # SDXL's own VAE overflows in half precision
    subject = _examples(pipeline, recipe, recipe.prompt, pictures)
    prior = _examples(pipeline, recipe, recipe.class_prompt, class_pictures)
    pipeline.vae.cpu(), pipeline.text_encoder.cpu(), pipeline.text_encoder_2.cpu()
    pipeline.unet.enable_gradient_checkpointing()
    denoiser = adapt(pipeline.unet, recipe)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    losses = train(denoiser, recipe, noise_objective(scheduler), _endless(subject, prior))
    write(denoiser, out, component="unet")
    return losses


def _endless(subject: list[Example], prior: list[Example]) -> Iterator[tuple[Example, Example]]:
    yield from zip(itertools.cycle(subject), itertools.cycle(prior), strict=False)


@torch.no_grad()
def _examples(pipeline: Any, recipe: Recipe, prompt: str, folder: Path) -> list[Example]:
    """One example per picture: latents and the prompt's embeddings are computed once."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not files:
        raise SystemExit(f"{folder} holds no pictures ({', '.join(_SUFFIXES)}).")
    text, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    side = recipe.resolution
    # SDXL is told the original size, the crop and the target size of a picture.
    sizes = torch.tensor([[side, side, 0, 0, side, side]], device=text.device, dtype=text.dtype)
    extra = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    scale = pipeline.vae.config.scaling_factor
    examples = []
    for path in files:
        pixels = _square(path, side).to(text.device)
        latents = pipeline.vae.encode(pixels).latent_dist.mode() * scale
        examples.append(Example(latents=latents.to(text.dtype), text=text, extra=extra))
    return examples


def _square(path: Path, side: int) -> Tensor:
    picture = Image.open(path).convert("RGB")
    cropped = pictures_to.center_crop(picture, [min(picture.size)] * 2)
    return pictures_to.to_tensor(pictures_to.resize(cropped, [side, side])).unsqueeze(0) * 2 - 1
