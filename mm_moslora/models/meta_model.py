"""A recipe's model without its weights: two decoder layers on the meta device, from the configurations alone.

All decoder layers are alike, so two of them tell the size, the cost and the trainable parameters of any number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from huggingface_hub import constants, get_session
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel

from mm_moslora.batch import ProcessedImage
from mm_moslora.config import ModelConfig, Recipe, refuse_all_frozen, refuse_without_effect
from mm_moslora.kernels.attention.segment_attention import SEGMENTS, set_attention
from mm_moslora.models.assembly import (
    Assembly,
    compose,
    is_standard,
    llava_settings,
    projector_shape,
    register_image_token,
)
from mm_moslora.models.memory_efficient.decoder_layers import use_lean_layers
from mm_moslora.models.model_sizes import config_to_count
from mm_moslora.models.pretrained_vlm import PICTURE, load_pretrained_processor, pretrained_image_token, side_of
from mm_moslora.models.processing.anyres import anyres_processor, compose_anyres, require_anyres
from mm_moslora.models.processing.image_processing import ProcessorImageProcessing
from mm_moslora.models.projectors.projector import projector_tokens
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.vision_tower import ImageSpec, sketch_vision
from mm_moslora.models.vlm import needs_padding, part_of
from mm_moslora.utils.errors import ModelError, reason_of

LAYERS = 2
HUB_SECONDS = 5
"""How long the hub may take to answer before only its cache is read."""


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model on the meta device with a few of its decoder layers."""

    model: PreTrainedModel
    layers: int
    """Decoder layers of the whole model."""
    tokens_per_image: int
    image: ImageSpec | None
    """Of an assembled model's tower."""
    seen: ProcessedImage | None
    """A picture of the size asked for, as the model's own processor prepares it; see `size_decides`."""
    unseen: str
    """Why there is none, though the size decides."""
    patches: tuple[int, int] | None
    """Rows and columns of a picture's patches, by the configuration alone, where the tower takes any number."""

    @property
    def held(self) -> nn.ModuleList:
        """The decoder layers at hand."""
        return cast(nn.ModuleList, cast(Any, self.model.get_decoder()).layers)

    def parameters(self) -> dict[str, tuple[int, int]]:
        """Parameters and trainable ones of the whole model by part: language, vision, projector, adapter, mixer."""
        last = {id(parameter) for parameter in self.held[-1].parameters()}
        found: dict[str, tuple[int, int]] = {}
        for name, parameter in self.model.named_parameters():
            part = part_of(name)
            if "lora_" in name:  # a projector inside the tower has the tower's adapters
                kind = "mixer" if "lora_mixer" in name else "adapter"
                part = kind if part == "language" else f"vision {kind}"
            times = 1 + (self.layers - len(self.held) if id(parameter) in last else 0)
            total, trainable = found.get(part, (0, 0))
            size = times * parameter.numel()
            found[part] = (total + size, trainable + (size if parameter.requires_grad else 0))
        return found

    def quantisable(self) -> list[int]:
        """Sizes of the language model's linear weights but the head's, which loading in 4 or 8 bits packs."""
        linears = [module for module in self.held[-1].modules() if isinstance(module, nn.Linear)]
        own = [module.weight.numel() for module in linears if not module.weight.requires_grad]
        return self.layers * own


def build_meta_model(
    recipe: Recipe, *, dtype: torch.dtype = torch.bfloat16, picture: tuple[int, int] = PICTURE
) -> MetaModel:
    """Build a recipe's model on the meta device, adapters and what trains included.

    Args:
        recipe: names the parts; only their configurations are read.
        dtype: of the weights.
        picture: width and height of the one that stands for all; see `size_decides`.

    Raises:
        ModelError: a configuration is not to be had, or of a kind that cannot be built without its weights; see also
            `refuse_without_effect`.
    """
    config = recipe.model
    refuse_without_effect(config)
    refuse_all_frozen(config)
    with _hub_or_cache(config):
        with torch.device("meta"):
            if config.vlm is not None:
                model, layers, tokens, image, patches = _ready(config.vlm, config.vlm_revision, picture)
            else:
                model, layers, tokens, image, patches = _assembled(recipe)
            cast(nn.Module, model).to(dtype)
            attach_adapters(Assembly(model=model, tokenizer=cast(Any, None)), config, recipe.adapter)
        seen, unseen = _seen(config, image, picture) if size_decides(config) else (None, "")
    if not needs_padding(model):
        set_attention(model, SEGMENTS)
        if config.lean_layers and config.quantisation != "int8":  # whose layers run in their stock form
            use_lean_layers(model, depth=layers)
    return MetaModel(
        model=model.train(), layers=layers, tokens_per_image=tokens if seen is None else len(seen.placeholders),
        image=image, seen=seen, unseen=unseen, patches=patches,
    )  # fmt: skip


