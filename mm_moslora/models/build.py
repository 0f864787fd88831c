"""Assembly: from a recipe to a model, a processor and a table of what trains.

Read from top to bottom, it is the order of work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mm_moslora import adapters
from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.errors import ConfigError, ModelError
from mm_moslora.models.processor import IMAGE_TOKEN, build_processor, image_processor
from mm_moslora.models.projector import ProjectorShape, projector_class
from mm_moslora.models.vision import ImageSpec, load_vision
from mm_moslora.models.vlm import VlmConfig, VlmForConditionalGeneration, is_multimodal

LANGUAGE, VISION, PROJECTOR = "model.language_model", "model.vision_tower", "model.multi_modal_projector"
"""Module paths of the components inside the assembled model."""


@dataclass(kw_only=True)
class Assembly:
    """An assembled model and what goes with it."""

    model: PreTrainedModel
    """The base model; adapters, if any, sit inside it."""
    tokenizer: PreTrainedTokenizerBase
    """With the image token where there is a vision tower."""
    processor: LlavaProcessor | None = None
    """None for a language model alone."""
    image: ImageSpec | None = None
    """The vision tower's specification."""
    tokens_per_image: int = 0
    """Visual tokens after the projector."""
    peft_model: peft.PeftModel | None = None
    """The PEFT view of `model`, once adapters are in."""
    base: dict[str, Any] = field(default_factory=dict)
    """Where the base came from, for the adapter folder."""

    @property
    def image_token_id(self) -> int | None:
        """Vocabulary id of the image placeholder."""
        return self.model.config.image_token_id if is_multimodal(self.model) else None


def assemble(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> Assembly:
    """Load the parts and put them together, without adapters.

    Args:
        config: the recipe's `model`.
        dtype: dtype of every weight.

    Raises:
        ModelError: a part is unknown or does not fit.
    """
    language, tokenizer = load_language(config.language, config.language_revision, dtype=dtype)
    set_system_prompt(tokenizer, config.system_prompt)
    base = {"language": config.language, "language_revision": config.language_revision}
    if config.vision is None:
        return Assembly(model=language, tokenizer=tokenizer, base=base)
    tower, spec = load_vision(config.vision, dtype=dtype)
    kind = projector_class(config.projector.kind)
    shape = ProjectorShape(
        vision_width=spec.width,
        language_width=language.config.get_text_config().hidden_size,
        grid=spec.grid,
        shuffle=config.projector.shuffle,
    )
    tokens = kind.tokens(shape) + (1 if config.vision.select == "cls_patch" else 0)
    image_token_id = add_image_token(language, tokenizer)
    settings = _llava_settings(config.vision, spec, tower, language, image_token_id=image_token_id, tokens=tokens)
    standard = is_standard(config, spec, tower)
    if not standard and config.vision.select == "cls_patch":
        raise ModelError(
            "model.vision.select is cls_patch, which only a stock tower with CLS and the mlp2x_gelu projector offers. "
            "Use select: patch."
        )
    model = _compose(config, settings, shape, standard=standard, prefix=spec.prefix)
    projector = kind(shape).to(dtype)
    if config.projector.weights:
        load_projector(projector, Path(config.projector.weights))
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.multi_modal_projector = projector
    model.generation_config = language.generation_config
    processor = build_processor(tokenizer, spec, aspect=config.image_aspect, tokens_per_image=tokens, standard=standard)
    base |= {"vision": config.vision.name, "vision_revision": config.vision.revision}
    return Assembly(
        model=model.eval(), tokenizer=tokenizer, processor=processor, image=spec, tokens_per_image=tokens, base=base
    )


def is_standard(config: ModelConfig, spec: ImageSpec, tower: PreTrainedModel) -> bool:
    """Whether stock transformers can express the model as `LlavaForConditionalGeneration`."""
    from mm_moslora.models.vision import WrappedVisionModel

    return config.projector.kind == "mlp2x_gelu" and not isinstance(tower, WrappedVisionModel) and spec.prefix in (0, 1)


def load_language(
    name: str, revision: str | None, *, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model with its tokenizer.

    Raises:
        ModelError: nothing there, or not a causal language model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
        language = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.language is {name!r}, which does not load as a causal language model: {error}"
        ) from error
    _refuse_head_extras(language, name)
    sane_generation_config(language)
    return language, tokenizer


def set_system_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | None) -> None:
    """Make a system prompt the default of a tokenizer's chat template, so that whoever renders it uses it.

    Args:
        tokenizer: with a chat template that knows system messages; changed in place.
        prompt: None leaves the template alone.

    Raises:
        ModelError: there is no chat template to put it into.
    """
    if prompt is None:
        return
    if tokenizer.chat_template is None:
        raise ModelError("model.system_prompt is set, but the tokenizer has no chat template that could carry it.")
    default = json.dumps({"role": "system", "content": prompt}, ensure_ascii=False)
    tokenizer.chat_template = (
        "{%- if messages and messages[0]['role'] != 'system' -%}"
        "{%- set messages = [" + default + "] + messages -%}"
        "{%- endif -%}" + str(tokenizer.chat_template)
    )


