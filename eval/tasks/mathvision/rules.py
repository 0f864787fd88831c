r"""MATH-Vision's own rule: what an answer says, in a normalised LaTeX form, and whether two answers are equal.

Source: `evaluation/` of the benchmark's repository (a1f5cc3). The published verdicts come from it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from string import ascii_uppercase

from mm_moslora_eval.metrics import multiple_choice
from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import AskedJudge, final_answer, of_text
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.vlmevalkit_tsv import parse_list

from .latex_value import latex_value

_PHRASES = tuple(
    phrase
    for rest in ("the final answer is", "the answer is", "the correct answer is", "the answer should be")
    for phrase in (rest, rest.replace("the", "The"))
)
_BOX = "oxed{"
_MOST_ITEMS = 100
_LETTER_GROUPS = tuple(form for letter in "abcde" for form in (f"({letter})", f"{{{letter}}}"))
_REMOVED = (
    r"\left", r"\right", r"^{\circ}", r"^\circ", "{m}^3", "m^3", "{units}", "units", "{km}", "km",
)  # fmt: skip
_REMOVED_AFTER = ("\n", r"\!")
_MIXED = re.compile(r"(?<![\d.}])(\d+)\s*(\\[dt]?frac\{\d+\}\{\d+\})")
_ROOT_WITHOUT_BRACES = re.compile(r"\\sqrt(?=[^{])(.)", re.S)


def mathvision_answer(text: str) -> str:
    """MATH-Vision: a letter at the end or start of the answer, the last box, or what follows `the answer is`."""
    answer = text.strip()
    for letter in "ABCDE":
        ends = (f" {letter}.", f" ({letter}).")
        starts = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if answer.endswith(ends) or answer.startswith(starts):
            answer = letter
    last = answer.split("is ")[-1].rstrip(".")
    if _is_number(last):
        answer = last
    if _BOX not in answer:
        for phrase in _PHRASES:
            _, found, after = answer.rpartition(phrase)
            answer = after.strip()
            if found:
                answer = answer.split("\n")[0].split(". ")[0]
    elif answer.count(_BOX) > 1:
        answer = r"\boxed{" + answer.split(_BOX)[-1]
    answer = _normalised(answer)
    for form in _LETTER_GROUPS:
        answer = answer.replace(form, form[1])
    return answer.rstrip(".").lstrip(":").strip()


def mathvision_equal(answer: str, reference: str) -> bool:
    """Equal in lower case, or equal in value to two decimals."""
    first, second = answer.lower().strip(), reference.lower().strip()
    if not first or not second:
        return False
    if first == second:
        return True
    first, second = _tuple(answer.lower()), _tuple(reference.lower())
    if first == second:
        return True
    values = latex_value(first), latex_value(second)
    return None not in values and _rounded(values[0]) == _rounded(values[1])


def equal_vlmevalkit(answer: str, reference: str) -> bool:
    """VLMEvalKit's rule: equal in lower case, or in value up to 1e-6; a mixed number is a sum there."""
    first, second = answer.lower().strip(), reference.lower().strip()
    if first == second:
        return True
    one, other = (latex_value(_MIXED.sub(r"(\1+\2)", text)) for text in (first, second))
    return one is not None and other is not None and abs(one - other) < 1e-6


def _rounded(value: float | int | None) -> float | int:
    return round(value or 0, 2)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _tuple(text: str) -> str:
    """A tuple or list with its items replaced by their values to two decimals, where all have one."""
    items = text[1:-1].split(",", _MOST_ITEMS)
    if not 2 <= len(items) <= _MOST_ITEMS or (text[0], text[-1]) not in (("(", ")"), ("[", "]")):
        return text
    shown = []
    for item in items:
        if "infty" in item or item in ("a", "-a"):
            shown.append(item)
            continue
        value = latex_value(item)
        if value is None:
            return text
        shown.append(str(round(value, 2)))
    return text[0] + ",".join(shown) + text[-1]


def _normalised(text: str) -> str:
    text = text.lower().replace("{}", "")
    start, end = text.find(_BOX) + len(_BOX), text.rfind("}")
    answer = text[start:end] if len(_BOX) <= start <= end else text
    close, opened = answer.find("}"), answer.find("{")
    if close != -1 and (opened == -1 or close < opened):
        answer = answer[:close]
    answer = answer.split("=")[-1].split(r"\approx")[-1]
    answer = (
        answer.replace(" ", "").replace(r"\,", "").replace("\N{INFINITY}", r"\infty").replace(r"+\infty", r"\infty")
    )
    answer = answer.replace("\\\\", "\\").replace("\n", "").replace(r"\text", "").replace(r"\mbox", "")
    answer = answer.replace("bmatrix", "pmatrix")
    for piece in _REMOVED:
        answer = answer.replace(piece, "")
    return _plain_latex(answer)


