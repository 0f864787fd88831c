"""Scores of text-rich benchmarks: ANLS, and the relaxed accuracy of charts."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora_eval.metrics.metric_text import levenshtein

_ANLS_THRESHOLD = 0.5


def anls(text: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity; below 0.5 it is 0. lmms-eval and VLMEvalKit agree on it.

    Distance between the lower-cased, space-collapsed strings, divided by the length of the longer original string.
    """
    best = 1 - min(_distance_share(text, reference) for reference in references)
    return best if best >= _ANLS_THRESHOLD else 0.0


def _distance_share(text: str, reference: str) -> float:
    left, right = (" ".join(item.strip().lower().split()) for item in (text, reference))
    length = max(len(text.upper()), len(reference.upper()))
    return levenshtein(left, right) / length if length else 0.0


def anls_stvqa_llava(text: str, references: Sequence[str]) -> float:
    """LLaVA's ST-VQA form: lengths of the stripped strings, inner space kept; two empty strings are equal."""
    scores = []
    for reference in references:
        left, right = text.lower().strip(), reference.lower().strip()
        longest = max(len(left), len(right))
        similarity = 1 - levenshtein(left, right) / longest if longest else 1.0
        scores.append(similarity if similarity >= _ANLS_THRESHOLD else 0.0)
    return max(scores)


def _to_float(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed_lmms_eval(text: str, reference: str, *, tolerance: float = 0.05) -> float:
    """ChartQA: numbers within 5 % of the reference, other text equal without case; nothing is stripped."""
    answer, gold = _to_float(text), _to_float(reference)
    if answer is not None and gold:
        return float(abs(answer - gold) / abs(gold) <= tolerance)
    return float(text.lower() == reference.lower())


def relaxed_accuracy(text: str, reference: str) -> float:
    """The default, and VLMEvalKit's: `relaxed_lmms_eval` of the stripped answer."""
    return relaxed_lmms_eval(text.strip(), reference)
