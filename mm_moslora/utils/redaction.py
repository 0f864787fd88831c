"""Secrets never leave the process: one filter for all logs, files and trackers.

It uses three criteria: names that sound like a secret, values that look like one, and the values of environment
variables with such names. Standard library only, so that every layer can use it.
"""

from __future__ import annotations

import functools
import html
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"

_SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:secret|passphrase|credentials?|auth|authorization"
    r"|(?:api|access|private|account|subscription|functions|signing|encryption|master|openai|anthropic)[_-]?key"
    r"|(?:api|access|auth|hub|hf|bearer|session|security|refresh|id|wandb|huggingface|github)[_-]?token)(?:$|[_\-.])"
    r"|passw(?:or)?d(?:$|[_\-.])"  # PGPASSWORD, too
    r"|[_\-.]pwd$|(?-i:^[pP]wd$)"  # but PWD is the shell's folder
    r"|^token$|(?-i:_TOKEN$)",  # any variable of the environment, but not `eos_token`
    re.IGNORECASE,
)
_WEAK_NAME = re.compile(r"^(?:sig|(?:x[_\-][a-z]+[_\-])?signature)$|(?-i:(?<!PUBLIC)_KEY$)", re.IGNORECASE)
"""Names that code uses for other things, too; their values are secret where they look like a signature or a key."""
_WEAK_VALUE = re.compile(r"[A-Za-z0-9+/=_%\-.~]{8,}(?![^\s&#'\"<>,;)\]}\\])")
_WEAK_LINE = re.compile(r"[A-Za-z0-9+/=_%\-.~]{16,}(?=[ \t\r]*$)", re.MULTILINE)
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_SECRET_VALUE = re.compile(
    r"(?:\b|(?<=\\[nrt])|(?<=%[0-9A-Fa-f][0-9A-Fa-f]))(?:"  # a word, or behind an escaped space or mark
    r"hf_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|wandb_v\d_[A-Za-z0-9_]{20,}"  # wandb, since 2025
    r"|sk-[A-Za-z0-9_\-]{16,}"  # OpenAI-like
    r"|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|gl(?:pat|oas|dt|rtr?|cbt|ptt|ft|imt|agent|soat)-[A-Za-z0-9_\-]{20,}"  # GitLab
    r"|AKIA[0-9A-Z]{16}\b"  # AWS key id
    r"|AIza[A-Za-z0-9_\-]{30,}"  # Google
    r"|xox[a-z]-[A-Za-z0-9\-]{10,}"  # Slack
    r"|nvapi-[A-Za-z0-9_\-]{16,}"  # NVIDIA
    r"|eyJ[A-Za-z0-9_\-]{8,}(?:\.[A-Za-z0-9_\-]*){2,4}"  # JSON web tokens
    r")"
    r"|-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"  # PEM, whole or cut off
    r"(?:(?s:.{0,20000}?)-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----"
    r"|(?:(?:\s|\\{1,8}[nr])+[A-Za-z0-9+/=]{16,})*)"
    r"|(?:(?<=[?&;][kK]ey=)|(?<=\\u0026key=)|(?<=%26key%3D)|(?<=%3Fkey%3D))[^\s&#'\"<>;]{8,}"  # of a URL's query
    r"|(?<=://)[^/\s:@\"'<>]*:[^/\s\"'<>]+(?=@)"  # user:password of a URL
    r"|(?:(?<=http://)|(?<=https://))[^/\s?#\"'<>]+(?=@)"  # a token in place of both
    r"|(?<=Bearer )[A-Za-z0-9._\-]{16,}|(?<=uthorization: bearer )[A-Za-z0-9._\-]{16,}"
    r"|(?<=uthorization: Basic )[A-Za-z0-9+/]{8,}={0,2}"
)
_NAME = r"[A-Za-z0-9_.\-]{1,100}"
_NAMED = re.compile(
    rf"(?P<quote>\\{{0,8}}[\"'])(?P<key>{_NAME})(?P=quote)\s*[:=]\s*"  # JSON, escaped or not, and Python's dicts
    rf"|(?:%26|%3[Ff])(?P<encoded>{_NAME})%3[Dd]"  # a URL within a URL
    rf"|(?:\\u0026|(?<![A-Za-z0-9_.\-]))(?P<field>{_NAME})="  # a URL's query, a keyword argument, a variable
    rf"|(?<!\S)--?(?P<option>{_NAME})[ \t]+(?!-)"
    rf"|^[ \t]*(?:-[ \t]+)?(?P<line>{_NAME}):[ \t]+"  # YAML
    rf"|(?<![A-Za-z0-9_.\-])(?P<header>[A-Za-z0-9]+[_\-]{_NAME}):[ \t]*",
    re.MULTILINE,
)
"""A name before its value. One word and a colon inside a line are left alone, since they are prose (`token: ...`)."""
_QUOTED_VALUE = re.compile(
    r"(?P<open>[bru]{0,2}(?P<escaped>\\{1,8}[\"']))(?:(?!(?P=escaped)).)*"
    r"|[bru]{0,2}\"(?:\\.|[^\"\\\n])*|[bru]{0,2}'(?:\\.|[^'\\\n])*|[\[(][^\])\n]*"
)
_OPENING = re.compile(r"[bru]{0,2}\\{0,8}[\"'\[(]")
_BARE_VALUES = {
    "key": re.compile(r"[^\s,;&}\])\"']+"),
    "line": re.compile(r"[^\n]+"),
    "encoded": re.compile(r"(?:(?!%26)[^\s&#'\"])+"),
}
_BARE_VALUE = re.compile(r"[^\s&#'\"]+")
_SCHEME = re.compile(r"(?:bearer|basic|token)[ \t]+(?=\S)", re.IGNORECASE)
_NO_SECRET = re.compile(r"(?:none|null|true|false)?[,;.)\]}]*$", re.IGNORECASE)
_HEX_40 = re.compile(r"\b[0-9a-f]{40}\b")  # an old wandb key; also what a git commit looks like
_HASH_NAME = re.compile(r"revision|commit|sha|hash|digest|version", re.IGNORECASE)
_SHORTEST = 8
"""Shorter environment values are not searched for, since they would match ordinary words."""


