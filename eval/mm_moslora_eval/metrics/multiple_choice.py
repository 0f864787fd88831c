"""Extracts the option letter from an answer, by the rules of each harness and of each benchmark's script.

Extractors take the answer and the options (letter -> text). They return a letter, `Z` for a refusal (VLMEvalKit only)
or an empty string when no letter can be inferred. They never guess. `extract_letter` is the default.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence

from mm_moslora_eval.metrics.metric_text import letters, strip_each

Options = Mapping[str, str]

_API_FAILURE = "Failed to obtain answer via API"
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
    return letter or _option_text(text, options)


def vlmevalkit_2024_06(text: str, options: Options) -> str:
    """VLMEvalKit in June 2024 (MoSLoRA paper): one letter anywhere, else one option's text."""
    return _option_token(text, options, last=None) or _option_text(text, options)


def _option_token(text: str, options: Options, *, last: int | None) -> str | None:
    """A letter, `Z`, an empty string after an API failure, or None when the tokens decide nothing."""
    if _API_FAILURE in text:
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


def _option_text(text: str, options: Options) -> str:
    lowered = text.lower()
    matching = [letter for letter, value in options.items() if str(value).lower() in lowered]
    return matching[0] if len(matching) == 1 else ""


_AFFIXED = ["X.", "X,", "X:", "X)", "X).", "(X)", "(X).", ":X", ":X,", ":X.", ":X)", ":X)."]
"""Forms of a letter with signs around it, in the order in which they are tried."""


def lmms_eval_mmbench(text: str, options: Options) -> str:
    """lmms-eval's static MMBench evaluator, in two stages.

    The first stage finds a token that is a letter, bare or with one of twelve affixes, else the text of one option. If
    it finds nothing, the second stage is lmms-eval's general extractor.
    """
    four = {key: options[key] for key in options if key in "ABCD"}
    return _affixed_letter(text) or _option_text(text, four) or lmms_eval(text, four)


def _affixed_letter(text: str) -> str:
    if _API_FAILURE in text:
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


_LEADING_LETTER = re.compile(r"^\s*([A-Z])\.")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def ai2d_filter(text: str) -> str:
    """lmms-eval's AI2D filter: the capital before a period at the start, else the unchanged text."""
    match = _LEADING_LETTER.match(text)
    return match.group(1) if match else text


def ai2d_lmms_eval(text: str, reference: str) -> float:
    """lmms-eval's AI2D score: the filtered answer equals the letter without case and punctuation."""
    return float(ai2d_filter(text).lower().translate(_NO_PUNCTUATION) == reference.lower().translate(_NO_PUNCTUATION))


def seedbench_lmms_eval(text: str) -> str:
    """lmms-eval's SEED-Bench answer: the first character of the stripped text, in any case."""
    return text.strip()[:1]
