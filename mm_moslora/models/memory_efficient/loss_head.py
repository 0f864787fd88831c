"""The head and the loss: logits of a model's class, and their cross entropy a block at a time.

Shapes: ``K`` supervised positions, ``C`` vocabulary, ``D`` LLM width.

The loss of an optimiser step is ``sum over supervised tokens / global count of supervised tokens``, both weighted where
records have weights. Training has no logits but those of the head, so the class's own forward pass is asked what it
does around it, with a decoder that returns given values and a head that returns its input: no class is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import repeat
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from mm_moslora.utils.errors import ModelError, reason_of

logger = logging.getLogger(__name__)

CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}
"""Largest block of logits, counted in fp32. On a CPU a few hundred positions: every block reads the head's weights."""
SMALLEST_CHUNK = 128
"""Smallest block in positions; below it the matrix products lose speed."""
CACHED_BYTES = 2 * 2**20
"""Bytes of fp32 logits that a CPU takes through all passes of the softmax at once."""
_SMALL = 2.0**-10
_HUGE = 2.0**40
_VALUES = (0.0, _SMALL, *(sign * 2.0**power for power in range(-2, 10) for sign in (1, -1)), _HUGE)
"""Logits to try, which narrow dtypes hold exactly. The first after zero shows the scale, the last one the cap."""
_NEAR = 1e-2
"""Relative difference that rounding in a narrow dtype explains."""


@dataclass(frozen=True, kw_only=True)
class HeadForm:
    """Logits are ``cap tanh(scale W h / cap)``, or ``scale W h``, of the first `words` rows of W."""

    scale: float = 1.0
    cap: float | None = None
    words: int | None = None
    """Rows of the weight that are words; None: all."""

    @property
    def is_plain(self) -> bool:
        """Whether logits are the head's output."""
        return self == HeadForm()

    def logits(self, output: Tensor) -> Tensor:
        """The model's logits from the output ``[..., C]`` of its head."""
        if self.is_plain:
            return output
        return self.with_slope(output[..., : self.words].float())[0]

    def with_slope(self, product: Tensor) -> tuple[Tensor, Tensor | float | None]:
        """Logits of these products with the head's weight, and their derivatives (None: 1)."""
        if self.cap is None:
            return (product, None) if self.scale == 1.0 else (product * self.scale, self.scale)
        share = torch.tanh(product * (self.scale / self.cap))
        return share * self.cap, (1 - share * share) * self.scale


PLAIN = HeadForm()


class _Output(BaseModelOutput):
    """The output of a decoder; what else a class has in its own is None."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def head_form(model: PreTrainedModel, name: str = "") -> HeadForm:
    """Ask a model's class what it does around its head; a form unknown here is refused: training would lack it."""
    try:
        with torch.no_grad():
            found = _asked(model)
    except Exception as error:  # whatever the forward pass of a class needs
        logger.warning(
            "%s: what it does behind its head could not be asked (%s); it is taken for nothing. "
            "`mm-moslora doctor --model` compares the logits.", type(model).__name__, reason_of(error),
        )  # fmt: skip
        return PLAIN
    if found is None:
        raise ModelError(
            f"{name or type(model).__name__}: {type(model).__name__}.forward changes logits behind its head in another "
            "way than by a scale and a cap, which the loss of training lacks. Choose another model."
        )
    return found


def _asked(model: PreTrainedModel) -> HeadForm | None:
    given = torch.tensor(_VALUES)
    text: Any = model.config.get_text_config()
    head: Any = model.get_output_embeddings()
    rows = int(getattr(head, "out_features", None) or text.vocab_size)
    width = int(text.hidden_size)
    turns = (torch.arange(len(given))[:, None] + torch.arange(width)) % len(given)
    hidden = given[turns][None]  # every place of the width has all values, each in another order

    def decoder(*_: Any, **__: Any) -> BaseModelOutput:
        return _Output(last_hidden_state=hidden)

    def product(values: Tensor, *_: Any, **__: Any) -> Tensor:
        return values[..., torch.arange(rows) % values.shape[-1]]

    with ExitStack() as stack:
        stack.enter_context(forward_instead(model.base_model, decoder))
        stack.enter_context(forward_instead(head, product))
        ids = torch.zeros(1, len(given), dtype=torch.long)
        output: Any = type(model).forward(model, input_ids=ids, attention_mask=torch.ones_like(ids), return_dict=True)
    logits = output.logits[0].double()
    words = logits.shape[-1] if logits.shape[-1] < rows else None
    order = torch.arange(len(given))[:, None] - torch.arange(logits.shape[-1]) % width
    logits = logits.gather(0, order % len(given))  # of `given` in every column
    found, first = logits[:, 0], _VALUES.index(_SMALL)
    scale = float(found[first]) / _SMALL
    ways = [
        HeadForm(scale=1.0 if abs(scale - 1) < 1e-3 else scale, cap=cap, words=words)
        for cap in (None, float(found[-1]))
    ]
    if not (logits == found[:, None]).all():
        return None
    return next((way for way in ways if _gives(way, given, found)), None)


def _gives(way: HeadForm, given: Tensor, found: Tensor) -> bool:
    return way.cap != 0 and torch.allclose(way.with_slope(given.double())[0], found, rtol=_NEAR, atol=1e-5)


