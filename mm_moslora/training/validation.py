"""Validation: held-out loss, sample answers, harness tasks; it leaves generators, modes and data order as they were."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import ProcessedImage
from mm_moslora.config import ValidateConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.images.record_picture import LocalPicture
from mm_moslora.data.record_examples import written
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.models.assembly import Parts
from mm_moslora.models.decoding.generation import Prompt, encode_images, generate, stop_token_ids, stream_padded_row
from mm_moslora.models.vlm import has_own_forward, needs_padding
from mm_moslora.tracking import Trackers
from mm_moslora.tracking.tracker import SampleAnswer
from mm_moslora.training.checkpointing.run_checkpoints import Best
from mm_moslora.training.engine import TrainingEngine
from mm_moslora.training.preflight import ACCURACY, LOSS
from mm_moslora.training.run_setup import Run
from mm_moslora.training.snapshot import RandomState
from mm_moslora.training.supervision.stop_signals import StopRequest
from mm_moslora.utils import distributed

logger = logging.getLogger(__name__)

CUT_SHORT_AT = "cut_short_at"
"""Counter: the step of a validation that a signal interrupted, so that a resumed run repeats it."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The inputs of a harness."""

    assembly: Parts
    """The model in eval mode, with full weights."""
    name: str
    """Name of the run."""
    config: ValidateConfig
    """The recipe's `validate`."""
    batch_size: int
    """Samples of a micro-batch, which fit the machine."""
    folder: Path
    """Folder for the results of this step."""
    step: int
    stop: StopRequest
    """Once this rank has received a signal, the measurement stops soon on all ranks."""
    video_sampling: tuple[int | None, float | None] = (None, None)
    """See `DataConfig.video_sampling`."""
    most_seconds: float = math.inf
    """The measurement also stops once its first batches show that it would take longer."""


Measure = Callable[[Moment], Mapping[str, float] | None]
"""Maps the state at a step to metrics by name, the same on all ranks or on rank 0 alone; None: interrupted."""


