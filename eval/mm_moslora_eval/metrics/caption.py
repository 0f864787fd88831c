"""Caption scores of a whole set: BLEU, ROUGE-L and CIDEr-D, with a PTB-like tokeniser that needs no Java.

Definitions: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015; constants as in the COCO caption evaluation.
CIDEr-D weighs n-grams by their document frequency in the set, so values of different sets are not comparable.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mm_moslora_eval.metrics.metric_text import bit_places

_ORDERS = 4
_SMALL, _TINY = 1e-9, 1e-15  # the COCO evaluation's guards against division by zero
_ROUGE_BETA = 1.2
_CIDER_SIGMA = 6.0

Counts = Counter[tuple[str, ...]]


def ngrams(text: str) -> Counts:
    """Counts of all n-grams of one to four words."""
    words = text.split()
    return Counter(
        tuple(words[start : start + order])
        for order in range(1, _ORDERS + 1)
        for start in range(len(words) - order + 1)
    )


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Corpus BLEU-1 to BLEU-4 with the closest reference length, of tokenised captions (words between spaces)."""
    guessed, correct = [0] * _ORDERS, [0] * _ORDERS
    length = reference_length = 0
    for caption, people in zip(captions, references, strict=True):
        words = len(caption.split())
        length += words
        reference_length += min((abs(len(item.split()) - words), len(item.split())) for item in people)[1]
        limit: Counts = Counter()
        for item in people:
            limit |= ngrams(item)
        counts = ngrams(caption)
        for gram, count in counts.items():
            correct[len(gram) - 1] += min(count, limit[gram])
        for order in range(_ORDERS):
            guessed[order] += max(0, words - order)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for order in range(_ORDERS):
        product *= (correct[order] + _TINY) / (guessed[order] + _SMALL)
        scores.append(product ** (1 / (order + 1)) * penalty)
    return scores


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest one; a row of the table is the bits of an integer (Crochemore et al. 2001)."""
    places, whole = bit_places(second, set(first)), (1 << len(second)) - 1
    row = whole
    for item in first:
        equal = row & places[item]
        row = (row + equal | row - equal) & whole
    return len(second) - row.bit_count()


def rouge_l(caption: str, references: Sequence[str]) -> float:
    """ROUGE-L of one caption: best precision and best recall over the references, combined with beta 1.2."""
    words = caption.split(" ")
    people = [item.split(" ") for item in references]
    common = [_common_subsequence(item, words) for item in people]
    precision = max(value / len(words) for value in common)
    recall = max(value / len(item) for value, item in zip(common, people, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


@dataclass(frozen=True)
class _Weighted:
    weights: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D (0 to 10) of each tokenised caption; the corpus score is their mean."""
    counted = [[ngrams(item) for item in people] for people in references]
    images = Counter(gram for people in counted for gram in set().union(*people))
    log_images = math.log(len(counted)) if counted else 0.0

    def weigh(counts: Counts) -> _Weighted:
        weights = {gram: count * (log_images - math.log(max(1, images[gram]))) for gram, count in counts.items()}
        norms = [0.0] * _ORDERS
        for gram, weight in weights.items():
            norms[len(gram) - 1] += weight**2
        bigrams = sum(count for gram, count in counts.items() if len(gram) == 2)
        return _Weighted(weights, [math.sqrt(norm) for norm in norms], bigrams)

    scores = []
    for caption, people in zip(captions, counted, strict=True):
        candidate = weigh(ngrams(caption))
        total = sum(_cider_similarity(candidate, weigh(item)) for item in people)
        scores.append(total / len(people) * 10)
    return scores


def _cider_similarity(candidate: _Weighted, reference: _Weighted) -> float:
    """Mean over n of the clipped cosine, with a Gaussian penalty on the difference in length (in bigrams)."""
    products = [0.0] * _ORDERS
    for gram, weight in candidate.weights.items():
        other = reference.weights.get(gram, 0.0)
        products[len(gram) - 1] += min(weight, other) * other
    delta = candidate.bigrams - reference.bigrams
    penalty = math.exp(-(delta**2) / (2 * _CIDER_SIGMA**2))
    total = 0.0
    for product, left, right in zip(products, candidate.norms, reference.norms, strict=True):
        total += product / (left * right) * penalty if left and right else product * penalty
    return total / _ORDERS


@dataclass(frozen=True, kw_only=True)
class CaptionReport:
    """The scores of a set of captions."""

    bleu: list[float]
    rouge_l: float
    cider: float
    cider_per_image: list[float]


def caption_report(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionReport:
    """BLEU, ROUGE-L and CIDEr-D of tokenised captions; see `ptb_tokeniser.tokenize`."""
    per_image = cider(captions, references)
    rouge = [rouge_l(caption, people) for caption, people in zip(captions, references, strict=True)]
    return CaptionReport(
        bleu=bleu(captions, references),
        rouge_l=sum(rouge) / len(rouge),
        cider=sum(per_image) / len(per_image),
        cider_per_image=per_image,
    )
