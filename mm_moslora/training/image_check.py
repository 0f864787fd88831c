"""Whether the loss depends on the images: looked at once a start, after the first step that shows some.

A library may take a keyword argument and ignore it. A model then trains without its images, and nothing else tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
import transformers
from torch import Tensor

from mm_moslora import distributed
from mm_moslora.batch import Batch
from mm_moslora.errors import TrainingError
from mm_moslora.models.pictures import PictureMemory
from mm_moslora.models.vlm import is_multimodal
from mm_moslora.training.engine import LossModule, StepResult
from mm_moslora.training.run import Run
from mm_moslora.training.validation import undisturbed

_SEED = 20_261_127


class ImageCheck:
    """Compares the loss of a micro-batch with its loss on noise, and looks at the gradients of projector and tower.

    It changes neither weights nor generators. All ranks call it together.

    Args:
        run: that trains.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.done = not is_multimodal(run.assembly.model)

    def __call__(self, micro_batches: Sequence[Batch], result: StepResult) -> None:
        """Check, if it has not been done and the step allows it.

        Args:
            micro_batches: this rank's of the step that was taken.
            result: of the step.

        Raises:
            TrainingError: the loss does not depend on the images, or a part that trains got no gradient.
        """
        if self.done or not result.images or not result.applied:
            return
        token = getattr(self.run.assembly.model.config, "image_token_id", None)
        readable = distributed.max_over_ranks([float(_is_read(batch, token)) for batch in micro_batches])
        if not any(readable):
            return
        self.done = True
        self._compare(micro_batches[readable.index(1.0)])
        self._look_at_gradients()

    def _compare(self, batch: Batch) -> None:
        """Two forward passes in evaluation mode; ranks without images take part."""
        plain = replace(batch, image_keys=())
        noise = plain if batch.pixel_values is None else replace(plain, pixel_values=noise_like(batch.pixel_values))
        compiled = self.run.recipe.train.compile is not None
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        engine = self.run.engine
        with undisturbed(self.run), _without_memory(engine.module), eager:
            found, on_noise = engine.evaluate([plain]), engine.evaluate([noise])
        if found.loss == on_noise.loss:
            raise TrainingError(
                f"The loss does not depend on the images: with the images of the first micro-batch that has some "
                f"(records {', '.join(batch.ids[:4])}) it is {found.loss / max(1.0, found.tokens):.6f} per token, and "
                f"with noise in their place the same to the last digit. {self._model()} ignores its images; {_REMEDY}"
            )

    def _look_at_gradients(self) -> None:
        """Adam's momentum is the trace of gradients that every ZeRO stage keeps."""
        norms = self.run.engine.component_norms()
        for part in ("projector", "vision"):
            found = [norm for name, norm in norms.items() if name.startswith(f"momentum_norm/{part}")]
            if found and not any(found):
                raise TrainingError(
                    f"The loss depends on the images, but what trains of model.{part} got a gradient of exactly 0 in "
                    f"step {self.run.step}: it would stay as it is. Freeze it (model.{part}.mode), or have the loss "
                    f"read what it gives (model.vision.feature_layer). If it does already: {_REMEDY}"
                )

    def _model(self) -> str:
        return f"{type(self.run.assembly.model).__name__} under transformers {transformers.__version__}"


_REMEDY = (
    "run `mm-moslora doctor`, install versions in the ranges that it names, and report this if they are. Nothing of "
    "this step was saved."
)


def noise_like(pixels: Tensor) -> Tensor:
    """Other images of the same form.

    Tiles that are zero throughout stay zero: models tell by it that a picture has fewer tiles than others.

    Args:
        pixels: ``[..., 3, H, W]``, or patches ``[P, E]``.
    """
    generator = torch.Generator().manual_seed(_SEED)
    noise = torch.randn(pixels.shape, generator=generator).to(pixels)
    if pixels.ndim < 5:
        return noise
    shown = pixels.flatten(-3).any(dim=-1)
    return noise * shown[..., None, None, None]


def _is_read(batch: Batch, token: int | None) -> bool:
    """Whether a supervised token comes after an image of its own conversation.

    Args:
        batch: in main memory.
        token: the placeholder; None: any image counts.
    """
    if not batch.images or not batch.supervised_tokens:
        return False
    if token is None:
        return True
    start = 0
    for length in batch.segment_lengths:
        end = start + length
        places = (batch.input_ids[start:end] == token).nonzero()
        targets = batch.target_positions[(batch.target_positions >= start) & (batch.target_positions < end)]
        if len(places) and len(targets) and start + int(places[0]) <= int(targets.max()):
            return True
        start = end
    return False


@contextmanager
def _without_memory(module: LossModule) -> Iterator[None]:
    """Features on disk and of earlier micro-batches are neither read nor written."""
    kept, module.pictures = module.pictures, PictureMemory()
    try:
        yield
    finally:
        module.pictures = kept
