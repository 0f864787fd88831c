"""Overlap of two sequences of words: BLEU, METEOR and the F measure of their sets.

Sources: Papineni et al. 2002 (BLEU), Banerjee and Lavie 2005 (METEOR), both without smoothing and with the constants of
nltk, which the evaluation code of the field calls.
"""

from __future__ import annotations

import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise

Words = Sequence[str]
_ORDERS = 4
_RECALL_WEIGHT, _PENALTY_POWER, _PENALTY_WEIGHT = 0.9, 3, 0.5


def bleu(found: Words, wanted: Words) -> float:
    """BLEU of one sentence up to four words; an order without a hit leaves next to nothing."""
    if not set(found) & set(wanted):
        return 0.0
    logs = []
    for order in range(1, _ORDERS + 1):
        said, known = _runs(found, order), _runs(wanted, order)
        hits = (said & known).total()
        logs.append(math.log(hits / said.total() if hits else sys.float_info.min) / _ORDERS)
    brevity = 1.0 if len(found) > len(wanted) else math.exp(1 - len(wanted) / len(found))
    return brevity * math.exp(math.fsum(logs))


def _runs(words: Words, order: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(order)), strict=False))


def f_measure(found: Words, wanted: Words) -> float:
    """Twice the words that both have over the words of each; every word counts once."""
    said, known = set(found), set(wanted)
    shared = len(said & known)
    return 2 * shared / (len(said) + len(known)) if shared else 0.0


def meteor(
    found: Words, wanted: Words, *, stem: Callable[[str], str], synonyms: Callable[[str], Collection[str]]
) -> float:
    """METEOR: words are paired if they are equal, else by their stems, else by synonyms of the stems."""
    pairs = _pairs([word.lower() for word in found], [word.lower() for word in wanted], stem, synonyms)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(found), len(pairs) / len(wanted)
    mean = precision * recall / (_RECALL_WEIGHT * precision + (1 - _RECALL_WEIGHT) * recall)
    chunks = 1 + sum((a + 1, b + 1) != following for (a, b), following in pairwise(pairs))
    return float((1 - _PENALTY_WEIGHT * (chunks / len(pairs)) ** _PENALTY_POWER) * mean)


def _pairs(
    found: Words, wanted: Words, stem: Callable[[str], str], synonyms: Callable[[str], Collection[str]]
) -> list[tuple[int, int]]:
    """The places of paired words. Each stage goes from the last word to the first, and takes the last free place."""
    pairs: list[tuple[int, int]] = []
    left, right = dict(enumerate(found)), dict(enumerate(wanted))
    stages: list[Callable[[str], Collection[str]]] = [lambda word: (word,), lambda word: (word,), synonyms]
    for number, equal in enumerate(stages):
        if number == 1:
            left, right = ({place: stem(word) for place, word in side.items()} for side in (left, right))
        places: dict[str, list[int]] = defaultdict(list)
        for place, word in right.items():
            places[word].append(place)
        for place in sorted(left, reverse=True):
            word = left[place]
            free = [name for name in {word, *equal(word)} if places.get(name)]
            if free:
                taken = places[max(free, key=lambda name: places[name][-1])].pop()
                pairs.append((place, taken))
                del left[place], right[taken]
    return sorted(pairs)