@contextmanager
def forward_instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward pass of a module, inside its hooks."""
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own


def token_loss_sum(
    logits: Tensor, targets: Tensor, right: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum of the cross entropies of logits ``[K, C]``, in fp32; 0 with a gradient of 0 for ``K = 0``."""
    if right is not None and targets.numel():
        values = logits.detach()
        right += (values.gather(1, targets[:, None]) == values.amax(-1, keepdim=True)).sum()
    if weights is not None:
        return (cross_entropy(logits.float(), targets, reduction="none") * weights).sum()
    return cross_entropy(logits.float(), targets, reduction="sum")


class LossHead(nn.Linear):
    """A language-model head that can compute the loss; `kernel_selection.use_loss_head` mixes it into a plain head."""

    form: HeadForm = PLAIN

    def forward(
        self,
        input: Tensor,
        targets: Tensor | None = None,
        right: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Logits ``[..., C]``; with targets ``[K]``, the sum of the cross entropies of ``input`` ``[K, D]`` instead.

        The loss is part of the head's call: an engine that gathers weights per module (ZeRO-3) does it once, for any
        number of chunks.
        """
        if targets is None:
            return super().forward(input)
        if torch.is_autocast_enabled(input.device.type):
            return token_loss_sum(self.form.logits(super().forward(input)), targets, right, weights)
        weight = self.weight if self.form.words is None else self.weight[: self.form.words]
        return cast(Tensor, _ChunkedLoss.apply(input, weight, targets, right, weights, self.form))


def head_loss_sum(
    model: PreTrainedModel,
    hidden: Tensor,
    targets: Tensor,
    right: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Sum of the cross entropies of the head's logits, fp32 scalar.

    Args:
        hidden: ``[K, D]``.
        targets: int64 ``[K]``.
        right: int64 scalar to which the number of positions is added at which no token is more probable than the
            target.
        weights: fp32 ``[K]``, factors on the cross entropies; None: 1.
    """
    head: Any = model.get_output_embeddings()
    if isinstance(head, LossHead):
        return cast(Tensor, head(hidden, targets, right=right, weights=weights))
    return token_loss_sum(form_of(head).logits(head(hidden)), targets, right, weights)


def form_of(head: object) -> HeadForm:
    """What the model does around its head, as `kernel_selection.use_loss_head` found it."""
    return getattr(head, "form", PLAIN)


class _ChunkedLoss(torch.autograd.Function):
    """The gradients of a chunk are computed with its loss: nothing of size ``K x C`` is kept or computed twice."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        right: Tensor | None,
        weights: Tensor | None,
        form: HeadForm,
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        count = hidden.shape[0]
        most = max(SMALLEST_CHUNK, budget // ((4 if form.cap is None else 8) * weight.shape[0]))
        rows = max(1, ceil(count / max(1, ceil(count / most))))  # equal blocks, no small one at the end
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, count, rows):
            part = hidden[start : start + rows]
            logits = part @ weight.t()
            wanted = targets[start : start + rows, None]
            factors = None if weights is None else weights[start : start + rows, None]
            total += _loss_(logits, wanted, factors, right=right, pull=needs_hidden or needs_weight, form=form)
            if d_hidden is not None:
                torch.mm(logits, weight, out=d_hidden[start : start + rows])
            if d_weight is not None:
                d_weight.addmm_(logits.t().float(), part.float())
        ctx.dtype = weight.dtype
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        d_hidden, d_weight = ctx.saved_tensors
        # In fp32: a loss scale (fp16) may overflow the narrow dtype where its product with a small gradient does not.
        scaled = None if d_hidden is None else (d_hidden.float() * grad).to(d_hidden.dtype)
        return scaled, None if d_weight is None else (d_weight * grad).to(ctx.dtype), None, None, None, None


def _loss_(
    logits: Tensor, wanted: Tensor, weights: Tensor | None, *, right: Tensor | None, pull: bool, form: HeadForm
) -> Tensor:
    """Sum of the cross entropies, in fp32; on a CPU a few rows at a time.

    `logits` ``[K, C]`` are overwritten, with `pull` by their gradient; `wanted` and `weights` are ``[K, 1]``.
    """
    rows = max(1, CACHED_BYTES // (4 * logits.shape[1])) if logits.device.type == "cpu" else max(1, logits.shape[0])
    total = torch.zeros((), dtype=torch.float32, device=logits.device)
    factors = repeat(None) if weights is None else weights.split(rows)
    for block, own, factor in zip(logits.split(rows), wanted.split(rows), factors, strict=False):
        wide, slope = form.with_slope(block.float())
        picked, top = wide.gather(1, own), wide.amax(-1, keepdim=True)
        if right is not None:  # a tie counts as right; logits in bf16 tie more often than in fp32
            right += (picked == top).sum()
        norm = wide.sub_(top).exp_().sum(-1, keepdim=True)
        losses = top + norm.log() - picked
        total += losses.sum() if factor is None else (losses * factor).sum()
        if not pull:
            continue
        wide.div_(norm).scatter_add_(1, own, torch.full_like(own, -1, dtype=wide.dtype))
        for change in (factor, slope):
            if change is not None:
                wide.mul_(change)
        if wide is not block:
            block.copy_(wide)
    return total
