"""Two vision towers side by side: each gets the pixels that it was trained on; features are joined by channel.

Shapes: ``N`` images, ``P`` patches per image, ``V`` width of both towers together, ``H x W`` pixels.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


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
