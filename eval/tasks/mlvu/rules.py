"""MLVU: letters of VLMEvalKit, which compares an answer in two ways, of which either is enough."""

from __future__ import annotations

from mm_moslora_eval.metrics.multiple_choice import Options
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_letters, with_usual


def mlvu_vlmevalkit(text: str, options: Options) -> list[str]:
    """VLMEvalKit for MLVU: the sign before the first `)`, so `(no) A` is nothing, and what its usual rule reads."""
    end = text.find(")")
    sign = text if end == -1 else text[end - 1 : end] if end else ""
    return with_usual([sign] if sign in options else [], text, options)


EXTRACTORS: dict[str, Extractor] = {"mlvu_vlmevalkit": of_letters(mlvu_vlmevalkit)}
