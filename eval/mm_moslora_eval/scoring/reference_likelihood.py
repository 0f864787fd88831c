"""The log-likelihood of the reference answer, in nats: a continuous measure beside the right-or-wrong score.

It is the sum of log-probabilities over the tokens of the reference as the answer, without the end of turn, by teacher
forcing. Of several references it is that of the most frequent one (`Document.reference`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mm_moslora_eval.scoring.estimates import Ratio, ScoreEstimate, estimate, mean_of, minus, value_of

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