def _plain_latex(text: str) -> str:
    for piece in _REMOVED_AFTER:
        text = text.replace(piece, "")
    text = text.replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for piece in (r"\left", r"\right", r"^{\circ}", r"^\circ", r"\$", "$"):
        text = text.replace(piece, "")
    text = text.split(r"\text{ ")[0]
    text = text.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    for sign in ("=", r"\approx"):
        if text.count(sign) == 1:
            text = text.split(sign)[-1]
    root = "sqrt" in text
    if root:
        text = _ROOT_WITHOUT_BRACES.sub(r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    if root:
        text = _fractions(text)
    if text == "0.5":
        return r"\frac{1}{2}"
    match = re.fullmatch(r"(-?\d+)/(-?\d+)", text)
    return (
        rf"\frac{{{int(match[1])}}}{{{int(match[2])}}}"
        if match and text == f"{int(match[1])}/{int(match[2])}"
        else text
    )


def _fractions(text: str) -> str:
    r"""`\frac12` and `\frac1{72}` with braces."""
    first, *rest = text.split(r"\frac")
    result = first
    for part in rest:
        result += r"\frac"
        if part[:1] == "{":
            result += part
        elif len(part) < 2:
            return text
        elif part[1] == "{":
            result += f"{{{part[0]}}}{part[1:]}"
        else:
            result += f"{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return result


def _choices(document: Document) -> list[str]:
    """The texts of the options; VLMEvalKit's file has them in one cell and no option columns."""
    return [*document.options.values()] or parse_list(document.extra.get("choices", ""))


def mathvision_vlmevalkit(text: str, document: Document) -> str:
    """VLMEvalKit for MATH-Vision: the letter by its usual rule, to an open question the whole answer."""
    options = dict(zip(ascii_uppercase, _choices(document), strict=False))
    return multiple_choice.vlmevalkit(text, options) if options else text.strip()


def mathvision_score(parsed: str, document: Document) -> float:
    """MATH-Vision: the letter or the text of the right option, equal as texts or in value to two decimals."""
    right = [text for answer in document.answers for text in (answer, document.options.get(answer, answer))]
    return float(any(mathvision_equal(parsed, text) for text in right))


def mathvision_vlmevalkit_score(parsed: str, document: Document) -> float:
    """VLMEvalKit for MATH-Vision: equal as texts, or in value to six decimals; nothing is evaluated as code."""
    return best(lambda a, b: float(equal_vlmevalkit(a, b)), parsed, document.answers)


def _extract_mathvision(judge: AskedJudge, document: Document, answer: str) -> str | None:
    """MATH-Vision in VLMEvalKit: an answer with a letter, or that is the right one as a whole, is not sent."""
    read, choices = mathvision_vlmevalkit(answer, document), _choices(document)
    if not read or (not choices and mathvision_vlmevalkit_score(read, document) < 1):
        return final_answer(judge, document, answer, choices)
    return answer


_BOXED = (
    'Please solve the problem step by step and put your answer in one "\\boxed{}". If it is a multiple choice '
    'question, only one letter is allowed in the "\\boxed{}".\n'
)


def _mathvision(document: Document, *, before: str, after: str) -> str:
    """Options that are nothing but their letters are in the picture and are not listed."""
    bare = all(letter == text for letter, text in document.options.items())
    options = "" if bare else "".join(f"({letter}) {text}\n" for letter, text in document.options.items())
    return f"{before}{document.question}\n{options}{after}"


EXTRACTORS: dict[str, Extractor] = {
    "mathvision": of_text(mathvision_answer),
    "mathvision_vlmevalkit": mathvision_vlmevalkit,
}
METRICS: dict[str, Metric] = {"mathvision": mathvision_score, "mathvision_vlmevalkit": mathvision_vlmevalkit_score}
JUDGED_EXTRACTIONS = {"mathvision_vlmevalkit": (_extract_mathvision, "mathvision_vlmevalkit")}
PROMPTS: dict[str, Callable[[Document], str]] = {
    "mathvision": partial(_mathvision, before="", after="\nAnswer the question using a single word or phrase."),
    "mathvision_step_by_step": partial(_mathvision, before=_BOXED, after=""),
}
