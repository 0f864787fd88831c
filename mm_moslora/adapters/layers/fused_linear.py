"""Linear layers that the fused kernel computes: alone, with their siblings, and over the micro-batches of a step.

Shapes: x ``[..., D_in]``, A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``.

Siblings read the same input (query, key and value; gate and up) and are computed in one node. The first one called
computes all of them; the others return their result. A layer that is called with another tensor computes itself, and
its family computes layer by layer from the next pass on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast, get_args

import torch
from peft.tuners import lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.base_weights import weight_of
from mm_moslora.adapters.layers.factor_modules import FrozenFactor, Mixer
from mm_moslora.adapters.layers.lora_variants import DoraMixerVariant, MoSLoRAVariant
from mm_moslora.adapters.layers.sharded_weights import fetches_whole, only_fetches
from mm_moslora.kernels.lora.lora_linear import LinearOperands, compute_dtype, fused_linears
from mm_moslora.kernels.lora.lora_math import is_traced
from mm_moslora.kernels.lora.mixed_product import StepWindow, mixed_product
from mm_moslora.kernels.lora.seeded_dropout import exact_rate
from mm_moslora.utils.errors import AdapterError, suggestion

Kernel = Literal["auto", "reference", "fused"]

# Other types are wrappers (FSDP's, for example) or replacements by the user.
_FACTOR_TYPES = (nn.Linear, Mixer, FrozenFactor)

_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("to_q", "to_k", "to_v"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that read one input, in the order of their calls."""

_SECOND_INPUTS = {"key_value_states", "encoder_hidden_states", "context", "latents", "key", "memory"}
"""Arguments of a module that may read its keys and values from elsewhere."""


class FusedLinear(MoSLoRALayer):
    """A linear layer that the fused kernel computes where PEFT's layer computes nothing more."""

    shares_factors = True
    siblings: SiblingProjections | None = None
    """The layers that read the same input, if there are any; see `link_siblings`."""
    step_window: StepWindow | None = None
    """Within `one_product_per_step`."""
    kernel: Kernel = "auto"
    """See `use_kernel`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Base output plus the active adapters, ``[..., D_out]``."""
        if args or kwargs or is_traced():
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        if self.siblings is not None:
            ready = self.siblings.output(self, x)
            if ready is not None:
                return ready
        layer = self.fused_operands(x)
        return super().forward(x) if layer is None else fused_linears(x, [layer])[0]  # type: ignore[no-any-return]

    def fused_operands(self, x: Tensor, *, plain_too: bool = False) -> LinearOperands | None:
        """This layer's operands for the fused kernel; None where the modules would compute something else.

        Args:
            x: the input, ``[..., D_in]``.
            plain_too: also for an adapter without any mixer in the model, which the kernel `auto` leaves to PEFT.
        """
        adapter = self._fusable_adapter(plain_too=plain_too)
        if adapter is None:
            return None
        base = cast(nn.Linear, self.base_layer)
        weight = weight_of(base, x)
        if weight is None:
            return None
        if (not isinstance(weight, Tensor) or hasattr(weight, "ds_id")) and not fetches_whole(self):
            return None
        parts = [part[adapter] for part in (self.lora_A, self.lora_B, self.lora_mixer) if adapter in part]
        if not all(map(self._only_holds, parts)):
            return None
        A, B = (cast(Tensor, part[adapter].weight) for part in (self.lora_A, self.lora_B))
        M = cast(Mixer, self.lora_mixer[adapter]) if adapter in self.lora_mixer else None
        if M is not None and not M.form.fixed:
            return None
        dropout = self.lora_dropout[adapter]
        rate = exact_rate(dropout.p) if self.training and isinstance(dropout, nn.Dropout) else 0.0
        # Without gradients of A a micro-batch might have none at all, which DeepSpeed does not expect.
        window = self.step_window if A.requires_grad else None
        product = mixed_product if window is None else window.product
        C = product(B, M, self.scaling[adapter] / (1.0 - rate), compute_dtype(x))
        return LinearOperands(weight=weight, bias=base.bias, A=A, C=C, dropout=rate)

    @staticmethod
    def _only_holds(part: nn.Module) -> bool:
        """Whether a factor's weight can be read without calling its module (FSDP and offloading gather in a call)."""
        return type(part) in _FACTOR_TYPES and "forward" not in part.__dict__ and only_fetches(part)

    def _fusable_adapter(self, *, plain_too: bool) -> str | None:
        """The one active adapter, if the fused kernel computes exactly what the modules compute."""
        if self.kernel == "reference" or self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if len(active) != 1:
            return None
        name = active[0]
        mixed = name in self.lora_mixer
        left_to_peft = self.kernel == "auto" and not plain_too and name not in self.mixer_init
        if not mixed and (left_to_peft or name in self.lora_variant):
            return None
        if mixed and type(self.lora_variant[name]) is not MoSLoRAVariant:
            return None
        if self.lora_bias[name] or not isinstance(self.scaling[name], int | float):
            return None
        return name


class MoSLoRALinear(FusedLinear, lora.Linear):
    """`nn.Linear` (or transformers' `Conv1D`) with LoRA and a mixer."""

    dora_variant = DoraMixerVariant


class MoSLoRATorchaoLinear(FusedLinear, TorchaoLoraLinear):
    """A linear layer with torchao's int8 weight, LoRA and a mixer.

    Merging needs the base model to be loaded by transformers with a `TorchAoConfig`, as in PEFT.
    """


