"""A rehearsal before the first step, so that a run does not fail hours later.

It tests the engine's arithmetic, the largest micro-batch, and a checkpoint that is written, read back and deleted. The
state of the run is restored bit for bit.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from mm_moslora.batch import Batch, Example
from mm_moslora.config import OptimConfig, TrainConfig
from mm_moslora.data.batch_loader import largest_batch
from mm_moslora.models.precision import dtype_of
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.training.checkpointing.checkpoint_folder import Saver, rank_folder
from mm_moslora.training.engine import LossModule, OptimizerSettings, build_engine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.training.resume import load_optimizer
from mm_moslora.training.run_setup import Run
from mm_moslora.training.snapshot import RandomState, Snapshot, moving_statistics, snapshot
from mm_moslora.utils import distributed, files
from mm_moslora.utils.errors import CheckpointError, TrainingError

logger = logging.getLogger(__name__)

_WORDS, _WIDTH, _MICRO_BATCHES = 16, 8, 2
_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}


class _Tiny(nn.Module):
    """A one-layer language model in place of `LossModule`."""

    def __init__(self) -> None:
        super().__init__()
        self.pictures = StepFeatureCache()
        generator = torch.Generator().manual_seed(0)
        self.embed = nn.Parameter(torch.randn(_WORDS, _WIDTH, generator=generator))
        self.lora_mixer = nn.Parameter(torch.randn(_WIDTH, _WIDTH, generator=generator) / _WIDTH**0.5)
        self.head = nn.Parameter(torch.randn(_WORDS, _WIDTH, generator=generator))

    def forward(self, batch: Batch, needs_vision: bool = False, right: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.embed[batch.input_ids[batch.target_positions]] @ self.lora_mixer)
        return nn.functional.cross_entropy((hidden @ self.head.t()).float(), batch.targets, reduction="sum")


def _tiny_batches(rank: int) -> list[Batch]:
    """Different tokens and counts on every rank and in every micro-batch."""
    batches = []
    for number in range(_MICRO_BATCHES):
        length = 4 + (3 * rank + number) % 5
        ids = (torch.arange(length) * (3 + number) + 5 * rank) % _WORDS
        batches.append(Batch.from_examples([Example(id="", input_ids=ids, supervised=torch.ones(length).bool())]))
    return batches


def self_test(train: TrainConfig, precision: str) -> None:
    """Compare one step of a tiny model on the chosen engine with plain autograd over all ranks' data.

    It detects releases of DeepSpeed with wrong gradient reductions (such as 0.17.6 to 0.18.2 on ZeRO-2).
    """
    world = distributed.world_size()
    everything = [batch for rank in range(world) for batch in _tiny_batches(rank)]
    reference = _Tiny().to(dtype_of(precision))
    count = sum(batch.supervised_tokens for batch in everything)
    gradients = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in reference.parameters()]
    for batch in everything:
        parts = torch.autograd.grad(reference(batch) / count, list(reference.parameters()))
        gradients = [total + part.float() for total, part in zip(gradients, parts, strict=True)]
    expected = math.sqrt(sum(float(gradient.pow(2).sum()) for gradient in gradients))

    module = _Tiny().to(dtype_of(precision))
    optim = OptimConfig(lr=1e-2)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=0.0)
    tiny = replace(train, micro_batch=1, global_batch=world * _MICRO_BATCHES)
    engine = build_engine(
        cast(LossModule, module), parameter_groups(module, optim), tiny, precision=precision, optimizer=settings
    )
    try:
        before = engine.trainable_state()
        result = engine.step(_tiny_batches(distributed.rank()), 1.0)
        after = engine.trainable_state()
    finally:
        engine.close()
    if not result.applied and precision == "fp16":
        return  # the first loss scale is often too large, and the step is skipped
    # Adam's first step moves every element by the learning rate against the sign of its gradient.
    steps = [before[name] - after[name] for name, _ in module.named_parameters()]
    wrong = max(
        float(((step - optim.lr * gradient.sign()).abs() * (gradient.abs() > 1e-2 * expected)).max())
        for step, gradient in zip(steps, gradients, strict=True)
    )
    tolerance = _TOLERANCE[precision]
    if not abs(result.grad_norm - expected) <= tolerance * expected or wrong > 10 * tolerance * optim.lr:
        raise TrainingError(
            f"Self-test of train.zero {train.zero} on {world} ranks in {precision}: the gradient norm is "
            f"{result.grad_norm:.6g}, plain PyTorch gives {expected:.6g}; weights are off by {wrong:.2g} at a learning "
            "rate of 0.01. The installed DeepSpeed computes wrong gradients here; run `mm-moslora doctor`, install "
            "another release, or choose another stage."
        )


def rehearse(run: Run, saver: Saver) -> None:
    """Run the rehearsal; see the module docstring.

    Raises:
        TrainingError: the engine computes wrong numbers, the largest micro-batch does not fit, or the state cannot be
            restored.
        CheckpointError: a checkpoint cannot be written.
    """
    started = time.monotonic()
    before = RandomState.now()
    if run.recipe.train.zero != "none":
        self_test(run.recipe.train, run.precision)
    taken = snapshot(run)
    saver.start(taken.manifest, taken.write, size=taken.size)
    trial = saver.wait()
    size = sum(entry["bytes"] for entry in saver.files.values())
    damaged = [name for name, entry in saver.files.items() if files.sha256_of(trial / name) != entry["sha256"]]
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
