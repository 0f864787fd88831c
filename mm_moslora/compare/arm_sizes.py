"""What trains in each arm of a comparison, counted before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mm_moslora.adapters import what_fails
from mm_moslora.adapters.mixer import form_named
from mm_moslora.compare.arms import Arm
from mm_moslora.config import Recipe
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.trainable_parts import method_config
from mm_moslora.utils.errors import MoSLoRAError


def size_lines(arms: Sequence[Arm], recipe: Recipe, reference: str) -> list[str]:
    """A line per arm: what it is, its trainable parameters beside those of the reference, and what it cannot do.

    Args:
        arms: the comparison's.
        recipe: the recipe that all arms share.
        reference: name of the reference arm.
    """
    counts = {arm.name: _trained(arm, recipe) for arm in arms}
    own = counts[reference]
    lines = []
    for arm in arms:
        count = counts[arm.name]
        if isinstance(count, str):
            size = f"trainable parameters not counted ({count.rstrip('.')})"
        else:
            size = f"{count:,} trainable parameters"
            if arm.name != reference and isinstance(own, int):
                size += f", {count / own:.3g} times those of {reference}"
        lines.append(f"  {arm.name}: {'; '.join([arm.about, size, *_limits(arm, recipe)])}")
    return lines


def _trained(arm: Arm, recipe: Recipe) -> int | str:
    """Trainable parameters, or the reason why they cannot be counted."""
    given = arm.apply(recipe)
    try:
        found = build_meta_model(given.model, given.adapter).parameters()
    except (MoSLoRAError, OSError, ValueError) as error:
        return str(error).splitlines()[0]
    return sum(trained for _, trained in found.values())


def _limits(arm: Arm, recipe: Recipe) -> list[str]:
    """What the arm's adapter cannot do."""
    given = arm.apply(recipe)
    if given.model.language_mode != "adapter":
        return []
    if given.adapter.peft:
        with torch.random.fork_rng(devices=[]):
            return what_fails(method_config(given.adapter))
    fixed = form_named(given.adapter.mixer_form).fixed
    return [] if fixed else ["cannot be merged (its mixers depend on their input), evaluated live"]
