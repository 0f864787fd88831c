"""Extracts the option letter from an answer, by this project's rules and those of each harness.

Extractors take the answer and the options (letter -> text). They return a letter, `Z` for a refusal (VLMEvalKit only)
or an empty string when no letter can be inferred. They never guess. `extract_letter` is the default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mm_moslora_eval.metrics.metric_text import letters, strip_each

Options = Mapping[str, str]

API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_BETWEEN_TOKENS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_VERBOSE_ANSWER = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
_LAST_TOKENS = 4


_ARTICLE = re.compile(
    # Begins before the whole space, so that a text of nothing but lines is searched once.
    r"(?<!\s)(?:^\s*+|(?<=[.!?])\s++|[^\S\n]*+\n\s*+)A(?=\s+(?!(?:because|since|as|is|and|or)\b)[a-z])"
)


_ARTICLE_BEHIND_ANSWER = re.compile(r"(?i:answer\s+is)(?=\s+a\s+[a-z])")


def extract_letter(text: str, options: Options) -> str:
    """The default: VLMEvalKit's current rules, except that `A dog.` is an article with a noun and no letter.

    Refusals are not inferable, and empty option texts match nothing. Where these rules read nothing, the letter counts
    that a sentence states: behind `answer`, at the start, behind `option`, or in brackets. Two letters in one of these
    places state nothing.
    """
    text = _ARTICLE.sub(lambda match: match.group().lower(), text)
    text = _ARTICLE_BEHIND_ANSWER.sub("answer:", text)  # VLMEvalKit reads the `a` of `answer is a dog` as a letter
    letter = vlmevalkit(text, {key: value for key, value in options.items() if str(value).strip()} or options)
    return "" if letter == "Z" else letter or _stated_letter(text, options)


_NO_ARTICLE = r"(?!\s+(?!(?:because|since|as|is|and|or)\b)[a-z])"
"""Behind `A` or `I`: no word follows that makes it an article or a pronoun."""
_LETTER = rf"[(\[*\"']*(?:([B-HJ-Z])|([AI]){_NO_ARTICLE})(?![\w'])"
_STATED = (
    re.compile(rf"(?i:\banswer)(?i:\s+(?:is|would be|must be|should be))?\s*[:=]?\s*(?i:option\s+)?{_LETTER}"),
    re.compile(rf"\A\s*{_LETTER}(?=\s*\Z|[^\w\s]|\s+[a-z0-9])"),
    re.compile(rf"(?i:\b(?:option|choice))(?i:\s+is)?\s*[:=]?\s*{_LETTER}"),
    re.compile(r"\(([A-Z])()\)"),
)
"""Places of a letter that a sentence states, the surest first."""


def _stated_letter(text: str, options: Options) -> str:
    if any(refusal in text for refusal in _REFUSALS):
        return ""
    for place in _STATED:
        found = {first or second for first, second in place.findall(text)}
        if found:
            return found.pop() if len(found) == 1 and found <= options.keys() else ""
    return ""


def vlmevalkit(text: str, options: Options) -> str:
    """VLMEvalKit since 2025-08: one letter within the last four tokens, `answer is X`, else one option's text."""
    letter = _option_token(text, options, last=_LAST_TOKENS)
    if letter is None:
        match = _VERBOSE_ANSWER.search(text)
        letter = match.group(1).upper() if match and match.group(1).upper() in options else ""
    if letter == "" and len(text.lower()) > 2 * sum(len(str(value)) for value in options.values()):
        return ""
    return letter or option_text(text, options)


def vlmevalkit_2024_06(text: str, options: Options) -> str:
    """VLMEvalKit in June 2024 (MoSLoRA paper): one letter anywhere, else one option's text."""
    return _option_token(text, options, last=None) or option_text(text, options)


def _option_token(text: str, options: Options, *, last: int | None) -> str | None:
    """A letter, `Z`, an empty string after an API failure, or None when the tokens decide nothing."""
    if API_FAILURE in text:
        return ""
    if any(refusal in text for refusal in _REFUSALS):
        return "Z"
    tokens = text.translate(_BETWEEN_TOKENS).split()
    letters_in_text = [letter for letter in options if letter in tokens]
    if not letters_in_text and "Z" in tokens:
        return "Z"
    if len(letters_in_text) == 1 and (last is None or tokens.index(letters_in_text[0]) >= len(tokens) - last):
        return letters_in_text[0]
    return None


def option_text(text: str, options: Options) -> str:
    """The only option whose text lies in the answer."""
    lowered = text.lower()
    matching = [letter for letter, value in options.items() if str(value).lower() in lowered]
    return matching[0] if len(matching) == 1 else ""


_PHRASES = (
    *(
        f"{start}{middle} is"
        for start in ("the ", "")
        for middle in ("answer", "correct answer", "best answer", "correct option", "best option")
    ),
    *("the choice is", "choice is", "the correct choice is", "correct choice is"),
    *("i choose", "i select", "i pick", "my answer is", "my choice is"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def lmms_eval(text: str, options: Options) -> str:
    """lmms-eval's general extractor: ranks every letter by its form, then by its position (later is better)."""
    if not text.strip():
        return ""
    choices = list(options) or letters(8)
    stripped = strip_each(text.strip(), ",.!?;:'\"")
    padded = f" {stripped} "
    candidates = [
        (rank, padded.rfind(form.format(letter)), letter)
        for form, rank in (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
        for letter in choices
        if form.format(letter) in padded
    ]
    candidates += _after_phrases(padded, choices)
    bare = padded.strip()
    for letter in choices:
        if bare.startswith(letter) and not bare[1:2].isalpha():
            candidates.append((10, 0, letter))
        if bare.endswith(letter) and not bare[-2:-1].isalpha():
            candidates.append((9, len(padded) - 1, letter))
    if not candidates:
        candidates = [(0, padded.rfind(letter), letter) for letter in choices if letter in padded]
    if not candidates:
        return ""
    return max(candidates, key=lambda item: item[:2])[2]


def _after_phrases(text: str, choices: Sequence[str]) -> list[tuple[int, int, str]]:
    lowered = text.lower()
    candidates = []
    for phrase in _PHRASES:
        start = lowered.find(phrase)
        if start == -1:
            continue
        for letter in choices:
            position = text.find(letter, start + len(phrase))
            if position != -1:
                candidates.append((7, position, letter))
    return candidates


def first_character(text: str) -> str:
    """lmms-eval for SEED-Bench: the first character of the stripped text, in any case."""
    return text.strip()[:1]


_LEADING = re.compile(r"[(\s]*([A-Z])[).\s]*", re.I)


def first_letter_lmms_eval(text: str) -> str:
    """lmms-eval for BLINK and CV-Bench: the first letter of the answer, so `The answer is A` reads as T."""
    match = _LEADING.match(text.strip())
    return match[1].upper() if match else ""
