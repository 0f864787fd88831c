"""Merge an adapter into the base weights, and make sure that nothing changed but the speed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import peft
import torch
from torch import Tensor, nn

from mm_moslora.adapters.functional import use_kernel
from mm_moslora.adapters.inject import named_adapter_layers
from mm_moslora.adapters.layer import MoSLoRALayer
from mm_moslora.errors import AdapterError

logger = logging.getLogger(__name__)

# Largest difference of the outputs over their largest value. Half precision rounds the merged weight itself.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_PROBES = 8


def merge(model: peft.PeftModel, *, tolerance: float | None = None) -> nn.Module:
    """Merge the active adapters into the base weights and take the adapters out.

    Every layer is run on random probes before and after.

    Args:
        model: the PEFT model; changed in place.
        tolerance: largest accepted difference of a layer's outputs, relative to their largest value; None takes 1e-4
            in float32, 5e-2 in bfloat16, 1e-2 in float16.

    Returns:
        The base model with merged weights.

    Raises:
        AdapterError: a factor that is not finite (before anything is changed), or a layer whose merged output differs
            by more than the tolerance (the base weights are put back to within rounding).
    """
    layers = dict(named_adapter_layers(model))
    for path, layer in layers.items():
        _check_finite(path, layer)
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


def _check_finite(path: str, layer: MoSLoRALayer) -> None:
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        factors = layer.factors(name)
        for factor, weight in {"lora_A": factors.A, "lora_mixer": factors.M, "lora_B": factors.B}.items():
            if weight is not None and not torch.isfinite(weight).all():
                raise AdapterError(
                    f"{factor} of {path} holds NaN or infinity; merging would destroy the base model. Nothing was "
                    "merged."
                )


@torch.no_grad()
def _merge_layer(layer: MoSLoRALayer, tolerance: float | None) -> tuple[float, float]:
    """Merge one layer; its relative output difference and the limit for it."""
    weight = cast(Tensor, layer.get_base_layer().weight)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, layer.widths[0], generator=generator).to(weight.device, weight.dtype)
    with _eval_mode(layer), use_kernel("reference"):
        live: Tensor = layer(x)
        layer.merge()
        merged: Tensor = layer(x)
    scale = live.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    error = (live.float() - merged.float()).abs().max() / scale
    return float(error), _TOLERANCE[weight.dtype] if tolerance is None else tolerance


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
