"""MVBench: letters of its own code, VLMEvalKit and lmms-eval."""

from __future__ import annotations

import re

from mm_moslora_eval.metrics.multiple_choice import Options
from mm_moslora_eval.scoring.named_parts import Extractor
from mm_moslora_eval.scoring.rule_forms import of_letters, of_text, with_usual


def _of_word(word: str, options: Options) -> list[str]:
    """The letters that a first word names: a part of `(a)` that holds the letter, or more than `(a)`."""
    bare = word.replace(".", "")
    forms = {letter: f"({letter.lower()})" for letter in options}
    return [letter for letter, form in forms.items() if (letter.lower() in bare and bare in form) or form in word]


def mvbench_official(text: str, options: Options) -> list[str]:
    """MVBench: the first word of the answer, behind the `(` at which its prompt ends."""
    return _of_word(("(" + text.strip().split("\n")[0]).lower().split(" ")[0], options)


def mvbench_vlmevalkit(text: str, options: Options) -> list[str]:
    """VLMEvalKit for MVBench: the first word, so the article `a` is A, and what its usual rule reads."""
    return with_usual(_of_word(text.lower().strip().split(" ")[0], options), text, options)


_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_NUMBER = re.compile(r"(\d)(\,)(\d)")
_MOST_PERIODS = 32
"""The source hands a flag over as the number of replacements."""
_SIGNS = tuple(';/[]"{}()=+\\_-><@`,?!')
_LISTED = re.compile(r"^([A-E])\.\s*(.+)$", re.I)
_ALONE = re.compile(r"\b([A-E])\b", re.I)


def mvbench_lmms_eval(text: str) -> str:
    """lmms-eval for MVBench: the letter of `X. text`, or the first from A to E alone, so the article `a` is A."""
    listed = _LISTED.match(text.strip())
    if listed:
        return listed[1].upper()
    plain = text.replace("\n", " ").replace("\t", " ").strip()
    result, joined = plain, _NUMBER.search(plain) is not None
    for sign in _SIGNS:
        apart = not (joined or f"{sign} " in plain or f" {sign}" in plain)
        result = result.replace(sign, " " if apart else "")
    result = _PERIOD.sub("", result, count=_MOST_PERIODS).strip("'").strip('"').strip(")").strip("(").strip().lower()
    alone = _ALONE.search(result)
    return alone[1].upper() if alone else result


EXTRACTORS: dict[str, Extractor] = {
    "mvbench_official": of_letters(mvbench_official),
    "mvbench_vlmevalkit": of_letters(mvbench_vlmevalkit),
    "mvbench_lmms_eval": of_text(mvbench_lmms_eval),
}
