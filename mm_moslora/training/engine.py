"""Engines: one optimiser step over a list of micro-batches, on DeepSpeed or on plain torch, behind one interface.

Both take the loss as a sum over supervised tokens divided by the global count of the step, so the same recipe gives the
same numbers on either, and for every split into ranks and micro-batches.
"""

from __future__ import annotations

import json
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora import distributed
from mm_moslora.adapters import MoSLoRALinear, one_product_per_step
from mm_moslora.adapters.inject import named_adapter_layers
from mm_moslora.batch import Batch, Example
from mm_moslora.config import Precision, TrainConfig
from mm_moslora.doctor import extensions_folder, stale_locks
from mm_moslora.errors import ConfigError, TrainingError, suggestion
from mm_moslora.losses import head_loss_sum
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.models.wrapped import fp32_parameters
from mm_moslora.training import zero_state
from mm_moslora.training.optim import ParameterGroup
from mm_moslora.training.state import MOMENTS, HostState, Piece, StoredState, adam_state

logger = logging.getLogger(__name__)

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision: Precision) -> str:
    """Turn `auto` into bf16 where the hardware multiplies it fast, else fp32."""
    if precision != "auto":
        return precision
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "bf16" if "amx_bf16" in text or "avx512_bf16" in text else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """Torch dtype of a resolved precision."""
    return _DTYPES[precision]


class LossModule(nn.Module):
    """What an engine wraps: a micro-batch in, the sum of its token losses out."""

    def __init__(self, model: PreTrainedModel, dummy: Example | None) -> None:
        super().__init__()
        self.model = model
        self.dummy = None if dummy is None else Batch.from_examples([dummy])

    def forward(self, batch: Batch, needs_vision: bool) -> Tensor:
        """Sum of cross entropies over the batch's supervised tokens, fp32 scalar.

        Args:
            batch: on the model's device.
            needs_vision: some rank has images in this micro-batch, so every rank must run the vision path.
        """
        dummy = self.dummy.to(batch.input_ids.device) if self.dummy and needs_vision and not batch.images else None
        return head_loss_sum(self.model, supervised_hidden(self.model, batch, dummy=dummy), batch.targets)


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step did."""

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
    rescaling: bool = False
    """A skipped step that only means that fp16's loss scale was still too large; it has been lowered."""


