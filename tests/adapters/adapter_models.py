"""Tiny models with fixed random weights, and adapters that are not at their start."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from mm_moslora.adapters import MoSLoRAConfig, MoSLoRALayer, add_moslora

VOCABULARY = 64
SIBLINGS = ["q_proj", "k_proj", "v_proj"]
IDS = torch.arange(14).reshape(2, 7) % 11

_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(dtype: torch.dtype = torch.float32, **changes: int) -> LlamaForCausalLM:
    """A two-layer Llama in evaluation mode; equal weights at every call."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(_LLAMA | changes))).to(dtype).eval()


def gpt2() -> GPT2LMHeadModel:
    """A two-layer GPT-2; its linear layers are `Conv1D`."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2)).eval()


def llava() -> LlavaForConditionalGeneration:
    """A LLaVA; its vision tower and its language model share the names q_proj, k_proj and v_proj."""
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**_LLAMA), image_token_index=3, vision_feature_layer=-2
    )
    return LlavaForConditionalGeneration(config).eval()


def llava_inputs() -> dict[str, Tensor]:
    """One picture (4 patches, 4 placeholders) and a few words."""
    pixels = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    return {"input_ids": torch.tensor([[5, 3, 3, 3, 3, 7, 8, 9]]), "pixel_values": pixels}


def train_a_bit(model: nn.Module, *, seed: int = 1, scale: float = 0.2) -> None:
    """Move every factor away from its start, as training would, only faster."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, MoSLoRALayer):
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.data.add_(noise, alpha=scale)


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(ids).logits


def two_subspaces(A: Tensor, B: Tensor) -> Tensor:
    """Two-subspaces mixing as the paper writes it (arXiv 2406.11909, section 2.2), without scaling; of even rank."""
    A1, A2 = A.chunk(2, dim=0)
    B1, B2 = B.chunk(2, dim=1)
    return (B1 + B2) @ (A1 + A2)


def folded(base: nn.Module, folder: Path) -> peft.PeftModel:
    """Plain LoRA from the files for everybody: what PEFT loads where this package is not imported."""
    config = peft.LoraConfig.from_pretrained(folder)
    config.inference_mode = True
    model = peft.get_peft_model(base, config)
    assert not peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors")).unexpected_keys
    return model.eval()


def adapted(base: PreTrainedModel | None = None, **changes) -> peft.PeftModel:
    options = {"r": 4, "lora_alpha": 8, "target_modules": SIBLINGS, "task_type": "CAUSAL_LM"}
    model = add_moslora(base or llama(), MoSLoRAConfig(**(options | changes)))
    train_a_bit(model)
    return model.eval()
