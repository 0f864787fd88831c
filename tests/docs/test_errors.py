"""docs/errors.md explains every fault code of a record and every exit status."""

from __future__ import annotations

import re

from mm_moslora.data.record_faults import Code
from mm_moslora.utils.errors import ExitStatus
from tests.docs.blocks import ROOT


def test_every_code_and_status_has_a_row() -> None:
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    first_cells = re.findall(r"^\| (.+?) \|", text, re.MULTILINE)
    named = [word.strip("`") for cell in first_cells for word in cell.split(", ")]
    assert {code for code in named if re.fullmatch(r"[A-Z_]+", code)} == set(Code)
    assert {int(word) for word in named if word.isdigit()} == {0, *ExitStatus}
