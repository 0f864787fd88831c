"""MME-RealWorld: letters of its own code and of VLMEvalKit."""

from __future__ import annotations

import re

from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_text

_MME_PREFIXES = (
    "The best answer is", "The correct answer is", "The answer is", "The answer", "The best option is",
    "The correct option is", "Best answer:", "Best option:",
)  # fmt: skip


def mme_realworld(text: str) -> str:
    """MME-RealWorld: the first capital from A to E behind the usual beginnings, so `An apple` is A."""
    text = text.strip()
    for prefix in _MME_PREFIXES:
        text = text.replace(prefix, "")
    match = re.search(r"[ABCDE]", text)
    if match:
        return match[0]
    lowered = text.lower()
    return next((letter for letter in "ABCDE" if len(text.split()) <= 10 and lowered in f"({letter.lower()})"), "")


def mme_realworld_vlmevalkit(text: str) -> str:
    """VLMEvalKit for MME-RealWorld: the same within `<answer>...</answer>` where there is one."""
    _, _, after = text.partition("<answer>")
    said, closed, _ = after.partition("</answer>")
    return mme_realworld(said.strip().upper() if closed else text)


EXTRACTORS: dict[str, Extractor] = {
    "mme_realworld": of_text(mme_realworld),
    "mme_realworld_vlmevalkit": of_text(mme_realworld_vlmevalkit),
}
