"""MMBench: lmms-eval's static evaluator, and the workbook of its server."""

from __future__ import annotations

from mm_moslora_eval.metrics.multiple_choice import API_FAILURE, Options, lmms_eval, option_text
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_options
from mm_moslora_eval.scoring.submission_forms import Submission, workbook

_AFFIXED = ["X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X)."]
"""Forms of a letter with signs around it, in the order in which they are tried."""


def lmms_eval_mmbench(text: str, options: Options) -> str:
    """lmms-eval's static MMBench evaluator, in two stages.

    The first stage finds a token that is a letter, bare or with one of twelve affixes, else the text of one option. If
    it finds nothing, the second stage is lmms-eval's general extractor.
    """
    four = {key: options[key] for key in options if key in "ABCD"}
    return _affixed_letter(text) or option_text(text, four) or lmms_eval(text, four)


def _affixed_letter(text: str) -> str:
    if API_FAILURE in text:
        return ""
    tokens = text.split()
    bare = [letter for letter in "ABCDE" if letter in tokens]
    # A single "A" in a longer answer counts as an article.
    if len(bare) == 1 and not ("A" in tokens and len(tokens) > 3):
        return bare[0]
    for form in _AFFIXED:
        matching = [letter for letter in "ABCDE" if form.replace("X", letter) in tokens]
        if len(matching) == 1:
            return matching[0]
    return ""


EXTRACTORS: dict[str, Extractor] = {"mmbench_lmms_eval": of_options(lmms_eval_mmbench)}
SUBMISSIONS = {"mmbench": Submission(write=workbook, suffix="xlsx")}
"""The workbook of its server."""
