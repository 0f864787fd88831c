"""Decoder layers that keep little for the backward pass ("lean").

Shapes: ``S`` tokens, ``K`` supervised positions, ``D`` LLM width, ``F`` MLP width, ``H`` heads, ``E`` head width.

`kernel_selection.use_lean_layers` changes the class of the layers, not their weights or names. A layer falls back to
its stock forward pass where a call is not plain training on a padding-free row (`_usable`).

A layer is three autograd nodes: norm, query, key and value; the output projection; norm and gated MLP. What a cheap
elementwise pass can recompute is not kept: the norm's output, the product of the gated MLP. Per token and layer
6 D + 2 F values are kept (stock modules with PEFT's adapters: about twice as many in fp32, three times in bf16). The
last layer computes what follows its attention at the supervised positions alone, since the head reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.adapters.layers.base_weights import fetches_whole, weight_of
from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.batch import Batch
from mm_moslora.kernels.attention.segment_attention import StepContext, segment_arguments
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS, FusedOps, compiled
from mm_moslora.kernels.lora.lora_linear import TENSORS, LinearOperands, LinearRules, LoraMatmul, fused_linears
from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.models.memory_efficient.row_share import WHOLE_ROW, RowShare


class LeanLayer(nn.Module):
    """Mixed in before the class of a decoder layer; see the module's description."""

    is_last: bool = False
    """Whether the layer may drop positions that the head does not read."""
    passes: FusedOps = TORCH_OPS
    """The elementwise passes between the products."""
    compiled_fallback: Callable[..., Tensor] | None = None
    """The stock forward pass, compiled, for calls in training that fall back."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[1, S, D]``, or ``[1, K, D]`` from the last layer when `step_context` names the supervised positions."""
        context: StepContext | None = kwargs.get("step_context")
        positions = context.target_positions if self.is_last and context is not None else None
        layer = cast(Any, self)
        linears = None if args else _usable(layer, hidden_states, kwargs)
        if linears is None:
            stock = self.compiled_fallback if self.compiled_fallback is not None and self.training else super().forward
            output: Tensor = stock(hidden_states, *args, **kwargs)
            return output if positions is None else output[:, positions]
        q, k, v, o, gate, up, down = linears
        x = hidden_states.squeeze(0)  # not [0]: its gradient is a copy into zeros
        norm = layer.input_layernorm
        projected = normed_linears(x, norm.weight, norm.variance_epsilon, (q, k, v), self.passes)
        attended = _attention(layer.self_attn, projected, kwargs, self.passes)
        if positions is not None:
            attended, x = attended[positions], x[positions]
        x = x + fused_linears(attended, [o])[0]
        norm = layer.post_attention_layernorm
        return gated_mlp(x, norm.weight, norm.variance_epsilon, gate, up, down, self.passes)[None]

    def compile_passes(self, backend: str) -> None:
        """Compile the passes between the products, and the stock forward pass for calls in training that fall back."""
        self.passes = compiled(backend)
        self.compiled_fallback = torch.compile(super().forward, backend=backend, dynamic=True)


def _attention(attention: Any, projected: tuple[Tensor, ...], kwargs: dict[str, Any], passes: FusedOps) -> Tensor:
    """The input of the output projection, ``[S, H * E]``, from the outputs of q, k and v."""
    query, key, value = (tensor.view(tensor.shape[0], -1, attention.head_dim) for tensor in projected)
    factors = _rotary_factors(kwargs, query.dtype)
    query = rotate(query, factors, passes, norm=getattr(attention, "q_norm", None))
    key = rotate(key, factors, passes, norm=getattr(attention, "k_norm", None))
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    rest = {name: value for name, value in kwargs.items() if name not in ("position_embeddings", "use_cache", "cache")}
    window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    attended, _ = function(
        attention,
        *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)),
        rest.pop("attention_mask", None),
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=window,
        **rest,
    )
    return attended.reshape(projected[0].shape[0], -1)


