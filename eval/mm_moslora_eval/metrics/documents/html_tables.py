"""Tables of pages: Markdown rows as HTML, and HTML in the form that OmniDocBench compares."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from html import unescape
from html.parser import HTMLParser

_EMPTY = {
    "area", "base", "basefont", "bgsound", "br", "col", "command", "embed", "frame", "hr", "image", "img", "input",
    "isindex", "keygen", "link", "menuitem", "meta", "nextid", "param", "source", "spacer", "track", "wbr",
}  # fmt: skip
_ATTRIBUTES = re.compile(r" (?:style|height|width|align|class)=\".*?\"")
_DROPPED = re.compile(r"</?(?:sup|sub|span|div|p)>|<spandata-span-identity=\"\">")
_SPACES = " \n\t\f\r"


class TableReader(HTMLParser):
    """Reads a table: its HTML with every tag closed, and the texts of its cells.

    As in OmniDocBench, `th` is `td`, `thead` and `span` are left out, and `math` is its text between dollar signs.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=False)
        self._pieces: list[str] = []
        self._open: list[str] = []
        self._data: list[str] = []
        self._closed_empty: list[str] = []
        self._contents: list[list[str | None]] = []
        self._math: int | None = None
        self.cells: list[str] = []
        """The text of every `td` that holds nothing else."""
        with suppress(AssertionError):  # of earlier Python for declarations such as `<![x[`: the rest is not read
            self.feed(text)
            self.close()
        self._flush()
        while self._open:
            self._pop()

    @property
    def html(self) -> str:
        """The HTML; characters stand for themselves."""
        return "".join(self._pieces)

    def _emit(self, piece: str) -> None:
        if self._math is None:
            self._pieces.append(piece)

    def _flush(self) -> None:
        data, self._data = "".join(self._data), []
        if data and not data.strip(_SPACES):
            data = "\n" if "\n" in data else " "
        if data:
            self._emit(data)
            if self._contents:
                self._contents[-1].append(data)

    def _pop(self) -> None:
        tag, content = self._open.pop(), self._contents.pop()
        only = content[0] if len(content) == 1 else None
        if tag == "td" and only is not None:
            self.cells.append(only)
        if self._contents:
            self._contents[-1].append(only)
        if self._math is not None:
            self._math = None if len(self._open) == self._math else self._math
        elif tag not in ("thead", "span") and tag not in _EMPTY:
            self._emit(f"</{'td' if tag == 'th' else tag}>")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open an element; an empty one is closed at once."""
        self._start(tag, attrs)
        if tag in _EMPTY:
            self._end(tag)
            self._closed_empty.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Open and close an element."""
        self._start(tag, attrs)
        self._end(tag)

    def _start(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._flush()
        given = {name: value or "" for name, value in attrs}
        if tag == "math" and self._math is None:
            self._emit(f"${given.get('alttext', '')}$")
            self._math = len(self._open)
        elif tag not in ("thead", "span"):
            named = "".join(f" {name}={_quoted(value)}" for name, value in sorted(given.items()))
            self._emit(f"<{'td' if tag == 'th' else tag}{named}{'/' if tag in _EMPTY else ''}>")
        self._open.append(tag)
        self._contents.append([])

    def handle_endtag(self, tag: str) -> None:
        """Close an element, with those in it."""
        if tag in self._closed_empty:
            self._closed_empty.remove(tag)
        else:
            self._end(tag)

    def _end(self, tag: str) -> None:
        self._flush()
        if tag in self._open:
            while self._open[-1] != tag:
                self._pop()
            self._pop()

    def handle_data(self, data: str) -> None:
        """Characters."""
        self._data.append(data)

    def handle_entityref(self, name: str) -> None:
        """A named character."""
        character = unescape(f"&{name};")
        self._data.append(f"&{name}" if character.startswith("&") and name != "amp" else character)

    def handle_charref(self, name: str) -> None:
        """A numbered character."""
        self._data.append(unescape(f"&#{name};"))

    def handle_comment(self, data: str) -> None:
        """A comment, which stays."""
        self._flush()
        self._emit(f"<!--{unescape(data)}-->")
        if self._contents:
            self._contents[-1].append(data)


def _quoted(value: str) -> str:
    return f"'{value}'" if '"' in value and "'" not in value else f'"{value}"'


def compared_table(text: str) -> str:
    """The HTML of a table as it is compared, without layout; empty without one."""
    if "<table" not in text.replace(" ", ""):
        return ""
    plain = unicodedata.normalize("NFKC", TableReader(text).html.replace("\n", "")).strip()
    inside = re.search(r"<table\b[^>]*>(.*)</table>", plain, re.S | re.I)
    rows = re.sub(r"</?tbody>", "", _ATTRIBUTES.sub("", inside[1] if inside else ""))
    rows = re.sub(r"\s+", " ", rows)
    table = f'<html><body><table border="1" >{rows}</table></body></html>'
    return re.sub("<colgroup>.*?</colgroup>", "", _DROPPED.sub("", table))


def spans_are_numbers(table: str) -> bool:
    """Whether every `colspan` and `rowspan` is a number; the source gives a table with another one no score."""
    return all(re.fullmatch(r"\s*[-+]?\d+\s*", value) for value in re.findall(r" (?:col|row)span=\"([^\"]*)\"", table))


def markdown_rows(text: str) -> Iterator[tuple[int, int]]:
    """The places of Markdown rows: from a bar to the next bar at the end of a line."""
    start = text.find("|")
    while start >= 0:
        end = text.find("|\n", start + 1)
        if end < 0:
            return
        yield start, end + 2
        start = text.find("|", end + 2)


def with_html_tables(text: str) -> str:
    """The text with its Markdown tables as HTML, by OmniDocBench's rules.

    Rows that follow each other are one table. A row with a colon is taken for the line below a heading and dropped, and
    so is the line of text directly above a table.
    """
    text, pieces, last = text.replace("\r", "") + "\n", [], 0
    for start, end in markdown_rows(text):
        pieces += [text[last:start], _row_table(text[start:end])]
        last = end
    joined = _joined_tables("".join(pieces) + text[last:])
    return joined.replace("<table>", '<table border="1" >').replace("<td>", '<td colspan="1" rowspan="1">')


def _row_table(text: str) -> str:
    rows = [row.split("|")[1:-1] for row in text.strip().split("\n")]
    head = "".join(f"      <th>{cell.strip()}</th>\n" for cell in rows[0])
    lines = ["".join(f"      <td>{cell.strip()}</td>\n" for cell in row) for row in rows[2:]]
    body = "".join(f"    <tr>\n{line}    </tr>\n" for line in lines)
    return f"<table>\n  <thead>\n    <tr>\n{head}    </tr>\n  </thead>\n  <tbody>\n{body}  </tbody>\n</table>\n"


def _joined_tables(text: str) -> str:
    kept: list[str] = []
    block, inside, last = "", False, ""
    for line in text.split("\n"):
        if "<table>" in line:
            block, inside = block + last, True
        elif inside:
            if not re.search("---|:", last) and "</thead>" not in last:
                block += "\n" + last
            if "</table>" in last:
                kept.append(_joined_table(block))
                block, inside = "", False
        else:
            kept.append(last)
        last = line
    if last:
        kept.append(_joined_table(f"{block}\n{last}") if inside or "</table>" in last else last)
    return "\n".join(kept)


def _joined_table(text: str) -> str:
    lines: list[str] = []
    for block in re.findall(r"<table>[\s\S]*?</table>", re.sub(r"<!--[\s\S]*?-->", "", text)):
        inner = [line.replace("<th>", "<td>").replace("</th>", "</td>") if "<th>" in line else line
                 for line in block.split("\n")]  # fmt: skip
        inner = [line for line in inner if not re.search(r"</?t(?:able|head|body)>", line)]
        lines += inner if len(inner) > 2 else []
    return "\n\n<table>\n" + "\n".join(lines) + "\n</table>\n\n"
