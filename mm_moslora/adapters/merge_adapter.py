"""Merge an adapter into the base weights, and check that the outputs stay the same."""

from __future__ import annotations

import copy
import logging
import warnings
from contextlib import ExitStack
from typing import cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mm_moslora.adapters.layers.adapter_layers import MoSLoRALayer
from mm_moslora.adapters.layers.base_weights import quantisation, why_not_whole
from mm_moslora.adapters.layers.fused_linear import use_kernel
from mm_moslora.adapters.tree import adapted_layers, named_adapter_layers, untie, unwrapped
from mm_moslora.kernels.lora.lora_math import without_autocast
from mm_moslora.utils.errors import AdapterError, reason_of

logger = logging.getLogger(__name__)

# Largest difference of the outputs over their largest value. Half precision rounds the merged weight itself.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# Merging quantises the sum anew: the error is one of the base's own quantisation steps.
_QUANTISED_TOLERANCE = 0.25
_PROBES = 8


def merge(model: peft.PeftModel, *, tolerance: float | None = None) -> nn.Module:
    """Merge the active adapters into the base weights and take the adapters out.

    Every layer is run on random probes before and after. Where an adapted layer shares its weight with
    another module (tied embeddings), the model's tied weights get copies of their own first, and `tie_word_embeddings`
    becomes False.

    Args:
        model: the PEFT model; changed in place.
        tolerance: largest accepted difference of a layer's outputs, relative to their largest value; None takes 1e-4
            in float32, 5e-2 in bfloat16, 1e-2 in float16 and 0.25 on a quantised base.

    Returns:
        The base model with merged weights.

    Raises:
        AdapterError: no PEFT model; layers of PEFT that cannot merge; a factor that is not finite, or a bias without a
            place (nothing is changed then); or a merged output of a layer that differs by more than the tolerance (the
            base weights are put back to within rounding).
    """
    model = cast(peft.PeftModel, unwrapped(model))
    layers = {
        path: layer
        for path, layer in named_adapter_layers(model)
        if any(layer.holds(name) for name in layer.active_adapters)
    }
    if not hasattr(model, "merge_and_unload"):
        raise AdapterError(
            f"A {type(model).__name__} is no PEFT model, so there is nothing to merge. Give what add_moslora, "
            "load_adapter or peft.get_peft_model returned."
        )
    if reason := why_not_merged(model):
        raise AdapterError(f"The adapter cannot be merged into the weights: {reason}. Use it unmerged.")
    for path, layer in layers.items():
        _check_finite(path, layer)
        biased = any(layer.lora_bias.get(name) for name in layer.active_adapters)
        if biased and getattr(layer.get_base_layer(), "bias", None) is None:
            raise AdapterError(
                f"The adapter has lora_bias, and {path} has no bias to merge it into. Nothing was merged; use it "
                "unmerged."
            )
    untie(model)
    worst, where = 0.0, ""
    for path, layer in layers.items():
        error, limit = _merge_layer(layer, tolerance)
        if error > limit:
            for done in layers.values():
                if done.merged:
                    done.unmerge()
            raise AdapterError(
                f"Merging {path} changes its output by {error:.2e} of its range, expected at most {limit:.0e}. The "
                "adapter was taken out of the weights again; merge in float32."
            )
        if error >= worst:
            worst, where = error, path
    logger.info("merged %d layers; largest relative output difference %.2e at %s", len(layers), worst, where)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        base: nn.Module = model.merge_and_unload()
    return base


def why_not_merged(model: nn.Module) -> str | None:
    """The reason why layers of PEFT's methods cannot be merged, by merging copies of them; None: they can.

    Layers of this package are left out.
    """
    for path, layer in adapted_layers(model):
        if isinstance(layer, MoSLoRALayer):
            continue
        twin = copy.deepcopy(layer)
        try:
            if not hasattr(layer.get_base_layer(), "in_features"):
                twin.merge()
                continue
            error, limit = _merge_layer(twin, None)
        except Exception as refusal:
            return f"{path}: {reason_of(refusal) or type(refusal).__name__}"
        if not error <= limit:
            return f"{path}: its output would change by {error:.2e} of its range, expected at most {limit:.0e}"
    return None


def _check_finite(path: str, layer: MoSLoRALayer) -> None:
    for name in layer.active_adapters:
        if not layer.holds(name):
            continue
        factors = layer.factors(name)
        for factor, weight in {"lora_A": factors.A, "lora_mixer": factors.M, "lora_B": factors.B}.items():
            if weight is None:
                continue
            if reason := why_not_whole(weight):
                raise AdapterError(f"{factor} of {path} {reason} Nothing was merged.")
            if not torch.isfinite(weight).all():
                raise AdapterError(
                    f"{factor} of {path} holds NaN or infinity; merging would destroy the base model. Nothing was "
                    "merged."
                )


@torch.no_grad()
def _merge_layer(layer: BaseTunerLayer, tolerance: float | None) -> tuple[float, float]:
    """Merge one layer; its relative output difference and the limit for it."""
    base = layer.get_base_layer()
    quantised = quantisation(base) is not None
    if not quantised:
        like = cast(Tensor, base.weight)
    elif isinstance(layer, MoSLoRALayer):
        like = next(layer.factors(name).B for name in layer.active_adapters if layer.holds(name))
    else:
        like = next(weight for weight in cast(nn.Module, layer).parameters() if weight.is_floating_point())
    x = _probes(layer, base, like.dtype, like.device)
    module = cast(nn.Module, layer)
    with ExitStack() as stack:
        stack.callback(module.train, module.training)
        stack.enter_context(without_autocast(like.device))
        stack.enter_context(use_kernel(module.eval(), "reference"))
        live = module(x).float()
        layer.merge()
        merged = module(x).float()
    scale = live.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    limit = _QUANTISED_TOLERANCE if quantised else _TOLERANCE[like.dtype]
    return float((live - merged).abs().max() / scale), limit if tolerance is None else tolerance


def _probes(layer: BaseTunerLayer, base: nn.Module, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random inputs of the kind that the layer takes."""
    generator = torch.Generator().manual_seed(0)
    width = layer.widths[0] if isinstance(layer, MoSLoRALayer) else cast(nn.Linear, base).in_features
    if isinstance(base, nn.Embedding):
        return torch.randint(width, (_PROBES,), generator=generator).to(device)
    shape: tuple[int, ...] = (_PROBES, width)
    if isinstance(base, nn.Conv2d):
        shape = (1, width, *(size + 2 for size in base.kernel_size))
    return torch.randn(shape, generator=generator).to(device, dtype)
