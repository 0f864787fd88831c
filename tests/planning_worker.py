"""Measures the peak resident memory of two training steps, each size in a process of its own; JSON on stdout."""

from __future__ import annotations

import importlib
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

SIZES = (
    (256, 6, 2048, "none"), (384, 6, 1536, "none"), (512, 8, 1024, "none"), (768, 6, 1024, "none"),
    (768, 6, 1024, "nf4"),
)  # fmt: skip
"""Width, layers, tokens, quantisation."""


def status(key: str) -> int:
    """Bytes, from the kernel."""
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{key}:")[2].split()[0]) * 1024


def recipe(folder: Path, quantisation: str) -> Recipe:
    model = {"language": str(folder), "quantisation": quantisation}
    return Recipe.from_dict({"model": model, "adapter": {"rank": 32, "alpha": 64}})


def configuration(width: int, layers: int) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, vocab_size=8000,
    )  # fmt: skip


def pack(module: torch.nn.Module) -> None:
    """Put the linear layers of a model on the meta device into nf4, one by one: nothing dense is left behind."""
    import bitsandbytes as bnb

    for path, linear in list(module.named_modules()):
        if isinstance(linear, torch.nn.Linear):
            packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, torch.float32, quant_type="nf4")
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, packed.to("cpu"))


def built(folder: Path, quantisation: str) -> transformers.PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    if quantisation == "none":
        return transformers.AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    pack(model.model)
    for module in model.modules():
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta:
                made = torch.rand(tensor.shape)
                own = torch.nn.Parameter(made) if name in module._parameters else made
                setattr(module, name, own)
    return model


def run(folder: Path, tokens: int, quantisation: str) -> dict[str, int]:
    """Two steps."""
    start = status("VmRSS")
    given = recipe(folder, quantisation)
    model = built(folder, quantisation)
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
    importlib.import_module("bitsandbytes")  # so that no child's memory grows by it
    keep_memory()  # as `train` does
    torch.randn(256, 256) @ torch.randn(256, 256)
    for width, layers, tokens, quantisation in SIZES:
        folder = Path(sys.argv[1]) / str(width)
        configuration(width, layers).save_pretrained(folder)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, json.dumps(run(folder, tokens, quantisation)).encode())
            os._exit(0)
        os.waitpid(child, 0)
        known = {"width": width, "tokens": tokens, "quantisation": quantisation}
        print(json.dumps(known | json.loads(os.read(reader, 4096))), flush=True)


if __name__ == "__main__":
    main()
