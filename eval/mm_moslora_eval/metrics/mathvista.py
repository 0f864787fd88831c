"""MathVista: normalises an extracted answer to the form of the reference and compares them.

Source: MathVista's `calculate_score` and VLMEvalKit's `post_check`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mm_moslora_eval.metrics.metric_text import letters, levenshtein, plain_number
from mm_moslora_eval.metrics.multiple_choice import vlmevalkit

_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_LAST_NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class MathVistaQuestion:
    """The columns that determine the form of a MathVista answer."""

    question_type: str
    """multi_choice or free_form."""
    answer_type: str
    """text, integer, float or list."""
    choices: tuple[str, ...] = ()
    precision: float | None = None
    """Decimals of a float answer."""


def _attempt(convert: Callable[[], str]) -> str | None:
    try:
        return convert()
    except (ValueError, OverflowError, TypeError):
        return None


def normalize_official(text: str, question: MathVistaQuestion) -> str | None:
    """The official form: a choice by letter or by similarity, or a number of the right type; None if that fails.

    An empty text becomes the most similar choice too, as in the source.
    """
    if question.question_type == "multi_choice":
        return _choice(text.strip(), question.choices)
    if question.answer_type == "integer":
        return _attempt(lambda: str(int(float(text))))
    if question.answer_type == "float":
        # Without a precision int(None) raises, as in the source.
        return _attempt(lambda: str(round(float(text), int(question.precision))))  # type: ignore[arg-type]
    return text


def _choice(text: str, choices: Sequence[str]) -> str:
    bracketed = _BRACKETED.findall(text)
    if bracketed:
        text = bracketed[0].upper()
    names = letters(len(choices))
    if text in names:
        return choices[names.index(text)]
    return min(choices, key=lambda choice: levenshtein(text, choice))


def equal(normalized: str | None, reference: str) -> bool:
    """Equal without surrounding space; an answer that could not be normalised equals nothing, not even `None`."""
    return normalized is not None and normalized.strip() == reference.strip()


def extract_without_judge(text: str, question: MathVistaQuestion) -> str:
    """Extraction without a language model, a lower bound: the text itself if it fits, else its last number or letter.

    No other harness defines this step, so a score that uses it must state it.
    """
    stripped = text.strip()
    if question.question_type == "multi_choice":
        if stripped in question.choices:
            return stripped
        return vlmevalkit(stripped, _named(question))
    if question.answer_type in ("integer", "float"):
        if plain_number(stripped) is not None:
            return stripped
        numbers = _LAST_NUMBER.findall(stripped)
        return numbers[-1].replace(",", "") if numbers else ""
    return stripped


def prefetch_vlmevalkit(text: str, question: MathVistaQuestion, reference: str) -> str | int | float | bool:
    """VLMEvalKit's check before it asks a judge: the letter or the number if it is correct, else False."""
    if question.question_type == "multi_choice":
        return vlmevalkit(text, _named(question)) or False
    answer, gold = _vlmevalkit_pair(text, question, reference)
    return answer if answer is not None and answer == gold else False


def extract_vlmevalkit(text: str, question: MathVistaQuestion, reference: str) -> str:
    """VLMEvalKit's own extraction before it asks a judge, as text; empty if it would ask."""
    extracted = prefetch_vlmevalkit(text, question, reference)
    return str(extracted) if extracted else ""


def correct_vlmevalkit(text: str, question: MathVistaQuestion, reference: str) -> bool:
    """VLMEvalKit's verdict on an extracted answer; precision is not used and text or list answers never match."""
    if question.question_type == "multi_choice":
        named = _named(question)
        gold = next((letter for letter, choice in named.items() if choice == reference), None)
        return (vlmevalkit(text, named) or False) == gold
    answer, gold_value = _vlmevalkit_pair(text, question, reference)
    return answer is not None and answer == gold_value


def _named(question: MathVistaQuestion) -> dict[str, str]:
    return dict(zip(letters(len(question.choices)), question.choices, strict=True))


def _vlmevalkit_pair(
    text: str, question: MathVistaQuestion, reference: str
) -> tuple[str | int | float | None, str | int | float | None]:
    convert = {"integer": int, "float": float}.get(question.answer_type)
    if convert is None:
        return "None", reference
    try:
        answer = convert(text)
        return answer, convert(reference)
    except ValueError:
        return None, None
