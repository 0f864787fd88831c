"""NaturalBench: its words and letters, and its prompts."""

from __future__ import annotations

import re
from collections.abc import Callable

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.sources.document import Document


def first_word(text: str, kind: str) -> str:
    """NaturalBench: `Yes` or `No`, or A or B, whichever word is first; the article `a` counts as A."""
    first, second = ("Yes", "No") if kind == "yes_no" else ("A", "B")
    one, other = (re.search(rf"\b{word}\b", text, re.I) for word in (first, second))
    if one and other:
        return first if one.start() < other.start() else second
    return first if one else second if other else ""


def naturalbench(text: str, document: Document, *, column: str = "Question_Type") -> str:
    """NaturalBench: `Yes` or `No`, or A or B by the value in `column`, whichever is first; an article is A."""
    return first_word(text, document.extra.get(column, "yes_no"))


_ASKS = {
    "yes_no": "Please answer Yes or No.",
    "multiple_choice": "Please output the letter corresponding to the correct option.",
}


def _naturalbench(document: Document) -> str:
    kind = document.extra.get("Question_Type") or document.extra.get("type", "")
    return f"{document.question} {_ASKS.get(kind, '')}".rstrip(" ")


EXTRACTORS: dict[str, Extractor] = {"naturalbench": naturalbench}
PROMPTS: dict[str, Callable[[Document], str]] = {"naturalbench": _naturalbench}
