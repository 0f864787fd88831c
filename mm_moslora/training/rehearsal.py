"""A rehearsal before the first step, so that a run does not fail hours later: the largest batch, and a checkpoint."""

from __future__ import annotations

import logging
import time

import torch

from mm_moslora.data.batch_loader import largest_batch
from mm_moslora.training.checkpointing.checkpoint_folder import Saver, rank_folder
from mm_moslora.training.resume import load_optimizer
from mm_moslora.training.run_setup import Run
from mm_moslora.training.snapshot import RandomState, Snapshot, moving_statistics, snapshot
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, TrainingError
from mm_moslora.utils.identity import sha256_of

logger = logging.getLogger(__name__)


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
