"""Document parsing of CC-OCR: pages and formulas as LaTeX, tables as HTML, molecules as SMILES."""

from __future__ import annotations

import re

from mm_moslora_eval.metrics.metric_text import levenshtein

MOST_CHARACTERS = 100_000
"""Longest answer in which LaTeX commands are searched; in a longer one, which scores next to nothing, they stay."""
_COMMANDS = [
    re.compile(pattern)
    for pattern in (
        r"\\documentclass\{.*?\}", r"\\usepackage\[.*?\]\{.*?\}", r"\\usepackage\{.*?\}", r"\\geometry\{.*?\}",
        r"\\begin\{document\}", r"\\end\{document\}", r"\\noindent",
    )
]  # fmt: skip
_LATEX, _HTML, _FENCE = "```latex", "```html", "```"
_TAG = re.compile(r"(</?[A-Za-z][A-Za-z0-9:_.-]*)(?=[^A-Za-z0-9:_.>/-])")
TABLE = "table"


def texts(answer: str, reference: str, kind: str) -> tuple[str, str]:
    """What is compared of an answer and a reference of a kind: `doc`, `table`, `formula` or `molecular`.

    Raises:
        ValueError: another kind.
    """
    if kind == "doc":
        parts = _without_commands(answer).split(_FENCE, 2)
        return _dense(parts[min(1, len(parts) - 1)]), _dense(reference)
    if kind == TABLE:
        parts = _without_commands(answer).split(_HTML, 2)
        found = _dense(parts[min(1, len(parts) - 1)].replace(_FENCE, "")).replace("\uff0c", ",")
        return _parted(found), _parted(_dense(reference))
    if kind == "formula":
        plain = answer.replace("\n", " ").replace(_LATEX, "").replace(_FENCE, "").replace("\t", " ")
        return plain.replace(" ", ""), reference.replace(" ", "")
    if kind == "molecular":
        return _dense(answer).replace("<smiles>", "").replace("</smiles>", ""), reference.replace(" ", "")
    raise ValueError(f"the column l2-category is {kind!r}, expected doc, table, formula or molecular")


def _without_commands(text: str) -> str:
    if len(text) <= MOST_CHARACTERS:
        for command in _COMMANDS:
            text = command.sub("", text)
    return text


def _dense(text: str) -> str:
    return text.replace(" ", "").replace("\n", "")


def _parted(table: str) -> str:
    """Tags whose name ends where a parser of HTML ends it: `<tdcolspan="2">` is `tdcolspan`, and no cell."""
    return _TAG.sub(r"\1 ", table)


def similarity(answer: str, reference: str) -> float:
    """1 less the edit distance as a share of the longer text."""
    return 1 - levenshtein(answer, reference) / (max(len(answer), len(reference)) or 1)
