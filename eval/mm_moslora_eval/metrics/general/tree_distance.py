"""The edit distance of two ordered trees, for costs of any kind. Source: Zhang and Shasha 1989."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar


class Node(Protocol):
    """A node of a tree."""

    @property
    def children(self) -> Sequence[Node]:
        """From left to right."""
        ...


N = TypeVar("N", bound=Node)


def tree_distance(
    a: N, b: N, *, change: Callable[[N, N], float], cost: Callable[[N], float] = lambda node: 1.0
) -> float:
    """The least sum of costs that turns one tree into the other."""
    return _TreeDistance(a, b, change, cost).value


class _TreeDistance:
    def __init__(self, a: N, b: N, change: Callable[[N, N], float], cost: Callable[[N], float]) -> None:
        nodes_a, self._left_a = _postorder(a)
        nodes_b, self._left_b = _postorder(b)
        self._change = lambda x, y: change(nodes_a[x], nodes_b[y])
        self._cost_a, self._cost_b = [cost(node) for node in nodes_a], [cost(node) for node in nodes_b]
        self._trees = [[0.0] * len(nodes_b) for _ in nodes_a]
        for i in _key_roots(self._left_a):
            for j in _key_roots(self._left_b):
                self._compare(i, j)
        self.value = self._trees[-1][-1]

    def _compare(self, i: int, j: int) -> None:
        """The distances of all pairs of subtrees that begin at the leftmost leaves of these two."""
        first_a, first_b = self._left_a[i], self._left_b[j]
        added = self._cost_b
        before = [0.0]
        for y in range(first_b, j + 1):
            before.append(before[-1] + added[y])
        rows = [before]
        for x in range(first_a, i + 1):
            removed = self._cost_a[x]
            row, left_x = [before[0] + removed], self._left_a[x]
            trees, above = self._trees[x], rows[-1]
            for y in range(first_b, j + 1):
                column = y - first_b
                best = min(above[column + 1] + removed, row[column] + added[y])
                if left_x == first_a and self._left_b[y] == first_b:
                    best = min(best, above[column] + self._change(x, y))
                    trees[y] = best
                else:
                    best = min(best, rows[left_x - first_a][self._left_b[y] - first_b] + trees[y])
                row.append(best)
            rows.append(row)
            before = row


def _postorder(root: N) -> tuple[list[N], list[int]]:
    """The nodes, children first, and for each the index of its leftmost leaf."""
    nodes: list[N] = []
    left: list[int] = []
    waiting: list[tuple[N, bool, int]] = [(root, False, 0)]
    while waiting:
        node, seen, first = waiting.pop()
        if seen:
            nodes.append(node)
            left.append(first)
        else:
            waiting.append((node, True, len(nodes)))
            waiting += [(child, False, 0) for child in reversed(node.children)]  # type: ignore[misc]
    return nodes, left


def _key_roots(left: Sequence[int]) -> list[int]:
    """The roots, and every node with a brother to its left."""
    return sorted({first: index for index, first in enumerate(left)}.values())
