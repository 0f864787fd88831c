"""LVBench: letters of its own code."""

from __future__ import annotations

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_text


def lvbench_official(text: str) -> str:
    """LVBench: the first sign of what stands before `)` and behind `(`, so `The answer is A` is T."""
    answer = text.strip().split(")")[0].strip()
    if "(" in answer:
        answer = answer.split("(")[1].strip()
    return answer[:1]


EXTRACTORS: dict[str, Extractor] = {"lvbench_official": of_text(lvbench_official)}