def size_decides(config: ModelConfig) -> bool:
    """Whether the size of a picture decides how many tiles, patches and tokens it takes: not of one square each."""
    return config.vlm is not None or (config.vision is not None and config.image_aspect == "anyres")


def _seen(config: ModelConfig, spec: ImageSpec | None, picture: tuple[int, int]) -> tuple[ProcessedImage | None, str]:
    """A picture in the eyes of the model's own processor, or why it has none."""
    try:
        if config.vlm is not None:
            processor = load_pretrained_processor(config.vlm, config.vlm_revision)
            token = pretrained_image_token(config.vlm, config.vlm_revision, processor)
        else:
            assert spec is not None
            tokenizer = AutoTokenizer.from_pretrained(
                str(config.language), revision=config.language_revision, trust_remote_code=False
            )
            token = register_image_token(tokenizer)
            processor = anyres_processor(tokenizer, spec, config.anyres_tiles)
    except (ModelError, OSError, ValueError, KeyError) as error:
        return None, (str(error).strip().splitlines() or [type(error).__name__])[0]
    # White, since SmolVLM leaves out tiles that are zero everywhere, which grey may be.
    return ProcessorImageProcessing(processor, image_token_id=token).see([Image.new("RGB", picture, "white")])[0], ""


@contextmanager
def _hub_or_cache(config: ModelConfig) -> Iterator[None]:
    """Ask the hub once whether it is there; its client alone retries for half a minute to minutes per file."""
    offline = constants.HF_HUB_OFFLINE
    names = [config.language, config.vlm, *([config.vision.name, config.vision.fuse_with] if config.vision else [])]
    if not offline and any(name and not Path(name).exists() for name in names):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
        except Exception:  # of requests or httpx, as the hub's client has it
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def _read(name: str, revision: str | None, key: str) -> Any:
    try:
        return config_to_count(name, revision)
    except (OSError, ValueError, KeyError) as error:
        reason = reason_of(error)
        raise ModelError(
            f"{key} is {name!r}, whose configuration is not to be had ({reason}). Give a folder with its config.json, "
            "or go online."
        ) from error


def _shortened(config: Any) -> tuple[Any, int]:
    """The configuration with few layers, and how many there were."""
    config = copy.deepcopy(config)
    layers = int(config.num_hidden_layers)
    config.num_hidden_layers = min(LAYERS, layers)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    return config, layers


class _MetaParts(NamedTuple):
    model: PreTrainedModel
    layers: int
    tokens: int
    image: ImageSpec | None
    patches: tuple[int, int] | None = None


def _assembled(recipe: Recipe) -> _MetaParts:
    config = recipe.model
    text, layers = _shortened(_read(str(config.language), config.language_revision, "model.language").get_text_config())
    if config.vision is None:
        return _MetaParts(AutoModelForCausalLM.from_config(text, trust_remote_code=False), layers, 0, None)
    tower, spec = sketch_vision(config.vision)
    shape = projector_shape(config, spec, text)
    tokens = projector_tokens(config.projector.kind, shape) + (1 if config.vision.select == "cls_patch" else 0)
    settings = llava_settings(config.vision, spec, tower, text, image_token_id=text.vocab_size - 1, tokens=tokens)
    standard = is_standard(config, spec, tower)
    if config.image_aspect == "anyres":
        require_anyres(config, spec, tower, standard=standard)
        return _MetaParts(compose_anyres(config, settings, spec, dtype=torch.float32), layers, tokens, spec)
    return _MetaParts(compose(config, settings, shape, standard=standard, prefix=spec.prefix), layers, tokens, spec)


def _ready(name: str, revision: str | None, picture: tuple[int, int]) -> _MetaParts:
    config = copy.deepcopy(_read(name, revision, "model.vlm"))
    text, layers = _shortened(config.get_text_config())
    config.text_config = text
    tower, tokens, patches = config.vision_config, getattr(config, "image_seq_length", None), None
    if tokens is None:
        merged = getattr(tower, "spatial_merge_size", 1)
        height, width = (max(1, round(side / side_of(tower, "patch_size") / merged)) for side in reversed(picture))
        tokens, patches = height * width, (height * merged, width * merged)
    return _MetaParts(
        AutoModelForImageTextToText.from_config(config, trust_remote_code=False), layers, int(tokens), None, patches
    )
