"""The difference of two systems in a task's score, and in the log-likelihood of its references."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mm_moslora.reporting.verdicts import Difference
from mm_moslora_eval.scoring.estimates import ScoreEstimate, estimate, minus, sign_test, value_of
from mm_moslora_eval.scoring.measured_scores import clusters_of, mean_nats, units_of, whole_questions
from mm_moslora_eval.scoring.score_aggregation import facts_of, summed
from mm_moslora_eval.scoring.scored_sample import Samples


@dataclass(frozen=True, kw_only=True)
class ScoreDifference:
    """A - B in a task's score on the same documents."""

    a: float
    b: float
    estimate: ScoreEstimate
    """Estimate of A - B."""
    unit: str
    """Name of the score; empty for a share of right answers."""
    seeds_a: tuple[float, ...]
    """The score of each run of A."""
    seeds_b: tuple[float, ...]
    questions: int
    """Number of questions with a score of their own: the documents, or the groups of them that count together."""
    wins: int
    """Questions with a higher score of A."""
    changed: tuple[str, ...]
    """Ids of the questions with different scores."""

    @property
    def losses(self) -> int:
        """Questions with a higher score of B."""
        return len(self.changed) - self.wins

    @property
    def ties(self) -> int:
        """Questions with the same score."""
        return self.questions - len(self.changed)

    @property
    def sign_p(self) -> float:
        """Exact sign test on the questions that differ."""
        return sign_test(self.wins, self.losses)

    @property
    def as_difference(self) -> Difference:
        """The difference in the form for verdicts."""
        return self.estimate.as_difference(self.unit)


def difference_of_scores(aggregation: str, a: Sequence[Samples], b: Sequence[Samples]) -> ScoreDifference:
    """Compare two systems in the task's score on the documents for which all runs have one."""
    without = {sample.document.id for samples in (*a, *b) for sample in samples if math.isnan(sample.score)}
    marked = [replace(one, score=math.nan) if one.document.id in without else one for one in a[0]]
    first = whole_questions(aggregation, marked)
    by_id = [[{sample.document.id: sample for sample in samples} for samples in side] for side in (a, b)]
    runs = [[[run[sample.document.id] for sample in first] for run in side] for side in by_id]
    totals = [[summed(aggregation, samples) for samples in side] for side in runs]
    sums = [[one.ratios for one in side] for side in totals]
    left, right = ([ratio * (1 / len(side)) for ratios in side for ratio in ratios] for side in sums)
    scores = [[_by_question(aggregation, samples) for samples in side] for side in runs]
    x, y = ({name: fmean(run[name] for run in side) for name in side[0]} for side in scores)
    return ScoreDifference(
        a=value_of(left), b=value_of(right), estimate=estimate(minus(left, right), clusters_of(first, totals[0][0])),
        unit=facts_of(aggregation).score, seeds_a=tuple(map(value_of, sums[0])),
        seeds_b=tuple(map(value_of, sums[1])), questions=len(x),
        wins=sum(x[name] > y[name] for name in x), changed=tuple(name for name in x if x[name] != y[name]),
    )  # fmt: skip


def _by_question(aggregation: str, samples: Samples) -> dict[str, float]:
    """The score of every question by itself: of captions CIDEr, of samples that count together the worst."""
    if facts_of(aggregation).captions:
        (ratio,) = summed(aggregation, samples).ratios
        return dict(zip((sample.document.id for sample in samples), ratio.top, strict=True))
    scores: dict[str, float] = {}
    for sample, name in zip(samples, units_of(aggregation, samples), strict=True):
        scores[name] = min(sample.score, scores.get(name, sample.score))
    return scores


@dataclass(frozen=True, kw_only=True)
class LikelihoodDifference:
    """A - B in nats on the documents that have a log-likelihood in every run."""

    a: float
    b: float
    estimate: ScoreEstimate
    """Estimate of A - B."""
    left_out: int
    """Documents that lack one in some run."""

    @property
    def text(self) -> str:
        """The difference as a sentence."""
        pair = self.estimate
        rest = f"; {self.left_out} documents without one are left out" if self.left_out else ""
        if pair.n > 1 and pair.stderr == 0:
            difference = f"A - B {pair.value:+.4f} on every document"
        else:
            bounds = (
                f" (95 % {pair.low:+.4f} to {pair.high:+.4f}, p {pair.p_value:.3g})" if pair.low == pair.low else ""
            )
            difference = f"A {self.a:.4f}, B {self.b:.4f}, A - B {pair.value:+.4f}{bounds}"
        return f"Log-likelihood of the reference, nats: {difference}{rest}."


def likelihood_difference(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], clusters: Sequence[Hashable]
) -> LikelihoodDifference | None:
    """Compare two systems; None if no document has a log-likelihood in all runs."""
    columns = [(*column, cluster) for *column, cluster in zip(*a, *b, clusters, strict=True)]
    complete = [column for column in columns if all(math.isfinite(value) for value in column[:-1])]
    if not complete:
        return None
    left = [mean_nats([fmean(column[: len(a)]) for column in complete])]
    right = [mean_nats([fmean(column[len(a) : -1]) for column in complete])]
    return LikelihoodDifference(
        a=value_of(left), b=value_of(right), left_out=len(columns) - len(complete),
        estimate=estimate(minus(left, right), [column[-1] for column in complete]),
    )  # fmt: skip
