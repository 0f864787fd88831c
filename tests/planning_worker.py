"""Measures the peak resident memory of two training steps, each size in a process of its own; JSON on stdout."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, cast

import torch
import transformers

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.losses import CHUNK_BYTES, use_loss_head
from mm_moslora.machine import keep_memory
from mm_moslora.models.attention import SEGMENTS, set_attention
from mm_moslora.models.build import Assembly
from mm_moslora.models.lean import use_lean_layers
from mm_moslora.models.trainable import attach_adapters
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.optim import parameter_groups

SIZES = ((256, 6, 2048), (384, 6, 1536), (512, 8, 1024), (768, 6, 1024))
"""Width, layers, tokens."""


def status(key: str) -> int:
    """Bytes, from the kernel."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def recipe(folder: Path) -> Recipe:
    return Recipe.from_dict({"model": {"language": str(folder)}, "adapter": {"rank": 32, "alpha": 64}})


def configuration(width: int, layers: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=8000,
    )  # fmt: skip


def run(folder: Path, tokens: int) -> dict[str, int]:
    """Two steps."""
    start = status("VmRSS")
    given = recipe(folder)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    attach_adapters(Assembly(model=model, tokenizer=cast(Any, None)), given.model, given.adapter)
    set_attention(model, SEGMENTS)
    use_lean_layers(model)
    use_loss_head(model)
    module = LossModule(model.train(), None)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    engine = TorchEngine(module, parameter_groups(module, given.optim), settings)
    supervised = torch.arange(tokens // 2) >= tokens * 3 // 8
    ids = torch.randint(0, 8000, (tokens // 2,))
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=supervised)] * 2)
    for _ in range(2):
        engine.step([batch], 1.0)
    return {"start": start, "peak": status("VmHWM"), "supervised": batch.supervised_tokens}


def main() -> None:
    """One child per size, forked when everything is imported."""
    torch.set_num_threads(1)
    assert CHUNK_BYTES
    keep_memory()  # as `train` does
    torch.randn(256, 256) @ torch.randn(256, 256)
    for width, layers, tokens in SIZES:
        folder = Path(sys.argv[1]) / str(width)
        configuration(width, layers).save_pretrained(folder)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, json.dumps(run(folder, tokens)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        print(json.dumps({"width": width, "tokens": tokens} | json.loads(os.read(reader, 4096))), flush=True)


if __name__ == "__main__":
    main()
