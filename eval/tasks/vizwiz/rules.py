"""VizWiz: VQA accuracy by its own normalisation."""

from __future__ import annotations

from collections.abc import Sequence

from mm_moslora_eval.metrics.vqa_accuracy import (
    CONTRACTIONS,
    accuracy,
    normalize_evalai,
    one_line,
    punctuation_official,
    words,
)
from mm_moslora_eval.scoring.named_parts import Metric
from mm_moslora_eval.scoring.rule_forms import all_of
from mm_moslora_eval.scoring.submission_forms import Submission, as_json, image_name

# VizWiz writes most contractions with a backtick, but these with an apostrophe.
_APOSTROPHE = {"ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"}
_CONTRACTIONS = {
    key: word if word in _APOSTROPHE else word.replace("'", "`")
    for key, word in CONTRACTIONS.items()
    if "'" not in key or key in ("couldn'tve", "hadn'tve")
}


def _normalize(text: str) -> str:
    return words(punctuation_official(one_line(text)), _CONTRACTIONS)


def vizwiz_official(text: str, references: Sequence[str]) -> float:
    """VizWiz: unchanged references; contractions with backticks."""
    return accuracy(text, references, answer=_normalize, reference=str)


METRICS: dict[str, Metric] = {"vizwiz_official": all_of(vizwiz_official)}
SUBMISSIONS = {
    "vizwiz": Submission(
        write=lambda rows: as_json(
            [{"image": image_name(row), "answer": normalize_evalai(row["text"])} for row in rows]
        )
    )
}
"""The JSON of its server."""
