"""Export to GGUF for llama.cpp: the language model in one file, the CLIP tower and the projector (mmproj) in another.

Both files are read back. Weights are in fp32 or fp16; llama.cpp's `llama-quantize` makes the language model smaller.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from mm_moslora.models.assembly import Parts
from mm_moslora.models.vlm import VlmForConditionalGeneration, is_multimodal
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.files import replacing
from mm_moslora.utils.run_paths import writing
from mm_moslora.utils.untrusted_data import parse_json


class GgufFamily(NamedTuple):
    """A family of language models as llama.cpp has it."""

    architecture: gguf.MODEL_ARCH
    pairs_rows: bool = False
    """Whether llama.cpp keeps the rows of query and key projections in another order."""


FAMILIES = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, pairs_rows=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, pairs_rows=True),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3),
}
"""By transformers' model_type of the language model."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {_WORDS + r"\p{N}{1,3}" + _REST: "llama-bpe", _WORDS + r"\p{N}" + _REST: "qwen2"}
"""How a byte-level tokenizer cuts a text into words, and llama.cpp's name for it."""
_NORMAL, _CONTROL, _USER_DEFINED = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


@dataclass(frozen=True, kw_only=True)
class GgufFiles:
    """What was written."""

    text: Path
    mmproj: Path | None
    """None for a language model alone."""
    largest_difference: float
    """Between the model's tensors and the files', read back; fp16 files round."""


def export_gguf(assembly: Parts, folder: Path, *, half: bool = False) -> GgufFiles:
    """Write `model.gguf` of a merged model, if it sees `mmproj.gguf`; `half`: fp16 matrices and fp32 vectors."""
    refuse_gguf(assembly)
    text, sees = dict(_text_tensors(assembly.model)), is_multimodal(assembly.model)
    with new_folder(folder) as part:
        _write(part / "model.gguf", _text_metadata(assembly), text, half=half)
        difference = _difference(part / "model.gguf", text)
        if sees:
            vision = dict(_vision_tensors(assembly.model))
            _write(part / "mmproj.gguf", _vision_metadata(assembly), vision, half=half)
            difference = max(difference, _difference(part / "mmproj.gguf", vision))
    return GgufFiles(
        text=folder / "model.gguf", mmproj=folder / "mmproj.gguf" if sees else None, largest_difference=difference
    )


def refuse_gguf(assembly: Parts) -> None:
    """Refuse a model that llama.cpp cannot hold."""
    if reason := _why_not(assembly):
        raise ModelError(reason)


def _why_not(assembly: Parts) -> str | None:
    model, nearest = assembly.model, "Export with --to hf, and see whether llama.cpp's own converter knows this family."
    text: Any = model.config.get_text_config()
    if text.model_type not in FAMILIES:
        return f"The GGUF export knows {', '.join(FAMILIES)}, not {text.model_type}. {nearest}"
    if (rope := _rope(text)["rope_type"]) not in ("default", "llama3"):
        return f"The GGUF export knows plain and llama3 rotary embeddings, not {rope}. {nearest}"
    if _pre_tokenizer(assembly.tokenizer) is None:
        return (
            "The GGUF export writes byte-level BPE vocabularies that cut text into words as GPT-2, SmolLM, Llama 3 or "
            f"Qwen do, and this one does not. {nearest}"
        )
    if not is_multimodal(model):
        return None
    nearest = "Export with --to hf for transformers, or tune parts that llama.cpp holds (mm-moslora init --parts gguf)."
    if not isinstance(model, LlavaForConditionalGeneration) or isinstance(model, VlmForConditionalGeneration):
        return f"llama.cpp's LLaVA holds one CLIP tower and mlp2x_gelu, not {type(model).__name__}. {nearest}"
    config: Any = model.config
    if config.vision_config.model_type != "clip_vision_model":
        return f"llama.cpp's LLaVA takes CLIP towers only, this one is {config.vision_config.model_type}. {nearest}"
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_select_strategy != "default":
        return f"llama.cpp's LLaVA reads the patches of one feature layer, without CLS. {nearest}"
    return None


