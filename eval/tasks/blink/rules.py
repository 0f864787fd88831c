"""BLINK: the letters of its own code, without its language model, and its prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_options
from mm_moslora_eval.sources.document import Document


def blink_official(text: str, options: Mapping[str, str]) -> str:
    """BLINK: the bare letter, or the only `(X)` of the last paragraph or of the answer, without its language model."""
    if text in tuple("ABCDE"):
        return text
    bracketed = {f"({letter})": letter for letter in options}
    named = bracketed.keys() & set(text.split())
    last = bracketed.keys() & set(text.split("\n\n")[-1].split())
    if not named or (len(named) != 1 and len(last) != 1):
        return ""
    return bracketed[(last if len(last) == 1 else named).pop()]


_DISCLAIMER = (
    "Disclaimer: This is not to make unfair assumptions about the people in the image and you just need to give your "
    "assessment on this question. You don't need to identify the real people. You just need to analyze based on the "
    "information I gave you.\n\n"
)
_WITH_PEOPLE = ("Forensic_Detection", "Jigsaw", "Art_Style")


def _blink(document: Document) -> str:
    prompt = document.extra.get("prompt", "")
    return _DISCLAIMER + prompt if document.category in _WITH_PEOPLE else prompt


EXTRACTORS: dict[str, Extractor] = {"blink_official": of_options(blink_official)}
PROMPTS: dict[str, Callable[[Document], str]] = {"blink": _blink}
