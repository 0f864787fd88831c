"""VQAv2: VQA accuracy as its port of TRI-ML and lmms-eval have it."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora_eval.metrics.vqa_accuracy import accuracy, normalize_evalai, normalize_official, punctuation_official
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import all_of
from mm_moslora_eval.scoring.submission_forms import Submission, as_json, number


def vqav2_official(text: str, references: Sequence[str]) -> float:
    """VQAv2 as in the port of TRI-ML: references get the punctuation step only."""
    return accuracy(text, references, answer=normalize_official, reference=punctuation_official)


def vqav2_lmms_eval(text: str, references: Sequence[str]) -> float:
    """VQAv2 as in lmms-eval: references get every step."""
    return accuracy(text, references, answer=normalize_official, reference=normalize_official)


METRICS: dict[str, Metric] = {"vqav2_official": all_of(vqav2_official), "vqav2_lmms_eval": all_of(vqav2_lmms_eval)}
SUBMISSIONS = {
    "vqav2": Submission(  # LLaVA uploads normalised answers
        write=lambda rows: as_json(
            [{"question_id": number(row["id"]), "answer": normalize_evalai(row["text"])} for row in rows]
        )
    )
}
"""The JSON of its server."""
