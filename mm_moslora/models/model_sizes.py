"""Configurations to count with, the model's own or shipped ones, and the way in for weights of a base, packed too."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from mm_moslora.adapters.layers.base_weights import quantisation
from mm_moslora.config import RECIPES_FOLDER, ModelConfig
from mm_moslora.utils.errors import ModelError, reason_of
from mm_moslora.utils.files import read_json
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.package_requirements import install_command, is_installed
from mm_moslora.utils.run_paths import ADAPTER_CONFIG, require_model

logger = logging.getLogger(__name__)

Needed = Callable[[PreTrainedModel, set[str]], set[str]]
_MOST = {re.compile(r"(^|_)(n_?layers?|layers?|depth)$"): 4096, re.compile(r"_(size|dim|width|heads|experts)$"): 2**31}
"""Names of whole numbers in configurations, and the most that a model can be made of: classes build every layer."""


@cache
def shipped_shapes() -> dict[str, dict[str, Any]]:
    """The models of the shipped recipes, and their sizes."""
    found: dict[str, dict[str, Any]] = read_json(RECIPES_FOLDER / "shapes.json", linked=True)
    return found


def config_to_count(name: str, revision: str | None) -> PreTrainedConfig:
    """A model's configuration, for its sizes; shipped recipes' models are known where the hub does not answer."""
    try:
        with hub_or_cache(name):
            refuse_configuration(name, revision)
            config: PreTrainedConfig = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        if name not in shipped_shapes():
            raise
        logger.info("%s: its configuration cannot be read; the shipped sizes are used.", name)
        return shipped_config(name)
    return config


def shipped_config(name: str) -> PreTrainedConfig:
    """The sizes of a shipped recipe's model."""
    values = dict(shipped_shapes()[name])
    kind = values.pop("model_type")
    config: PreTrainedConfig = AutoConfig.for_model(kind, **values)
    return config


def sizes_of(name: str, revision: str | None, *, key: str) -> Any:
    """`config_to_count` of a recipe's model."""
    require_model(key, name)
    try:
        return config_to_count(name, revision)
    except ModelError:
        raise
    except Exception as error:  # configurations are texts of others, and their classes check little
        raise unreadable(key, name, error) from error


def unreadable(key: str, name: str, error: Exception) -> ModelError:
    """The error of a model whose configuration a library could not read."""
    return ModelError(
        f"{key} is {name!r}: its configuration cannot be read ({reason_of(error)}). Give a folder with its "
        "config.json, or go online."
    )


def base_sizes(config: ModelConfig) -> Any:
    """`sizes_of` a recipe's base model: `model.vlm`, else `model.language`."""
    if config.vlm is not None:
        return sizes_of(config.vlm, config.vlm_revision, key="model.vlm")
    assert config.language is not None
    return sizes_of(config.language, config.language_revision, key="model.language")


def refuse_configuration(name: str, revision: str | None = None) -> None:
    """Refuse a configuration that no class may build: sizes that no model has, or code that its writer chose.

    transformers fetches and runs native code where an implementation of attention or experts is the name of a
    repository, and the configuration names repository and commit.
    """
    values: Any = {}
    with contextlib.suppress(Exception):  # the loader says what is wrong
        values, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    parts: list[tuple[str, Any]] = [("", values if isinstance(values, dict) else {})]
    for path, part in parts:
        items: Any = part.items() if isinstance(part, dict) else enumerate(part)
        for key, value in items:
            parts += [(f"{path}{key}.", value)] if isinstance(value, dict | list) else []  # towers are a list
            if "implementation" in f"{path}{key}" and isinstance(value, str) and "/" in value:
                raise ModelError(
                    f"{name}: {path}{key} of its config.json is {value!r}, which has transformers fetch native code "
                    "and run it. Code that comes with a model is never run: delete the key."
                )
            most = next((most for names, most in _MOST.items() if names.search(str(key))), None)
            if most is not None and isinstance(value, int | float) and value > most:
                raise ModelError(
                    f"{name}: {path}{key} of its config.json is {value:,}, expected at most {most:,}. Correct the file."
                )


