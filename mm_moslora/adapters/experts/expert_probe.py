"""Whether the installed PEFT adapts the experts of a class of models: a probe on a small random model of the class.

A random update of every stacked parameter must change the outputs, merged into the weights it must give the same ones,
and every factor must get a gradient. A module that reads the weights without being called, or through a copy, passes
none of this, and the adapter would be lost without a word.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.adapters.experts.small_models import EQUAL_HEADS, SIZES, WORDS, small_model
from mm_moslora.adapters.tree import base_model, named_base_modules
from mm_moslora.utils.errors import AdapterError, reason_of

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Share of the largest output, in fp32; sums of experts round otherwise by 1e-6."""
_FINDINGS: dict[str, str] = {}


def refuse_mishandled(model: nn.Module, parameters: Sequence[str]) -> None:
    """Refuse experts that the installed PEFT mishandles; once per class and parameters in a process.

    Models without a class of transformers around the experts cannot be built anew, and are not probed.

    Args:
        model: with or without adapters, on any device; its weights are not read.
        parameters: whole paths of those to adapt.

    Raises:
        AdapterError: the probe's outputs differ.
    """
    for ancestor, names in _by_ancestor(model, parameters):
        implementation = getattr(ancestor.config, "_experts_implementation", None)
        key = f"{type(ancestor).__module__}.{type(ancestor).__qualname__} {implementation} {sorted(names)}"
        if key not in _FINDINGS:
            _FINDINGS[key] = _probed(ancestor, names)
        if _FINDINGS[key]:
            raise AdapterError(
                f"{min(names)!r} of {type(ancestor).__name__} cannot carry an adapter: in a small random model of this "
                f"class {_FINDINGS[key]}. PEFT {peft.__version__} mishandles this layout of experts. Leave them out of "
                "target_parameters and name linear layers."
            )


def _by_ancestor(model: nn.Module, parameters: Sequence[str]) -> list[tuple[PreTrainedModel, set[str]]]:
    """The innermost models of transformers around the parameters, and the ends of their names there."""
    modules = dict(named_base_modules(base_model(model)))
    found: dict[str, set[str]] = {}
    for parameter in parameters:
        parts = parameter.split(".")
        paths = (".".join(parts[:end]) for end in range(len(parts) - 1, -1, -1))
        path = next((path for path in paths if isinstance(modules.get(path), PreTrainedModel)), None)
        if path is not None:
            inside = parameter.removeprefix(f"{path}." if path else "")
            found.setdefault(path, set()).add(re.sub(r".*\.\d+\.", "", inside))
    return [(modules[path], names) for path, names in found.items()]  # type: ignore[misc]


def _probed(ancestor: PreTrainedModel, names: set[str]) -> str:
    """What goes wrong; empty: nothing, or no small model can be made."""
    fault = ""
    for sizes in (SIZES[0], EQUAL_HEADS, *SIZES[1:]):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                made = small_model(type(ancestor), ancestor.config, sizes)
                if any(hasattr(weight, "ds_id") for weight in made.parameters()):
                    raise ValueError("transformers' ZeRO-3 has cut it up")
                return next(iter(_problems(made, sorted(names))), "")
        except Exception as error:  # configurations fit together in ways that only their classes know
            fault = fault or f"{type(error).__name__}: {reason_of(error)}"
    logger.warning(
        "The experts of %s could not be probed in a small model (%s); compare merged and unmerged outputs yourself.",
        type(ancestor).__name__, fault,
    )  # fmt: skip
    return ""


def _problems(made: PreTrainedModel, names: list[str]) -> list[str]:
    ids = torch.randint(2, min(WORDS, made.config.vocab_size), (2, 24))

    def outputs(model: Any) -> Tensor:
        result: Tensor = model(input_ids=ids, use_cache=False)[0]
        return result

    with torch.no_grad():
        for weight in made.parameters():  # some classes leave the weights of experts and routers empty, or zero
            if weight.ndim > 1:
                weight.normal_(std=0.05)
        before = outputs(made)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=[], target_parameters=names, init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(made, config)
    live = outputs(wrapped)
    if live.requires_grad:
        live.square().sum().backward()
    idle = [name for name, weight in wrapped.named_parameters() if weight.requires_grad and weight.grad is None]
    with torch.no_grad():
        wrapped.merge_adapter()
        merged = outputs(wrapped)
        wrapped.unmerge_adapter()
        after = outputs(wrapped)
    scale = float(before.abs().max())
    moved, lost, left = (float((a - b).detach().abs().max()) / scale for a, b in
                         ((live, before), (live, merged), (after, live)))  # fmt: skip
    problems = []
    if not moved > _TOLERANCE:
        problems.append("a random update of them changes no output until it is merged")
    if not lost <= _TOLERANCE:
        problems.append(f"merging a random update of them changes the outputs by {lost:.1e} of their range")
    if not left <= _TOLERANCE:
        problems.append(f"merging and unmerging a random update of them changes the outputs by {left:.1e}")
    if idle:
        problems.append(f"{idle[0]} gets no gradient")
    return problems
