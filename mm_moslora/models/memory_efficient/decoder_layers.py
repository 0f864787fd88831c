"""Decoder layers that keep little for the backward pass, for families whose layers are known; the rest is untouched.

Shapes: ``S`` tokens, ``K`` supervised positions, ``D`` LLM width, ``H`` heads, ``E`` head width.

`use_lean_layers` changes the class of the layers, not their weights or names, so that saving, merging, generation and
gradient checkpointing go on as before. A layer falls back to its own forward pass whenever a call is not plain training
on a padding-free row: with a cache, without gradients, with trained base weights, LLM.int8 weights, several
adapters, or weights that ZeRO-3 has taken away (our engine has it fetch them, a layer at a time).

The last layer does one thing more: what follows its attention is computed at the supervised positions alone, since
nothing reads the others. That is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mm_moslora.adapters.layers.base_weights import weight_of
from mm_moslora.adapters.layers.fused_linear import FusedLinear
from mm_moslora.adapters.layers.sharded_weights import fetches_whole
from mm_moslora.kernels.attention.segment_attention import StepContext
from mm_moslora.kernels.fused_ops.torch_ops import TORCH_OPS, FusedOps, compiled
from mm_moslora.kernels.lora.lora_math import autocasts
from mm_moslora.kernels.lora.lora_matmul import LinearOperands
from mm_moslora.models.families import LEAN_LAYERS
from mm_moslora.models.memory_efficient.decoder_autograd import gated_mlp, normed_linears, rotate, turns
from mm_moslora.models.transformers_patches import mix_in


class LeanLayer(nn.Module):
    """Mixed in before a known decoder layer's class; see the module's description."""

    is_last: bool = False
    """Whether the layer may drop positions that nothing reads."""
    passes: FusedOps = TORCH_OPS
    """What runs between the products."""
    compiled_fallback: Callable[..., Tensor] | None = None
    """The stock form, compiled, for the calls that fall back while training."""

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
        q, k, v, gate, up, down = linears
        x = hidden_states.squeeze(0)  # not [0], whose gradient is a copy into zeros
        norm = layer.input_layernorm
        projected = normed_linears(x, norm.weight, norm.variance_epsilon, (q, k, v), self.passes)
        attended = _attention(layer.self_attn, projected, kwargs, self.passes)
        if positions is not None:
            attended, x = attended[positions], x[positions]
        o_proj = layer.self_attn.o_proj
        x = x + (o_proj(attended, plain_too=True) if isinstance(o_proj, FusedLinear) else o_proj(attended))
        norm = layer.post_attention_layernorm
        return gated_mlp(x, norm.weight, norm.variance_epsilon, gate, up, down, self.passes)[None]

    def compile_passes(self, backend: str) -> None:
        """Compile what runs between the products, and the stock form for calls that fall back to it while training.

        Args:
            backend: of torch.compile.
        """
        self.passes = compiled(backend)
        self.compiled_fallback = torch.compile(super().forward, backend=backend, dynamic=True)


def _attention(attention: Any, projected: tuple[Tensor, ...], kwargs: dict[str, Any], passes: FusedOps) -> Tensor:
    """What stands between q, k, v and the output projection; ``[S, H * E]``."""
    query, key, value = (tensor.view(tensor.shape[0], -1, attention.head_dim) for tensor in projected)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = kwargs["position_embeddings"]
    cos, sin = turns(cos[0], sin[0], query.dtype)
    query, key = rotate(query, cos, sin, passes), rotate(key, cos, sin, passes)
    function = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    rest = {name: given for name, given in kwargs.items() if name not in ("position_embeddings", "use_cache", "cache")}
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
    """q, k, v, gate, up and down as tensors (the output projection runs as a module), or None: fall back."""
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
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    if any(w.requires_grad or w.dtype != hidden.dtype for w in norms) or not fetches_whole(layer):
        return None
    modules = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    found = [_operands(module, hidden) for module in modules]
    return None if any(item is None for item in found) else cast(list[LinearOperands], found)


def _operands(module: nn.Module, x: Tensor) -> LinearOperands | None:
    """A linear layer as tensors where their product is all that the module would compute.

    Args:
        module: `nn.Linear`, a quantised one, or an adapted layer around either.
        x: its input, for dtype and device.
    """
    if isinstance(module, FusedLinear):
        found = module.fused_operands(x, plain_too=True)
        if found is None or module.step_window is None:
            return found
        product = module.step_window.product(module, found, x.dtype)
        return replace(found, M=None, B=product, scaling=1.0)
    weight = weight_of(module, x)
    if weight is None:
        return None
    return LinearOperands(weight=weight, bias=cast(nn.Linear, module).bias, A=None, M=None, B=None)


def use_lean_layers(model: PreTrainedModel, *, depth: int | None = None) -> int:
    """Make the decoder layers of a model lean, in place.

    Args:
        model: causal language model or VLM, adapters inside or not yet.
        depth: decoder layers of the whole model, where the one at hand holds only some of them; None: its own.

    Returns:
        How many layers changed; 0 where the family is unknown.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        return 0
    changed = 0
    for layer in layers:
        activation = type(getattr(layer.mlp, "act_fn", None)).__name__
        if type(layer).__name__ in LEAN_LAYERS and activation in ("SiLUActivation", "SiLU"):
            mix_in(layer, LeanLayer)
            changed += 1
    if changed:
        last = layers[len(layers) - 1]
        last.is_last = isinstance(last, LeanLayer) and (depth or len(layers)) > _deepstack_layers(model)
    return changed


def _deepstack_layers(model: PreTrainedModel) -> int:
    """Decoder layers, from the first, to whose outputs a model adds visual features at all visual positions."""
    tower = getattr(model.config, "vision_config", None)
    return len(getattr(tower, "deepstack_visual_indexes", ()))


def drops_positions(model: PreTrainedModel) -> bool:
    """Whether the model's last layer returns the supervised positions alone when it is given them."""
    layers = getattr(model.get_decoder(), "layers", None)
    return layers is not None and len(layers) > 0 and bool(getattr(layers[len(layers) - 1], "is_last", False))
