"""Assembly: from a recipe to a model and a processor.

Read from top to bottom, it is the order of work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
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
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import ModelConfig, Thinking, VisionConfig
from mm_moslora.config.llava_chat_templates import set_chat_template
from mm_moslora.models.decoding.generation import stop_token_ids
from mm_moslora.models.pretrained_vlm import load_pretrained_processor, load_pretrained_vlm, pretrained_image_token
from mm_moslora.models.processing.anyres import NEWLINE, anyres_processor, compose_anyres, newline_of, require_anyres
from mm_moslora.models.processing.image_processing import ProcessorImageProcessing, SquareImageProcessing
from mm_moslora.models.processing.llava_processor import IMAGE_TOKEN, build_processor, image_processor
from mm_moslora.models.projectors.projector import build_projector, projector_tokens
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.vision.dual_tower import FusedVisionModel
from mm_moslora.models.vision.timm_open_clip_tower import WrappedVisionModel
from mm_moslora.models.vision.vision_tower import ImageSpec, load_vision
from mm_moslora.models.vlm import VlmConfig, VlmForConditionalGeneration, has_own_forward, is_multimodal
from mm_moslora.utils.errors import ModelError, reason_of
from mm_moslora.utils.package_requirements import install_command, is_installed
from mm_moslora.utils.run_paths import require_model, require_projector


@dataclass(kw_only=True)
class Assembly:
    """An assembled model and what goes with it."""

    model: PreTrainedModel
    """The base model; adapters, if any, sit inside it."""
    tokenizer: PreTrainedTokenizerBase
    """With the image token where there is a vision tower."""
    processor: Any = None
    """None for a language model alone."""
    is_pretrained_vlm: bool = False
    """Whether conversations take the form of the processor's own chat template."""
    image: ImageSpec | None = None
    """The vision tower's specification, where the assembly is ours."""
    tokens_per_image: int = 0
    """Visual tokens of a picture; of a ready-made model, of one of 448 x 448 pixels."""
    peft_model: peft.PeftModel | None = None
    """The PEFT view of `model`, once adapters are in."""
    base: dict[str, Any] = field(default_factory=dict)
    """Where the base came from, for the adapter folder."""
    thinking: Thinking = "auto"
    """The recipe's `model.thinking`."""
    changed: bool = False
    """Whether weights besides the adapter are other ones than `base` names."""

    @property
    def image_token_id(self) -> int | None:
        """Vocabulary id of the image placeholder."""
        return self.model.config.image_token_id if is_multimodal(self.model) else None

    @property
    def template_processor(self) -> Any:
        """The processor of a ready-made model, whose chat template then counts; else None."""
        return self.processor if self.is_pretrained_vlm else None

    @cached_property
    def image_processing(self) -> ImageProcessing | None:
        """What turns pictures into tensors; None for a language model alone."""
        if self.processor is None or self.image_token_id is None:
            return None
        if self.is_pretrained_vlm or has_own_forward(self.model):
            return ProcessorImageProcessing(self.processor, image_token_id=self.image_token_id)
        return SquareImageProcessing(
            self.processor.image_processor, image_token_id=self.image_token_id, tokens=self.tokens_per_image
        )


