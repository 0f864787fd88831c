"""The language model of an assembled one: loading, its chat template, and the row of the image token."""

from __future__ import annotations

import copy
import json
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mm_moslora.config import ModelConfig
from mm_moslora.config.llava_chat_templates import set_chat_template
from mm_moslora.models.decoding.generation import stop_token_ids
from mm_moslora.models.memory_efficient.loss_head import head_form
from mm_moslora.models.model_sizes import base_sizes, load_base, packing, sizes_of
from mm_moslora.models.processing.llava_processor import IMAGE_TOKEN
from mm_moslora.utils.errors import ModelError, reason_of

Weights = Literal["all", "none", "shapes"]
"""How much of a model is loaded; see `mm_moslora.models.assembly.load_parts`."""


class LanguageModel(NamedTuple):
    """The language model of an assembled one, as far as it is loaded."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    """Absent where shapes alone are loaded."""
    model: PreTrainedModel | None = None

    def add_image_token(self) -> int:
        """Its number; without a tokenizer the last one of the vocabulary stands for it."""
        if self.tokenizer is None:
            return int(self.config.vocab_size) - 1
        token = register_image_token(self.tokenizer)
        if self.model is not None:
            add_embedding_row(self.model, token)
        return token


def language_model(
    config: ModelConfig, *, weights: Weights, dtype: torch.dtype, device: torch.device | None
) -> LanguageModel:
    """Load the recipe's language model, or as much of it as is needed; see `mm_moslora.models.assembly.load_parts`."""
    assert config.language is not None
    name, revision = config.language, config.language_revision
    if weights == "shapes":
        text = copy.deepcopy(base_sizes(config).get_text_config())
        alone = AutoModelForCausalLM.from_config(text, trust_remote_code=False) if config.vision is None else None
        return LanguageModel(text, cast(Any, None), alone)
    if weights == "all":
        model, tokenizer = load_language(name, revision, dtype=dtype, quantisation=config.quantisation, device=device)
        language = LanguageModel(model.config, tokenizer, model)
    else:
        try:
            tokenizer = _tokenizer(name, revision)
            config_only = sizes_of(name, revision, key="model.language")
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"model.language is {name!r}, which does not load: {reason_of(error)}.") from error
        language = LanguageModel(config_only, tokenizer)
    set_chat_template(language.tokenizer, config.chat_template, faithful=config.faithful)
    if language.model is not None and config.chat_template is not None and language.model.generation_config is not None:
        stops = stop_token_ids(language.model, language.tokenizer.eos_token_id)
        language.model.generation_config.eos_token_id = stops
    set_system_prompt(language.tokenizer, config.system_prompt)
    return language


def _tokenizer(name: str, revision: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer that has a vocabulary; without any file, some classes of transformers make an empty one."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ValueError("its tokenizer has no vocabulary; put the tokenizer's files into its folder")
    return cast(PreTrainedTokenizerBase, tokenizer)


def load_language(
    name: str,
    revision: str | None,
    *,
    dtype: torch.dtype,
    quantisation: str = "none",
    device: torch.device | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model with its tokenizer; `device` as for `load_parts`."""
    try:
        tokenizer = _tokenizer(name, revision)
        language = load_base(
            AutoModelForCausalLM, name, revision=revision, dtype=dtype, device_map=device,
            quantization_config=packing(quantisation, dtype),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model.language is {name!r}, which does not load as a causal language model: {reason_of(error)}."
        ) from error
    refuse_head_extras(language, name)
    savable_generation_config(language)
    return language, tokenizer


def set_system_prompt(tokenizer: Any, prompt: str | None) -> None:
    """Make a system prompt the default of a chat template, in place, so that whoever renders it uses it."""
    if prompt is None:
        return
    if not isinstance(tokenizer.chat_template, str):
        raise ModelError("model.system_prompt is set, but the model has no chat template that could carry it.")
    parts = hasattr(tokenizer, "image_processor")  # processors take contents in parts
    content: Any = [{"type": "text", "text": prompt}] if parts else prompt
    default = json.dumps({"role": "system", "content": content}, ensure_ascii=False)
    tokenizer.chat_template = (
        "{%- if messages and messages[0]['role'] != 'system' -%}"
        "{%- set messages = [" + default + "] + messages -%}"
        "{%- endif -%}" + str(tokenizer.chat_template)
    )


def savable_generation_config(model: PreTrainedModel) -> None:
    """Make the generation settings savable: sampling values without sampling are refused at save time, hours later."""
    settings = model.generation_config
    if settings is not None and not settings.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)


def refuse_head_extras(language: PreTrainedModel, name: str) -> None:
    """Refuse a model that does more behind its head, or has no plain one: LLaVA's head is one linear layer."""
    kind = language.config.get_text_config().model_type
    head = language.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{name!r} ({kind}) has no plain linear head without bias. Choose another model.")
    if not (form := head_form(language, name)).is_plain:
        raise ModelError(
            f"{name!r} ({kind}) computes more than its head's product ({form}), which the LLaVA composition lacks. "
            "Choose another language model."
        )


def add_embedding_row(language: PreTrainedModel, token_id: int) -> None:
    """Give the image token a row, the mean of all others: it is never looked up, and its logit never wins."""
    first = cast(nn.Parameter, language.get_input_embeddings().weight)
    old, device = first.shape[0], first.device
    if token_id < old:
        return
    # transformers draws the rows that are set here. On the CPU, so that its generator moves as far for every device.
    _move_tables(language, torch.device("cpu"))
    language.resize_token_embeddings(token_id + 1, mean_resizing=False)
    if device.type != "meta":
        with torch.no_grad():
            for table in {language.get_input_embeddings().weight, language.get_output_embeddings().weight}:
                table[old:] = table[:old].float().mean(dim=0).to(table.dtype)
    _move_tables(language, device)


def _move_tables(language: PreTrainedModel, device: torch.device) -> None:
    """Move the embedding table and the head; from the meta device without values."""
    for owner in cast(list[nn.Module], [language.get_input_embeddings(), language.get_output_embeddings()]):
        if cast(Tensor, owner.weight).is_meta:
            owner.to_empty(device=device)
        else:
            owner.to(device)
    language.tie_weights()  # the meta device makes other parameters


def register_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Put the image token into a tokenizer's vocabulary and return its id."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return int(cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))
