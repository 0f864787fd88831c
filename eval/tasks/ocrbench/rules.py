"""OCRBench: a reference lies within the answer; hits by group."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from mm_moslora_eval.metrics.metric_text import FULL_WIDTH
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import documented
from mm_moslora_eval.scoring.scored_sample import Numbers, Samples, Summed

_HANDWRITTEN_MATHS = "Handwritten Mathematical Expression Recognition"


def _contains(text: str, references: Sequence[str], category: str, *, fold: bool) -> int:
    if category == _HANDWRITTEN_MATHS:
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


_OWN_GROUPS = ("Scene Text-centric VQA", "Doc-oriented VQA", "Key Information Extraction", _HANDWRITTEN_MATHS)
_TEXT = ("Regular Text", "Irregular Text", "Artistic Text", "Digit String", "Non-Semantic Text")
GROUPS = {
    **{f"{kind} Recognition": "Text Recognition" for kind in _TEXT},
    "Handwriting Recognition": "Text Recognition",
    **{group: group for group in _OWN_GROUPS},
}
"""Question type -> group of the published table."""


def _ocrbench(metric: Callable[[str, Sequence[str], str], int]) -> Metric:
    return documented(
        lambda parsed, document: float(metric(parsed, document.answers, document.category or "")), metric.__doc__
    )


def ocrbench(samples: Samples) -> Summed:
    """OCRBench: the share of hits as headline, with the total sum and the sums of the five groups."""
    sums: Numbers = defaultdict(float)
    for sample in samples:
        sums["total"] += sample.score
        sums[GROUPS.get(sample.document.category or "", "other")] += sample.score
    return Summed(ratios=[mean_of([sample.score for sample in samples])], metrics=dict(sums))


METRICS: dict[str, Metric] = {
    "ocrbench_vlmevalkit": _ocrbench(ocrbench_vlmevalkit),
    "ocrbench_lmms_eval": _ocrbench(ocrbench_lmms_eval),
}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"ocrbench": ocrbench}
