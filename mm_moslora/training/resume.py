"""Restoring a run from a checkpoint, and the rehearsal of that before the first step, not hours later."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mm_moslora.adapters.folders.load_folder import restore_mixers
from mm_moslora.adapters.peft_methods import restore_method
from mm_moslora.data.batch_loader import largest_batch
from mm_moslora.data.training_stream import TrainingStream
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest, Saver, rank_folder, reading_state
from mm_moslora.training.engine import ParameterShard, TrainingEngine
from mm_moslora.training.run_setup import Run
from mm_moslora.training.snapshot import (
    MASTER,
    OPTIMIZER,
    OPTIMIZER_DETAILS,
    RandomState,
    Snapshot,
    moving_statistics,
    snapshot,
)
from mm_moslora.utils import distributed
from mm_moslora.utils.distributed import seed_everything
from mm_moslora.utils.errors import CheckpointError, TrainingError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of

logger = logging.getLogger(__name__)


def restore(run: Run, folder: Path, manifest: Manifest) -> None:
    """Restore the state of a checkpoint; bit for bit on the same number of ranks and the same ZeRO stage."""
    if manifest.data not in ("", run.training_set.fingerprint):
        stream = run.training_set if isinstance(run.training_set, TrainingStream) else None
        files = "" if stream is None else stream.what_changed(manifest.place)
        what = files or "records were added, removed, changed in length or became unusable"
        raise CheckpointError(
            f"The training data differs from that of {folder}: {what}, so that some records would be seen twice and "
            "others never. Restore the data, and the same command goes on; or start another run from the checkpoint's "
            "weights (adapter.weights, model.projector.weights)."
        )
    if isinstance(run.training_set, TrainingStream):
        run.training_set.go_to(manifest.place)
    named = manifest.recipe.get("train", {}).get("micro_tokens")
    if named == run.recipe.train.micro_tokens and manifest.micro_tokens != run.limit.tokens and distributed.is_main():
        logger.info(
            "Micro-batches have at most %s tokens on this machine, and %s where %s was written: the same samples "
            "follow in the same order and the numbers agree to rounding, but not bit for bit, and dropout masks "
            "differ. train.micro_tokens fixes the number.",
            run.limit.tokens or "any number of", manifest.micro_tokens or "any number of", folder.name,
        )  # fmt: skip
    load_optimizer(run.engine, [rank_folder(folder, rank) for rank in range(manifest.world_size)])
    _restore_statistics(run, folder)
    if run.assembly.peft_model is not None and run.recipe.adapter.peft:
        restore_method(run.assembly.peft_model, folder / "adapter")
    elif run.assembly.peft_model is not None:
        restore_mixers(run.assembly.peft_model, folder / "adapter")
    run.counters.update(manifest.counters)
    if manifest.world_size == distributed.world_size():
        with reading_state(rank_folder(folder)):
            RandomState.read(rank_folder(folder)).restore()
    else:
        # One stream per rank; none may repeat an earlier stream.
        seed_everything(run.recipe.train.seed + 7919 * (run.step + 1) + 31 * distributed.world_size())


@torch.no_grad()
def _restore_statistics(run: Run, folder: Path) -> None:
    buffers = moving_statistics(run.assembly.model)
    if not buffers:
        return
    stored = {
        name: value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
        if name in buffers
    }
    for name, buffer in buffers.items():
        if name not in stored:
            raise CheckpointError(f"{folder} lacks {name}, which is trained. Choose another checkpoint.")
        buffer.copy_(stored[name])


@torch.no_grad()
def load_optimizer(engine: TrainingEngine, folders: Sequence[Path]) -> None:
    """Read the optimiser state that any number of ranks on any ZeRO stage wrote into an engine."""
    stored = StoredOptimizer(folders)
    groups: dict[int, list[ParameterShard]] = defaultdict(list)
    for shard in engine.shards():
        for kind, target in {MASTER: shard.master, **shard.moments}.items():
            value = stored.whole(kind, shard.name)
            if value.dtype != target.dtype:
                raise CheckpointError(
                    f"{folders[0].parent}: {kind} of {shard.name} is {value.dtype}, expected {target.dtype}. Install "
                    "the release of the optimiser's package that wrote the checkpoint."
                )
            if shard.start + target.numel() > value.numel():
                raise CheckpointError(
                    f"{folders[0].parent}: {shard.name} has {value.numel()} elements, expected at least "
                    f"{shard.start + target.numel()}."
                )
            target.copy_(value.narrow(0, shard.start, target.numel()))
        groups[id(shard.state)].append(shard)
    for members in groups.values():
        # A flat group has one count. Parameters that were stepped alone may differ; the largest count is taken.
        if members[0].step is not None:
            members[0].set_step(max(stored.steps.get(shard.name, 0.0) for shard in members))
    engine.refresh(lambda name: stored.whole(MASTER, name), stored.scaler)


class StoredOptimizer:
    """The optimiser state of all ranks of a checkpoint, from a folder per rank that wrote."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.steps: dict[str, float] = {}
        self.scaler: dict[str, float] = {}
        self._parts: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        if not self.folders:
            raise CheckpointError("The checkpoint holds no trainer state, expected one folder per rank.")
        for folder in self.folders:
            with reading_state(folder):
                details = read_json(folder / OPTIMIZER_DETAILS)
                file = safe_open(folder / OPTIMIZER, framework="pt")
                self.steps |= details["steps"]
                self.scaler = self.scaler or details["scaler"]
                for key in file.keys():  # noqa: SIM118  (not a mapping)
                    kind, start, name = key.split(".", 2)
                    self._parts[kind, name].append((int(start), file, key))

    def whole(self, kind: str, name: str) -> Tensor:
        """One flat fp32 tensor from its parts; CheckpointError where it is missing, or has a gap."""
        if (kind, name) not in self._parts:
            raise CheckpointError(f"{self.folders[0].parent} has no state of {name}, which trains.")
        parts, end = [], 0
        for start, file, key in sorted(self._parts[kind, name], key=lambda part: part[0]):
            if start != end:
                raise CheckpointError(
                    f"{self.folders[0].parent}: {kind} of {name} has a gap at element {end}, the next piece starts at "
                    f"{start}. The checkpoint is incomplete; choose another one."
                )
            parts.append(file.get_tensor(key))
            end += parts[-1].numel()
        return torch.cat(parts)


