"""Several runs on one page: overlaid curves, one colour per run, and conclusions from the intervals only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from browser import CHROMIUM, MISSING, browsing

from mm_moslora.cli import run
from mm_moslora.reporting import build_report
from mm_moslora.reporting.overlay_page import names_of
from mm_moslora.reporting.run_data import load_run
from mm_moslora.utils.errors import ConfigError


@pytest.fixture
def two(run_folder: Path) -> tuple[Path, Path]:
    """The run of the other tests, and a worse one with another rank."""
    (run_folder / "tune" / "config.yaml").write_text("adapter: {rank: 8}\noptim: {lr: 1e-4}\n")
    other = run_folder.parent / "other"
    shutil.copytree(run_folder, other)
    (other / "tune" / "config.yaml").write_text("adapter: {rank: 16}\noptim: {lr: 1e-4}\n")
    rows = json.loads((other / "evaluation.json").read_text())
    for row in rows:
        if row["name"] == "tuned":
            row |= {"mean": 0.4, "low": 0.33, "high": 0.47}
    (other / "evaluation.json").write_text(json.dumps(rows))
    samples = json.loads((other / "samples.json").read_text())
    samples[0] |= {"after": "navy", "after_correct": False}
    (other / "samples.json").write_text(json.dumps(samples))
    return run_folder, other


def test_scores_curves_samples_and_differences_are_side_by_side(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = build_report(two, tmp_path / "both.html").read_text()
    assert "<h1>2 runs</h1>" in page
    assert "run is best: its interval overlaps no other." in page
    assert page.count('class="whisker"') == 8
    assert page.count("stroke: var(--c1)") >= 4
    assert "<code>adapter.rank</code>" in page
    assert "<code>optim.lr</code>" not in page  # alike in both
    assert '<span class="mark no">navy</span>' in page
    assert '<img src="x"' not in page


def test_a_run_has_one_colour_in_all_charts(two: tuple[Path, Path], tmp_path: Path) -> None:
    """The colour is the same in a chart without data of the first run."""
    path = two[0] / "tune" / "metrics.jsonl"
    path.write_text("".join(line + "\n" for line in path.read_text().splitlines() if "validation_loss" not in line))
    page = build_report(two, tmp_path / "both.html").read_text()
    tuned = [part for part in page.split("<figure ") if "Validation loss</figcaption>" in part][-1]
    assert ("stroke: var(--c1)" in tuned, "var(--c0)" in tuned) == (True, False)


def test_overlapping_intervals_show_no_difference(two: tuple[Path, Path], tmp_path: Path) -> None:
    rows = json.loads((two[1] / "evaluation.json").read_text())
    next(row for row in rows if row["name"] == "tuned").update(mean=0.84, low=0.79, high=0.89)
    (two[1] / "evaluation.json").write_text(json.dumps(rows))
    page = build_report(two, tmp_path / "both.html").read_text()
    assert "can be called best by these intervals, which overlap" in page


def test_the_best_run_is_compared_with_every_interval(two: tuple[Path, Path], tmp_path: Path) -> None:
    """The third run has the lowest mean, and an interval that reaches the best one's."""
    third = tmp_path / "third"
    shutil.copytree(two[1], third)
    rows = json.loads((third / "evaluation.json").read_text())
    next(row for row in rows if row["name"] == "tuned").update(mean=0.35, low=0.1, high=0.95)
    (third / "evaluation.json").write_text(json.dumps(rows))
    page = build_report([*two, third], tmp_path / "three.html").read_text()
    assert "None of run, third can be called best" in page