def assemble(config: ModelConfig, *, dtype: torch.dtype = torch.float32) -> Assembly:
    """Load the parts and put them together, without adapters.

    Args:
        config: the recipe's `model`.
        dtype: dtype of every weight.

    Raises:
        ModelError: a part is unknown or does not fit.
    """
    require_model("model.language", config.language)
    require_model("model.vlm", config.vlm)
    if config.vlm is not None:
        return _assemble_ready(config, dtype=dtype)
    assert config.language is not None
    language, tokenizer = load_language(
        config.language, config.language_revision, dtype=dtype, quantisation=config.quantisation
    )
    set_chat_template(tokenizer, config.chat_template, faithful=config.faithful)
    if config.chat_template is not None and language.generation_config is not None:
        language.generation_config.eos_token_id = stop_token_ids(language, tokenizer.eos_token_id)
    set_system_prompt(tokenizer, config.system_prompt)
    base = {"language": config.language, "language_revision": config.language_revision}
    if config.vision is None:
        return Assembly(model=language, tokenizer=tokenizer, base=base, thinking=config.thinking)
    tower, spec = load_vision(config.vision, dtype=dtype)
    shape = projector_shape(config, spec, language.config)
    tokens = projector_tokens(config.projector.kind, shape) + (1 if config.vision.select == "cls_patch" else 0)
    image_token_id = add_image_token(language, tokenizer)
    settings = llava_settings(config.vision, spec, tower, language.config, image_token_id=image_token_id, tokens=tokens)
    standard = is_standard(config, spec, tower)
    if not standard and config.vision.select == "cls_patch":
        raise ModelError(
            "model.vision.select is cls_patch, which only a stock tower with CLS and the mlp2x_gelu projector offers. "
            "Use select: patch."
        )
    if config.image_aspect == "anyres":
        require_anyres(config, spec, tower, standard=standard)
        model = compose_anyres(config, settings, spec, dtype=dtype)
    else:
        model = compose(config, settings, shape, standard=standard, prefix=spec.prefix)
    projector = build_projector(config.projector.kind, shape).to(dtype)
    if config.projector.weights:
        load_projector(projector, Path(config.projector.weights), newline=newline_of(model))
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.multi_modal_projector = projector
    model.generation_config = language.generation_config
    processor = _processor(config, tokenizer, spec, tokens=tokens, standard=standard)
    base |= {"vision": config.vision.name, "vision_revision": config.vision.revision}
    return Assembly(
        thinking=config.thinking,
        model=model.eval(),
        tokenizer=tokenizer,
        processor=processor,
        image=spec,
        tokens_per_image=tokens,
        base=base,
    )


def _processor(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, spec: ImageSpec, *, tokens: int, standard: bool
) -> Any:
    if config.image_aspect == "anyres":
        return anyres_processor(tokenizer, spec, config.anyres_tiles)
    return build_processor(tokenizer, spec, aspect=config.image_aspect, tokens_per_image=tokens, standard=standard)


def _assemble_ready(config: ModelConfig, *, dtype: torch.dtype) -> Assembly:
    assert config.vlm is not None
    model, processor = load_pretrained_vlm(config.vlm, config.vlm_revision, dtype=dtype)
    set_system_prompt(processor, config.system_prompt)
    savable_generation_config(model)
    base = {"vlm": config.vlm, "vlm_revision": config.vlm_revision}
    return ready_assembly(model, processor, base=base, thinking=config.thinking)


def ready_assembly(
    model: PreTrainedModel, processor: Any, *, base: dict[str, Any], thinking: Thinking = "auto"
) -> Assembly:
    """A loaded ready-made model with its processor."""
    assembly = Assembly(
        model=model.eval(), tokenizer=processor.tokenizer, processor=processor, is_pretrained_vlm=True, base=base,
        thinking=thinking,
    )  # fmt: skip
    assert assembly.image_processing is not None
    assembly.tokens_per_image = len(assembly.image_processing.placeholders([(448, 448)])[0])
    return assembly


def is_standard(config: ModelConfig, spec: ImageSpec, tower: PreTrainedModel) -> bool:
    """Whether stock transformers can express the model as `LlavaForConditionalGeneration`."""
    ours = isinstance(tower, WrappedVisionModel | FusedVisionModel)
    return config.projector.kind == "mlp2x_gelu" and not ours and spec.prefix in (0, 1)


def load_language(
    name: str, revision: str | None, *, dtype: torch.dtype, quantisation: str = "none"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load any causal language model with its tokenizer.

    Raises:
        ModelError: nothing there, or not a causal language model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        language = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            quantization_config=_quantisation(quantisation, dtype),
            trust_remote_code=False,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"model.language is {name!r}, which does not load as a causal language model: {reason_of(error)}."
        ) from error
    _refuse_head_extras(language, name)
    savable_generation_config(language)
    return language, tokenizer


