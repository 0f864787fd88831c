"""A run: its folder, its parts, and what a checkpoint of it holds."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora import distributed
from mm_moslora.config import AdapterConfig, ModelConfig, Recipe
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.dataset import TrainingSet
from mm_moslora.errors import ConfigError, TrainingError
from mm_moslora.folders import RUN_LOCK, is_adapter, projector_file
from mm_moslora.locks import take
from mm_moslora.losses import use_loss_head
from mm_moslora.models.anyres import NEWLINE, newline_of
from mm_moslora.models.attention import set_attention, training_attention
from mm_moslora.models.build import Assembly, assemble
from mm_moslora.models.eyes import dummy_example
from mm_moslora.models.feature_store import FeatureStore, tower_key
from mm_moslora.models.kernels import choose_kernels, use_kernels
from mm_moslora.models.lean import use_lean_layers
from mm_moslora.models.pictures import PictureMemory
from mm_moslora.models.places import contents_of, seen_from
from mm_moslora.models.projector import embedding_scale, first_layer, fold_into
from mm_moslora.models.ready import tower_path
from mm_moslora.models.trainable import attach_adapters, checkpoint_layers, component_table
from mm_moslora.models.vlm import image_features, is_multimodal, is_padded
from mm_moslora.training.compiling import compile_layers
from mm_moslora.training.engine import Engine, LossModule, OptimizerSettings, build_engine
from mm_moslora.training.mixers import mixer_matrices
from mm_moslora.training.optim import parameter_groups
from mm_moslora.training.precision import dtype_of, resolve_precision
from mm_moslora.training.preflight import refuse_folder
from mm_moslora.training.progress import Progress

logger = logging.getLogger(__name__)

PICTURES_TO_SCALE, PICTURES_TO_STANDARDISE = 8, 64
"""Of the first records: a size needs few, the spread of every dimension more."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run folder for this run alone; freed by the kernel when the process ends, however it ends.

    Raises:
        ConfigError: files that no run wrote have the names of a run's.
        TrainingError: another process holds it, or it cannot be written.
        DistributedError: the same, on the other ranks.
    """
    with ExitStack() as held:
        failure: Exception | None = None
        if distributed.is_main():
            try:
                refuse_folder(folder)
                held.enter_context(_lock(folder))
            except (ConfigError, TrainingError) as error:
                failure = error
        distributed.agree(failure, what="Taking the run folder")
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / RUN_LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"The run folder {folder} cannot be written ({error.strerror}). Choose another with train.output, or with "
            "--output of the quickstart."
        ) from error
    with lock as stream:
        try:
            take(stream, wait=False)
        except OSError as error:
            stream.seek(0)
            raise TrainingError(
                f"{folder} is in use by another run ({stream.read().strip() or 'owner unknown'}). "
                "Wait for it, stop it, or choose another train.output."
            ) from error
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        stream.flush()
        yield


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators; ranks differ, so that their dropout masks do."""
    random.seed(seed)
    torch.manual_seed(seed * 10_007 + distributed.rank())


