"""The page of a comparison: marks stand where the numbers say, every state has a page, and any width shows it."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, MISSING, browsing
from comparison_results import NAMES, comparison_results

from mm_moslora.reporting.comparison.comparison_page import draw, render, write_page
from mm_moslora.utils.errors import ConfigError

HOSTILE = '<img src="x" onerror="alert(1)">@rank=</title></svg><script>alert(2)</script>{{ 7*7 }}'


def plots(page: str) -> list[tuple[str, str]]:
    """Description and content of every chart."""
    found = re.findall(r'<svg class="plot"[^>]* aria-label="([^"]*)"[^>]*>(.*?)</svg>', page, re.DOTALL)
    return [(unescape(label), marks) for label, marks in found]


def told(marks: str) -> list[str]:
    """What marks show under the pointer."""
    return [unescape(title) for title in re.findall(r"<title>(.*?)</title>", marks)]


def test_rows_tell_their_difference_and_the_band_its_meaning() -> None:
    page = render(comparison_results())
    label, marks = plots(page)[0]
    assert label.startswith("Score: points against lora: lora: reference points. moslora:orthogonal: +5.0 [+2.0, +8.0]")
    assert told(marks)[:2] == ["lora: reference points", "moslora:orthogonal: +5.0 [+2.0, +8.0] points, better, p 0.02"]
    assert "var(--good)" in marks, "the difference is shown"
    assert "Shaded: ±3 points, about what the paper reports for MoSLoRA (+2.8)." in page
    assert "nats against lora" in page


@pytest.mark.parametrize(
    "change",
    [{"arms": None}, {"arms": [5]}, {"settings": {}}, {"runs": "x"}, {"comparisons": [{}]}, {"runs": {"planned": "x"}}],
    ids=str,
)
def test_a_damaged_file_is_one_clear_error(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(comparison_results() | change))
    with pytest.raises(ConfigError, match=r"results\.json is damaged \(.*--only-report. writes it again"):
        write_page(tmp_path / "results.json", tmp_path / "report.html")
    for text in ('{"format"', "[]"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ConfigError, match=r"results\.json (is not valid JSON|holds a list)"):
            write_page(tmp_path / "results.json", tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def failed_arm(results: dict[str, Any]) -> None:
    results["arms"][2] |= {"tasks": {}, "nats": {}, "cost": None}
    for seed in results["arms"][2]["seeds"]:
        seed["status"] = "failed"
    results["comparisons"] = [row for row in results["comparisons"] if row["arm"] != NAMES[2]]
    results["failures"] = [{"arm": NAMES[2], "rate": 1e-3, "seed": 0, "status": "failed", "reason": "no memory"}]


def no_reference(results: dict[str, Any]) -> None:
    results["arms"][0] |= {"tasks": {}, "nats": {}, "cost": None, "seeds": []}
    results["comparisons"] = []


def nothing_yet(results: dict[str, Any]) -> None:
    for arm in results["arms"]:
        arm |= {"tasks": {}, "nats": {}, "cost": None, "seeds": [], "rate": None, "curve": [], "edge": False}
    results["comparisons"], results["floors"] = [], {}
    results["runs"]["over"] = 0


def not_finite(results: dict[str, Any]) -> None:
    results["arms"][1]["tasks"]["kind"] |= {"mean": math.nan, "low": -math.inf, "seeds": [math.nan]}
    results["arms"][2]["tasks"]["kind"] |= {"stderr": math.nan, "low": math.nan, "high": math.inf}
    results["arms"][3]["curve"][0]["value"] = math.inf
    results["comparisons"][1] |= {"difference": math.nan, "low": math.nan, "high": math.nan, "p_corrected": math.nan}
    results["comparisons"][2]["nats"]["own"] |= {"low": None, "high": None, "p_corrected": None}


def far_away(results: dict[str, Any]) -> None:
    for row in results["comparisons"][3::4]:
        row |= {"difference": -0.6, "low": -0.65, "high": -0.55, "verdict": "worse"}


def all_alike(results: dict[str, Any]) -> None:
    for arm in results["arms"]:
        for measure in arm["tasks"].values():
            measure |= {"mean": 1.0, "low": 1.0, "high": 1.0, "seeds": [1.0] * 3, "stderr": 0.0}
    for row in results["comparisons"]:
        row |= {"difference": 0.0, "low": 0.0, "high": 0.0}


STATES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "an arm failed": ({}, failed_arm, "all 3 runs failed"),
    "the reference is missing": ({}, no_reference, "not measured yet"),
    "nothing has run": ({}, nothing_yet, "Unfinished: 0 of 35 runs"),
    "numbers that are not finite": ({}, not_finite, "error unknown"),
    "an arm far away": ({}, far_away, "Arrow: goes on beyond the axis."),
    "all arms alike": ({}, all_alike, "100.0 ± 0.0"),
    "one seed": ({"seeds": 1}, None, "1 of 1"),
    "no references": ({"nats": False}, None, "no likelihood: the task has no reference answers"),
    "one task": ({"tasks": ("test",)}, None, "Difference to lora: test"),
    "five tasks": ({"tasks": tuple("abcde")}, None, "Difference to lora: e"),
    "not tuned": ({"tuned": False}, None, "The learning rate was not tuned"),
    "one arm": ({"names": ("lora",)}, None, "1 arm<"),
    "thirty arms": ({"names": tuple(f"arm{n}" for n in range(30))}, None, "30 arms<"),
    "hostile names": ({"names": ("lora", HOSTILE, "a&b")}, None, "a&amp;b"),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_comparison_has_a_page(state: str, tmp_path: Path) -> None:
    arguments, change, text = STATES[state]
    results = comparison_results(**{"names": NAMES[:5]} | arguments)
    if change is not None:
        change(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path / "results.json", tmp_path / "report.html").read_text()
    assert text in page
    drawn = plots(page)
    assert bool(drawn) == (state != "nothing has run")
    assert not [marks for _, marks in drawn if re.search(r"\bnan\b|\binf\b|None", marks)]
    assert "<img src=" not in page
    assert "<script>alert" not in page
    assert "7*7" in page or state != "hostile names"
    assert ("no-likelihood" in page, "nats against" in page) == (False, bool(drawn) and state not in (
        "no references", "the reference is missing", "one arm"))  # fmt: skip
    (mine := tmp_path / "mine").write_text("years")
    (tmp_path / "picture.png").hardlink_to(mine)
    draw([("", results), ("again", results)], tmp_path / "picture.png")
    assert mine.read_text() == "years"
    compared = state not in ("nothing has run", "the reference is missing", "one arm")
    assert (tmp_path / "picture.png").samefile(mine) != compared


def test_a_page_of_a_stranger_stays(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "report.html"
    results.write_text(json.dumps(comparison_results(NAMES[:3])))
    page.write_text("my own notes")
    with pytest.raises(ConfigError, match="is not replaced"):
        write_page(results, page)
    assert page.read_text() == "my own notes"
    page.unlink()
    assert write_page(results, page).read_text() == write_page(results, page).read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_every_width_shows_everything(tmp_path: Path) -> None:
    results = comparison_results((*NAMES, HOSTILE, "peft:" + "X" * 60))
    far_away(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path / "results.json", tmp_path / "report.html")
    with browsing(tmp_path / "profile") as tab:
        for width in (400, 720, 1030, 1200):
            tab.open(page.as_uri(), width=width)
            assert tab.run("document.documentElement.scrollWidth") <= width
            ends = tab.run(
                "[...document.querySelectorAll('.plot text, .rate, .legend li')]"
                ".map(part => { const box = part.getBoundingClientRect(); return [box.left, box.right, box.height]; })"
            )
            assert len(ends) > 200
            assert min(left for left, _, _ in ends) >= 0
            assert max(right for _, right, _ in ends) <= width
            assert min(height for *_, height in ends) > 9, "too small to read"
        assert not tab.errors
