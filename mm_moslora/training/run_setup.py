"""A run: its folder, its parts, and the contents of its checkpoints."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.adapters import Samples
from mm_moslora.adapters.tree import adapted_layers
from mm_moslora.batch import Example, join_images
from mm_moslora.config import AdapterConfig, DataConfig, ModelConfig, ProjectorConfig, Recipe, TrainConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.epoch_order import MicroBatchLimit
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.kernels.attention.attention_choice import AttentionChoice, choose_attention, set_attention
from mm_moslora.models.assembly import Parts, is_quantised, load_parts
from mm_moslora.models.batching.padded_batch import PaddedCollator
from mm_moslora.models.memory_efficient.activation_offload import offload_inputs
from mm_moslora.models.memory_efficient.compiled_layers import compile_layers
from mm_moslora.models.memory_efficient.decoder_layers import use_lean_layers
from mm_moslora.models.memory_efficient.kernel_selection import attention_words, choose_kernels, use_kernels
from mm_moslora.models.memory_efficient.loss_head import use_loss_head
from mm_moslora.models.model_paths import resolve_model_paths, stored_commits, trained_on
from mm_moslora.models.pretrained_vlm import tower_path
from mm_moslora.models.processing.anyres import NEWLINE, newline_of
from mm_moslora.models.processing.image_processing import dummy_image_example
from mm_moslora.models.projectors.projector_start import (
    embedding_scale,
    embedding_size,
    fit_to_words,
    fold_into,
    inputs_of,
    last_layer,
    linear_layers,
)
from mm_moslora.models.trainable_parts import attach_adapters, checkpoint_layers, component_table, reads_data
from mm_moslora.models.vision.feature_cache import FeatureStore, StepFeatureCache, tower_hash
from mm_moslora.models.vlm import image_features, is_multimodal, needs_padding
from mm_moslora.training.engine import (
    Engine,
    LossModule,
    OptimizerSettings,
    build_engine,
    prepare_deepspeed,
    weights_place,
)
from mm_moslora.training.engine.ulysses import row_share, share_rows
from mm_moslora.training.metrics.mixer_metrics import ADAPTERS, keep_start
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.precision import dtype_of, resolve_precision
from mm_moslora.training.preflight import check_model, refuse_folder
from mm_moslora.training.token_budget import token_budget
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import TrainingError
from mm_moslora.utils.file_locks import held
from mm_moslora.utils.files import write_owner
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import RUN_LOCK, is_adapter, projector_file
from mm_moslora.utils.untrusted_files import read_text_below

logger = logging.getLogger(__name__)


PICTURES_TO_SCALE, PICTURES_TO_STANDARDISE, PICTURES_TO_FIT = 8, 64, 1024
"""Numbers of pictures: few for the scale, more for the spread of every dimension, most for the fit to answers."""
SAMPLES_TO_START = 256
"""Samples for an adapter whose start reads data."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a run folder for this run; the kernel frees the lock when the process ends.

    Raises:
        ConfigError: files of another program have names that a run writes.
        TrainingError: another process holds the lock, or the folder is not writable.
        DistributedError: the same on another rank.
    """
    with ExitStack() as stack:
        with distributed.failing_together("Taking the run folder"):
            if distributed.is_main():
                refuse_folder(folder)
                stack.enter_context(_lock(folder))
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = held(folder / RUN_LOCK, wait=False)
    except BlockingIOError as error:
        owner = (read_text_below(folder, RUN_LOCK, errors="replace") or "").strip()
        raise TrainingError(
            f"{folder} is in use by another run ({owner or 'owner unknown'}). "
            "Wait for it, stop it, or choose another train.output."
        ) from error
    except OSError as error:
        raise TrainingError(
            f"The run folder {folder} cannot be written ({error.strerror}). Choose another with train.output, or with "
            "--output of the quickstart."
        ) from error
    with lock as descriptor:
        write_owner(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield


def seed_everything(seed: int) -> None:
    """Seed Python's and torch's generators, differently on every rank, so that dropout masks differ."""
    random.seed(seed)
    torch.manual_seed(seed * 10_007 + distributed.rank())


@dataclass(kw_only=True)
class Run:
    """The parts of a training run."""

    recipe: Recipe
    folder: Path
    precision: str
    assembly: Parts
    training_set: TrainingSet
    validation_set: TrainingSet | None
    engine: Engine
    limit: MicroBatchLimit
    """Size of this rank's micro-batches, the same on all ranks."""
    frozen_projector: dict[str, Tensor] = field(default_factory=dict)
    """Full weights of a frozen projector; under ZeRO-3 the model holds shards."""
    trained_on: dict[str, dict[str, str]] = field(default_factory=dict)
    """Fingerprints and commits of the base model's parts, see `mm_moslora.models.model_paths`."""
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps so far (applied or skipped)."""
        return int(self.counters.get("steps", 0))

    def identity(self) -> dict[str, object]:
        """What the data is, see `TrainingSet.identity`."""
        held_out = {} if self.validation_set is None else self.validation_set.identity("data.validation")
        return self.training_set.identity("data.train") | held_out


def prepare(recipe: Recipe, *, checkpoint: Path | None = None) -> Run:
    """Assemble model, data and engine, in this order, and log the trainable parameters. A checkpoint helps to find
    models that were moved."""
    recipe = recipe.for_ranks(distributed.world_size())
    folder = Path(recipe.train.output)
    precision = distributed.from_main(resolve_precision(recipe.train.precision))  # hosts may differ
    lean = recipe.model.lean_layers and recipe.train.compile is None
    kernels = choose_kernels(recipe.model.kernels, distributed.device(), lean=lean, dtype=dtype_of(precision))
    with distributed.failing_together("Finding the model"):
        parts = recipe.model if checkpoint is None else resolve_model_paths(recipe.model, checkpoint)
    micro_tokens = token_budget(recipe, parts, precision=precision)
    model_start, adapter_start = parts, recipe.adapter
    if checkpoint is not None:
        model_start, adapter_start = _start_of(recipe.model, parts, recipe.adapter, checkpoint)
    with distributed.failing_together("Loading the model"):  # under ZeRO-3 rank 0 alone reads its weights
        place = weights_place(recipe.train, quantised=is_quantised(model_start))
        assembly = load_parts(model_start, dtype=dtype_of(precision), device=place)
        if not (late := reads_data(adapter_start)):
            attach_adapters(assembly, recipe.model, adapter_start, seed=recipe.train.seed)
        check_model(recipe, assembly.model, layers=assembly.model.get_decoder().config.num_hidden_layers)
    data = _pinned(recipe.data, checkpoint)
    training_set = _data_set(replace(recipe, data=data), assembly, validation=False, settle=checkpoint is None)
    assert training_set is not None
    recipe = _as_asked(recipe, assembly, training_set)
    validation_set = _data_set(replace(recipe, data=data), assembly, validation=True)
    if checkpoint is None or late:
        _start_projector(model_start.projector, assembly, training_set)
    if late:
        _start_from_data(assembly, recipe, adapter_start, training_set)
    if distributed.is_main():
        for line in trainable_table(assembly):
            logger.info("%s", line)
    model = assembly.model.train()
    attention = AttentionChoice(name="")
    if not needs_padding(model):
        with distributed.failing_together("Choosing the attention"):
            attention = choose_attention(model, recipe.model.attention, device=distributed.device())
        set_attention(model, attention.name, native=kernels.native)
    attention = replace(attention, words=attention.words or attention_words(model, kernels))
    _say_what_runs(attention, precision)
    if (together := recipe.train.sequence_parallel) > 1:
        prepare_deepspeed(recipe.train.zero)
        share_rows(model, together)
    use_loss_head(model)
    if recipe.model.lean_layers:
        use_lean_layers(model)
    _checkpoint(model, recipe.train)
    if recipe.train.compile is not None:
        compile_layers(model, recipe.train.compile)
    if (note := use_kernels(model, kernels, lean=lean)) and distributed.is_main():
        logger.info("%s", note)
    settings = OptimizerSettings(
        betas=recipe.optim.betas, eps=recipe.optim.eps, max_grad_norm=recipe.optim.max_grad_norm
    )
    dummy = dummy_image_example(assembly.image_processing) if assembly.image_processing else None
    module = LossModule(
        model, dummy, memory=StepFeatureCache(_feature_store(recipe.model, model)), share=row_share(together)
    )
    assembled = is_multimodal(model) and not assembly.is_pretrained_vlm
    projector = dict(model.model.multi_modal_projector.state_dict()) if assembled else {}
    newline = newline_of(model) if assembled else None
    projector |= {} if newline is None else {NEWLINE: newline}
    frozen_projector = {
        name: value.detach().float().cpu().clone()
        for name, value in projector.items()
        if distributed.is_main() and recipe.model.projector.mode == "frozen"
    }
    groups = parameter_groups(module, recipe.optim)
    engine = build_engine(module, groups, recipe.train, precision=precision, optimizer=settings)
    state = engine.trainable_state(only=ADAPTERS, keep=distributed.is_main())
    if distributed.is_main():
        keep_start(model, state)
    return Run(
        recipe=recipe, folder=folder, precision=precision, assembly=assembly, training_set=training_set,
        validation_set=validation_set, engine=engine, frozen_projector=frozen_projector,
        limit=MicroBatchLimit(
            examples=recipe.train.micro_batch, tokens=micro_tokens, padded=needs_padding(model)
        ),
        trained_on=trained_on(parts, training_set.commits, before=checkpoint),
    )  # fmt: skip


def _checkpoint(model: PreTrainedModel, train: TrainConfig) -> None:
    """Recompute layers in the backward pass as the recipe says, with their inputs in main memory if it says so."""
    if again := train.gradient_checkpointing:
        checkpoint_layers(model.get_decoder(), None if again is True else again)
    if train.vision_gradient_checkpointing and is_multimodal(model):
        checkpoint_layers(cast(PreTrainedModel, model.get_submodule(tower_path(model))))
    if train.activation_offload:
        offload_inputs(model)


def _say_what_runs(attention: AttentionChoice, precision: str) -> None:
    """Log the attention kernel, kernels that do not run, and a warning where ranks differ in GPU or kernel."""
    gpu, faults = distributed.gpu_in_words(), attention.faults
    if gpu and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        faults = (*faults, f"{gpu} emulates bf16, which is slow; set train.precision to fp16 or fp32")
    everywhere = distributed.gather_objects(([(gpu, attention.words)] if gpu else [], faults))
    if not distributed.is_main():
        return
    for fault in dict.fromkeys(fault for _, faults in everywhere for fault in faults):
        logger.warning("%s.", fault.rstrip("."))
    if attention.words:
        logger.info("Attention runs on %s.", attention.words)
    kinds: dict[str, list[int]] = {}
    for index, (found, _) in enumerate(everywhere):
        for gpu, words in found:
            kinds.setdefault(f"{gpu} (attention: {words})" if words else gpu, []).append(index)
    if len(kinds) > 1:
        listed = "; ".join(f"ranks {', '.join(map(str, ranks))}: {kind}" for kind, ranks in kinds.items())
        logger.warning(
            "The ranks run on different GPUs or kernels: %s. Every step takes as long as the slowest rank, and "
            "micro-batches must fit the smallest GPU.",
            listed,
        )


def _start_of(
    given: ModelConfig, model: ModelConfig, adapter: AdapterConfig, checkpoint: Path
) -> tuple[ModelConfig, AdapterConfig]:
    """The source of a resumed run's initial weights: its checkpoint, where the original ones are gone.

    `model` is `given`, the recipe's, as `resolve_model_paths` found it.

    Trained weights are loaded from the checkpoint's state later, so only frozen parts and shapes depend on this.
    """
    weights, kept = given.projector.weights, checkpoint / "projector.safetensors"
    fresh = weights is None and model.vlm is None and not model.projector_trains and kept.is_file()
    if fresh or (weights and not projector_file(model.projector.weights or "").is_file()):
        model = replace(model, projector=replace(model.projector, weights=str(kept)))
    if adapter.weights and not is_adapter(adapter.weights):
        adapter = replace(adapter, weights=str(checkpoint / "adapter"))
    return model, adapter


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


def _as_asked(recipe: Recipe, assembly: Parts, data: TrainingSet) -> Recipe:
    """The recipe with the form of thinking that the data decided; checkpoints hold it, and exports by their template.

    A resumed run keeps the form of its checkpoint.
    """
    if (form := data.form) is not None and distributed.is_main() and (form.thinking or form.asked or form.mixed):
        if form.mixed:
            logger.warning("%s: %s.", form.words, form.remedy)
        else:
            logger.info("%s.", form.words)
    assembly.ask(data.encoder.thinking)
    return replace(recipe, model=replace(recipe.model, thinking=data.encoder.thinking))


def _pinned(data: DataConfig, checkpoint: Path | None) -> DataConfig:
    """The data with the commits of a checkpoint, for data sets of the hub."""
    commits = {} if checkpoint is None else stored_commits(checkpoint)
    named = [(source, commits.get(f"data.train.{index}")) for index, source in enumerate(data.train)]
    return replace(data, train=[replace(source, revision=commit) if commit else source for source, commit in named])


def _data_set(recipe: Recipe, assembly: Parts, *, validation: bool, settle: bool = False) -> TrainingSet | None:
    config, sources = recipe.data, recipe.data.train
    if validation:
        # Every held-out record once, however training mixes its sources.
        config, sources = replace(config, mixing="repeats", epoch_records=None), config.held_out
        if not sources:
            return None
    encoder = ConversationEncoder.of(assembly)
    name = "validation_quarantine.jsonl" if validation else "quarantine.jsonl"
    progress = Progress("read records", 0, unit="record")
    return TrainingSet(
        sources,
        encoder,
        assembly.image_processing,
        config=config,
        settle=settle,
        quarantine_path=Path(recipe.train.output) / name,
        on_progress=progress.of,
    )


def _start_from_data(assembly: Parts, recipe: Recipe, adapter: AdapterConfig, data: TrainingSet) -> None:
    """Add an adapter whose start reads samples of the training data; a resumed run reads the same again.

    Every rank reads the same samples and then takes the values of rank 0.
    """
    model = assembly.model
    if model.device.type != distributed.device().type:
        cast(nn.Module, model).to(distributed.device())
    if is_multimodal(model) and not assembly.is_pretrained_vlm:  # a new projector starts otherwise on every rank
        for value in model.model.multi_modal_projector.parameters():
            distributed.take_from_main(value.data)
    with distributed.failing_together("Starting the adapter from data"):
        samples = Samples(
            batches=partial(_batches, model, data), progress=lambda what, total: Progress(what, total).update
        )
        wrapped = attach_adapters(assembly, recipe.model, adapter, seed=recipe.train.seed, samples=samples)
    layers = [] if wrapped is None else [layer for _, layer in adapted_layers(wrapped)]
    tensors = [value.data for layer in layers for value in cast(nn.Module, layer).parameters()]
    shapes = distributed.gather_objects([tuple(value.shape) for value in tensors])
    if any(other != shapes[0] for other in shapes):
        raise TrainingError(
            "The ranks start the adapter with other ranks of its layers, since their devices round otherwise. Set "
            "adapter.peft.eva_config to {rho: 1.0}, which gives every layer the same rank."
        )
    for value in tensors:
        distributed.take_from_main(value)
    assembly.adapter_start = distributed.from_main(assembly.adapter_start)


def _batches(model: PreTrainedModel, data: TrainingSet, size: int) -> list[dict[str, Any]]:
    """Samples that are spread over the training data, as keyword arguments of the model with labels."""
    count = min(len(data), SAMPLES_TO_START)
    progress = Progress("read samples for the adapter", count)
    examples = []
    for place in range(count):
        if (example := data[len(data) * place // count]) is not None:
            examples.append(example)
        progress.update(place + 1)
    if not examples:
        raise TrainingError("The adapter's start reads samples of the training data, and none of them can be used.")
    collate = PaddedCollator(model=model)
    batches = [collate(examples[start : start + size]) for start in range(0, len(examples), size)]
    return [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]


@torch.no_grad()
def _start_projector(wanted: ProjectorConfig, assembly: Parts, data: TrainingSet) -> None:
    """Fit a new projector to pictures of the training data and their answers, as its configuration asks.

    Rank 0 computes on the device that it trains on; the other ranks get its weights.
    """
    model = assembly.model
    if not is_multimodal(model) or assembly.is_pretrained_vlm or wanted.weights:
        return
    if not (wanted.fit_to_answers or wanted.scale_to_embeddings):
        return
    projector = model.model.multi_modal_projector
    with distributed.failing_together("Fitting the projector"):
        if distributed.is_main():
            with _vision_on_training_device(model):
                _fit(assembly, data, to_answers=wanted.fit_to_answers)
    weights = {name: value.cpu() for name, value in projector.state_dict().items()}
    projector.load_state_dict(distributed.from_main(weights))


def _fit(assembly: Parts, data: TrainingSet, *, to_answers: bool) -> None:
    model = assembly.model
    projector, words = model.model.multi_modal_projector, cast(Tensor, model.get_input_embeddings().weight)
    pictures = [pixels for _, pixels in _spread_out(data, PICTURES_TO_STANDARDISE if to_answers else PICTURES_TO_SCALE)]
    if not pictures:
        logger.warning("The projector starts from random weights: no record of the training data has a picture.")
        return
    if to_answers:
        fold_into(projector, *_feature_spread(model, pictures))
        share = fit_to_words(projector, _features_and_words(assembly, data), size=embedding_size(words))
        if share is not None:
            logger.info("Projector fitted: visual tokens explain %.0f %% of the variance of the answers.", 100 * share)
            return
        logger.warning("The projector is not fitted to the answers: the answers, or the pictures, are all equal.")
    factor = embedding_scale(image_features(model, torch.cat(pictures[:PICTURES_TO_SCALE])), words)
    for parameter in last_layer(projector).parameters():
        parameter.mul_(factor)
    logger.info("Projector output scaled by %.3g to the norm of word embeddings.", factor)


def _spread_out(
    data: TrainingSet, count: int, *, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Example, Tensor]]:
    """Records with pictures, and their pictures or tiles ``[n, 3, H, W]``.

    At most `count`, evenly spaced, since files are often sorted by content.
    """
    shown = [index for index in range(len(data)) if data.has_image[index]]
    chosen = [shown[len(shown) * place // count] for place in range(count)] if len(shown) > count else shown
    for done, index in enumerate(chosen, start=1):
        example = data[index]
        if example is not None and example.pictures:
            yield example, join_images([picture.tensors for picture in example.pictures])["pixel_values"].flatten(0, -4)
        if on_progress is not None:
            on_progress(done, len(chosen))


def _feature_spread(model: PreTrainedModel, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the input of a projector's first linear layer, ``[V]`` each, fp32.

    Args:
        model: an assembly with tower and projector on the device that it trains on.
        pictures: real pictures, ``[n, 3, H, W]`` each.
    """
    with inputs_of(linear_layers(model.model.multi_modal_projector)[0]) as taken:
        for pixels in pictures:
            image_features(model, pixels)
        spread, mean = torch.std_mean(taken().flatten(0, -2), dim=0, correction=0)
    return mean, spread


