"""Weights of the quickstart's packages, converted to standard model folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import AssetError
from mm_moslora.utils.package_requirements import install_command

if TYPE_CHECKING:
    import torch

TIMM_ARCHITECTURE = "tf_efficientnet_lite0"
_INCEPTION = (0.5, 0.5, 0.5)
_IMAGENET_MEAN, _IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _check_loading(name: str, kind: Any, folder: Path) -> None:
    """Refuse a converted folder that does not load completely as `kind`, or holds a NaN or an infinity."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, trust_remote_code=False)
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if wrong := {kind: keys for kind, keys in problems.items() if keys}:
        raise AssetError(f"The converted {name} does not fit its model: {wrong}. Report this with your versions.")
    _check_finite(name, model)


def _check_finite(name: str, model: torch.nn.Module) -> None:
    broken = [key for key, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if broken:
        raise AssetError(f"The converted {name} holds values that are not finite in {broken[:5]}. Convert it again.")


def convert_language_model(gguf: Path, folder: Path) -> None:
    """GGUF -> bf16 `LlamaForCausalLM` folder."""
    # transformers marks models from GGUF as quantised and refuses to save or train them. The values are therefore
    # copied into a model of the same configuration without that mark.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
    )
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict())
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    untyped: Any = model  # transformers' wrapper of `to` hides its arguments from type checkers
    untyped.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _check_loading("language model", AutoModelForCausalLM, folder)


def convert_dinov2(onnx_file: Path, folder: Path) -> None:
    """ONNX -> `Dinov2Model` folder."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    save_file(_dinov2_state(onnx_file), folder / "model.safetensors", metadata={"format": "pt"})
    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518, layer_norm_eps=1e-6
    )
    config.architectures = ["Dinov2Model"]
    config.save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True, "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": _IMAGENET_MEAN, "image_std": _IMAGENET_STD,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    _check_loading("vision encoder", Dinov2Model, folder)


def _dinov2_state(onnx_file: Path) -> dict[str, torch.Tensor]:
    """Read transformers' original parameter names and values from the ONNX graph."""
    # The exporter kept the names of biases and norms. It stored each linear weight transposed, as an unnamed
    # initializer of a MatMul node, and split the position embeddings into those of CLS and of the patches.
    import onnx
    import torch

    graph = onnx.load(onnx_file).graph
    tensors = {
        item.name: torch.from_numpy(onnx.numpy_helper.to_array(item).copy()).float() for item in graph.initializer
    }
    prefix = "backbone."
    state = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/") and node.input[1] in tensors:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T.contiguous()
    positions = {
        int(value.shape[1]): value for name, value in tensors.items() if name.startswith("onnx::") and value.ndim == 3
    }
    if sorted(positions) != [1, 1369]:
        raise AssetError(
            f"{onnx_file.name} has position embeddings for {sorted(positions)} places, expected 1 and 1369."
        )
    state["embeddings.position_embeddings"] = torch.cat([positions[1], positions[1369]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # used in pre-training only and missing in the graph
    return state


def convert_efficientnet(weights: Path, folder: Path, *, licence: str) -> None:
    """Convert the author's state dict into a timm folder: the same tensors in the same order under timm's names."""
    import timm
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel
    from transformers.utils import logging

    tensors = _without_counters(torch.load(weights, map_location="cpu", weights_only=True))
    model = timm.create_model(TIMM_ARCHITECTURE, pretrained=False)
    names = list(_without_counters(model.state_dict()))
    shapes = [tuple(model.state_dict()[name].shape) for name in names]
    if [tuple(value.shape) for value in tensors.values()] != shapes:
        raise AssetError(
            f"{weights.name} holds {len(tensors)} tensors that do not match timm's {TIMM_ARCHITECTURE} "
            f"({len(names)} tensors). Install a timm of the supported range: {install_command('timm')}"
        )
    state = dict(model.state_dict())
    state.update(zip(names, tensors.values(), strict=True))
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    pretrained_cfg = {
        "tag": "in1k", "custom_load": False, "input_size": [3, 224, 224], "fixed_input_size": False,
        "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center", "mean": _INCEPTION, "std": _INCEPTION,
        "num_classes": 1000, "pool_size": [7, 7], "first_conv": "conv_stem", "classifier": "classifier",
        "license": licence,
    }  # fmt: skip
    config = {
        "architecture": TIMM_ARCHITECTURE, "num_classes": 1000, "num_features": model.num_features,
        "model_type": "timm_wrapper", "pretrained_cfg": pretrained_cfg,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # without a report of the unused weights of the classifier
    try:
        loaded: Any = AutoModel.from_pretrained(folder, trust_remote_code=False)
    finally:
        logging.set_verbosity(level)
    trunk = dict(loaded.timm_model.state_dict())
    missing = [name for name, value in trunk.items() if name not in state or not bool((value == state[name]).all())]
    if missing:
        raise AssetError(f"EfficientNet-Lite0 reads back differently than written: {missing[:5]}. Convert it again.")
    _check_finite("vision encoder", loaded)


def _without_counters(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
