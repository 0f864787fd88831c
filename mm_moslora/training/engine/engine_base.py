"""The interface of the engines, and the optimiser step that they share."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.adapters import one_product_per_step
from mm_moslora.batch import Batch, Example
from mm_moslora.models.families import TOWER_NAMES
from mm_moslora.models.memory_efficient.decoder_layers import head_loss_sum
from mm_moslora.models.memory_efficient.row_share import WHOLE_ROW, RowShare
from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.training.engine.stiefel_manifold import StiefelFactors
from mm_moslora.training.parameter_groups import ParameterGroup
from mm_moslora.utils import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")
MODEL = "model."
"""What the engine's module puts before the model's names; pieces keep it, and so do checkpoints of the optimiser."""


class LossModule(nn.Module):
    """The module that an engine wraps: it maps a micro-batch to the sum of its token losses."""

    def __init__(
        self,
        model: PreTrainedModel,
        dummy: Example | None,
        *,
        memory: StepFeatureCache | None = None,
        share: RowShare = WHOLE_ROW,
    ) -> None:
        super().__init__()
        self.model, self.share = model, share
        self.dummy = None if dummy is None else Batch.from_examples([dummy])
        # A text then has no path to what trains, and its loss no gradient.
        self.language_is_frozen = not any(p.requires_grad for p in model.get_decoder().parameters())
        self.pictures = StepFeatureCache() if memory is None else memory
        """Features that a frozen tower has already computed."""

    def forward(self, batch: Batch, needs_vision: bool, right: Tensor | None = None) -> Tensor:
        """Sum of cross entropies over the supervised tokens of the batch, or of this rank's part, fp32 scalar.

        Args:
            batch: on the model's device.
            needs_vision: some rank has images in this micro-batch, so every rank must run the vision path. It also runs
                where the language model is frozen.
            right: see `head_loss_sum`.
        """
        vision = (needs_vision or self.language_is_frozen) and not batch.images
        dummy = self.dummy.to(batch.input_ids.device) if self.dummy and vision else None
        hidden = supervised_hidden(self.model, batch, dummy=dummy, cache=self.pictures, share=self.share)
        targets = batch.targets if self.share.of == 1 else batch.targets[self.share.targets(batch)]
        return head_loss_sum(self.model, hidden, targets, right)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The result of one optimiser step."""

    loss: float
    """Mean cross entropy per supervised token, over all ranks."""
    grad_norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False when the step was skipped because a loss or gradient was not finite."""
    supervised_tokens: int
    """Over all ranks."""
    tokens: int
    """Over all ranks, visual tokens included."""
    images: int
    """Over all ranks."""
    samples: int = 0
    """Over all ranks."""
    right_tokens: int = 0
    """Supervised tokens that had the highest probability, over all ranks."""
    wait_seconds: float = field(default=0.0, compare=False)
    """Seconds that this rank waited for the others at the start of the step."""
    own_loss_is_finite: bool = True
    """Whether this rank's part of the loss is finite; checked only for skipped steps."""
    rescaling: bool = False
    """Whether the step was skipped because the loss scale of fp16 was too large; it has been lowered."""


@dataclass(frozen=True, kw_only=True)
class TokenSums:
    """Sums over some batches of all ranks."""

    loss: float
    """Sum of the cross entropies."""
    right: float
    """Supervised tokens that had the highest probability."""
    tokens: float
    """Supervised tokens."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """The result of the optimiser's part of a step."""

    total: float
    """Sum of all token losses."""
    right: float
    """See `StepResult.right_tokens`."""
    grad_norm: float
    """See `StepResult.grad_norm`."""
    applied: bool
    """See `StepResult.applied`."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive elements of one parameter; this rank holds their optimiser state.

    All tensors are flat views of equal length into what the optimiser uses; writing to them changes it.
    """

    name: str
    """Parameter name in the engine's module."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 values."""
    moments: dict[str, Tensor]
    """Adam's `exp_avg` and `exp_avg_sq`."""
    step: Tensor
    """Adam's step count; pieces of one flat group share it."""
    parameter: Tensor
    """What the optimiser steps, which `master` is a part of."""
    gradient: Tensor | None = None
    """What the optimiser will read; None between steps."""

    @classmethod
    def of(
        cls,
        name: str,
        optimizer: torch.optim.Optimizer,
        master: Tensor,
        *,
        start: int = 0,
        offset: int = 0,
        length: int | None = None,
    ) -> Piece:
        """The state that an Adam keeps of a parameter, made as Adam makes it where there is none yet.

        Args:
            name: of the parameter.
            optimizer: torch's AdamW.
            master: what it steps: the parameter's master, or a flat tensor of several.
            start: first element in the parameter.
            offset: first element in `master`.
            length: elements; None: all.
        """
        state = optimizer.state[master]
        if "step" not in state:
            fused = optimizer.defaults.get("fused")
            state["step"] = torch.zeros((), device=master.device if fused else None)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(master, memory_format=torch.preserve_format)
        length = master.numel() if length is None else length

        def part(tensor: Tensor) -> Tensor:
            return tensor.detach().view(-1).narrow(0, offset, length)

        moments = {kind: part(state[kind]) for kind in MOMENTS}
        gradient = None if master.grad is None else part(master.grad)
        return cls(
            name=name, start=start, master=part(master), moments=moments, step=state["step"], parameter=master,
            gradient=gradient,
        )  # fmt: skip


