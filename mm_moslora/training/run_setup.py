"""The parts of a run, from its recipe: model, data and engine."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.config import DataConfig, ModelConfig, Recipe, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.preprocessing_print import check_preprocessing, preprocessing_of
from mm_moslora.data.record_examples import SourceExamples
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.data.training_stream import TrainingStream
from mm_moslora.models.assembly import Parts, is_quantised, load_parts
from mm_moslora.models.model_paths import resolve_model_paths, stored_commits, trained_on
from mm_moslora.models.precision import dtype_of, resolve_precision
from mm_moslora.models.processing.anyres import NEWLINE, newline_of
from mm_moslora.models.processing.image_processing import dummy_image_example
from mm_moslora.models.trainable_parts import attach_adapters, component_table
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.models.vision.feature_store import FeatureStore, tower_hash
from mm_moslora.models.vlm import is_multimodal, needs_padding
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest
from mm_moslora.training.engine import LossModule, OptimizerSettings, TrainingEngine, build_engine, weights_device
from mm_moslora.training.engine.model_execution import kernels_of, prepare_execution, row_share
from mm_moslora.training.metrics.gpu_memory import RunEstimate, estimate_run
from mm_moslora.training.metrics.mixer_metrics import MIXERS, keep_initial_mixers
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.preflight import check_model
from mm_moslora.training.weight_init import resumed_start, start_projector
from mm_moslora.utils import distributed
from mm_moslora.utils.progress_bar import Progress

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class RunParts:
    """What every run has, of whatever trainer."""

    recipe: Recipe
    folder: Path
    precision: str
    assembly: Parts
    frozen_projector: dict[str, Tensor] = field(default_factory=dict)
    """Full weights of a frozen projector, on rank 0; under ZeRO-3 the model holds shards."""
    trained_on: dict[str, dict[str, str]] = field(default_factory=dict)
    """Fingerprints and commits of the base model's parts, see `mm_moslora.models.model_paths`."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """See `mm_moslora.data.preprocessing_print`; rank 0 has it, which writes it."""
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps so far (applied or skipped)."""
        return int(self.counters.get("steps", 0))

    def manifest(self, trained: Mapping[str, Tensor], data: str, **more: Any) -> Manifest:
        """The manifest of a checkpoint with these trained tensors, of data with this fingerprint."""
        return Manifest(
            step=self.step, world_size=distributed.world_size(), recipe=self.recipe.to_dict(),
            base=self.assembly.base | self.trained_on, counters=dict(self.counters),
            trainable={name: list(value.shape) for name, value in trained.items()}, files={}, data=data,
            precision=self.precision, **more,
        )  # fmt: skip


@dataclass(kw_only=True)
class Run(RunParts):
    """The parts of a run that learns from answers."""

    training_set: TrainingSet | TrainingStream
    validation_set: TrainingSet | None
    engine: TrainingEngine
    limit: MicroBatchLimit
    """Size of this rank's micro-batches, the same on all ranks."""
    estimate: RunEstimate

    def identity(self) -> dict[str, object]:
        """What the data is, see `TrainingSet.identity`."""
        held_out = {} if self.validation_set is None else self.validation_set.identity("data.validation")
        return self.training_set.identity("data.train") | held_out


