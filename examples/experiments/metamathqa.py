#!/usr/bin/env python
"""MoSLoRA in PEFT's method comparison on MetaMathQA and GSM8K, run by that comparison's own code.

    python examples/experiments/metamathqa.py HARNESS EXPERIMENT                 one GPU, 21 GiB for LoRA
    python examples/experiments/metamathqa.py HARNESS EXPERIMENT --tiny FOLDER   a copy on a CPU, a minute

HARNESS is method_comparison/MetaMathQA in a clone of huggingface/peft that is installed (`pip install -e`). EXPERIMENT
is a folder of metamathqa/ beside this file; it is copied to HARNESS/experiments/moslora. The row lies in
HARNESS/results, or in HARNESS/temporary_results where the clone is not on its branch main.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXPERIMENTS = Path(__file__).with_suffix("")
TINY = {
    "dtype": "float32", "max_steps": 4, "eval_steps": 2, "batch_size_eval": 25,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 8},
}  # fmt: skip
"""Settings of the tiny run, in the keys of the harness's training_params.json."""
CHANGES = {
    "utils.py": ('["cuda", "xpu"]', '["cuda", "xpu", "cpu"]'),  # the harness refuses CPUs
    "run.py": ("1 < wiki_loss_before < 2", "wiki_loss_before > 0"),  # of a model without training
}
"""What the tiny run changes in its copy of the harness: file, text, new text."""
END = "<|end|>"


def place(experiment: str, harness: Path) -> Path:
    """Copy an experiment into the harness, which asks for the form experiments/METHOD/NAME.

    Args:
        experiment: a folder of metamathqa/.
        harness: method_comparison/MetaMathQA of a clone of huggingface/peft.

    Returns:
        Its folder, relative to the harness.

    Raises:
        FileNotFoundError: no such experiment, or no harness.
        FileExistsError: the harness has another experiment of that name.
    """
    source = EXPERIMENTS / experiment / "adapter_config.json"
    if not source.is_file():
        known = ", ".join(sorted(path.name for path in EXPERIMENTS.iterdir()))
        raise FileNotFoundError(f"There is no experiment {experiment!r}, only {known}.")
    if not (harness / "run.py").is_file():
        raise FileNotFoundError(f"{harness} has no run.py. Name method_comparison/MetaMathQA of a clone of PEFT.")
    folder = Path("experiments", "moslora", experiment)
    target = harness / folder / source.name
    if target.is_file() and target.read_bytes() != source.read_bytes():
        raise FileExistsError(f"{target} is another experiment than {source}. Rename one of the two.")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return folder


def run_harness(harness: Path, *words: str) -> None:
    """Run the harness as its own command line does, after the import that tells PEFT of mixers.

    Args:
        harness: becomes the working directory.
        *words: of its command line.
    """
    import mm_moslora.adapters  # noqa: F401

    os.chdir(harness)
    sys.path.insert(0, str(harness))
    sys.argv = ["run.py", *words]
    runpy.run_path("run.py", run_name="__main__")


def tiny_copy(harness: Path, out: Path) -> Path:
    """A copy of the harness's code for CPUs, and a tiny Llama.

    Args:
        harness: stays as it is.
        out: new folder.

    Returns:
        The copy.

    Raises:
        ValueError: the harness is of another version, in which a text of `CHANGES` does not occur once.
    """
    copy = out / "MetaMathQA"
    shutil.copytree(harness, copy, ignore=shutil.ignore_patterns("experiments", "*results"))
    for name in ("results", "temporary_results", "cancelled_results"):
        (copy / name).mkdir()
    for name, (old, new) in CHANGES.items():
        text = (copy / name).read_text(encoding="utf-8")
        if text.count(old) != 1:
            raise ValueError(f"{harness / name} holds {old!r} {text.count(old)} times, expected once. Adapt CHANGES.")
        (copy / name).write_text(text.replace(old, new), encoding="utf-8")
    _tiny_llama(out / "llama")
    return copy


def _tiny_llama(folder: Path) -> None:
    import tokenizers
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    words.train_from_iterator([row["response"] for row in _sums(200)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def _sums(count: int) -> list[dict[str, str]]:
    """Records with the columns of MetaMathQA."""
    rows = []
    for number in range(count):
        left, right = number % 13, number % 7
        query, total = f"What is {left} plus {right}?", left + right
        rows.append(
            {"type": "sum", "query": query, "original_question": query,
             "response": f"{left} + {right} = {total}\nThe answer is: {total}"}
        )  # fmt: skip
    return rows


def stand_ins() -> None:
    """Sums in the place of the data sets, and what PyTorch has for GPUs only, on a machine without one."""
    import datasets
    import torch

    def load_dataset(name: str, *_: Any, **__: Any) -> Any:
        if name.endswith("MetaMathQA"):
            return datasets.DatasetDict(train=datasets.Dataset.from_list(_sums(200)))
        if name.endswith("gsm8k"):
            rows = [
                {"question": row["query"], "answer": row["response"].replace("The answer is:", "####")}
                for row in _sums(60)
            ]
            parts = {"train": rows, "test": rows[:50]}
            return datasets.DatasetDict({part: datasets.Dataset.from_list(found) for part, found in parts.items()})
        return datasets.Dataset.from_list([{"text": row["response"]} for row in _sums(8)]).to_iterable_dataset()

    datasets.load_dataset = load_dataset
    if not torch.cuda.is_available():
        place_of: Any = torch.cpu
        for name in ("memory_allocated", "memory_reserved", "max_memory_reserved"):
            setattr(place_of, name, lambda *_: 0)
        for name in ("reset_peak_memory_stats", "empty_cache", "manual_seed_all"):
            setattr(place_of, name, lambda *_: None)
        place_of.get_device_name = lambda *_: "CPU"


def main(arguments: Sequence[str] | None = None) -> None:
    """Place the experiment, and run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("harness", type=Path)
    parser.add_argument("experiment")
    parser.add_argument("--tiny", type=Path, metavar="FOLDER", help="new folder for the copy and its row")
    options = parser.parse_args(arguments)
    harness = options.harness.resolve()
    if options.tiny is not None:
        out = options.tiny.resolve()
        harness = tiny_copy(harness, out)
        folder = place(options.experiment, harness)
        settings = TINY | {"model_id": str(out / "llama")}
        (harness / folder / "training_params.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        stand_ins()
        run_harness(harness, "-v", "--clean", str(folder))  # the adapter would stay in the folder for temporary files
    else:
        run_harness(harness, "-v", str(place(options.experiment, harness)))


if __name__ == "__main__":
    main()