class Engine(ABC):
    """Runs optimiser steps and keeps the optimiser's state."""

    shares_products = True
    """Whether micro-batches share the adapters' products; ZeRO-3 gathers the factors within a layer's passes only."""

    replicated = False
    """Whether every rank holds all pieces."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup]) -> None:
        self.module = module
        self.groups = list(groups)
        self.device = distributed.device()
        self.manifold = StiefelFactors(module, self._named_trainable(), self.device)
        self._points: dict[str, Tensor] = {}
        self.copies = getattr(module, "share", WHOLE_ROW).of
        """Ranks that get the same micro-batches, and compute their parts."""

    def step(self, micro_batches: Sequence[Batch], lr_factor: float) -> StepResult:
        """One optimiser step.

        Args:
            micro_batches: this rank's; every rank must pass the same number.
            lr_factor: factor on each group's peak learning rate.
        """
        filled = [batch for batch in micro_batches if batch.supervised_tokens]  # others keep ranks in step
        counts = [
            float(sum(batch.supervised_tokens for batch in filled)),
            float(sum(batch.tokens for batch in filled)),
            float(sum(batch.images for batch in filled)),
            float(sum(len(batch.ids) for batch in filled)),
            *(float(batch.images > 0) for batch in micro_batches),
        ]
        started = time.monotonic()
        sums_of_ranks = distributed.sum_over_ranks(counts)
        supervised, tokens, images, samples = (total / self.copies for total in sums_of_ranks[:4])
        with_images = sums_of_ranks[4:]
        wait_seconds = time.monotonic() - started
        self._begin_step(with_images)
        self.module.pictures.begin_step(micro_batches)
        # The sums stay on the device and are read after the last backward pass, so that the host waits once.
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        scale = distributed.world_size() / max(1.0, supervised)
        # Towers are skipped in micro-batches without pictures, and a shared product must be part of the last one.
        sharing = one_product_per_step(self.module, leave_out=TOWER_NAMES) if self.shares_products else nullcontext()
        with sharing as window:
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                if last and window is not None:
                    window.last_micro_batch()
                loss = self._forward(batch.to(self.device), with_images[index] > 0, right, last=last)
                total += loss.detach()
                self._backward(loss * scale, last=last)
        sums = torch.stack((total, right.double()))
        distributed.add_up(sums)
        lowers_scale = self.can_lower_scale
        self._points = self._on_manifold()
        update = self._update(lr_factor, sums)
        applied, norm = update.applied, update.grad_norm
        if self._points and applied:
            self.manifold.pull_back(self._points, self._on_manifold(), self._masters())
        return StepResult(
            loss=update.total / max(1.0, supervised), grad_norm=norm, applied=applied,
            supervised_tokens=int(supervised), tokens=int(tokens), images=int(images), samples=int(samples),
            right_tokens=int(update.right), wait_seconds=wait_seconds,
            own_loss_is_finite=applied or math.isfinite(float(total)),
            rescaling=math.isfinite(update.total) and not applied and lowers_scale,
        )  # fmt: skip

    def _begin_step(self, with_images: list[float]) -> None:  # noqa: B027  (most engines need nothing)
        """Prepare for a step.

        Args:
            with_images: ranks with pictures, per micro-batch; may be changed to have the vision path run there.
        """

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before the backward pass (fp16), else 1."""
        return 1.0

    @property
    def can_lower_scale(self) -> bool:
        """Whether a gradient that is not finite would have the loss scale lowered (fp16)."""
        return False

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> TokenSums:
        """Measure batches without a gradient."""
        flags = distributed.sum_over_ranks([float(batch.images > 0) for batch in micro_batches])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for batch, with_images in zip(micro_batches, flags, strict=True):
            total += self._evaluate(batch.to(self.device), with_images > 0, right)
        (count,) = distributed.sum_over_ranks([float(sum(batch.supervised_tokens for batch in micro_batches))])
        count /= self.copies
        sums = torch.stack((total, right.double()))
        distributed.add_up(sums)
        loss, over_all = sums.tolist()
        return TokenSums(loss=loss, right=over_all, tokens=count)

    @abstractmethod
    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor: ...

    @abstractmethod
    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor: ...

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def _update(self, lr_factor: float, sums: Tensor) -> Update:
        """Clip, and step if everything is finite.

        Args:
            lr_factor: factor on each group's peak learning rate.
            sums: fp64 ``[2]`` on the device, over all ranks: of all token losses, and of the right tokens.
        """

    def trainable_state(self, *, only: str = "", keep: bool = True) -> dict[str, Tensor]:
        """Full fp32 values of trainable parameters by their names in the model, on the CPU. All ranks take part.

        Args:
            only: part of the names of the wanted parameters; all have the empty one.
            keep: whether this rank keeps the values; if not, it gets tensors of their shapes on the meta device.
        """
        state = self._trainable_state(only=only, keep=keep)
        return {name.removeprefix(MODEL): value for name, value in state.items()}

    @abstractmethod
    def _trainable_state(self, *, only: str, keep: bool) -> dict[str, Tensor]:
        """The same by their names in the engine's module."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The optimiser state that this rank holds, as views."""

    @abstractmethod
    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """Take over masters that were just written into `pieces`.

        Args:
            stored: gives the whole master of a parameter, flat fp32, by its name.
            scaler: from `scaler_state`.
        """

    def scaler_state(self) -> dict[str, float]:
        """State of the dynamic loss scale (fp16); empty without one."""
        return {}

    @torch.no_grad()
    def component_norms(self) -> dict[str, float]:
        """`weight_norm/COMPONENT` and `momentum_norm/COMPONENT` over all ranks; every rank calls it.

        The momentum is Adam's mean of the last gradients, after clipping: the one trace of a component's gradients that
        every ZeRO stage keeps.
        """
        component = {name: group.name.partition("/")[0] for group in self.groups for name in group.names}
        kinds = {"weight_norm": lambda piece: piece.master, "momentum_norm": lambda piece: piece.moments["exp_avg"]}
        parts: dict[str, list[Tensor]] = {f"{kind}/{name}": [] for kind in kinds for name in component.values()}
        for piece in self.pieces():
            for kind, values in kinds.items():
                parts[f"{kind}/{component[piece.name]}"].append(values(piece).float())
        norms = [nn.utils.get_total_norm(tensors).to(self.device) for tensors in parts.values()]
        squares = torch.stack(norms).double().square_()
        distributed.add_up(squares)
        copies = distributed.world_size() if self.replicated else 1
        return {name: math.sqrt(total / copies) for name, total in zip(parts, squares.tolist(), strict=True)}

    def gathered(self) -> AbstractContextManager[Any]:
        """A context in which every rank holds all weights whole, and its model runs without the other ranks."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027  (most engines hold nothing)
        """Free what the engine holds outside the module."""

    def _masters(self) -> list[tuple[str, int, Tensor]]:
        return [(piece.name, piece.start, piece.master) for piece in self.pieces()]

    def _on_manifold(self) -> dict[str, Tensor]:
        kept = self.manifold.factors  # without factors, the pieces are not collected
        return self.manifold.whole(self._masters(), replicated=self.replicated) if kept else {}

    def _convert_before(self, optimizer: torch.optim.Optimizer) -> None:
        """Have the optimiser read gradients of the manifold; it may step by group, on every rank in one order."""
        if self.manifold.factors:
            optimizer.register_step_pre_hook(lambda stepping, *_: self._convert(stepping))

    def _convert(self, optimizer: torch.optim.Optimizer) -> None:
        # With offloading all groups have gradients while one steps, and each is converted once.
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gradients = [
            (piece.name, piece.start, piece.gradient)
            for piece in self.pieces()
            if piece.gradient is not None and id(piece.parameter) in stepped
        ]
        self.manifold.convert(self._points, gradients, replicated=self.replicated)

    def _named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]