def _usable(layer: Any, hidden: Tensor, kwargs: dict[str, Any]) -> list[LinearOperands] | None:
    """The operands of q, k, v, o, gate, up and down; None: the layer falls back."""
    if not (torch.is_grad_enabled() and layer.training) or torch.compiler.is_compiling() or hidden.shape[0] != 1:
        return None
    embeddings = kwargs.get("position_embeddings")
    if kwargs.get("cache") is not None or embeddings is None or embeddings[0].ndim != 3 or embeddings[0].shape[0] != 1:
        return None
    if autocasts(hidden.device):
        return None
    attention, mlp = layer.self_attn, layer.mlp
    if attention.config._attn_implementation not in ALL_ATTENTION_FUNCTIONS:
        return None
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [getattr(attention, name) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    if any(norm.weight.dtype != hidden.dtype for norm in norms) or not fetches_whole(layer):
        return None
    attention_modules = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    operands: list[LinearOperands] = []
    for module in (*attention_modules, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        if (operand := _operands(module, hidden)) is None:
            return None
        operands.append(operand)
    return operands


def _operands(module: nn.Module, x: Tensor) -> LinearOperands | None:
    """The operands of a linear layer; None where the module computes more than their products."""
    if isinstance(module, FusedLinear):
        return module.fused_operands(x, plain_too=True)
    weight = weight_of(module, x)
    return None if weight is None else LinearOperands(weight=weight, bias=cast(nn.Linear, module).bias)


def drops_positions(model: PreTrainedModel) -> bool:
    """Whether the model's last layer returns the supervised positions alone where `step_context` names them."""
    layers = getattr(model.get_decoder(), "layers", None)
    return layers is not None and len(layers) > 0 and bool(getattr(layers[len(layers) - 1], "is_last", False))


def packed_row_hidden(model: PreTrainedModel, batch: Batch, *, share: RowShare = WHOLE_ROW, **inputs: Any) -> Tensor:
    """The hidden states ``[K, D]`` at the supervised positions of one packed row, or of this rank's part of it."""
    trimmed, device = drops_positions(model), batch.input_ids.device
    lengths, positions = batch.segment_lengths, batch.target_positions
    if share.of > 1:
        inputs = {name: share.cut(value, batch) for name, value in inputs.items()}
        lengths = (*lengths, padding) if (padding := share.padding(batch)) else lengths  # a segment of its own
        positions = positions[share.targets(batch)] - share.index * share.width(batch)
    own = positions if trimmed else None
    inputs |= segment_arguments(lengths, device, target_positions=own, shared=batch.shared)
    hidden: Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
    return hidden if trimmed else hidden[positions]


def normed_linears(
    x: Tensor, norm_weight: Tensor, eps: float, linears: Sequence[LinearOperands], passes: FusedOps
) -> tuple[Tensor, ...]:
    """RMS norm, then several linear layers that read it; keeps x ``[S, D]`` and the adapters' inner products."""
    flat = [tensor for linear in linears for tensor in linear.tensors()]
    return _NormedLinears.apply(x, norm_weight, eps, passes, LinearRules.of(linears), *flat)  # type: ignore[no-any-return]


def gated_mlp(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate: LinearOperands,
    up: LinearOperands,
    down: LinearOperands,
    passes: FusedOps,
) -> Tensor:
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``; keeps x ``[S, D]``, the two factors and inner products."""
    flat = [tensor for linear in (gate, up, down) for tensor in linear.tensors()]
    rules = (LinearRules.of((gate, up)), LinearRules.of((down,)))
    return _GatedMlp.apply(x, norm_weight, eps, passes, rules, *flat)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class RotaryFactors:
    """What a rotation multiplies with, forward and backward; each ``[S, 1, E]``."""

    cos: Tensor
    """Both halves equal."""
    sin: Tensor
    """Negative in the first half."""
    back: Tensor
    """``-sin``."""

    @classmethod
    def of(cls, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> RotaryFactors:
        """From cosines and sines with two equal halves, each ``[S, E]``."""
        first, second = sin.chunk(2, dim=-1)
        signed = torch.cat((-first, second), dim=-1)[:, None].to(dtype)
        return cls(cos=cos[:, None].to(dtype), sin=signed, back=-signed)


def _rotary_factors(kwargs: dict[str, Any], dtype: torch.dtype) -> RotaryFactors:
    """The factors for a layer's position embeddings, made once for all layers of a forward pass."""
    cos, sin = kwargs["position_embeddings"]
    context: StepContext | None = kwargs.get("step_context")
    made: dict[Any, Any] = {} if context is None else context.rotary
    key = (id(cos), id(sin), dtype)
    if key not in made:  # beside the embeddings themselves, whose ids stay theirs then
        made[key] = RotaryFactors.of(cos[0], sin[0], dtype), cos, sin
    factors: RotaryFactors = made[key][0]
    return factors


def rotate(x: Tensor, factors: RotaryFactors, passes: FusedOps, *, norm: Any = None) -> Tensor:
    """Rotary embedding in halves of heads ``[S, H, E]``, behind an RMS norm of each in Qwen3; keeps x only for that."""
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    return _Rotate.apply(x, weight, eps, factors, passes)  # type: ignore[no-any-return]


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, passes: FusedOps, rules: LinearRules, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, inverse = passes.rms_norm(x, weight, eps)
        outputs, z = LoraMatmul(flat, rules, y.dtype).outputs(y)
        ctx.rules, ctx.passes = rules, passes
        ctx.save_for_backward(x, weight, inverse, z, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, *flat = ctx.saved_tensors
        needs_x, needs_weight, *needs = ctx.needs_input_grad
        y = ctx.passes.recompute_rms_norm(x, weight, inverse)
        matmul = LoraMatmul(flat, ctx.rules, y.dtype)
        dy, gradients = matmul.gradients(y, z, grads, needs[3:], needs_x=needs_x or needs_weight)
        del y
        dx, dweight = _norm_gradients(ctx.passes, dy, x, weight, inverse, needs_weight=needs_weight)
        return dx, dweight, None, None, None, *gradients


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        eps: float,
        passes: FusedOps,
        rules: tuple[LinearRules, LinearRules],
        *flat: Tensor | None,
    ) -> Tensor:
        y, inverse = passes.rms_norm(x, weight, eps)
        (e, g), z = LoraMatmul(flat[: 2 * TENSORS], rules[0], y.dtype).outputs(y)
        del y
        (output,), z_down = LoraMatmul(flat[2 * TENSORS :], rules[1], x.dtype).outputs(passes.gated_silu(e, g))
        ctx.rules, ctx.passes = rules, passes
        ctx.save_for_backward(x, weight, inverse, z, e, g, z_down, *flat)
        return output.add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, e, g, z_down, *flat = ctx.saved_tensors
        needs_x, needs_weight, *needs = ctx.needs_input_grad
        needs_up, needs_down = needs[3 : 3 + 2 * TENSORS], needs[3 + 2 * TENSORS :]
        down = LoraMatmul(flat[2 * TENSORS :], ctx.rules[1], x.dtype)
        h, activated = ctx.passes.recompute_gated(e, g)
        dh, down_gradients = down.gradients(h, z_down, (grad,), needs_down, needs_x=True)
        del h
        pulls = ctx.passes.gated_silu_backward(dh, e, g, activated)
        y = ctx.passes.recompute_rms_norm(x, weight, inverse)
        up = LoraMatmul(flat[: 2 * TENSORS], ctx.rules[0], x.dtype)
        dy, up_gradients = up.gradients(y, z, pulls, needs_up, needs_x=needs_x or needs_weight)
        del y, pulls
        dx, dweight = _norm_gradients(ctx.passes, dy, x, weight, inverse, needs_weight=needs_weight)
        return None if dx is None else dx.add_(grad), dweight, None, None, None, *up_gradients, *down_gradients


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, factors: RotaryFactors, passes: FusedOps
    ) -> Tensor:
        ctx.factors, ctx.passes = factors, passes
        y, inverse = x, None
        if weight is not None:
            rows, inverse = passes.rms_norm(x.reshape(-1, x.shape[-1]), weight, eps)
            y = rows.view(x.shape)
        ctx.save_for_backward(None if weight is None else x, weight, inverse)
        return passes.rotary_embedding(y, factors.cos, factors.sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        dy = ctx.passes.rotary_embedding(grad, ctx.factors.cos, ctx.factors.back)
        if weight is None:
            return dy, None, None, None, None
        rows, pull = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (x, dy))
        needs_weight = ctx.needs_input_grad[1]
        dx, dweight = _norm_gradients(ctx.passes, pull, rows, weight, inverse, needs_weight=needs_weight)
        return None if dx is None else dx.view(x.shape), dweight, None, None, None


def _norm_gradients(
    passes: FusedOps, dy: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, *, needs_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's input and of its weight (None: not needed); `dy` may be overwritten."""
    if dy is None:
        return None, None
    dweight = passes.rms_norm_weight_gradient(dy, x, inverse).to(weight.dtype) if needs_weight else None
    return passes.rms_norm_backward(dy, x, weight, inverse), dweight
