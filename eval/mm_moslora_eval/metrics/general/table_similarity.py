"""TEDS: the similarity of two HTML tables by the edit distance of their trees.

Sources: Zhong et al. 2019 (1911.10683) for the costs, Zhang and Shasha 1989 for the distance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser

from mm_moslora_eval.metrics.metric_text import levenshtein

MOST_NODES = 2500
"""Rows, cells and marks of a table that is compared; a larger one in an answer scores 0."""
_MOST_TAGS = 4 * MOST_NODES
"""Tags that are read, those that close nothing included."""
_CELLS, _ROWS, _PARTS = {"td", "th"}, {"tr"}, {"thead", "tbody", "tfoot"}
_PAGE = {"html", "head", "body"}
"""Tags that mean nothing within a table."""
_VOID = {"br", "hr", "img", "input", "col", "wbr", "area", "base", "embed", "link", "meta", "source", "track"}


@dataclass
class TableNode:
    """An element of a table; the content of a cell is its characters and marks."""

    tag: str
    span: tuple[int, int] | None = None
    content: list[str] = field(default_factory=list)
    children: list[TableNode] = field(default_factory=list)


class _FirstTable(HTMLParser):
    """Reads the first table of a text; omitted end tags are implied as in HTML."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.table: TableNode | None = None
        self.nodes = 0
        self._tags = 0
        self._open: list[TableNode] = []
        self._inner: list[str] = []
        self._done = False

    @property
    def too_large(self) -> bool:
        """Whether the table has too many elements, and was not read to its end."""
        return self.nodes > MOST_NODES or self._tags > _MOST_TAGS

    def read(self, text: str) -> None:
        """Read a text; a tag or comment that never ends ends it (`close` would search on from each)."""
        self.feed(text)
        if not self.rawdata.startswith("<"):
            self.handle_data(unescape(self.rawdata))

    def _passed(self) -> bool:
        """Whether a tag is passed over; it is counted."""
        self._tags += 1
        self._done = self._done or self.too_large
        return self._done

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element."""
        if self._done or (not self._open and tag != "table") or self._passed():
            return
        if tag in _PAGE:
            return
        if "table" not in self._inner:
            self._close_implied(tag)
        if not self._open:
            self.table = TableNode(tag)
            self._open.append(self.table)
            return
        self.nodes += 1
        above = self._open[-1]
        if above.tag == "td":
            above.content.append(f"<{tag}>")
            if tag in _VOID:
                above.content.append(f"</{tag}>")
            else:
                self._inner.append(tag)
            return
        given = dict(attrs)
        span = (_count(given.get("colspan")), _count(given.get("rowspan"))) if tag == "td" else None
        node = TableNode(tag, span)
        above.children.append(node)
        if tag not in _VOID:
            self._open.append(node)

    def handle_endtag(self, tag: str) -> None:
        """Close an element, with those in it."""
        if self._done or self._passed():
            return
        if self._inner and tag in self._inner:
            while self._inner:
                closed = self._inner.pop()
                self._open[-1].content.append(f"</{closed}>")
                if closed == tag:
                    return
        if tag in [node.tag for node in self._open]:
            self._close(tag)

    def handle_data(self, data: str) -> None:
        """Characters, which count within cells."""
        if self._open and self._open[-1].tag == "td":
            self._open[-1].content += data

    def _close_implied(self, tag: str) -> None:
        within = [node.tag for node in self._open]
        ends = _CELLS if tag in _CELLS else _CELLS | _ROWS if tag in _ROWS else _CELLS | _ROWS | _PARTS
        if tag in _CELLS | _ROWS | _PARTS:
            while within and within[-1] in ends:
                self._close(within.pop())

    def _close(self, tag: str) -> None:
        self._inner = []
        while self._open and self._open.pop().tag != tag:
            pass
        self._done = not self._open


def _count(text: str | None) -> int:
    return int(text) if text and text.isdecimal() and len(text) < 6 else 1


def table_in(text: str) -> tuple[TableNode | None, int]:
    """The first HTML table of a text, None without one or for one of too many elements, and the number of elements."""
    start = text.lower().find("<table")
    if start < 0:
        return None, 0
    reader = _FirstTable()
    reader.read(text[start:])
    return None if reader.too_large else reader.table, reader.nodes


def teds(answer: str, reference: str, *, structure_only: bool = False, signed: bool = False) -> float:
    """1 less the edits that turn one table into the other, as a share of the elements of the larger one.

    Args:
        answer: a text with an HTML table.
        reference: a text with an HTML table.
        structure_only: without the content of cells (TEDS-S).
        signed: keep a value below 0, which tables of opposite forms have.

    Raises:
        ValueError: the reference is no table, or too large a one.
    """
    (expected, size), (found, nodes) = table_in(reference), table_in(answer)
    if expected is None:
        raise ValueError(f"the reference is no HTML table of at most {MOST_NODES} elements")
    if found is None:
        return 0.0
    most = max(size, nodes)
    distance = _TreeDistance(found, expected, structure_only=structure_only).value
    return (1 - distance / most if signed else max(0.0, 1 - distance / most)) if most else 1.0


class _TreeDistance:
    """The edit distance of two trees: 1 for an element more or less, or of another kind or span."""

    def __init__(self, a: TableNode, b: TableNode, *, structure_only: bool) -> None:
        self._structure_only = structure_only
        self._costs: dict[tuple[str, str], float] = {}
        self._a, self._left_a = _postorder(a)
        self._b, self._left_b = _postorder(b)
        self._trees = [[0.0] * len(self._b) for _ in self._a]
        for i in _key_roots(self._left_a):
            for j in _key_roots(self._left_b):
                self._compare(i, j)
        self.value = self._trees[-1][-1]

    def _compare(self, i: int, j: int) -> None:
        """The distances of all pairs of subtrees that begin at the leftmost leaves of these two."""
        first_a, first_b = self._left_a[i], self._left_b[j]
        before = [float(column) for column in range(j - first_b + 2)]
        rows = [before]
        for x in range(first_a, i + 1):
            row, left_x = [before[0] + 1.0], self._left_a[x]
            trees, above = self._trees[x], rows[-1]
            for y in range(first_b, j + 1):
                column = y - first_b
                best = min(above[column + 1], row[column]) + 1.0
                if left_x == first_a and self._left_b[y] == first_b:
                    best = min(best, above[column] + self._change(self._a[x], self._b[y]))
                    trees[y] = best
                else:
                    best = min(best, rows[left_x - first_a][self._left_b[y] - first_b] + trees[y])
                row.append(best)
            rows.append(row)
            before = row

    def _change(self, a: TableNode, b: TableNode) -> float:
        if a.tag != b.tag or a.span != b.span:
            return 1.0
        if self._structure_only or not (a.content or b.content):
            return 0.0
        key = "\0".join(a.content), "\0".join(b.content)
        if key not in self._costs:
            self._costs[key] = levenshtein(a.content, b.content) / max(len(a.content), len(b.content))
        return self._costs[key]


def _postorder(root: TableNode) -> tuple[list[TableNode], list[int]]:
    """The nodes, children first, and for each the index of its leftmost leaf."""
    nodes: list[TableNode] = []
    left: list[int] = []
    waiting: list[tuple[TableNode, bool, int]] = [(root, False, 0)]
    while waiting:
        node, seen, first = waiting.pop()
        if seen:
            nodes.append(node)
            left.append(first)
        else:
            waiting.append((node, True, len(nodes)))
            waiting += [(child, False, 0) for child in reversed(node.children)]
    return nodes, left


def _key_roots(left: Sequence[int]) -> list[int]:
    """The roots, and every node with a brother to its left."""
    return sorted({first: index for index, first in enumerate(left)}.values())
