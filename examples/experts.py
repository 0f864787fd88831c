#!/usr/bin/env python
"""MoSLoRA on the experts of a mixture-of-experts model: trained, saved, merged, and compared by logits.

    python examples/experts.py runs/experts                   # a small Qwen3-MoE with random weights, seconds on a CPU
    python examples/experts.py runs/experts --model ID        # any model that holds its experts as stacked parameters

Every expert gets a mixer of its own; the router stays frozen.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter

arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
arguments.add_argument("output", type=Path, help="folder of the adapter")
arguments.add_argument("--model", help="hub id or folder; without it a small model is made")
arguments.add_argument("--steps", type=int, default=30, help="optimiser steps")
given = arguments.parse_args()


def base() -> torch.nn.Module:
    """The model without adapters, the same at every call."""
    if given.model:
        return AutoModelForCausalLM.from_pretrained(given.model, trust_remote_code=False, dtype=torch.float32)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 128, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
    }  # fmt: skip
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))


config = MoSLoRAConfig(r=8, lora_alpha=16, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
model = add_moslora(base(), config)  # every linear layer, and the experts
model.print_trainable_parameters()
ids = torch.arange(96).view(4, 24)
optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
model.train()
for step in range(given.steps):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, given.steps - 1):
        print(f"step {step + 1}: loss {float(loss.detach()):.4f}")
save_adapter(model.eval(), given.output)
with torch.no_grad():
    live = model(ids).logits
    merged = merge(load_adapter(base(), given.output))(ids).logits
print(f"largest difference of the logits after the merge: {float((live - merged).abs().max() / live.abs().max()):.1e}")
