"""Configurations of the shipped recipes' models, written into folders; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers as t
from torch import nn

from mm_moslora.config import Recipe
from mm_moslora.models.model_sizes import shipped_config, shipped_shapes
from mm_moslora.training.metrics.model_cost import ModelCost, model_cost

INTERNLM2 = "internlm/internlm2-chat-7b"
CONVERTED = "internlm2-chat-7b-llama"
"""The same in Llama's layout."""


class FusedConfig(t.LlamaConfig):
    """InternLM2's sizes."""

    model_type = "fused_llama"


class FusedAttention(nn.Module):
    """InternLM2's projections: q, k and v in one."""

    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        head = config.hidden_size // config.num_attention_heads
        wide = (config.num_attention_heads + 2 * config.num_key_value_heads) * head
        self.wqkv = nn.Linear(config.hidden_size, wide, bias=False)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)


class FusedMlp(nn.Module):
    """InternLM2's gated MLP."""

    def __init__(self, config: FusedConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)


class FusedModel(t.LlamaModel):
    """A Llama with InternLM2's five linear layers in each layer; it is counted, never run."""

    config_class = FusedConfig

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn, layer.mlp = FusedAttention(config), FusedMlp(config)


t.AutoConfig.register(FusedConfig.model_type, FusedConfig)
t.AutoModel.register(FusedConfig, FusedModel)


def configurations() -> dict[str, t.PreTrainedConfig]:
    """Those of the shipped recipes' models; InternLM2 with five linear layers, and in Llama's layout."""
    found = {name: shipped_config(name) for name in shipped_shapes()}
    found[CONVERTED] = found[INTERNLM2]
    found[INTERNLM2] = FusedConfig(**{**found[INTERNLM2].to_dict(), "model_type": FusedConfig.model_type})
    return found


def write_configurations(folder: Path) -> dict[str, str]:
    """Hub id to folder."""
    paths = {}
    for name, config in configurations().items():
        path = folder / name.replace("/", "--")
        config.save_pretrained(path)
        paths[name] = str(path)
    return paths


def memory_of(recipe: Recipe, **options: Any) -> ModelCost:
    """What the model of a recipe needs per token."""
    again = recipe.train.vision_gradient_checkpointing
    return model_cost(recipe.model, recipe.adapter, vision_checkpointing=again, **options)
