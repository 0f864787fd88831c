"""The score of a task and of its categories, and the difference of two systems, from scored samples.

Every score, interval, p-value and power of the evaluation comes from here (of arms with several seeds, from
`mm_moslora.compare`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from mm_moslora.reporting.verdicts import Difference
from mm_moslora_eval.scoring.estimates import (
    LEVEL,
    Ratio,
    ScoreEstimate,
    contributions,
    estimate,
    mean_of,
    minus,
    sign_test,
    t_quantile,
    value_of,
)
from mm_moslora_eval.scoring.score_aggregation import NoScoreError, facts_of, summed, together
from mm_moslora_eval.scoring.scored_sample import Samples, Summed, connected, splits_of


def aggregate(aggregation: str, samples: Samples) -> ScoreEstimate:
    """The score of a set of samples, see `whole_questions`, with the further numbers of the aggregation."""
    samples = whole_questions(aggregation, samples)
    total = summed(aggregation, samples)
    return replace(estimate(total.ratios, _clusters(samples, total)), metrics=total.metrics)


def whole_questions(aggregation: str, samples: Samples) -> Samples:
    """The samples with a score, without those that count together with one that has none."""
    without = [math.isnan(sample.score) for sample in samples]
    if not any(without):
        return samples
    rated = [replace(sample, score=0.0) if gone else sample for sample, gone in zip(samples, without, strict=True)]
    groups = together(aggregation, rated)
    incomplete = {group for group, gone in zip(groups, without, strict=True) if gone}
    return [sample for sample, group in zip(samples, groups, strict=True) if group not in incomplete]


def _clusters(samples: Samples, total: Summed) -> list[Hashable]:
    """The cluster of every sample: its pictures, with those of all samples that are right or wrong together."""
    clusters: list[Hashable] = [i if sample.cluster is None else sample.cluster for i, sample in enumerate(samples)]
    if total.units is None:
        return clusters
    return connected(clusters, total.units)


def by_category(aggregation: str, samples: Samples) -> dict[str, ScoreEstimate]:
    """The task's score of each category and second-level category; for MME the sum of the sub-task.

    Captions are weighed by the words of the whole set. Answers that are right together are so over all categories.
    A category without a part of the score, such as pages of another language, has none.
    """
    samples = whole_questions(aggregation, samples)
    members_of: dict[str, list[int]] = defaultdict(list)
    facts = facts_of(aggregation)
    for index, sample in enumerate(samples):
        document = sample.document
        own = splits_of(sample) if facts.by_split else [document.category]
        for name in {*own, document.extra.get("l2-category")} - {None, ""}:
            members_of[str(name)].append(index)
    whole = summed(aggregation, samples) if samples else Summed(ratios=[])
    divided = facts.captions or (whole.units is not None and len(whole.ratios) == 1)
    measured = {}
    for name, indices in sorted(members_of.items()):
        members = [samples[index] for index in indices]
        if facts.by_split:  # a sample of this split alone
            members = [replace(one, document=replace(one.document, category=name)) for one in members]
        ratios = [
            replace(ratio, top=[ratio.top[i] for i in indices], bottom=[ratio.bottom[i] for i in indices])
            for ratio in (whole.ratios if divided else ())
        ]
        units = None if whole.units is None else [whole.units[i] for i in indices]
        try:
            total = Summed(ratios=ratios, units=units) if divided else summed(aggregation, members)
        except NoScoreError:
            continue
        measured[name] = estimate(total.ratios, _clusters(members, total))
    return measured


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
        a=value_of(left), b=value_of(right), estimate=estimate(minus(left, right), _clusters(first, totals[0][0])),
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


def units_of(aggregation: str, samples: Samples) -> list[str]:
    """The question of every sample: its own id, or the name that it shares with those that count together with it."""
    return list(summed(aggregation, samples).units or [sample.document.id for sample in samples])


def smallest_shown(questions: int) -> float:
    """The difference that so many independent questions show, between systems that differ on half of them."""
    return t_quantile(LEVEL, questions - 1) * math.sqrt(0.5 / questions) if questions > 1 else math.nan


def score_by_sample(aggregation: str, samples: Samples) -> list[float]:
    """A value for each sample, such that the mean of the values is the task's score.

    For a mean these are the samples' own scores, for captions the CIDEr-D of each.
    """
    ratios = summed(aggregation, samples).ratios
    return [float(value) for value in contributions(ratios)] if ratios else [0.0] * len(samples)


LARGEST = 1e9
"""Largest score or log-likelihood: sums of squares of such numbers are finite."""
_NO_REFERENCES = "the task has no references"
_JUDGED = "a judge compares the answers with the references"
_NOT_GIVEN = "the backend gives no log-likelihoods of given texts"
_NO_END = "the model is asked to think, and the reference is scored behind its thinking, which no answer ends"


def nats_of(row: Mapping[str, Any]) -> float:
    """The log-likelihood of a stored answer or sample; NaN without one, or with one that no model computes."""
    value = (row.get("reference") or {}).get("logprob")
    return value if isinstance(value, int | float) and abs(value) < LARGEST else math.nan


def mean_likelihood(rows: Sequence[Mapping[str, Any]], clusters: Sequence[Hashable]) -> dict[str, float]:
    """Means over the stored answers' `reference`; empty if no answer has a log-likelihood.

    Returns:
        `nats`, the mean of the sums over a reference's tokens (0 or less), with `stderr`, `low` and `high` (95 %,
        clustered by picture); `n`, the answers that have one, and `missing`, those that failed or have none that is
        finite; `per_token`, the mean of the log-likelihoods by token, with `per_token_stderr`.
    """
    with_nats = [(nats_of(row), row, cluster) for row, cluster in zip(rows, clusters, strict=True)]
    with_nats = [item for item in with_nats if not math.isnan(item[0])]
    if not with_nats:
        return {}
    values, by = [value for value, _, _ in with_nats], [cluster for _, _, cluster in with_nats]
    spread = [
        (value / n, cluster)
        for value, row, cluster in with_nats
        if isinstance(n := row["reference"].get("tokens"), int) and n > 0
    ]
    nats = estimate([_mean(values)], by)
    tokens = estimate([_mean([value for value, _ in spread])], [cluster for _, cluster in spread]) if spread else None
    return {
        "n": nats.n, "missing": len(rows) - nats.n, "nats": nats.value, "stderr": nats.stderr, "low": nats.low,
        "high": nats.high, "per_token": tokens.value if tokens else math.nan,
        "per_token_stderr": tokens.stderr if tokens else math.nan,
    }  # fmt: skip


def _mean(nats: Sequence[float]) -> Ratio:
    return mean_of(nats, low=-math.inf, high=0.0)


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
    left = [_mean([fmean(column[: len(a)]) for column in complete])]
    right = [_mean([fmean(column[len(a) : -1]) for column in complete])]
    return LikelihoodDifference(
        a=value_of(left), b=value_of(right), left_out=len(columns) - len(complete),
        estimate=estimate(minus(left, right), [column[-1] for column in complete]),
    )  # fmt: skip


def reason_without(*, referenced: bool, judged: bool, thinks: bool) -> str:
    """Why no answer of a task has a log-likelihood."""
    if not referenced:
        return _NO_REFERENCES
    if judged:
        return _JUDGED
    if thinks:
        return _NO_END
    return _NOT_GIVEN
