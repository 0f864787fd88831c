"""PixMo-Count: lmms-eval's comparison of the first digits."""

from __future__ import annotations

import re

from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import best_of, of_text


def first_digits(text: str) -> str:
    """lmms-eval for PixmoCount: the first run of digits, else the whole answer."""
    match = re.search(r"\d+", text)
    return match[0] if match else text.strip()


def first_digits_equal(text: str, reference: str) -> float:
    """lmms-eval for PixmoCount: the first digits of answer and reference are equal."""
    return float(text == first_digits(reference))


EXTRACTORS: dict[str, Extractor] = {"pixmo_count_lmms_eval": of_text(first_digits)}
METRICS: dict[str, Metric] = {"pixmo_count_lmms_eval": best_of(first_digits_equal)}
