#!/usr/bin/env python
"""MoSLoRA with Hugging Face's `Trainer`: nothing of the training code knows about the mixer.

    python examples/hf_trainer.py OUT

A small causal language model from a config learns a repeating pattern; the checkpoints and the final folder are double
folders, which `load_adapter` and stock PEFT both read.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Trainer, TrainingArguments

from mm_moslora.adapters import MoSLoRAConfig, add_moslora


class Pattern(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards from a random start."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (torch.arange(24) + index) % 31
        return {"input_ids": ids, "labels": ids}


def base() -> PreTrainedModel:
    """The language model before tuning; equal weights at every call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, num_attention_heads=4, num_key_value_heads=4, **sizes))


def train(out: Path, *, steps: int = 40) -> list[float]:
    """Train, save to `out/adapter`, and return the logged losses."""
    model = add_moslora(base(), MoSLoRAConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, learning_rate=2e-2, per_device_train_batch_size=8, logging_steps=5,
        save_steps=steps, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Pattern())
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("runs/hf_trainer"), help="folder to write into")
    losses = train(parser.parse_args().out)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
