"""A run: its folder, its parts, and what a checkpoint of it holds."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import random
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_moslora import adapters, distributed
from mm_moslora.config import Recipe
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.dataset import TrainingSet
from mm_moslora.errors import CheckpointError, TrainingError
from mm_moslora.losses import use_loss_head
from mm_moslora.models.attention import set_attention, training_attention
from mm_moslora.models.build import Assembly, assemble
from mm_moslora.models.eyes import dummy_example
from mm_moslora.models.lean import use_lean_layers
from mm_moslora.models.processor import save_processor
from mm_moslora.models.trainable import attach_adapters, component_of, component_table
from mm_moslora.models.vlm import is_multimodal, takes_rows
from mm_moslora.training import checkpoint
from mm_moslora.training.engine import (
    Engine,
    LossModule,
    OptimizerSettings,
    build_engine,
    dtype_of,
    resolve_precision,
)
from mm_moslora.training.optim import parameter_groups
from mm_moslora.training.progress import Progress

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a run folder for this run alone; freed by the kernel when the process ends, however it ends.

    Raises:
        TrainingError: another process holds it.
    """
    if not distributed.is_main():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "run.lock").open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
    counters: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Optimiser steps done (applied or skipped)."""
        return int(self.counters.get("steps", 0))


def prepare(recipe: Recipe) -> Run:
    """Assemble model, data and engine, in this order, and log what trains.

    Args:
        recipe: resolved; its `train.output` exists.
    """
    folder = Path(recipe.train.output)
    precision = resolve_precision(recipe.train.precision)
    assembly = assemble(recipe.model, dtype=dtype_of(precision))
    attach_adapters(assembly, recipe.model, recipe.adapter, seed=recipe.train.seed)
    if distributed.is_main():
        for line in trainable_table(assembly):
            logger.info("%s", line)
    training_set = _data_set(recipe, assembly, validation=False)
    assert training_set is not None
    validation_set = _data_set(recipe, assembly, validation=True)
    _match_projector_scale(recipe, assembly, training_set)
    model = assembly.model.train()
    if not takes_rows(model):
        set_attention(model, training_attention(model, recipe.model.attention))
    use_loss_head(model)
    if recipe.model.lean_layers:
        use_lean_layers(model)
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    groups = parameter_groups(model, recipe.optim)
    settings = OptimizerSettings(
        betas=recipe.optim.betas, eps=recipe.optim.eps, max_grad_norm=recipe.optim.max_grad_norm
    )
    module = LossModule(model, dummy_example(assembly.eyes) if assembly.eyes else None)
    groups_in_module = parameter_groups(module, recipe.optim)
    assert [g.name for g in groups] == [g.name for g in groups_in_module]
    engine = build_engine(module, groups_in_module, recipe.train, precision=precision, optimizer=settings)
    return Run(
        recipe=recipe, folder=folder, precision=precision, assembly=assembly, training_set=training_set,
        validation_set=validation_set, engine=engine,
    )  # fmt: skip


def _data_set(recipe: Recipe, assembly: Assembly, *, validation: bool) -> TrainingSet | None:
    sources = recipe.data.validation if validation else recipe.data.train
    if validation and not sources:
        return None
    encoder = Encoder(
        assembly.tokenizer,
        image_token_id=assembly.image_token_id,
        tokens_per_image=assembly.tokens_per_image,
        processor=assembly.processor if assembly.ready_made else None,
    )
    name = "validation_quarantine.jsonl" if validation else "quarantine.jsonl"
    progress = Progress("read records", 0, unit="record")
    return TrainingSet(
        sources,
        encoder,
        assembly.eyes,
        config=recipe.data,
        quarantine_path=Path(recipe.train.output) / name,
        on_progress=progress.of,
    )


@torch.no_grad()
def _match_projector_scale(recipe: Recipe, assembly: Assembly, data: TrainingSet) -> None:
    """Give a fresh projector's visual tokens the size of word embeddings; see `scale_to_embeddings`."""
    from mm_moslora.models.projector import scale_to_embeddings
    from mm_moslora.models.vlm import image_features

    model = assembly.model
    ours = is_multimodal(model) and not assembly.ready_made
    if not (ours and recipe.model.projector.scale_to_embeddings) or recipe.model.projector.weights:
        return
    pictures: list[Tensor] = []
    for index in range(len(data)):
        if len(pictures) >= 8:
            break
        example = data[index] if data.has_image[index] else None
        if example is not None and example.pixel_values is not None:
            pictures.append(example.pixel_values)
    if pictures:
        projector = model.model.multi_modal_projector
        last = projector.last if hasattr(projector, "last") else projector.linear_2
        pixels = torch.cat(pictures)
        embeddings = cast(Tensor, model.get_input_embeddings().weight)
        factor = scale_to_embeddings(last, lambda: image_features(model, pixels), embeddings)
        logger.info("Projector output scaled by %.3g to the size of word embeddings.", factor)


def trainable_table(assembly: Assembly) -> list[str]:
    """Parameters and trainable parameters by component, as lines of text."""
    rows = component_table(assembly)
    total, trainable = sum(row.total for row in rows), sum(row.trainable for row in rows)
    lines = [f"{'component':<16}{'parameters':>14}{'trainable':>14}"]
    lines += [f"{row.name:<16}{row.total:>14,}{row.trainable:>14,}" for row in rows]
    lines.append(f"{'all':<16}{total:>14,}{trainable:>14,}  ({100 * trainable / total:.2f} %)")
    return lines


