"""The engine on DeepSpeed ZeRO, any stage."""

# Masters and moments lie in attributes of DeepSpeed's optimisers that are not documented. The methods behind `shards`
# read them; `deepspeed_patches` holds what the project replaces and corrects.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.batch import Batch
from mm_moslora.models.vision.timm_open_clip_tower import fp32_parameters
from mm_moslora.models.vlm import LossModule
from mm_moslora.training.deepspeed_presets import wants_cpu_adam
from mm_moslora.training.engine import deepspeed_patches
from mm_moslora.training.engine.engine_base import TrainingEngine
from mm_moslora.training.engine.optimizers import KINDS, ParameterShard, set_rates
from mm_moslora.training.engine.step_result import Arriving, Update
from mm_moslora.training.parameter_groups import OptimizerSettings, ParameterGroup

_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of DeepSpeed's loss scalers that are their state."""


def _initialise(module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer) -> Any:
    import deepspeed

    return deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]


class DeepSpeedEngine(TrainingEngine):
    """DeepSpeed ZeRO, any stage; `initialise` makes the live engine where a trainer of another library does."""

    def __init__(
        self,
        module: LossModule,
        groups: Sequence[ParameterGroup],
        optimizer: OptimizerSettings,
        config: dict[str, Any],
        *,
        initialise: Callable[[torch.optim.Optimizer], Any] | None = None,
    ) -> None:
        super().__init__(module, groups, KINDS[optimizer.name])

        self.stage = int(config.get("zero_optimization", {}).get("stage", 0))
        self.max_grad_norm = optimizer.max_grad_norm
        if self.stage == 3:
            deepspeed_patches.shard_from_main(module, config, device=self.device)
        on_gpu = self.device.type == "cuda" and not config.get("zero_optimization", {}).get("offload_optimizer")
        stepping = self.kind.make(optimizer, groups, [group.parameters for group in groups], fused=on_gpu)
        if wants_cpu_adam(config) and optimizer.name == "adamw":
            stepping = deepspeed_patches.cpu_adam(stepping)
        precise = []
        if self.stage < 3:  # stage 3 cuts them up in the dtype of the others
            precise = [(p, p.detach().clone()) for p in fp32_parameters(module) if not p.requires_grad]
        with deepspeed_patches.without_steps(stepping) if self.stage == 0 else nullcontext():
            self.engine = (initialise or partial(_initialise, module, config))(stepping)
        assert self.engine.device == self.device, f"DeepSpeed computes on {self.engine.device}, not on {self.device}"
        self.replicated = self.stage == 0
        deepspeed_patches.skip_at_lowest_scale(self._scaler)
        deepspeed_patches.read_norm_once(self.engine, self.stage)
        if self.stage == 3:
            deepspeed_patches.fetch_whole_layers(module)
            deepspeed_patches.gather_persistent_together(self.engine)
        for parameter, value in precise:
            parameter.data = value.to(parameter.device)

    def _begin_step(self, with_images: list[float]) -> None:
        deepspeed_patches.clear_gradients(self.engine, self.stage)
        if deepspeed_patches.offloads(self.engine, self.stage) and any(with_images):
            # The optimiser gets gradients only of parameters that the last micro-batch uses: run the vision path there.
            with_images[-1] = max(1.0, with_images[-1])

    def _forward(self, batch: Batch, needs_vision: bool, right: Tensor, *, last: bool) -> Tensor:
        self.engine.set_gradient_accumulation_boundary(last)
        return self.engine(batch, needs_vision, right=right)

    def _evaluate(self, batch: Batch, needs_vision: bool, right: Tensor) -> Tensor:
        return self.engine(batch, needs_vision, right=right)

    def _backward(self, loss: Tensor, *, last: bool) -> None:
        if self.stage == 0:  # its optimiser divides gradients by a loss scale that was never applied (0.19)
            loss = loss * self.loss_scale
        # The loss is already divided by the step's token count, so accumulation must not divide again.
        self.engine.backward(loss, scale_wrt_gas=False)

    def _update(self, lr_factor: float, sums: Tensor) -> Callable[[], Update]:
        own_norm = None
        if self.stage == 0:  # gradients are whole and averaged on every rank, and DeepSpeed computes no norm of them
            gradients = [p.grad.float() for _, p in self._named_trainable() if p.grad is not None]
            norm_of_all = nn.utils.get_total_norm(gradients).double().to(self.device)
            loss, right, own_norm = torch.cat((sums, norm_of_all[None])).tolist()
            own_norm /= self.loss_scale
        else:
            # Read after the step, in which DeepSpeed waits for the device anyway.
            arriving = Arriving(sums)
        rescales = bool(self.scaler_state())  # fp16: must see the overflow to lower its scale
        if own_norm is not None and not rescales and not (math.isfinite(loss) and math.isfinite(own_norm)):
            # Stages 1 to 3 skip a step with gradients that are not finite; stage 0 would apply it.
            self.engine.zero_grad()
            self.engine.optimizer.zero_grad()
            skipped = Update(total=loss, right=right, grad_norm=own_norm, applied=False)
            return lambda: skipped
        set_rates(self.engine.optimizer, self.groups, lr_factor)
        self.engine.step()
        norm = own_norm
        if norm is None:
            norm = self.engine.get_global_grad_norm()
            norm = None if norm is None else float(norm)
            loss, right = arriving.tolist()
        norm = math.nan if norm is None else norm
        update = Update(total=loss, right=right, grad_norm=norm, applied=bool(self.engine.was_step_applied()))
        return lambda: update

    @property
    def _scaler(self) -> Any:
        """DeepSpeed's loss scaler; None without scaling."""
        optimizer = self.engine.optimizer
        return getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)

    @property
    def loss_scale(self) -> float:
        """See `TrainingEngine.loss_scale`."""
        return float(getattr(self._scaler, "cur_scale", 1.0) or 1.0)

    @property
    def can_lower_scale(self) -> bool:
        """See `TrainingEngine.can_lower_scale`: the scale is dynamic and not yet at its minimum."""
        least = getattr(self._scaler, "min_scale", getattr(self._scaler, "min_loss_scale", None))
        return bool(self.scaler_state()) and self.loss_scale > float(least or 1.0)

    def scaler_state(self) -> dict[str, float]:
        """See `TrainingEngine.scaler_state`."""
        scaler = self._scaler
        dynamic = getattr(scaler, "dynamic", getattr(scaler, "dynamic_loss_scale", False))
        return {key: getattr(scaler, key) for key in _SCALER if hasattr(scaler, key)} if dynamic else {}

    def _trainable_state(self, *, only: str, keep: bool) -> dict[str, Tensor]:
        """See `TrainingEngine.trainable_state`; gathers the fp32 masters from all ranks, one parameter at a time."""
        from deepspeed.utils import safe_get_full_fp32_param

        state, masters = {}, self._masters_of_stage_0()
        chosen = [(name, parameter) for name, parameter in self._named_trainable() if only in name]
        for name, parameter in chosen:
            value = masters.get(id(parameter))
            value = safe_get_full_fp32_param(parameter) if value is None else value
            value = parameter.data if value is None else value  # its own master
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            state[name] = value.detach().to("cpu" if keep else "meta", torch.float32, copy=True).reshape(shape)
        return state

    def _masters_of_stage_0(self) -> dict[int, Tensor]:
        """Masters by the ids of their half-precision parameters; empty in fp32 and at the other stages."""
        optimizer = self.engine.optimizer
        if self.stage > 0 or not hasattr(optimizer, "fp32_groups"):
            return {}
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(low): high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}

    def shards(self) -> list[ParameterShard]:
        """See `TrainingEngine.shards`; at stage 0 every rank holds all parameters whole."""
        of_stage = [self._whole_parameters, self._parts_of_groups, self._parts_of_groups, self._parts_of_parameters]
        return list(of_stage[self.stage](self.engine.optimizer))

    def _whole_parameters(self, optimizer: Any) -> Iterator[ParameterShard]:
        masters = self._masters_of_stage_0()
        inner = optimizer.optimizer if masters else optimizer
        for name, parameter in self._named_trainable():
            yield ParameterShard.of(name, inner, masters.get(id(parameter), parameter), kind=self.kind)

    def _parts_of_groups(self, optimizer: Any) -> Iterator[ParameterShard]:
        group_of = {id(parameter): index for index, group in enumerate(optimizer.bit16_groups) for parameter in group}
        for name, parameter in self._named_trainable():
            mapping = parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:  # another rank's
                continue
            flat = optimizer.single_partition_of_fp32_groups[group_of[id(parameter)]]
            start, in_flat = mapping.lp_fragment_address.start, mapping.hp_fragment_address
            yield ParameterShard.of(
                name, optimizer.optimizer, flat, start=start, offset=in_flat.start, length=in_flat.numel
            )

    def _parts_of_parameters(self, optimizer: Any) -> Iterator[ParameterShard]:
        for name, parameter in self._named_trainable():
            group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = length * optimizer._get_param_partition_rank(parameter)
            length = min(length, parameter.ds_numel - start)  # type: ignore[attr-defined]  # the rest is padding
            if length > 0:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield ParameterShard.of(name, optimizer.optimizer, flat, start=start, offset=offset, length=length)

    @torch.no_grad()
    def refresh(self, stored: Callable[[str], Tensor], scaler: Mapping[str, float]) -> None:
        """See `TrainingEngine.refresh`."""
        if self.stage == 3:
            deepspeed_patches.reload_masters(self.engine)
        else:
            for name, parameter in self._named_trainable():
                parameter.copy_(stored(name).view_as(parameter))
        for key, value in scaler.items():
            if hasattr(self._scaler, key):
                setattr(self._scaler, key, value)

    def gathered(self) -> AbstractContextManager[Any]:
        """See `TrainingEngine.gathered`."""
        if self.stage < 3:
            return nullcontext()
        return deepspeed_patches.whole(self.engine, self.module)

    def close(self) -> None:
        """Drop DeepSpeed's hooks and buffers, and the `linear` that ZeRO-3 puts in the place of PyTorch's."""
        self.engine.destroy()
        deepspeed_patches.restore_linear()
