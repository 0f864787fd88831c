"""VQA soft accuracy and its normalisers.

Ten people answered each question. For each of the ten, the model's answer is compared with the other nine answers and
scores min(1, matches / 3); the result is the mean over the ten. Source: Antol et al. 2015 and the evaluators named
below.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# The evaluators' look-behind has a typo, so a period after a digit is removed too: "3." -> "3".
_PERIOD_EVALAI = re.compile(r"\.(?!\d)")
_PERIOD_VLMEVALKIT = re.compile(r"(?<!\d)\.(?!\d)")
# The evaluators pass a flag as the count, so at most re.UNICODE = 32 periods are removed.
_ANCHOR_PERIODS = 32

_CONTRACTED = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)


# Keyed by the contraction without one of its apostrophes.
CONTRACTIONS = {
    word[:index] + word[index + 1 :]: word
    for word in _CONTRACTED.split()
    for index, mark in enumerate(word)
    if mark == "'"
} | {"somebody'd": "somebodyd"}


def _punctuation(text: str, *, period: re.Pattern[str], periods: int) -> str:
    comma_in_number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or comma_in_number else " ")
    return period.sub("", out, count=periods)


def words(text: str, contractions: dict[str, str] = CONTRACTIONS) -> str:
    """Words without articles, small numbers as digits, contractions with their apostrophes."""
    plain = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in plain if word not in _ARTICLES)


def plain_words(text: str) -> str:
    """Words in lower case, without articles, small numbers as digits; combining marks such as vowel signs are kept."""
    composed = unicodedata.normalize("NFC", text)
    of_words = [sign.isalnum() or sign == "'" or unicodedata.category(sign).startswith("M") for sign in composed]
    return words("".join(sign if of_word else " " for sign, of_word in zip(composed, of_words, strict=True)))


def one_line(text: str) -> str:
    """The text without line feeds and tabs, and without space around it."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _normalize_evalai(text: str, *, periods: int) -> str:
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(_punctuation(one_line(text), period=_PERIOD_EVALAI, periods=periods))


def normalize(text: str) -> str:
    """The default: EvalAI's steps without its limit of 32 periods."""
    return _normalize_evalai(text, periods=0)


def normalize_evalai(text: str) -> str:
    """EvalAI as in LLaVA's m4c evaluator and lmms-eval (TextVQA, VizWiz)."""
    return _normalize_evalai(text, periods=_ANCHOR_PERIODS)


def normalize_official(text: str) -> str:
    """The official VQAv2 evaluator: commas go through the punctuation rule, `'s` is not split."""
    return words(punctuation_official(one_line(text)))


def punctuation_official(text: str) -> str:
    """The punctuation step of the official evaluators alone."""
    return _punctuation(text, period=_PERIOD_EVALAI, periods=_ANCHOR_PERIODS)


def normalize_vlmevalkit(text: str) -> str:
    """VLMEvalKit: a period is removed only if neither neighbour is a digit, so `3.` keeps it."""
    return words(punctuation_vlmevalkit(one_line(text)))


def punctuation_vlmevalkit(text: str) -> str:
    """VLMEvalKit's punctuation step alone; its yes/no extraction uses it too."""
    return _punctuation(text, period=_PERIOD_VLMEVALKIT, periods=_ANCHOR_PERIODS)


def soft_accuracy(text: str, references: Sequence[str]) -> float:
    """The default: `normalize` on both sides.

    With one reference it is exact match. With two or three the divisor is the number of the other references, so that
    agreement with all of them scores 1.
    """
    answer, people = normalize(text), [normalize(reference) for reference in references]
    if len(people) == 1:
        return float(answer == people[0])
    return _leave_one_out(answer, people, enough=min(3, len(people) - 1))


def _leave_one_out(answer: str, people: Sequence[str], *, enough: int = 3) -> float:
    matches = sum(person == answer for person in people)
    scores = [min(1.0, (matches - (person == answer)) / enough) for person in people]
    return sum(scores) / len(scores)


def accuracy(
    text: str, references: Sequence[str], *, answer: Callable[[str], str], reference: Callable[[str], str]
) -> float:
    """Soft accuracy with a normaliser of the answer and one of the references."""
    return _leave_one_out(answer(text), [reference(item) for item in references])


textvqa = partial(accuracy, answer=normalize_evalai, reference=normalize_evalai)
"""LLaVA and lmms-eval for TextVQA: EvalAI normaliser on both sides."""
vlmevalkit = partial(accuracy, answer=normalize_vlmevalkit, reference=normalize_vlmevalkit)
"""VLMEvalKit's `vqa_score`."""
