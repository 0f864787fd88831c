#!/usr/bin/env python
"""Cost of a step of DPO: pairs in rows without padding (`data.pack_tokens`), against TRL's padded rows.

    python scripts/bench/preferences.py                    print a table
    python scripts/bench/preferences.py --json             one object on stdout
    python scripts/bench/preferences.py --model assembled  one model

Models are small and have random weights: a Qwen2.5-VL (`qwen2_5_vl`; decoder 256 x 4, tower 192 x 4), and CLIP, an MLP
and a Llama (`assembled`; 256 x 6 and 256 x 4). Towers are frozen, and MoSLoRA of rank 16 is in all linear layers of the
decoder. A step is the loss of TRL's DPOTrainer (`sigmoid`) for one micro-batch of four pairs with a picture each, with
the forward pass of the reference, and the backward pass. All contenders have the same weights and pairs, and run in
turn, in an order that rotates from round to round. Times are process CPU times of one thread, and figures are medians
of the ratios of single rounds. Losses are compared before the timing. Memory is the largest resident size of the
process during a step beyond that before it, in rounds of their own.

On a CPU TRL's head computes the logits of all positions of padded rows, on a GPU those of the answers alone. So the
vocabulary is small, that the head hardly counts; `--vocabulary 32000` shows what it adds on a CPU.

Contenders:
    padded   both answers of every pair are padded rows with the prompt and its picture
    apart    one row without padding, in which the prompt stands before each answer
    packed   one row without padding, in which the prompt stands once before both answers: `data.pack_tokens`
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import llava_models as models
import torch
from harness import Benchmark, Case, Row, interleaved, peak_mib, ratio
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mm_moslora import adapters
from mm_moslora.batch import Example, ProcessedImage
from mm_moslora.config import Recipe
from mm_moslora.models.assembly import Parts
from mm_moslora.preferences.pair_rows import PairRows
from mm_moslora.preferences.preference_setup import PreferenceRun
from mm_moslora.preferences.trl_trainers import PairTrainer

MODELS = ("qwen2_5_vl", "assembled")
KINDS = ("padded", "apart", "packed")
PAIRS = ((320, (16, 16), 60, 140), (288, (12, 16), 20, 30), (416, (24, 24), 100, 40), (560, (32, 32), 160, 90))
"""Tokens of each prompt, patches of its image (of Qwen2.5-VL; four make one visual token), tokens of both answers."""
LAYERS, WIDTH = 4, 256


class Pairs:
    """What a trainer reads of a `PreferenceSet`: both examples of every pair."""

    def __init__(self, pairs: list[tuple[Example, Example]]) -> None:
        self.pairs = pairs
        self.usable = list(range(len(pairs)))
        self.lengths = array("L", [example.length for pair in pairs for example in pair])
        self.prompts = array("L", [prompt for prompt, *_ in PAIRS])

    def item(self, number: int) -> tuple[Example, Example]:
        """A pair by its number."""
        return self.pairs[number]


def base(name: str, vocabulary: int) -> PreTrainedModel:
    """A frozen model; equal weights at every call."""
    if name == "assembled":
        return models.base(models.small(WIDTH, LAYERS, vocabulary)).requires_grad_(False)
    torch.manual_seed(0)
    heads = WIDTH // 64
    text = {
        "vocab_size": vocabulary, "hidden_size": WIDTH, "intermediate_size": WIDTH * 11 // 4, "head_dim": 64,
        "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": max(1, heads // 4),
        "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [12, 10, 10]},
    }  # fmt: skip
    vision = {
        "depth": 4, "hidden_size": 192, "intermediate_size": 768, "num_heads": 3, "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [3],
    }  # fmt: skip
    tokens = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    shape = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen2_5_VLForConditionalGeneration(shape).requires_grad_(False)


def pairs_of(model: PreTrainedModel, name: str, vocabulary: int) -> list[tuple[Example, Example]]:
    """Pairs with an image each."""
    torch.manual_seed(1)
    pairs = []
    for number, (length, (rows, columns), *answers) in enumerate(PAIRS):
        prompt = torch.randint(10, vocabulary - 1, (length,))
        if name == "assembled":
            visual = model.config.image_seq_length
            tensors = {"pixel_values": torch.randn(1, 3, 224, 224)}
        else:
            visual, side = rows * columns // 4, model.config.vision_config.patch_size
            pixels = torch.randn(rows * columns, 3 * 2 * side * side)
            tensors = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, rows, columns]])}
        prompt[5 : 5 + visual] = model.config.image_token_id
        pictures = [ProcessedImage(tensors=tensors, key=str(number))]
        chosen, rejected = (
            Example(
                id=str(number), input_ids=torch.cat([prompt, torch.randint(10, vocabulary - 1, (answer,))]),
                supervised=torch.arange(length + answer) >= length, pictures=pictures,
            )
            for answer in answers
        )  # fmt: skip
        pairs.append((chosen, rejected))
    return pairs


def step_of(kind: str, name: str, vocabulary: int, folder: Path) -> Callable[[], float]:
    """A step of one contender, on its own model; it gives the loss."""
    model = base(name, vocabulary)
    config = adapters.MoSLoRAConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM")
    peft_model = adapters.add_moslora(model, config, component=models.LANGUAGE, autocast_adapter_dtype=False)
    rows = None if kind == "padded" else PairRows.of(model, 2**20)
    rows = replace(rows, shares=False) if kind == "apart" and rows is not None else rows
    words = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    recipe = Recipe.from_dict(
        {
            "objective": "dpo", "model": {"vlm": name}, "data": {"train": [{"path": "none"}]},
            "train": {"output": str(folder), "global_batch": 4, "micro_batch": 4, "steps": 1, "precision": "fp32"},
        }
    )  # fmt: skip
    records: Any = Pairs(pairs_of(model, name, vocabulary))
    parts = Parts(
        model=model, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), peft_model=peft_model
    )
    run = PreferenceRun(
        recipe=recipe, folder=folder, precision="fp32", assembly=parts, records=records, held_out=None, rows=rows,
        rows_per_epoch=1,
    )  # fmt: skip
    trainer = PairTrainer(run, None)  # type: ignore[arg-type]
    torch.manual_seed(2)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B.default" in parameter_name:  # so that the adapter has an effect
            torch.nn.init.normal_(parameter, std=0.02)
    trainer.mean_sizes = torch.tensor([float(len(PAIRS)), float(sum(chosen for *_, chosen, _ in PAIRS))])
    peft_model.train()
    inputs = trainer.data_collator([{"item": number, "held_out": 0} for number in range(len(PAIRS))])

    def step() -> float:
        loss = trainer.compute_loss(peft_model, dict(inputs))
        loss.backward()
        model.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def measure(name: str, vocabulary: int, *, rounds: int) -> Row:
    """One row: a model with one vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        steps = {kind: step_of(kind, name, vocabulary, Path(folder)) for kind in KINDS}
    losses = {kind: step() for kind, step in steps.items()}
    difference = max(abs(loss / losses["padded"] - 1) for loss in losses.values())
    if difference > 1e-5:
        raise SystemExit(f"{name}: the losses are {losses}, expected equal ones")
    times = interleaved(steps, rounds)
    peaks = {kind: [peak_mib(step) for _ in range(rounds)] for kind, step in steps.items()}
    return {
        "loss_difference": difference,
        "time_ratio": {kind: ratio(times, kind, "padded") for kind in KINDS},
        "peak_ratio": {kind: ratio(peaks, kind, "padded") for kind in KINDS},
        "cpu_seconds": {kind: statistics.median(spent) for kind, spent in times.items()},
        "peak_mib": {kind: statistics.median(sizes) for kind, sizes in peaks.items()},
    }  # fmt: skip


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """A row for each model."""
    for name in [options.model] if options.model else MODELS:
        yield Case(
            names={"model": name, "vocabulary": options.vocabulary},
            measure=partial(measure, name, options.vocabulary, rounds=options.rounds),
        )


def lines(row: Row) -> Iterator[dict[str, str]]:
    """The contenders."""
    for kind in KINDS:
        yield {
            "model": row["model"], "contender": kind, "time / padded": f"{row['time_ratio'][kind]:.2f}",
            "seconds": f"{row['cpu_seconds'][kind]:.2f}", "peak / padded": f"{row['peak_ratio'][kind]:.2f}",
            "MiB": f"{row['peak_mib'][kind]:.0f}",
        }  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The models."""
    parser.add_argument("--model", choices=MODELS, help="one model; both without it")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens that the models know (default 1024)")


BENCHMARK = Benchmark(
    name="preferences", about=__doc__, cases=cases, lines=lines, add_options=add_options,
    packages=("transformers", "peft", "trl"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
