#!/usr/bin/env python
"""The memory that `mm-moslora plan` prints against the resident memory of real runs on a CPU, as a ratio.

    python scripts/soak/plan_peak.py

Every run is a process of its own: `mm-moslora train`, fp32, plain torch, two steps of one full micro-batch. What the
same run takes with a model of a few kilobytes is the process itself, and is taken off; so is the plan's CUDA context.
The plan is of the micro-batch that needs most, full of pictures and supervised tokens; `counted` is of the run's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from parts import make_parts, make_recipe, write
from PIL import Image
from tiny import make_tokenizer
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from mm_moslora.config import Recipe
from mm_moslora.models.memory_efficient.loss_head import CHUNK_BYTES
from mm_moslora.planning.run_plan import DataSize, plan
from mm_moslora.training.metrics.activation_memory import activation_memory
from mm_moslora.training.metrics.gpu_memory import StepMemory
from mm_moslora.training.metrics.gpu_specs import parse_gpus

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
VISUAL = 196
"""Tokens of a picture."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and a micro-batch."""

    width: int
    layers: int
    tokens: int
    """Of a record."""
    micro_batch: int
    pictures: bool = False
    full: bool = False
    """The language model trains whole."""


SIZES = (
    Size(width=256, layers=6, tokens=512, micro_batch=4),
    Size(width=512, layers=8, tokens=512, micro_batch=4),
    Size(width=768, layers=6, tokens=256, micro_batch=2),
    Size(width=512, layers=8, tokens=512, micro_batch=4, pictures=True),
    Size(width=384, layers=6, tokens=256, micro_batch=4, full=True),
)


def make_model(folder: Path, size: Size) -> dict[str, Path]:
    """A Llama and a CLIP tower with random weights."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.width * 11 // 4,
        num_hidden_layers=size.layers, num_attention_heads=size.width // 64, num_key_value_heads=size.width // 64,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    tower = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=112,
        patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(tower).save_pretrained(folder / "vision")
    return {"language": folder / "language", "vision": folder / "vision", "records": make_records(folder, size)}


def make_records(folder: Path, size: Size) -> Path:
    """Records that are nearly as long as they may be."""
    (folder / "images").mkdir()
    words = "red green blue circle square "
    room = size.tokens - 40 - (VISUAL if size.pictures else 0)
    answer = words * (room // len(make_tokenizer()(words)["input_ids"]))
    lines = []
    for number in range(2 * size.micro_batch):
        turns = [("<image>\nsay it" if size.pictures else "say it", answer)]
        record: dict[str, Any] = {"id": f"r{number}"}
        if size.pictures:
            Image.new("RGB", (112, 112), (20 * number, 90, 30)).save(folder / "images" / f"{number}.png")
            record["image"] = f"{number}.png"
        record["conversations"] = [
            part
            for question, answer in turns
            for part in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]
        lines.append(json.dumps(record))
    path = folder / "train.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def recipe_of(parts: dict[str, Path], output: Path, size: Size) -> Recipe:
    """Its recipe."""
    made = make_recipe(
        parts, output, "none", steps=2, global_batch=size.micro_batch, micro_batch=size.micro_batch,
        background_save=False,
    )  # fmt: skip
    model = replace(made.model, language_mode="full") if size.full else made.model
    adapter = replace(made.adapter, rank=32, alpha=64)
    return replace(made, model=model, adapter=adapter, data=replace(made.data, max_length=size.tokens))


def counted_mib(recipe: Recipe, size: Size) -> float:
    """What the plan's formulas give for the micro-batch of the run."""
    model = activation_memory(recipe.model, recipe.adapter, dtype=torch.float32)
    step = StepMemory(size=model, zero="none", world=1, checkpointing=False, logit_chunk=CHUNK_BYTES["cpu"])
    images, tokens = size.micro_batch * size.pictures, size.micro_batch * (size.tokens - 20)
    needed = step.of(tokens, supervised=tokens - images * VISUAL, images=images)
    return (needed.total - needed.context) / 2**20


def measured(recipe: Recipe) -> float:
    """GiB of a run at its peak."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}", "WORLD_SIZE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mm_moslora", "train", write(recipe)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    summary = json.loads(Path(recipe.train.output, "summary.json").read_text())
    return float(summary["memory_gib"])


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(range(len(SIZES))), help="numbers, from 0")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        process = measured(make_recipe(make_parts(root / "tiny"), root / "tiny-run", "none", steps=2))
        print(json.dumps({"process_mib": round(1024 * process)}), flush=True)
        for number in options.sizes:
            size = SIZES[number]
            (root / str(number)).mkdir()
            recipe = recipe_of(make_model(root / str(number), size), root / f"run-{number}", size)
            data = DataSize(samples=8, tokens=size.tokens, supervised=1.0, pictures=float(size.pictures))
            own = plan(recipe, parse_gpus("1xA100-80G"), data).own
            planned = 1024 * (own.memory.total - own.memory.context) / GIB
            taken, counted = 1024 * (measured(recipe) - process), counted_mib(recipe, size)
            figures = {"measured_mib": round(taken), "planned_mib": round(planned), "counted_mib": round(counted)}
            ratios = {"planned_over_measured": planned / taken, "counted_over_measured": counted / taken}
            print(
                json.dumps(vars(size) | figures | {key: round(value, 2) for key, value in ratios.items()}), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
