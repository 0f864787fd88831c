"""Memory of a training step on one GPU, by part, and the micro-batches of a run (formulas: docs/planning.md)."""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch

from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.config.run_config import OPTIMIZERS
from mm_moslora.models.memory_efficient.loss_head import CHUNK_BYTES, SMALLEST_CHUNK
from mm_moslora.models.precision import dtype_of
from mm_moslora.training.deepspeed_presets import ZeroSettings, stage_of
from mm_moslora.training.metrics.gpu_specs import PER_HOST, device_peak
from mm_moslora.training.metrics.model_cost import ModelCost, PictureWork, model_cost
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import TrainingError, reason_of

logger = logging.getLogger(__name__)

GIB = 2**30
FREE_SHARE = 0.94
"""Share of a GPU's memory that a plan may fill; the rest allows for fragmentation."""
CONTEXT = 1.2 * GIB
"""CUDA context, libraries and communication buffers."""

MODEL_ERROR = 0.10
"""Measured peaks lie within this share of the estimate; see docs/planning.md."""
SHORTEST = 256
"""Fewest tokens for which a shorter `data.max_length` is proposed."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU, by part."""

    weights: float
    adapters: float
    """Trained weights, in the compute dtype."""
    gradients: float
    optimiser: float
    activations: float
    workspace: float
    """Largest temporaries of a backward pass."""
    logits: float
    buffers: float
    """ZeRO's buckets and gathered weights."""
    context: float = CONTEXT

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, item.name) for item in fields(self)))


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """The memory of a model's training step on one GPU, for micro-batches of any size."""

    size: ModelCost
    zero: str
    """The recipe's `train.zero`; for auto, the preset that it chooses."""
    world: int
    """GPUs."""
    on_host: int = PER_HOST
    """Most GPUs of one host."""
    checkpointing: bool | int
    """Of the decoder: all layers, none, or so many from the first."""
    offload: bool = False
    """Whether the inputs of checkpointed layers are in main memory; two of them are on the GPU at a time."""
    together: int = 1
    """Ranks that compute a row together (`train.sequence_parallel`), each a part of its tokens and all its pictures."""
    optimizer: str = "adamw"
    """The recipe's `optim.optimizer`."""
    logit_chunk: int = CHUNK_BYTES["cuda"]
    """Bytes of fp32 logits at a time."""

    @cached_property
    def settings(self) -> ZeroSettings | None:
        """What DeepSpeed gets; None for plain torch."""
        if self.zero == "none":
            return None
        return ZeroSettings.of(
            self.zero, world=self.world, ranks_of_host=min(self.on_host, self.world),
            largest_adapter=self.size.largest_adapter,
        )  # fmt: skip

    @property
    def stage(self) -> int:
        """Of ZeRO; 0 for plain torch."""
        return self.settings.stage if self.settings else 0

    @property
    def share_again(self) -> float:
        """Share of the decoder layers that the backward pass recomputes."""
        return 1.0 if self.checkpointing is True else min(self.checkpointing, self.size.layers) / self.size.layers

    def of(self, tokens: float, *, supervised: float, images: float) -> Memory:
        """Memory with a micro-batch of so many tokens, supervised tokens and images."""
        size, zero, stage = self.size, self.settings, self.stage
        row = tokens * size.width * size.value_bytes if self.together > 1 else 0.0  # its embeddings are whole
        tokens, supervised = tokens / self.together, supervised / self.together
        trained, b = size.trainable, size.value_bytes
        masters = 0 if b == 4 and zero else 4
        states = OPTIMIZERS[self.optimizer].state_bytes
        off = zero.optimizer_off if zero else 0.0
        again = round(self.share_again * size.runs)
        inputs = min(2, again) if self.offload else again
        # The first layers are recomputed, one at a time, when those behind them are freed.
        whole_layers = max(size.runs - again, min(1, again))
        per_token = inputs * size.width * b + whole_layers * size.kept_per_layer + size.kept_elsewhere
        rows = min(supervised, max(SMALLEST_CHUNK, self.logit_chunk // (4 * size.vocabulary)))
        frozen, copies, whole, gathered = self._weights()
        gradients = trained * (b if zero else 4) / (self.world if stage > 1 else 1)
        return Memory(
            weights=frozen * copies,
            adapters=trained * b * copies + whole,
            gradients=0 if off and stage > 1 else gradients,
            optimiser=(1 - off) * trained * (states + masters) / (self.world if stage else 1),
            activations=tokens * per_token + images * size.picture.kept + size.products,
            workspace=2 * row + tokens * size.workspace_per_token + images * size.picture.workspace + size.made_dense,
            logits=rows * size.vocabulary * (4 + b) + supervised * size.width * b,
            buffers=self._buckets() + gathered,
        )

    def main_memory(self, *, packed: bool = False) -> float:
        """Bytes of a host's main memory for weights and optimiser; a `packed` base every rank reads to its GPU."""
        size, zero = self.size, self.settings
        trained, b, ranks = size.trainable, size.value_bytes, min(self.on_host, self.world)
        if zero is None:
            return 0.0
        frozen = self._weights()[0]
        loading = size.weight_bytes + trained * b if zero.stage == 3 and not packed else 0.0
        weights = (frozen + trained * b) * (1 / self.world + (1 / zero.secondary if zero.secondary > 1 else 0))
        states = trained * (8 + (0 if b == 4 else 4)) * zero.optimizer_off
        gradients = trained * b if zero.optimizer_off and zero.stage > 1 else 0
        offloaded = (states + gradients) / self.world + (weights if zero.parameters_off == "cpu" else 0)
        return max(loading, ranks * offloaded)

    @property
    def generating(self) -> float:
        """Bytes while a validation generates, without its cache, under ZeRO-3, which gathers all weights; else 0."""
        size, (_, _, whole, gathered) = self.size, self._weights()
        if not whole + gathered:
            return 0.0
        model = size.weight_bytes + size.trainable * size.value_bytes
        return self.of(0, supervised=0, images=0).total - gathered + model - whole

    def cannot_generate(self, capacity: float) -> str:
        """Why the answers of a validation do not fit into so many bytes, with the remedy, or empty."""
        if self.generating <= FREE_SHARE * capacity:
            return ""
        return (
            f"For validate.samples and validate.tasks {self.zero} gathers the whole model on every GPU, which takes "
            f"about {self.generating / GIB:.0f} GiB; a GPU has {capacity / GIB:.1f} GiB, of which {FREE_SHARE:.0%} can "
            "be used. Leave both keys out and measure checkpoints after the run (mm-moslora eval run); the loss of "
            "held-out records needs no whole model."
        )

    def _weights(self) -> tuple[float, float, float, float]:
        """Bytes of frozen weights; share of weights on this GPU; bytes whole beside shards; bytes gathered at once."""
        size, zero = self.size, self.settings
        if zero is None or zero.stage < 3 or (self.world == 1 and not zero.parameters_off):
            return size.weight_bytes, 1.0, 0.0, 0.0
        frozen = min(size.weight_bytes, size.frozen) if zero.frozen_in_bytes else size.weight_bytes
        copies = 1 / self.world + (1 / zero.secondary if zero.secondary > 1 else 0)
        whole = sum(length * number for length, number in size.elements.items() if length <= zero.persistent)
        gathered = min(zero.live, size.frozen + size.trainable) * 2
        return frozen, 0.0 if zero.parameters_off else copies, whole * size.value_bytes, gathered * size.value_bytes

    @property
    def fetched(self) -> float:
        """ZeRO-3: bytes that a pass over the model gathers, of all weights but those that stay whole."""
        frozen, _, whole, _ = self._weights()
        return max(0.0, frozen + self.size.trainable * self.size.value_bytes - whole)

    def _buckets(self) -> float:
        """Bytes of the buckets in which gradients are reduced, and trained weights gathered."""
        size, zero = self.size, self.settings
        if zero is None:
            return 0.0
        filled = min(zero.reduce_bucket, size.trainable)
        first = zero.reduce_bucket if zero.is_contiguous else filled
        more = (zero.reduce_buffers - 1) * (filled if zero.stage == 3 else first)
        return float(size.value_bytes * (first + more + min(zero.allgather_bucket, size.trainable)))

    def worst(self, tokens: int) -> Memory:
        """Memory with the micro-batch of so many tokens that needs most: full of pictures, every token supervised."""
        return self.of(tokens, supervised=tokens, images=tokens / max(1, self.size.tokens_per_image))

    def most_tokens(self, room: float) -> int:
        """Tokens of the largest micro-batch that takes at most `room` bytes, all else included; 0: there is none."""
        return bisect.bisect_right(range(1, 2**31), room, key=lambda tokens: self.worst(tokens).total)

    def token_budget(self, capacity: float, *, longest: int) -> int:
        """The default of `train.micro_tokens`, at least `longest`, which may use the margin; 0: it does not fit."""
        room = FREE_SHARE * capacity
        budget = self.most_tokens(room / (1 + MODEL_ERROR))
        return budget if budget >= longest else longest if self.most_tokens(room) >= longest else 0

    def remedies(self, capacity: float, *, longest: int, key: str) -> str:
        """What would make an example or row of `longest` tokens fit, as the end of a sentence."""
        most = self.most_tokens(FREE_SHARE * capacity)
        remedies = [f"lower {key} to {most}"] if most >= SHORTEST else []
        stages, last = ((self.zero, "zero3"), "zero3_offload") if self.world > 1 else ((self.zero,), "zero2_offload")
        mild = ((self.checkpointing, self.offload), (True, self.offload))
        lasts: tuple[str, ...] = (last,)
        if OPTIMIZERS[self.optimizer].whole_because:
            stages, lasts = (self.zero,), ()
        tries = (product(stages, mild), product(stages, ((True, True),)), product(lasts, (*mild, (True, True))))
        for zero, (checkpointing, offload) in itertools.chain(*tries):
            other = replace(self, zero=zero, checkpointing=checkpointing, offload=offload)
            if other.token_budget(capacity, longest=longest):
                changes = [f"train.zero to {zero}"] if zero != self.zero else []
                changes += ["train.gradient_checkpointing to true"] if checkpointing is not self.checkpointing else []
                changes += ["train.activation_offload to true"] if offload != self.offload else []
                remedies.append("set " + " and ".join(changes))
                break
        return ", or ".join([*remedies, "take larger or more GPUs"])


class RunEstimate(NamedTuple):
    """What the estimate says to a run."""

    tokens: int | None
    """Most tokens of a micro-batch of one rank; None: any number."""
    picture: PictureWork | None = None
    """By which the FLOPs of a step's pictures are counted; None: no estimate, as on a CPU."""
    peak: float = 0.0
    """Dense half-precision FLOP/s of all ranks together; 0: a rank's device has no known peak."""


def estimate_run(recipe: Recipe, model: ModelConfig, *, precision: str) -> RunEstimate:
    """Estimate a step where memory is limited or a peak is known; all ranks get the same, or TrainingError."""
    memory, name = math.inf, ""
    if (device := distributed.device()).type == "cuda":
        # The total, not what is free: a resumed run must cut its steps as before.
        gpu = torch.cuda.get_device_properties(device)
        memory, name = float(gpu.total_memory), gpu.name
    memories, peaks = zip(*distributed.table_over_ranks([memory, device_peak(name) or 0.0]), strict=True)
    found = RunEstimate(recipe.train.micro_tokens, peak=sum(peaks) if all(peaks) else 0.0)
    if found.peak or min(memories) < math.inf:
        with distributed.failing_together("Estimating the memory of a step"):
            if distributed.is_main():
                found = _that_fits(recipe, model, precision, found, capacity=min(memories))
        found = distributed.from_main(found)
    return found


def _that_fits(
    recipe: Recipe, model: ModelConfig, precision: str, asked: RunEstimate, *, capacity: float
) -> RunEstimate:
    train, longest = recipe.train, recipe.data.longest
    try:
        with torch.random.fork_rng(devices=[]):
            size = model_cost(
                model, recipe.adapter, vision_checkpointing=train.vision_gradient_checkpointing,
                dtype=dtype_of(precision),
            )  # fmt: skip
    except Exception as error:  # loading says what is wrong with the model, if anything is
        if train.micro_tokens is None:
            logger.warning(
                "The memory of a step cannot be estimated (%s), so micro-batches have any number of tokens. Set "
                "train.micro_tokens.",
                reason_of(error),
            )
        return asked
    found = asked._replace(picture=size.picture)
    step = StepMemory(
        size=size, zero=train.zero, world=distributed.world_size(), on_host=distributed.ranks_of_host(),
        checkpointing=train.gradient_checkpointing, offload=train.activation_offload, together=train.sequence_parallel,
        optimizer=recipe.optim.optimizer,
    )  # fmt: skip
    generates = bool(recipe.validate.samples or recipe.validate.tasks) and stage_of(train.zero) == 3
    if generates and (reason := step.cannot_generate(capacity)):
        raise TrainingError(reason)
    if train.micro_tokens or capacity == math.inf:
        return found
    budget = step.token_budget(capacity, longest=longest)
    if not budget:
        needed = step.worst(longest)
        parts = {item.name: getattr(needed, item.name) / GIB for item in fields(needed)}
        table = ", ".join(f"{name} {size:.1f}" for name, size in parts.items() if size >= 0.05)
        raise TrainingError(
            f"{recipe.data.longest_key} is {longest}, and one forward and backward pass of so many tokens takes about "
            f"{needed.total / GIB:.1f} GiB ({table}); the smallest GPU of this run has {capacity / GIB:.1f} GiB, of "
            f"which {FREE_SHARE:.0%} can be used. To make it fit, "
            f"{step.remedies(capacity, longest=longest, key=recipe.data.longest_key)}. train.micro_tokens {longest} "
            "leaves this check out."
        )
    logger.info(
        "A micro-batch has at most %d tokens: with them a step takes about %.1f of %.1f GiB (train.micro_tokens).",
        budget, step.worst(budget).total / GIB, capacity / GIB,
    )  # fmt: skip
    return found._replace(tokens=budget)
