"""Which blocks of an answer belong to which blocks of an annotation: OmniDocBench's `quick_match` and its other ways.

`quick_match` joins blocks of the answer that one block of the annotation holds, pairs both sides at the smallest sum of
edits, and joins blocks of the annotation that one block of the answer holds. The rules are those of the source where
they are odd, too, since they decide scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mm_moslora_eval.metrics.documents.markdown_blocks import FORMULA, Block
from mm_moslora_eval.metrics.metric_text import EditPattern

IGNORED = frozenset(
    ("figure_caption", "figure_footnote", "table_caption", "table_footnote", "code_algorithm", "code_algorithm_caption",
     "header", "footer", "page_footnote", "page_number", "equation_caption")
)  # fmt: skip
"""Kinds of annotation that take part in the matching alone."""
MOST_WORK = 20_000_000
"""Characters that a page's blocks may be compared with; a page that needs more is matched one to one."""
_CALL = 50
"""What a comparison adds to them."""
_SAME, _APART = 0.25, 0.7
_JOINED, _HELD = 0.6, 0.4


def _smallest_sum(costs: NDArray[np.float64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of pairs with the smallest sum of costs."""
    from scipy.optimize import linear_sum_assignment  # not for those who list tasks

    rows, columns = linear_sum_assignment(costs)
    return rows, columns


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Blocks of an annotation and the blocks of the answer that belong to them; one side may be empty."""

    kind: str = ""
    """Of the annotation."""
    found: str = ""
    """Kind of the answer's first block."""
    truth: str = ""
    """The annotation's text as it is written."""
    norm_truth: str = ""
    norm_found: str = ""
    orders: tuple[float, ...] = ()
    """Places in the order of reading; 0: none."""
    place: float | None = None
    """Of the answer's first block."""


class _TooMuchError(Exception):
    """More work than `MOST_WORK`."""


class _Costs:
    """Edits between texts as a share of the longer one.

    Args:
        most: characters that may be compared.
    """

    def __init__(self, most: float = MOST_WORK) -> None:
        self._left = most
        self._patterns: dict[str, EditPattern] = {}
        self._known: dict[tuple[str, str], float] = {}

    def _pattern(self, text: str) -> EditPattern:
        return self._patterns.get(text) or self._patterns.setdefault(text, EditPattern(text))

    def _distance(self, truth: str, found: str) -> int:
        self._spend(found)
        return self._pattern(truth).distance(found)

    def _spend(self, text: str) -> None:
        self._left -= len(text) + _CALL
        if self._left < 0:
            raise _TooMuchError

    def edits(self, truth: str, found: str) -> float:
        key = truth, found
        if key not in self._known:
            self._known[key] = self._distance(truth, found) / (max(len(truth), len(found)) or 1)
        return self._known[key]

    def matrix(self, truth: Sequence[str], found: Sequence[str]) -> NDArray[np.float64]:
        costs = np.zeros((len(truth), len(found)))
        for row, left in enumerate(truth):
            costs[row] = [self.edits(left, right) for right in found]
        return costs

    def holds(self, text: str, part: str, share: float, *, equal: bool = False) -> bool:
        """Whether a stretch of a text as long as a part needs fewer edits than this share of it to be the part."""
        size = len(part)
        if not size or len(text) < size:
            return False
        self._spend(text)

        def within(edits: int) -> bool:
            return edits / size <= share if equal else edits / size < share

        ends = (
            (edits, end)
            for end, edits in enumerate(self._pattern(part).ends(text), start=1)
            if within(edits) and end >= size
        )
        return any(within(self._distance(part, text[end - size : end])) for _, end in sorted(ends))


def quick_match(truth: Sequence[Block], found: Sequence[Block], *, old: bool) -> list[Pair]:
    """Pairs by `quick_match`.

    Args:
        truth: blocks of the annotation.
        found: blocks of the answer.
        old: by v1.0, in which blocks of ignored kinds are paired with the others.
    """
    sides = _Sides(truth, found)
    left, right = list(range(len(sides.truth))), list(range(len(sides.found)))
    if not left:
        return [sides.pair([], [index]) for index in right]
    if not right:
        return [sides.pair([index], []) for index in left]
    if len(left) == len(right) == 1:
        return [sides.pair([0], [0])]
    try:
        return _quick_pairs(sides, left, right, old=old)
    except _TooMuchError:
        return simple_match(truth, found)


def _quick_pairs(sides: _Sides, left: list[int], right: list[int], *, old: bool) -> list[Pair]:
    costs = _Costs()
    if not old:
        ignored = [index for index in left if sides.truth[index].kind in IGNORED]
        left = [index for index in left if sides.truth[index].kind not in IGNORED]
        texts = [block.norm for block in sides.found]
        taken = np.argwhere(costs.matrix([sides.truth[index].norm for index in ignored], texts) < _SAME)
        gone = set(taken[:, 1].tolist())
        right = [index for index in right if index not in gone]
    lines = [sides.truth[index].norm for index in left], [sides.found[index].norm for index in right]
    pairs = _paired(*lines, costs, old=old)
    return [sides.pair([left[i] for i in some], [right[i] for i in others]) for some, others in pairs]


class _Sides:
    """The blocks of both sides with something to compare.

    As in the source, the place of a block, and of the answer its kind, are those at its number among all blocks.
    """

    def __init__(self, truth: Sequence[Block], found: Sequence[Block]) -> None:
        self.truth, self.found = ([block for block in side if block.text and block.norm] for side in (truth, found))
        self._all = truth, found

    def pair(self, left: Sequence[int], right: Sequence[int]) -> Pair:
        truth, found = self._all
        kinds = [self.truth[index].kind for index in left]
        counted = Counter([kind for kind in kinds if kind not in IGNORED] or kinds)
        kind = counted.most_common(1)[0][0] if counted else ""
        texts = [self.truth[index].text for index in left]
        if kind == FORMULA and len(left) > 1:
            rows = " \\\\ ".join("{" + text.strip("$").strip("\n") + "}" for text in texts)
            texts = ["\\begin{array}{l} " + rows + " \\end{array}"]
        return Pair(
            kind=kind, found=found[right[0]].kind if right else "", truth="".join(texts),
            norm_truth="".join(self.truth[index].norm for index in left),
            norm_found="".join(self.found[index].norm for index in right),
            orders=tuple(truth[index].place for index in left), place=found[right[0]].place if right else None,
        )  # fmt: skip


Indices = list[int]


def _paired(truth: Sequence[str], found: Sequence[str], costs: _Costs, *, old: bool) -> list[tuple[Indices, Indices]]:
    columns = _joined_columns(truth, found, costs)
    texts = [" ".join(found[index] for index in column) for column in columns]
    rows, chosen = _smallest_sum(matrix := costs.matrix(truth, texts))
    members: dict[tuple[int, ...], Indices] = {}
    for row, column in zip(rows.tolist(), chosen.tolist(), strict=True):
        if not matrix[row, column] > _APART:
            members.setdefault(tuple(columns[column]), []).append(row)
    done = {row for some in members.values() for row in some}
    missing = [row for row in range(len(truth)) if row not in done]
    for index, text in enumerate(found):
        held = [row for row in missing if costs.holds(text, truth[row], _HELD)]
        if held:
            inside = members.setdefault((index,), [])
            inside += [row for row in held if row not in done]
            done.update(held)
    return _with_unpaired(truth, found, members, costs, old=old)


def _with_unpaired(
    truth: Sequence[str], found: Sequence[str], members: dict[tuple[int, ...], Indices], costs: _Costs, *, old: bool
) -> list[tuple[Indices, Indices]]:
    """The pairs, with what is left of both sides paired at the fewest edits."""
    pairs = [(sorted(rows), list(key)) for key, rows in members.items() if rows]
    # Sets are walked through in the source, too; their order decides between pairs that cost the same.
    rows = list(set(range(len(truth))) - {row for some in members.values() for row in some})
    left = list(set(range(len(found))) - {index for key in members for index in key})
    if not left:
        return pairs + [([row], []) for row in sorted(rows)] * (2 if old else 1)
    if not rows:
        return [*pairs, ([], left)]
    table = costs.matrix([truth[row] for row in rows], [found[index] for index in left])
    if old:
        longest = [[max(len(truth[row]), len(found[index])) for index in left] for row in rows]
        table = np.rint(table * np.array(longest))
    chosen = [(rows[i], left[j]) for i, j in zip(*(side.tolist() for side in _smallest_sum(table)), strict=True)]
    taken = {row for row, _ in chosen}
    return [*pairs, *(([row], [index]) for row, index in chosen), *(([row], []) for row in sorted(set(rows) - taken))]


def _joined_columns(truth: Sequence[str], found: Sequence[str], costs: _Costs) -> list[Indices]:
    """The answer's blocks, with neighbours joined that are within one block of the annotation."""
    near = costs.matrix(truth, found) < _SAME
    rows = [row for row in range(len(truth)) if not near[row].any()]
    free = {index for index in range(len(found)) if not near[:, index].any()}
    best = []
    for row in rows if free else ():
        runs = [_run(truth[row], found, start, free, costs) for start in sorted(free)]
        edits = [costs.edits(truth[row], " ".join(found[run[0] : run[-1] + 1])) for run in runs]
        smallest = min(edits)
        best.append((runs[edits.index(smallest)], smallest))
    kept = {run[0]: run for run in _compatible(best)}
    columns, index = [], 0
    while index < len(found):
        columns.append(kept.get(index, [index]))
        index = columns[-1][-1] + 1
    return columns


def _run(truth: str, found: Sequence[str], start: int, free: set[int], costs: _Costs) -> Indices:
    """The blocks from a first one on that belong together."""
    run = [start]
    while (new := run[-1] + 1) in free:
        before, after = (" ".join(found[index] for index in some) for some in (run, [*run, new]))
        if costs.edits(truth, after) > costs.edits(truth, before):
            break
        if not all(costs.holds(truth, found[index], _JOINED, equal=True) for index in run):
            break
        if not costs.holds(truth, found[new], _JOINED):
            break
        run.append(new)
        if len(after) > len(truth):
            break
    return run


Scored = tuple[Indices, float]


def _compatible(runs: Iterable[Scored]) -> list[Indices]:
    """Of runs that overlap those of the way with the smallest mean cost."""
    groups: list[list[Scored]] = []
    for run in sorted(runs, key=lambda run: run[0][0]):
        if groups and any(set(run[0]) & set(other[0]) for other in groups[-1]):
            groups[-1].append(run)
        else:
            groups.append([run])
    chosen: list[Indices] = []
    for group in groups:
        ways: list[list[Scored]] = [group[:1]]
        for run in group[1:]:
            new = True
            for way in ways:
                overlaps, same = False, False
                for other in way:  # it may grow here, as in the source
                    if other[0] == run[0]:
                        overlaps = same = True
                        if other[1] > run[1]:
                            way.remove(other)
                            way.append(run)
                    elif set(other[0]) & set(run[0]):
                        overlaps = True
                if not overlaps:
                    way.append(run)
                new = new and overlaps and not same
            if new:
                ways.append([run])
        means = [sum(cost for _, cost in way) / len(way) for way in ways]
        chosen += [run for run, _ in ways[means.index(min(means))]]
    return chosen


def simple_match(truth: Sequence[Block], found: Sequence[Block]) -> list[Pair]:
    """Pairs of one block each at the smallest sum of edits; what the answer has beside them is one piece."""
    sides = _Sides(truth, found)
    texts = [block.norm for block in sides.found]
    if not sides.truth:
        return [sides.pair([], range(len(texts)))] if texts else []
    rows, columns = _smallest_sum(_Costs(math.inf).matrix([block.norm for block in sides.truth], texts))
    chosen = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    pairs = [sides.pair([row], [chosen[row]] if row in chosen else []) for row in range(len(sides.truth))]
    # The source takes block 0 of the answer for none where it looks its kind and place up.
    pairs = [replace(one, found="", place=None) if chosen.get(row) == 0 else one for row, one in enumerate(pairs)]
    paired = set(chosen.values())
    rest = [index for index in range(len(texts)) if index not in paired]
    return [*pairs, sides.pair([], rest)] if rest else pairs


def no_split(truth: Sequence[Block], found: Sequence[Block]) -> list[Pair]:
    """All blocks of each side as one text; without places, so that there is no order of reading."""
    sides = _Sides(truth, found)
    placed = sorted(zip((block.place for block in truth), sides.truth, strict=False), key=lambda one: one[0])
    texts = [block.norm for place, block in placed if place], [block.norm for block in sides.found]
    left, right = ("\n\n".join(side) for side in texts)
    return [Pair(norm_truth=left, norm_found=right, orders=(0,))] if left or right else []
