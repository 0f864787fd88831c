"""An adapter that was saved under other module paths, as after a refactoring of the model's class."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from mm_moslora.adapters.folder_format import FACTORS_A, PREFIX, adapted_path
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder
from mm_moslora.adapters.layers.layer_dispatch import factor_shapes, why_not_adaptable
from mm_moslora.adapters.moslora_config import MoSLoRAConfig, config_from_dict
from mm_moslora.adapters.name_mapping import exchanged, map_names
from mm_moslora.adapters.tree import named_base_modules
from mm_moslora.utils.errors import AdapterError

logger = logging.getLogger(__name__)


def at_paths_of(model: nn.Module, content: AdapterFolder, *, source: str) -> AdapterFolder:
    """The adapter under the module paths of this model; unchanged where these are its own, or do not all fit.

    Raises:
        AdapterError: two ways to place the modules, or patterns that would mean others.
    """
    modules = dict(named_base_modules(model))
    paths = set(content.config.target_modules or ())
    if paths <= modules.keys():
        return content
    wanted = {}
    for name, A in content.tensors.items():
        path = adapted_path(name)
        if path is not None:
            suffix = next(suffix for suffix in FACTORS_A if name.endswith(suffix))
            B = content.tensors[f"{name.removesuffix(suffix)}{suffix.replace('_A', '_B')}"]
            wanted[path] = (*A.shape[1:], len(B))
    there = {}
    for path, module in modules.items():
        if why_not_adaptable(module) is None:
            (_, *widths), (out, *_) = factor_shapes(module, 1).values()
            there[path] = (*widths, out)
    moved = map_names(wanted, there, source=source, target=f"a {type(model).__name__}")
    if moved.keys() != paths:
        return content  # the loader names what is missing
    config = _moved_config(content.config, moved, source)
    ways = ", ".join(f"{old or '(nothing)'} -> {new or '(nothing)'}" for old, new in exchanged(moved).items())
    logger.warning(
        "%s was saved under other module paths. All of its %d modules fit this model, by shapes, in one way: %s.",
        source, len(moved), ways,
    )  # fmt: skip
    base = {key: value for key, value in content.base.items() if key != "fingerprint"}  # it is of the old paths
    tensors, initial = _moved(content.tensors, moved), _moved(content.initial_mixers, moved)
    return replace(content, config=config, tensors=tensors, initial_mixers=initial, base=base)


def _moved(tensors: Mapping[str, Tensor], moved: Mapping[str, str]) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        path = name.removeprefix(PREFIX)
        while path and path not in moved:
            path = path.rpartition(".")[0]
        end = name.removeprefix(f"{PREFIX}{path}")
        result[f"{PREFIX}{moved[path]}{end}" if path else name] = tensor
    return result


def _moved_config(config: MoSLoRAConfig, moved: Mapping[str, str], source: str) -> MoSLoRAConfig:
    """The configuration with the new paths; every module keeps its rank, scaling and kind."""
    data: dict[str, Any] = config.to_dict()
    for key, patterns in data.items():
        if key.endswith("_pattern") and isinstance(patterns, dict):
            data[key] = {moved.get(path, path): value for path, value in patterns.items()}
    own = config_from_dict(data | {"target_modules": sorted(moved.values())})
    for old, new in moved.items():
        facts = [(c.rank_for(path), c.scaling_for(path), c.is_plain(path)) for c, path in ((config, old), (own, new))]
        if facts[0] != facts[1]:
            raise AdapterError(
                f"{source} adapts {old!r}, which is {new!r} here, and its patterns give that module another rank or "
                "scaling. Write the patterns for whole paths of this model."
            )
    return own
