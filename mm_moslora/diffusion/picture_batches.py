"""The pictures of a run, and the batches of latents that are made of them.

Order, crops, flips, latents, noise and timesteps follow from the seed and the step alone, so that a resumed run sees
what the straight run would have seen. Pixels are ``[1, 3, S, S]`` from -1 to 1; sizes see `pipeline_families`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mm_moslora.data.images.record_picture import check_image, open_image
from mm_moslora.diffusion.diffusion_recipe import PicturesConfig
from mm_moslora.diffusion.pipeline_families import Conditioning, LatentBatch, PipelineFamily, draw_timesteps
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import number_of, sha256_of, sha256_of_values
from mm_moslora.utils.untrusted_files import FileError, find_below

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU whose numbers follow from the key alone."""
    return torch.Generator().manual_seed(number_of("/".join(map(str, key))))


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Pictures of one prompt, in an endless order that is shuffled for each epoch."""

    name: str
    files: list[Path]
    prompt: str
    weight: float
    config: PicturesConfig
    seed: int
    side: int

    def entries(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Index and epoch of the pictures at `count` positions of the order."""
        for position in range(start, start + count):
            epoch, index = divmod(position, len(self.files))
            draws = generator(self.seed, self.name, "order", epoch)
            yield int(torch.randperm(len(self.files), generator=draws)[index]), epoch

    def pixels(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Read, mirror, resize and crop a picture; its pixels and sizes."""
        draws = generator(self.seed, self.name, "picture", index, 0 if self.config.cache_latents else epoch)
        picture = open_image(self.files[index])
        if self.config.flip and torch.rand((), generator=draws) < 0.5:
            picture = ImageOps.mirror(picture)
        original, side = (picture.height, picture.width), self.side
        width, height = (max(side, round(side / min(picture.size) * length)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - side) // 2, (width - side) // 2
        if self.config.crop == "random":
            top, left = (int(torch.randint(length - side + 1, (), generator=draws)) for length in (height, width))
        square = picture.crop((left, top, left + side, top + side))
        values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(side, side, 3)
        return values.permute(2, 0, 1)[None].float() / 127.5 - 1, torch.tensor([*original, top, left, side, side])


class LatentBatches:
    """Makes the batches of a run: the subject's pictures, then those of the class where prior preservation is on."""

    def __init__(self, family: PipelineFamily) -> None:
        self.family, self.recipe = family, family.recipe
        config, prior = self.recipe.data, self.recipe.data.prior
        same: dict[str, Any] = {"config": config, "seed": self.recipe.train.seed, "side": family.resolution}
        files = pictures_in("data", config.pictures)
        self.sets = [PictureSet(name="subject", files=files, prompt=config.prompt, weight=1.0, **same)]
        if prior is not None:
            files = pictures_in("data.prior", prior.pictures)
            self.sets.append(PictureSet(name="class", files=files, prompt=prior.prompt, weight=prior.weight, **same))
        self._latents: dict[tuple[str, int], tuple[Tensor, Tensor, Tensor]] = {}
        self._conditioning: dict[str, Conditioning] = {}

    def digest(self) -> str:
        """Digest of the names and contents of all pictures, and of their prompts."""
        rows = [[one.prompt, *((path.name, sha256_of(path)) for path in one.files)] for one in self.sets]
        return sha256_of_values(rows, ascii_only=True)

    @torch.no_grad()
    def fill_caches(self) -> None:
        """Encode the prompts, and the pictures where the recipe says so."""
        for pictures in self.sets:
            self._conditioning[pictures.name] = self.family.encode(pictures.prompt)
            for index in range(len(pictures.files) if self.recipe.data.cache_latents else 0):
                self._latents[pictures.name, index] = self._encoded(pictures, index, 0)
        self.family.rest()

    def _encoded(self, pictures: PictureSet, index: int, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and deviation of the VAE's distribution, and sizes, on the CPU."""
        vae, (pixels, sizes) = self.family.pipeline.vae, pictures.pixels(index, epoch)
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
        return latents.mean[0].float().cpu(), latents.std[0].float().cpu(), sizes

    @torch.no_grad()
    def batch(self, step: int, micro: int, device: torch.device) -> LatentBatch:
        """The batch of a forward pass, number `micro` of the optimiser step that follows `step` others."""
        train = self.recipe.train
        draws = generator(train.seed, "step", step, micro)
        latents, sizes, told, weights = [], [], [], []
        for pictures in self.sets:
            for index, epoch in pictures.entries((step * train.accumulation + micro) * train.batch, train.batch):
                cached = self._latents.get((pictures.name, index))
                mean, deviation, size = cached or self._encoded(pictures, index, epoch)
                latents.append(self.family.to_latents(mean + deviation * torch.randn(mean.shape, generator=draws)))
                sizes.append(size)
                told.append(self._conditioning[pictures.name])
                weights.append(pictures.weight)
        x = torch.stack(latents)
        return LatentBatch(
            latents=x.to(device), noise=torch.randn(x.shape, generator=draws).to(device),
            draws=draw_timesteps(self.family, len(x), draws).to(device), sizes=torch.stack(sizes).to(device),
            weights=torch.tensor(weights).to(device), subjects=train.batch,
            conditioning={name: torch.cat([one[name] for one in told]).to(device) for name in told[0]},
        )  # fmt: skip


def pictures_in(key: str, name: str) -> list[Path]:
    """The pictures of a folder; `key` is the part of the recipe that names it."""
    folder = Path(name)
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    try:
        found = [find_below(folder.resolve(), one) for one in names if one.lower().endswith(SUFFIXES)]
    except FileError as error:
        raise DataError(f"{key}.pictures: {error}") from error
    if not found:
        what = "holds no pictures" if folder.is_dir() else "is no folder"
        raise DataError(f"{key}.pictures {folder} {what} ({', '.join(SUFFIXES)}). Name a folder with pictures in it.")
    for path in found:
        check_image(path)
    return found
