"""Several answers to one question: their mean (avg@n), pass@k, and the majority's vote (maj@n).

The answers become one sample, so that a question counts once, and its answers are one cluster of the error bars.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.scoring.named_parts import NamedParts, name_of, options_of
from mm_moslora_eval.scoring.score_aggregation import facts_of
from mm_moslora_eval.scoring.scored_sample import Scored

Combining = Callable[..., Scored]


def mean(answers: Sequence[Scored]) -> Scored:
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
    "over_samples", {"mean": mean, "pass_at": pass_at, "majority": majority}
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
