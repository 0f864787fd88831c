"""open_clip and timm towers: as classes of transformers where these can express them, else in one registered wrapper.

Shapes: ``N`` images, ``P`` patches per image, ``V`` vision width, ``H x W`` pixels.

The built tower decides, not its name: a plain CLIP ViT of open_clip and a SigLIP ViT of timm in it become classes of
transformers, with equal features and stock exports.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mm_moslora.config import VisionConfig
from mm_moslora.models.families import CLIP, IMAGENET, Statistics
from mm_moslora.utils.errors import ModelError, suggestion
from mm_moslora.utils.files import read_json

logger = logging.getLogger(__name__)

_RANDOM = "model.vision: %r without pretrained has random weights, which differ at every load."
BICUBIC = 3
"""PIL's number for bicubic resampling, as image processors store it."""
_RESAMPLING = {"bilinear": 2, "bicubic": BICUBIC}
"""PIL's filters by their names in timm and open_clip."""


@dataclass(frozen=True, kw_only=True)
class PixelStatistics:
    """How a tower's pixels are normalised."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resample: int = BICUBIC

    @classmethod
    def of(cls, settings: Mapping[str, Any], usual: Statistics, *, size: int) -> PixelStatistics:
        """From settings with the names that timm and open_clip have, or the usual ones."""
        resample = _RESAMPLING.get(str(settings.get("interpolation")), BICUBIC)
        mean, std = (tuple(settings.get(name) or getattr(usual, name)) for name in ("mean", "std"))
        return cls(size=size, mean=mean, std=std, resample=resample)


class WrappedVisionConfig(PreTrainedConfig):
    """An open_clip or timm tower that transformers has no class for."""

    model_type = "mm_moslora_vision"

    library: str = "timm"
    """timm or open_clip."""
    architecture: dict[str, Any] | str = ""
    """timm: model name; open_clip: the model configuration as open_clip writes it."""
    hidden_size: int = 0
    """Width of the last feature map."""
    image_size: int = 224
    """Side of the input, pixels."""


class WrappedVisionModel(PreTrainedModel):
    """Runs an open_clip or timm tower and returns its feature maps as tokens ``[N, P, V]``, without prefix tokens.

    `hidden_states[i]` is the output of block or stage ``i``, counted from 1 as in transformers, if it was requested.
    """

    config: WrappedVisionConfig
    config_class = WrappedVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision"

    def __init__(self, config: WrappedVisionConfig) -> None:
        super().__init__(config)
        self.tower = _open_clip_tower(config) if config.library == "open_clip" else _timm_tower(config)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.tower.modules()):
            # Running statistics lose too much in half precision, and kernels refuse a mixture; transformers and
            # deepspeed both read this name.
            self._keep_in_fp32_modules_strict = {"tower"}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Towers initialise themselves."""

    def train(self, mode: bool = True) -> WrappedVisionModel:
        """Set the mode; frozen parts stay in evaluation mode.

        A batch normalisation in training mode normalises by the current batch and moves its statistics, which no
        checkpoint of a frozen tower holds: the projector would learn from features that inference does not have.
        """
        super().train(mode and any(parameter.requires_grad for parameter in self.parameters()))
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not any(
                parameter.requires_grad for parameter in module.parameters()
            ):
                module.eval()
        return self

    @property
    def blocks(self) -> int:
        """Number of blocks or stages with an output."""
        trunk: Any = getattr(self.tower, "trunk", self.tower)
        if hasattr(trunk, "feature_info"):
            return len(trunk.feature_info)
        return len(trunk.transformer.resblocks)

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] = True, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images; hidden states of all blocks (True), or at the index or indices wanted."""
        self._match_statistics()
        count = self.blocks + 1
        if isinstance(output_hidden_states, bool):
            wanted: Sequence[int] = range(1, count)
        else:
            wanted = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
        indices = sorted({index % count for index in wanted})
        if not indices or indices[0] == 0:
            raise ModelError(
                f"feature_layer {list(wanted)} asks for the embeddings; this tower offers 1 to {count - 1}."
            )
        maps = self._maps(pixel_values, [index - 1 for index in indices])
        states: list[Tensor | None] = [None] * count
        for index, value in zip(indices, maps, strict=True):
            states[index] = value.flatten(2).transpose(1, 2) if value.ndim == 4 else value
        return BaseModelOutputWithPooling(last_hidden_state=states[indices[-1]], hidden_states=cast(Any, tuple(states)))

    def _match_statistics(self) -> None:
        """Give running statistics the dtype of their weights, where the weights alone were cast."""
        for module in self.tower.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.data = module.running_mean.data.to(module.weight.dtype)
                assert module.running_var is not None
                module.running_var.data = module.running_var.data.to(module.weight.dtype)

    def _maps(self, pixel_values: Tensor, blocks: list[int]) -> list[Tensor]:
        trunk: Any = getattr(self.tower, "trunk", self.tower)
        stages: Any = getattr(trunk, "feature_info", ())
        widens = bool(stages) and hasattr(trunk, "conv_head") and trunk.num_features != stages[-1]["num_chs"]
        if self.blocks - 1 in blocks and widens:  # a layer after the last stage gives the features
            final, maps = trunk.forward_intermediates(pixel_values, indices=blocks)
            return [*maps[:-1], final]
        output = trunk.forward_intermediates(pixel_values, indices=blocks, stop_early=True, intermediates_only=True)
        return list(output["image_intermediates"]) if isinstance(output, dict) else list(output)


def _timm_tower(config: WrappedVisionConfig) -> nn.Module:
    import timm

    name = str(config.architecture)
    if not timm.is_model(name):
        raise ModelError(f"timm has no model {name!r}.{suggestion(name, timm.list_models())}")
    return timm.create_model(name, pretrained=False, num_classes=0)


def _open_clip_tower(config: WrappedVisionConfig) -> nn.Module:
    from open_clip.model import _build_vision_tower

    assert isinstance(config.architecture, dict)
    architecture = dict(config.architecture)
    vision_cfg = dict(architecture["vision_cfg"], timm_model_pretrained=False)
    return _build_vision_tower(
        architecture["embed_dim"], vision_cfg, quick_gelu=bool(architecture.get("quick_gelu", False))
    )


AutoConfig.register(WrappedVisionConfig.model_type, WrappedVisionConfig)
AutoModel.register(WrappedVisionConfig, WrappedVisionModel)


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> None:
    """Change the dtype of a model's parameters in place, save packed ones and those of modules that require fp32.

    Buffers stay: rotary frequencies and running statistics lose too much in half precision.
    """
    in_fp32 = {id(parameter) for parameter in fp32_parameters(module)}
    for parameter in module.parameters():
        if id(parameter) not in in_fp32 and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def fp32_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters that stay in fp32 in a model of any dtype: those of towers with batch norm."""
    return [
        parameter
        for child in module.modules()
        if isinstance(child, WrappedVisionModel) and child._keep_in_fp32_modules_strict
        for parameter in child.parameters()
    ]


