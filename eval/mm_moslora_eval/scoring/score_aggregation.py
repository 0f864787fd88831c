"""How sample scores add up to a benchmark's number, and several answers to one question to its score.

Each aggregation gives the ratios of its score, from which `measured_scores` gets value, error and interval alike.
Several answers (avg@n, pass@k, maj@n) become one sample: a question counts once, and its answers are one cluster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Literal

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.scoring.estimates import mean_of
from mm_moslora_eval.scoring.named_parts import NamedParts, name_of, options_of
from mm_moslora_eval.scoring.parts import parts_named
from mm_moslora_eval.scoring.parts.grouped_scores import ROTATION
from mm_moslora_eval.scoring.rule_forms import AggregationFacts
from mm_moslora_eval.scoring.scored_sample import Samples, Scored, Summed
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.task_rules import rule


def mean(samples: Samples) -> Summed:
    """Mean score."""
    return Summed(ratios=[mean_of([sample.score for sample in samples])])


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


_OWN: dict[str, Callable[..., Summed]] = {"mean": mean}
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


Combining = Callable[..., Scored]


def mean_answer(answers: Sequence[Scored]) -> Scored:
    """The mean score of the answers (avg@n)."""
    return replace(answers[0], score=math.fsum(one.score for one in answers) / len(answers))


def pass_at(answers: Sequence[Scored], *, k: int, right_from: float | None = None) -> Scored:
    """The chance that one of `k` answers is right, without bias from all n answers (Chen et al. 2021)."""
    graded = [one.score for one in answers if one.score not in (0.0, 1.0)]
    if graded and right_from is None:
        raise ValueError(f"pass_at asks what is right, and the metric gave {graded[0]:.4g}; set its right_from")
    count, right = len(answers), sum(one.score >= (1.0 if right_from is None else right_from) for one in answers)
    return replace(answers[0], score=1 - math.comb(count - right, k) / math.comb(count, k))


def majority(answers: Sequence[Scored], *, ties: Literal["first", "share"] = "first") -> Scored:
    """The score of the most frequent extracted answer (maj@n); answers that cannot be read do not vote.

    Of equally frequent ones the one that was given first counts, or with `ties: share` their mean.
    """
    votes: dict[str, list[Scored]] = {}
    for one in answers:
        if vote := one.parsed.strip():
            votes.setdefault(vote, []).append(one)
    if not votes:
        return replace(answers[0], score=0.0, parsed="")
    most = max(map(len, votes.values()))
    winners = [given[0] for given in votes.values() if len(given) == most]
    score = math.fsum(one.score for one in winners) / len(winners) if ties == "share" else winners[0].score
    return replace(winners[0], score=score)


OVER_SAMPLES: NamedParts[Combining] = NamedParts(
    "over_samples", {"mean": mean_answer, "pass_at": pass_at, "majority": majority}
)
"""Name -> function that makes one sample of several answers to a question."""


def check_repeated(over_samples: str, aggregation: str, *, samples: int) -> None:
    """Refuse what cannot be summed up."""
    k = options_of(over_samples).get("k", 1)
    if not 1 <= k <= samples:
        raise EvalError(f"over_samples is {over_samples}, expected k from 1 to the {samples} of decoding.samples.")
    if samples > 1 and name_of(over_samples) != "majority" and facts_of(aggregation).one_answer:
        raise EvalError(
            f"over_samples is {over_samples}, but the aggregation {name_of(aggregation)} needs one answer to each "
            "question. Set over_samples: majority, or another aggregation."
        )


def combined(answers: Sequence[Scored], *, over_samples: str) -> Scored:
    """One sample of the answers to one question.

    A missing answer makes the sample a failed one, and one without a score makes it one without a score, until they are
    there: a mean over fewer answers is another measure. Rules that fail on them are its fault. The sample can be read
    if one of the answers can.
    """
    if len(answers) == 1 and over_samples == "mean":
        return answers[0]
    for odd in (lambda one: one.failed, lambda one: bool(one.fault), lambda one: math.isnan(one.score)):
        if found := next(filter(odd, answers), None):
            return found
    try:
        found = OVER_SAMPLES[over_samples](answers)
        if not isinstance(found, Scored) or not 0 <= found.score <= 1:
            raise ValueError(f"it gave {found!r}, expected a sample with a score from 0 to 1")
    except Exception as error:  # of rules of any package: the other questions are scored all the same
        return replace(answers[0], score=math.nan, fault=f"over_samples: {type(error).__name__}: {error}")
    if found.parsed.strip():
        return found
    shown = next((one for one in answers if one.parsed.strip()), found)
    return replace(found, text=shown.text, parsed=shown.parsed)
