"""MMVP: lmms-eval's letters."""

from __future__ import annotations

import re

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import first_match, of_text

_MMVP = (
    re.compile(r"^\s*\(?([AB])\)?\.?\s*$", re.I),
    re.compile(r"^\s*\(?([AB])\)?[.\s]", re.I),
    re.compile(r"answer\s+is\s+\(?([AB])\)?", re.I),
    re.compile(r"option\s+\(?([AB])\)?", re.I),
    re.compile(r"\(?([AB])\)?(?:\s|$)", re.I),
)


def mmvp_lmms_eval(text: str) -> str:
    """lmms-eval for MMVP: A or B in several forms, also at the end of a word (so `grab it` is B)."""
    stripped = text.strip()
    first = stripped[:1].upper()
    return first_match(_MMVP, stripped).upper() or (first if first in ("A", "B") else "")


EXTRACTORS: dict[str, Extractor] = {"mmvp_lmms_eval": of_text(mmvp_lmms_eval)}