class Engine(ABC):
    """Runs optimiser steps and keeps the optimiser's state."""

    shares_products = True
    """Micro-batches share the adapters' products; ZeRO-3 has the factors whole within a layer's passes only."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup]) -> None:
        self.module = module
        self.groups = list(groups)
        self.device = distributed.device()
        self.lockstep = False
        """Whether all ranks must run the same forward passes, generation included: ZeRO-3 gathers weights in them."""

    def step(self, micro_batches: Sequence[Batch], lr_factor: float) -> StepResult:
        """One optimiser step.

        Args:
            micro_batches: this rank's; every rank must pass the same number.
            lr_factor: factor on each group's peak learning rate.
        """
        counts = [
            float(sum(batch.supervised_tokens for batch in micro_batches)),
            float(sum(batch.tokens for batch in micro_batches)),
            float(sum(batch.images for batch in micro_batches)),
            *(float(batch.images > 0) for batch in micro_batches),
        ]
        supervised, tokens, images, *with_images = distributed.sum_over_ranks(counts)
        self._begin_step(with_images)
        total = 0.0
        scale = distributed.world_size() / max(1.0, supervised)
        # Towers sit out micro-batches without pictures; what is shared must be part of the last one.
        sharing = one_product_per_step(self.module, leave_out="vision_tower") if self.shares_products else nullcontext()
        with sharing as window:
            for index, batch in enumerate(micro_batches):
                last = index == len(micro_batches) - 1
                if last and window is not None:
                    window.last_micro_batch()
                loss = self._forward(batch.to(self.device), with_images[index] > 0, last=last)
                total += float(loss.detach())
                self._backward(loss * scale, last=last)
        (total,) = distributed.sum_over_ranks([total])
        finite = math.isfinite(total)
        applied, norm = self._update(lr_factor, finite=finite)
        return StepResult(
            loss=total / max(1.0, supervised), grad_norm=norm, applied=applied,
            supervised_tokens=int(supervised), tokens=int(tokens), images=int(images),
            rescaling=finite and not applied and self.loss_scale > 1,
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

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        """Sum of losses and count of supervised tokens over all ranks, without a gradient."""
        flags = distributed.sum_over_ranks([float(batch.images > 0) for batch in micro_batches])
        total = 0.0
        for batch, with_images in zip(micro_batches, flags, strict=True):
            total += float(self._evaluate(batch.to(self.device), with_images > 0))
        loss, count = distributed.sum_over_ranks([total, float(sum(b.supervised_tokens for b in micro_batches))])
        return loss, count

    @abstractmethod
    def _forward(self, batch: Batch, needs_vision: bool, *, last: bool) -> Tensor: ...

    @abstractmethod
    def _evaluate(self, batch: Batch, needs_vision: bool) -> Tensor: ...

    @abstractmethod
    def _backward(self, loss: Tensor, *, last: bool) -> None: ...

    @abstractmethod
    def _update(self, lr_factor: float, *, finite: bool) -> tuple[bool, float]:
        """Clip and step; returns (applied, gradient norm)."""

    @abstractmethod
    def trainable_state(self) -> dict[str, Tensor]:
        """Full fp32 values of every trainable parameter by name, on the CPU, the same on every rank."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """The optimiser state that this rank holds, as views; see `mm_moslora.training.state`."""

    @abstractmethod
    def refresh(self, stored: StoredState) -> None:
        """Take over masters that were just written into `pieces`."""

    def copy_state(self) -> HostState:
        """This rank's share of the optimiser state, copied to main memory."""
        return HostState.copy_of(self.pieces(), scaler={})

    def load_state(self, folders: Sequence[Path]) -> None:
        """Read what any number of ranks on any ZeRO stage wrote.

        Args:
            folders: of every rank that wrote.
        """
        with StoredState(folders) as stored:
            stored.fill(self.pieces())
            self.refresh(stored)

    def gathered(self) -> AbstractContextManager[Any]:
        """A context in which every rank holds all weights whole."""
        return nullcontext()

    def close(self) -> None:  # noqa: B027  (most engines hold nothing)
        """Free what the engine holds outside the module."""

    def _named_trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [pair for group in self.groups for pair in zip(group.names, group.parameters, strict=True)]