def sane_generation_config(model: PreTrainedModel) -> None:
    """Make the generation settings savable: sampling values without sampling are refused at save time, hours later."""
    settings = model.generation_config
    if settings is not None and not settings.do_sample:
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            if getattr(settings, name, None) is not None:
                setattr(settings, name, None)


def _refuse_head_extras(language: PreTrainedModel, name: str) -> None:
    """LLaVA's head is one linear layer; a model that does more after it would be silently wrong."""
    text = language.config.get_text_config()
    extras = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
    for key, neutral in extras.items():
        value = getattr(text, key, None)
        if value is not None and value != neutral:
            raise ModelError(
                f"{name!r} ({text.model_type}) applies {key}={value} after its head, which the LLaVA composition "
                "lacks. Choose another language model."
            )
    head = language.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise ModelError(f"{name!r} ({text.model_type}) has no plain linear head without bias. Choose another model.")


def add_image_token(language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Give the tokenizer an image token and the embedding table a row for it.

    The row is the mean of all others: it is never looked up (visual tokens take its place) and its logit never wins.
    """
    token_id = register_image_token(tokenizer)
    old = int(cast(Any, language.get_input_embeddings()).weight.shape[0])
    if token_id >= old:
        language.resize_token_embeddings(token_id + 1, mean_resizing=False)
        tables = {language.get_input_embeddings().weight, language.get_output_embeddings().weight}
        with torch.no_grad():
            for table in tables:
                table[old:] = table[:old].float().mean(dim=0).to(table.dtype)
    return token_id


def register_image_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Put the image token into a tokenizer's vocabulary and return its id."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return int(cast(int, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)))


@dataclass(frozen=True, kw_only=True)
class TextAndImages:
    """What turns records into tensors: all that data preparation needs of a model, without its language weights."""

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int | None = None
    tokens_per_image: int = 0
    image_processor: Any = None


def text_and_images(config: ModelConfig) -> TextAndImages:
    """Load tokenizer and image processor of a recipe's model, but not the language model.

    Raises:
        ModelError: a part is unknown.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.language, revision=config.language_revision)
        language = AutoConfig.from_pretrained(config.language, revision=config.language_revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.language is {config.language!r}, which does not load: {error}") from error
    set_system_prompt(tokenizer, config.system_prompt)
    if config.vision is None:
        return TextAndImages(tokenizer=tokenizer)
    _, spec = load_vision(config.vision)
    shape = ProjectorShape(
        vision_width=spec.width,
        language_width=language.get_text_config().hidden_size,
        grid=spec.grid,
        shuffle=config.projector.shuffle,
    )
    tokens = projector_class(config.projector.kind).tokens(shape) + (config.vision.select == "cls_patch")
    return TextAndImages(
        tokenizer=tokenizer,
        image_token_id=register_image_token(tokenizer),
        tokens_per_image=tokens,
        image_processor=image_processor(spec, config.image_aspect),
    )


def _llava_settings(
    vision: VisionConfig,
    spec: ImageSpec,
    tower: PreTrainedModel,
    language: PreTrainedModel,
    *,
    image_token_id: int,
    tokens: int,
) -> dict[str, Any]:
    drop_prefix = vision.select == "patch" and spec.prefix > 0
    return {
        "vision_config": tower.config,
        "text_config": language.config.get_text_config(),
        "image_token_index": image_token_id,
        "image_seq_length": tokens,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default" if drop_prefix else "full",
        "tie_word_embeddings": bool(language.config.get_text_config().tie_word_embeddings),
    }


def _compose(
    config: ModelConfig, settings: dict[str, Any], shape: ProjectorShape, *, standard: bool, prefix: int
) -> PreTrainedModel:
    """The empty shell: every module on the meta device, to be replaced by the loaded parts."""
    with torch.device("meta"):
        if standard:
            return LlavaForConditionalGeneration(LlavaConfig(**settings))
        return VlmForConditionalGeneration(
            VlmConfig(
                **settings,
                projector_kind=config.projector.kind,
                projector_shuffle=config.projector.shuffle,
                vision_width=shape.vision_width,
                vision_grid=shape.grid,
                vision_prefix=prefix,
            )
        )


def load_projector(projector: nn.Module, weights: Path) -> None:
    """Load `projector.safetensors`.

    Raises:
        ModelError: no such file, or it was made for other widths.
    """
    if not weights.is_file():
        raise ModelError(f"model.projector.weights is {str(weights)!r}, which does not exist.")
    state, own = load_file(weights), projector.state_dict()
    wrong = [
        f"{key}: file {list(state[key].shape) if key in state else 'lacks it'}, model "
        f"{list(own[key].shape) if key in own else 'lacks it'}"
        for key in sorted(state.keys() | own.keys())
        if key not in state or key not in own or state[key].shape != own[key].shape
    ]
    if wrong:
        raise ModelError(
            f"{weights} does not fit this model's projector ({'; '.join(wrong[:4])}). It belongs to another vision "
            "tower, language model or projector kind."
        )
    projector.load_state_dict(state)


def attach_adapters(
    assembly: Assembly, config: ModelConfig, adapter: AdapterConfig, *, seed: int = 0
) -> peft.PeftModel | None:
    """Put MoSLoRA into the components whose mode is `adapter`, and set what trains everywhere else.

    Args:
        assembly: from `assemble`; its model is changed in place.
        config: the recipe's `model`.
        adapter: the recipe's `adapter`.
        seed: seeds the factors, so that every rank makes the same.

    Returns:
        The PEFT model, or None where no component carries adapters.
    """
    components = adapted_components(config)
    assembly.model.requires_grad_(False)
    if components:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            assembly.peft_model = adapters.add_moslora(
                assembly.model,
                moslora_config(adapter),
                component=components,
                targets=adapter.targets,
                # Factors live in the base's dtype; the engine keeps fp32 masters. PEFT's fp32 copies under a bf16 base
                # cost a third of the step.
                autocast_adapter_dtype=False,
            )
    _set_trainable(assembly, config)
    return assembly.peft_model


def adapted_components(config: ModelConfig) -> list[str]:
    """Module paths of the components that carry adapters; "" is the whole language model."""
    if config.vision is None:
        return [""] if config.language_mode == "adapter" else []
    modes = {LANGUAGE: config.language_mode, VISION: config.vision.mode}
    return [path for path, mode in modes.items() if mode == "adapter"]


def moslora_config(adapter: AdapterConfig) -> adapters.MoSLoRAConfig:
    """The PEFT configuration of a recipe's adapter."""
    return adapters.MoSLoRAConfig(
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),
        lora_dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        mixer_init=adapter.mixer_init,
        mixer_trainable=adapter.mixer_trainable,
        mixer_pattern=dict(adapter.mixer_pattern),
        rank_pattern=dict(adapter.rank_pattern),
        alpha_pattern=dict(adapter.alpha_pattern),
        task_type="CAUSAL_LM",
    )


