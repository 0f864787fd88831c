"""Base weights of 4 and 8 bits: what transformers is asked for, and the way back to dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from mm_moslora.adapters.layers.base_weights import quantisation
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.package_requirements import install_command, is_installed


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
