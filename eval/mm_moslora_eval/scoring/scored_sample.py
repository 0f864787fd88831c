"""A scored answer."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mm_moslora_eval.sources.document import Document


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One document with its extracted and scored answer."""

    document: Document
    text: str
    parsed: str
    """The extracted answer; empty: not inferable."""
    score: float
    """nan: not scored, or without a readable grade of a judge."""
    failed: bool = False
    """No answer: the sample could not be asked or the model failed on it. It scores 0."""
    cluster: Hashable = None
    """Identifier of the sample's cluster, such as its image; None: it shares none."""
    numbers: tuple[float, ...] = ()
    """Further numbers of a judge, for the aggregation."""
    judged: bool = False
    """A judge read the answer: `parsed` comes from its reply."""


def with_scores(samples: Sequence[Scored]) -> list[Scored]:
    """The samples that have a score."""
    return [sample for sample in samples if not math.isnan(sample.score)]