def test_scores_on_other_questions_stand_under_another_heading(two: tuple[Path, Path], tmp_path: Path) -> None:
    """Two runs on files of one name, and a run of one question: unlike rows are never one table."""
    for folder, subject in zip(two, ("a" * 16, "b" * 16), strict=True):
        rows = json.loads((folder / "evaluation.json").read_text())
        rows = [row | {"subject": subject, "protocol": "own"} for row in rows]
        small = [row | {"subject": "c" * 16, "n": 1, "selection": "first 1"} for row in rows if row["name"] == "tuned"]
        (folder / "evaluation.json").write_text(json.dumps(rows + small * (folder == two[0])))
    page = build_report(two, tmp_path / "both.html").read_text()
    assert "is best" not in page
    assert "Not compared with other: measured on other questions" in page
    assert "Not compared with run: measured on other questions" in page
    assert "shapes [aaaaaaaa]</h3>" in page
    assert "shapes [bbbbbbbb]</h3>" in page
    assert "shapes, first 1 questions</h3>" in page


def test_the_command_takes_several_runs(two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(["report", *map(str, two), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()
    before = sorted(tmp_path.iterdir())
    assert run(["report", str(two[0]), "--output", str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder; expected the file to write" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert run(["report"]) == 1
    assert run(["report", *map(str, [two[0] / str(number) for number in range(7)])]) == 1
    assert "1 to 6 runs" in capsys.readouterr().err


def test_a_run_of_a_newer_release_is_refused_and_an_older_one_is_read(run_folder: Path, tmp_path: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    assert "format" not in summary  # written before layouts had versions
    build_report(run_folder, tmp_path / "old.html")
    (run_folder / "summary.json").write_text(json.dumps(summary | {"format": 2}))
    with pytest.raises(ConfigError, match="run format 2, this release reads up to 1"):
        build_report(run_folder, tmp_path / "new.html")


@pytest.mark.parametrize("good", [1, 2])
def test_a_run_that_cannot_be_read_is_named_beside_the_others(good: int, two: list[Path], tmp_path: Path) -> None:
    newer, empty = tmp_path / "newer", tmp_path / "empty"
    for folder in (newer, empty):
        folder.mkdir()
    (newer / "summary.json").write_text('{"format": 99}')
    page = build_report([newer, *two[:good], empty], tmp_path / "page.html").read_text()
    assert f"{newer} is left out: {newer / 'summary.json'} has run format 99" in page
    assert f"{empty} is left out: {empty} holds none of summary.json" in page
    for folders in ([newer, empty], [*two, tmp_path / "absent"]):
        with pytest.raises(ConfigError, match=r"holds none of|is not a folder"):
            build_report(folders, tmp_path / "page.html")


def test_the_environment_of_a_run_without_a_full_summary_is_shown(run_folder: Path, tmp_path: Path) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    del summary["environment"]
    (run_folder / "summary.json").write_text(json.dumps(summary))
    (run_folder / "tune" / "environment.json").write_text('{"git_commit": "abc123", "peft": "0.21.2"}')
    page = build_report(run_folder, tmp_path / "report.html").read_text()
    assert "abc123" in page


def test_runs_with_equal_folder_names_get_unique_names(tmp_path: Path, run_folder: Path) -> None:
    first, second = tmp_path / "a" / "run", tmp_path / "b" / "run"
    for folder in (first, second):
        shutil.copytree(run_folder, folder)
    assert names_of([load_run(first), load_run(second)]) == ["a/run", "b/run"]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_in_a_browser(two: tuple[Path, Path], tmp_path: Path) -> None:
    page = build_report(two, tmp_path / "both.html")
    with browsing(tmp_path / "profile") as browser:
        browser.open(page.as_uri())
        assert browser.run("document.querySelectorAll('figure.chart').length") >= 4
        assert browser.run("document.getElementById('scheme').hidden") is False
        browser.run("document.getElementById('samples').scrollIntoView()")
        browser.wait("[...document.images].every(image => image.complete && image.naturalWidth)")
        assert browser.run("document.documentElement.scrollWidth") <= 1280
        browser.open(page.as_uri(), width=400)
        assert browser.run("document.documentElement.scrollWidth") <= 400
        assert browser.errors == []


def test_a_report_replaces_only_reports(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        build_report(run_folder, page)
    page.write_text("<h1>mine</h1>")
    with pytest.raises(ConfigError, match=r"page\.html exists and is not replaced"):
        build_report(run_folder, page)
    assert page.read_text() == "<h1>mine</h1>"
