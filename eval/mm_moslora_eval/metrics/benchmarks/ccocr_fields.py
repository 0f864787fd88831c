"""Key information of CC-OCR: the fields of a JSON answer against those of the reference, by Donut's two measures.

Source: Kim et al. 2022 (2111.15664).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json
from mm_moslora_eval.metrics.document_vqa import FULL_WIDTH
from mm_moslora_eval.metrics.general.python_literals import literal_or_json
from mm_moslora_eval.metrics.general.tree_distance import tree_distance
from mm_moslora_eval.metrics.metric_text import levenshtein

MOST_NODES = 2500
"""Keys and values of an answer that is compared; a larger one scores 0."""
_FENCE, _END = "```json", "```"
_LEAF, _ROOT, _ITEM = "<leaf>", "<root>", "<subtree>"
_SIGNS = FULL_WIDTH | {0x3001: ","}
_SPACES = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"\s+", " "),  # first, so that the others take no long time
        (r"(?<=[\u4e00-\u9fff])\s(?=[\u4e00-\u9fffa-zA-Z0-9])", ""), (r"(?<=[a-zA-Z0-9])\s(?=[\u4e00-\u9fff])", ""),
        (r"(?<![0-9])\s?([,.!?:;])\s?", r"\1 "), (r"(?<=[0-9])(?=[a-zA-Z])", " "), (r"(?<=[a-zA-Z])(?=[0-9])", " "),
        (r"\s+", " "),
    )
]  # fmt: skip
Field = tuple[str, str]


def field_counts(answer: str, reference: str) -> tuple[int, float]:
    """The fields that answer and reference share, and half of what both have.

    Their ratio is F1; summed over pictures, it is the F1 of a data set.
    """
    found, wanted = _fields(answer), _fields_of_reference(reference)
    return (Counter(found) & Counter(wanted)).total(), (len(found) + len(wanted)) / 2


def f1(answer: str, reference: str) -> float:
    """F1 of the fields: a field is right if its key, from the outermost on, and its value are equal."""
    shared, half = field_counts(answer, reference)
    return shared / half if half else 0.0


def tree_similarity(answer: str, reference: str) -> float:
    """1 less the edits of the tree of keys and values, as a share of what writing the reference costs; at least 0."""
    root, found = _tree(_ordered(_reference(reference))), _tree(_ordered(_said(answer)))
    whole = sum(map(_cost, _nodes(root))) - _cost(root)
    if not whole:
        raise ValueError(f"the reference {reference[:80]!r} has no field")
    if sum(1 for _ in _nodes(found)) > MOST_NODES:
        return 0.0
    return max(0.0, 1 - tree_distance(found, root, change=_change, cost=_cost) / whole)


def _fields(answer: str) -> list[Field]:
    return list(_flat(_ordered(_said(answer))))


def _fields_of_reference(reference: str) -> list[Field]:
    return list(_flat(_ordered(_reference(reference))))


def _reference(text: str) -> Any:
    value = literal_or_json(text)
    if value is None:
        raise ValueError(f"the reference {text[:80]!r} is no JSON")
    return _cleaned(value)


def _said(answer: str) -> Any:
    """What the first JSON block of an answer holds, or the whole answer; an empty mapping if it cannot be read."""
    start = answer.find(_FENCE)
    if start >= 0:
        end = answer.find(_END, start + len(_FENCE))
        answer = answer[start + len(_FENCE) : end] if end >= 0 else ""
    try:
        value = parse_json(answer.strip().replace("\n", ""), constants=True, repeats=True)
    except StrictJsonError:
        value = None
    return {} if value is None else _cleaned(value)


def _cleaned(value: Any) -> Any:
    """Texts with the signs of ASCII and even spaces. As at the source, the texts in a list stay as they are."""
    if isinstance(value, dict):
        return {key: _cleaned(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_cleaned(item) if isinstance(item, dict) else item for item in value]
    if not isinstance(value, str):
        return value
    text = value.translate(_SIGNS)
    for pattern, part in _SPACES:
        text = pattern.sub(part, text)
    return text


def _ordered(value: Any) -> Any:
    """Mappings by the length of their keys, with lists as values; lists of mappings or of texts."""
    if isinstance(value, dict):
        items = ((key, _ordered(value[key])) for key in sorted(value, key=lambda key: (len(key), key)))
        return {key: item if isinstance(item, list) else [item] for key, item in items if item}
    if isinstance(value, list):
        if all(isinstance(item, dict) for item in value):
            return [part for part in map(_ordered, value) if part]
        return [text for item in value if type(item) in (str, int, float) and (text := str(item).strip())]
    return [str(value).strip()]


def _flat(value: Any, key: str = "") -> Iterator[Field]:
    """The values with their keys, joined by periods."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, key)
    else:
        yield key, value


@dataclass
class _Part:
    """A key, an item of a list, or a value."""

    label: str
    children: list[_Part] = field(default_factory=list)


def _tree(value: Any, label: str = _ROOT) -> _Part:
    if isinstance(value, dict):
        return _Part(label, [_tree(item, key) for key, item in value.items()])
    return _Part(label, [_tree(item, _ITEM) if isinstance(item, dict) else _Part(_LEAF + item) for item in value])


def _nodes(root: _Part) -> Iterator[_Part]:
    waiting = [root]
    while waiting:
        part = waiting.pop()
        yield part
        waiting += part.children


def _cost(part: _Part) -> float:
    return len(part.label.replace(_LEAF, "")) if _LEAF in part.label else 1


def _change(a: _Part, b: _Part) -> float:
    leaves = [_LEAF in part.label for part in (a, b)]
    if all(leaves):
        return levenshtein(a.label.replace(_LEAF, ""), b.label.replace(_LEAF, ""))
    if any(leaves):
        return 1 + _cost(a if leaves[0] else b)
    return float(a.label != b.label)
