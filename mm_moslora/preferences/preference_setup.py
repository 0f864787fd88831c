"""A preference run: its model with adapters, its pairs, and the batches that the trainer takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn

from mm_moslora.batch import IGNORED
from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preference_set import PreferenceSet
from mm_moslora.data.preprocessing_print import preprocessing_of
from mm_moslora.models.assembly import Parts, load_parts
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.model_paths import resolve_model_paths, trained_on
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder
from mm_moslora.training.model_start import resumed_start
from mm_moslora.training.run_setup import pinned, whole_projector, with_form_of_thinking
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.progress_bar import Progress

REFERENCE = "reference"
"""Folder of a checkpoint's trainer state with the adapter that the run started from, if it did not start fresh."""


@dataclass(kw_only=True)
class PreferenceRun:
    """The parts of a run."""

    recipe: Recipe
    folder: Path
    precision: str
    assembly: Parts
    pairs: PreferenceSet
    held_out: PreferenceSet | None
    frozen_projector: dict[str, Tensor] = field(default_factory=dict)
    """Weights of the projector of an assembled model, on rank 0."""
    trained_on: dict[str, dict[str, str]] = field(default_factory=dict)
    """See `Run.trained_on`."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """See `Run.preprocessing`."""
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps so far."""
        return int(self.counters.get("steps", 0))

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapters."""
        assert self.assembly.peft_model is not None
        return self.assembly.peft_model

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank and step."""
        return self.recipe.train.global_batch // (self.recipe.train.micro_batch * distributed.world_size())

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; the last step of an epoch may be short."""
        return self.recipe.train.total_steps(-(-len(self.pairs.usable) // self.recipe.train.global_batch))

    def identity(self) -> dict[str, object]:
        """What the data is, see `PreferenceSet.identity`."""
        held_out = {} if self.held_out is None else self.held_out.identity("data.validation")
        return self.pairs.identity("data.train") | held_out


def prepare(recipe: Recipe, *, checkpoint: Path | None = None) -> PreferenceRun:
    """Load the model, attach its adapters, and read the pairs. A checkpoint gives a resumed run its start.

    Raises:
        MoSLoRAError: a part does not load, or the data cannot be used.
    """
    _check_batch(recipe)
    precision = distributed.from_main(resolve_precision(recipe.train.precision))
    with distributed.failing_together("Loading the model"):
        start, adapter = recipe.model, recipe.adapter
        if checkpoint is not None:
            if adapter.weights is not None:
                adapter = replace(adapter, weights=str(rank_folder(checkpoint, 0) / REFERENCE))
            start, _ = resumed_start(recipe.model, resolve_model_paths(recipe.model, checkpoint), adapter, checkpoint)
        assembly = load_parts(start, dtype=dtype_of(precision))
        attach_adapters(assembly, recipe.model, adapter, seed=recipe.train.seed)
        _keep_fp32(assembly.model)
    data = pinned(recipe.data, checkpoint)
    pairs = _pairs(recipe, assembly, data.train, "quarantine.jsonl", settle=checkpoint is None)
    recipe = with_form_of_thinking(recipe, assembly, pairs)
    held_out = None
    if data.held_out:
        held_out = _pairs(recipe, assembly, data.held_out, "validation_quarantine.jsonl")
    frames = [source.video_frames for source in recipe.data.train if source.video_fps is None]
    fps = [source.video_fps for source in recipe.data.train if source.video_fps is not None]
    main = distributed.is_main()
    return PreferenceRun(
        recipe=recipe, folder=Path(recipe.train.output), precision=precision, assembly=assembly, pairs=pairs,
        held_out=held_out, frozen_projector=whole_projector(assembly),
        trained_on=trained_on(recipe.model, pairs.commits, before=checkpoint),
        preprocessing=preprocessing_of(assembly, video_frames=frames, video_fps=fps) if main else {},
    )  # fmt: skip


def _check_batch(recipe: Recipe) -> None:
    world, train = distributed.world_size(), recipe.train
    if train.global_batch % (train.micro_batch * world):
        raise ConfigError(
            f"train.global_batch is {train.global_batch}, expected a multiple of train.micro_batch times the number of "
            f"ranks ({train.micro_batch} x {world})."
        )


def _keep_fp32(model: nn.Module) -> None:
    """Train in fp32 below a base in bf16: updates of these rates would be lost in bf16, and there are no masters."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def _pairs(
    recipe: Recipe, assembly: Parts, sources: Sequence[SourceConfig], quarantine: str, *, settle: bool = False
) -> PreferenceSet:
    return PreferenceSet(
        sources, ConversationEncoder.of(assembly), assembly.image_processing, config=recipe.data, settle=settle,
        quarantine_path=Path(recipe.train.output) / quarantine,
        on_progress=Progress("read pairs", 0, unit="pair").of,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Makes the batches of TRL's DPOTrainer: all chosen answers, then all rejected ones, in padded rows.

    They have the project's labels and the inputs of `PaddedCollator`, which equal those of the model's processor.
    """

    run: PreferenceRun

    def __call__(self, rows: Sequence[dict[str, int]]) -> dict[str, Any]:
        """Collate rows of `rows_of`."""
        pairs = [self._set(row["held_out"]).pair(row["pair"]) for row in rows]
        examples = [pair[side] for side in (0, 1) for pair in pairs]
        inputs = PaddedCollator(model=self.run.assembly.model)(examples)
        return inputs | {"completion_mask": (inputs.pop("labels") != IGNORED).long()}

    def _set(self, held_out: int) -> PreferenceSet:
        chosen = self.run.held_out if held_out else self.run.pairs
        assert chosen is not None
        return chosen


def rows_of(pairs: PreferenceSet, *, held_out: bool) -> Any:
    """A table of `datasets` with the numbers of pairs, which `PairCollator` reads; TRL takes no other data set."""
    from datasets import Dataset

    return Dataset.from_dict({"pair": list(range(len(pairs.usable))), "held_out": [int(held_out)] * len(pairs.usable)})
