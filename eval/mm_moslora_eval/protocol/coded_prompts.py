"""Prompts that a template cannot express: MathVista's styles and the Alpaca form of the commonsense tasks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from mm_moslora_eval.metrics import commonsense
from mm_moslora_eval.protocol.benchmark_prompts import BENCHMARK_WORDINGS
from mm_moslora_eval.sources.document import Document

_VALUES = {
    "integer": ("an integer answer", "value, e.g., 1, 2, 3", "integer number"),
    "float 1": (
        "a floating-point number with one decimal place",
        "value, e.g., 1.2, 1.3, 1.4",
        "floating-point number with one decimal place",
    ),
    "float 2": (
        "a floating-point number with two decimal places",
        "value, e.g., 1.23, 1.34, 1.45",
        "floating-point number with two decimal places",
    ),
    "list": ("a Python list as an answer", "list, e.g., [1, 2, 3], [1.2, 1.3, 1.4]", ""),
}


def _value(document: Document) -> tuple[str, str, str]:
    """Wording for the kind of answer; a precision other than 1 or 2 gets the wording for one decimal."""
    kind = document.extra.get("answer_type", "integer")
    if kind == "float":
        kind = "float 2" if float(document.extra.get("precision") or 1) == 2 else "float 1"
    return _VALUES.get(kind, _VALUES["integer"])


def _mathvista(document: Document, *, style: str) -> str:
    unit = document.extra.get("unit")
    lead = "" if style == "format" else "Question: "
    question = f"{lead}{document.question}" + (f" (Unit: {unit})" if unit not in (None, "", "None") else "")
    hint = _mathvista_hint(document, style)
    if style == "format":
        choices = "\n".join(f"{letter}. {text}" for letter, text in document.options.items())
    else:
        choices = "\n".join(["Choices:", *(f"({letter}) {text}" for letter, text in document.options.items())])
    parts = [question, choices if document.options else "", hint]
    if style == "reason_first":
        parts = [hint, *parts[:2]]
    return "\n".join(part for part in (*parts, "Solution:" if style == "solution" else "") if part).strip()


def _mathvista_hint(document: Document, style: str) -> str:
    kind, value, short = _value(document)
    if style == "direct":
        return ""
    if style == "format":
        if document.options:
            return "Answer with the option's letter from the given choices directly."
        return f"Answer the question using a single {short}." if short else "Answer the question using a Python list."
    if style == "reason_first":
        if document.options:
            task = "select the question from the choices"  # the source's own wording
        else:
            task = f"answer the question requiring {kind} and provide the final {value}, at the end"
        return f"First perform reasoning, then finally {task} in the following format: Answer: xxx."
    if document.options:
        return "Hint: Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end."
    return f"Hint: Please answer the question requiring {kind} and provide the final {value}, at the end."


WORDINGS: dict[str, Callable[[Document], str]] = {
    "commonsense_alpaca": lambda document: commonsense.prompt(document.question, document.extra.get("input")),
    **{
        f"mathvista_{style}": partial(_mathvista, style=style)
        for style in ("format", "step_by_step", "solution", "reason_first", "direct")
    },
    **BENCHMARK_WORDINGS,
}
"""Name -> the user's text for a document."""