def prepare(recipe: Recipe, *, checkpoint: Path | None = None) -> Run:
    """Assemble model, data and engine, in this order; a checkpoint helps to find models that were moved."""
    recipe = recipe.for_ranks(distributed.world_size())
    precision = distributed.from_main(resolve_precision(recipe.train.precision))  # hosts may differ
    kernels = kernels_of(recipe, precision)
    with distributed.failing_together("Finding the model"):
        parts = recipe.model if checkpoint is None else resolve_model_paths(recipe.model, checkpoint)
    estimate = estimate_run(recipe, parts, precision=precision)
    model_start, adapter_start = parts, recipe.adapter
    if checkpoint is not None:
        model_start, adapter_start = resumed_start(recipe.model, parts, recipe.adapter, checkpoint)
    with distributed.failing_together("Loading the model"):  # under ZeRO-3 rank 0 alone reads its weights
        device = weights_device(recipe.train, quantised=is_quantised(model_start))
        assembly = load_parts(model_start, dtype=dtype_of(precision), device=device)
        attach_adapters(assembly, recipe.model, adapter_start, seed=recipe.train.seed)
        check_model(recipe, assembly.model, layers=assembly.model.get_decoder().config.num_hidden_layers)
    data = pinned(recipe.data, checkpoint)
    training_set = _training_data(replace(recipe, data=data), assembly, fresh=checkpoint is None)
    recipe = with_form_of_thinking(recipe, assembly, training_set)
    if isinstance(training_set, TrainingSet):
        remark_short_steps(recipe, sum(map(len, training_set.members)))
    if checkpoint is not None:
        with distributed.failing_together("Comparing pictures and prompts with the checkpoint's"):
            if distributed.is_main():
                check_preprocessing(checkpoint, assembly, accepted=True)
    validation_set = _validation_data(replace(recipe, data=data), assembly)
    if checkpoint is None:
        start_projector(model_start, assembly, training_set.at_hand)
    if distributed.is_main():
        for line in trainable_table(assembly):
            logger.info("%s", line)
    model = assembly.model.train()
    prepare_execution(model, recipe, kernels, precision)
    # Read before the engine, which shards it under ZeRO-3.
    frozen_projector = whole_projector(assembly) if recipe.model.projector.mode == "frozen" else {}
    engine = _engine(assembly, recipe, precision)
    state = engine.trainable_state(only=MIXERS, keep=distributed.is_main())
    if distributed.is_main():
        keep_initial_mixers(model, state)
    return Run(
        recipe=recipe, folder=Path(recipe.train.output), precision=precision, assembly=assembly,
        training_set=training_set, validation_set=validation_set, engine=engine, frozen_projector=frozen_projector,
        limit=MicroBatchLimit(
            examples=recipe.train.micro_batch, tokens=estimate.tokens, padded=needs_padding(model)
        ),
        estimate=estimate,
        trained_on=trained_on(parts, training_set.commits, before=checkpoint),
        preprocessing=described(recipe, assembly),
    )  # fmt: skip


def described(recipe: Recipe, assembly: Parts) -> dict[str, Any]:
    """See `RunParts.preprocessing`."""
    if not distributed.is_main():
        return {}
    frames = [source.video_frames for source in recipe.data.train if source.video_fps is None]
    fps = [source.video_fps for source in recipe.data.train if source.video_fps is not None]
    return preprocessing_of(assembly, video_frames=frames, video_fps=fps)


def whole_projector(assembly: Parts) -> dict[str, Tensor]:
    """Full weights of the projector on rank 0, before ZeRO-3 shards them; empty on others and without a projector."""
    model = assembly.model
    if not distributed.is_main() or not is_multimodal(model) or assembly.is_pretrained_vlm:
        return {}
    weights: dict[str, Tensor] = dict(model.model.multi_modal_projector.state_dict())
    if (newline := newline_of(model)) is not None:
        weights[NEWLINE] = newline
    return {name: value.detach().float().cpu().clone() for name, value in weights.items()}


def _engine(assembly: Parts, recipe: Recipe, precision: str) -> TrainingEngine:
    """The model with its loss, on the engine that the recipe names."""
    model, optim = assembly.model, recipe.optim
    dummy = dummy_image_example(assembly.image_processing) if assembly.image_processing else None
    module = LossModule(
        model,
        dummy,
        memory=StepFeatureCache(_feature_store(recipe.model, model)),
        share=row_share(recipe.train.sequence_parallel),
    )
    groups, settings = parameter_groups(module, optim), OptimizerSettings.of(optim)
    return build_engine(module, groups, recipe.train, precision=precision, optimizer=settings)


