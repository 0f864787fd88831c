"""Pictures that a pipeline draws: of the class for prior preservation, and of validation prompts.

A picture's noise follows from its seed alone, so that pictures of several steps differ by the weights only. The file
name of a picture of the untuned pipeline holds a digest of all that it follows from, so that another model, prompt or
setting draws another file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mm_moslora.diffusion.pipeline_families import PipelineFamily
from mm_moslora.diffusion.subject_pictures import picture_files
from mm_moslora.diffusion.tiny_pipelines import TINY_PIPELINES
from mm_moslora.models.model_paths import cached_snapshot
from mm_moslora.models.weights_fingerprint import fingerprint
from mm_moslora.reporting.drawing_grid import DRAWINGS
from mm_moslora.tracking import Trackers
from mm_moslora.tracking.tracker import SampleAnswer
from mm_moslora.utils import distributed, files
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)

PICTURES = "pictures"
UNTUNED = "untuned"
_DRAWN = re.compile(r"drawn-([0-9a-f]{12})-(\d{5,})\.png")
"""A drawn picture of the class: digest and number."""


@torch.no_grad()
def draw(family: PipelineFamily, prompt: str, seed: int, *, sampling_steps: int, guidance: float | None) -> Image.Image:
    """One picture of a prompt."""
    more: dict[str, Any] = {} if guidance is None else {"guidance_scale": guidance}
    noise = torch.Generator().manual_seed(seed)
    latents = family.pipeline(
        prompt, num_inference_steps=sampling_steps, height=family.resolution, width=family.resolution, generator=noise,
        output_type="latent", **more,
    ).images  # fmt: skip
    picture: Image.Image = family.decode(latents, family.resolution)[0]
    return picture


def draw_all(family: PipelineFamily, due: Sequence[tuple[str, int, Path]], what: str) -> None:
    """Draw pictures, each of a prompt with a seed into a file, by the recipe's settings of validation."""
    steps, guidance = family.recipe.validate.sampling_steps, family.recipe.validate.guidance
    with Progress(f"draw {what}", len(due), unit="picture") as progress:
        for number, (prompt, seed, path) in enumerate(due, start=1):
            save_picture(draw(family, prompt, seed, sampling_steps=steps, guidance=guidance), path)
            progress.update(number)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        picture.save(part, "PNG")


def untuned_digests(family: PipelineFamily, pictures: Sequence[tuple[str, int]]) -> list[str]:
    """Digests of all that pictures of the untuned pipeline (a family without adapters) follow from."""
    model, validate = family.recipe.model, family.recipe.validate
    shared = [
        _source(model.base, model.revision), model.revision, model.variant, _source(model.vae, None),
        str(family.denoiser.dtype), family.resolution, validate.sampling_steps, validate.guidance,
    ]  # fmt: skip
    return [hashlib.sha256(json.dumps([*shared, *item]).encode()).hexdigest()[:12] for item in pictures]


def _source(name: str | None, revision: str | None) -> Any:
    """The contents of a folder, or the name and the commit of a model on the hub."""
    folder = Path(name or "")
    if name is None or not folder.is_dir():
        snapshot = None if name is None or name in TINY_PIPELINES else cached_snapshot(name, revision)
        return name if snapshot is None else [name, snapshot.name]
    return [(str(path.relative_to(folder)), fingerprint(path)) for path in sorted(folder.rglob("*")) if path.is_file()]


def _class_pictures(folder: Path, digest: str) -> list[Path]:
    """Pictures of the class: those with the digest, and all that have another name."""
    drawn = ((path, _DRAWN.fullmatch(path.name)) for path in picture_files(folder))
    return [path for path, parts in drawn if parts is None or parts[1] == digest]


