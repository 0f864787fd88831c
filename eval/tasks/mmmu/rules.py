"""MMMU: letters as its own script and lmms-eval parse them, and open questions by key phrases and numbers.

Source: the evaluation script of MMMU.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence

from mm_moslora_eval.metrics import multiple_choice
from mm_moslora_eval.metrics.metric_text import strip_each
from mm_moslora_eval.metrics.multiple_choice import Options
from mm_moslora_eval.scoring.named_parts import Extractor, Metric
from mm_moslora_eval.scoring.rule_forms import documented
from mm_moslora_eval.sources.document import Document


def mmmu_official(text: str, options: Options) -> str:
    """MMMU's own parser: `(X)`, else ` X `, else an option's text; the last of several. No random choice."""
    return _mmmu(text, options, forms=(" {} ",))


def mmmu_lmms_eval(text: str, options: Options) -> str:
    """lmms-eval's MMMU parser: `X ` and `X.` count as well."""
    return _mmmu(text, options, forms=("{} ", "{}."))


def _mmmu(text: str, options: Options, *, forms: Sequence[str]) -> str:
    padded = f" {strip_each(text, ',.!?;:' + chr(39))} "
    bracketed = [letter for letter in options if f"({letter})" in padded]
    if bracketed:
        return max(bracketed, key=lambda letter: padded.rfind(f"({letter})"))
    for form in forms:
        matching = [letter for letter in options if form.format(letter) in padded]
        if matching:
            return max(matching, key=lambda letter: padded.rfind(f" {letter} "))
    lowered = padded.lower()
    if len(padded.split()) > 5:
        matching = [letter for letter, value in options.items() if value.lower() in lowered]
        if matching:
            return max(matching, key=lambda letter: lowered.rfind(options[letter].lower()))
    return ""


Parsed = str | float

_WITH_COMMAS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
# None begins within digits: it would be searched for at each of them.
_SCIENTIFIC = re.compile(r"-?(?<!\d)\d+(?:\.\d+)?[eE][+-]?\d+")
_SIMPLE = re.compile(r"-?(?:(?<!\d)\d+\.\d+|\.\d+|(?<!\d)\d+\b)(?![eE][+-]?\d+)(?![,\d])")
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")


def extract_numbers(text: str) -> list[str]:
    """Every number in the text: with thousands commas, then scientific, then plain; overlaps are kept."""
    return [*_WITH_COMMAS.findall(text), *_SCIENTIFIC.findall(text), *_SIMPLE.findall(text)]


def normalize(text: str) -> list[Parsed]:
    """A number becomes a float of two decimals; other text is lower-cased; one character gets a space on each side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def parse_open(text: str) -> list[Parsed]:
    """The phrases and numbers that may be the answer, without repetitions, in order of appearance."""
    phrases = _key_phrases(text)
    candidates = [*phrases, *(number for phrase in phrases for number in extract_numbers(phrase))]
    return list(dict.fromkeys(item for candidate in candidates for item in normalize(candidate)))


def _key_phrases(text: str) -> list[str]:
    text = text.strip().strip(".").lower()
    parts = _SENTENCES.split(text)
    phrases = []
    for index, part in enumerate(parts):
        # The last part may be nothing but an equation.
        indicators = (*_INDICATORS, "=") if index == len(parts) - 1 else _INDICATORS
        tails = [part.split(indicator)[-1].strip() for indicator in indicators if indicator in part]
        shortest = _shortest(tails)
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [text]


def _shortest(tails: Sequence[str]) -> str:
    """The shortest tail; an empty tail is replaced by the next one, as in the source."""
    best = ""
    for tail in tails:
        if not best or len(tail) < len(best):
            best = tail
    return best


def options_vlmevalkit(references: Sequence[str]) -> Mapping[str, str]:
    """VLMEvalKit's two options of an open question: A is the reference, B is everything else.

    Several references become one option, written as a Python list.
    """
    return {"A": references[0] if len(references) == 1 else str(list(references)), "B": "Other Answers"}


def open_correct(parsed: Sequence[Parsed], reference: str | Sequence[str]) -> bool:
    """Whether a text reference lies within a parsed phrase or a numeric one equals a parsed number."""
    references = [reference] if isinstance(reference, str) else reference
    gold = [item for text in references for item in normalize(text)]
    for answer in parsed:
        if isinstance(answer, str):
            if any(isinstance(item, str) and item in answer for item in gold):
                return True
        elif answer in gold:
            return True
    return False


_CAPITALS = tuple(string.ascii_uppercase)


def _mmmu_mixed(extract: Callable[[str, Options], str]) -> Extractor:
    return documented(
        lambda text, document: extract(text, document.options) if document.options else text, extract.__doc__
    )


def _mmmu_vlmevalkit(extract: Callable[[str, Options], str]) -> Extractor:
    return documented(
        lambda text, document: extract(text, document.options or options_vlmevalkit(document.answers)), extract.__doc__
    )


def _mmmu_vlmevalkit_score(parsed: str, document: Document) -> float:
    """VLMEvalKit's letter; an open question has two options, the reference and `Other Answers`."""
    # As in the source, the answer to an open question is option A, unless it is a single capital letter.
    answers = document.answers
    open_question = not document.options and not (len(answers) == 1 and answers[0] in _CAPITALS)
    return float(parsed == "A" if open_question else parsed in answers)


def _mmmu_score(parsed: str, document: Document) -> float:
    """The letter; open questions by MMMU's phrases and numbers."""
    if document.options:
        return float(parsed in document.answers)
    return float(open_correct(parse_open(parsed), document.answers))


EXTRACTORS: dict[str, Extractor] = {
    "mmmu_official": _mmmu_mixed(mmmu_official),
    "mmmu_lmms_eval": _mmmu_mixed(mmmu_lmms_eval),
    "mmmu_vlmevalkit": _mmmu_vlmevalkit(multiple_choice.vlmevalkit),
    "mmmu_vlmevalkit_2024_06": _mmmu_vlmevalkit(multiple_choice.vlmevalkit_2024_06),
}
METRICS: dict[str, Metric] = {"mmmu": _mmmu_score, "mmmu_vlmevalkit": _mmmu_vlmevalkit_score}