def save(run: Run) -> Path:
    """Write and commit a checkpoint of the run's present state, then drop the oldest beyond `keep_last`."""
    state = {name.removeprefix("model."): value for name, value in run.engine.trainable_state().items()}
    expected = {name for name, parameter in run.assembly.model.named_parameters() if parameter.requires_grad}
    if set(state) != expected:
        odd = sorted(set(state) ^ expected)
        raise CheckpointError(f"The weights to save are not the weights that train; they differ in {odd[:4]}.")
    shapes = {name: list(value.shape) for name, value in state.items()}

    def write(folder: Path) -> None:
        if distributed.is_main():
            write_model(run, state, folder)
        run.engine.save_state(folder / "trainer")
        _save_rng(folder / "trainer")

    def describe(files: dict[str, dict[str, Any]]) -> checkpoint.Manifest:
        return checkpoint.Manifest(
            step=run.step,
            world_size=distributed.world_size(),
            recipe=run.recipe.to_dict(),
            base=run.assembly.base,
            counters=dict(run.counters),
            trainable=shapes,
            files=files,
        )

    folder = checkpoint.commit(run.folder, run.step, write=write, describe=describe)
    if distributed.is_main():
        checkpoint.remove_old(run.folder, keep_last=run.recipe.train.keep_last)
    return folder


def write_model(run: Run, state: dict[str, Tensor], folder: Path) -> None:
    """The part of a checkpoint that is for use: recipe, adapter, projector, other trained weights, processor."""
    (folder / "config.yaml").write_text(run.recipe.to_yaml(), encoding="utf-8")
    model, assembly = run.assembly.model, run.assembly
    if assembly.peft_model is not None:
        adapter_state = {name: value for name, value in state.items() if "lora_" in name}
        adapters.save_adapter(assembly.peft_model, folder / "adapter", state=adapter_state, base=assembly.base)
    if is_multimodal(model) and not assembly.ready_made:
        prefix = "model.multi_modal_projector."
        if any(name.startswith(prefix) for name in state):
            projector = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        else:
            projector = {k: v.detach().float().cpu() for k, v in model.model.multi_modal_projector.state_dict().items()}
        save_file(_contiguous(projector), folder / "projector.safetensors")
    for component in ("vision", "language", *(("projector",) if assembly.ready_made else ())):
        part = {name: value for name, value in state.items() if component_of(name) == component}
        if part:
            save_file(_contiguous(part), folder / f"{component}.safetensors")
    if assembly.processor is not None:
        save_processor(assembly.processor, folder / "processor")
    else:
        assembly.tokenizer.save_pretrained(folder / "processor")


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.contiguous() for name, value in state.items()}


def _rng_file(folder: Path) -> Path:
    return folder / f"rng-rank{distributed.rank():05d}.safetensors"


def _save_rng(folder: Path) -> None:
    """Random state as safetensors and JSON: nothing here needs pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    version, words, gauss = random.getstate()
    save_file(state, _rng_file(folder), metadata={"python": json.dumps([version, list(words), gauss])})


def _load_rng(folder: Path) -> None:
    from safetensors import safe_open

    state = load_file(_rng_file(folder))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    with safe_open(_rng_file(folder), framework="pt") as file:
        version, words, gauss = json.loads(file.metadata()["python"])
    random.setstate((version, tuple(words), gauss))


def find_resume(recipe: Recipe, resume: str) -> tuple[Path, checkpoint.Manifest] | None:
    """Which checkpoint to go on from, the same on every rank.

    Args:
        recipe: resolved.
        resume: `auto` (the newest valid one, or none in a fresh folder), `required`, `never`, or a checkpoint folder.

    Raises:
        CheckpointError: `required` without a checkpoint, `never` with one, a damaged or foreign one.
    """
    run = Path(recipe.train.output)
    choice: tuple[str, str] | None = None
    failure: Exception | None = None
    if distributed.is_main():
        try:
            found = _choose(run, resume)
            choice = None if found is None else (str(found[0]), str(found[1].step))
            if found is not None:
                _check_same_run(found[0], found[1], recipe)
        except CheckpointError as error:
            failure = error
    distributed.agree(failure, what="Looking for a checkpoint")
    choice = distributed.from_main(choice)
    if choice is None:
        return None
    folder = Path(choice[0])
    return folder, checkpoint.read_manifest(folder, verify=False)


def _choose(run: Path, resume: str) -> tuple[Path, checkpoint.Manifest] | None:
    if resume not in ("auto", "required", "never"):
        folder = Path(resume)
        return folder, checkpoint.read_manifest(folder)
    if resume == "never":
        if checkpoint.checkpoints(run):
            raise CheckpointError(
                f"{run} already holds checkpoints and resume is never. Choose another train.output, or resume: auto."
            )
        return None
    found = checkpoint.newest_valid(run)
    if found is None and resume == "required":
        raise CheckpointError(f"{run} holds no checkpoint, but resume is required. Check train.output.")
    return found


def _check_same_run(folder: Path, manifest: checkpoint.Manifest, recipe: Recipe) -> None:
    changed = checkpoint.changed_keys(manifest.recipe, recipe.to_dict())
    if changed:
        raise CheckpointError(
            f"{folder} belongs to another run: {len(changed)} recipe keys differ ({'; '.join(changed[:6])}). "
            "Restore them, or choose another train.output."
        )
    if manifest.world_size != distributed.world_size():
        raise CheckpointError(
            f"{folder} was written by {manifest.world_size} ranks, this run has {distributed.world_size()}. "
            f"Start {manifest.world_size} ranks."
        )


def restore(run: Run, folder: Path, manifest: checkpoint.Manifest) -> None:
    """Put a run back into the state of a checkpoint, bit for bit."""
    run.engine.load_state(folder / "trainer")
    run.counters.update(manifest.counters)
    _load_rng(folder / "trainer")
