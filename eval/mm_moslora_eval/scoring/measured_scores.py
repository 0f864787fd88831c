"""The score of a task and of its categories, and the difference of two systems, from scored samples.

Every score, interval, p-value and power of the evaluation comes from here (of arms with several seeds, from
`mm_moslora.compare`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from mm_moslora.reporting.verdicts import Difference
from mm_moslora_eval.scoring.estimates import (
    LEVEL,
    ScoreEstimate,
    contributions,
    estimate,
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
