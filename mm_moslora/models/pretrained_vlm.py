"""Ready-made vision-language models: any `AutoModelForImageTextToText` checkpoint with its own processor.

Decoder, vision tower and what lies between them are found by what they are in transformers.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from mm_moslora.adapters.tree import stacked_parameters
from mm_moslora.models.families import TOWER_PATHS
from mm_moslora.models.model_sizes import load_base, refuse_adapter_beside
from mm_moslora.utils.errors import ModelError, reason_of
from mm_moslora.utils.files import read_json

PICTURE = (640, 480)
"""Width and height of the picture that stands for all where they decide what it costs: of most of COCO's."""


def load_pretrained_vlm(
    name: str, revision: str | None, *, dtype: torch.dtype, device: torch.device | None = None, packed: Any = None
) -> tuple[PreTrainedModel, Any]:
    """Load a ready-made model with its processor, the weights straight to a device; on `meta` they are not read."""
    refuse_adapter_beside(name, revision)
    processor = load_pretrained_processor(name, revision)
    try:
        model: PreTrainedModel = load_base(
            AutoModelForImageTextToText,
            name,
            revision=revision,
            dtype=dtype,
            device_map=device,
            quantization_config=packed,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model.vlm is {name!r}, which does not load as an image-text-to-text model: {reason_of(error)}."
        ) from error
    refuse_without_head(model, name)
    return model, processor


def refuse_without_head(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that training cannot take apart."""
    if not hasattr(model, "model") or model.get_output_embeddings() is None:
        raise ModelError(
            f"{name!r} ({type(model).__name__}) has no decoder with a linear head behind it, which training needs. "
            "Choose a model such as LLaVA, Qwen-VL, SmolVLM, InternVL or PaliGemma."
        )


def load_pretrained_processor(name: str, revision: str | None) -> Any:
    """Load the processor of a ready-made model."""
    if lacking := _lacks_processor(Path(name)):
        raise ModelError(
            f"model.vlm is {name!r}, a folder without {lacking}. Put the processor of the model that it was made from "
            f"into it: AutoProcessor.from_pretrained(MODEL).save_pretrained({name!r})."
        )
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"The processor of model.vlm {name!r} does not load: {reason_of(error)}. Give a "
            "folder with the model's files, or go online."
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "image_token", None) is None:
        raise ModelError(
            f"The processor of model.vlm {name!r} ({type(processor).__name__}) takes no pictures with placeholders. "
            "Put a language model into model.language, or choose another vision-language model."
        )
    return processor


def _lacks_processor(folder: Path) -> str:
    """Which parts of a processor the folder of a model that sees lacks, for people; empty where it lacks none."""
    try:
        config = read_json(folder / "config.json", linked=True)
    except (OSError, ValueError):
        return ""
    if "vision_config" not in config:
        return ""
    parts = {
        "an image processor (preprocessor_config.json)": ("preprocessor_config.json", "processor_config.json"),
        "a tokenizer (tokenizer.json)": (
            "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt",
        ),
    }  # fmt: skip
    return " and ".join(part for part, files in parts.items() if not any((folder / name).is_file() for name in files))


def pretrained_image_token(name: str, revision: str | None, processor: Any) -> int:
    """The token that visual features replace, without loading weights."""
    config: Any = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    number = getattr(config, "image_token_id", None)
    return int(processor.image_token_id if number is None else number)


def tower_path(model: PreTrainedModel) -> str:
    """Path of a model's vision tower."""
    names = {name for name, _ in model.named_modules()}
    for path in TOWER_PATHS:
        if path in names:
            return path
    raise ModelError(
        f"{type(model).__name__} has no vision tower at {', '.join(TOWER_PATHS)}; leave model.vision frozen."
    )


def decoder_path(model: PreTrainedModel) -> str:
    """Path of a model's language model, without its head."""
    decoder = model.get_decoder()
    return next(name for name, module in model.named_modules() if module is decoder)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's decoder, whatever its class calls them."""
    decoder = model.get_decoder()
    own = getattr(decoder, "layers", None)
    lists = [own, *(module for module in decoder.modules() if isinstance(module, nn.ModuleList))]
    found = next((item for item in lists if isinstance(item, nn.ModuleList) and _checkpoints(item)), own)
    if not isinstance(found, nn.ModuleList):
        raise ModelError(f"{type(decoder).__name__} has no list of layers, so its work and memory cannot be counted.")
    return found


def _checkpoints(layers: nn.ModuleList) -> bool:
    return any(isinstance(layer, GradientCheckpointingLayer) for layer in layers)


def side_of(tower: Any, key: str) -> int:
    """A length of a vision tower's configuration, in pixels; some give one per side. 0: it has none."""
    value = getattr(tower, key, None) or 0
    return int(value if isinstance(value, int) else max(value))


def outside_decoder(config: PreTrainedConfig, kind: str) -> list[str]:
    """Paths of a ready-made model's parts besides the language model, which stay dense: head, tower, projector."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForImageTextToText.from_config(copy.deepcopy(config), trust_remote_code=False)
    path = decoder_path(model)
    decoder = model.get_submodule(path)
    experts = dict(stacked_parameters(decoder.named_modules()))
    share = sum(weight.numel() for weight in experts.values()) / sum(weight.numel() for weight in decoder.parameters())
    if share > 0.5:
        names = dict.fromkeys(".".join(name.split(".")[-2:]) for name in experts)
        raise ModelError(
            f"model.quantisation is {kind}, but {share:.0%} of the language model's weights are experts in stacked "
            f"parameters ({', '.join(names)}), which bitsandbytes does not pack. Leave quantisation out."
        )
    parents = [path[:at] for at, letter in enumerate(path) if letter == "."]
    return [
        f"{parent}.{name}" if parent else name
        for parent in ("", *parents)
        for name, _ in model.get_submodule(parent).named_children()
        if not f"{path}.".startswith(f"{parent}.{name}." if parent else f"{name}.")
    ]
