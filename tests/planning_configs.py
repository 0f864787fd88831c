"""Configurations of well-known models, from their public values, written into folders; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import transformers as t
from torch import nn

LLAMA = {
    "lmsys/vicuna-7b-v1.5": (4096, 11008, 32, 32, 32, 32000),
    "lmsys/vicuna-13b-v1.5": (5120, 13824, 40, 40, 40, 32000),
    "meta-llama/Meta-Llama-3-8B-Instruct": (4096, 14336, 32, 32, 8, 128256),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": (2048, 8192, 24, 32, 32, 49152),
}
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
    """A Llama whose layers hold InternLM2's five linear layers; it is counted, never run."""

    config_class = FusedConfig

    def __init__(self, config: FusedConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.self_attn, layer.mlp = FusedAttention(config), FusedMlp(config)


t.AutoConfig.register(FusedConfig.model_type, FusedConfig)
t.AutoModel.register(FusedConfig, FusedModel)


def llama(width: int, inner: int, layers: int, heads: int, key_heads: int, vocabulary: int, kind=t.LlamaConfig):
    return kind(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=8192,
    )  # fmt: skip


def configurations() -> dict[str, t.PreTrainedConfig]:
    found = {name: llama(*sizes) for name, sizes in LLAMA.items()}
    found[INTERNLM2] = llama(4096, 14336, 32, 32, 8, 92544, kind=FusedConfig)
    found[CONVERTED] = llama(4096, 14336, 32, 32, 8, 92544)
    found["Qwen/Qwen3-4B"] = t.Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    found["openai/clip-vit-large-patch14-336"] = t.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    found["google/siglip2-so400m-patch16-384"] = t.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=16,
    )  # fmt: skip
    found["google/siglip-base-patch16-384"] = t.SiglipVisionConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=384,
        patch_size=16,
    )  # fmt: skip
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    found["Qwen/Qwen2.5-VL-7B-Instruct"] = t.Qwen2_5_VLConfig(text_config=text)
    text = {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    }  # fmt: skip
    found["Qwen/Qwen3-VL-8B-Instruct"] = t.Qwen3VLConfig(text_config=text)
    return found


def write_configurations(folder: Path) -> dict[str, str]:
    """Hub id to folder."""
    paths = {}
    for name, config in configurations().items():
        path = folder / name.replace("/", "--")
        config.save_pretrained(path)
        paths[name] = str(path)
    return paths