@dataclass(kw_only=True)
class Run:
    """Everything a training loop works with."""

    recipe: Recipe
    folder: Path
    precision: str
    assembly: Assembly
    training_set: TrainingSet
    validation_set: TrainingSet | None
    engine: Engine
    frozen_projector: dict[str, Tensor] = field(default_factory=dict)
    """Weights of a projector that does not train, whole: ZeRO-3 cuts up the model's own."""
    first_mixers: dict[str, Tensor] = field(default_factory=dict)
    """The mixers at step 0, also of a run that goes on from a checkpoint."""
    contents: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the base model's files, see `mm_moslora.models.places`."""
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps done (applied or skipped)."""
        return int(self.counters.get("steps", 0))


def prepare(recipe: Recipe, *, checkpoint: Path | None = None) -> Run:
    """Assemble model, data and engine, in this order, and log what trains.

    Args:
        recipe: resolved; its `train.output` exists.
        checkpoint: that the run goes on from; it helps to find models that were moved.
    """
    folder = Path(recipe.train.output)
    precision = distributed.from_main(resolve_precision(recipe.train.precision))  # hosts may differ
    lean = recipe.model.lean_layers and recipe.train.compile is None
    kernels = choose_kernels(recipe.model.kernels, distributed.device(), lean=lean)
    parts = recipe.model if checkpoint is None else seen_from(recipe.model, checkpoint)
    model_start, adapter_start = parts, recipe.adapter
    if checkpoint is not None:
        model_start, adapter_start = _start_of(parts, recipe.adapter, checkpoint)
    assembly = assemble(model_start, dtype=dtype_of(precision))
    attach_adapters(assembly, recipe.model, adapter_start, seed=recipe.train.seed)
    if distributed.is_main():
        for line in trainable_table(assembly):
            logger.info("%s", line)
    training_set = _data_set(recipe, assembly, validation=False)
    assert training_set is not None
    validation_set = _data_set(recipe, assembly, validation=True)
    _fit_projector(recipe, assembly, training_set)
    model = assembly.model.train()
    if not is_padded(model):
        set_attention(model, training_attention(model, recipe.model.attention, device=distributed.device()))
    use_loss_head(model)
    if recipe.model.lean_layers:
        use_lean_layers(model)
    if recipe.train.gradient_checkpointing:
        checkpoint_layers(model.get_decoder())
    if recipe.train.vision_gradient_checkpointing and is_multimodal(model):
        checkpoint_layers(cast(PreTrainedModel, model.get_submodule(tower_path(model))))
    if recipe.train.compile is not None:
        compile_layers(model, recipe.train.compile)
    if (said := use_kernels(model, kernels, lean=lean)) and distributed.is_main():
        logger.info("%s", said)
    groups = parameter_groups(model, recipe.optim)
    settings = OptimizerSettings(
        betas=recipe.optim.betas, eps=recipe.optim.eps, max_grad_norm=recipe.optim.max_grad_norm
    )
    dummy = dummy_example(assembly.eyes) if assembly.eyes else None
    module = LossModule(model, dummy, memory=PictureMemory(_feature_store(recipe.model, model)))
    groups_in_module = parameter_groups(module, recipe.optim)
    assert [g.name for g in groups] == [g.name for g in groups_in_module]
    ours = is_multimodal(model) and not assembly.ready_made
    projector = dict(model.model.multi_modal_projector.state_dict()) if ours else {}
    newline = newline_of(model) if ours else None
    projector |= {} if newline is None else {NEWLINE: newline}
    frozen_projector = {
        name: value.detach().float().cpu().clone()
        for name, value in projector.items()
        if distributed.is_main() and recipe.model.projector.mode == "frozen"
    }
    engine = build_engine(module, groups_in_module, recipe.train, precision=precision, optimizer=settings)
    return Run(
        recipe=recipe, folder=folder, precision=precision, assembly=assembly, training_set=training_set,
        validation_set=validation_set, engine=engine, frozen_projector=frozen_projector,
        first_mixers=mixer_matrices(engine.trainable_state()), contents=contents_of(parts),
    )  # fmt: skip


def _start_of(model: ModelConfig, adapter: AdapterConfig, checkpoint: Path) -> tuple[ModelConfig, AdapterConfig]:
    """Where a run that goes on finds the weights that it began with: in its checkpoint, once their own place is gone.

    What trains is read from the checkpoint's state later, so nothing but frozen parts and shapes depend on this.
    """
    if (weights := model.projector.weights) and not projector_file(weights).is_file():
        model = replace(model, projector=replace(model.projector, weights=str(checkpoint / "projector.safetensors")))
    if adapter.weights and not is_adapter(adapter.weights):
        adapter = replace(adapter, weights=str(checkpoint / "adapter"))
    return model, adapter


def _feature_store(config: ModelConfig, model: PreTrainedModel) -> FeatureStore | None:
    if config.vision is None or config.vision.feature_cache is None:
        return None
    tower = tower_key(model.model.vision_tower, model.config.vision_feature_layer)
    return FeatureStore(
        Path(config.vision.feature_cache).expanduser(),
        tower,
        limit_gib=config.vision.feature_cache_gib,
        writers=distributed.world_size(),
    )


def _data_set(recipe: Recipe, assembly: Assembly, *, validation: bool) -> TrainingSet | None:
    config, sources = recipe.data, recipe.data.train
    if validation:
        # Every held-out record once, however training mixes its sources.
        config, sources = replace(config, mixing="repeats", epoch_records=None), config.validation
        if not sources:
            return None
    encoder = Encoder.of(assembly)
    name = "validation_quarantine.jsonl" if validation else "quarantine.jsonl"
    progress = Progress("read records", 0, unit="record")
    return TrainingSet(
        sources,
        encoder,
        assembly.eyes,
        config=config,
        quarantine_path=Path(recipe.train.output) / name,
        on_progress=progress.of,
    )


@torch.no_grad()
def _fit_projector(recipe: Recipe, assembly: Assembly, data: TrainingSet) -> None:
    """Fit a fresh projector to the first pictures: to their features' spread, and to the size of word embeddings.

    Rank 0 measures, where it is going to train, on its own weights: those are what the engine gives to all ranks.
    """
    model, wanted = assembly.model, recipe.model.projector
    if not is_multimodal(model) or assembly.ready_made or wanted.weights:
        return
    projector = model.model.multi_modal_projector

    def measured(count: int, measure: Callable[[Tensor], Any]) -> Any:
        """What rank 0 measures on its first pictures, on all ranks; None without pictures."""
        found, failure = None, None
        if distributed.is_main():
            try:
                if pictures := _first_pictures(data, count):
                    with _where_it_trains(model):
                        found = measure(torch.cat(pictures))
            except Exception as error:  # the other ranks wait
                failure = error
        distributed.agree(failure, what="Fitting the projector")
        return distributed.from_main(found)

    factor = spread = None
    if wanted.standardise_features:
        spread = measured(PICTURES_TO_STANDARDISE, lambda pixels: _feature_spread(model, pixels))
    if spread is not None:
        fold_into(projector, *spread)
        logger.info("Projector begins with features of mean 0 and spread 1.")
    if wanted.scale_to_embeddings:
        words = cast(Tensor, model.get_input_embeddings().weight)
        factor = measured(PICTURES_TO_SCALE, lambda pixels: embedding_scale(image_features(model, pixels), words))
    if factor is not None:
        last = projector.last if hasattr(projector, "last") else projector.linear_2
        for parameter in last.parameters():
            parameter.mul_(factor)
        logger.info("Projector output scaled by %.3g to the size of word embeddings.", factor)


def _first_pictures(data: TrainingSet, count: int) -> list[Tensor]:
    """Pictures or tiles ``[n, 3, H, W]`` of the first records that show some."""
    pictures: list[Tensor] = []
    for index in range(len(data)):
        if len(pictures) >= count:
            break
        example = data[index] if data.has_image[index] else None
        if example is not None and example.pixel_values is not None:
            pictures.append(example.pixel_values.flatten(0, -4))
    return pictures


def _feature_spread(model: PreTrainedModel, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of what a projector's first linear layer reads, ``[V]`` each, fp32 on the CPU.

    Args:
        model: an assembly, tower and projector on the device of the pictures.
        pixels: some real pictures ``[N, 3, H, W]``.
    """
    seen: list[Tensor] = []
    hook = first_layer(model.model.multi_modal_projector).register_forward_pre_hook(
        lambda _, given: seen.append(given[0].float().flatten(0, -2))
    )
    try:
        for part in pixels.split(PICTURES_TO_SCALE):
            image_features(model, part)
    finally:
        hook.remove()
    spread, mean = torch.std_mean(torch.cat(seen), dim=0)
    return mean.cpu(), spread.cpu()


@contextmanager
def _where_it_trains(model: PreTrainedModel) -> Iterator[None]:
    """Tower and projector on this rank's device; the engine takes a whole model from the host afterwards."""
    parts: list[nn.Module] = [model.model.vision_tower, model.model.multi_modal_projector]
    for part in parts:
        part.to(distributed.device())
    try:
        yield
    finally:
        for part in parts:
            part.to("cpu")


def trainable_table(assembly: Assembly) -> list[str]:
    """Parameters and trainable parameters by component, as lines of text."""
    rows = component_table(assembly)
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    lines = [f"{'component':<16}{'parameters':>14}{'trainable':>14}"]
    lines += [f"{row.name:<16}{row.total:>14,}{row.trainable:>14,}" for row in rows]
    lines.append(f"{'all':<16}{total:>14,}{trainable:>14,}  ({100 * trainable / total:.2f} %)")
    return lines