def _feature_store(config: ModelConfig, model: PreTrainedModel) -> FeatureStore | None:
    if config.vision is None or config.vision.feature_cache is None:
        return None
    own = distributed.is_main()  # which has the weights at every ZeRO stage
    tower = tower_hash(model.model.vision_tower, model.config.vision_feature_layer) if own else ""
    tower = distributed.from_main(tower)
    return FeatureStore(
        Path(config.vision.feature_cache).expanduser(),
        tower,
        limit_gib=config.vision.feature_cache_gib,
        writers=distributed.world_size(),
    )


def remark_short_steps(recipe: Recipe, records: int) -> None:
    """Warn where all records together are fewer than a step takes."""
    if distributed.is_main() and records < recipe.train.global_batch:
        logger.warning(
            "train.global_batch is %d, and the data has %d records: every step is a whole epoch.",
            recipe.train.global_batch,
            records,
        )


def with_form_of_thinking(recipe: Recipe, assembly: Parts, data: SourceExamples | TrainingStream) -> Recipe:
    """The recipe with the form of thinking that the data decided; a resumed run keeps its checkpoint's."""
    if (form := data.form) is not None and distributed.is_main() and (form.thinking or form.asks or form.mixed):
        if form.mixed:
            logger.warning("%s: %s.", form.words, form.remedy)
        else:
            logger.info("%s.", form.words)
    assembly.ask(data.encoder.thinking)
    return replace(recipe, model=replace(recipe.model, thinking=data.encoder.thinking))


def pinned(data: DataConfig, checkpoint: Path | None) -> DataConfig:
    """The data with the commits of a checkpoint, for data sets of the hub."""
    commits = {} if checkpoint is None else stored_commits(checkpoint)
    train = [
        replace(source, revision=commits[key]) if source.path.startswith("hf:") and key in commits else source
        for key, source in ((f"data.train.{index}", source) for index, source in enumerate(data.train))
    ]
    return replace(data, train=train)


def _training_data(recipe: Recipe, assembly: Parts, *, fresh: bool) -> TrainingSet | TrainingStream:
    config = recipe.data
    if not config.endless:
        return _data_set(recipe, config.train, config, assembly, "quarantine.jsonl", settle=fresh)
    return TrainingStream(
        config.train, ConversationEncoder.of(assembly), assembly.image_processing, config=config, fresh=fresh,
        seed=recipe.train.seed, global_batch=recipe.train.global_batch,
        quarantine_path=Path(recipe.train.output) / "quarantine.jsonl",
    )  # fmt: skip


def _validation_data(recipe: Recipe, assembly: Parts) -> TrainingSet | None:
    if not (sources := recipe.data.held_out):
        return None
    # Every held-out record once, however training mixes its sources.
    config = replace(recipe.data, mixing="repeats", epoch_records=None)
    return _data_set(recipe, sources, config, assembly, "validation_quarantine.jsonl")


def _data_set(
    recipe: Recipe,
    sources: Sequence[SourceConfig],
    config: DataConfig,
    assembly: Parts,
    quarantine: str,
    *,
    settle: bool = False,
) -> TrainingSet:
    progress = Progress("read records", 0, unit="record")
    return TrainingSet(
        sources,
        ConversationEncoder.of(assembly),
        assembly.image_processing,
        config=config,
        settle=settle,
        quarantine_path=Path(recipe.train.output) / quarantine,
        on_progress=progress.of,
    )


def trainable_table(assembly: Parts) -> list[str]:
    """Parameters and trainable parameters by component, as lines of text."""
    rows = component_table(assembly)
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    lines = [f"{'component':<16}{'parameters':>14}{'trainable':>14}"]
    lines += [f"{row.name:<16}{row.total:>14,}{row.trainable:>14,}" for row in rows]
    lines.append(f"{'all':<16}{total:>14,}{trainable:>14,}  ({100 * trainable / total:.2f} %)")
    return lines
