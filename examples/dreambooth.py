#!/usr/bin/env python
"""MoSLoRA in a plain training loop of diffusers: Stable Diffusion learns one subject.

    python examples/dreambooth.py --base stable-diffusion-v1-5/stable-diffusion-v1-5 --pictures cat/

`mm-moslora train` does this with other families and precisions, prior preservation and resuming.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, export_adapter, save_adapter


def train(
    pipeline: Any, pictures: Sequence[Image.Image], prompt: str, out: Path, *, steps: int, side: int, lr: float
) -> list[float]:
    """Train an adapter of the UNet, save it to `out`, and return the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    pipeline.to(device)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    config = MoSLoRAConfig(r=4, lora_alpha=4, init_lora_weights="gaussian")
    unet = add_moslora(pipeline.unet, config, targets=["to_q", "to_k", "to_v", "to_out.0"])

    with torch.no_grad():
        pixels = torch.cat([pipeline.image_processor.preprocess(ImageOps.fit(p, (side, side))) for p in pictures])
        latents = pipeline.vae.encode(pixels.to(device)).latent_dist.mean * pipeline.vae.config.scaling_factor
        told, _ = pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)

    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        clean = latents[step % len(latents)][None]
        noise, time = torch.randn_like(clean), torch.randint(len(scheduler.betas), (1,), device=device)
        noisy = scheduler.add_noise(clean, noise, time)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(clean, noise, time) if velocity else noise
        loss = torch.nn.functional.mse_loss(unet(noisy, time, encoder_hidden_states=told).sample, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    save_adapter(unet, out / "adapter")
    export_adapter(out / "adapter", out, layout="diffusers")  # for `pipeline.load_lora_weights(out)`, mixers folded
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--base", required=True, help="folder or hub id of a Stable Diffusion 1 or 2 pipeline")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of the subject's pictures")
    parser.add_argument("--prompt", default="a photo of sks cat")
    parser.add_argument("--out", type=Path, default=Path("runs/dreambooth"), help="folder to write into")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--side", type=int, default=512, help="side of the pictures, pixels")
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    subject = [Image.open(path).convert("RGB") for path in sorted(given.pictures.iterdir())]
    pipeline = StableDiffusionPipeline.from_pretrained(given.base, use_safetensors=True, trust_remote_code=False)
    losses = train(pipeline, subject, given.prompt, given.out, steps=given.steps, side=given.side, lr=given.lr)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; {given.out}")
