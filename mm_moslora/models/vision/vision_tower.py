"""Vision encoders: towers of transformers, of open_clip (as a class of transformers where one fits) and of timm.

Shapes: ``N`` images, ``P`` patches per image, ``V`` vision width, ``H x W`` pixels.

An `ImageSpec` holds what the rest of the model needs of a tower; it is known before any weight is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mm_moslora.config import VisionConfig
from mm_moslora.models.families import TOWERS, tower_family
from mm_moslora.models.model_sizes import (
    config_to_count,
    load_base,
    refuse_adapter_beside,
    refuse_configuration,
    unreadable,
)
from mm_moslora.models.vision.timm_open_clip_tower import (
    BICUBIC,
    PixelStatistics,
    WrappedVisionConfig,
    cast_parameters,
    is_timm_folder,
    load_open_clip,
    load_timm,
)
from mm_moslora.utils.errors import ModelError, reason_of
from mm_moslora.utils.network.hub_access import hub_or_cache


class FusedVisionConfig(PreTrainedConfig):
    """Two towers, of transformers or of this package."""

    model_type = "mm_moslora_fused_vision"

    towers: list[dict[str, Any]] | None = None
    """Their configurations."""
    prefixes: list[int] | None = None
    """Tokens before the first patch, per tower."""
    statistics: list[list[list[float]]] | None = None
    """Pixel mean and standard deviation, per tower. Inputs are normalised for the first one."""
    hidden_size: int = 0
    """Width of the joined features."""
    image_size: int = 224
    """Side of the input, pixels."""
    patch_size: int = 14
    """Side of a patch of the first tower, pixels."""


class FusedVisionModel(PreTrainedModel):
    """`hidden_states[i]` is ``[N, P, V]``: layer ``i`` of every tower, prefix tokens dropped, side by side."""

    config: FusedVisionConfig
    config_class = FusedVisionConfig
    main_input_name = "pixel_values"
    base_model_prefix = "vision"

    def __init__(self, config: FusedVisionConfig) -> None:
        super().__init__(config)
        self.towers = nn.ModuleList(
            AutoModel.from_config(AutoConfig.for_model(**settings), trust_remote_code=False)
            for settings in config.towers or []
        )
        self.post_init()

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool | int | list[int] = -1, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Encode images."""
        layers = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
        parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        for index, tower in enumerate(self.towers):
            pixels = self._renormalised(pixel_values, index).to(next(tower.parameters()).dtype)
            output = tower(pixels, output_hidden_states=list(layers))
            for layer in layers:
                assert self.config.prefixes is not None
                parts[layer].append(output.hidden_states[layer][:, self.config.prefixes[index] :])
        states: list[Tensor | None] = [None] * (1 + max(abs(layer) for layer in layers))
        for layer, maps in parts.items():
            states[layer] = torch.cat([maps[0], *(item.to(maps[0].dtype) for item in maps[1:])], dim=-1)
        return BaseModelOutputWithPooling(hidden_states=cast(Any, tuple(states)))

    def _renormalised(self, pixels: Tensor, index: int) -> Tensor:
        if index == 0:
            return pixels
        assert self.config.statistics is not None
        (mean, std), (own_mean, own_std) = (
            (torch.tensor(values, device=pixels.device, dtype=torch.float32)[:, None, None] for values in pair)
            for pair in (self.config.statistics[0], self.config.statistics[index])
        )
        return (pixels.float() * std + mean - own_mean) / own_std


