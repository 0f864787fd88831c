"""The paper's commonsense recipe on records with the lengths of its eight parts, from their check to a score."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mm_moslora_eval.protocol.task_registry import task_file
from mm_moslora_eval.run.result_file import read_results

from mm_moslora.cli import cli_app as cli
from mm_moslora.config import Recipe, load_recipe
from mm_moslora.planning.recipe_data import check_recipe
from mm_moslora.training.training_loop import train
from tests.data.chat_templates import tokenizer_copy

RANKS = (0, 10, 25, 50, 75, 90, 95, 99, 100)
PARTS = {
    "boolq": (9_427, (116, 130, 133, 137, 142, 147, 152, 164, 195)),
    "piqa": (16_113, (140, 182, 220, 287, 410, 582, 731, 1030, 2255)),
    "social_i_qa": (33_410, (189, 246, 261, 282, 307, 336, 356, 418, 525)),
    "hellaswag": (39_905, (300, 560, 700, 1010, 1150, 1270, 1350, 1480, 1700)),
    "winogrande": (63_238, (215, 230, 237, 248, 261, 275, 283, 301, 328)),
    "ARC-Easy": (2_251, (186, 231, 266, 322, 396, 486, 544, 664, 1090)),
    "ARC-Challenge": (1_119, (186, 252, 296, 365, 454, 544, 595, 738, 1044)),
    "openbookqa": (4_957, (175, 199, 216, 250, 292, 329, 357, 438, 594)),
}
"""Records in commonsense_170k, and characters of the instruction at the percentiles `RANKS`, measured in
dataset/*/test.json of AGI-Edgerunners/LLM-Adapters. HellaSwag's are estimated from the size of its file (mean 959)
and 27 of its records."""
WORDS = [
    "the", "person", "puts", "a", "wooden", "board", "on", "top", "of", "some", "water", "and", "then", "takes", "two",
    "large", "metal", "knives", "while", "another", "man", "is", "seen", "speaking", "to", "camera", "Answer", "which",
    "solution", "would", "help", "them", "clean", "kitchen", "properly", "before", "they", "start", "using", "it",
]  # fmt: skip


def _text(length: int, number: int) -> str:
    picked = np.random.default_rng(number).choice(WORDS, size=length)
    return " ".join(picked)[:length].strip()


@pytest.fixture(scope="module")
def records() -> dict[str, list[str]]:
    """Instructions of every part, one in 700."""
    made: dict[str, list[str]] = {}
    for part, (count, lengths) in PARTS.items():
        ranks = np.linspace(0, 100, max(2, round(count / 700)))
        made[part] = [_text(int(np.interp(rank, RANKS, lengths)), n) for n, rank in enumerate(ranks)]
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizer_copy("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(records: dict[str, list[str]], tiny: Path, tmp_path: Path) -> Recipe:
    lines = [
        json.dumps({"id": f"{part}-{n}", "question": text, "answer": "the correct answer is answer1"})
        for part, texts in records.items()
        for n, text in enumerate(texts)
    ]
    (tmp_path / "170k.jsonl").write_text("\n".join(lines))
    return load_recipe(
        "commonsense_170k",
        [f"model.language={tiny}", f"data.train.0.path={tmp_path / '170k.jsonl'}", "data.train.0.hold_out=12",
         "data.workers=0", f"train.output={tmp_path / 'run'}", "train.steps=2", "train.validate_every=1",
         "train.zero=none", "train.precision=fp32", "train.rehearsal=false", "track.trackers=[]",
         "optim.warmup=1", "train.global_batch=8",
         "train.micro_batch=4"],
    )  # fmt: skip


def test_the_recipe_runs_on_records_of_the_real_lengths(
    recipe: Recipe, records: dict[str, list[str]], tmp_path: Path
) -> None:
    total = sum(map(len, records.values()))
    checked = check_recipe(recipe, processes=1)
    found, held_out = checked.plain["train"], checked.plain["validation"]
    assert checked.code == 0
    assert (found["records"], held_out["records"]) == (total - 12, 12)
    cut = found["truncated"] + held_out["truncated"]
    assert found["usable"] == total - 12
    assert (found["refused"], found["dropped"]) == (0, 0)
    assert 0.05 * total < cut < 0.2 * total
    assert found["lengths"]["most"] == 256

    assert train(recipe).finished
    run = tmp_path / "run"
    assert (run / "quarantine.jsonl").read_text() == (run / "validation_quarantine.jsonl").read_text() == ""
    best = json.loads((run / "best.json").read_text())
    assert [entry["step"] for entry in best["history"]] == [1, 2]
    assert (run / "best").resolve() == run / best["checkpoint"]

    (tmp_path / "commonsense" / "piqa").mkdir(parents=True)
    task = Path(shutil.copy(task_file("commonsense_piqa"), tmp_path))
    asked = [{"instruction": text, "input": "", "answer": "solution1"} for text in records["piqa"][-3:]]
    (tmp_path / "commonsense" / "piqa" / "test.json").write_text(json.dumps(asked))
    model, scores = str(run / "best"), str(tmp_path / "scores")
    assert cli.run(["eval", "run", f"{task}@paper", "--model", model, "--output", scores, "--no-report"]) == 0
    (result,) = read_results(tmp_path / "scores")
    assert (result.counts.total, result.counts.failed) == (3, 0)


def test_without_its_keys_the_check_says_that_the_run_would_stop(recipe: Recipe, tmp_path: Path) -> None:
    strict = load_recipe(str(_written(recipe, tmp_path)), ["data.too_long=refuse"])
    checked = check_recipe(strict, processes=1)
    found = checked.plain["train"]
    assert checked.code == 1
    assert found["refused"] == found["bad"]["TOO_LONG"] > 0.01 * found["records"]
    details = {item["name"]: item["detail"] for item in found["findings"]}
    assert f"{found['refused']} are refused (" in details["records"]
    assert "at most 1.00%); a run stops" in details["records"]
    dropping = check_recipe(load_recipe(str(_written(recipe, tmp_path)), ["data.too_long=drop"]), processes=1)
    assert dropping.code == 0
    assert dropping.plain["train"]["dropped"] == found["refused"]


def _written(recipe: Recipe, folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    return folder / "recipe.yaml"


def test_the_ids_are_those_of_the_authors_tokenisation() -> None:
    """Anew from the definition of finetune.py: one text, cut off, and the end of sequence where there is room."""
    from mm_moslora.config.llava_chat_templates import set_chat_template
    from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
    from tests.data.sets import turns

    blanks = " " * 16
    for name in ("llama-legacy", "tekken"):
        tokenizer = tokenizer_copy(name)
        set_chat_template(tokenizer, "alpaca")
        encoder = ConversationEncoder(tokenizer)
        for question in ("Is the sky blue?\n\nAnswer format: true/false", _text(500, 1)):
            answer = "the correct answer is true"
            text = (
                "Below is an instruction that describes a task. Write a response that appropriately completes the "
                f"request.  \n\n{blanks}### Instruction:\n{blanks}{question}\n{blanks}\n{blanks}### Response:\n"
                f"{blanks}{answer}"
            )
            theirs = tokenizer(text, truncation=True, max_length=90)["input_ids"]
            if len(theirs) < 90:
                theirs.append(tokenizer.eos_token_id)
            ours = encoder.encode(turns(question, answer), max_length=90, truncate=True, whole=True)
            assert ours.input_ids.tolist() == theirs
            asked = encoder.encode_prompt(turns(question)).tolist()
            assert asked == tokenizer(text.removesuffix(blanks + answer))["input_ids"]