def complete_class_pictures(family: PipelineFamily, folder: Path, digest: str) -> list[Path]:
    """The class's pictures for prior preservation; missing ones are drawn with the untuned pipeline.

    Args:
        family: without adapters.
        folder: keeps what it holds; drawn pictures are called `drawn-DIGEST-00000.png` and so on.
        digest: of `untuned_digests`; drawn pictures with another one are left alone.

    Returns:
        The first `data.prior.count` pictures of the folder.
    """
    prior = family.recipe.data.prior
    assert prior is not None
    present = {path.name for path in _class_pictures(folder, digest)}
    names = (f"drawn-{digest}-{number:05d}.png" for number in range(prior.count + len(present)))
    wanted = [name for name in names if name not in present][: max(0, prior.count - len(present))]
    missing = distributed.from_main(wanted)  # other ranks may have seen pictures that a faster one has drawn
    if missing:
        logger.info("%s lacks %d pictures of %r; they are drawn.", folder, len(missing), prior.prompt)
        own = missing[distributed.rank() :: distributed.world_size()]
        seeds = [family.recipe.train.seed + int(name.removesuffix(".png").rpartition("-")[2]) for name in own]
        draw_all(
            family, [(prior.prompt, seed, folder / name) for seed, name in zip(seeds, own, strict=True)], "the class"
        )
        distributed.barrier()
    return _class_pictures(folder, digest)[: prior.count]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A validation picture to draw."""

    prompt: str
    seed: int
    name: str
    """Of its file in the folder of a step."""
    untuned: str
    """Of the untuned model's file."""


class ValidationPictures:
    """Draws the validation prompts, and keeps `drawings.json` for the report."""

    def __init__(self, family: PipelineFamily, run: Path) -> None:
        self.family, self.run, self.config = family, run, family.recipe.validate
        items = [
            (f"{index}-{number}", prompt, self.config.seed + number)
            for index, prompt in enumerate(self.config.prompts)
            for number in range(self.config.pictures)
        ]
        digests = untuned_digests(family, [(prompt, seed) for _, prompt, seed in items])
        self.wanted = [
            Drawing(prompt=prompt, seed=seed, name=f"{name}.png", untuned=f"{name}-{digest}.png")
            for (name, prompt, seed), digest in zip(items, digests, strict=True)
        ]

    @property
    def untuned(self) -> list[Path]:
        """The untuned model's pictures."""
        return [self.run / PICTURES / UNTUNED / item.untuned for item in self.wanted]

    def draw_untuned(self) -> None:
        """Draw with the untuned pipeline what is not drawn yet; before adapters are added."""
        pairs = zip(self.wanted, self.untuned, strict=True)
        self._draw([(item, path) for item, path in pairs if not path.is_file()], "untuned pictures")

    def __call__(self, step: int, trackers: Trackers) -> list[Path]:
        """Draw all prompts, on rank 0; returns the files."""
        drawn = [self.run / PICTURES / f"step-{step:06d}" / item.name for item in self.wanted]
        self._draw(list(zip(self.wanted, drawn, strict=True)), f"step {step}")
        if distributed.is_main() and drawn:
            self._record(step)
            samples = [
                SampleAnswer(question=f"{item.prompt} (seed {item.seed})", expected="", prediction="", image=path)
                for item, path in zip(self.wanted, drawn, strict=True)
            ]
            trackers.log_samples("drawings", samples, step)
        distributed.barrier()
        return drawn

    def _draw(self, due: Sequence[tuple[Drawing, Path]], what: str) -> None:
        if not distributed.is_main() or not due:
            return
        self.family.gather()
        draw_all(self.family, [(item.prompt, item.seed, path) for item, path in due], what)
        self.family.rest()

    def _record(self, step: int) -> None:
        """Replace the rows of this step and of later ones, which a resumed run draws again."""
        path = self.run / DRAWINGS
        try:
            rows = [row for row in files.read_json(path, list) if row["step"] < step]
        except (OSError, ValueError, LookupError, TypeError):
            rows = []
        for item in self.wanted:
            row = {"step": step, "prompt": item.prompt, "seed": item.seed}
            row["image"] = f"{PICTURES}/step-{step:06d}/{item.name}"
            row["untuned"] = f"{PICTURES}/{UNTUNED}/{item.untuned}"
            rows.append(row)
        files.replace_json(path, rows)


def drawn_set(folder: Path, pictures: Sequence[Image.Image]) -> Path:
    """Write drawn pictures of a subject into a folder, unless they are there."""
    for number, picture in enumerate(pictures):
        if distributed.is_main() and not (folder / f"{number}.png").is_file():
            save_picture(picture, folder / f"{number}.png")
    distributed.barrier()
    return folder
