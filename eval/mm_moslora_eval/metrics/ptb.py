"""A Penn-Treebank-like tokeniser for captions, without Java.

It follows the conventions of the PTB tokeniser that the COCO caption evaluation runs: contractions are split
(`do n't`), abbreviations keep their periods, currency signs stand alone, hyphenated words and slashes stay whole; then
everything is lower-cased and punctuation tokens are dropped.
"""

from __future__ import annotations

import re

_DROPPED = frozenset(
    ["''", "'", "``", "`", "-lrb-", "-rrb-", "-lcb-", "-rcb-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_ABBREVIATIONS = (
    r"(?:[A-Za-z]\.){2,}|"
    r"(?:Mr|Mrs|Ms|Dr|Prof|Sr|Jr|St|Mt|Ave|Blvd|Rd|vs|etc|approx|Inc|Ltd|Co|Corp|No|Gen|Capt|Lt|Sgt|Rev|Hon|"
    r"Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sep|Sept|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thur|Thurs|Fri|Sat|Sun)\.(?=\s+\S)"
)
_TOKEN = re.compile(
    rf"(?P<abbreviation>\b(?:{_ABBREVIATIONS}))"
    r"|(?P<dots>\.{2,}|…)"
    r"|(?P<dash>--+|[–—])"
    r"|(?P<fraction>\d+/\d+(?!\w))"
    r"|(?P<number>[-+]?\d+(?:[.,:]\d+)*(?:-?(?:st|nd|rd|th|s))?(?!\w|[-/]\w))"
    r"|(?P<word>[^\W_]+(?:['’][^\W_]+)*(?:[-/&_.@][^\W_]+(?:['’][^\W_]+)*)*['’]?)"
    r"|(?P<and>['’]n['’](?!\w))"
    r"|(?P<clitic>['’](?:s|S|m|M|d|D|ll|LL|re|RE|ve|VE)\b)"
    r"|(?P<quote>``|''|[\"“”‘’'`])"
    r"|(?P<other>\S)"
)
_CONTRACTION = re.compile(r"(?i)^(.+?)(n['’]t|['’](?:s|m|d|ll|re|ve))$")
_WHOLE = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def tokenize(text: str) -> str:
    """The caption's tokens, lower-cased, without punctuation, joined by single spaces."""
    tokens = [token for match in _TOKEN.finditer(text.replace("\n", " ")) for token in _split(match)]
    return " ".join(token for token in tokens if token not in _DROPPED)


def _split(match: re.Match[str]) -> list[str]:
    token, kind = match.group().lower(), match.lastgroup
    if kind == "dots":
        return ["..."]
    if kind == "dash":
        return ["--"]
    if kind == "quote":
        return ["''"]
    if kind == "other":
        return [_BRACKETS.get(token, token)]
    if kind == "word":
        return _word(token)
    return [token]


def _word(token: str) -> list[str]:
    token = token.replace("’", "'")
    if token.endswith("'"):
        return [*_word(token[:-1]), "'"]
    if token in _WHOLE:
        return _WHOLE[token].split()
    contraction = _CONTRACTION.match(token)
    if contraction:
        return [*_word(contraction.group(1)), contraction.group(2)]
    return [token]
