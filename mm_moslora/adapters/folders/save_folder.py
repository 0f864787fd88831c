"""Save an adapter: take it out of its model, check it, write its folder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import PREFIX, STOCK_CONFIG, check_tensors, named_as_modules, write_folder
from mm_moslora.adapters.layers.sharded_weights import why_not_whole
from mm_moslora.adapters.moslora_config import MoSLoRAConfig
from mm_moslora.adapters.tree import (
    bare_name,
    base_model,
    named_adapter_layers,
    named_base_modules,
    unwrapped,
)
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import replace_text


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
) -> None:
    """Write one adapter as the double folder.

    Args:
        model: PEFT model, or the base model with adapters inside.
        folder: made if missing; files of an earlier save are replaced.
        adapter_name: which adapter.
        state: parameter name to full tensor, for values that the model does not hold (ZeRO-3 shards, float32 masters).
            Names are those of `named_parameters`, of the PEFT model or of the base. Must hold every parameter of the
            adapter; anything else in it is ignored.
        base: identity of the base model to remember, such as `{"id": ..., "revision": ...}`; JSON values.

    Raises:
        AdapterError: no such adapter; a factor that is missing, empty, of the wrong shape or not finite.
        OSError: the folder cannot be written.
    """
    take_adapter(model, adapter_name=adapter_name, state=state, base=base).write(Path(folder))


@dataclass(frozen=True, kw_only=True)
class TakenAdapter:
    """An adapter taken out of its model, to be written without it: while the model trains on, say."""

    config: MoSLoRAConfig
    tensors: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    base: dict[str, Any]
    auto_mapping: dict[str, str] | None

    def write(self, folder: Path) -> None:
        """Write the double folder; see `save_adapter`."""
        check_tensors(self.tensors, self.shapes)
        write_folder(folder, self.config, self.tensors, base=self.base, auto_mapping=self.auto_mapping)


def take_adapter(
    model: nn.Module,
    *,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    base: Mapping[str, Any] | None = None,
) -> TakenAdapter:
    """What `save_adapter` writes. Tensors that are float32 on the CPU are not copied; see there for the rest."""
    model = unwrapped(model)
    config = adapter_config(model, adapter_name)
    return TakenAdapter(
        config=config,
        tensors=adapter_tensors(model, adapter_name, state),
        shapes=expected_shapes(model, adapter_name),
        base=dict(base or {}) | {"fingerprint": base_fingerprint(model)},
        auto_mapping=_auto_mapping(model, config),
    )


def adapter_config(model: nn.Module, adapter_name: str) -> MoSLoRAConfig:
    """The configuration of one adapter of a PEFT model or of the base model with adapters inside.

    Raises:
        AdapterError: no such adapter, or one that is not MoSLoRA.
    """
    if isinstance(model, peft.PeftMixedModel):
        raise AdapterError(
            "A PeftMixedModel cannot be saved, in PEFT neither: its adapters lie inside each other. Merge it "
            "(merge_and_unload), or save the adapters before they are mixed."
        )
    configs = getattr(model, "peft_config", None)
    configs = configs if isinstance(configs, dict) else {}
    if adapter_name not in configs:
        raise AdapterError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs) or 'none'}.")
    config = configs[adapter_name]
    if not isinstance(config, MoSLoRAConfig):
        raise AdapterError(
            f"Adapter {adapter_name!r} has a {type(config).__name__}, expected MoSLoRAConfig. Save it with its own "
            "library."
        )
    return config


def expected_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Names, as in the folder, and shapes of every A, M and B of an adapter."""
    return {
        f"{PREFIX}{path}.{name}": shape
        for path, layer in named_adapter_layers(model)
        if layer.holds(adapter_name)
        for name, shape in layer.named_factor_shapes(adapter_name)
    }


def adapter_tensors(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Every tensor of an adapter under its name in the folder, in float32 on the CPU; see `save_adapter`."""
    full = named_as_modules(model, model.state_dict())
    if state is not None:
        own = {_bare(name): name for name in full}
        parameters = {_bare(name) for name, _ in model.named_parameters()}
        given = {_bare(name): tensor for name, tensor in state.items()}
        lost = sorted(
            name for name in parameters - given.keys() if "lora_" in name and f".{adapter_name}." in f"{name}."
        )
        if lost:
            raise AdapterError(
                f"The state to save lacks {len(lost)} parameters of adapter {adapter_name!r}, first {lost[0]!r}. "
                "Gather all of them before saving."
            )
        full |= {own[name]: tensor for name, tensor in given.items() if name in own}
    tensors = get_peft_model_state_dict(model, state_dict=full, adapter_name=adapter_name, save_embedding_layers=False)
    for name, tensor in tensors.items():
        if reason := why_not_whole(tensor):
            raise AdapterError(f"{name} {reason}")
    prefix = "" if isinstance(model, peft.PeftModel) else PREFIX
    return {prefix + bare_name(name): tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    """A parameter's name without what wrappers and PEFT put into it."""
    return re.sub(r"^(module\.)*", "", bare_name(name)).removeprefix(PREFIX)


def base_fingerprint(model: nn.Module) -> str:
    """A hash of the base model's structure: module paths and sizes, without adapters, dtype or quantisation.

    Two models with equal fingerprints can carry the same adapter; whether it makes sense there is for the ids to say.

    Args:
        model: base model, or PEFT model.

    Returns:
        64 hexadecimal digits.
    """
    lines = []
    for path, module in named_base_modules(model):
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            lines.append(f"{path} linear {module.in_features} {module.out_features}")
            continue
        for name, parameter in module.named_parameters(recurse=False):
            lines.append(f"{path}.{name} {list(getattr(parameter, 'ds_shape', parameter.shape))}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def name_base(folder: Path, base: str, *, revision: str | None, kind: type[nn.Module] | None) -> None:
    """Write into `adapter_config.json` which model the adapter belongs to, so that PEFT's Auto classes load both.

    Args:
        folder: from `save_adapter`.
        base: folder or hub id.
        revision: of the hub.
        kind: class of the base, of which `AutoPeftModel` makes one; None: `AutoPeftModelForCausalLM` knows it.
    """
    data = json.loads((folder / STOCK_CONFIG).read_text(encoding="utf-8"))
    data |= {"base_model_name_or_path": base, "revision": revision}
    if kind is not None:
        data |= {"task_type": None, "auto_mapping": _class_of(kind)}
    replace_text(folder / STOCK_CONFIG, json.dumps(data, indent=2, sort_keys=True) + "\n")


def _class_of(kind: type[nn.Module]) -> dict[str, str]:
    return {"base_model_class": kind.__name__, "parent_library": kind.__module__}


def _auto_mapping(model: nn.Module, config: MoSLoRAConfig) -> dict[str, str] | None:
    if config.task_type is not None:
        return None
    return _class_of(type(base_model(model)))
