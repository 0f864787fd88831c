"""A scored answer, and a set of them as a benchmark sums it up."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.visible_text import THINK, Markers, Visible, without_thinking
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
    markers: tuple[Markers, ...] = (THINK,)
    """Of reasoning in the text."""
    fault: str = ""
    """The error of the extraction, the metric or another rule on this answer, whose score is then nan."""

    @property
    def visible(self) -> Visible:
        """The answer without its reasoning."""
        return without_thinking(self.text, self.markers)

    def column(self, name: str) -> str:
        """See `Document.column`."""
        return self.document.column(name)


Samples = Sequence[Scored]
Numbers = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Summed:
    """A set of scored samples as a benchmark sums it up."""

    ratios: list[Ratio]
    """The score is their sum."""
    metrics: Numbers = field(default_factory=dict)
    """Further numbers, by name."""
    units: Sequence[str] | None = None
    """The question to which each sample belongs, where several samples are right or wrong together; None: its own."""


def with_scores(samples: Sequence[Scored]) -> list[Scored]:
    """The samples that have a score."""
    return [sample for sample in samples if not math.isnan(sample.score)]
