"""A run with a trainer of TRL: its model with adapters, its records, and the batches that the trainer takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from mm_moslora.batch import IGNORED, Example
from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.preference_set import SETS, AnswerSet, PreferenceSet, QuestionSet
from mm_moslora.models.assembly import Parts, is_quantised, load_parts
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.model_paths import resolve_model_paths, trained_on
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.models.processing.image_processing import dummy_image_example
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.preferences.class_logits import infer_logit_transform
from mm_moslora.preferences.pair_rows import PairRows
from mm_moslora.preferences.rewards import Reward, check_box_rewards, fault_of_boxes, find_rewards
from mm_moslora.preferences.shared_vision import SharedVision
from mm_moslora.training.checkpointing.checkpoint_folder import rank_folder
from mm_moslora.training.deepspeed_presets import stage_of
from mm_moslora.training.engine import weights_device
from mm_moslora.training.engine.deepspeed_patches import allocate
from mm_moslora.training.metrics.mixer_metrics import ADAPTERS
from mm_moslora.training.run_setup import (
    RunParts,
    described,
    pinned,
    remark_short_steps,
    whole_projector,
    with_form_of_thinking,
)
from mm_moslora.training.weight_init import resumed_start
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.progress_bar import Progress

REFERENCE = "reference"
"""Folder of a checkpoint's trainer state with the adapter that the run started from, if it did not start fresh."""

IDS = "ids"
"""Key of a batch for the names of its records; no argument of a model."""