AutoConfig.register(FusedVisionConfig.model_type, FusedVisionConfig)
AutoModel.register(FusedVisionConfig, FusedVisionModel)


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """Input and output of a vision tower."""

    size: int
    """Side of the square input, pixels."""
    tokens: int
    """Patches per image, without prefix tokens (``P``)."""
    width: int
    """Width of the features (``V``), all selected layers together."""
    prefix: int
    """Tokens before the first patch: CLS and registers."""
    patch: int
    """Side of a patch, pixels; 0: the tower has no patches (convolutional trunks)."""
    mean: tuple[float, float, float]
    """Pixel mean per channel, after scaling to 0..1."""
    std: tuple[float, float, float]
    """Pixel standard deviation per channel."""
    resample: int = BICUBIC
    """PIL resampling filter."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        side = math.isqrt(self.tokens)
        if side * side != self.tokens:
            raise ModelError(f"The vision tower gives {self.tokens} patches, which form no square grid.")
        return side


def load_vision(
    config: VisionConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> tuple[PreTrainedModel, ImageSpec]:
    """Load a vision tower, or two side by side, and describe it; those of transformers are not read on `meta`."""
    with hub_or_cache(config.name, config.fuse_with):
        tower, spec = _load(config, weights=True, device=device)
    cast_parameters(tower, dtype)
    if device is not None and device.type != "meta":
        cast(nn.Module, tower).to(device)  # towers of open_clip and timm are read by main memory
    return tower, spec


def sketch_vision(config: VisionConfig) -> tuple[PreTrainedModel, ImageSpec]:
    """The result of `load_vision` on the meta device; only configurations are read."""
    with torch.device("meta"):
        return _load(config, weights=False)


def _load(
    config: VisionConfig, *, weights: bool, device: torch.device | None = None
) -> tuple[PreTrainedModel, ImageSpec]:
    tower, statistics = _load_one(config, weights=weights, device=device)
    spec = describe(tower, config, statistics)
    return _load_beside(config, tower, spec, weights=weights, device=device) if config.fuse_with else (tower, spec)


def _load_one(
    config: VisionConfig, *, weights: bool, device: torch.device | None
) -> tuple[PreTrainedModel, PixelStatistics]:
    library, _, name = config.name.partition(":")
    if library == "open_clip":
        return load_open_clip(name, config, weights=weights)
    if library == "timm" or is_timm_folder(Path(config.name)):
        return load_timm(name if library == "timm" else config.name, config, weights=weights)
    return _load_transformers(config, weights=weights, device=device)


def _load_beside(
    config: VisionConfig, tower: PreTrainedModel, spec: ImageSpec, *, weights: bool, device: torch.device | None
) -> tuple[PreTrainedModel, ImageSpec]:
    """Load the second tower and join the two channel by channel (prismatic, 2402.07865, section 4.2)."""
    assert config.fuse_with is not None
    alone = dataclasses.replace(
        config, name=config.fuse_with, fuse_with=None, revision=None, image_size=config.image_size or spec.size
    )
    second, statistics = _load_one(alone, weights=weights, device=device)
    other = describe(second, alone, statistics)
    if other.tokens != spec.tokens:
        raise ModelError(
            f"model.vision.fuse_with is {config.fuse_with!r}, which gives {other.tokens} patches at {spec.size} "
            f"pixels; {config.name!r} gives {spec.tokens}. Channels can be joined only where the patches are the "
            "same: choose towers with the same size and patch."
        )
    fused = FusedVisionConfig(
        towers=[tower.config.to_dict(), second.config.to_dict()],
        prefixes=[spec.prefix, other.prefix],
        statistics=[[list(item.mean), list(item.std)] for item in (spec, other)],
        image_size=spec.size,
        patch_size=spec.patch,
        hidden_size=spec.width + other.width,
    )
    with torch.device("meta"):
        model = FusedVisionModel(fused)
    model.towers[0], model.towers[1] = tower, second
    return model, dataclasses.replace(spec, width=spec.width + other.width, prefix=0)


@dataclass(frozen=True, kw_only=True)
class _TowerRun:
    """One picture through an architecture; equal ones give features of the same shape."""

    tower: type[PreTrainedModel]
    text: str
    """The configuration, as JSON."""
    size: int
    layers: int | tuple[int, ...]
    config: PreTrainedConfig = dataclasses.field(compare=False)


@lru_cache(maxsize=64)
def _features(run: _TowerRun) -> tuple[int, ...]:
    """Shape of the features, ``[1, tokens, V]``, from the architecture without weights (on the meta device)."""
    with torch.device("meta"):
        twin = cast(Any, run.tower)(run.config).eval()
        output = twin(torch.zeros(1, 3, run.size, run.size), output_hidden_states=run.layers)
    layers = [run.layers] if isinstance(run.layers, int) else run.layers
    return tuple(torch.cat([output.hidden_states[layer] for layer in layers], dim=-1).shape)


def describe(tower: PreTrainedModel, config: VisionConfig, pixels: PixelStatistics) -> ImageSpec:
    """Measure what a tower gives, by running its architecture without weights (on the meta device)."""
    size = config.image_size or pixels.size
    native = getattr(tower.config, "image_size", size)
    kind = tower.config.model_type
    if size != native and not tower_family(kind).any_size and kind != WrappedVisionConfig.model_type:
        raise ModelError(
            f"model.vision.image_size is {size}, but {kind} towers have fixed position embeddings for {native} pixels. "
            "Leave image_size out, or choose a tower that interpolates: "
            f"{', '.join(name for name, family in TOWERS.items() if family.any_size)}."
        )
    layers = config.feature_layer if isinstance(config.feature_layer, int) else tuple(config.feature_layer)
    try:
        _, total, width = _features(
            _TowerRun(
                tower=type(tower), text=tower.config.to_json_string(), size=size, layers=layers, config=tower.config
            )
        )
    except (IndexError, RuntimeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"model.vision: {config.name!r} gives no features at layer {config.feature_layer} for {size} pixels "
            f"({error}). Choose another feature_layer or image_size."
        ) from error
    patch = getattr(tower.config, "patch_size", 0) or 0
    patches = (size // patch) ** 2 if patch else total
    return ImageSpec(
        size=size, tokens=patches, width=width, prefix=total - patches, patch=int(patch),
        mean=pixels.mean, std=pixels.std, resample=pixels.resample,
    )  # fmt: skip


def _load_transformers(
    config: VisionConfig, *, weights: bool, device: torch.device | None
) -> tuple[PreTrainedModel, PixelStatistics]:
    import transformers

    if weights:
        refuse_adapter_beside(config.name, config.revision)
    refuse_configuration(config.name, config.revision)
    try:
        if weights:
            whole = AutoConfig.from_pretrained(config.name, revision=config.revision, trust_remote_code=False)
        else:
            whole = config_to_count(config.name, config.revision)
    except Exception as error:  # configurations are texts of others, and their classes check little
        hint = "Encoders of other libraries are open_clip:MODEL or timm:MODEL."
        raise ModelError(f"{unreadable('model.vision.name', config.name, error)} {hint}") from error
    family = tower_family(whole.model_type)
    if family.patches_vary:
        raise ModelError(
            f"model.vision.name is {config.name!r}, a NaFlex SigLIP2: its number of patches depends on the picture. "
            "Choose one of fixed size, such as google/siglip2-so400m-patch14-384."
        )
    half = family.vision_half if whole.model_type == family.whole else None
    loader: Any = getattr(transformers, half) if half else AutoModel
    if not weights:
        part = getattr(whole, "vision_config", whole)
        sketch: PreTrainedModel = loader(part) if half else loader.from_config(part, trust_remote_code=False)
        return sketch, _processor_statistics(config, sketch.config)
    try:
        tower: PreTrainedModel = load_base(
            loader, config.name, revision=config.revision, dtype=torch.float32, device_map=device,
            needed=partial(_reaching_the_features, config),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"model.vision.name is {config.name!r}, which does not load as a vision tower: {reason_of(error)}."
        ) from error
    return tower, _processor_statistics(config, tower.config)


def _reaching_the_features(config: VisionConfig, tower: PreTrainedModel, names: set[str]) -> set[str]:
    """The weights of a tower, among these, that its features depend on: heads and poolers behind them do not."""
    size = config.image_size or int(getattr(tower.config, "image_size", 224))
    with torch.device("meta"), torch.enable_grad():
        twin = cast(Any, type(tower))(tower.config).eval()
        try:
            states = twin(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states
            layers = [config.feature_layer] if isinstance(config.feature_layer, int) else config.feature_layer
            total = sum(states[layer].sum() for layer in layers)
        except (IndexError, RuntimeError, AssertionError, ValueError, TypeError):
            return names
        weights = {name: weight for name, weight in twin.named_parameters() if name in names}
        gradients = torch.autograd.grad(total, list(weights.values()), allow_unused=True)
    unused = {name for name, gradient in zip(weights, gradients, strict=True) if gradient is None}
    return names - unused


def _processor_statistics(config: VisionConfig, tower: PreTrainedConfig) -> PixelStatistics:
    """Pixel statistics from the checkpoint's preprocessor file, or those of the family where there is none."""
    usual = tower_family(tower.model_type).statistics
    size = int(getattr(tower, "image_size", 224))
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(config.name, revision=config.revision)
    except OSError:
        return PixelStatistics(size=size, mean=usual.mean, std=usual.std)
    crop = stored.get("crop_size") if stored.get("do_center_crop", True) else None
    crop = crop or stored.get("size") or {}
    side = crop if isinstance(crop, int) else crop.get("height") or crop.get("shortest_edge")
    return PixelStatistics(
        size=int(side or size),
        mean=tuple(stored.get("image_mean") or usual.mean),
        std=tuple(stored.get("image_std") or usual.std),
        resample=int(stored.get("resample", BICUBIC)),
    )
