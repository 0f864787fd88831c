"""The engine on DeepSpeed ZeRO, any stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.batch import Batch
from mm_moslora.models.vision.timm_open_clip_tower import fp32_parameters
from mm_moslora.training.engine import deepspeed_patches, deepspeed_state
from mm_moslora.training.engine.engine_base import Engine, LossModule, Update
from mm_moslora.training.engine.optimizer_state import HostState, Piece, StoredState
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ConfigError, TrainingError


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
        self.max_grad_norm = optimizer.max_grad_norm
        if self.stage == 3 and self.manifold.factors:
            raise ConfigError(
                "The adapter's factors are to stay orthonormal (factor_form), which takes whole matrices, and "
                "train.zero is a ZeRO-3: it has them whole only while their layer computes. Choose zero0 to zero2."
            )
        adamw = optimizer.adamw(groups, [group.parameters for group in groups])
        precise = [(p, p.detach().clone()) for p in fp32_parameters(module) if not p.requires_grad]
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=adamw, config=config, dist_init_required=False)
        self.shares_products = self.stage < 3
        self.replicated = self.stage == 0
        deepspeed_patches.leave_lowest_scale_to_us(self.engine)
        if self.stage == 3:
            _fetch_whole_layers(module)
            deepspeed_patches.gather_persistent_together(self.engine)
        if self.stage < 3:  # stage 3 has already cut them up
            for parameter, value in precise:
                parameter.data = value.to(parameter.device)
        if self.stage == 0:
            deepspeed_patches.undo_warm_up_step(self.engine)

    def _begin_step(self, with_images: list[float]) -> None:
        deepspeed_state.clear_gradients(self.engine, self.stage)
        if deepspeed_state.offloads(self.engine, self.stage) and any(with_images):
            # Only what the last micro-batch uses is handed to the optimiser, so it must use the vision path, too.
            with_images[-1] = max(1.0, with_images[-1])

    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(batch, needs_vision, right=right)

    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor:
        return self.engine(batch, needs_vision, right=right)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.stage == 0:  # its optimiser of stage 0 divides gradients by the scale that nobody multiplied (0.19)
            loss = loss * self.loss_scale
        # The loss is already divided by the step's token count, so accumulation must not divide again.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr_factor: float, sums: Tensor) -> Update:
        loss, right = sums.tolist()
        own_norm = self._gradient_norm() / self.loss_scale if self.stage == 0 else None
        rescales = bool(deepspeed_state.read_scaler(self.engine))  # fp16: must see the overflow to lower its scale
        if own_norm is not None and not rescales and not (math.isfinite(loss) and math.isfinite(own_norm)):
            # Stages 1 to 3 skip a step whose gradients are not finite by themselves; stage 0 would apply it.
            self.engine.zero_grad()
            self.engine.optimizer.zero_grad()
            return Update(total=loss, right=right, grad_norm=own_norm, applied=False)
        for settings, group in zip(self.engine.optimizer.param_groups, self.groups, strict=True):
            settings["lr"] = group.peak_lr * lr_factor
        self.engine.step()
        norm = own_norm if own_norm is not None else self.engine.get_global_grad_norm()
        return Update(
            total=loss,
            right=right,
            grad_norm=math.nan if norm is None else float(norm),
            applied=bool(self.engine.was_step_applied()),
        )

    @property
    def loss_scale(self) -> float:
        """See `Engine.loss_scale`."""
        return deepspeed_state.scale_of(self.engine)

    @property
    def can_lower_scale(self) -> bool:
        """See `Engine.can_lower_scale`."""
        return deepspeed_state.can_lower_scale(self.engine)

    def _gradient_norm(self) -> float:
        """Stage 0: gradients are whole and already averaged on every rank, and deepspeed does not tell their norm."""
        gradients = [p.grad.float() for _, p in self._named_trainable() if p.grad is not None]
        if not gradients:
            return 0.0
        squares = torch.stack([gradient.pow(2).sum() for gradient in gradients]).tolist()  # one wait for the device
        return math.sqrt(sum(squares)) if all(map(math.isfinite, squares)) else math.nan

    def trainable_state(self) -> dict[str, Tensor]:
        """See `Engine.trainable_state`; gathers the fp32 masters from all ranks."""
        state = {}
        for name, parameter in self._named_trainable():
            value = deepspeed_state.whole_master(self.engine, self.stage, parameter)
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
        return deepspeed_state.zero_pieces(self.engine, self.stage, self._named_trainable())

    def copy_state(self) -> HostState:
        """See `Engine.copy_state`; at stage 0, where all ranks hold the same, each copies every n-th parameter."""
        pieces = self.pieces()
        if self.stage == 0:
            pieces = pieces[distributed.rank() :: distributed.world_size()]
        return HostState.copy_of(pieces, scaler=deepspeed_state.read_scaler(self.engine))

    def refresh(self, stored: StoredState) -> None:
        """See `Engine.refresh`."""
        deepspeed_state.refresh_weights(self.engine, self.stage, self._named_trainable(), stored)
        deepspeed_state.write_scaler(self.engine, stored.scaler)

    def gathered(self) -> AbstractContextManager[Any]:
        """See `Engine.gathered`."""
        if self.stage < 3:
            return nullcontext()
        return deepspeed_patches.whole(self.engine, self.module)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers."""
        self.engine.destroy()


def _fetch_whole_layers(module: nn.Module) -> None:
    """Have ZeRO-3 fetch the weights of a decoder or tower layer for the whole layer at once, and those of adapted ones.

    Left alone, DeepSpeed fetches each for the submodule that owns it: dozens of gathers a layer, and kernels that span
    several submodules would find nothing. Its leaf modules do not serve here: they reduce gradients when that of their
    input is ready, which a first layer behind frozen embeddings never gets, so its adapter would not train.
    """
    from deepspeed.runtime.zero import register_external_parameter

    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer | FusedLinear):
            for parameter in layer.parameters():
                register_external_parameter(layer, parameter)
