"""MathVista: normalises an extracted answer to the form of the reference and compares them; its styles of prompts.

Source: MathVista's `calculate_score` and VLMEvalKit's `post_check`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from mm_moslora_eval.metrics.metric_text import letters, levenshtein, plain_number
from mm_moslora_eval.metrics.multiple_choice import vlmevalkit
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import AskedJudge, final_answer
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list

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
    """The value of `prefetch_vlmevalkit` as text."""
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


def mathvista_question(document: Document) -> MathVistaQuestion:
    """The columns that determine the form of the answer to a MathVista document."""
    extra = document.extra
    precision = extra.get("precision")
    return MathVistaQuestion(
        question_type=extra.get("question_type", "multi_choice" if document.options else "free_form"),
        answer_type=extra.get("answer_type", "text"),
        # VLMEvalKit's file has the choices in one cell and no option columns.
        choices=tuple(document.options.values()) or tuple(parse_list(extra.get("choices", ""))),
        precision=float(precision) if precision else None,
    )


def _mathvista_form(text: str, document: Document) -> str:
    """An extracted answer in MathVista's form; an empty answer stays empty, while the source takes the most similar
    choice."""
    return (normalize_official(text, mathvista_question(document)) or "") if text.strip() else ""


def _choice_text(document: Document) -> str:
    """The reference; if it is a letter, the text of that choice."""
    answer = "".join(document.answers[:1])
    return document.options.get(answer, answer)


def _mathvista_score(parsed: str, document: Document) -> float:
    """MathVista: the text of the right choice, or the reference, in its form."""
    gold = [document.options.get(answer, answer) for answer in document.answers]
    return float(any(equal(parsed, answer) for answer in gold))


def _extracted(text: str, document: Document) -> str:
    """MathVista: the answer if it fits, else its last number or letter, in the form of the reference."""
    return _mathvista_form(extract_without_judge(text, mathvista_question(document)), document)


def _extracted_vlmevalkit(text: str, document: Document) -> str:
    """VLMEvalKit's own extraction before it asks a judge, as text; empty if it would ask."""
    return extract_vlmevalkit(text, mathvista_question(document), _choice_text(document))


def _correct_vlmevalkit(parsed: str, document: Document) -> float:
    """VLMEvalKit's verdict on an extracted answer; precision is not used and text or list answers never match."""
    return float(correct_vlmevalkit(parsed, mathvista_question(document), _choice_text(document)))


def _extract_mathvista(judge: AskedJudge, document: Document, answer: str) -> str | None:
    """MathVista: the final answer within a long one; an answer that already fits is not sent."""
    question = mathvista_question(document)
    stripped = answer.strip()
    short = stripped in (*question.choices, *document.options)
    if not stripped or short or (question.answer_type in ("integer", "float") and _is_number(stripped)):
        return answer
    return final_answer(judge, document, answer, question.choices)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _extract_mathvista_vlmevalkit(judge: AskedJudge, document: Document, answer: str) -> str | None:
    """VLMEvalKit's check comes first: an answer that it can read needs no judge."""
    read = _extracted_vlmevalkit(answer, document)
    return read or final_answer(judge, document, answer, mathvista_question(document).choices)


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


EXTRACTORS: dict[str, Extractor] = {
    "mathvista": _extracted,
    "mathvista_extracted": _mathvista_form,
    "mathvista_vlmevalkit": _extracted_vlmevalkit,
}
METRICS: dict[str, Metric] = {"mathvista": _mathvista_score, "mathvista_vlmevalkit": _correct_vlmevalkit}
JUDGED_EXTRACTIONS = {
    "mathvista": (_extract_mathvista, "mathvista_extracted"),
    "mathvista_vlmevalkit": (_extract_mathvista_vlmevalkit, "text"),
}
PROMPTS: dict[str, Callable[[Document], str]] = {
    f"mathvista_{style}": partial(_mathvista, style=style)
    for style in ("format", "step_by_step", "solution", "reason_first", "direct")
}
