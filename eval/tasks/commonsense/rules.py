"""Commonsense tasks: the generation protocol of LLM-Adapters (the MoSLoRA paper's numbers)."""

from __future__ import annotations

import re
from collections.abc import Callable

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import documented
from mm_moslora_eval.sources.document import Document

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


def _answer(dataset: str) -> Extractor:
    return documented(lambda text, _: extract_answer(text, dataset), extract_answer.__doc__)


EXTRACTORS: dict[str, Extractor] = {f"commonsense_{name.lower().replace('-', '_')}": _answer(name) for name in DATASETS}
PROMPTS: dict[str, Callable[[Document], str]] = {
    "commonsense_alpaca": lambda document: prompt(document.question, document.extra.get("input"))
}
