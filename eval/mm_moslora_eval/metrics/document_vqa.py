"""Scores of text-rich benchmarks: ANLS (DocVQA, InfoVQA, ST-VQA), relaxed accuracy (ChartQA), OCRBench."""

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


def relaxed_vlmevalkit_2024_06(text: str, reference: str) -> float:
    """VLMEvalKit in June 2024: arguments swapped, so the tolerance is relative to the answer."""
    return relaxed_lmms_eval(reference, text.strip())


HANDWRITTEN_MATHS = "Handwritten Mathematical Expression Recognition"
FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: " "}
"""Full-width signs -> those of ASCII."""


def _contains(text: str, references: Sequence[str], category: str, *, fold: bool) -> int:
    if category == HANDWRITTEN_MATHS:
        answer, gold = _without_space(text), [_without_space(reference) for reference in references]
    else:
        table = FULL_WIDTH if fold else {}
        answer, *gold = (item.translate(table).lower().strip().replace("\n", " ") for item in (text, *references))
    return int(any(reference in answer for reference in gold))


def _without_space(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")


def ocrbench_vlmevalkit(text: str, references: Sequence[str], category: str) -> int:
    """VLMEvalKit: 1 if any reference lies within the answer; handwritten maths keeps case and ignores spaces."""
    return _contains(text, references, category, fold=False)


def ocrbench_lmms_eval(text: str, references: Sequence[str], category: str) -> int:
    """lmms-eval: the same after folding full-width ASCII."""
    return _contains(text.strip(), references, category, fold=True)


_OCRBENCH_OWN = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", HANDWRITTEN_MATHS)
_OCRBENCH_TEXT = ("Regular Text", "Irregular Text", "Artistic Text", "Digit String", "Non-Semantic Text")
OCRBENCH_GROUPS = {
    **{f"{kind} Recognition": "Text Recognition" for kind in _OCRBENCH_TEXT},
    "Handwriting Recognition": "Text Recognition",
    **{group: group for group in _OCRBENCH_OWN},
}
"""Question type -> group of the published table."""
