"""The page of reproduced scores holds what its two tables say."""

from __future__ import annotations

import csv

from marked_text import parts_of
from scores_reproduced import DATA, PAGE, summary


def test_the_page_sums_its_tables_up() -> None:
    tables = [list(csv.reader((DATA / f"{name}.csv").open())) for name in ("scores_reproduced", "other_rules")]
    text = PAGE.read_text("utf-8")
    assert parts_of(text, "summary")[1] == f"{summary(*tables)}\n", "run scripts/scores_reproduced.py --write"
    rows = tables[0][1:]
    equal = sum(row[3] == row[4] and row[5] in "0-" for row in rows)
    assert f"{equal} of {len(rows)} scores are the published ones in every digit" in text
