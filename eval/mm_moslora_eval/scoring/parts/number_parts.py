"""Extractions and metrics of numbers."""

from __future__ import annotations

from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.metrics.general.number_answers import number_text, numbers_in
from mm_moslora_eval.metrics.general.number_answers import within as _within
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import BETWEEN_LETTERS
from mm_moslora_eval.sources.document import Document


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


EXTRACTORS: dict[str, Extractor] = {"first_number": first_number, "last_number": last_number, "unchanged": unchanged}
METRICS: dict[str, Metric] = {"within": within, "one_of_letters": one_of_letters}
