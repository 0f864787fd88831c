"""Text of a page between `<!-- NAME:begin -->` and `<!-- NAME:end -->`, which scripts write."""

from __future__ import annotations


def parts_of(text: str, name: str) -> tuple[str, str, str]:
    """The text up to and with the first marker, between both, and from the second marker on."""
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    before, opening, rest = text.partition(begin)
    inside, closing, after = rest.partition(end)
    if not opening or not closing:
        raise SystemExit(f"The page has no line {begin.strip()} with {end} after it. Add them where the text belongs.")
    return before + begin, inside, end + after


def replaced(text: str, name: str, body: str) -> str:
    """A page with another text between the markers of this name."""
    before, _, after = parts_of(text, name)
    return f"{before}{body.rstrip()}\n{after}"
