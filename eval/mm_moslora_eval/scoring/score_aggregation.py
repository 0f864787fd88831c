"""How sample scores add up to a benchmark's number: means, and the field's corpus metrics.

Each aggregation gives the ratios of its score, from which `measured_scores` gets value, error and interval alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.metrics import caption, ptb_tokeniser
from mm_moslora_eval.scoring import error_bars
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.named_parts import NamedParts, name_of, options_of
from mm_moslora_eval.scoring.parts import parts_named
from mm_moslora_eval.scoring.parts.grouped_scores import all_right
from mm_moslora_eval.scoring.rule_forms import AggregationFacts
from mm_moslora_eval.scoring.scored_sample import Samples, Scored, Summed
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.task_rules import rule


def mean(samples: Samples) -> Summed:
    """Mean score."""
    return Summed(ratios=[mean_of([sample.score for sample in samples])])


ROTATION = 1_000_000
"""Difference between the ids of consecutive rotations of one question, as MMBench numbers them."""


def circular(samples: Samples) -> Summed:
    """MMBench: a question counts if all rotations of its options are answered correctly."""
    questions = [int(sample.document.id) % ROTATION for sample in samples]
    hits = all_right(questions, [sample.score == 1.0 for sample in samples])
    vanilla = error_bars.mean([sample.score for sample in samples])
    metrics = {"questions": float(len(set(questions))), "vanilla": vanilla}
    return Summed(ratios=[hits], metrics=metrics, units=[str(one) for one in questions])


def check_ids(aggregation: str, documents: Sequence[Document]) -> None:
    """Refuse documents that an aggregation could not group after their answers."""
    if options_of(aggregation) and not AGGREGATIONS.origin(aggregation):
        _summed(aggregation, [Scored(document=one, text="", parsed="", score=0.0) for one in documents])
    odd = [document.id for document in documents if not document.id.isdecimal()] if aggregation == "circular" else []
    if odd:
        raise EvalError(
            f"{len(odd)} of {len(documents)} ids are no integers (first: {odd[0]!r}). `aggregation: circular` reads "
            f"the question from the id: rotation k of question n is n + k x {ROTATION:,}. Number the documents "
            "so, or choose another aggregation."
        )


def together(aggregation: str, samples: Samples) -> list[Hashable]:
    """Equal for samples that an aggregation counts together, such as the rotations of a question."""
    own: list[Hashable] = [sample.document.id for sample in samples]
    if not samples or facts_of(aggregation).reads_answers:
        return own
    found = _summed(aggregation, samples)
    return list(found.together or found.units or own)


def documents_together(aggregation: str, documents: Sequence[Document]) -> list[Hashable]:
    """The same of documents; each is alone to an aggregation of others that needs answers."""
    samples = [Scored(document=one, text="", parsed="", score=0.0, cluster=one.id) for one in documents]
    try:
        return together(aggregation, samples)
    except EvalError:
        if not AGGREGATIONS.origin(aggregation):
            raise
        return [one.id for one in documents]


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


_OWN: dict[str, Callable[..., Summed]] = {
    "mean": mean,
    "circular": circular,
    "caption": caption_scores,
    "caption_plain": caption_scores_plain,
}
AGGREGATIONS: NamedParts[Callable[[Samples], Summed]] = NamedParts(
    "aggregation", _OWN | parts_named("AGGREGATIONS"), table="AGGREGATIONS"
)
"""Name -> function that sums up scored samples."""


class AggregationError(EvalError):
    """An aggregation failed on the samples that it was given."""


class NoScoreError(AggregationError):
    """None of the samples has a part that the score sums up."""


def summed(aggregation: str, samples: Samples) -> Summed:
    """The samples as a task sums them up."""
    found = _summed(aggregation, samples)
    if samples and not found.ratios:
        raise NoScoreError(f"The score of {name_of(aggregation)!r} has no part in any of {len(samples)} samples.")
    return found


def _summed(aggregation: str, samples: Samples) -> Summed:
    function = AGGREGATIONS[aggregation]
    if not AGGREGATIONS.origin(aggregation):
        return function(samples)
    try:
        found = function(samples)
        if not isinstance(found, Summed):
            raise TypeError(f"it gave {found!r}, expected Summed")
    except Exception as error:  # whatever a function of others raises
        raise AggregationError(
            f"The aggregation {name_of(aggregation)!r} failed on {len(samples)} samples: {type(error).__name__}: "
            f"{error}. Mend it, then score again (mm-moslora eval score)."
        ) from error
    return found


_FACTS = {
    **dict.fromkeys(
        ("caption", "caption_plain"),
        AggregationFacts(reads_answers=True, one_answer=True, captions=True, beyond_1=True, score="CIDEr"),
    ),
    **dict.fromkeys(("circular", "all_within"), AggregationFacts(one_answer=True)),
}


def facts_of(aggregation: str) -> AggregationFacts:
    """What is known of an aggregation besides its numbers."""
    name = name_of(aggregation)
    found: AggregationFacts | None = _FACTS.get(name) or (None if name in _OWN else rule("FACTS", name))
    return found or AggregationFacts()
