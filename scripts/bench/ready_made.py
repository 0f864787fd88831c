#!/usr/bin/env python
"""Cost of a training step of a ready-made Qwen-VL: packed rows on lean layers, against padded rows on stock layers.

    python scripts/bench/ready_made.py                     print a table
    python scripts/bench/ready_made.py --json              one object on stdout
    python scripts/bench/ready_made.py --family qwen3_vl   one family

Models are small versions of Qwen2.5-VL or Qwen3-VL (decoder 512 x 6 with 8 heads on 2, vocabulary 32,000, frozen tower
192 x 4), with MoSLoRA of rank 16 in all linear layers of the decoder, and random weights. A step is a forward and a
backward pass over one micro-batch of conversations with a picture each. There are two sets of lengths: similar ones,
as in the grouped order of `mm-moslora train`, and mixed ones. All contenders have the same weights and samples. They
run in turn, in an order that rotates from round to round. Times are process CPU times of one thread, and figures are
medians of the ratios of single rounds. Losses and fp32 gradients are compared before the timing. Saved bytes are
counted.

Contenders:
    padded        each conversation a row, padded to the longest, on transformers' own layers and attention
    packed stock  one row of concatenated conversations, attention within each, on transformers' own layers
    packed        the same on lean layers: the step of `mm-moslora train`
All of them compute the loss on supervised positions only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from json_output import results_alone
from measuring import head, interleaved, ratio
from torch import Tensor
from transformers import (
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from yardstick import ALPHA, LANGUAGE, RANK, Contender, check_equal, saved_bytes

from mm_moslora import adapters
from mm_moslora.batch import Batch, Example, ProcessedImage
from mm_moslora.kernels.attention.attention_choice import set_attention, training_attention
from mm_moslora.models.batching.padded_batch import padded_hidden
from mm_moslora.models.memory_efficient.kernel_selection import use_lean_layers, use_loss_head
from mm_moslora.models.memory_efficient.loss_head import head_loss_sum
from mm_moslora.models.vlm import supervised_hidden
from mm_moslora.utils.hardware import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FAMILIES = ("qwen2_5_vl", "qwen3_vl")
SAMPLES = {
    "near": ((304, (16, 16)), (352, (16, 24)), (416, (24, 24)), (512, (24, 32))),
    "far": ((96, (8, 8)), (224, (16, 16)), (448, (24, 24)), (816, (32, 32))),
}
"""Tokens of each conversation, and patches of its picture (rows and columns; four make one visual token)."""
SUPERVISED = 0.15
VOCABULARY = 32_000
_TOKENS = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}


def base(family: str, *, layers: int, width: int, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """A frozen model; equal weights at every call."""
    torch.manual_seed(0)
    heads = width // 64
    text = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": width * 11 // 4,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "head_dim": 64, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]}
    vision = {"depth": 4, "hidden_size": 192, "intermediate_size": 768, "num_heads": 3, "out_hidden_size": width}
    if family == "qwen2_5_vl":
        vision |= {"fullatt_block_indexes": [3]}
        shape = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **_TOKENS)
        return Qwen2_5_VLForConditionalGeneration(shape).requires_grad_(False)
    vision |= {"deepstack_visual_indexes": [0, 1, 2]}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=vision, **_TOKENS)
    ).requires_grad_(False)


def batch_of(samples: str, model: PreTrainedModel) -> Batch:
    """One micro-batch; a picture and an answer each."""
    torch.manual_seed(1)
    side = model.config.vision_config.patch_size
    examples = []
    for number, (length, (rows, columns)) in enumerate(SAMPLES[samples]):
        ids = torch.randint(10, VOCABULARY, (length,))
        visual = rows * columns // 4
        ids[4] = _TOKENS["vision_start_token_id"]
        ids[5 : 5 + visual] = _TOKENS["image_token_id"]
        ids[5 + visual] = _TOKENS["vision_end_token_id"]
        supervised = torch.arange(length) >= length - round(SUPERVISED * length)
        pixels = torch.randn(rows * columns, 3 * 2 * side * side)
        picture = ProcessedImage(tensors={"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])})
        examples.append(Example(id=str(number), input_ids=ids, supervised=supervised, pictures=[picture]))
    return Batch.from_examples(examples)


def contenders(
    family: str, samples: str, dtype: torch.dtype, *, layers: int = 6, width: int = 512
) -> dict[str, Contender]:
    """All three contenders, each on its own model."""
    return {
        kind: _contender(kind, family, samples, dtype, layers=layers, width=width)
        for kind in ("padded", "packed stock", "packed")
    }


def _contender(kind: str, family: str, samples: str, dtype: torch.dtype, *, layers: int, width: int) -> Contender:
    model = base(family, layers=layers, width=width)
    batch = batch_of(samples, model)
    config = adapters.MoSLoRAConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM")
    adapters.add_moslora(model, config, component=LANGUAGE, autocast_adapter_dtype=False)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # so that the adapter has an effect
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(dtype).train()
    use_loss_head(model)
    read: Any = padded_hidden
    if kind != "padded":
        read = supervised_hidden
        set_attention(model, training_attention(model))
    if kind == "packed":
        use_lean_layers(model)

    def loss() -> Tensor:
        return head_loss_sum(model, read(model, batch), batch.targets) / batch.supervised_tokens

    return Contender(model=model, forward=loss)


def measure(family: str, samples: str, name: str, *, rounds: int, layers: int = 6, width: int = 512) -> dict[str, Any]:
    """One row: a family on one set of lengths in one dtype."""
    by_kind = contenders(family, samples, DTYPES[name], layers=layers, width=width)
    equal = check_equal(by_kind, "padded", name)
    saved = {kind: saved_bytes(contender) / 2**20 for kind, contender in by_kind.items()}
    times = interleaved({kind: contender.step for kind, contender in by_kind.items()}, rounds)
    lengths = [length for length, _ in SAMPLES[samples]]
    return {
        "family": family, "samples": samples, "dtype": name, "lengths": lengths,
        "padded_tokens": len(lengths) * max(lengths), **equal,
        "speedup_vs": {kind: ratio(times, kind, "packed") for kind in by_kind if kind != "packed"},
        "cpu_seconds": {kind: statistics.median(spent) for kind, spent in times.items()},
        "saved_mib": saved, "saved_ratio": saved["packed"] / saved["padded"],
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The summary under stable keys."""
    figures = {}
    for row in rows:
        case = f"{row['family']}_{row['samples']}_{row['dtype']}"
        figures |= {f"speedup_{case}": row["speedup_vs"]["padded"], f"saved_ratio_{case}": row["saved_ratio"]}
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(f"{'family':11} {'lengths':22} dtype {'contender':13} {'packed faster by':>16} {'saved MiB':>10}")
    for row in rows:
        for kind, mib in row["saved_mib"].items():
            lengths = ", ".join(map(str, row["lengths"]))
            speedup = row["speedup_vs"].get(kind, 1.0)
            print(f"{row['family']:11} {lengths:22} {row['dtype']:5} {kind:13} {speedup:16.2f} {mib:10.0f}")


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=7, help="rounds per case (default 7)")
    parser.add_argument("--family", choices=FAMILIES, help="one family; both without it")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    torch.set_num_threads(1)
    keep_freed_memory()
    transformers.logging.set_verbosity_error()
    rows = [
        measure(family, samples, name, rounds=options.rounds)
        for family in ([options.family] if options.family else FAMILIES)
        for samples in SAMPLES
        for name in DTYPES
    ]
    if options.json:
        print(
            json.dumps(head("ready_made", "transformers", "peft") | {"rows": rows, "summary": summarise(rows)}),
            file=output,
        )
    else:
        show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