class TorchEngine(Engine):
    """One process, no DeepSpeed: AdamW on fp32 masters, gradients accumulated in fp32."""

    def __init__(self, module: LossModule, groups: Sequence[ParameterGroup], optimizer: OptimizerSettings) -> None:
        super().__init__(module, groups)
        if distributed.world_size() > 1:
            raise ConfigError(
                f"train.zero is none on {distributed.world_size()} ranks; plain torch runs one process. "
                "Choose zero0 to zero3, or start a single process."
            )
        self.module.to(self.device)
        self.settings = optimizer
        self.masters = [
            [nn.Parameter(parameter.detach().float().clone()) for parameter in group.parameters] for group in groups
        ]
        self.optimizer = optimizer.adamw(groups, self.masters)

    def _forward(self, batch: Batch, needs_vision: bool, *, last: bool) -> Tensor:
        return self.module(batch, needs_vision)

    def _evaluate(self, batch: Batch, needs_vision: bool) -> Tensor:
        return self.module(batch, needs_vision)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()
        for master, parameter in self._pairs():
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)
                parameter.grad = None

    def _update(self, lr_factor: float, *, finite: bool) -> tuple[bool, float]:
        masters = [master for group in self.masters for master in group]
        for master in masters:
            if master.grad is None:  # as with ZeRO, a projector without pictures still moves by its momentum
                master.grad = torch.zeros_like(master)
        norm = float(nn.utils.clip_grad_norm_(masters, self.settings.max_grad_norm or math.inf))
        applied = finite and math.isfinite(norm)
        if applied:
            for settings, group in zip(self.optimizer.param_groups, self.groups, strict=True):
                settings["lr"] = group.peak_lr * lr_factor
            self.optimizer.step()
            with torch.no_grad():
                for master, parameter in self._pairs():
                    parameter.copy_(master)
        self.optimizer.zero_grad(set_to_none=True)
        return applied, norm

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [
            pair
            for masters, group in zip(self.masters, self.groups, strict=True)
            for pair in zip(masters, group.parameters, strict=True)
        ]

    def trainable_state(self) -> dict[str, Tensor]:
        """See `Engine.trainable_state`."""
        names = [name for name, _ in self._named_trainable()]
        masters = [master for group in self.masters for master in group]
        return {name: master.detach().cpu().clone() for name, master in zip(names, masters, strict=True)}

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        masters = [master for group in self.masters for master in group]
        pieces = []
        for (name, _), master in zip(self._named_trainable(), masters, strict=True):
            state = adam_state(self.optimizer, master)
            moments = {kind: state[kind].view(-1) for kind in MOMENTS}
            pieces.append(
                Piece(name=name, start=0, master=master.detach().view(-1), moments=moments, step=state["step"])
            )
        return pieces

    @torch.no_grad()
    def refresh(self, stored: StoredState) -> None:
        """See `Engine.refresh`."""
        for master, parameter in self._pairs():
            parameter.copy_(master)


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What AdamW and clipping need, from the recipe."""

    betas: tuple[float, float]
    eps: float
    max_grad_norm: float

    def adamw(
        self, groups: Sequence[ParameterGroup], parameters: Sequence[Sequence[nn.Parameter]]
    ) -> torch.optim.AdamW:
        """Torch's AdamW over the groups, weight decay written out (libraries disagree about its default)."""
        return torch.optim.AdamW(
            [
                {"params": list(members), "lr": group.peak_lr, "weight_decay": group.weight_decay}
                for group, members in zip(groups, parameters, strict=True)
            ],
            betas=self.betas,
            eps=self.eps,
        )


