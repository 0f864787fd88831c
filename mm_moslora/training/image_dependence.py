"""Check that the model depends on its images: once per start, after the first step with images."""

# A library may accept a keyword argument and ignore it. The model then trains without its images, or without some
# images of a record, and the loss does not reveal it.

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
import transformers
from torch import Tensor

from mm_moslora.batch import Batch
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.models.vlm import is_multimodal
from mm_moslora.training.engine import LossModule, StepResult
from mm_moslora.training.run_setup import Run
from mm_moslora.training.validation import undisturbed
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import TrainingError

_SEED = 20_261_127


class Replaced(NamedTuple):
    """An image of a record that noise replaces, and that answers must follow."""

    what: str  # for a message: `image 2 of 3 of record r7`
    of: int  # images of the record that come before an answer
    rows: slice  # of `Batch.pixel_values`, its own
    targets: slice  # of `Batch.target_positions`, the record's


class ImageCheck:
    """Compares the inputs of the head with those under noise; it changes neither weights nor random generators."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = not is_multimodal(run.assembly.model)

    def __call__(self, micro_batches: Sequence[Batch], result: StepResult) -> None:
        """Check once, together; TrainingError where an image has no effect, or a trained part got no gradient."""
        if self.done or not result.images or not result.applied:
            return
        token = getattr(self.run.assembly.model.config, "image_token_id", None)
        chosen = [to_replace(batch, token) for batch in micro_batches]
        # The micro-batch with the most records of several images is the strongest test.
        most = distributed.max_over_ranks([len(items) / 2**20 + sum(item.of > 1 for item in items) for items in chosen])
        if not any(most):
            return
        self.done = True
        number = most.index(max(most))
        self._compare(micro_batches[number], chosen[number])
        self._look_at_gradients()

    def _compare(self, batch: Batch, chosen: Sequence[Replaced]) -> None:
        """Two forward passes in evaluation mode; ranks without images take part."""
        plain = replace(batch, image_keys=())
        noise = plain if batch.pixel_values is None else replace(plain, pixel_values=with_noise(batch, chosen))
        compiled = self.run.recipe.train.compile is not None
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        engine = self.run.engine
        with undisturbed(engine), eager, _read_by_head(engine.module) as read:
            engine.evaluate([plain])
            engine.evaluate([noise])
        same = torch.ones(batch.supervised_tokens, dtype=torch.bool)  # [K]
        same[engine.module.share.targets(batch)] = (read[0] == read[1]).all(dim=-1).cpu()
        ignored = [item.what for item in chosen if bool(same[item.targets].all())]
        outcomes = distributed.gather_objects((len(chosen), ignored))
        rows = [outcomes[first : first + engine.copies] for first in range(0, len(outcomes), engine.copies)]
        # A record is ignored when all ranks that share its row say so.
        everywhere = [what for (_, items), *others in rows for what in items if all(what in own for _, own in others)]
        if everywhere:
            tried = sum(count for (count, _), *_ in rows)
            model = type(self.run.assembly.model).__name__
            raise TrainingError(
                f"The loss does not depend on the images: with noise in place of {', '.join(everywhere[:4])} "
                f"({len(everywhere)} of {tried} that were tried), the inputs of the head are equal bit for bit. "
                f"{model} under transformers {transformers.__version__} ignores such images; "
                f"{_REMEDY}"
            )

    def _look_at_gradients(self) -> None:
        """Refuse a trained part without gradients. They show in Adam's momentum, which every ZeRO stage keeps."""
        norms = self.run.engine.component_norms().read()
        for part in ("projector", "vision"):
            norms_of_part = [norm for name, norm in norms.items() if name.startswith(f"momentum_norm/{part}")]
            if norms_of_part and not any(norms_of_part):
                raise TrainingError(
                    f"The loss depends on the images, but what trains of model.{part} got a gradient of exactly 0 in "
                    f"step {self.run.step}. Freeze it (model.{part}.mode), or make the loss use its output "
                    f"(model.vision.feature_layer). If it does already: {_REMEDY}"
                )


_REMEDY = (
    "run `mm-moslora doctor`, install versions in the ranges that it names, and report this if they are. Nothing of "
    "this step was saved."
)


def to_replace(batch: Batch, token: int | None) -> list[Replaced]:
    """One image of every record that comes before a supervised token of its conversation."""
    # The first record of several images gives its second image, the next record its third, and so on: a single record
    # of three images then reveals a model that reads the first or the last image alone.
    if batch.pixel_values is None:
        return []
    starts = [0, *itertools.accumulate(batch.segment_lengths)]
    bounds = torch.searchsorted(batch.target_positions, torch.tensor(starts)).tolist()
    replaced: list[Replaced] = []
    row = several = 0
    for number, own in enumerate(batch.image_rows):
        targets = slice(bounds[number], bounds[number + 1])
        behind = batch.target_positions[targets] - starts[number]
        ids = batch.input_ids[starts[number] : starts[number + 1]]
        count = _images_read(ids, behind, token, images=len(own))
        image = (several + 1) % count if count > 1 else 0
        several += count > 1
        edges = list(itertools.accumulate(own, initial=row))
        rows = slice(edges[image], edges[min(image + 1, len(edges) - 1)])
        row = edges[-1]
        if count and bool(batch.pixel_values[rows].any()):  # all-zero images are padding
            name = batch.ids[number] if batch.ids else str(number)
            what = f"image {image + 1} of {len(own)} of record {name}"
            replaced.append(Replaced(what, count, rows, targets))
    return replaced


def _images_read(ids: Tensor, behind: Tensor, token: int | None, *, images: int) -> int:
    """The number of a conversation's images, from the first on, that surely precede one of the positions `behind`."""
    if not images or not len(behind):
        return 0
    if token is None:
        return images
    positions, last = (ids == token).nonzero(), int(behind.max())
    if not len(positions) or int(positions[0]) > last:
        return 0
    return images if int(positions[-1]) <= last else 1


def with_noise(batch: Batch, chosen: Sequence[Replaced]) -> Tensor:
    """A batch's images with noise in place of the chosen ones; all-zero tiles, which are padding, stay zero."""
    assert batch.pixel_values is not None
    pixels = batch.pixel_values.clone()
    noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(_SEED)).to(pixels)
    if pixels.ndim >= 5:  # [..., tiles, 3, H, W]; patches are [P, E]
        noise *= pixels.flatten(-3).any(dim=-1)[..., None, None, None]
    for item in chosen:
        pixels[item.rows] = noise[item.rows]
    return pixels


@contextmanager
def _read_by_head(module: LossModule) -> Iterator[list[Tensor]]:
    """Record the head's input ``[K, D]`` in each forward pass, without cached features."""
    read: list[Tensor] = []
    pictures, module.pictures = module.pictures, StepFeatureCache()
    hook = module.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        yield read
    finally:
        hook.remove()
        module.pictures = pictures