def _pre_tokenizer(tokenizer: Any) -> str | None:
    """llama.cpp's name for how a tokenizer cuts text into words; None where it is no byte-level BPE or has no name."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    whole = parse_json(backend.to_str()) if backend is not None else {"model": {}}
    first = whole.get("pre_tokenizer") or {}
    steps = first.get("pretokenizers", [first])
    last = steps[-1]
    if whole["model"].get("type") != "BPE" or last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    before = [step["type"] for step in steps[:-1]]
    if last.get("use_regex", True):
        if before == ["Digits"] and steps[0]["individual_digits"]:
            return "smollm"
        return None if before else "gpt-2"
    return _SPLITS.get(steps[0]["pattern"].get("Regex", "")) if before == ["Split"] else None


def _rope(text: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10_000.0} | dict(getattr(text, "rope_parameters", None) or {})


def _text_metadata(assembly: Parts) -> gguf.GGUFWriter:
    text: Any = assembly.model.config.get_text_config()
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[FAMILIES[text.model_type].architecture])
    head = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    writer.add_name("mm_moslora export")
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(float(_rope(text)["rope_theta"]))
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(text.vocab_size)
    _add_vocabulary(writer, assembly.tokenizer, text.vocab_size)
    return writer


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: Any, size: int) -> None:
    """Tokens by id, what they are, and the merges of a byte-level BPE."""
    model = parse_json(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    kinds = [
        _CONTROL if added.get(n, n not in by_id) else _USER_DEFINED if n in added else _NORMAL for n in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pre_tokenizer(tokenizer) or "")
    writer.add_token_list([by_id.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    for number, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id), (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):  # fmt: skip
        if number is not None:
            add(number)
    writer.add_add_bos_token(
        tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
    )
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _text_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's names and tensors of the language model."""
    text: Any = model.config.get_text_config()
    names = gguf.get_tensor_name_map(FAMILIES[text.model_type].architecture, text.num_hidden_layers)
    decoder: Any = model.get_decoder()
    state = {f"model.{name}": value for name, value in decoder.state_dict().items()}
    head: Any = model.get_output_embeddings()
    if not text.tie_word_embeddings:
        state["lm_head.weight"] = head.weight
    for path, tensor in state.items():
        name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelError(f"llama.cpp has no name for {path!r}. Export with --to hf instead.")
        yield name, _in_row_order(tensor.detach(), path.rpartition(".")[0], text)
    if _rope(text)["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_factors(text)


def _llama3_factors(text: Any) -> Tensor:
    """By how much Llama 3 slows every rotary frequency down (llama.cpp divides by these)."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    head = int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    plain = 1.0 / _rope(text)["rope_theta"] ** (torch.arange(0, head, 2).float() / head)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](text, torch.device("cpu"))
    return plain / scaled


def _vision_metadata(assembly: Parts) -> gguf.GGUFWriter:
    config: Any = assembly.model.config
    vision = config.vision_config
    writer = gguf.GGUFWriter(None, "clip")
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_projection_dim(config.get_text_config().hidden_size)
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_vision_block_count(_layers_used(config))
    writer.add_array("clip.vision.feature_layer", [_layers_used(config)])
    writer.add_vision_use_gelu(vision.hidden_act != "quick_gelu")
    images = assembly.processor.image_processor
    writer.add_vision_image_mean([float(value) for value in images.image_mean])
    writer.add_vision_image_std([float(value) for value in images.image_std])
    return writer


def _layers_used(config: Any) -> int:
    """The file ends with the feature layer. It must be named, too: llama.cpp leaves out the last layer otherwise."""
    count, layer = config.vision_config.num_hidden_layers, config.vision_feature_layer
    return int(layer if layer >= 0 else count + 1 + layer)


def _vision_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    config: Any = model.config
    used = _layers_used(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, used)
    inner: Any = model.model
    for name, value in inner.vision_tower.state_dict().items():
        layer = re.search(r"encoder\.layers\.(\d+)\.", name)
        if name.startswith("post_layernorm") or (layer and int(layer[1]) >= used):
            continue
        path = f"vision_tower.vision_model.{name}"
        gguf_name = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ModelError(f"llama.cpp has no name for {path!r}. Export with --to llava instead.")
        yield gguf_name, value.detach()
    for name, value in inner.multi_modal_projector.state_dict().items():
        layer_name, _, kind = name.partition(".")
        yield f"{_PROJECTOR[layer_name]}.{kind}", value.detach()


def _write(path: Path, writer: gguf.GGUFWriter, tensors: Mapping[str, Tensor], *, half: bool) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if half else gguf.LlamaFileType.ALL_F32)
    for name, value in tensors.items():
        matrix = value.ndim > 1 and "position_embd" not in name
        writer.add_tensor(name, value.float().cpu().numpy().astype(np.float16 if half and matrix else np.float32))
    with writing(path), replacing(path) as part:
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        try:  # numpy does not hear of a full disk when it closes its buffer
            gguf.GGUFReader(part)
        except (ValueError, IndexError) as error:
            raise OSError(errno.ENOSPC, "it is not whole; the disk may be full") from error


def _difference(path: Path, tensors: Mapping[str, Tensor]) -> float:
    """Largest difference between tensors and what a file holds under their names."""
    written = {tensor.name: np.asarray(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    largest = 0.0
    for name, value in tensors.items():
        if name not in written or written[name].size != value.numel():
            raise ModelError(f"{path} lost the tensor {name!r}. Do not use it.")
        stored = written[name].astype(np.float32).reshape(tuple(value.shape))
        largest = max(largest, float(np.abs(stored - value.float().cpu().numpy()).max()))
    return largest


def _in_row_order(value: Tensor, module: str, text: Any) -> Tensor:
    """A weight or bias with llama.cpp's rows: of a Llama head in pairs, not in transformers' two rotary halves."""
    if not (FAMILIES[text.model_type].pairs_rows and module.endswith(("q_proj", "k_proj"))):
        return value
    heads = text.num_key_value_heads if module.endswith("k_proj") else text.num_attention_heads
    return value[torch.arange(len(value)).view(heads, 2, -1).transpose(1, 2).reshape(-1)]
