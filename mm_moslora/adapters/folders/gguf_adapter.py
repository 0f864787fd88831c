"""Write a folded adapter as a LoRA file for llama.cpp.

llama.cpp names tensors its own way (`blk.0.attn_q.weight.lora_a`), and for the Llama family it keeps the rows of the
query and key projections in another order, which is an order of B's rows.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import torch
from torch import Tensor

from mm_moslora.adapters.folder_format import PlainPair
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.run_paths import writing


class Family(NamedTuple):
    """A family of language models as llama.cpp has it."""

    architecture: gguf.MODEL_ARCH
    pairs_rows: bool = False
    """Whether llama.cpp keeps the rows of query and key projections in another order."""
    adapters_only: bool = False
    """Whether adapters are exported and whole models are not."""


FAMILIES = {
    "llama": Family(gguf.MODEL_ARCH.LLAMA, pairs_rows=True),
    "mistral": Family(gguf.MODEL_ARCH.LLAMA, pairs_rows=True),
    "qwen2": Family(gguf.MODEL_ARCH.QWEN2),
    "qwen3": Family(gguf.MODEL_ARCH.QWEN3),
    "phi3": Family(gguf.MODEL_ARCH.PHI3, adapters_only=True),
    "gemma2": Family(gguf.MODEL_ARCH.GEMMA2, adapters_only=True),
}
"""By transformers' model_type of the language model."""


def write_gguf(out: Path, pairs: Mapping[str, PlainPair], model_config: Mapping[str, Any]) -> Path:
    """Write the file.

    Args:
        out: the .gguf file.
        pairs: folded factors by module path, the scaling in B; the paths are those of the language model, a component
            such as `model.language_model` in front is dropped.
        model_config: the configuration of the language model, or of the model around it.

    Raises:
        AdapterError: an architecture or a module that llama.cpp's naming does not cover.
        OSError: see `write_file`.
    """
    model_config = model_config.get("text_config", model_config)
    kind = str(model_config.get("model_type"))
    if kind not in FAMILIES:
        raise AdapterError(
            f"model_type {kind!r} is not covered, expected one of {', '.join(sorted(FAMILIES))}. Export with "
            "layout='peft' and use llama.cpp's convert_lora_to_gguf.py."
        )
    architecture = FAMILIES[kind].architecture
    names = gguf.get_tensor_name_map(architecture, int(model_config["num_hidden_layers"]))
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    ranks = {len(pair.A) for pair in pairs.values()}
    if len(ranks) != 1:
        raise AdapterError(f"llama.cpp takes one rank per file, the adapter has {sorted(ranks)}. Merge it instead.")
    # llama.cpp scales by alpha over the rank it sees; s is in B already.
    writer.add_float32("adapter.lora.alpha", float(ranks.pop()))
    for path, pair in pairs.items():
        outside, layers, inside = path.partition("layers.")
        # A vision tower has layers of the same names.
        decoder = bool(layers) and not set(outside.split(".")) - {"", "model", "language_model"}
        name = names.get_name(f"model.layers.{inside}" if decoder else path)
        if name == "output" and model_config.get("tie_word_embeddings"):
            raise AdapterError(
                f"{path} is tied to the embedding (tie_word_embeddings), and llama.cpp has no head of its own for it "
                "to adapt. Leave it out of the targets, or merge."
            )
        if name is None:
            raise AdapterError(
                f"llama.cpp's language model has no module {path!r}. Leave it out of the targets, or merge."
            )
        B = in_row_order(pair.B, path, model_config)
        writer.add_tensor(f"{name}.weight.lora_a", pair.A.numpy())
        writer.add_tensor(f"{name}.weight.lora_b", B.contiguous().numpy())
    write_file(writer, out)
    return out


def write_file(writer: gguf.GGUFWriter, path: Path) -> None:
    """Write the content of a writer to a file, and read it back.

    Args:
        writer: made without a path.
        path: the file; folders above it are made if missing.

    Raises:
        OSError: it cannot be written, or is not whole.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            try:  # numpy does not hear of a full disk when it closes its buffer
                gguf.GGUFReader(part)
            except (ValueError, IndexError) as error:
                raise OSError(errno.ENOSPC, "it is not whole; the disk may be full") from error


def in_row_order(value: Tensor, module: str, config: Mapping[str, Any]) -> Tensor:
    """A weight, bias or factor B with its rows as llama.cpp has them.

    In the Llama family the rows of a head go from two halves (transformers' rotary layout) to pairs.

    Args:
        value: ``[rows, ...]``.
        module: path of its linear layer.
        config: of the language model; its model_type is one of `FAMILIES`.
    """
    if not (FAMILIES[config["model_type"]].pairs_rows and module.endswith(("q_proj", "k_proj"))):
        return value
    heads = int(config["num_attention_heads"])
    if module.endswith("k_proj"):
        heads = int(config.get("num_key_value_heads") or heads)
    return value[torch.arange(len(value)).view(heads, 2, -1).transpose(1, 2).reshape(-1)]