class SiblingProjections:
    """Layers that read one input."""

    def __init__(self, layers: Sequence[FusedLinear]) -> None:
        """Nothing is computed before the first layer is called.

        Args:
            layers: in the order of their calls: a model that calls another one first computes layer by layer.
        """
        self.layers = tuple(layers)
        self._together = self._together_before = True
        self._input: Tensor | None = None
        self._input_version = -1
        self._ready: dict[int, Tensor] = {}

    def output(self, layer: FusedLinear, x: Tensor) -> Tensor | None:
        """A layer's output for x, or None where it must compute itself.

        Args:
            layer: of this family (a replica of one computes itself).
            x: ``[..., D_in]``.
        """
        if layer is self.layers[0]:
            return self._compute(x) if torch.is_grad_enabled() and self._may_compute() else None
        # The same tensor has other values after a change in place, which its version shows.
        if self._input is not x or self._input_version != x._version:
            # After a pass by single layers no result is left, and the family stays together.
            self._together = self._together and not self._ready
            return None
        ready = self._ready.pop(id(layer), None)
        if not self._ready:
            self._input = None
        return ready

    def _may_compute(self) -> bool:
        """Checkpointing needs the same nodes in the forward pass and in its recomputation during the backward pass."""
        self._input, self._ready = None, {}
        if torch._C._current_graph_task_id() == -1:
            self._together_before = self._together
        return self._together_before

    def _compute(self, x: Tensor) -> Tensor | None:
        chosen: list[tuple[FusedLinear, LinearOperands]] = []
        for layer in self.layers:
            # Such hooks (ZeRO-3's, for example) give every layer another input tensor.
            hooked = layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
            operands = None if hooked else layer.fused_operands(x)
            if operands is not None:
                chosen.append((layer, operands))
        if len(chosen) < 2 or chosen[0][0] is not self.layers[0]:
            return None
        own, *others = fused_linears(x, [operands for _, operands in chosen])
        self._input, self._input_version = x, x._version
        self._ready = {id(layer): result for (layer, _), result in zip(chosen[1:], others, strict=True)}
        return own

    def __getstate__(self) -> dict[str, Any]:
        """The state of copies and pickles: without results."""
        return self.__dict__ | {"_input": None, "_ready": {}}


def link_siblings(model: nn.Module) -> int:
    """Compute adapted layers that read the same input together, where names and signatures show that they do.

    `add_moslora` and `load_adapter` call it; after `peft.get_peft_model` call it yourself. Results differ in the order
    of sums only. It takes effect in training only.

    Args:
        model: PEFT model, or the base model with adapters inside.

    Returns:
        The number of families that were linked.
    """
    linked = 0
    for parent in model.modules():
        if _SECOND_INPUTS & set(inspect.signature(type(parent).forward).parameters):
            continue
        children = dict(parent.named_children())
        for names in _FAMILIES:
            layers = [child for name in names if isinstance(child := children.get(name), FusedLinear)]
            if len(layers) > 1 and len({layer.widths[0] for layer in layers}) == 1:
                family = SiblingProjections(layers)
                for layer in layers:
                    layer.siblings = family
                linked += 1
    return linked


@contextmanager
def use_kernel(model: nn.Module, kernel: Kernel) -> Iterator[None]:
    """Choose how the adapted layers of a model compute within the block, in whatever thread.

    Args:
        model: PEFT model, or a part of one.
        kernel: `auto` (fused where it applies; outside of lean layers, PEFT's path for adapters without any mixer),
            `reference` (always factor by factor) or `fused` (those too).

    Raises:
        AdapterError: another name.
    """
    if kernel not in get_args(Kernel):
        hint = suggestion(kernel, get_args(Kernel))
        raise AdapterError(f"The kernel is {kernel!r}, expected one of {', '.join(get_args(Kernel))}.{hint}")
    before = [(layer, layer.kernel) for layer in model.modules() if isinstance(layer, FusedLinear)]
    try:
        for layer, _ in before:
            layer.kernel = kernel
        yield
    finally:
        for layer, earlier in before:
            layer.kernel = earlier


@contextmanager
def one_product_per_step(model: nn.Module, *, leave_out: tuple[str, ...] = ()) -> Iterator[StepWindow]:
    """Compute ``C = B M`` once for every forward pass in the block, and its chain rule once.

    Put it around the micro-batches (forward and backward) of one optimiser step, not around the step itself. In the
    block a micro-batch costs what plain LoRA costs. B and M get their gradients in the backward pass of the micro-batch
    that `last_micro_batch()` announced, or when the block ends; both ways autograd runs their hooks. The factors must
    not change in the block. Adapters may be switched and scaled: factors that the last micro-batch does not use get
    their gradients when the block ends. Adapters with a frozen A (LoRA-XS) compute C in every pass. An engine that
    reduces gradients during `backward` (DeepSpeed, DistributedDataParallel) needs the call of `last_micro_batch`, and
    every adapted layer in the last micro-batch.

    Args:
        model: PEFT model, or the base model with adapters inside.
        leave_out: layers with one of these in their path share nothing.

    Raises:
        AdapterError: the factors are sharded (ZeRO-3).
    """
    window = StepWindow()
    layers = [
        layer
        for path, layer in model.named_modules()
        if isinstance(layer, FusedLinear) and not any(part in path for part in leave_out)
    ]
    if any(hasattr(parameter, "ds_id") for layer in layers for parameter in layer.parameters()):
        raise AdapterError(
            "one_product_per_step does not work under ZeRO-3: B and M are whole only while their layer computes, and "
            "their gradients must come in its backward pass. Leave it out; every micro-batch then computes the product "
            "again, 8 D_out R^2 operations a layer."
        )
    try:
        for layer in layers:
            layer.step_window = window
        yield window
        window.settle()
    except BaseException:
        window.abandon()
        raise
    finally:
        for layer in layers:
            layer.step_window = None
