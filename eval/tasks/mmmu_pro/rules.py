"""MMMU-Pro: letters of its own code and of VLMEvalKit."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mm_moslora_eval.metrics.multiple_choice import vlmevalkit
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_options
from mm_moslora_eval.sources.document import Document

from ..mmmu.rules import mmmu_lmms_eval


def mmmu_pro_official(text: str, options: Mapping[str, str]) -> str:
    """MMMU-Pro: the only option letter after the last `Answer:`, else MMMU's rules with `X.`."""
    _, found, after = text.rpartition("Answer:")
    named = [letter for letter in options if letter in after] if found else []
    return named[0] if len(named) == 1 else mmmu_lmms_eval(text, options)


def behind_answer(text: str) -> str:
    """VLMEvalKit's step before its rules for answers with reasoning: what follows `Answer:` in the last such line."""
    lines = [line.strip() for line in text.strip().split("\n")]
    last = next((line for line in reversed(lines) if line.startswith("Answer:")), None)
    if last is None:
        return text
    tail = last.removeprefix("Answer:")
    capitals = set(re.findall(r"[A-Z]", tail))
    return capitals.pop() if len(capitals) == 1 else tail


def mmmu_pro_vlmevalkit(text: str, document: Document) -> str:
    """VLMEvalKit for MMMU-Pro with reasoning: its letter of what follows `Answer:` in the last such line."""
    return vlmevalkit(behind_answer(text), document.options)


EXTRACTORS: dict[str, Extractor] = {
    "mmmu_pro_official": of_options(mmmu_pro_official),
    "mmmu_pro_vlmevalkit": mmmu_pro_vlmevalkit,
}
