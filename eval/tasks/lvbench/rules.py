"""LVBench: the questions of a video, and letters of its own code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_text


def questions(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions in a video's row, each with the columns of the video, its own first."""
    found = row.get("qa")
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise ValueError(f"the column 'qa' holds {str(found)[:60]!r}, expected a list of objects")
    video = {key: value for key, value in row.items() if key != "qa"}
    return [{**video, **item} for item in found]


def lvbench_official(text: str) -> str:
    """LVBench: the first sign of what stands before `)` and behind `(`, so `The answer is A` is T."""
    answer = text.strip().split(")")[0].strip()
    if "(" in answer:
        answer = answer.split("(")[1].strip()
    return answer[:1]


ROWS = {"lvbench_questions": questions}
EXTRACTORS: dict[str, Extractor] = {"lvbench_official": of_text(lvbench_official)}
