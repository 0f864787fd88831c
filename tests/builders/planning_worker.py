"""Measures the peak memory of a training step after a small one, each size in a process of its own; JSON on stdout.

Argument: a folder to write into.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import transformers

from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.memory_efficient.loss_head import CHUNK_BYTES
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.pretrained_vlm import tower_path
from mm_moslora.models.trainable_parts import attach_adapters, checkpoint_layers
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils.hardware import keep_freed_memory

SIZES = ((256, 6, 1024, "none"), (768, 3, 512, "none"), (768, 3, 512, "nf4"))
"""Width, layers, tokens, quantisation: activations take the most, weights do, and weights would."""
TOWERS = (False, True)
"""Checkpointing of a tower with adapters."""
PICTURES, TOKENS = 2, 600


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
    """A small and a whole step."""
    start = status("VmRSS")
    given = recipe(folder, quantisation)
    supervised = torch.arange(tokens // 2) >= tokens * 3 // 8
    ids = torch.randint(0, 8000, (tokens // 2,))
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=supervised)] * 2)
    peak = peak_of(given, built(folder, quantisation), batch)
    return {"start": start, "peak": peak, "supervised": batch.supervised_tokens}


def with_tower(folder: Path, checkpointing: bool) -> Recipe:
    vision = {"name": str(folder / "vision"), "mode": "adapter"}
    return Recipe.from_dict({
        "model": {"language": str(folder / "256"), "vision": vision}, "adapter": {"rank": 16, "alpha": 32},
        "train": {"vision_gradient_checkpointing": checkpointing},
    })  # fmt: skip


def run_tower(folder: Path, checkpointing: bool) -> dict[str, int]:
    """A small step, and a whole one on pictures."""
    given = with_tower(folder, checkpointing)
    bones = build_meta_model(given.model, given.adapter, dtype=torch.float32)
    # What is needed is asked here, not what lies in the holes between blocks that the C library keeps.
    ctypes.CDLL(None).mallopt(-3, 2**16)
    start = status("VmRSS")
    model = transformers.LlavaForConditionalGeneration(bones.model.config)
    ids = torch.randint(0, 7000, (TOKENS // PICTURES,))
    ids[: bones.tokens_per_image] = model.config.image_token_id
    supervised = torch.arange(len(ids)) >= len(ids) * 15 // 16
    example = Example(
        id="",
        input_ids=ids,
        supervised=supervised,
        pictures=[ProcessedImage(tensors={"pixel_values": torch.randn(1, 3, 224, 224)})],
    )
    batch = Batch.from_examples([example] * PICTURES)
    return {"start": start, "peak": peak_of(given, model, batch), "supervised": batch.supervised_tokens}


def peak_of(given: Recipe, model: transformers.PreTrainedModel, batch: Batch) -> int:
    attach_adapters(Parts(model=model), given.model, given.adapter)
    set_attention(model, SEGMENTS)
    use_lean_layers(model)
    use_loss_head(model)
    model.train()
    if given.train.vision_gradient_checkpointing:
        checkpoint_layers(cast(transformers.PreTrainedModel, model.get_submodule(tower_path(model))))
    module = LossModule(model, None)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    engine = TorchEngine(module, parameter_groups(module, given.optim), settings)
    few = Example(id="", input_ids=torch.arange(16), supervised=torch.ones(16).bool())
    engine.step([Batch.from_examples([few])], 1.0)  # makes the optimiser's state
    engine.step([batch], 1.0)
    return status("VmHWM")


def in_child(work: Callable[[], dict[str, int]]) -> dict[str, int]:
    """Forked when everything is imported."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return dict(json.loads(os.read(reader, 4096)))


def write_tower(folder: Path) -> None:
    configuration(256, 2).save_pretrained(folder / "256")
    transformers.CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6, image_size=224,
        patch_size=14,
    ).save_pretrained(folder / "vision")  # fmt: skip
    transformers.CLIPImageProcessor(size={"height": 224, "width": 224}).save_pretrained(folder / "vision")


def main() -> None:
    """One child per size, and two of a tower."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    assert CHUNK_BYTES
    importlib.import_module("bitsandbytes")  # so that no child's memory grows by it
    keep_freed_memory()  # as `train` does
    torch.randn(256, 256) @ torch.randn(256, 256)
    for width, layers, tokens, quantisation in SIZES:
        own = folder / str(width)
        configuration(width, layers).save_pretrained(own)
        found = in_child(lambda own=own, tokens=tokens, kind=quantisation: run(own, tokens, kind))
        known = {"width": width, "tokens": tokens, "quantisation": quantisation}
        print(json.dumps(known | found), flush=True)
    write_tower(folder / "seeing")
    given = with_tower(folder / "seeing", checkpointing=False)
    build_meta_model(given.model, given.adapter)  # imports what it needs
    for checkpointing in TOWERS:
        found = in_child(lambda checkpointing=checkpointing: run_tower(folder / "seeing", checkpointing))
        print(json.dumps({"checkpointing": checkpointing} | found), flush=True)


if __name__ == "__main__":
    main()
