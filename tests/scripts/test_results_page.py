"""The pages of results: one table and one picture of one or several comparisons, written between markers."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from comparison_results import NAMES, comparison_results
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "scripts" / "results_page.py"
RANKS = ("lora@rank=4", "moslora@rank=4@targets=q|v")
OLD = "# Title\n\nIntroduction.\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nReading.\n"


def write(page: Path, *runs: Path | str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPT, *runs, page], capture_output=True, text=True, timeout=240, check=False
    )


def run_of(folder: Path, names: tuple[str, ...]) -> Path:
    results = comparison_results(names)
    results["comparisons"][-1] |= {"low": math.nan, "high": math.nan}
    results["command"] = "mm-moslora compare --tasks llava:/w/runs/a.jsonl,llava:/w/runs/b.jsonl@/w/runs/c"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_two_comparisons_share_a_table_and_a_picture(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(OLD)
    runs = [run_of(tmp_path / "arms", NAMES), run_of(tmp_path / "ranks", RANKS)]
    found = write(page, f"Rank 16={runs[0]}", runs[1])
    assert found.returncode == 0, found.stderr
    text = page.read_text()
    assert text.startswith(
        "# Title\n\nIntroduction.\n\n<!-- results:begin -->\n| arm | rate | parameters | score | points"
    )
    assert text.endswith(".\n<!-- results:end -->\n\nReading.\n")
    assert "\nold\n" not in text
    assert [line.split(" | ")[0][2:] for line in text.splitlines()[7:] if line.startswith("|")] == [
        "**Rank 16: all tasks**", *(f"`{name}`" for name in NAMES),
        "**ranks: all tasks**", *(f"`{name}`".replace("|", "\\|") for name in RANKS),
    ]  # fmt: skip
    assert " | 70.4 ± 1.2 | +5.0 [+2.0, +8.0], better, p 0.02 |" in text
    columns = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")}
    assert len(columns) == 1, "every row of a table has the cells of its head"
    with Image.open(tmp_path / "page.png") as drawn:
        assert drawn.width == 1440
        assert 1000 < drawn.height < 4000
        assert len(drawn.convert("RGB").getcolors(10**6) or []) > 50
    assert write(page, f"Rank 16={runs[0]}", runs[1]).returncode == 0
    assert page.read_text() == text, "the same call again changes nothing"
    assert write(page, runs[0]).returncode == 0
    assert "--tasks llava:runs/a.jsonl,llava:runs/b.jsonl@runs/c\n```" in page.read_text()


def test_what_cannot_be_written_is_one_clear_error_and_changes_nothing(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n")
    found = write(page, run_of(tmp_path / "arms", NAMES))
    assert found.returncode != 0
    assert found.stderr.startswith("The page has no line <!-- results:begin -->")
    assert page.read_text() == "# Title\n"
    assert write(page, tmp_path / "nothing").stderr.startswith(
        f"{tmp_path / 'nothing' / 'results.json'} does not exist"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arms", "page.md"]
