"""LoRA factors of XTuner's checkpoints: their options, and a folder that `load_adapter` reads."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.adapters.folder_format import PREFIX, STOCK_CONFIG, STOCK_WEIGHTS, USE_MIXER
from mm_moslora.adapters.folders.authors_format import check_options
from mm_moslora.adapters.moslora_config import lora_fields
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.run_paths import writing
from mm_moslora.utils.untrusted_files import read_text


def lora_settings(part: str, config: Path | None) -> dict[str, Any]:
    """The arguments of `llm_lora` or `visual_encoder_lora` in XTuner's configuration file, which is parsed and not run.

    Args:
        part: `llm` or `visual_encoder`.
        config: the file; None: not named.

    Raises:
        ModelError: no file, no such arguments as plain values in it, or more that may change them.
        AdapterError: an option that is not understood.
    """
    if config is None:
        raise ModelError(
            "The checkpoint holds LoRA factors without their alpha, which XTuner keeps in its Python configuration. "
            "Name that file: --xtuner-config FILE.py (XTuner copies it into the run's folder)."
        )
    name = f"{part}_lora"
    try:
        nodes = list(ast.walk(ast.parse(read_text(config))))
        settings = [_arguments(node.value) for node in nodes if isinstance(node, ast.keyword) and node.arg == name]
        values = {"r": int(settings[0]["r"]), "lora_alpha": float(settings[0]["lora_alpha"]), **settings[0]}
    except (SyntaxError, ValueError, LookupError, TypeError) as error:
        raise ModelError(
            f"{config} has no {name}=dict(...) with r and lora_alpha as plain values ({type(error).__name__}: "
            f"{error}). Write them so, or convert the checkpoint with `xtuner convert pth_to_hf`."
        ) from error
    others = [node for node in nodes if _mentions(node, name)]
    if others or any(other != settings[0] for other in settings):
        line = f", line {getattr(others[0], 'lineno', '?')}" if others else ""
        raise ModelError(
            f"{config}{line} may change the values of {name}, and the file is not run. Leave one {name}=dict(...) with "
            "the values of the training, and no _base_ or read_base; XTuner's copy in the run's folder is such a file."
        )
    check_options(values, lora_fields(), f"{name} of {config}", file=config.name)
    return values


def _arguments(node: ast.expr) -> dict[str, Any]:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError(f"line {node.lineno} is no call with keywords alone")
    if any(item.arg is None for item in node.keywords):
        raise ValueError(f"line {node.lineno} has ** among its arguments")
    return {str(item.arg): ast.literal_eval(item.value) for item in node.keywords if item.arg != "type"}


def _mentions(node: ast.AST, name: str) -> bool:
    """Whether a part of the file, other than the keyword itself, names the arguments or another file."""
    if isinstance(node, ast.Constant):  # model["llm_lora"]; also merge_from_dict({"model.llm_lora.r": 8})
        return isinstance(node.value, str) and name in node.value.split(".")
    if isinstance(node, ast.Attribute):
        return node.attr == name
    return isinstance(node, ast.Name) and node.id in (name, "_base_", "read_base")


def write_factors(
    part: str, tensors: Mapping[str, Tensor], folder: Path, *, model: PreTrainedModel, settings: dict[str, Any]
) -> Path:
    """Write LoRA factors as an adapter folder of PEFT, or with mixers of the authors' fork.

    Args:
        part: `llm` or `visual_encoder`.
        tensors: the factors under XTuner's names, without the part.
        folder: new.
        model: the base, for the names of its modules.
        settings: from `lora_settings`.

    Raises:
        ModelError: mixers that the settings do not declare, or two tensors of one name.
    """
    modules = {name for name, _ in model.named_modules()}
    named: dict[str, Tensor] = {}
    for name, value in tensors.items():
        path, dot, rest = name.removeprefix(PREFIX).partition(".lora_")
        if path not in modules:  # of towers, transformers dropped this level of names
            path = path.removeprefix("vision_model.")
        own = f"{PREFIX}{path}{dot}{rest.replace('.default.', '.')}"
        if own in named:
            raise ModelError(f"The checkpoint holds {own!r} of {part} twice ({name!r}). Remove one of the two.")
        named[own] = value.contiguous().clone()  # two modules may share a tensor
    if settings.get(USE_MIXER) is not True and any("lora_AB" in name for name in named):
        raise ModelError(f"The checkpoint holds mixers of {part}, and {part}_lora does not set {USE_MIXER}.")
    folder.mkdir()
    config = {"peft_type": "LORA", "target_modules": []} | settings
    (folder / STOCK_CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
    with writing(folder / STOCK_WEIGHTS):
        save_file(named, folder / STOCK_WEIGHTS)
    return folder
