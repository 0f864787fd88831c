"""A Penn-Treebank-like tokeniser for captions, without Java.

It gives the tokens of the PTB tokeniser in the COCO caption evaluation (Stanford CoreNLP 3.4.1 with `-lowerCase`).
Contractions are split (`do n't`), abbreviations keep their periods, hyphenated words and slashes stay whole, brackets
become `-lrb-` and the like. As in that evaluation, punctuation tokens are dropped; brackets are kept, because its list
has them in capitals.

At every position the longest match wins; among equally long matches the first rule wins.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_LETTER = (
    r"(?:[^\W\d_\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218f\u2460-\u24ff]"
    r"|[\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0dff\u0e00-\u0eff])"
)
_ALNUM = rf"(?:{_LETTER}|\d)"
_APOSTROPHE = "['’]"
_NOT_IN_WORD = rf"(?!{_ALNUM})"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"

_NEGATION = rf"[nN]['’‘`][tT][sS]?{_NOT_IN_WORD}"
_CLITIC = rf"(?i:s|m|d|ll|re|ve){_NOT_IN_WORD}"

_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bancorp bhd bldg blvd brig bros calif "
    "capt cf cie cmdr co col colo conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla "
    "fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md "
    "messrs mfg mich minn mlle mme mo mon mont mr mrs ms msgr mt mtg natl neb nev nov oct okla penn pfc ph plc "
    "pres prof profs pte ptes pty pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt "
    "supts sys tel tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo"
)
"""Words that always keep their period."""
_CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
"""Words that keep their period only with a capital."""
_NUMBERED = "art ca fig figs no nos op pp prop"
"""Words that keep their period only before a number."""
_SENTENCE_STARTS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet "
    "You"
)
"""Words before which a single letter loses its period: `plan B. The`."""
_WITH_APOSTROPHE = "c'mon c'est e'er s'mores ev'ry li'l nat'l nor'easter o'o"
_ENDING_IN_APOSTROPHE = "ol dunkin somethin"
_TWO_WORDS = {
    "cannot": "can not",
    "gonna": "gon na",
    "gotta": "got ta",
    "wanna": "wan na",
    "gimme": "gim me",
    "lemme": "lem me",
}


def _any_of(words: str) -> str:
    return "|".join(re.escape(word).replace("'", _APOSTROPHE) for word in words.split())


_ABBREVIATION = (
    rf"(?:(?i:{_any_of(_ABBREVIATIONS)})"
    rf"|(?:{'|'.join(f'{word.title()}|{word.upper()}' for word in _CAPITAL_ABBREVIATIONS.split())}))\."
)
_ACRONYM = rf"{_LETTER}(?:\.{_LETTER})+(?:\.|{_NOT_IN_WORD})|Ph\.D\.?"
_PIECE = rf"(?:(?:{_LETTER}\.)+{_LETTER}{_NOT_IN_WORD}\.?|(?:[dDoOlL]{_APOSTROPHE}(?={_LETTER}))?{_ALNUM}+)"
_HYPHENATED = rf"(?:{_ABBREVIATION}(?=-)|{_LETTER}\.(?=-)|{_PIECE})(?:[-‐‑_]{_PIECE})*"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"

# Comments and addresses have a greatest length: the rest of the text is not searched for their ends at every token.
_RULES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("tag", r"<!--.{0,250}?-->|<[/!?]?[A-Za-z][^<>]*>"),
        ("keep", r"https?://[^\s\"<>|()]+[^\s\"<>|().,;:!?{}'-]"),
        ("keep", r"[A-Za-z0-9][\w.+-]{0,99}@[A-Za-z0-9](?:[\w.-]*\w)?"),
        ("keep", r"@[A-Za-z_]\w*|#[A-Za-z]+"),
        ("entity", r"&(?:lt|gt|amp|quot|nbsp);"),
        ("keep", r"&#\d+;"),
        ("negation", _NEGATION),
        ("word", rf"(?P<token>{_LETTER}+?){_NEGATION}"),
        ("word", rf"{_LETTER}{_ALNUM}*(?:[.!?]{_LETTER}{_ALNUM}*)*"),
        ("word", _HYPHENATED),
        ("word", rf"{_NUMBER}(?:-{_LETTER}{_ALNUM}*)+(?:-{_ALNUM}+)*"),
        ("keep", r"[A-Z]+(?:(?:&amp;|[&+])[A-Z]+)+"),
        ("keep", rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}"),
        ("keep", _ABBREVIATION),
        ("keep", rf"{_LETTER}{_ALNUM}*\.(?=[,;:])"),
        ("keep", rf"(?i:{_any_of(_NUMBERED)})\.(?=\s*\d)"),
        ("keep", rf"{_LETTER}\.(?!\s+(?:{_any_of(_SENTENCE_STARTS)}){_NOT_IN_WORD})"),
        ("keep", _ACRONYM),
        ("keep", rf"[-+]?{_NUMBER}"),
        ("joined", r"(?:\d{1,4}[- \xa0])?\d{1,4}[/⁄]\d{1,4}"),
        ("joined", r"(?:\(\d{2,3}\)[ \xa0]?|\d{2,4}[- \xa0]\d{3,4}[- \xa0])\d{3,4}(?:[- \xa0]?\d{3,5})?"),
        ("keep", rf"[A-Za-z]*[A-Za-z][aeiouyAEIOUY]{_APOSTROPHE}[aeiouA-Z][A-Za-z]*"),
        ("keep", rf"[A-HJ-XZn]{_APOSTROPHE}{_LETTER}{{2,}}"),
        ("keep", rf"(?i:{_any_of(_WITH_APOSTROPHE)}){_NOT_IN_WORD}"),
        ("keep", rf"(?i:{_any_of(_ENDING_IN_APOSTROPHE)}){_APOSTROPHE}"),
        ("keep", rf"[yYj]{_APOSTROPHE}(?!{_CLITIC})(?={_LETTER})"),
        ("keep", rf"{_APOSTROPHE}[nN]{_APOSTROPHE}"),
        ("keep", rf"{_APOSTROPHE}(?:(?i:n|em|till?|cause){_NOT_IN_WORD}|[2-9]0s)"),
        ("keep", rf"(?<![\w]){_APOSTROPHE}\d\d(?!{_ALNUM}|{_APOSTROPHE})"),
        ("keep", rf"{_APOSTROPHE}[tT](?=(?i:is|was){_NOT_IN_WORD}|(?i:wasn){_APOSTROPHE}(?i:t))"),
        ("clitic", rf"{_APOSTROPHE}{_CLITIC}"),
        ("smiley", r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z])|\^_\^"),
        ("keep", r"[cC]\+\+|[cCfF]#|[A-Z]*\$|\*+|#+|_+|<<|>>|[?!]{2,}"),
        ("drop", r"\.+|-+|``|''"),
        ("other", r"\S"),
    )
)
_PLAIN = re.compile(r"[A-Za-z]+(?=\s|$)")
_SPACE = re.compile(r"\s*")

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_SIGNS = _BRACKETS | {"£": "#", "€": "$", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_DROPPED = frozenset("'`.?!,:;-\"‘’“”«»‹›–—―…「」『』【】《》〈〉₹₩\u200b\ufe0f\ufeff")
_ENTITIES = {"&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": "", "&nbsp;": ""}


def _brackets_inside(token: str) -> str:
    return "".join(_BRACKETS.get(character, character) for character in token)


_RENDER: dict[str, Callable[[str], str]] = {
    "keep": lambda token: token.replace("&amp;", "&"),
    "word": lambda token: _TWO_WORDS.get(token, token),
    "tag": lambda token: token.replace(" ", "\xa0"),
    "entity": lambda token: _ENTITIES[token],
    "negation": lambda token: token.replace("’", "'").replace("‘", "`"),
    "clitic": lambda token: token.replace("’", "'"),
    "joined": lambda token: _brackets_inside(token).replace(" ", "\xa0"),
    "smiley": _brackets_inside,
    "drop": lambda token: "",
    # The tokeniser handles only the basic multilingual plane, so an emoji separates words and is no token.
    "other": lambda token: "" if token in _DROPPED or ord(token) > 0xFFFF else _SIGNS.get(token, token),
}


def tokenize(text: str) -> str:
    """The caption's tokens, lower-cased, without punctuation, joined by single spaces."""
    text = text.replace("\n", " ").replace("\u00ad", "").replace("&apos;", "'")
    tokens, position = [], _SPACE.match(text).end()  # type: ignore[union-attr]
    while position < len(text):
        kind, end = _longest(text, position)
        token = _RENDER[kind](text[position:end].lower())
        if token:
            tokens.append(token)
        position = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    return " ".join(tokens)


def _longest(text: str, position: int) -> tuple[str, int]:
    plain = _PLAIN.match(text, position)
    if plain is not None:
        return "word", plain.end()
    kind, end, longest = "other", position, position
    for name, pattern in _RULES:
        match = pattern.match(text, position)
        if match is not None and match.end() > longest:
            kind, longest = name, match.end()
            end = match.end("token") if "token" in pattern.groupindex else longest
    return kind, end
