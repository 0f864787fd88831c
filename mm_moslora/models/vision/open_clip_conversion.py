"""open_clip towers as classes of transformers, where these can express them: equal features, stock exports.

The built tower decides, not its name: a plain CLIP ViT or a SigLIP ViT of timm. Others stay classes of open_clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel


def to_transformers(tower: nn.Module) -> PreTrainedModel | None:
    """The tower as a transformers model with the same weights, or None where transformers has no such class."""
    trunk: Any = getattr(tower, "trunk", tower)
    if type(trunk).__name__ == "VisionTransformer" and hasattr(trunk, "transformer"):
        return _clip(trunk)
    if type(trunk).__name__ == "VisionTransformer" and hasattr(trunk, "blocks"):
        return _siglip(trunk)
    return None


def _clip(tower: Any) -> PreTrainedModel | None:
    blocks = tower.transformer.resblocks
    first = blocks[0]
    activation = {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(type(first.mlp.gelu).__name__)
    plain = (
        isinstance(tower.ln_pre, nn.LayerNorm)
        and isinstance(first.ls_1, nn.Identity)
        and isinstance(tower.patch_dropout, nn.Identity)
        and type(first.attn) is nn.MultiheadAttention
        and tower.positional_embedding.requires_grad
        and tower.conv1.bias is None
    )
    if activation is None or not plain:
        return None
    width = tower.conv1.out_channels
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=first.mlp.c_fc.out_features, num_hidden_layers=len(blocks),
        num_attention_heads=first.attn.num_heads, image_size=tower.image_size[0], patch_size=tower.patch_size[0],
        hidden_act=activation, layer_norm_eps=first.ln_1.eps,
    )  # fmt: skip
    old = tower.state_dict()
    state = {
        "embeddings.class_embedding": old["class_embedding"],
        "embeddings.patch_embedding.weight": old["conv1.weight"],
        "embeddings.position_embedding.weight": old["positional_embedding"],
    }
    for target, source in (("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")):
        state |= _copied(old, source, target)
    for index in range(len(blocks)):
        source, target = f"transformer.resblocks.{index}.", f"encoder.layers.{index}."
        state |= _split_qkv(old, f"{source}attn.in_proj_", f"{target}self_attn.")
        for name, new in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"),
                          ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):  # fmt: skip
            state |= _copied(old, source + name, target + new)
    return _filled(CLIPVisionModel, config, state)


def _siglip(trunk: Any) -> PreTrainedModel | None:
    block = trunk.blocks[0]
    activation = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}.get(type(block.mlp.act).__name__)
    if type(block.mlp.act).__name__ == "GELU" and getattr(block.mlp.act, "approximate", "none") == "tanh":
        activation = "gelu_pytorch_tanh"
    plain = (
        trunk.cls_token is None
        and getattr(trunk, "reg_token", None) is None
        and trunk.pos_embed is not None
        and isinstance(trunk.norm_pre, nn.Identity)
        and isinstance(block.ls1, nn.Identity)
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.attn.norm, nn.Identity)
        and isinstance(trunk.norm, nn.LayerNorm)
        and block.attn.qkv.bias is not None
        and trunk.patch_embed.proj.bias is not None
    )
    size = trunk.patch_embed.img_size
    if activation is None or not plain or size is None or size[0] != size[1]:
        return None
    config = SiglipVisionConfig(
        hidden_size=trunk.embed_dim, intermediate_size=block.mlp.fc1.out_features, num_hidden_layers=len(trunk.blocks),
        num_attention_heads=block.attn.num_heads, image_size=size[0], patch_size=trunk.patch_embed.patch_size[0],
        hidden_act=activation, layer_norm_eps=block.norm1.eps, vision_use_head=False,
    )  # fmt: skip
    old = trunk.state_dict()
    state = {"embeddings.position_embedding.weight": old["pos_embed"][0]}
    state |= _copied(old, "patch_embed.proj", "embeddings.patch_embedding") | _copied(old, "norm", "post_layernorm")
    for index in range(len(trunk.blocks)):
        source, target = f"blocks.{index}.", f"encoder.layers.{index}."
        state |= _split_qkv(old, f"{source}attn.qkv.", f"{target}self_attn.")
        for name, new in (("attn.proj", "self_attn.out_proj"), ("norm1", "layer_norm1"), ("norm2", "layer_norm2"),
                          ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2")):  # fmt: skip
            state |= _copied(old, source + name, target + new)
    return _filled(SiglipVisionModel, config, state)


def _copied(old: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    return {f"{target}.{kind}": old[f"{source}.{kind}"] for kind in ("weight", "bias") if f"{source}.{kind}" in old}


def _split_qkv(old: Mapping[str, Tensor], source: str, target: str) -> dict[str, Tensor]:
    """Query, key and value, which are one matrix in open_clip and timm."""
    state = {}
    for kind in ("weight", "bias"):
        for name, part in zip("qkv", old[source + kind].chunk(3), strict=True):
            state[f"{target}{name}_proj.{kind}"] = part
    return state


def _filled(kind: Any, config: Any, state: dict[str, Tensor]) -> PreTrainedModel:
    with torch.device("meta"):
        model = kind(config)
    model.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True, assign=True)
    for name, value in list(model.named_buffers()):  # position ids, the only ones
        owner, _, buffer = name.rpartition(".")
        ids = torch.arange(value.shape[-1])[None]
        model.get_submodule(owner).register_buffer(buffer, ids, persistent=False)
    return model
