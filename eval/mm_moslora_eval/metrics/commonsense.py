"""Commonsense tasks: the generation protocol of LLM-Adapters (the MoSLoRA paper's numbers) and that of lm-eval."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_ANSWERS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
}
DATASETS = tuple(_ANSWERS)
"""The eight data sets, by the names of LLM-Adapters."""

_INDENT = " " * 16  # the source indents all lines of the prompt except the first, and models were tuned on that


def extract_answer(text: str, dataset: str) -> str:
    """The first answer word of the data set in the text, case-sensitive, or an empty string.

    Raises:
        KeyError: not one of `DATASETS`.
    """
    match = re.search(_ANSWERS[dataset], text.strip())
    return match.group() if match else ""


def prompt(instruction: str, context: str | None = None) -> str:
    """The prompt of LLM-Adapters, including its indentation and the trailing space of its first line."""
    if context:
        head = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request."
        )
        parts = [head, f"### Instruction:\n{_INDENT}{instruction}", f"### Input:\n{_INDENT}{context}"]
    else:
        head = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request. "
        )
        parts = [head, f"### Instruction:\n{_INDENT}{instruction}"]
    return f"\n\n{_INDENT}".join([*parts, f"### Response:\n{_INDENT}"])


@dataclass(frozen=True, kw_only=True)
class ChoiceRequests:
    """A multiple-choice question as log-likelihood requests."""

    gold: int
    """Index of the correct option."""
    requests: tuple[tuple[str, str], ...]
    """(context, continuation) of each option."""


Record = Mapping[str, Any]


def _hellaswag_text(text: str) -> str:
    # The WikiHow part of the data contains leftover brackets.
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _hellaswag(record: Record) -> tuple[str, Sequence[str], int]:
    if "query" in record:
        return record["query"], record["choices"], int(record.get("gold", record.get("label", 0)))
    context = f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}"
    return _hellaswag_text(context), [_hellaswag_text(ending) for ending in record["endings"]], int(record["label"])


def _arc(record: Record) -> tuple[str, Sequence[str], int]:
    choices = record["choices"]
    return f"Question: {record['question']}\nAnswer:", choices["text"], choices["label"].index(record["answerKey"])


_LM_EVAL: dict[str, Callable[[Record], tuple[str, Sequence[str], int]]] = {
    "boolq": lambda r: (f"{r['passage']}\nQuestion: {r['question']}?\nAnswer:", ("no", "yes"), int(r["label"])),
    "piqa": lambda r: (f"Question: {r['goal']}\nAnswer:", (r["sol1"], r["sol2"]), int(r["label"])),
    "social_iqa": lambda r: (
        f"Q: {r['context']} {r['question']}\nA:",
        (r["answerA"], r["answerB"], r["answerC"]),
        int(r["label"]) - 1,
    ),
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": lambda r: (
        r["question_stem"],
        r["choices"]["text"],
        r["choices"]["label"].index(r["answerKey"].lstrip()),
    ),
}
_LM_EVAL["siqa"] = _LM_EVAL["social_iqa"]
LM_EVAL_TASKS = ("boolq", "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def lm_eval_requests(task: str, record: Record) -> ChoiceRequests:
    """The zero-shot requests of lm-evaluation-harness for one record of the original data set.

    Args:
        task: one of `LM_EVAL_TASKS`.
        record: the data set's columns.

    Raises:
        KeyError: an unknown task or a missing column.
    """
    if task == "winogrande":  # the options differ in the context and share the continuation
        before, after = record["sentence"].split("_", 1)
        contexts = tuple(before + record[name] for name in ("option1", "option2"))
        gold = int(record["answer"]) - 1
        return ChoiceRequests(gold=gold, requests=tuple((context, f" {after.strip()}") for context in contexts))
    context, choices, gold = _LM_EVAL[task](record)
    return ChoiceRequests(gold=gold, requests=tuple((context, f" {choice}") for choice in choices))
