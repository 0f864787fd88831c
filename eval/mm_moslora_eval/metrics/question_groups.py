"""Scores over groups of questions: MMBench's circular evaluation, MMStar's macro average."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

ROTATION = 1_000_000
"""Difference between the indices of consecutive rotations of one question in MMBench."""


def group_of(index: int) -> int:
    """The question to which a row of MMBench belongs."""
    return index % ROTATION


def circular_hits(rows: Iterable[tuple[int, bool]]) -> dict[int, int]:
    """1 for each question with all rotations answered correctly, else 0; from (index, right) of each row."""
    hits: dict[int, int] = {}
    for index, right in rows:
        group = group_of(index)
        hits[group] = int(hits.get(group, 1) and right)
    return hits


def macro_average(scores: Iterable[tuple[str, str, float]]) -> dict[str, float]:
    """MMStar in lmms-eval: per category and for `average`, the unweighted mean of the sub-categories' means.

    Args:
        scores: (category, sub-category, score) of each question.
    """
    groups: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for category, sub_category, score in scores:
        groups[category][sub_category].append(score)
        groups["average"][sub_category].append(score)
    return {
        name: sum(sum(values) / len(values) for values in members.values()) / len(members)
        for name, members in groups.items()
    }