class DeepSpeedEngine(Engine):
    """DeepSpeed ZeRO, any stage."""

    def __init__(
        self,
        module: LossModule,
        groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        config: dict[str, Any],
    ) -> None:
        super().__init__(module, groups)
        import deepspeed

        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.lockstep = self.stage == 3
        self.max_grad_norm = optimizer.max_grad_norm
        adamw = optimizer.adamw(groups, [group.parameters for group in groups])
        precise = [(p, p.detach().clone()) for p in fp32_parameters(module) if not p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=config, dist_init_required=False)
        self.shares_products = self.stage < 3
        if self.stage == 3:
            _fetch_whole_layers(module)
        if self.stage < 3:  # stage 3 has already cut them up
            for parameter, value in precise:
                parameter.data = value.to(parameter.device)
        if self.stage == 0:
            self._undo_warm_up_step()

    @torch.no_grad()
    def _undo_warm_up_step(self) -> None:
        """DeepSpeed's half-precision optimiser of stage 0 takes one AdamW step with zero gradients when it is made.

        That step decays the weights and leaves Adam's step count at one; without it, stage 0 gives the numbers of the
        other stages.
        """
        wrapper = self.engine.optimizer
        for masters, weights in zip(
            getattr(wrapper, "fp32_groups", ()), getattr(wrapper, "fp16_groups", ()), strict=True
        ):
            wrapper.optimizer.state.clear()
            for master, weight in zip(masters, weights, strict=True):
                master.copy_(weight)

    def _begin_step(self, with_images: list[float]) -> None:
        zero_state.clear_gradients(self.engine, self.stage)
        if zero_state.offloads(self.engine, self.stage) and any(with_images):
            # Only what the last micro-batch uses is handed to the optimiser, so it must use the vision path, too.
            with_images[-1] = max(1.0, with_images[-1])

    def _forward(self, batch: Batch, needs_vision: bool, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(batch, needs_vision)

    def _evaluate(self, batch: Batch, needs_vision: bool) -> Tensor:
        return self.engine(batch, needs_vision)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        # The loss is already divided by the step's token count, so accumulation must not divide again.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr_factor: float, *, finite: bool) -> tuple[bool, float]:
        own_norm = self._gradient_norm() / self.loss_scale if self.stage == 0 else None
        rescales = bool(zero_state.read_scaler(self.engine))  # fp16: must see the overflow to lower its scale
        if own_norm is not None and not rescales and not (finite and math.isfinite(own_norm)):
            # Stages 1 to 3 skip a step whose gradients are not finite by themselves; stage 0 would apply it.
            self.engine.zero_grad()
            self.engine.optimizer.zero_grad()
            return False, own_norm
        for settings, group in zip(self.engine.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = group.peak_lr * lr_factor
        self.engine.step()
        norm = own_norm if own_norm is not None else self.engine.get_global_grad_norm()
        return bool(self.engine.was_step_applied()), math.nan if norm is None else float(norm)

    @property
    def loss_scale(self) -> float:
        """See `Engine.loss_scale`."""
        return zero_state.scale_of(self.engine)

    def _gradient_norm(self) -> float:
        """Stage 0: gradients are whole and already averaged on every rank, and deepspeed does not tell their norm."""
        squares = [float(p.grad.float().pow(2).sum()) for _, p in self._named_trainable() if p.grad is not None]
        return math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan

    def trainable_state(self) -> dict[str, Tensor]:
        """See `Engine.trainable_state`; gathers the fp32 masters from all ranks."""
        state = {}
        for name, parameter in self._named_trainable():
            value = zero_state.whole_master(self.engine, self.stage, parameter)
            value = parameter.data if value is None else value
            if value.numel() == 0:
                raise TrainingError(
                    f"{name} came out empty while gathering the trained weights. Nothing was saved; "
                    "this is a defect of the ZeRO stage in use, choose another one."
                )
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            state[name] = value.detach().float().cpu().reshape(shape).clone()
        return state

    def pieces(self) -> list[Piece]:
        """See `Engine.pieces`."""
        return zero_state.zero_pieces(self.engine, self.stage, self._named_trainable())

    def copy_state(self) -> HostState:
        """See `Engine.copy_state`; at stage 0, where all ranks hold the same, each copies every n-th parameter."""
        pieces = self.pieces()
        if self.stage == 0:
            pieces = pieces[distributed.rank() :: distributed.world_size()]
        return HostState.copy_of(pieces, scaler=zero_state.read_scaler(self.engine))

    def refresh(self, stored: StoredState) -> None:
        """See `Engine.refresh`."""
        zero_state.refresh_weights(self.engine, self.stage, self._named_trainable(), stored)
        zero_state.write_scaler(self.engine, stored.scaler)

    def gathered(self) -> AbstractContextManager[Any]:
        """See `Engine.gathered`."""
        if self.stage < 3:
            return nullcontext()
        from deepspeed.zero import GatheredParameters

        return GatheredParameters(list(self.module.parameters()))

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self.engine.destroy()


def _fetch_whole_layers(module: nn.Module) -> None:
    """Have ZeRO-3 fetch an adapted layer's weight and factors for the layer itself, whose kernel reads them all.

    Left alone, DeepSpeed fetches each for the submodule that owns it, and the layer falls back to calling these.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for _, layer in named_adapter_layers(module):
        if isinstance(layer, MoSLoRALinear):
            for parameter in layer.parameters():
                register_external_parameter(layer, parameter)


def deepspeed_config(train: TrainConfig, precision: str, max_grad_norm: float) -> dict[str, Any]:
    """A preset or file, filled with what the recipe decides.

    Args:
        train: the recipe's `train`.
        precision: resolved.
        max_grad_norm: from `optim`.

    Raises:
        ConfigError: no such preset, or the file contradicts the recipe.
    """
    config: dict[str, Any] = json.loads(_preset_file(train.zero).read_text(encoding="utf-8"))
    world = distributed.world_size()
    filled = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": max(1, train.global_batch // (train.micro_batch * world)),
        # These two changed their defaults in 0.19.3, so they are always written.
        "gradient_clipping": max_grad_norm,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": precision == "fp16"},
        "steps_per_print": 10**9,
    }
    for key, value in filled.items():
        given = config.get(key, "auto")
        if isinstance(value, dict):
            merged = dict(given) if isinstance(given, dict) else {}
            merged.update({name: item for name, item in value.items() if merged.get(name, "auto") == "auto"})
            if merged["enabled"] != value["enabled"]:
                raise ConfigError(
                    f"{train.zero}: {key}.enabled is {merged['enabled']}, but train.precision is {precision}. "
                    'Write "auto" in the DeepSpeed file or change train.precision.'
                )
            config[key] = merged
        elif given == "auto" or key == "train_micro_batch_size_per_gpu":
            config[key] = value
    config.pop("train_batch_size", None)
    config.setdefault("zero_allow_untested_optimizer", True)
    return config


def _preset_file(name: str) -> Path:
    path = Path(name)
    if path.suffix == ".json":
        if not path.is_file():
            raise ConfigError(f"train.zero is {name!r}, which does not exist.")
        return path
    folders = [Path(__file__).parents[1] / "deepspeed_configs", Path(__file__).parents[2] / "deepspeed_configs"]
    for folder in folders:
        if (folder / f"{name}.json").is_file():
            return folder / f"{name}.json"
    known = sorted({file.stem for folder in folders for file in folder.glob("*.json")} | {"none"})
    raise ConfigError(f"train.zero is {name!r}, expected {', '.join(known)} or a JSON file.{suggestion(name, known)}")


def prepare_deepspeed() -> None:
    """Make DeepSpeed start on a machine without a compiler.

    On CPUs it would otherwise build a shared-memory op that only inference uses, for minutes, and die without ninja.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DS_SKIP_CUDA_CHECK", "1")
    os.environ.setdefault("LOCAL_RANK", str(distributed.local_rank()))  # deepspeed insists on it
    import deepspeed.ops

    _warn_of_stale_locks()
    if os.environ["DS_ACCELERATOR"] == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    import deepspeed.comm as comm

    with ExitStack():
        comm.init_distributed(dist_backend=None, verbose=False)


def _warn_of_stale_locks() -> None:
    """A build that was killed leaves a lock; whoever needs the same operator then waits for it without a word."""
    folder = extensions_folder(os.environ)
    locks = stale_locks(folder) if folder.is_dir() and distributed.local_rank() == 0 else []
    if locks:
        logger.warning(
            "A killed build left %s. If an operator must be built, this run will wait for ever; when nothing is being "
            "built now: rm %s",
            ", ".join(map(str, locks)), " ".join(map(str, locks)),
        )  # fmt: skip


def build_engine(
    module: LossModule,
    groups: Sequence[ParameterGroup],
    train: TrainConfig,
    *,
    precision: str,
    optimizer: OptimizerSettings,
) -> Engine:
    """The engine that `train.zero` asks for.

    Args:
        module: on the CPU.
        groups: from `parameter_groups`.
        train: the recipe's `train`.
        precision: resolved.
        optimizer: AdamW's settings.
    """
    if train.zero == "none":
        if precision == "fp16":
            raise ConfigError(
                "train.precision is fp16, whose loss must be scaled; plain torch (train.zero none) does not do that. "
                "Choose bf16 or fp32, or zero0 to zero3."
            )
        return TorchEngine(module, groups, optimizer)
    try:
        prepare_deepspeed()
    except ImportError as error:
        raise ConfigError(
            f"train.zero is {train.zero!r}, but deepspeed does not import ({error}). Install it "
            "(pip install deepspeed), or run one process with train.zero none."
        ) from error
    return DeepSpeedEngine(module, groups, optimizer, deepspeed_config(train, precision, optimizer.max_grad_norm))