class CutShortError(Exception):
    """A signal arrived during validation; raised on all ranks at the same point."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class Validator:
    """Validates a run, logs what it measures, and keeps the best value; a signal interrupts it."""

    def __init__(self, run: Run, measure: Measure | None, stop: StopRequest, *, trackers: Trackers, best: Best) -> None:
        self.run, self.measure, self.stop, self.trackers, self.best = run, measure, stop, trackers, best
        self.validated_at = -1
        """Step of the last validation that was not interrupted."""
        self.interrupted_by = 0
        """Signal that interrupted the last validation."""

    def __call__(self) -> bool:
        """Validate; True when the model is the best so far. A signal interrupts it, see `cut_short`."""
        run, started = self.run, time.monotonic()
        try:
            metrics, samples = self._metrics()
        except CutShortError as cut:
            self.interrupted_by, run.counters[CUT_SHORT_AT] = cut.number, run.step
            logger.info("Signal %d interrupted the validation of step %d; it is repeated.", cut.number, run.step)
            return False
        run.counters.pop(CUT_SHORT_AT, None)
        self.validated_at = run.step
        if metrics:
            self.trackers.log(metrics | {"validation_seconds": time.monotonic() - started}, run.step)
        if samples:
            self.trackers.log_samples("validation", samples, run.step)
        return bool(metrics) and self.best.update(metrics, run.step)

    @property
    def cut_short(self) -> bool:
        """Whether a signal interrupted the validation of this step, also in an earlier session."""
        return self.run.counters.get(CUT_SHORT_AT) == self.run.step

    def _metrics(self) -> tuple[dict[str, float], list[SampleAnswer]]:
        """Metrics by name, the same on all ranks, and sample answers (on rank 0)."""
        run = self.run
        metrics: dict[str, float] = {}
        samples: list[SampleAnswer] = []
        with undisturbed(run.engine):
            if run.validation_set is not None:
                metrics |= self._loss(run.validation_set)
            if run.recipe.validate.samples or self.measure is not None:
                with whole_model(run.engine, run.assembly.model):
                    if run.validation_set is not None and run.recipe.validate.samples:
                        samples = self._answers(run.validation_set)
                    if self.measure is not None:
                        self._give_way(self.stop.received)
                        scores = self.measure(moment_of(run, self.stop))
                        self._give_way(self.stop.received if scores is None else 0)
                        metrics |= scores or {}
        return distributed.from_main(metrics), samples

    def _give_way(self, number: int) -> None:
        """Stop where any rank must: all ranks call this at the same point, with the signal or 0."""
        (first,) = distributed.max_over_ranks([float(number)])
        if first:
            raise CutShortError(int(first))

    def _loss(self, held_out: TrainingSet) -> dict[str, float]:
        recipe = self.run.recipe
        sums = torch.zeros(4, dtype=torch.float64)
        together = self.run.engine.copies
        loader = BatchLoader(
            held_out, rank=distributed.rank() // together, world_size=distributed.world_size() // together,
            config=recipe.data, global_batch=recipe.train.global_batch, limit=self.run.limit, seed=0,
        )  # fmt: skip
        with loader:
            batches = iter(loader)
            for _ in range(loader.steps_per_epoch):
                self._give_way(self.stop.received)
                sums += self.run.engine.evaluate(next(batches))
        loss, right, weight, count = sums.tolist()
        return {LOSS: loss / (weight or 1.0), ACCURACY: right / max(1.0, count)}

    def _answers(self, held_out: TrainingSet) -> list[SampleAnswer]:
        """Answers to the same evenly spaced records every time, on rank 0: files are often sorted by content."""
        samples: list[SampleAnswer] = []
        usable = held_out.usable if distributed.is_main() else []
        count = min(self.run.recipe.validate.samples, len(usable))
        numbers = [usable[index * len(usable) // count] for index in range(count)]
        heard = 0
        for number in numbers:
            if heard := self.stop.received:
                break
            try:
                samples.append(self._answer(held_out, held_out.record(number)))
            except Exception as error:  # an illustration ends no run; no other rank waits here
                logger.warning("No sample answer: %s: %s", type(error).__name__, error)
        self._give_way(heard)
        return samples

    def _answer(self, held_out: TrainingSet, record: Record) -> SampleAnswer:
        record = written(record, held_out.image_processing)
        first = next(index for index, turn in enumerate(record.turns) if turn.role == "assistant")
        turns = record.turns[:first]
        seen = held_out.process(record, sum(turn.images for turn in turns))
        ids = held_out.encoder.encode_prompt(turns, pictures=[picture.placeholders for picture in seen])
        picture = record.images[0] if record.images else None
        return SampleAnswer(
            question=turns[-1].text, expected=record.turns[first].said,
            prediction=held_out.encoder.decode_answer(self._decode(ids, seen)), correct=None,
            image=picture.path if isinstance(picture, LocalPicture) else None,
        )  # fmt: skip

    def _decode(self, ids: Tensor, images: list[ProcessedImage]) -> list[int]:
        model, limit = self.run.assembly.model, self.run.recipe.validate.sample_tokens
        stops = stop_token_ids(model, self.run.assembly.tokenizer.eos_token_id)
        if has_own_forward(model):
            return list(stream_padded_row(model, ids, images, max_new_tokens=limit, stop_ids=stops))
        features = None
        if images:
            pixels = torch.cat([picture.tensors["pixel_values"] for picture in images])
            features = encode_images(model, pixels.to(self.run.engine.device)).flatten(0, 1)
        return generate(model, [Prompt(input_ids=ids, features=features)], max_new_tokens=limit, stop_ids=stops)[0]


def moment_of(run: Run, stop: StopRequest, *, most_seconds: float = math.inf) -> Moment:
    """A run at its step, as a harness gets it."""
    return Moment(
        assembly=run.assembly, name=run.recipe.name, config=run.recipe.validate,
        batch_size=run.recipe.train.micro_batch, step=run.step, stop=stop, folder=tasks_folder(run.folder, run.step),
        most_seconds=most_seconds, video_sampling=run.recipe.data.video_sampling,
    )  # fmt: skip


def tasks_folder(run: Path, step: int) -> Path:
    """The folder for the answers to the tasks at a step."""
    return run / "validation" / f"step-{step:06d}"


@contextmanager
def undisturbed(engine: TrainingEngine) -> Iterator[None]:
    """Evaluation mode inside the block; generators and training mode are restored."""
    before = RandomState.now()
    engine.module.eval()
    try:
        yield
    finally:
        engine.module.train()
        before.restore()


@contextmanager
def whole_model(engine: TrainingEngine, model: PreTrainedModel) -> Iterator[None]:
    """The model of an engine prepared for generation: full weights, standard attention, a cache."""
    with ExitStack() as stack:
        stack.enter_context(engine.gathered())
        if not needs_padding(model):
            stack.callback(set_attention, model, model.get_decoder().config._attn_implementation)
            set_attention(model, "sdpa")
        yield
