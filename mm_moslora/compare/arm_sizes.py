"""What trains in each arm of a comparison, counted before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mm_moslora.adapters import what_fails
from mm_moslora.adapters.mixer import form_named
from mm_moslora.adapters.tree import adapted_layers
from mm_moslora.compare.arms import Arm
from mm_moslora.config import Recipe
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.trainable_parts import method_config
from mm_moslora.utils.errors import MoSLoRAError, reason_of


def size_lines(arms: Sequence[Arm], recipe: Recipe, reference: str) -> list[str]:
    """A line per arm: what it is, its trainable parameters beside those of the reference, and what it cannot do.

    Args:
        arms: the comparison's.
        recipe: the recipe that all arms share.
        reference: name of the reference arm.
    """
    sizes = {arm.name: _size(arm.apply(recipe)) for arm in arms}
    own = sizes[reference].trained
    lines = []
    for arm in arms:
        size = sizes[arm.name]
        if size.trained is None:
            said = [f"trainable parameters not counted ({size.limits[0]})", *size.limits[1:]]
        else:
            count = f"{size.trained:,} trainable parameters"
            if own and arm.name != reference:
                count += f", {size.trained / own:.3g} times those of {reference}"
            said = [count, *size.limits]
        lines.append(f"  {arm.name}: {'; '.join([arm.about, *said])}")
    return lines


@dataclass(frozen=True, kw_only=True)
class _Size:
    trained: int | None
    """Trainable parameters; None where they cannot be counted, for the first reason of `limits`."""
    limits: list[str]


def _size(recipe: Recipe) -> _Size:
    limits, bias = [], False
    try:
        found = build_meta_model(recipe.model, recipe.adapter)
    except (MoSLoRAError, OSError, ValueError) as error:
        trained = None
        limits.append(reason_of(error))
    else:
        trained = sum(mine for _, mine in found.parameters().values())
        bases = [layer.get_base_layer() for _, layer in adapted_layers(found.model)]
        bias = all(getattr(base, "bias", None) is not None for base in bases)
    if recipe.model.language_mode != "adapter":
        return _Size(trained=trained, limits=limits)
    if recipe.adapter.peft:
        with torch.random.fork_rng(devices=[]):
            limits += what_fails(method_config(recipe.adapter), bias=bias)
    elif not form_named(recipe.adapter.mixer_form).fixed:
        limits.append("cannot be merged (its mixers depend on their input), evaluated live")
    return _Size(trained=trained, limits=limits)
