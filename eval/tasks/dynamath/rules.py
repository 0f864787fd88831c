"""DynaMath in VLMEvalKit: the short answer of a JSON reply, and its comparison by kind of answer.

The source asks a judge for the short answer where the reply is no JSON; here such a reply is read as it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from mm_moslora_eval.metrics.exact_match import best
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object

_CONTROL = re.compile(r"[\x00-\x1f]")
_FLOAT, _CHOICE = "float", "multiple choice"


def short_answer(text: str, kind: str) -> str:
    """The value of `short answer` in the reply, else the reply, in the form of its kind; empty if it has none.

    Args:
        text: the reply.
        kind: `float`, `multiple choice`, or another word for text.
    """
    plain = text[text.find("{") : text.rfind("}") + 1] if 0 <= text.find("{") < text.rfind("}") else text
    plain = _CONTROL.sub(" ", plain.replace("\\", ""))  # the source's JSON may hold line feeds in strings
    try:
        said = parse_object(plain).get("short answer")
    except StrictJsonError:
        said = None
    return (_in_form(said, kind) if isinstance(said, str) else "") or _in_form(plain, kind)


def _in_form(text: str, kind: str) -> str:
    if kind == _CHOICE:
        return _letter(text)
    if kind == _FLOAT:
        value = _number(text)
        return "" if value is None else repr(value)
    return text


def _letter(text: str) -> str:
    named = [letter for letter in "ABCDE" if letter in text.upper()]
    return text.upper() if len(text) == 1 else named[0] if len(named) == 1 else ""


def _number(text: str) -> float | None:
    first, pi, _ = text.split(" ")[0].partition("\N{GREEK SMALL LETTER PI}")
    try:
        value = float(first) * (math.pi if pi else 1.0)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def score(answer: str, reference: str, kind: str) -> float:
    """A number within 0.001, the letter, or a text that lies within the reference."""
    if kind == _FLOAT:
        expected, found = _number(reference), _number(answer)
        return float(expected is not None and found is not None and abs(found - expected) <= 0.001)
    if kind == _CHOICE:
        return float(answer == reference)
    return float(answer.lower() in reference.lower())


def dynamath_short(text: str, document: Document) -> str:
    """DynaMath: the `short answer` of a JSON reply, else the reply, as a number, a letter or text."""
    return short_answer(text, document.extra.get("answer_type", ""))


def dynamath_score(parsed: str, document: Document) -> float:
    """DynaMath: a number within 0.001, the letter, or a text that lies within the reference."""
    kind = document.extra.get("answer_type", "")
    return best(lambda answer, reference: score(answer, reference, kind), parsed, document.answers)


_FORMS = {
    "multiple choice": (
        "Provide the corresponing choice option in the 'short answer' key, such as 'A', 'B', 'C', or 'D'."
    ),
    "float": "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.",
}  # the source's own spelling


def _dynamath(document: Document) -> str:
    other = "Float numbers in the answer should be formatted as three-digit floating-point numbers."
    form = _FORMS.get(document.extra.get("answer_type", ""), other)
    return (
        f"## Question\n {document.question}\n## Answer Instruction Please provide an answer to the question outlined "
        "above. Your response should adhere to the following JSON format, which includes two keys: 'solution' and "
        "'short answer'. The 'solution' key can contain detailed steps needed to solve the question, and the 'short "
        f"answer' key should provide a concise response. {form}\n\nExample of expected JSON response format:\n\n"
        '{\n    "solution": "[Detailed step-by-step explanation]",\n    "short answer": "[Concise Answer]"\n}'
    )


EXTRACTORS: dict[str, Extractor] = {"dynamath_vlmevalkit": dynamath_short}
METRICS: dict[str, Metric] = {"dynamath_vlmevalkit": dynamath_score}
PROMPTS: dict[str, Callable[[Document], str]] = {"dynamath": _dynamath}
