"""ChartQA: VLMEvalKit's rule of June 2024."""

from __future__ import annotations

from mm_moslora_eval.metrics.document_vqa import relaxed_lmms_eval
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import best_of


def relaxed_vlmevalkit_2024_06(text: str, reference: str) -> float:
    """VLMEvalKit in June 2024: arguments swapped, so the tolerance is relative to the answer."""
    return relaxed_lmms_eval(reference, text.strip())


METRICS: dict[str, Metric] = {"chartqa_vlmevalkit_2024_06": best_of(relaxed_vlmevalkit_2024_06)}