def refuse_adapter_beside(name: str, revision: str | None = None) -> None:
    """Refuse a model that an adapter lies beside: transformers would put it in, or load the base that it names."""
    file = None
    with contextlib.suppress(OSError, ValueError):  # the loader says what is wrong
        file = find_adapter_config_file(name, revision=revision)
    if file is not None:
        raise ModelError(
            f"{name} has an {ADAPTER_CONFIG} where a model is expected. transformers would load that adapter, and "
            "maybe another model that it names. Give a model without it, such as one that the adapter was merged into."
        )


def load_base(
    loader: Any, name: str | Path, *, revision: str | None = None, needed: Needed | None = None, **options: Any
) -> Any:
    """A model with all its weights: `loader.from_pretrained`, and a ModelError where that would make some up."""
    with hub_or_cache(name):
        refuse_adapter_beside(str(name), revision)
        refuse_configuration(str(name), revision)
    try:
        with hub_or_cache(name):
            model, info = loader.from_pretrained(
                name, revision=revision, output_loading_info=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # classes check little of a configuration
        raise ModelError(
            f"{name} cannot be built by transformers: {type(error).__name__}: {reason_of(error)}. Correct its "
            "config.json, or give a complete copy."
        ) from error
    missing = set(map(str, info["missing_keys"]))
    if missing := needed(model, missing) if missing and needed else missing:
        other = sorted(map(str, info["unexpected_keys"]))
        unread = f" and {len(other)} that it does not know, such as {other[0]}" if other else ""
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {min(missing)}{unread}: they "
            "would be random. Save the model under its own names (without the prefix of a wrapper such as `module.` "
            "or `_orig_mod.`), or give a complete copy."
        )
    return model


def packing(kind: str, dtype: torch.dtype, *, keep: Sequence[str] | None = None) -> BitsAndBytesConfig | None:
    """What `from_pretrained` is given to pack linear layers while it reads them; None: nothing is packed."""
    if kind == "none":
        return None
    if not is_installed("bitsandbytes"):
        raise ModelError(
            f"model.quantisation is {kind}, which needs bitsandbytes. Run: {install_command('bitsandbytes')}"
        )
    kept = None if keep is None else list(keep)
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )  # fmt: skip


def refuse_packed(config: PreTrainedConfig, kind: str, name: str) -> None:
    """Refuse to pack a model whose weights are packed already: transformers would read them as they are."""
    own = getattr(config, "quantization_config", None)
    if kind != "none" and own is not None:
        method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
        found = getattr(method, "value", method) or "quantization_config"
        raise ModelError(
            f"model.quantisation is {kind}, but the weights of {name!r} are packed already ({found}). Set "
            "model.quantisation: none to take them as they are, or name the model in full precision."
        )


def is_packed(model: nn.Module) -> bool:
    """Whether linear layers of a model hold packed weights."""
    return any(quantisation(module) is not None for module in model.modules())


def make_dense(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give layers of bitsandbytes dense weights with the values that they compute with."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    for path, layer in list(model.named_modules()):
        if not (quantisation(layer) or "").startswith("bitsandbytes"):
            continue
        packed: Any = layer
        with torch.device("meta"):
            dense = nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None)
        weight = dequantize_bnb_weight(packed.weight, getattr(packed, "state", None))
        dense.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        dense.bias = packed.bias
        model.set_submodule(path, dense.train(packed.training))
    if (quantiser := getattr(model, "hf_quantizer", None)) is not None:
        quantiser.remove_quantization_config(model)
    for config in (model.config, model.config.get_text_config()):  # an assembled model has that of its language model
        if hasattr(config, "quantization_config"):
            del config.quantization_config
