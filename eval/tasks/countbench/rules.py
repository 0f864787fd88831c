"""CountBench: counts as lmms-eval and VLMEvalKit read and compare them."""

from __future__ import annotations

from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import best_of, of_text

_WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NUMERALS = {word: str(number) for number, word in enumerate(_WORDS)} | {"none": "0"}


def count_lmms_eval(text: str) -> str:
    """lmms-eval for CountBench: the whole answer in lower case; a word up to twenty becomes digits."""
    plain = text.strip().lower()
    return _NUMERALS.get(plain, plain)


def contains_vlmevalkit(text: str, reference: str) -> float:
    """VLMEvalKit for CountBench: the reference lies anywhere in the answer, so `12` contains `2`."""
    return float(reference in text)


EXTRACTORS: dict[str, Extractor] = {"countbench_lmms_eval": of_text(count_lmms_eval)}
METRICS: dict[str, Metric] = {"countbench_vlmevalkit": best_of(contains_vlmevalkit)}
