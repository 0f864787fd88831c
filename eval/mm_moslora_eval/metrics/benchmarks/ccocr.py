"""CC-OCR's score of read text: F1 over words or characters, without their order."""

from __future__ import annotations

import re
from collections import Counter

_BY_CHARACTER = ("Arabic", "Japanese", "Korean")
_NO_ALPHANUMERIC = re.compile(r"[^A-Za-z0-9]+")


def text_f1(text: str, reference: str, *, split: str, group: str) -> float:
    """F1 of two bags of words in lower case; of characters in Arabic, Chinese, Japanese and Korean splits.

    Args:
        text: what was read.
        reference: what is written.
        split: name of the sub-set, such as `Arabic` or `zh_doc`.
        group: `multi_lan_ocr` or `multi_scene_ocr`, in which only Latin letters and digits of words count.
    """
    by_word = split not in _BY_CHARACTER and "zh" not in split
    latin = by_word and "multi_scene_ocr" in group
    found, wanted = (_tokens(part.strip(), by_word=by_word, latin=latin) for part in (text, reference))
    right = (Counter(found) & Counter(wanted)).total()
    return 2 * right / (len(found) + len(wanted)) if right else 0.0


def _tokens(text: str, *, by_word: bool, latin: bool) -> list[str]:
    plain = re.sub(r"\s+", " ", text.replace("###", "").replace("***", ""))
    parts = plain.split(" ") if by_word else list(plain.replace(" ", ""))
    lowered = [part.lower() for part in parts]
    return [part for part in (_NO_ALPHANUMERIC.sub("", one) if latin else one for one in lowered) if part]