def _features_and_words(assembly: Parts, data: TrainingSet) -> Iterator[tuple[Tensor, Tensor]]:
    """Per picture, the first layer's input ``[n, Q, V]`` and the mean word embedding of the answers ``[n, D]``."""
    model, marks = assembly.model, torch.tensor(assembly.tokenizer.all_special_ids)
    words = cast(Tensor, model.get_input_embeddings().weight)
    progress = Progress("fit projector", 0, unit="picture")
    with inputs_of(linear_layers(model.model.multi_modal_projector)[0]) as taken:
        records = _spread_out(data, PICTURES_TO_FIT, on_progress=progress.of)
        while some := list(islice(records, PICTURES_TO_SCALE)):
            pixels, targets = [], []
            for example, shown in some:
                answers = example.input_ids[example.supervised]
                if len(answers := answers[~torch.isin(answers, marks)]):
                    pixels.append(shown)
                    targets.append(words[answers].float().mean(0).expand(len(shown), -1))
            if pixels:
                image_features(model, torch.cat(pixels))
                yield taken(), torch.cat(targets)


@contextmanager
def _vision_on_training_device(model: PreTrainedModel) -> Iterator[None]:
    """Tower and projector on this rank's device inside the block, and then where they were."""
    parts: list[nn.Module] = [model.model.vision_tower, model.model.multi_modal_projector]
    before = next(parts[0].parameters()).device
    for part in parts:
        part.to(distributed.device())
    try:
        yield
    finally:
        for part in parts:
            part.to(before)


def trainable_table(assembly: Parts) -> list[str]:
    """Parameters and trainable parameters by component, as lines of text."""
    rows = component_table(assembly)
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    lines = [f"{'component':<16}{'parameters':>14}{'trainable':>14}"]
    lines += [f"{row.name:<16}{row.total:>14,}{row.trainable:>14,}" for row in rows]
    lines.append(f"{'all':<16}{total:>14,}{trainable:>14,}  ({100 * trainable / total:.2f} %)")
    return lines
