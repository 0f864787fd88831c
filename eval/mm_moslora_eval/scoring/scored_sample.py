"""A scored answer, and a set of them as a benchmark sums it up."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.sources.document import Document

Markers = tuple[str, str]
"""Texts before and after the reasoning."""
THINK: Markers = ("<think>", "</think>")


@dataclass(frozen=True)
class Visible:
    """An answer without its thinking."""

    text: str
    thought: bool
    """A block was removed."""
    unclosed: bool
    """A block has no end: the text was cut off before the answer, so there is nothing to extract."""


def without_thinking(text: str, markers: Sequence[Markers] = (THINK,)) -> Visible:
    """Remove blocks of reasoning, such as `<think>...</think>`, from an answer.

    If the chat template opens the block, the answer contains only its end; the text before that is removed too.
    """
    rest = text
    for start, end in markers:
        rest = _without_blocks(rest, start, end).rsplit(end, 1)[-1]
        if start in rest:
            return Visible("", True, True)
    return Visible(rest.strip(), True, False) if rest != text else Visible(text, False, False)


def _without_blocks(text: str, start: str, end: str) -> str:
    """The text between blocks; one without an end stays. Linear in the text, which may consist of markers."""
    kept, place = [], 0
    while (begin := text.find(start, place)) >= 0 and (close := text.find(end, begin + len(start))) >= 0:
        kept.append(text[place:begin])
        place = close + len(end)
    return "".join([*kept, text[place:]])


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
    together: Sequence[Hashable] | None = None
    """Equal for samples that a number of `metrics` counts together, too; None: as `units`."""


def splits_of(sample: Scored) -> list[str]:
    """The splits of a question that is stored once with all of them, as `random,popular`."""
    return [name.strip() for name in (sample.document.category or "").split(",")]


def joined(*keys: Sequence[Hashable]) -> list[Hashable] | None:
    """See `connected`; None without keys, or where they join all samples."""
    groups = connected(*keys) if keys else []
    return groups if len(set(groups)) > 1 else None


def connected(first: Sequence[Hashable], *others: Sequence[Hashable]) -> list[Hashable]:
    """The group of every sample: those that are equal in one of several keys are in one."""
    linked: dict[Hashable, Hashable] = {}

    def root(name: Hashable) -> Hashable:
        while name in linked:
            name = linked[name]
        return name

    for number, keys in enumerate(others, start=1):
        for key, other in zip(first, keys, strict=True):
            a, b = root((0, key)), root((number, other))
            if a != b:
                linked[b] = a
    return [root((0, key)) for key in first]


def with_scores(samples: Sequence[Scored]) -> list[Scored]:
    """The samples that have a score."""
    return [sample for sample in samples if not math.isnan(sample.score)]