def redact(value: Any, *, name: str = "", keep_hashes: bool = False) -> Any:
    """A copy of nested data with every secret replaced by `[redacted]`.

    Args:
        value: mappings, lists, tuples and scalars; not changed.
        name: the key that holds `value`; it may mark a secret (`api_key`) or exclude one (`revision`).
    """
    return _redacted(value, name, keep_hashes, _environment_secrets())


def _redacted(value: Any, name: str, keep_hashes: bool, secrets: Sequence[str]) -> Any:
    if isinstance(value, Mapping):
        return {
            _cleaned(key, secrets, keep_hashes=True) if isinstance(key, str) else key: _redacted(
                item, str(key), keep_hashes, secrets
            )
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_redacted(item, name, keep_hashes, secrets) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if value != "" and is_secret_name(name):
        return REDACTED
    if isinstance(value, str) and _WEAK_NAME.search(name) and _WEAK_VALUE.fullmatch(value):
        return REDACTED
    if isinstance(value, int | float):
        return value
    text = str(value)
    cleaned = _cleaned(text, secrets, keep_hashes=keep_hashes or bool(_HASH_NAME.search(name)))
    return value if cleaned == text else cleaned


def redact_text(text: str, *, keep_hashes: bool = False) -> str:
    """Free text with every secret replaced.

    Args:
        keep_hashes: keep 40-digit hexadecimal numbers, because they are known to be commits.
    """
    return _cleaned(text, _environment_secrets(), keep_hashes=keep_hashes)


def _cleaned(text: str, secrets: Sequence[str], *, keep_hashes: bool) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _without_named(_SECRET_VALUE.sub(REDACTED, text))
    return text if keep_hashes else _HEX_40.sub(REDACTED, text)


def _without_named(text: str) -> str:
    """The text without values that follow secret names, as in `?api_key=...`."""
    parts, end = [], 0
    for match in _NAMED.finditer(text):
        kind = match.lastgroup or ""
        weak = not is_secret_name(match[kind])
        if match.start() < end or (weak and not _WEAK_NAME.search(match[kind])):
            continue
        start, stop = _value(text, match.end(), kind)
        if weak:
            value = (_WEAK_LINE if kind == "line" else _WEAK_VALUE).match(text, start, stop)
            stop = value.end() if value else start
        if not _NO_SECRET.match(text[start:stop].strip()):
            parts += [text[end:start], REDACTED]
            end = stop
    return "".join([*parts, text[end:]])


def _value(text: str, start: int, kind: str) -> tuple[int, int]:
    """Start and end of a value, without its quotes; empty for a nested object, which has names of its own."""
    opening = _OPENING.match(text, start)
    quoted = _QUOTED_VALUE.match(text, start) if opening and not text.startswith(REDACTED, start) else None
    begin = opening.end() if opening and quoted else start
    if scheme := _SCHEME.match(text, begin):
        begin = scheme.end()
    if quoted:
        return begin, quoted.end()
    if text.startswith("{", begin):
        return begin, begin
    value_start = begin + len(REDACTED) if text.startswith(REDACTED, begin) else begin
    bare = _BARE_VALUES.get(kind, _BARE_VALUE).match(text, value_start)
    return begin, bare.end() if bare else value_start


def redacted_command(words: Sequence[str]) -> str:
    """A command line for a record or a tracker, quoted for a shell; see `redact_arguments`."""
    return shlex.join(redact_arguments(words))


def redact_arguments(words: Sequence[str]) -> list[str]:
    """The words of a command line with every secret replaced, including values of options with secret names.

    Args:
        words: `--judge.api-key VALUE` and `--judge.api-key=VALUE` are both recognised.
    """
    cleaned, hides = [], False
    for word in words:
        name, separator, _ = word.partition("=")
        option = name.startswith("-")
        if hides and not option:
            cleaned.append(REDACTED)
        elif option and separator and is_secret_name(name.lstrip("-")):
            cleaned.append(f"{name}={REDACTED}")
        else:
            cleaned.append(redact_text(word, keep_hashes=bool(_HASH_NAME.search(name))))
        hides = option and not separator and is_secret_name(name.lstrip("-"))
    return cleaned


@contextmanager
def redacted_argv() -> Iterator[None]:
    """`sys.argv` without secrets inside the block, for libraries that record it."""
    before = sys.argv
    sys.argv = redact_arguments(before)
    try:
        yield
    finally:
        sys.argv = before


class RedactingFormatter(logging.Formatter):
    """Formats log lines and tracebacks with every secret replaced."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        return redact_text(super().format(record), keep_hashes=True)


def redacted_traceback(error: BaseException) -> str:
    """An exception with its traceback and its causes, for a log; every secret replaced."""
    return redact_text("".join(traceback.format_exception(error)).rstrip())


@functools.lru_cache(maxsize=4096)
def is_secret_name(name: str) -> bool:
    """Whether a key or variable of this name holds a secret; `tokens_per_image` and `max_tokens` do not."""
    return bool(_SECRET_NAME.search(_CAMEL.sub("_", name)))


def _environment_secrets() -> list[str]:
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and (is_secret_name(name) or _WEAK_NAME.search(name))
    }
    forms = {form for value in values if not os.path.exists(value) for form in _spellings(value)}
    return sorted(forms, key=len, reverse=True)


@functools.lru_cache(maxsize=256)
def _spellings(secret: str) -> frozenset[str]:
    """The spellings of a secret in JSON, Python, HTML and URLs, and those of these spellings in JSON."""
    python = secret.encode("unicode_escape").decode()
    forms = {secret, *_as_json(secret), repr(secret)[1:-1], python, html.escape(secret), shlex.quote(secret)}
    forms |= {python.replace("'", "\\'"), repr(secret)[1:-1].replace("'", "\\'")}
    for quoted in (quote(secret, safe="", errors="replace"), quote(secret, errors="replace"),
                   quote_plus(secret, errors="replace")):  # fmt: skip
        forms |= {quoted, re.sub(r"%[0-9A-F]{2}", lambda code: code[0].lower(), quoted)}
    return frozenset(forms.union(*map(_as_json, forms)))


def _as_json(text: str) -> set[str]:
    return {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
