"""Extractions and metrics of whole answers: edits, tables, points, mathematics, numbers."""

from __future__ import annotations

import re
from typing import Literal

from mm_moslora.utils.errors import MissingRequirementError
from mm_moslora.utils.package_requirements import install_extra, is_installed
from mm_moslora_eval.metrics.box_iou import first_point, inside
from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.metrics.general import number_answers, table_similarity
from mm_moslora_eval.metrics.general.number_answers import number_text, numbers_in
from mm_moslora_eval.metrics.general.number_answers import within as _within
from mm_moslora_eval.metrics.general.timed_calls import PROCESS, SECONDS, TABLE_SECONDS
from mm_moslora_eval.metrics.metric_text import levenshtein
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import BETWEEN_LETTERS
from mm_moslora_eval.sources.document import Document


def points(text: str, document: Document) -> str:
    """The first point of the answer in the model's form, or the middle of its first box, in pixels of the file."""
    point = first_point(text)
    return "" if point is None else f"[{point[0]:g}, {point[1]:g}]"


def edit_similarity(parsed: str, document: Document, *, ignore_case: bool = False, ignore_space: bool = False) -> float:
    """1 less the edit distance as a share of the longer text; `ignore_space` takes any space between words as one."""

    def similarity(answer: str, reference: str) -> float:
        sides = [text.casefold() if ignore_case else text for text in (answer, reference)]
        left, right = (" ".join(text.split()) if ignore_space else text for text in sides)
        return 1 - levenshtein(left, right) / (max(len(left), len(right)) or 1)

    return best(similarity, parsed, document.answers)


def teds(parsed: str, document: Document, *, structure_only: bool = False, seconds: float = TABLE_SECONDS) -> float:
    """TEDS of the first HTML table in the answer and that of the reference; `structure_only` is TEDS-S.
    An answer that takes longer than `seconds` has no score and is counted."""

    def similarity(answer: str, reference: str) -> float:
        return PROCESS.value(
            table_similarity.teds, seconds=seconds, answer=answer, reference=reference, structure_only=structure_only
        )

    return best(similarity, parsed, document.answers)


def point_inside(parsed: str, document: Document) -> float:
    """1 where the first point lies in a reference: a box, a polygon or a mask of run lengths."""
    return best(inside, parsed, document.answers)


def mathematics(
    parsed: str, document: Document, *, seconds: float = SECONDS, endless: Literal["failed", "wrong"] = "failed"
) -> float:
    """1 for the text of a reference, or where `math-verify` finds the answer equal to it within `seconds`.

    An answer that takes longer has no score and is counted, or with `endless: wrong` counts as wrong.
    """
    if not is_installed("math_verify"):
        raise MissingRequirementError(f"Mathematics is compared by math-verify: {install_extra('math')}.")
    try:
        return PROCESS.value(number_answers.equal, seconds=seconds, answer=parsed, references=document.answers)
    except TimeoutError:
        if endless == "wrong":
            return 0.0
        raise


_TRUTH = re.compile(r"\b(true|false)\b", re.I)


def true_false(text: str, document: Document) -> str:
    """`True` or `False`, whichever word is first in the answer."""
    match = _TRUTH.search(text)
    return match[1].capitalize() if match else ""


def first_number(text: str, document: Document) -> str:
    """The first number of the answer, in digits or in words (`twenty-one`), for counting."""
    return next(map(number_text, numbers_in(text)), "")


def last_number(text: str, document: Document) -> str:
    """The last number of the answer, in digits or in words: `-3`, `1,200`, `1 000`, `2/3`, `1.5x10^3`, `3 million`.
    What goes on in another way, such as `2^5` or `two thirds`, is no number."""
    return next(map(number_text, reversed(numbers_in(text, from_end=True))), "")


def within(parsed: str, document: Document, *, relative: float = 0.0, absolute: float = 0.0) -> float:
    """1 where the last number is that of a reference, up to `relative` (a share of it) or `absolute`."""
    return best(
        lambda answer, reference: _within(answer, reference, relative=relative, absolute=absolute),
        parsed, document.answers,
    )  # fmt: skip


def one_of_letters(parsed: str, document: Document) -> float:
    """The right letter is one of those that the extraction gives."""
    return float(bool(set(parsed.split(BETWEEN_LETTERS)) & set(document.answers)))


def unchanged(text: str, document: Document) -> str:
    """The answer as it is, with the space around it."""
    return text


EXTRACTORS: dict[str, Extractor] = {
    "points": points, "true_false": true_false, "first_number": first_number, "last_number": last_number,
    "unchanged": unchanged,
}  # fmt: skip
METRICS: dict[str, Metric] = {
    "edit_similarity": edit_similarity, "teds": teds, "point_inside": point_inside, "mathematics": mathematics,
    "within": within, "one_of_letters": one_of_letters,
}  # fmt: skip
