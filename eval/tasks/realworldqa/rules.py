"""RealWorldQA as lmms-eval scores it."""

from __future__ import annotations

from mm_moslora_eval.metrics.multiple_choice import lmms_eval
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import best_of


def realworldqa_lmms_eval(text: str, reference: str) -> float:
    """RealWorldQA as lmms-eval scores it: by letter when the reference is A to D, else by text."""
    gold = reference.strip()
    if gold.upper() in ("A", "B", "C", "D"):
        return float(lmms_eval(text, dict.fromkeys("ABCD", "")) == gold.upper())
    return float(text.lower().strip().rstrip(".") == gold.lower())


METRICS: dict[str, Metric] = {"realworldqa_lmms_eval": best_of(realworldqa_lmms_eval)}
