"""ScienceQA: the rules of LLaVA's script and of lmms-eval."""

from __future__ import annotations

import re

from mm_moslora_eval.metrics.multiple_choice import Options
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import best_of, documented

_SQA_PHRASE = re.compile(r"The answer is ([A-Z]).")


def scienceqa_llava(text: str, options: Options) -> str:
    """LLaVA's ScienceQA script: the whole answer, `X. `, or one `The answer is X.`; else not inferable.

    The letter may lie outside the options; such an item is wrong.
    """
    if text in tuple("ABCDE"):
        return text
    if len(text) >= 3 and text[0] in "ABCDE" and text[1:3] == ". ":
        return text[0]
    letters_named = _SQA_PHRASE.findall(text)
    return letters_named[0] if len(letters_named) == 1 else ""


def scienceqa_lmms_eval(text: str, reference: str) -> float:
    """lmms-eval's ScienceQA score: the letter alone in any case, or a capital followed by a period."""
    answer, gold = text.strip(), reference.strip().lower()
    if answer.lower() == gold:
        return 1.0
    if len(answer) >= 2 and answer[0].isupper() and answer[1] == ".":
        return float(answer[0].lower() == gold)
    return 0.0


EXTRACTORS: dict[str, Extractor] = {
    "scienceqa_llava": documented(
        lambda text, document: scienceqa_llava(text.strip(), document.options), scienceqa_llava.__doc__
    )
}
METRICS: dict[str, Metric] = {"scienceqa_lmms_eval": best_of(scienceqa_lmms_eval)}