def is_timm_folder(folder: Path) -> bool:
    """Whether a folder is one of timm: config.json has an architecture and no model type of this package."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    content = read_json(file, linked=True)
    return "architecture" in content and content.get("model_type", "timm_wrapper") == "timm_wrapper"


def load_timm(name: str, config: VisionConfig, *, weights: bool = True) -> tuple[PreTrainedModel, PixelStatistics]:
    """A timm tower by name or folder, with its pixel statistics; without weights it is only built."""
    import timm

    folder = Path(name)
    if folder.is_dir():
        content = read_json(folder / "config.json", linked=True)
        architecture, pretrained_cfg = content["architecture"], content.get("pretrained_cfg", {})
        tower = WrappedVisionModel(WrappedVisionConfig(library="timm", architecture=architecture))
        if weights:
            _load_tower(tower, folder / "model.safetensors", prefixes=("timm_model.", ""))
    else:
        tower = WrappedVisionModel(WrappedVisionConfig(library="timm", architecture=name))
        if weights and not config.pretrained:
            logger.warning(_RANDOM, config.name)
        elif weights:
            tower.tower = timm.create_model(name, pretrained=True, num_classes=0)
        settings = timm.get_pretrained_cfg(name)
        pretrained_cfg = settings.to_dict() if settings else {}
    size = int((pretrained_cfg.get("input_size") or (3, 224, 224))[-1])
    tower.config.hidden_size = int(cast(Any, tower.tower).num_features)
    tower.config.image_size = config.image_size or size
    return tower, PixelStatistics.of(pretrained_cfg, IMAGENET, size=size)


def require_named(name: str | None) -> None:
    """Refuse a vision tower by a name (`open_clip:MODEL`, `timm:MODEL`) that its library does not know."""
    library, _, model = (name or "").partition(":")
    if library not in ("open_clip", "timm") or Path(model).is_dir():
        return
    if library == "open_clip":
        import open_clip

        names = open_clip.list_models()
        exists = model in names
    else:
        import timm

        names = timm.list_models()
        exists = timm.is_model(model) or "/" in model  # a name on the hub is looked up there
    if not exists:
        raise ModelError(f"{library} has no model {model!r}.{suggestion(model, names)}")


def load_open_clip(name: str, config: VisionConfig, *, weights: bool = True) -> tuple[PreTrainedModel, PixelStatistics]:
    """An open_clip tower, as a class of transformers where one fits, with its pixel statistics; maybe only built."""
    import open_clip
    from open_clip.factory import get_model_config

    folder = Path(name)
    if folder.is_dir():
        content = read_json(folder / "open_clip_config.json", linked=True)
        architecture, preprocess = content["model_cfg"], content.get("preprocess_cfg", {})
    else:
        architecture, preprocess = get_model_config(name), _pretrained_settings(name, config.pretrained)
        if architecture is None:
            raise ModelError(f"open_clip has no model {name!r}.{suggestion(name, open_clip.list_models())}")
    size = architecture["vision_cfg"].get("image_size", 224)
    wrapped = WrappedVisionConfig(library="open_clip", architecture=architecture, image_size=config.image_size or size)
    tower = WrappedVisionModel(wrapped)
    if not weights:
        pass
    elif folder.is_dir():
        _load_tower(tower, folder / "model.safetensors", prefixes=("visual.", ""))
    elif config.pretrained:
        whole = open_clip.create_model(name, pretrained=config.pretrained)
        tower.tower.load_state_dict(whole.visual.state_dict())
    else:
        logger.warning(_RANDOM, config.name)
    side = int(size[0] if isinstance(size, list | tuple) else size)
    statistics = PixelStatistics.of(preprocess, CLIP, size=side)
    converted = to_transformers(tower.tower) if config.image_size in (None, statistics.size) else None
    if converted is not None:
        return converted, statistics
    trunk = getattr(tower.tower, "trunk", None)
    tower.config.hidden_size = int(trunk.num_features) if trunk is not None else architecture["vision_cfg"]["width"]
    return tower, statistics


def _pretrained_settings(name: str, pretrained: str | None) -> dict[str, Any]:
    """How open_clip prepares pictures for a tag's weights; of a file's, which has no tag, what all tags agree on."""
    import open_clip

    of_tag = open_clip.get_pretrained_cfg(name, pretrained) if pretrained else {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    settings: list[dict[str, Any]] = [of_tag] if of_tag else [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    return {
        key: settings[0].get(key)
        for key in ("mean", "std", "interpolation")
        if settings and settings[0].get(key) and all(item.get(key) == settings[0][key] for item in settings)
    }


def _load_tower(tower: WrappedVisionModel, weights: Path, *, prefixes: tuple[str, ...]) -> None:
    """Load a tower's weights without those of a text tower or a classifier; a missing weight is an error."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not weights.is_file():
        raise ModelError(f"{weights} does not exist, expected the weights of the vision tower there.")
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ModelError(f"{weights} is damaged or truncated ({error}). Copy it again.") from error
    prefix = next(item for item in prefixes if any(key.startswith(item) for key in state))
    expected = tower.tower.state_dict()
    weights_by_name = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing = [key for key in expected if key not in weights_by_name and not key.endswith("num_batches_tracked")]
    # An open_clip tower ends in a projection to the text space, which is never used; a trunk-only file lacks it.
    missing = [key for key in missing if not key.startswith(("head.", "proj"))]
    if missing:
        raise ModelError(f"{weights} lacks {len(missing)} weights of the tower, the first is {missing[0]!r}.")
    tower.tower.load_state_dict({key: value for key, value in weights_by_name.items() if key in expected}, strict=False)


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
