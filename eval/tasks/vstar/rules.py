"""V*: lmms-eval's letters and prompt."""

from __future__ import annotations

import re
from collections.abc import Callable

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import first_match, of_text
from mm_moslora_eval.sources.document import Document

_VSTAR = (
    re.compile(r"^([A-D])\s*[.)\]]*"),
    re.compile(r"(?:THE\s+)?(?:ANSWER|CHOICE|OPTION)(?:\s+IS)?[\s:]+([A-D])"),
    re.compile(r"\(([A-D])\)"),
    re.compile(r"([A-D])\s*(?:\.|\)|])"),
    re.compile(r"(?:^|\s)([A-D])(?:\s|$)"),
)


def vstar_lmms_eval(text: str) -> str:
    """lmms-eval for V*: a letter at the start (so `Dog` is D), after `answer is`, in brackets, or alone."""
    upper = text.strip().upper()
    found = first_match(_VSTAR, upper)
    letters = re.findall(r"[A-D]", upper)
    return found or (letters[0] if len(letters) == 1 else "")


def _vstar(document: Document) -> str:
    """The question as the data writes it, up to its options, which get periods."""
    options = "".join(f"\n{letter}. {text}" for letter, text in document.options.items())
    question = document.question.split("(A)")[0].strip()
    return f"{question}{options}\nAnswer with the option's letter from the given choices directly."


EXTRACTORS: dict[str, Extractor] = {"vstar_lmms_eval": of_text(vstar_lmms_eval)}
PROMPTS: dict[str, Callable[[Document], str]] = {"vstar_lmms_eval": _vstar}
