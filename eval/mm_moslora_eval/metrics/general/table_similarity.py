"""TEDS: the similarity of two HTML tables by the edit distance of their trees.

Source: Zhong et al. 2019 (1911.10683).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html import unescape
from html.parser import HTMLParser

from mm_moslora_eval.metrics.general.tree_distance import tree_distance
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
    """1 less the edits that turn one table into the other, as a share of the elements of the larger one."""
    (expected, size), (found, nodes) = table_in(reference), table_in(answer)
    if expected is None:
        raise ValueError(f"the reference is no HTML table of at most {MOST_NODES} elements")
    if found is None:
        return 0.0
    most = max(size, nodes)
    distance = tree_distance(found, expected, change=_Changes(structure_only=structure_only))
    return (1 - distance / most if signed else max(0.0, 1 - distance / most)) if most else 1.0


class _Changes:
    """The cost of a cell, row or mark in the place of another; pairs of texts are compared once."""

    def __init__(self, *, structure_only: bool) -> None:
        self._structure_only = structure_only
        self._costs: dict[tuple[str, str], float] = {}

    def __call__(self, a: TableNode, b: TableNode) -> float:
        if a.tag != b.tag or a.span != b.span:
            return 1.0
        if self._structure_only or not (a.content or b.content):
            return 0.0
        key = "\0".join(a.content), "\0".join(b.content)
        if key not in self._costs:
            self._costs[key] = levenshtein(a.content, b.content) / max(len(a.content), len(b.content))
        return self._costs[key]


FIRST_CALLS = {"teds": {"answer": "<table></table>", "reference": "<table></table>"}}
"""Arguments of a first call in a process of its own, which imports what a comparison needs."""
