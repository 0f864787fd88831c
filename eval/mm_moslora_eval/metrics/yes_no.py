"""Yes/no questions: `yes`, `no` or an empty string when neither can be inferred."""

from __future__ import annotations

from mm_moslora_eval.metrics.vqa_accuracy import punctuation_vlmevalkit


def vlmevalkit(text: str) -> str:
    """VLMEvalKit: the word `yes` or the word `no`, but not both."""
    words = punctuation_vlmevalkit(text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "" if yes == no else "yes" if yes else "no"


extract_yes_no = vlmevalkit
"""The default."""