def rehearse(run: Run, saver: Saver) -> None:
    """Step on the largest micro-batch, write and read a checkpoint, and restore the state of the run bit for bit."""
    started = time.monotonic()
    before = RandomState.now()
    taken = snapshot(run)
    saver.start(taken.manifest, taken.write, size=taken.size)
    trial = saver.wait()
    size = sum(entry["bytes"] for entry in saver.files.values())
    damaged = [name for name, entry in saver.files.items() if sha256_of(trial / name) != entry["sha256"]]
    if damaged:
        raise CheckpointError(f"{trial / damaged[0]} reads back differently than it was written. Check this disk.")
    written = time.monotonic()
    statistics = {name: buffer.clone() for name, buffer in moving_statistics(run.assembly.model).items()}
    tokens = _largest_step(run)
    load_optimizer(run.engine, [rank_folder(trial, rank) for rank in range(distributed.world_size())])
    for name, buffer in moving_statistics(run.assembly.model).items():
        buffer.copy_(statistics[name])
    saver.discard()
    _check_restored(run, taken)
    before.restore()
    logger.info(
        "Rehearsal: a checkpoint takes %.1f MiB and %.1f s; the largest micro-batch has %d tokens; all in %.1f s.",
        size / 2**20, written - started, tokens, time.monotonic() - started,
    )  # fmt: skip


def _largest_step(run: Run) -> int:
    """Run one optimiser step on the longest examples with a learning rate of 0; returns their number of tokens."""
    train = run.recipe.train
    batch = largest_batch(run.training_set.at_hand, run.limit)
    several = run.limit.tokens is not None or train.global_batch > train.micro_batch * distributed.world_size()
    try:
        run.engine.step([batch] * (2 if several else 1), 0.0)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            f"The largest micro-batch, {len(batch.ids)} examples with {batch.tokens} tokens and {batch.images} "
            f"images, does not fit into memory ({error}). Lower train.micro_batch, train.micro_tokens or "
            "data.max_length, set train.gradient_checkpointing, or use a higher ZeRO stage."
        ) from error
    return batch.tokens


def _check_restored(run: Run, taken: Snapshot) -> None:
    state = run.engine.trainable_state(keep=distributed.is_main())
    changed = [
        name for name, value in state.items() if distributed.is_main() and not torch.equal(value, taken.weights[name])
    ]
    with distributed.failing_together("Reading a checkpoint back"):
        if changed:
            raise TrainingError(
                f"{len(changed)} weights changed by being saved and loaded, such as {changed[0]}. "
                "A resumed run would differ from this one; choose another train.zero."
            )