def _quantisation(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if kind == "none":
        return None
    if not is_installed("bitsandbytes"):
        raise ModelError(
            f"model.quantisation is {kind}, which needs bitsandbytes. Run: {install_command('bitsandbytes')}"
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def set_system_prompt(tokenizer: Any, prompt: str | None) -> None:
    """Make a system prompt the default of a chat template, so that whoever renders it uses it.

    Args:
        tokenizer: a tokenizer or processor with a chat template that knows system messages; changed in place.
        prompt: None leaves the template alone.

    Raises:
        ModelError: there is no chat template to put it into.
    """
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
    template_processor: Any = None
    """Of a ready-made model, whose chat template then counts."""
    image_processing: ImageProcessing | None = None
    """None for a language model alone."""
    thinking: Thinking = "auto"
    """The recipe's `model.thinking`."""


def text_and_images(config: ModelConfig) -> TextAndImages:
    """Load tokenizer and image processor of a recipe's model, but not the language model.

    Raises:
        ModelError: a part is unknown.
    """
    if config.vlm is not None:
        return _ready_text_and_images(config)
    assert config.language is not None
    require_model("model.language", config.language)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            config.language, revision=config.language_revision, trust_remote_code=False
        )
        language = AutoConfig.from_pretrained(
            config.language, revision=config.language_revision, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.language is {config.language!r}, which does not load: {reason_of(error)}.") from error
    set_chat_template(tokenizer, config.chat_template, faithful=config.faithful)
    set_system_prompt(tokenizer, config.system_prompt)
    if config.vision is None:
        return TextAndImages(tokenizer=tokenizer, thinking=config.thinking)
    _, spec = load_vision(config.vision)
    shape = projector_shape(config, spec, language)
    tokens = projector_tokens(config.projector.kind, shape) + (config.vision.select == "cls_patch")
    token = register_image_token(tokenizer)
    if config.image_aspect == "anyres":
        processor = anyres_processor(tokenizer, spec, config.anyres_tiles)
        return TextAndImages(
            thinking=config.thinking,
            tokenizer=tokenizer,
            image_token_id=token,
            tokens_per_image=tokens,
            image_processor=processor.image_processor,
            image_processing=ProcessorImageProcessing(processor, image_token_id=token),
        )
    images = image_processor(spec, config.image_aspect)
    return TextAndImages(
        thinking=config.thinking,
        tokenizer=tokenizer,
        image_token_id=token,
        tokens_per_image=tokens,
        image_processor=images,
        image_processing=SquareImageProcessing(images, image_token_id=token, tokens=tokens),
    )


def _ready_text_and_images(config: ModelConfig) -> TextAndImages:
    assert config.vlm is not None
    processor = load_pretrained_processor(config.vlm, config.vlm_revision)
    set_system_prompt(processor, config.system_prompt)
    token = pretrained_image_token(config.vlm, config.vlm_revision, processor)
    image_processing = ProcessorImageProcessing(processor, image_token_id=token)
    return TextAndImages(
        thinking=config.thinking,
        tokenizer=processor.tokenizer,
        image_token_id=token,
        tokens_per_image=len(image_processing.placeholders([(448, 448)])[0]),
        image_processor=processor.image_processor,
        template_processor=processor,
        image_processing=image_processing,
    )


def projector_shape(config: ModelConfig, spec: ImageSpec, language: PreTrainedConfig) -> ProjectorShape:
    """What a recipe's projector joins."""
    return ProjectorShape(
        vision_width=spec.width,
        language_width=language.get_text_config().hidden_size,
        grid=spec.grid,
        shuffle=config.projector.shuffle,
        queries=config.projector.queries,
        depth=config.projector.depth,
    )


def llava_settings(
    vision: VisionConfig,
    spec: ImageSpec,
    tower: PreTrainedModel,
    language: PreTrainedConfig,
    *,
    image_token_id: int,
    tokens: int,
) -> dict[str, Any]:
    """Keys of `LlavaConfig`, and of ours, for these parts."""
    drop_prefix = vision.select == "patch" and spec.prefix > 0
    return {
        "vision_config": tower.config,
        "text_config": language.get_text_config(),
        "image_token_index": image_token_id,
        "image_seq_length": tokens,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default" if drop_prefix else "full",
        "tie_word_embeddings": bool(language.get_text_config().tie_word_embeddings),
    }


def compose(
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
                projector_queries=config.projector.queries,
                projector_depth=config.projector.depth,
                vision_width=shape.vision_width,
                vision_grid=shape.grid,
                vision_prefix=prefix,
            )
        )


def load_projector(projector: nn.Module, weights: Path, *, newline: nn.Parameter | None = None) -> None:
    """Load `projector.safetensors`.

    Args:
        projector: changed in place.
        weights: the file, or a folder that has it; see `require_projector`.
        newline: the newline embedding of an anyres model; left as it is where the file, made without tiles, has none.

    Raises:
        ModelError: no such file, or it was made for other widths.
    """
    state, own = load_file(require_projector(weights)), projector.state_dict()
    stored = state.pop(NEWLINE, None)
    if newline is not None and stored is not None:
        newline.data.copy_(stored)
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
