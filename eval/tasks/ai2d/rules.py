"""AI2D: lmms-eval's filter and score."""

from __future__ import annotations

import re
import string

from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import best_of, documented

_LEADING_LETTER = re.compile(r"^\s*([A-Z])\.")


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def ai2d_filter(text: str) -> str:
    """lmms-eval's AI2D filter: the capital before a period at the start, else the unchanged text."""
    match = _LEADING_LETTER.match(text)
    return match.group(1) if match else text


def ai2d_lmms_eval(text: str, reference: str) -> float:
    """lmms-eval's AI2D score: the filtered answer equals the letter without case and punctuation."""
    return float(ai2d_filter(text).lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION))


EXTRACTORS: dict[str, Extractor] = {
    "ai2d_lmms_eval": documented(lambda text, _: ai2d_filter(text.strip()), ai2d_filter.__doc__)
}
METRICS: dict[str, Metric] = {"ai2d_lmms_eval": best_of(ai2d_lmms_eval)}
