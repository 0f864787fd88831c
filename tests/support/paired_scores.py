"""The difference of one score of each of two runs on the same samples."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from mm_moslora_eval.scoring.estimates import ScoreEstimate, estimate, mean_of, minus


def paired(a: Sequence[float], b: Sequence[float], *, clusters: Sequence[Hashable] | None = None) -> ScoreEstimate:
    """The mean of A less B, as one run of each is compared.

    Args:
        a: scores of run A.
        b: scores of run B on the same samples in the same order.
        clusters: the cluster (image) of each sample; None: all are independent.
    """
    assert len(a) == len(b)
    return estimate(minus([mean_of(a)], [mean_of(b)]), range(len(a)) if clusters is None else clusters)
