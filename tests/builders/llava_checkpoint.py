"""Checkpoints in the layout of LLaVA's own code: its class names, its configuration, `model.mm_projector.*`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.models.assembly import Parts
from mm_moslora.models.families import decoder_family

_PROJECTOR = {"linear_1": "0", "linear_2": "2"}


def write_llava_checkpoint(assembly: Parts, folder: Path, *, aspect: str = "pad") -> Path:
    """Write a folder as LLaVA's own code does; `aspect` is its name for how pictures become squares."""
    model, config = assembly.model, assembly.model.config
    settings: dict[str, Any] = config.text_config.to_dict() | {
        "model_type": decoder_family(config.text_config.model_type).llava_types[0],
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": assembly.base.get("vision"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": aspect,
        "use_mm_proj": True,
    }
    folder.mkdir()
    save_file(llava_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    assembly.tokenizer.save_pretrained(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return folder


def llava_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors under LLaVA's names: language model and projector; the tower is loaded by name there."""
    inner: Any = model.model
    state = {f"model.{name}": value for name, value in inner.language_model.state_dict().items()}
    for name, value in inner.multi_modal_projector.state_dict().items():
        layer, _, kind = name.partition(".")
        state[f"model.mm_projector.{_PROJECTOR[layer]}.{kind}"] = value
    state["lm_head.weight"] = torch.as_tensor(model.get_output_embeddings().weight.data)
    return {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
