"""The score of a task and of its categories, from scored samples, and the log-likelihood of its references.

Every score and interval of the evaluation comes from here, and every difference from `score_differences` (of arms with
several seeds, from `mm_moslora.compare`). The log-likelihood of a reference is in nats, a continuous measure beside the
right-or-wrong score: the sum of log-probabilities over its tokens as the answer, without the end of turn, by teacher
forcing; of several references that of the most frequent one (`Document.reference`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mm_moslora_eval.scoring.estimates import (
    LEVEL,
    Ratio,
    ScoreEstimate,
    contributions,
    estimate,
    mean_of,
    minus,
    t_quantile,
)
from mm_moslora_eval.scoring.score_aggregation import NoScoreError, facts_of, summed, together
from mm_moslora_eval.scoring.scored_sample import Samples, Summed, connected, splits_of


def aggregate(aggregation: str, samples: Samples) -> ScoreEstimate:
    """The score of a set of samples, see `whole_questions`, with the further numbers of the aggregation."""
    samples = whole_questions(aggregation, samples)
    total = summed(aggregation, samples)
    return replace(estimate(total.ratios, clusters_of(samples, total)), metrics=total.metrics)


def aggregate_runs(aggregation: str, runs: Sequence[Samples]) -> ScoreEstimate:
    """The mean score of several runs on the same documents, with its error for other pictures, not for other runs."""
    totals = [summed(aggregation, samples) for samples in runs]
    ratios = [ratio * (1 / len(runs)) for total in totals for ratio in total.ratios]
    return estimate(minus(ratios, ()), clusters_of(runs[0], totals[0]))


def whole_questions(aggregation: str, samples: Samples) -> Samples:
    """The samples with a score, without those that count together with one that has none."""
    without = [math.isnan(sample.score) for sample in samples]
    if not any(without):
        return samples
    rated = [replace(sample, score=0.0) if gone else sample for sample, gone in zip(samples, without, strict=True)]
    groups = together(aggregation, rated)
    incomplete = {group for group, gone in zip(groups, without, strict=True) if gone}
    return [sample for sample, group in zip(samples, groups, strict=True) if group not in incomplete]


def clusters_of(samples: Samples, total: Summed) -> list[Hashable]:
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
        measured[name] = estimate(total.ratios, clusters_of(members, total))
    return measured


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

    `nats`: mean of the sums over a reference's tokens, with a 95 % interval clustered by picture; `n`: answers that
    have one, `missing`: those that failed or have none that is finite; `per_token`: the mean by token.
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
    nats = estimate([mean_nats(values)], by)
    tokens = (
        estimate([mean_nats([value for value, _ in spread])], [cluster for _, cluster in spread]) if spread else None
    )
    return {
        "n": nats.n, "missing": len(rows) - nats.n, "nats": nats.value, "stderr": nats.stderr, "low": nats.low,
        "high": nats.high, "per_token": tokens.value if tokens else math.nan,
        "per_token_stderr": tokens.stderr if tokens else math.nan,
    }  # fmt: skip


def mean_nats(nats: Sequence[float]) -> Ratio:
    """The mean of log-likelihoods, which are at most 0."""
    return mean_of(nats, low=-math.inf, high=0.0)


def reason_without(*, referenced: bool, judged: bool, thinks: bool) -> str:
    """Why no answer of a task has a log-likelihood."""
    if not referenced:
        return _NO_REFERENCES
    if judged:
        return _JUDGED
    if thinks:
        return _NO_END
    return _NOT_GIVEN
