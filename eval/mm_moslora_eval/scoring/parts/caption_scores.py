"""Captions of a whole set: CIDEr-D with BLEU and ROUGE-L."""

from __future__ import annotations

import functools
from collections.abc import Callable

from mm_moslora_eval.metrics import caption, ptb_tokeniser
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.scored_sample import Samples, Summed


def caption_scores(samples: Samples) -> Summed:
    """COCO captions: CIDEr-D of the set, with BLEU-1 to 4 and ROUGE-L.

    CIDEr-D weighs words by the whole set, so the error, which comes from the per-image values, is an approximation.
    """
    return _captions(samples, ptb_tokeniser.tokenize)


def caption_scores_plain(samples: Samples) -> Summed:
    """The same on unchanged text: VLMEvalKit's number divided by 100. ROUGE-L splits at single spaces, as there."""
    return _captions(samples, str)


_MOST_CIDER = 10.0


def _captions(samples: Samples, tokenize: Callable[[str], str]) -> Summed:
    report = _caption_report(
        tuple(sample.parsed for sample in samples), tuple(sample.document.answers for sample in samples), tokenize
    )
    numbers = {"cider": report.cider, "rouge_l": report.rouge_l}
    numbers |= {f"bleu_{order}": value for order, value in enumerate(report.bleu, start=1)}
    return Summed(ratios=[mean_of(report.cider_per_image, high=_MOST_CIDER)], metrics=numbers)


@functools.lru_cache(maxsize=8)
def _caption_report(
    captions: tuple[str, ...], references: tuple[tuple[str, ...], ...], tokenize: Callable[[str], str]
) -> caption.CaptionReport:
    """Kept, since a set is scored once for its result and once for each difference."""
    people = [[tokenize(answer) for answer in answers] for answers in references]
    return caption.caption_report([tokenize(text) for text in captions], people)


AGGREGATIONS: dict[str, Callable[..., Summed]] = {"caption": caption_scores, "caption_plain": caption_scores_plain}
