"""Batches of latents. The VAE encodes pictures, and the text encoders prompts: once each, where the recipe allows it.

Every draw (crop, latent, noise, timestep) follows from the seed, the step and the rank, so nothing has to be saved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mm_moslora.diffusion.denoising_loss import LatentBatch, draw_timesteps
from mm_moslora.diffusion.pipeline_families import Conditioning, PipelineFamily
from mm_moslora.diffusion.subject_pictures import PictureSet, generator
from mm_moslora.utils.progress_bar import Progress

Encoded = tuple[Tensor, Tensor, Tensor]
"""Mean and deviation of the VAE's distribution, and sizes, on the CPU."""


class LatentBatches:
    """Makes the batches of a run.

    Args:
        family: the loaded pipeline, on its device.
        sets: the subject's pictures, then those of the class where prior preservation is on.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, family: PipelineFamily, sets: Sequence[PictureSet], *, rank: int, world_size: int) -> None:
        self.family, self.sets, self.rank, self.world_size = family, sets, rank, world_size
        self.recipe = family.recipe
        self._latents: dict[tuple[str, int], Encoded] = {}
        self._conditioning: dict[str, Conditioning] = {}

    @property
    def per_step(self) -> int:
        """The subject's pictures of an optimiser step, over all processes."""
        train = self.recipe.train
        return train.batch * train.accumulation * self.world_size

    def fingerprint(self, *, sizes_only: bool = False) -> str:
        """Of all pictures; see `PictureSet`."""
        return "-".join(pictures.fingerprint(sizes_only=sizes_only) for pictures in self.sets)

    @torch.no_grad()
    def fill_caches(self) -> None:
        """Encode the prompts where the text encoders are frozen, and the pictures where the recipe says so."""
        prompts = sorted({item.prompt for pictures in self.sets for item in pictures.pictures})
        if self.recipe.model.text_encoders == "frozen":
            for prompt in prompts:
                self._conditioning[prompt] = self.family.encode([prompt])
        if self.recipe.data.cache_latents:
            with Progress("encode pictures", sum(map(len, self.sets)), unit="picture") as progress:
                for pictures in self.sets:
                    for entry in range(len(pictures)):
                        self._latents[pictures.name, entry] = self._encoded(pictures, entry, 0)
                        progress.update(len(self._latents))
        self.family.rest()

    def _encoded(self, pictures: PictureSet, entry: int, epoch: int) -> Encoded:
        vae = self.family.pipeline.vae
        pixels = pictures.pixels(entry, epoch)
        latents = vae.encode(pixels.values.unsqueeze(0).to(vae.device, vae.dtype)).latent_dist
        return latents.mean[0].float().cpu(), latents.std[0].float().cpu(), pixels.sizes

    @torch.no_grad()
    def batch(self, step: int, micro: int, device: torch.device) -> LatentBatch:
        """The batch of one forward pass.

        Args:
            step: optimiser steps done before.
            micro: number of the forward pass within the step.
            device: where the batch is needed.
        """
        recipe, count = self.recipe, self.recipe.train.batch
        pass_number = micro * self.world_size + self.rank  # so that N processes draw what one draws that accumulates N
        draws = generator(recipe.train.seed, "step", step, pass_number)
        start = step * self.per_step + pass_number * count
        latents, sizes, prompts = [], [], []
        for pictures in self.sets:
            for entry, epoch in pictures.entries(start, count):
                cached = self._latents.get((pictures.name, entry))
                mean, deviation, size = cached or self._encoded(pictures, entry, epoch)
                latents.append(self.family.to_latents(mean + deviation * torch.randn(mean.shape, generator=draws)))
                sizes.append(size)
                prompts.append(pictures.prompt(entry))
        x = torch.stack(latents)
        conditioning = None
        if self._conditioning:
            conditioning = {
                name: torch.cat([self._conditioning[prompt][name] for prompt in prompts])
                for name in self._conditioning[prompts[0]]
            }
        prior = recipe.data.prior
        weights = torch.ones(len(x))
        if prior is not None:
            weights[count:] = prior.weight
        return LatentBatch(
            latents=x.to(device), noise=torch.randn(x.shape, generator=draws).to(device),
            draws=draw_timesteps(self.family, len(x), draws).to(device), sizes=torch.stack(sizes).to(device),
            weights=weights.to(device), subjects=count, prompts=prompts,
            conditioning=conditioning and {name: value.to(device) for name, value in conditioning.items()},
        )  # fmt: skip
