"""GQA: exact match as LLaVA, lmms-eval and VLMEvalKit have it."""

from __future__ import annotations

import string

from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import best_of

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_gqa_llava(text: str) -> str:
    """LLaVA's form of an answer before GQA's own script compares it: without closing periods, in lower case."""
    return text.rstrip(".").lower()


def gqa_llava(text: str, reference: str) -> float:
    """LLaVA: `normalize_gqa_llava` of the answer equals the unchanged reference."""
    return float(normalize_gqa_llava(text) == reference)


def gqa_lmms_eval(text: str, reference: str) -> float:
    """lmms-eval: equal without case and ASCII punctuation; space is significant."""
    return float(text.lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION))


def gqa_vlmevalkit(text: str, reference: str) -> float:
    """VLMEvalKit: equal without case and surrounding space, so `Yes.` is wrong for `yes`."""
    return float(text.strip().lower() == reference.strip().lower())


METRICS: dict[str, Metric] = {
    "gqa_llava": best_of(gqa_llava),
    "gqa_lmms_eval": best_of(gqa_lmms_eval),
    "gqa_vlmevalkit": best_of(gqa_vlmevalkit),
}
