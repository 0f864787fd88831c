"""The blocks of a page in Markdown: tables, formulas, code and texts, by the rules of OmniDocBench.

v1.0 and v1.5 of the benchmark differ in details, see `old`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.package_requirements import install_extra, is_installed
from mm_moslora_eval.metrics.documents.html_tables import markdown_rows, with_html_tables

TEXT, FORMULA, INLINE, HTML, LATEX = "text_all", "equation_isolated", "equation_inline", "html_table", "latex_table"


@dataclass(frozen=True, kw_only=True)
class Block:
    """A piece of a page, of an annotation or of an answer."""

    kind: str
    text: str
    norm: str = ""
    """What is compared; a block without anything to compare takes part in nothing."""
    place: float = 0
    """Of an annotation the place in the order of reading, 0: none; of an answer that of its first character."""


_CLOSE = {"$$": "$$", "$": "$", "\\[": "\\]", "\\(": "\\)"}
_DISPLAY, _DOLLARS, _INLINE = ("$$", "\\[", "$", "\\("), ("$$", "$", "\\("), ("$", "\\(")


def _formulas(text: str, openings: Sequence[str]) -> Iterator[tuple[int, int, str, str]]:
    """Start, end, opening and content of formulas; each opening is looked for once without a closing behind it."""
    opening = re.compile("|".join(map(re.escape, openings)))
    place, without = 0, set[str]()
    while match := opening.search(text, place):
        place = match.start() + 1
        for mark in (match[0], "$") if match[0] == "$$" else (match[0],):
            start = match.start() + len(mark)
            end = -1 if mark in without else text.find(_CLOSE[mark], start)
            if end >= 0:
                place = end + len(_CLOSE[mark])
                yield match.start(), place, mark, text[start:end]
                break
            without.add(mark)


def _replaced(text: str, pieces: Iterable[tuple[int, int, str]]) -> str:
    """The text with pieces of it, in their order, replaced."""
    parts, last = [], 0
    for start, end, new in pieces:
        parts += [text[last:start], new]
        last = end
    return "".join(parts) + text[last:]


def _blanked(text: str, places: Iterable[tuple[int, int]]) -> str:
    return _replaced(text, ((start, end, " " * (min(end, len(text)) - start)) for start, end in places))


def _without_pictures(text: str) -> str:
    lines = []
    for line in text.split("\n"):
        start, pieces = line.find("!["), []
        while start >= 0 and (middle := line.find("](", start + 2)) >= 0 and (end := line.find(")", middle + 2)) >= 0:
            pieces.append((start, end + 1, ""))
            start = line.find("![", end + 1)
        lines.append(_replaced(line, pieces))
    return "\n".join(lines)


def _prepared(text: str, *, old: bool) -> str:
    text = _without_pictures(text.replace("\r\n", "\n").replace("\r", "\n"))
    for fence in ("markdown",) if old else ("markdown", "html", "latex"):
        text = re.sub(rf"^```{fence}\n?", "", text, flags=re.M)
    text = re.sub(r"```\n?$", "", text, flags=re.M)
    text = re.sub(" {4,}", "    ", re.sub("_{4,}", "____", text))
    if old:
        return re.sub(r"([^a-zA-Z0-9])\1{10,}", r"\1\1\1\1", text)
    for tag in ("<html>", "</html>", "<body>", "</body>"):
        text = text.replace(tag, "")
    return text


_MOST_SCANS, _MOST_MARKS = 200, 100_000
"""How often tables are looked for behind an opening without a closing; the source fails after some hundreds."""


def _nested(text: str, opening: str, closing: str, *, again: int) -> list[tuple[int, int]]:
    """The outermost places from an opening to its closing, of which one that misses the other counts for nothing.

    As in the source a mark is as long as the closing is taken to be, and `again` characters are passed over behind an
    opening without a closing.
    """
    step, first, marks = len(closing) + closing.count("\\"), 0, 0
    search = re.compile(f"{re.escape(opening)}|{re.escape(closing)}").search
    found: list[tuple[int, int]] = []
    for _ in range(_MOST_SCANS):
        opened, place = list[int](), first
        while match := search(text, place):
            place, marks = match.start() + step, marks + 1
            if match[0] == opening:
                opened.append(match.start())
            elif opened:
                start = opened.pop()
                found += [] if opened else [(start, min(place, len(text)))]
        if not opened or marks > _MOST_MARKS:
            break
        first = opened[0] + again
    return found


def _latex_tables(text: str) -> list[tuple[int, int, str]]:
    places, start = [], 0
    while (start := text.find("\\begin{table}", start)) >= 0 and (end := text.find("\\end{table}", start)) >= 0:
        places.append((start, end + len("\\end{table}"), text[start : end + len("\\end{table}")]))
        start = places[-1][1]
    text = _blanked(text, ((start, end) for start, end, _ in places))
    inner = _nested(text, "\\begin{tabular}", "\\end{tabular}", again=16)
    return sorted(places + [(start, end, text[start:end]) for start, end in inner])


def _html_tables(text: str) -> list[tuple[int, int, str]]:
    places = _nested(text[: text.rfind(">") + 1], "<table", "</table>", again=16)
    return [(start, end, text[start:end]) for start, end in places]


def _formula_blocks(text: str, *, old: bool) -> Iterator[tuple[int, int, Block]]:
    for start, end, _, _ in _formulas(text, _DISPLAY):
        line = "".join(text[start:end].split()) if old else " ".join(text[start:end].strip().split("\n"))
        inner = list(_formulas(line, _DOLLARS))
        shown = not inner or (inner[0][2] == "$$" and inner[0][3] != "")
        kept = ("$$",) if shown else _INLINE
        line = _replaced(line, ((a, b, f"\\[{part if mark in kept else ''}\\]") for a, b, mark, part in inner))
        yield start, end, Block(kind=FORMULA if shown else INLINE, text=line, place=start)


_COMMANDS = ((r"\\title\{", False), (r"\\title\s*\{", True), (r"\\text\s*\{", True), (r"\\section\*?\{", False),
             (r"\\section\*?\{", True))  # fmt: skip
"""Commands of LaTeX whose text stays, on one line or across lines."""


def _unwrapped(text: str) -> str:
    for opening, across in _COMMANDS:
        place, pieces = 0, []
        while (match := re.compile(opening).search(text, place)) and (end := text.find("}", match.end())) >= 0:
            content, place = text[match.end() : end], match.end()
            if across or "\n" not in content:
                place = end + 1
                pieces.append((match.start(), place, content.strip() if across else content))
        text = _replaced(text, pieces)
    return text


def markdown_blocks(text: str, *, old: bool) -> list[Block]:
    """The blocks of an answer in the order of their places; those of a kind that begin together as they are found.

    Args:
        text: the answer.
        old: by v1.0.
    """
    text = _prepared(text, old=old)
    blocks: list[Block] = []
    for kind, tables in ((LATEX, _latex_tables), (HTML, _html_tables)):
        found = tables(text)
        blocks += [Block(kind=kind, text=content, place=start) for start, _, content in found]
        text = _blanked(text, ((start, end) for start, end, _ in found))
    formulas = list(_formula_blocks(text, old=old))
    blocks += [block for _, _, block in formulas]
    text = _blanked(text, ((start, end) for start, end, block in formulas if block.kind == FORMULA))
    if sum(1 for _ in markdown_rows(text + "\n")) >= 2:
        text = with_html_tables(text)
        places, start = [], 0
        while (start := text.find("<table", start)) >= 0 and (end := text.find("</table>", start)) >= 0:
            places.append((start, end + 8))
            blocks.append(Block(kind=HTML, text=text[start : end + 8].strip(), place=start))
            start = end + 8
        text = _blanked(text, places)
    code = list(re.finditer(r"```(\w+)\n(.*?)```", text, re.S))
    blocks += [Block(kind=TEXT, text=match[2].strip(), place=match.start()) for match in code]
    text = _unwrapped(_blanked(text, (match.span() for match in code)))
    return sorted([*blocks, *_text_blocks(text)], key=lambda block: block.place)


def _text_blocks(text: str) -> Iterator[Block]:
    parts, place = text.split("\n\n"), 0
    for part in parts if len(parts) > 1 else text.split("\n"):
        start, place = place, place + len(part)
        content = "\n".join(line.strip() for line in part.strip().split("\n") if line.strip())
        kind = TEXT
        if content.startswith("<table") and content.endswith("</table>"):
            kind = HTML
        elif content.startswith("$") and content.endswith("$"):
            kind = FORMULA
        if content.replace("$", "").strip() if kind == FORMULA else content:
            yield Block(kind=kind, text=content, place=start)


def text_norm(text: str) -> str:
    """The letters and digits of a text, with its formulas in Unicode."""
    lines = []
    for line in text.split("\n"):
        pieces = []
        for start, end, _, content in _formulas(line, _INLINE):
            plain = re.sub(r"\\([\\_&%^])", "", content)
            if any(character in plain for character in "\\^_"):
                shown = _unicode_formula(plain + " " if plain.endswith("\\") else plain)
                pieces += [] if shown is None else [(start, end, shown.strip())]
        lines.append(_replaced(line, pieces))
    return letters_of("\n".join(lines))


def letters_of(text: str) -> str:
    """The letters and digits of a text."""
    for part in ("\\t", "\\n", "\t", "\n", "/t", "/n"):
        text = text.replace(part, "")
    return re.sub(r"[^\w\u4e00-\u9fff]", "", text)


def latex_text(formula: str) -> str:
    """A formula in Unicode, by pylatexenc.

    Raises:
        EvalError: it is not installed.
    """
    if not is_installed("pylatexenc"):
        raise EvalError(f"Formulas within texts are compared in Unicode, by pylatexenc: {install_extra('documents')}.")
    return str(_reader().latex_to_text(formula))


@functools.cache
def _reader() -> Any:
    from pylatexenc.latex2text import LatexNodes2Text

    logging.getLogger("pylatexenc").setLevel(logging.ERROR)  # it tells of every formula that is not closed
    return LatexNodes2Text()


@functools.lru_cache(maxsize=4096)
def _unicode_formula(formula: str) -> str | None:
    try:
        return latex_text(formula)
    except EvalError:
        raise
    except Exception:  # a formula that pylatexenc cannot read stays as it is
        return None


_REMOVED = (
    r"\mathbf", r"\mathrm", r"\mathnormal", r"\mathit", r"\mathbb", r"\mathcal", r"\mathscr", r"\mathfrak", r"\mathsf",
    r"\mathtt", r"\textbf", r"\text", r"\boldmath", r"\boldsymbol", r"\operatorname", r"\bm", r"\symbfit",
    r"\mathbfcal", r"\symbf", r"\scriptscriptstyle", r"\notag", r"\setlength", r"\coloneqq", r"\space", r"\thickspace",
    r"\thinspace", r"\medspace", r"\nobreakspace", r"\negmedspace", r"\quad", r"\qquad", r"\enspace", r"\substackw",
)  # fmt: skip
_ALSO_REMOVED = ("$$", "\\left", "\\right", "\\displaystyle", "\\text")


def formula_norm(text: str, *, old: bool) -> str:
    """A formula without fonts, spaces, numbers and environments, in lower case."""
    text = text if old else text.strip().strip("$").strip("\n")
    if match := re.search(r"\\\[(.+?)(?<!\\)\\\]", text):
        text = match[1].strip()
    for pattern in (r"\\tag\{.*?\}", r"\\hspace\{.*?\}", r"\\begin\{.*?\}", r"\\end\{.*?\}", r"\\arraycolsep.*?\}"):
        text = re.sub(pattern, "", text)
    text = text.strip(".")
    for part in (*_REMOVED, " ", *(() if old else _ALSO_REMOVED)):
        text = text.replace(part, "")
    return text.lower()
