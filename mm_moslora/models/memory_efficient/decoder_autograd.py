"""Autograd nodes that keep little: a norm with the linear layers that read it, a gated MLP, rotary embedding.

Shapes: ``S`` tokens, ``D`` LLM width, ``F`` MLP width, ``R`` rank, ``H`` heads, ``E`` head width.

What a cheap elementwise pass can rebuild is not kept: the norm's output is rebuilt from its input, the product of the
gated MLP from its two factors. Per token and layer 6 D + 2 F values stay (stock modules with PEFT's adapters: about
twice that in fp32, three times in bf16). Base weights are frozen and get no gradient. The linear layers' formulas are
those of `mm_moslora.kernels.lora.lora_matmul`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm_moslora.kernels.fused_ops.torch_ops import FusedOps
from mm_moslora.kernels.lora.lora_matmul import (
    TENSORS,
    LinearOperands,
    LinearRules,
    LoraMatmul,
    copies,
    mixer_gradients,
)


def normed_linears(
    x: Tensor, norm_weight: Tensor, eps: float, linears: Sequence[LinearOperands], passes: FusedOps
) -> tuple[Tensor, ...]:
    """RMS norm, then several linear layers that all read it; keeps x and the adapters' inner products.

    Args:
        x: ``[S, D]``.
        norm_weight: ``[D]``, frozen.
        eps: of the norm.
        linears: read the norm's output.
        passes: what runs between the products.

    Returns:
        ``[S, D_out]`` for each.
    """
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
    """``x + down(silu(gate(norm(x))) * up(norm(x)))``; keeps x, the outputs of gate and up, and inner products.

    Args:
        x: ``[S, D]``.
        norm_weight: ``[D]``, frozen.
        eps: of the norm.
        gate: ``D -> F``.
        up: ``D -> F``.
        down: ``F -> D``.
        passes: what runs between the products.

    Returns:
        ``[S, D]``.
    """
    flat = [tensor for linear in (gate, up, down) for tensor in linear.tensors()]
    rules = (LinearRules.of((gate, up)), LinearRules.of((down,)))
    return _GatedMlp.apply(x, norm_weight, eps, passes, rules, *flat)  # type: ignore[no-any-return]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, passes: FusedOps) -> Tensor:
    """Rotary embedding of whole heads, halves layout; keeps nothing of the size of x.

    Args:
        x: ``[S, H, E]``.
        cos: ``[S, 1, E]``, from `turns`.
        sin: ``[S, 1, E]``, from `turns`.
        passes: the rotation.
    """
    return _Rotate.apply(x, cos, sin, passes)  # type: ignore[no-any-return]


def turns(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What `rotate` multiplies with: cosines, and sines that are negative in the first half; ``[S, 1, E]``.

    Args:
        cos: ``[S, E]``, both halves equal.
        sin: ``[S, E]``, both halves equal.
        dtype: of what is rotated.
    """
    first, second = sin.chunk(2, dim=-1)
    return cos[:, None].to(dtype), torch.cat((-first, second), dim=-1)[:, None].to(dtype)


class _Linears:
    """Siblings inside a node: their tensors as the node got them, and their products."""

    def __init__(self, flat: Sequence[Tensor | None], rules: LinearRules, dtype: torch.dtype) -> None:
        self.layers = [flat[start : start + TENSORS] for start in range(0, len(flat), TENSORS)]
        self.rules = rules
        weights, self.biases = ([layer[index] for layer in self.layers] for index in range(2))
        A, C = copies(self.layers, rules.scalings, dtype)
        self.products = LoraMatmul(weights, A, C, rules)

    def outputs(self, y: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Of y ``[S, D]``, and the adapters' inner products."""
        return self.products.outputs(y, self.biases)

    def gradients(self, y: Tensor, z: Tensor | None, grads: Sequence[Tensor]) -> tuple[Tensor, list[Tensor | None]]:
        """Of y, and of every layer's tensors."""
        dy, dA = self.products.input_gradients(y, grads)
        assert dy is not None
        found: list[Tensor | None] = []
        for index, (grad, (_, _, A, M, B)) in enumerate(zip(grads, self.layers, strict=True)):
            dM = dB = None
            if B is not None and z is not None:
                dC = self.products.product_gradient(index, grad, z)
                dM, dB = mixer_gradients(dC, M, B, self.rules.scalings[index])
            found += [None, None, None if A is None else dA[index].to(A.dtype), dM, dB]
        return dy, found


class _NormedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, eps: float, passes: FusedOps, rules: LinearRules, *flat: Tensor | None
    ) -> tuple[Tensor, ...]:
        y, inverse = passes.rms_norm(x, weight, eps)
        outputs, z = _Linears(flat, rules, y.dtype).outputs(y)
        ctx.rules, ctx.passes = rules, passes
        ctx.save_for_backward(x, weight, inverse, z, *flat)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, *flat = ctx.saved_tensors
        y = ctx.passes.recompute_rms_norm(x, weight, inverse)
        dy, found = _Linears(flat, ctx.rules, y.dtype).gradients(y, z, grads)
        dx = ctx.passes.rms_norm_backward(dy, x, weight, inverse) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *found


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
        (e, g), z = _Linears(flat[: 2 * TENSORS], rules[0], y.dtype).outputs(y)
        del y
        (output,), z_down = _Linears(flat[2 * TENSORS :], rules[1], x.dtype).outputs(passes.gated_silu(e, g))
        ctx.rules, ctx.passes = rules, passes
        ctx.save_for_backward(x, weight, inverse, z, e, g, z_down, *flat)
        return output.add_(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, z, e, g, z_down, *flat = ctx.saved_tensors
        down = _Linears(flat[2 * TENSORS :], ctx.rules[1], x.dtype)
        h, activated = ctx.passes.recompute_gated(e, g)
        dh, found_down = down.gradients(h, z_down, (grad,))
        del h
        d_gate, d_up = ctx.passes.gated_silu_backward(dh, e, g, activated)
        y = ctx.passes.recompute_rms_norm(x, weight, inverse)
        dy, found = _Linears(flat[: 2 * TENSORS], ctx.rules[0], x.dtype).gradients(y, z, (d_gate, d_up))
        dx = ctx.passes.rms_norm_backward(dy, x, weight, inverse).add_(grad) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, *found, *found_down


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, passes: FusedOps) -> Tensor:
        ctx.passes = passes
        ctx.save_for_backward(cos, sin)
        return passes.rotary_embedding(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.passes.rotary_embedding(grad, cos, -sin), None, None, None
