"""Export to the layout of the original LLaVA code: its class names, its configuration, `model.mm_projector.*`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration, PreTrainedModel

from mm_moslora.models.assembly import Parts
from mm_moslora.models.families import DECODERS, decoder_family
from mm_moslora.models.processing.anyres import NEWLINE
from mm_moslora.models.vlm import VlmForConditionalGeneration
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.file_locks import new_folder
from mm_moslora.utils.run_paths import writing

_PROJECTOR = {"linear_1": "0", "linear_2": "2"}
_SQUEEZED = (
    "LLaVA's code pads pictures to a square or crops them, and this model was shown squeezed ones (model.image_aspect "
    "resize). Export with --to llava or hf instead, or train with pad or crop."
)


def export_original(assembly: Parts, folder: Path, *, vision: str | None = None) -> float:
    """Write a folder that the original LLaVA code loads.

    Args:
        assembly: loaded with `merge=True`, in the dtype to be written.
        folder: new or empty.
        vision: the tower's name there; None: the one that the model was made from.

    Returns:
        Largest difference between the model's tensors and the folder's, read back.

    Raises:
        ModelError: LLaVA has no place for a part, with the reason and the nearest choice.
    """
    model = assembly.model
    tower = vision or assembly.base.get("vision")
    reason = why_not_original(model, tower)
    aspect = None if reason else _aspect(assembly)
    if reason or aspect is None:
        raise ModelError(reason or _SQUEEZED)
    state = original_state(model)
    with writing(folder), new_folder(folder) as part:
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})
        (part / "config.json").write_text(json.dumps(_config(model, str(tower), aspect), indent=2), encoding="utf-8")
        assembly.tokenizer.save_pretrained(part)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(part)
        written = load_file(part / "model.safetensors")
    return max(float((written[name].float() - value.float()).abs().max()) for name, value in state.items())


def why_not_original(model: PreTrainedModel, tower: str | None) -> str | None:
    """Why LLaVA's code cannot hold the model, and the nearest choice; None where it can."""
    nearest = "Export with --to llava or hf instead."
    if isinstance(model, VlmForConditionalGeneration) or not isinstance(
        model, LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
    ):
        return f"LLaVA's code holds one CLIP tower and mlp2x_gelu, not {type(model).__name__}. {nearest}"
    config: Any = model.config
    if config.vision_config.model_type != "clip_vision_model":
        return f"LLaVA's code builds CLIP towers only, this one is {config.vision_config.model_type}. {nearest}"
    if decoder_family(config.text_config.model_type).llava_class is None:
        classes = ", ".join(name for name, family in DECODERS.items() if family.llava_class)
        return f"LLaVA's code has no class for {config.text_config.model_type}, only {classes}. {nearest}"
    if not isinstance(config.vision_feature_layer, int):
        return f"LLaVA's code reads one feature layer, here are {config.vision_feature_layer}. {nearest}"
    if not tower:
        return "LLaVA's code loads the vision tower by name, and the model does not say it. Name it: --vision TOWER."
    return None


def original_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors under LLaVA's names: language model, projector and newline; the tower is loaded by name there."""
    state: dict[str, Tensor] = {}
    inner: Any = model.model
    for name, value in inner.language_model.state_dict().items():
        state[f"model.{name}"] = value
    for name, value in inner.multi_modal_projector.state_dict().items():
        layer, _, kind = name.partition(".")
        state[f"model.mm_projector.{_PROJECTOR[layer]}.{kind}"] = value
    if hasattr(inner, NEWLINE):
        state[f"model.{NEWLINE}"] = getattr(inner, NEWLINE).data
    state["lm_head.weight"] = torch.as_tensor(model.get_output_embeddings().weight.data)
    # Tied weights are stored twice: LLaVA's classes expect both names.
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}


def _aspect(assembly: Parts) -> str | None:
    """LLaVA's name for how pictures become squares; None where it has none."""
    if isinstance(assembly.model, LlavaNextForConditionalGeneration):
        return "anyres"
    images: Any = assembly.processor.image_processor
    if getattr(images, "do_pad", False):
        return "pad"
    return "square" if images.do_center_crop else None


def _config(model: PreTrainedModel, tower: str, aspect: str) -> dict[str, Any]:
    config: Any = model.config
    family = decoder_family(config.text_config.model_type)
    tiles = isinstance(model, LlavaNextForConditionalGeneration)
    settings: dict[str, Any] = config.text_config.to_dict()
    settings |= {
        "model_type": family.llava_types[0],
        "architectures": [family.llava_class],
        "mm_vision_tower": tower,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": aspect,
        "use_mm_proj": True,
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    if tiles:
        settings |= {"image_grid_pinpoints": config.image_grid_pinpoints, "mm_patch_merge_type": "spatial_unpad"}
    return settings
