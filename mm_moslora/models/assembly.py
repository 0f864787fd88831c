"""The one way from a recipe's `model` to a model, or to its parts: `load_parts`, the order of work from the top."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import peft
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mm_moslora.adapters.layers.base_weights import stop_repacking
from mm_moslora.batch import ImageProcessing
from mm_moslora.config import BoxChoice, BoxFormName, ModelConfig, Thinking, VisionConfig
from mm_moslora.config.llava_chat_templates import note_thinking
from mm_moslora.models.decoding.generation import stop_token_ids
from mm_moslora.models.families import box_form_of
from mm_moslora.models.language_model import Weights, language_model, savable_generation_config, set_system_prompt
from mm_moslora.models.model_paths import hub_names
from mm_moslora.models.model_sizes import base_sizes, packing, refuse_packed
from mm_moslora.models.pretrained_vlm import (
    load_pretrained_processor,
    load_pretrained_vlm,
    outside_decoder,
    pretrained_image_token,
)
from mm_moslora.models.processing.anyres import (
    NEWLINE,
    anyres_processor,
    compose_anyres,
    fitting_tiles,
    newline_of,
    require_anyres,
)
from mm_moslora.models.processing.image_processing import SquareImageProcessing
from mm_moslora.models.processing.llava_processor import build_processor
from mm_moslora.models.processing.processor_images import ProcessorImageProcessing, limit_pixels
from mm_moslora.models.projectors.projector import build_projector, projector_tokens
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.vision.patch_embedding import use_linear_patches
from mm_moslora.models.vision.timm_open_clip_tower import WrappedVisionModel
from mm_moslora.models.vision.vision_tower import FusedVisionModel, ImageSpec, load_vision, sketch_vision
from mm_moslora.models.vlm import VlmConfig, VlmForConditionalGeneration, is_multimodal
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.identity import check_stored
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.run_paths import require_model, require_projector


@dataclass(kw_only=True)
class Parts:
    """A model and what goes with it, as far as `load_parts` was asked for it."""

    model: PreTrainedModel = None  # type: ignore[assignment]
    """The base model; adapters, if any, sit inside it. Absent without weights."""
    tokenizer: PreTrainedTokenizerBase = None  # type: ignore[assignment]
    """With the image token where there is a vision tower. Absent where shapes alone are loaded."""
    processor: Any = None
    """None for a language model alone."""
    image: ImageSpec | None = None
    """The vision tower's specification, where the model is assembled here."""
    image_token_id: int | None = None
    """Vocabulary id of the image placeholder; None: that of the model, if it sees."""
    tokens_per_image: int = 0
    """Visual tokens of a picture; of a ready-made model, of one of 448 x 448 pixels."""
    peft_model: peft.PeftModel | None = None
    """The PEFT view of `model`, once adapters are in."""
    base: dict[str, Any] = field(default_factory=dict)
    """Where the base came from, for the adapter folder."""
    thinking: Thinking = "auto"
    """The recipe's `model.thinking`; of a trained model, the form in which it is asked."""
    boxes: BoxChoice = "auto"
    """The recipe's `model.boxes`; of an export, the form that it was trained with."""
    changed: bool = False
    """Whether weights besides the adapter are other ones than `base` names."""

    def __post_init__(self) -> None:
        if self.image_token_id is None and self.model is not None and is_multimodal(self.model):
            self.image_token_id = self.model.config.image_token_id
        self.ask(self.thinking)

    def ask(self, thinking: Thinking) -> None:
        """Choose the form in which the model is asked; chat templates record it, so that every export holds it."""
        self.thinking = thinking
        for owner in (self.tokenizer, self.processor) if thinking in ("always", "mask") else ():
            if isinstance(getattr(owner, "chat_template", None), str):
                owner.chat_template = note_thinking(owner.chat_template)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer; none are known without weights."""
        return [] if self.model is None else stop_token_ids(self.model, self.tokenizer.eos_token_id)

    @property
    def is_pretrained_vlm(self) -> bool:
        """Whether the model is a ready-made one, whose processor has a chat template for pictures."""
        whole = self.processor is not None or (self.model is not None and is_multimodal(self.model))
        return self.image is None and whole

    @property
    def template_processor(self) -> Any:
        """The processor that decides the chat template: that of a ready-made model; else None."""
        return self.processor if self.is_pretrained_vlm else None

    @cached_property
    def image_processing(self) -> ImageProcessing | None:
        """What turns pictures into tensors; None for a language model alone."""
        if self.processor is None or self.image_token_id is None:
            return None
        if self.is_pretrained_vlm or isinstance(self.processor, LlavaNextProcessor):
            return ProcessorImageProcessing(self.processor, image_token_id=self.image_token_id, boxes=self.box_form)
        return SquareImageProcessing(
            self.processor.image_processor, image_token_id=self.image_token_id, tokens=self.tokens_per_image,
            boxes=self.box_form,
        )  # fmt: skip

    @property
    def box_form(self) -> BoxFormName | None:
        """The form of boxes; None: no recipe names one, and a ready-made model shows none."""
        if self.boxes != "auto":
            return self.boxes
        return box_form_of(self.processor) if self.is_pretrained_vlm else "qwen3_vl"


def load_parts(
    config: ModelConfig,
    *,
    weights: Weights = "all",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Parts:
    """Load a recipe's model, or as much of it as is needed, without adapters.

    Args:
        weights: `all`: the model, to train or to use. `none`: no model, but all that turns records into tensors, for
            data preparation. `shapes`: the model on the meta device with a few of its decoder layers, and no tokenizer
            and processor, for planning; only configurations are read.
        device: where `all` puts the weights, without a copy in main memory; None: main memory. On `meta` the weights of
            transformers' models are not read; other parts (new projectors, towers of open_clip and timm) are in main
            memory.

    Raises:
        ModelError: a part is unknown or does not fit.
    """
    require_model("model.language", config.language)
    require_model("model.vlm", config.vlm)
    device_context: AbstractContextManager[Any] = torch.device("meta") if weights == "shapes" else nullcontext()
    load = _assembled if config.vlm is None else _pretrained
    with hub_or_cache(*hub_names(config)), device_context:
        if weights == "all" and config.quantisation != "none":
            refuse_packed(base_sizes(config), config.quantisation, config.vlm or config.language or "")
        parts = load(config, weights=weights, dtype=dtype, device=device)
    if weights == "all":
        stop_repacking(parts.model)  # evaluations give the values of training
    return parts


def is_quantised(config: ModelConfig) -> bool:
    """Whether a recipe's base model has packed weights, by the recipe or by its own configuration.

    Raises:
        ModelError: its configuration cannot be read.
    """
    return config.quantisation != "none" or getattr(base_sizes(config), "quantization_config", None) is not None


def _assembled(config: ModelConfig, *, weights: Weights, dtype: torch.dtype, device: torch.device | None) -> Parts:
    language = language_model(config, weights=weights, dtype=dtype, device=device)
    parts = Parts(
        model=cast(PreTrainedModel, language.model), tokenizer=language.tokenizer,
        base={"language": config.language, "language_revision": config.language_revision}, thinking=config.thinking,
        boxes=config.boxes,
    )  # fmt: skip
    if config.vision is None:
        return parts
    if weights == "all":
        tower, spec = load_vision(config.vision, dtype=dtype, device=device)
    else:
        tower, spec = sketch_vision(config.vision)
    config = replace(config, anyres_tiles=list(fitting_tiles(config, spec)))
    assert config.vision is not None
    shape = projector_shape(config, spec, language.config)
    tokens = projector_tokens(config.projector.kind, shape) + (config.vision.select == "cls_patch")
    standard = is_standard(config, spec, tower)
    _require_fitting(config, spec, tower, standard=standard)
    token = language.add_image_token()
    own = None if device is None or device.type == "meta" else device  # of parts that are made, not read
    settings = llava_settings(config.vision, spec, tower, language.config, image_token_id=token, tokens=tokens)
    if weights != "none":
        if config.image_aspect == "anyres":
            parts.model = compose_anyres(config, settings, spec, dtype=dtype, device=own)
        else:
            parts.model = compose(config, settings, shape, standard=standard, prefix=spec.prefix)
    if weights == "all":
        projector = build_projector(config.projector.kind, shape).to(device=own, dtype=dtype)
        _fill(parts.model, cast(PreTrainedModel, language.model), tower, projector)
        if config.projector.weights:
            load_projector(projector, Path(config.projector.weights), newline=newline_of(parts.model))
    if weights != "shapes":
        if config.image_aspect == "anyres":
            parts.processor = anyres_processor(language.tokenizer, spec, config.anyres_tiles)
        else:
            parts.processor = build_processor(
                language.tokenizer, spec, aspect=config.image_aspect, tokens_per_image=tokens, standard=standard,
                select=settings["vision_feature_select_strategy"],
            )  # fmt: skip
    parts.image, parts.image_token_id, parts.tokens_per_image = spec, token, tokens
    parts.base |= {"vision": config.vision.name, "vision_revision": config.vision.revision}
    return parts


def _require_fitting(config: ModelConfig, spec: ImageSpec, tower: PreTrainedModel, *, standard: bool) -> None:
    assert config.vision is not None
    if config.vision.select == "cls_patch" and not (standard and spec.prefix):
        raise ModelError(
            "model.vision.select is cls_patch, which only a stock tower with CLS and the mlp2x_gelu projector offers. "
            "Use select: patch."
        )
    if config.image_aspect == "anyres":
        require_anyres(config, spec, tower, standard=standard)


def _fill(model: PreTrainedModel, language: PreTrainedModel, tower: PreTrainedModel, projector: nn.Module) -> None:
    """Put the loaded parts into the empty shell."""
    model.model.vision_tower = tower
    model.model.language_model = language.base_model
    model.lm_head = language.get_output_embeddings()
    model.model.multi_modal_projector = projector
    model.generation_config = language.generation_config
    model.eval()


def _pretrained(config: ModelConfig, *, weights: Weights, dtype: torch.dtype, device: torch.device | None) -> Parts:
    assert config.vlm is not None
    name, revision = config.vlm, config.vlm_revision
    base = {"vlm": name, "vlm_revision": revision}
    if weights == "shapes":
        whole = copy.deepcopy(base_sizes(config))
        model = AutoModelForImageTextToText.from_config(whole, trust_remote_code=False)
        return Parts(model=model, base=base, thinking=config.thinking)
    if weights == "all":
        kind = config.quantisation
        keep = None if kind == "none" else outside_decoder(base_sizes(config), kind)
        packed = packing(kind, dtype, keep=keep)
        model, processor = load_pretrained_vlm(name, revision, dtype=dtype, device=device, packed=packed)
        savable_generation_config(model)
        token = None
    else:
        model, processor = None, load_pretrained_processor(name, revision)
        token = pretrained_image_token(name, revision, processor)
    limit_pixels(processor, config)
    set_system_prompt(processor, config.system_prompt)
    return pretrained_parts(
        processor, model=model, image_token_id=token, base=base, thinking=config.thinking, boxes=config.boxes
    )


def pretrained_parts(
    processor: Any,
    *,
    model: PreTrainedModel | None,
    image_token_id: int | None = None,
    base: dict[str, Any],
    thinking: Thinking = "auto",
    boxes: BoxChoice = "auto",
) -> Parts:
    """A ready-made model with its processor.

    Args:
        image_token_id: what visual features replace; None: the model says it.
    """
    if model is not None:
        use_linear_patches(model.eval())
    parts = Parts(
        model=cast(PreTrainedModel, model), tokenizer=processor.tokenizer,
        processor=processor, image_token_id=image_token_id, base=base, thinking=thinking, boxes=boxes,
    )  # fmt: skip
    assert parts.image_processing is not None
    parts.tokens_per_image = len(parts.image_processing.placeholders([(448, 448)])[0])
    return parts


def is_standard(config: ModelConfig, spec: ImageSpec, tower: PreTrainedModel) -> bool:
    """Whether stock transformers can express the model as `LlavaForConditionalGeneration`."""
    wrapped = isinstance(tower, WrappedVisionModel | FusedVisionModel)
    return config.projector.kind == "mlp2x_gelu" and not wrapped and spec.prefix in (0, 1)


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
    """Keys of `LlavaConfig`, and keys that this package adds, for these parts."""
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
        weights: the file, or a folder that has it; see `require_projector`.
        newline: the newline embedding of an anyres model; left as it is where the file, made without tiles, has none.

    Raises:
        ModelError: no such file, it is damaged, or it was made for other widths.
        CheckpointError: the manifest of its checkpoint names other bytes.
    """
    file, own = require_projector(weights), projector.state_dict()
    check_stored(file)
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or truncated ({error}). Copy it again.") from error
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
