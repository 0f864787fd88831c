"""Memory of a training step on one GPU, by part, and the largest micro-batch that fits.

Formulas and their checks: docs/performance.md.
"""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass, fields, replace
from itertools import product

from mm_moslora.models.memory_efficient.loss_head import CHUNK_BYTES, SMALLEST_CHUNK
from mm_moslora.training.metrics.activation_memory import ActivationMemory

GIB = 2**30
FREE_SHARE = 0.94
"""Share of a GPU's memory that a plan may fill; the rest allows for fragmentation."""
CONTEXT = 1.2 * GIB
"""CUDA context, libraries and communication buffers."""
BUCKET = 50_000_000
"""Elements of a reduce bucket in the presets."""
LIVE = 1_000_000_000
"""ZeRO-3: elements that stay gathered (stage3_max_live_parameters), at most the whole model."""

MODEL_ERROR = 0.10
"""Measured peaks lie within this share of the estimate; see docs/performance.md."""
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

    size: ActivationMemory
    zero: str
    """`none` (plain torch), zero0 to zero3, or one of these with `_offload`; see `stage_name`."""
    world: int
    """GPUs."""
    checkpointing: bool | int
    """Of the decoder: all layers, none, or so many from the first."""
    offload: bool = False
    """Whether the inputs of checkpointed layers are in main memory; two of them are on the GPU at a time."""
    together: int = 1
    """Ranks that compute a row together (`train.sequence_parallel`), each a part of its tokens and all its pictures."""
    logit_chunk: int = CHUNK_BYTES["cuda"]
    """Bytes of fp32 logits at a time."""

    @property
    def share_again(self) -> float:
        """Share of the decoder layers that the backward pass recomputes."""
        every = self.checkpointing is True
        return 1.0 if every else min(self.checkpointing, self.size.layers) / self.size.layers

    def of(self, tokens: float, *, supervised: float, images: float) -> Memory:
        """Memory with a micro-batch of so many tokens, supervised tokens and images."""
        size, zero = self.size, self.zero
        row = tokens * size.width * size.value_bytes if self.together > 1 else 0.0  # its embeddings are whole
        tokens, supervised = tokens / self.together, supervised / self.together
        trained, b = size.trainable, size.value_bytes
        split = dict.fromkeys(("none", "zero0"), (1, 1, 1))
        split |= {"zero1": (1, 1, self.world), "zero2": (1, self.world, self.world)}
        by_weights, by_gradients, by_states = split.get(zero.removesuffix("_offload"), (self.world,) * 3)
        masters = 0 if b == 4 and zero != "none" else 4
        again = round(self.share_again * size.layers)
        inputs = min(2, again) if self.offload else again
        # The first layers are recomputed, one at a time, when those behind them are freed.
        whole_layers = max(size.layers - again, min(1, again))
        kept = inputs * size.width * b + whole_layers * size.kept_per_layer + size.kept_elsewhere
        rows = min(supervised, max(SMALLEST_CHUNK, self.logit_chunk // (4 * size.vocabulary)))
        gathered = min(LIVE, size.frozen + trained) * 2 * b if by_weights > 1 else 0
        adapters = sum(mine for part, (_, mine) in size.parts.items() if part.endswith(("adapter", "mixer")))
        whole = adapters * b if by_weights > 1 else 0
        return Memory(
            weights=size.weight_bytes / by_weights,
            adapters=trained * b / by_weights + whole,
            gradients=trained * (4 if zero == "none" else b) / by_gradients,
            optimiser=0 if zero.endswith("_offload") else trained * (8 + masters) / by_states,
            activations=tokens * kept + images * size.kept_per_image + size.products,
            workspace=2 * row + tokens * size.workspace_per_token + images * size.workspace_per_image + size.made_dense,
            logits=rows * size.vocabulary * (4 + b) + supervised * size.width * b,
            buffers=(0 if zero == "none" else 2 * min(BUCKET, trained) * b) + gathered,
        )

    def worst(self, tokens: int) -> Memory:
        """Memory with the micro-batch of so many tokens that needs most: full of pictures, every token supervised."""
        return self.of(tokens, supervised=tokens, images=tokens / max(1, self.size.tokens_per_image))

    def most_tokens(self, room: float) -> int:
        """Tokens of the largest micro-batch that takes at most `room` bytes, all else included; 0: there is none."""
        return bisect.bisect_right(range(1, 2**31), room, key=lambda tokens: self.worst(tokens).total)

    def token_budget(self, capacity: float, *, longest: int) -> int:
        """The default of `train.micro_tokens` on a GPU: the tokens that surely fit.

        Args:
            capacity: bytes of the GPU.
            longest: tokens of the longest example or packed row.

        Returns:
            At least `longest`, which may take the room that is left for errors of the estimate. 0: it does not fit.
        """
        room = FREE_SHARE * capacity
        budget = self.most_tokens(room / (1 + MODEL_ERROR))
        return budget if budget >= longest else longest if self.most_tokens(room) >= longest else 0

    def remedies(self, capacity: float, *, longest: int, key: str) -> str:
        """What would make the longest example or row fit, as the end of a sentence.

        Args:
            capacity: bytes of the GPU.
            longest: its tokens.
            key: the recipe's key for them.
        """
        most = self.most_tokens(FREE_SHARE * capacity)
        found = [f"lower {key} to {most}"] if most >= SHORTEST else []
        stages, last = ((self.zero, "zero3"), "zero3_offload") if self.world > 1 else ((self.zero,), "zero2_offload")
        mild = ((self.checkpointing, self.offload), (True, self.offload))
        tries = (product(stages, mild), product(stages, ((True, True),)), product((last,), (*mild, (True, True))))
        for zero, (checkpointing, offload) in itertools.chain(*tries):
            other = replace(self, zero=zero, checkpointing=checkpointing, offload=offload)
            if other.token_budget(capacity, longest=longest):
                changes = [f"train.zero to {zero}"] if zero != self.zero else []
                changes += ["train.gradient_checkpointing to true"] if checkpointing is not self.checkpointing else []
                changes += ["train.activation_offload to true"] if offload != self.offload else []
                found.append("set " + " and ".join(changes))
                break
        return ", or ".join([*found, "take larger or more GPUs"])
