"""The page of a comparison: marks stand where the numbers say, every state has a page, and any width shows it."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, MISSING, browsing
from comparison_results import NAMES, comparison_results

from mm_moslora.reporting.comparison_curves import apart
from mm_moslora.reporting.comparison_page import picture, render, write_page
from mm_moslora.utils.errors import ConfigError

HOSTILE = '<img src="x" onerror="alert(1)">@rank=</title></svg><script>alert(2)</script>{{ 7*7 }}'
PLOT = re.compile(r'<svg class="area" role="img"><title>(.*?)</title>(.*?)</svg>(?=</div>|\n)', re.DOTALL)


def plots(page: str) -> list[tuple[str, str]]:
    """Title and marks of every plot."""
    return [(unescape(title), marks) for title, marks in PLOT.findall(page)]


def places(marks: str, style: str, axis: str = "x1") -> list[float]:
    """Where lines of a class stand, in percent."""
    return [float(x) for x in re.findall(rf'<line class="{style}"[^>]*? {axis}="([\d.-]+)%"', marks)]


def squares(marks: str) -> list[tuple[float, float]]:
    found = re.findall(r'<svg x="([\d.-]+)%" y="([\d.-]+)%" overflow="visible"><rect class="mean"', marks)
    return [(float(x), float(y)) for x, y in found]


def test_marks_of_the_forest_plot_stand_where_the_numbers_say() -> None:
    """The second arm is ahead by 5.0 points [2.0, 8.0], and the band is the planned ±3."""
    page = render(comparison_results(points=0.03))
    (marks,) = [
        marks for title, marks in plots(page) if title.startswith("moslora:orthogonal: +5.0 [+2.0, +8.0] points")
    ][:1]
    (zero,), (left,), (right,) = places(marks, "zero"), places(marks, "interval"), places(marks, "interval", "x2")
    ((middle, height),) = squares(marks)
    point = (middle - zero) / 5
    assert [left, right] == pytest.approx([zero + 2 * point, zero + 8 * point], abs=0.02)
    assert height == 50
    start, width = map(float, re.findall(r'class="band" x="([\d.]+)%" width="([\d.]+)%"', marks)[0])
    assert start == pytest.approx(zero - 3 * point, abs=0.02)
    assert width == pytest.approx(6 * point, abs=0.02)
    assert '<g class="good">' in marks, "the difference is shown, so the square is filled"
    assert "the difference that --resolve 3 planned to show" in page
    assert "nats against lora" in page
    assert "about what the paper reports" in render(comparison_results())
    parts = [("", comparison_results(points=0.03)), ("", comparison_results(points=0.02))]
    assert "about what the paper reports" in picture(parts), "two plans have no band in common"


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


def test_seeds_are_points_beside_their_mean() -> None:
    results = comparison_results(("lora",), tasks=("test",), nats=False, tuned=False)
    measure = results["arms"][0]["tasks"]["test"]
    measure |= {"mean": 0.6, "low": 0.5, "high": 0.7, "seeds": [0.48, 0.6, 0.72]}
    results["floors"]["test"]["majority"] = 0.525
    ((title, marks),) = plots(render(results))
    assert title == "lora: 60.0 ± 1.2 percent; seeds 48, 60, 72"
    seeds = [float(x) for x in re.findall(r'x="([\d.]+)%" y="50.00%" overflow="visible"><circle', marks)]
    (left,), (right,), (floor,) = places(marks, "interval"), places(marks, "interval", "x2"), places(marks, "floor")
    assert [(seed - left) / (right - left) for seed in seeds] == pytest.approx([-0.1, 0.5, 1.1], abs=0.001), (
        "also beyond it"
    )
    assert (floor - left) / (right - left) == pytest.approx(0.125, abs=0.001)


def test_rates_have_a_chart_per_arm_with_the_chosen_rate_and_the_edge() -> None:
    results = comparison_results(("lora", "tsm"))
    curve = [
        {"rate": rate, "seed": 0, "value": value, "status": "ok"}
        for rate, value in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 1.0))
    ]
    results["arms"][0] |= {"rate": 1e-2, "edge": True, "curve": curve}
    broken = [curve[0], curve[1], {"rate": 1e-2, "seed": 0, "value": None, "status": "diverged"}]
    results["arms"][1] |= {"rate": 1e-3, "edge": False, "curve": broken}
    page = render(results)
    first, second = [marks for title, marks in plots(page) if "by learning rate" in title]
    found = [places(first, "curve", key) for key in ("x1", "y1", "x2", "y2")]
    assert found[0][1] == found[2][0], "the lines join"
    assert found[0][1] - found[0][0] == pytest.approx(found[2][1] - found[2][0], abs=0.02), "decades have one width"
    assert found[1][1] - found[1][0] == pytest.approx(found[3][1] - found[3][0], abs=0.02)
    assert found[1][0] < found[3][1], "the larger loss is above"
    assert ('class="arrow"' in first, 'class="arrow"' in second) == (True, False)
    assert ('class="failed"' in first, 'class="failed"' in second) == (False, True)
    assert "chosen 0.01, <strong>an edge of the grid</strong>" in page
    assert "0.0001: 3; 0.001: 2; 0.01: failed" in page
    assert "chosen 0.01, an edge of the grid; 0.0001: 3; 0.001: 2; 0.01: 1" in page


def test_arms_of_equal_cost_stand_side_by_side_and_lead_to_their_cost() -> None:
    results = comparison_results(("lora", "tsm", "dora", "lora@rank=64"))
    marks = next(marks for title, marks in plots(render(results)) if title == "Score, percent, by trained parameters")
    found = [x for x, _ in squares(marks)]
    assert [b - a for a, b in pairwise(found)][:2] == pytest.approx([4, 4], abs=0.02)
    assert found[3] > 60
    ends = places(marks, "leader", "x2")[1::2]
    assert len(set(ends[:3])) == 1, "the thin lines of equal costs meet on the axis"
    assert ends[0] == pytest.approx(sum(found[:3]) / 3, abs=0.02)


def test_places_are_moved_as_little_as_possible() -> None:
    assert apart([10, 50, 90], 5) == [10, 50, 90]
    assert apart([50, 50, 50], 4) == pytest.approx([46, 50, 54])
    assert apart([99, 20, 100], 4) == pytest.approx([96, 20, 100])
    assert apart([0, 0, 100], 4) == pytest.approx([0, 4, 100])
    crowd = apart([50.0] * 40, 4)
    assert min(crowd) >= 0
    assert max(crowd) <= 100
    assert min(b - a for a, b in pairwise(crowd)) == pytest.approx(2.5)


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
    for row in results["comparisons"][4::13]:
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
    "nothing has run": ({}, nothing_yet, "Unfinished: 0 of 98 runs"),
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
    results = comparison_results(**arguments)
    if change is not None:
        change(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path / "results.json", tmp_path / "report.html").read_text()
    assert text in page
    drawn = plots(page)
    assert bool(drawn) == (state != "nothing has run")
    assert not [marks for _, marks in drawn if re.search(r"nan|inf\b|None", marks, re.IGNORECASE)]
    assert not [
        x for _, marks in drawn for x in re.findall(r' [xy][12]?="(-?[\d.]+)%"', marks) if not 0 <= float(x) <= 100
    ]
    assert "<img src=" not in page
    assert "<script>alert" not in page
    assert "7*7" in page or state != "hostile names"
    assert ("no-likelihood" in page, "nats against" in page) == (False, bool(drawn) and state not in (
        "no references", "the reference is missing", "one arm"))  # fmt: skip
    picture([("", results), ("again", results)])


def test_a_page_of_a_stranger_stays(tmp_path: Path) -> None:
    results, page = tmp_path / "results.json", tmp_path / "report.html"
    results.write_text(json.dumps(comparison_results()))
    page.write_text("my own notes")
    with pytest.raises(ConfigError, match="is not replaced"):
        write_page(results, page)
    assert page.read_text() == "my own notes"
    page.unlink()
    assert write_page(results, page).read_text() == write_page(results, page).read_text()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_every_width_shows_everything(tmp_path: Path) -> None:
    results = comparison_results((*NAMES, HOSTILE, "peft:" + "X" * 60), points=0.03)
    far_away(results)
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = write_page(tmp_path / "results.json", tmp_path / "report.html")
    with browsing(tmp_path / "profile") as tab:
        for width in (400, 720, 1030, 1200):
            tab.open(page.as_uri(), width=width)
            assert tab.run("document.documentElement.scrollWidth") <= width
            ends = tab.run(
                "[...document.querySelectorAll('.row b, .value, .area text, .rate, .legend li')]"
                ".map(part => { const box = part.getBoundingClientRect(); return [box.left, box.right, box.height]; })"
            )
            assert len(ends) > 200
            assert min(left for left, _, _ in ends) >= 0
            assert max(right for _, right, _ in ends) <= width
            assert tab.run("Math.min(...[...document.querySelectorAll('.cell .area')].map(e => e.clientWidth))") > 100
            close = tab.run(
                "[...document.querySelectorAll('.scales .area')].map(area => [...area.querySelectorAll('text')]"
                ".map(text => { const box = text.getBoundingClientRect(); return [box.left, box.right]; }))"
            )
            assert not [row for row in close if any(a[1] > b[0] for a, b in pairwise(row))], "labels of an axis overlap"
        assert not tab.errors
