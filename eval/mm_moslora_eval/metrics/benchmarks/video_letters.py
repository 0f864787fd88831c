"""Letters as the evaluation code of MVBench, MLVU and LVBench reads them.

Where a source compares an answer with the right option in two ways, and either is enough, every letter that counts is
given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from mm_moslora_eval.metrics.multiple_choice import vlmevalkit

Options = Mapping[str, str]


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
    return _with_usual(_of_word(text.lower().strip().split(" ")[0], options), text, options)


def mlvu_vlmevalkit(text: str, options: Options) -> list[str]:
    """VLMEvalKit for MLVU: the sign before the first `)`, so `(no) A` is nothing, and what its usual rule reads."""
    end = text.find(")")
    sign = text if end == -1 else text[end - 1 : end] if end else ""
    return _with_usual([sign] if sign in options else [], text, options)


def _with_usual(letters: list[str], text: str, options: Options) -> list[str]:
    usual = vlmevalkit(text, options)
    return [*letters, usual] if usual and usual not in letters else letters


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


def lvbench_official(text: str) -> str:
    """LVBench: the first sign of what stands before `)` and behind `(`, so `The answer is A` is T."""
    answer = text.strip().split(")")[0].strip()
    if "(" in answer:
        answer = answer.split("(")[1].strip()
    return answer[:1]