def _set_trainable(assembly: Assembly, config: ModelConfig) -> None:
    model = assembly.model
    multimodal = is_multimodal(model)
    language = model.model.language_model if multimodal else model
    _train_component(language, config.language_mode, config.language_last_n, what="model.language")
    if multimodal and config.vision is not None:
        _train_component(model.model.vision_tower, config.vision.mode, config.vision.last_n, what="model.vision")
        if config.projector.mode == "full":
            model.model.multi_modal_projector.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "Nothing would train: the language model, the vision encoder and the projector are all frozen. "
            "Set model.language_mode, model.vision.mode or model.projector.mode."
        )


def _train_component(component: nn.Module, mode: str, last_n: int, *, what: str) -> None:
    if mode == "full":
        component.requires_grad_(True)
    elif mode == "last_n":
        blocks = _blocks(component)
        if last_n > len(blocks):
            raise ConfigError(f"{what}: last_n is {last_n}, but it has {len(blocks)} blocks.")
        for block in blocks[-last_n:]:
            block.requires_grad_(True)


def _blocks(component: nn.Module) -> list[nn.Module]:
    """The transformer blocks of a component: its longest module list."""
    lists = [module for module in component.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ConfigError("last_n needs a component with a list of blocks; this one has none. Use mode full.")
    return list(max(lists, key=lambda blocks: len(list(blocks))))


@dataclass(frozen=True, kw_only=True)
class ComponentRow:
    """One line of the table of what trains."""

    name: str
    total: int
    trainable: int


def component_table(assembly: Assembly) -> list[ComponentRow]:
    """Parameters and trainable parameters by component."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in assembly.model.named_parameters():
        groups.setdefault(component_of(name), []).append(parameter)
    return [
        ComponentRow(
            name=name,
            total=sum(_count(parameter) for parameter in parameters),
            trainable=sum(_count(parameter) for parameter in parameters if parameter.requires_grad),
        )
        for name, parameters in groups.items()
    ]


def component_of(name: str) -> str:
    """Which component a parameter belongs to: mixer, adapter, projector, vision or language."""
    if "lora_mixer" in name:
        return "mixer"
    if "lora_" in name:
        return "vision adapter" if "vision_tower" in name else "adapter"
    if "multi_modal_projector" in name:
        return "projector"
    return "vision" if "vision_tower" in name else "language"


def _count(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
