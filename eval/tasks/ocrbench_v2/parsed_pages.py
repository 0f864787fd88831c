"""OCRBench v2: tables, charts and documents of a parsed page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moslora_eval.metrics.general.python_literals import fenced, literal_or_json, mapping_in
from mm_moslora_eval.metrics.general.table_similarity import teds
from mm_moslora_eval.metrics.general.tree_distance import tree_distance

from mm_moslora.utils.untrusted_data import parse_literal

MOST_LINES = 2500
"""Lines of a page that is compared; an answer with more scores 0, as it would score next to nothing."""
_PAGE = re.compile(r"</?(?:html|body)\b[^<>]*>", re.I)
_ASSIGNED = re.compile(r"^\s*\w+\s*=\s*")
_COMMENT = re.compile(r"#.*")
_CLEANED = [
    (re.compile(pattern), text)
    for pattern, text in (
        (r"<bos>|<eos>|<pad>|<unk>", ""), (r"\s##(\S)", r"\1"), (r"\\\s", r"\\"), (r"\s\*\s\*\s", "**"), (r"{\s", "{"),
        (r"\s}", "}"), (r"\s}", "}"), (r"\\begin\s", r"\\begin"), (r"\\end\s", r"\\end"),
        (r"\\end{table}", r"\\end{table}   "), (r"[*_]", " "),
    )
]  # fmt: skip
"""What is taken out of a line, one after the other."""


def html_table(answer: str, reference: str) -> float:
    """TEDS of the table from `<body` or `<table` on; 0 without either."""
    flat = answer.replace("\n", "")
    start = flat.find("<body") if "<body" in flat else flat.find("<table")
    return teds(_framed(flat[start:]), _framed(reference.replace("\n", ""))) if start >= 0 else 0.0


def _framed(text: str) -> str:
    """A table whose first tag is missing gets one."""
    return text if "<table" in text else f"<table>{_PAGE.sub('', text)}"


def markdown_table(answer: str, reference: str) -> float:
    """TEDS of two Markdown tables, as HTML without heads: the first line, and all from the third on."""
    return teds(_markdown_as_html(answer), _markdown_as_html(reference))


def _markdown_as_html(text: str) -> str:
    # As at the source, single characters of the code block's mark and not the mark are taken off the ends.
    lines = text.strip("```markdown").strip("```").strip().split("\n")  # noqa: B005
    rows = []
    for line in [lines[0], *lines[2:]]:
        cells = (cell.strip() if set(cell) != {" "} else " " for cell in line.strip().split("|")[1:-1])
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table>{''.join(rows)}</table>".replace("\n", "")


def chart(answer: str, reference: Any) -> float:
    """TEDS of two dictionaries, each a table with a row for a key; only the outer keys are cells of their own."""
    found = _dictionary(answer)
    wanted = _dictionary(reference) if isinstance(reference, str) else reference
    if not isinstance(wanted, dict) or not wanted:
        raise ValueError(f"the reference {str(reference)[:80]!r} is no dictionary")
    return teds(_as_rows(found), _as_rows(wanted)) if found else 0.0


def _dictionary(text: str) -> dict[Any, Any]:
    """The dictionary that an answer assigns or writes, without comments; empty without one."""
    content = _ASSIGNED.sub("", max(fenced(text), key=len, default=text.strip()).strip(), count=1)
    content = _COMMENT.sub("", content)
    try:
        value = parse_literal(content[: content.rfind("}") + 1] or content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _as_rows(values: Mapping[Any, Any]) -> str:
    # As at the source, a space stands between the characters of a value.
    rows = (f"<tr><td>{key}</td><td>{' '.join(str(value))}</td></tr>" for key, value in values.items())
    return f"<table>{''.join(rows)}</table>"


@dataclass
class _Part:
    """A heading with what follows it, or a line."""

    label: str
    children: list[_Part] = field(default_factory=list)


def outline(answer: str, reference: str) -> float:
    """1 less the tree edits as a share of the larger page: headings, and lines below them; only blank lines differ."""
    found, wanted = _outline(answer), _outline(reference)
    if found is None or wanted is None:
        if wanted is None:
            raise ValueError(f"the reference has more than {MOST_LINES} lines")
        return 0.0
    (page, size), (other, lines) = found, wanted

    def blank(part: _Part) -> float:
        return float(not part.label.strip())

    edits = tree_distance(page, other, change=lambda a, b: max(blank(a), blank(b)))
    return max(0.0, 1 - edits / max(size, lines))


def _outline(text: str) -> tuple[_Part, int] | None:
    """The tree of a page and the number of its nodes; None for too many lines."""
    lines = text.split("\n", MOST_LINES)
    if len(lines) > MOST_LINES:
        return None
    above = _Part("TITLE")
    root = _Part("ROOT", [above])
    for line in lines:
        for pattern, part in _CLEANED:
            line = pattern.sub(part, line)
        if line.startswith("#"):
            root.children.append(_Part(line.replace("#", "")))
            above = _first(root, root.children[-1].label or "TITLE")
        else:
            above.children.append(_Part(line))
    return root, len(lines) + 2


def _first(root: _Part, label: str) -> _Part:
    """The first part with a label, from above and from the left."""
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if part.label == label:
            return part
        waiting += reversed(part.children)
    raise ValueError(f"no part is called {label[:80]!r}")


def pairs_f1(answer: str, reference: Any) -> float:
    """The share of keys, of answer and reference together, whose values are equal without case and spaces.

    A value of the reference may be a list, of which any is right.
    """
    found, wanted = mapping_in(answer), _mapping(reference)
    scores = []
    for key in {**found, **wanted}:
        allowed = wanted.get(key)
        allowed = allowed if isinstance(allowed, list) else [allowed]
        if key in found:
            scores.append(_plain(found[key]) in {_plain(value) for value in allowed if value is not None})
        elif None not in allowed:
            scores.append(False)
    return sum(scores) / len(scores) if scores else 0.0


def _mapping(reference: Any) -> dict[str, Any]:
    """The keys and values of a reference: a mapping, or JSON or a literal of one, maybe written as a text itself."""
    for _ in range(3):
        if isinstance(reference, dict):
            return reference
        if isinstance(reference, str):
            reference = literal_or_json(reference.strip('"'))
    raise ValueError(f"the reference {str(reference)[:80]!r} is no mapping")


def _plain(value: Any) -> str:
    return str(value).lower().strip().replace("\n", " ").replace(" ", "")
