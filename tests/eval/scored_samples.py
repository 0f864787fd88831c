"""Scored answers that every aggregation of the harness can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mm_moslora_eval.scoring.score_aggregation import AGGREGATIONS
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

WITH_OPTIONS = {
    "all_within": 'all_within {"columns": ["image_path"]}',
    "simplevqa_attempts": 'simplevqa_attempts {"none": ["no"]}',
    "detailed_mean": 'detailed_mean {"groups": {"pictures": ["image_path"]}}',
    "weighted": 'weighted {"column": "category", "weights": {"existence": 2, "count": 1, "OCR": 1, "scene": 1}}',
    "wemath": 'wemath {"problem": "image_path", "step": "category"}',
    "ccocr_fields_sets": 'ccocr_fields_sets {"column": "category"}',
    "consecutive": 'consecutive {"size": 1}',
}
PARTS = [WITH_OPTIONS.get(name, name) for name in AGGREGATIONS]
SUB_TASKS = ("existence", "count", "OCR", "scene")


def samples(scores: Sequence[float], *, pictures: int, categories: int = 1) -> list[Scored]:
    """Answers of these scores, dealt to the pictures in turn; rotations of one question per picture."""
    found = []
    for index, score in enumerate(scores):
        number = index % pictures
        reference = ("yes", "no")[number % 2]
        said = reference if score else {"yes": "no", "no": "yes"}[reference]
        document = Document(
            id=str(number + 1_000_000 * (index // pictures)), question="?", answers=(reference,),
            category=SUB_TASKS[number % categories], extra={"image_path": str(number)},
        )  # fmt: skip
        found.append(
            Scored(document=document, text=said, parsed=said, score=score, cluster=number, numbers=(8.0, 8 * score))
        )
    return found


def fitting(name: str, made: list[Scored]) -> list[Scored]:
    """Answers and references that an aggregation can read: one field each for that of fields."""
    if not name.startswith("ccocr_fields"):
        return made
    return [
        replace(
            one, parsed=f'"{one.parsed}"', document=replace(one.document, answers=(f'"{one.document.answers[0]}"',))
        )
        for one in made
    ]