@dataclass(kw_only=True)
class PreferenceRun(RunParts):
    """The parts of a run; adapters alone train, so the projector of an assembled model is always frozen."""

    records: AnswerSet[Any]
    held_out: AnswerSet[Any] | None
    rows: PairRows | None = None
    """How pairs are laid into rows; None: they are padded."""
    rows_per_epoch: int = 0
    """With `rows`: those of the first epoch; others differ by a few."""
    packed_pairs: int = 0
    """With `rows`: the pairs of the step at hand."""
    rewards: dict[str, Reward] = field(default_factory=dict)
    """See `find_rewards`."""
    vision: SharedVision | None = None
    """None: no rank waits in the tower for others."""

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapters."""
        assert self.assembly.peft_model is not None
        return self.assembly.peft_model

    @property
    def sharded(self) -> bool:
        """Whether DeepSpeed divides the state over the ranks; else each has all of it."""
        return is_sharded(self.recipe)

    @property
    def accumulation(self) -> int:
        """Micro-batches of a rank and step."""
        return self.recipe.train.global_batch // (self.recipe.train.micro_batch * distributed.world_size())

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole run; the last step of an epoch may be short."""
        copies = self.recipe.grpo.generations if self.recipe.objective == "grpo" else 1
        rows = self.rows_per_epoch or len(self.records.usable) * copies
        return self.recipe.train.total_steps(-(-rows // self.recipe.train.global_batch))

    def identity(self) -> dict[str, object]:
        """What the data is, see `AnswerSet.identity`."""
        held_out = {} if self.held_out is None else self.held_out.identity("data.validation")
        return self.records.identity("data.train") | held_out

    def of(self, row: Mapping[str, Any]) -> tuple[AnswerSet[Any], Any]:
        """The records that a row of `rows_of` belongs to, and the number of its item, or those of a packed row."""
        records = self.held_out if row["held_out"] else self.records
        assert records is not None
        return records, row["item"]


def is_sharded(recipe: Recipe) -> bool:
    """See `PreferenceRun.sharded`."""
    return recipe.train.zero not in ("auto", "none")


def prepare(recipe: Recipe, *, checkpoint: Path | None = None) -> PreferenceRun:
    """Load the model, attach its adapters, and read the records; a checkpoint gives a resumed run its start."""
    _check_batch(recipe)
    precision = distributed.from_main(resolve_precision(recipe.train.precision))
    with distributed.failing_together("Loading the model"):
        rewards = find_rewards(recipe.grpo)
        start, adapter = recipe.model, recipe.adapter
        if checkpoint is not None:
            if (reference := rank_folder(checkpoint, 0) / REFERENCE).is_dir():
                adapter = replace(adapter, weights=str(reference))
            resolved = resolve_model_paths(recipe.model, checkpoint)
            start, adapter = resumed_start(recipe.model, resolved, adapter, checkpoint)
        device = weights_device(recipe.train, quantised=is_quantised(start))
        assembly = load_parts(start, dtype=dtype_of(precision), device=device)
        attach_adapters(assembly, recipe.model, adapter, seed=recipe.train.seed)
        _keep_fp32(assembly.model)
        infer_logit_transform(assembly.model)
        rows = PairRows.of(assembly.model, recipe.data.pack_tokens) if recipe.data.pack_tokens else None
        for name, tensor in [*assembly.model.named_parameters(), *assembly.model.named_buffers()]:
            if ADAPTERS in name:  # on ranks that wait for the weights: TRL copies adapters
                allocate(tensor, distributed.device())
    data = pinned(recipe.data, checkpoint)
    kind: Any = SETS[recipe.objective]
    if recipe.objective == "grpo":
        kind = partial(kind, box_fault=fault_of_boxes(rewards, assembly.image_processing))
    records = _records(kind, recipe, assembly, data.train, "quarantine.jsonl", settle=checkpoint is None)
    recipe = with_form_of_thinking(recipe, assembly, records)
    with_boxes = records.with_boxes if isinstance(records, QuestionSet) else 0
    remark_short_steps(recipe, len(records.usable) * (recipe.grpo.generations if recipe.objective == "grpo" else 1))
    check_box_rewards(rewards, with_boxes, assembly.image_processing)
    held_out = None
    if data.held_out:
        held_out = _records(kind, recipe, assembly, data.held_out, "validation_quarantine.jsonl")
    packed = 0 if rows is None else len(rows.epoch(cast(PreferenceSet, records), seed=recipe.train.seed, epoch=0))
    media = records.media | (held_out.media if held_out is not None else set())
    return PreferenceRun(
        recipe=recipe, folder=Path(recipe.train.output), precision=precision, assembly=assembly, records=records,
        held_out=held_out, rows=rows, rows_per_epoch=packed, rewards=rewards,
        vision=_shared_vision(recipe, assembly, media),
        frozen_projector=whole_projector(assembly),
        trained_on=trained_on(recipe.model, records.commits, before=checkpoint),
        preprocessing=described(recipe, assembly),
    )  # fmt: skip


def _shared_vision(recipe: Recipe, assembly: Parts, media: set[frozenset[str]]) -> SharedVision | None:
    """For records of several kinds, where ranks wait for each other in the tower, which some would not run."""
    zero, vision, images = recipe.train.zero, recipe.model.vision, assembly.image_processing
    waits = stage_of(zero) == 3 or (is_sharded(recipe) and vision is not None and vision.mode == "adapter")
    if images is None or not waits or len(media) < 2 or distributed.world_size() == 1:
        return None
    return SharedVision(assembly.model, dummy_image_example(images))


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


def _records(
    kind: Callable[..., AnswerSet[Any]],
    recipe: Recipe,
    assembly: Parts,
    sources: Sequence[SourceConfig],
    quarantine: str,
    *,
    settle: bool = False,
) -> AnswerSet[Any]:
    return kind(
        sources, ConversationEncoder.of(assembly), assembly.image_processing, config=recipe.data, settle=settle,
        quarantine_path=Path(recipe.train.output) / quarantine,
        on_progress=Progress("read records", 0, unit="record").of,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PairCollator:
    """The batches of TRL's DPOTrainer, with the project's labels: all chosen answers, then all rejected ones."""

    run: PreferenceRun

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate rows of `rows_of`."""
        numbered = [(records, numbers if isinstance(numbers, list) else [numbers])
                    for records, numbers in map(self.run.of, rows)]  # fmt: skip
        pairs = [records.item(number) for records, numbers in numbered for number in numbers]
        if self.run.rows is not None:
            batch = self.run.rows.collate(pairs)
        else:
            batch = _padded(self.run, [pair[side] for side in (0, 1) for pair in pairs])
        return batch | _named(rows, [chosen for chosen, _ in pairs])


@dataclass(frozen=True, kw_only=True)
class JudgedCollator:
    """The batches of TRL's KTOTrainer; the divergence is estimated with each question and the answer before it."""

    run: PreferenceRun

    def __call__(self, rows: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        """Collate rows of `rows_of`."""
        judged = [records.item(number) for records, number in map(self.run.of, rows)]
        examples = [example for example, _ in judged]
        batch = _padded(self.run, examples) | {"label": torch.tensor([good for _, good in judged])}
        batch |= _named(rows, examples)
        if self.run.recipe.kto.loss_type != "kto":
            return batch
        others = [*examples[-1:], *examples[:-1]]
        if len(rows) == 1:  # the last of the held-out ones
            records, number = self.run.of(rows[0])
            others = [records.item(number + 1)[0]]
        pairs = zip(examples, others, strict=True)
        limit = self.run.recipe.data.max_length
        mixed = _padded(self.run, [_with_answer(example, other, limit) for example, other in pairs])
        return batch | {f"KL_{name}": value for name, value in mixed.items()}


def _with_answer(example: Example, other: Example, limit: int | None) -> Example:
    """The question of an example with the answer of another one, without pictures: the batch has them already."""
    asked = int(example.supervised.nonzero()[0])
    answer = int(other.supervised.nonzero()[0])
    ids = torch.cat([example.input_ids[:asked], other.input_ids[answer:]])
    supervised = torch.cat([example.supervised[:asked], other.supervised[answer:]])
    end = None if limit is None else max(limit, asked + 1)
    return Example(id=example.id, input_ids=ids[:end], supervised=supervised[:end])


def _named(rows: Sequence[Mapping[str, Any]], examples: Sequence[Example]) -> dict[str, Any]:
    """The names of the records of a batch, which training reads."""
    return {} if rows[0]["held_out"] else {IDS: [example.id for example in examples]}


def _padded(run: PreferenceRun, examples: Sequence[Example]) -> dict[str, Any]:
    inputs = PaddedCollator(model=run.assembly.model)(examples)
    return inputs | {"completion_mask": (inputs.pop("labels") != IGNORED).long()}


def rows_of(run: PreferenceRun, *, held_out: bool) -> Any:
    """A table of `datasets` with the numbers of items, which the collators read; TRL takes no other data set."""
    # Pairs are drawn by the trainer. KTO, GRPO and packed pairs walk through their tables, which hold a whole run.
    from datasets import Dataset

    records = run.held_out if held_out else run.records
    assert records is not None
    items: list[Any] = list(range(len(records.usable)))
    train = run.recipe.train
    if not held_out and run.rows is not None:
        items = run.rows.drawn(cast(PreferenceSet, records), seed=train.seed, rows=run.total_steps * train.global_batch)
    if not held_out and run.recipe.objective != "dpo":
        rows = run.total_steps * train.global_batch
        rows //= run.recipe.grpo.generations if run.recipe.objective == "grpo" else 1
        random = torch.Generator().manual_seed(train.seed)
        epochs = -(-rows // len(items))
        items = torch.cat([torch.randperm(len(items), generator=random) for _ in range(epochs)]).tolist()[:rows]
    return Dataset.from_dict({"item": items, "held_out": [int(held_out)] * len(items)})
