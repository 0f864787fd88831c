"""Exact match, and the lenient score: 1.0 or 0.0."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from mm_moslora_eval.metrics.multiple_choice import extract_letter
from mm_moslora_eval.metrics.vqa_accuracy import plain_words, punctuation_vlmevalkit

_WITHOUT_SPACES = re.compile(
    r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Signs of scripts without spaces between words: Thai, Lao, Tibetan, Burmese, Khmer, kana and Chinese characters."""


def exact_match(text: str, reference: str) -> float:
    """The default: ignores case, surrounding space, repeated inner space and closing periods."""
    return float(relaxed(text) == relaxed(reference))


def relaxed(text: str) -> str:
    """The form in which `exact_match` compares answers."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def best(metric: Callable[[str, str], float], text: str, references: Sequence[str]) -> float:
    """The best score over the references."""
    return max(metric(text, reference) for reference in references)


def extract_yes_no(text: str) -> str:
    """The default, and VLMEvalKit's: the word `yes` or the word `no`, but not both."""
    words = punctuation_vlmevalkit(text.lower()).split()
    yes, no = "yes" in words, "no" in words
    return "" if yes == no else "yes" if yes else "no"


def holds_answer(text: str, references: Sequence[str], options: Mapping[str, str]) -> float:
    """The lenient score: 1.0 if a longer answer contains the reference.

    Case, punctuation, articles and the spelling of small numbers are ignored. For a multiple-choice question exactly
    one option must be named, by its letter or its text; of options that contain each other the longest counts. For an
    English yes/no question one of the two words must occur and not the other. Grammar is ignored: a plural is another
    word, and "not a cat" contains "cat". A reference in a script without spaces between words, such as Chinese,
    Japanese or Thai, matches anywhere, also within a longer word and after a negation.
    """
    if options:
        matching = [letter for letter, option in options.items() if _holds(text, option)]
        texts = [
            letter for letter in matching if not any(_longer(options[other], options[letter]) for other in matching)
        ]  # fmt: skip
        named = extract_letter(text, options) or (texts[0] if len(texts) == 1 else "")
        return float(named in references)
    return float(any(_answers(text, reference) for reference in references))


def _answers(text: str, reference: str) -> bool:
    plain = relaxed(reference)
    return extract_yes_no(text) == plain if plain in ("yes", "no") else _holds(text, reference)


def _holds(text: str, reference: str) -> bool:
    wanted, answer = plain_words(reference), plain_words(text)
    if _WITHOUT_SPACES.search(wanted):
        return wanted in answer
    return bool(wanted) and f" {wanted} " in f" {answer} "


def _longer(option: str, part: str) -> bool:
    return plain_words(option) != plain_words(part) and _holds(option, part)
