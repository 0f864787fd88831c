"""NLVR2: the parts of a statement's identifier as columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_IDENTIFIER = re.compile(r"(?P<split>.+?)-(?P<set>.+?)-(?P<pair>.+?)-(?P<sentence_number>.+?)", re.S)


def statement(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The row with the columns `split`, `set`, `pair` and `sentence_number`."""
    parts = _IDENTIFIER.fullmatch(str(row.get("identifier")))
    if parts is None:
        raise ValueError(
            f"identifier is {row.get('identifier')!r}, expected the form {{split}}-{{set}}-{{pair}}-{{sentence_number}}"
        )
    return [{**row, **parts.groupdict()}]


ROWS = {"nlvr2_statement": statement}
