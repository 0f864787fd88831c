"""Models whose experts are stacked parameters: mixers in their linear layers, plain PEFT on the experts."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    adapted_modules,
    add_method,
    add_moslora,
    load_adapter,
    load_method,
    merge,
    method_config,
    method_named,
    method_snapshot,
    save_adapter,
)
from mm_moslora.adapters.adapter_targets import linear_targets
from mm_moslora.adapters.folders.export_adapter import layers_read_as_experts
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, logits, train_a_bit

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def qwen3_moe(**changes: object) -> nn.Module:
    """In evaluation mode; equal weights at every call."""
    torch.manual_seed(0)
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**(SIZES | changes))).eval()


def test_attention_carries_mixers_and_a_dense_layer_beside_experts_stays_a_layer(tmp_path: Path) -> None:
    """PEFT takes gate_proj and up_proj for the experts' old names, wherever they are."""
    assert linear_targets(llama()) == "all-linear"
    names = linear_targets(qwen3_moe(mlp_only_layers=[0]))
    assert names == [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
    model = add_moslora(qwen3_moe(mlp_only_layers=[0]), MoSLoRAConfig(r=4), targets=names)
    assert len(adapted_modules(model)) == 2 * 4 + 3
    train_a_bit(model, scale=0.1)
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(qwen3_moe(mlp_only_layers=[0]), tmp_path / "a")), live)
    torch.testing.assert_close(logits(merge(model)), live, atol=1e-5, rtol=0)
    read = layers_read_as_experts(qwen3_moe(mlp_only_layers=[0]), peft.LoraConfig.from_pretrained(tmp_path / "a"))
    assert read == [f"model.layers.0.mlp.{kind}_proj" for kind in ("down", "gate", "up")]


def test_experts_carry_no_mixer() -> None:
    with pytest.raises(AdapterError, match=r"target_parameters is set.*use peft\.LoraConfig"):
        MoSLoRAConfig(r=4, target_parameters=EXPERTS)
    with pytest.raises(AdapterError, match="holds the weights of experts, which carry no mixer"):
        peft.get_peft_model(qwen3_moe(), MoSLoRAConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj"]))


def test_experts_take_plain_lora_by_pefts_own_option(tmp_path: Path) -> None:
    config = method_config(method_named("LORA"), {"target_parameters": EXPERTS}, rank=4, alpha=8, dropout=0.0)
    model = add_method(qwen3_moe(), config, targets=ATTENTION)
    train_a_bit(model, scale=0.1)
    assert sum("experts" in name and "lora_A" in name for name, _ in model.named_parameters()) == 4
    live = logits(model.eval())
    method_snapshot(model, state={}).write(tmp_path / "a")
    torch.testing.assert_close(logits(load_method(qwen3_moe(), tmp_path / "a")), live, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="target_parameters is set"):
        load_adapter(qwen3_moe(), tmp_path / "a")
