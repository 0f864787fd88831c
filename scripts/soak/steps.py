#!/usr/bin/env python
"""Test whether a step gets slower or larger in a long run: thousands of steps of a tiny model on the real engine.

    python scripts/soak/steps.py --steps 5000

Prints one JSON object: median CPU time per step in ten equal sections, the slope over all steps relative to the median
(per 1,000 steps), resident memory after the first and after the last section, and, for batches of one to eight samples,
the growth of the step's time (1.0: proportional).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import torch
import transformers

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.kernels.attention.attention_choice import set_attention
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.parameter_groups import parameter_groups

STRETCHES = 10


def engine(width: int) -> TorchEngine:
    """Two Llama layers with MoSLoRA on the plain-torch engine."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    recipe = Recipe.from_dict({"model": {"language": "none"}, "adapter": {"rank": 8, "alpha": 16}})
    attach_adapters(Parts(model=model), recipe.model, recipe.adapter)
    set_attention(model, SEGMENTS)
    use_lean_layers(model)
    use_loss_head(model)
    module = LossModule(model.train(), None)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    return TorchEngine(module, parameter_groups(module, recipe.optim), settings)


def batch(samples: int, length: int) -> Batch:
    """Random conversations, a quarter of them supervised."""
    supervised = torch.arange(length) >= length * 3 // 4
    return Batch.from_examples(
        [Example(id="", input_ids=torch.randint(0, 256, (length,)), supervised=supervised) for _ in range(samples)]
    )


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def drift(steps: int) -> dict[str, Any]:
    """CPU time and memory over many steps."""
    runner = engine(64)
    times, memory = [], []
    for number in range(steps):
        given = batch(2, 24)
        start = time.process_time()
        runner.step([given], 1.0)
        times.append(time.process_time() - start)
        if (number + 1) % (steps // STRETCHES) == 0:
            memory.append(resident_mib())
    stretches = [statistics.median(part) for part in numpy.array_split(times, STRETCHES)]
    middle = statistics.median(times)
    # The slope through the sections' medians, since other work on the machine disturbs single steps.
    slope = numpy.polyfit(numpy.arange(STRETCHES) * steps / STRETCHES, stretches, 1)[0]
    return {
        "steps": steps, "median_ms": 1000 * middle, "stretch_medians_ms": [1000 * value for value in stretches],
        "drift_per_1000_steps": 1000 * slope / middle, "resident_mib": [memory[0], memory[-1]],
    }  # fmt: skip


def growth(rounds: int) -> dict[str, float]:
    """Time per sample at each batch size, relative to the largest."""
    runner = engine(128)
    sizes = (1, 2, 4, 8)
    given = {size: batch(size, 256) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            start = time.process_time()
            runner.step([given[size]], 1.0)
            times[size].append(time.process_time() - start)
    each = {size: statistics.median(times[size]) / size for size in sizes}
    return {str(size): each[size] / each[8] for size in sizes}


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5000, help="optimiser steps (default 5000)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of the growth measurement (default 15)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"drift": drift(options.steps), "time_per_sample": growth(options.rounds)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
