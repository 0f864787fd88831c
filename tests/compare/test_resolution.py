"""Seeds and documents planned for a resolution, and looks that keep the error rates."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mm_moslora_eval.scoring.error_bars import t_quantile

from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_analysis import analyse
from mm_moslora.compare.comparison_plan import ComparisonSettings, choose_rates, reported_cells, run_count
from mm_moslora.compare.resolution_plan import ASSUMED, Planner, Resolution, after_look, is_decided, plan_resolution
from mm_moslora.compare.run_cost import cost_of
from mm_moslora.compare.seed_statistics import Components, TaskScores, difference
from mm_moslora.compare.sequential_looks import (
    FILE,
    Judged,
    Looks,
    LookState,
    judge,
    nominal_levels,
    planned_looks,
    read_state,
)
from mm_moslora.config import ModelConfig, Recipe
from mm_moslora.utils.errors import ConfigError
from tests.compare.test_comparison_controls import analysed, sees, sees_badly


def answers(generator: np.random.Generator, parts: Components, *, seeds: int, documents: int, effect: float = 0.0):
    """Scores of two arms with these components of their difference."""
    common = generator.normal(0, 1, documents)  # cancels
    own = generator.normal(0, math.sqrt(parts.documents), documents)
    arms = []
    for shift in (effect + own, 0.0):
        run = generator.normal(0, math.sqrt(parts.seeds / 2), (seeds, 1))
        arms.append(common + shift + run + generator.normal(0, math.sqrt(parts.answers / 2), (seeds, documents)))
    return arms


def between(arms, seeds: int, *, missing: Any = None):
    clusters = list(range(arms[0].shape[1]))
    rows = [arm[:seeds].copy() for arm in arms]
    for arm in rows if missing is not None else ():
        arm[missing.random(arm.shape) < 0.2] = math.nan
    return difference(*({"t": TaskScores(scores=arm, clusters=clusters)} for arm in rows), bounded=False)


@pytest.mark.parametrize("missing", [False, True])
def test_known_components_are_recovered(missing: bool):
    parts = Components(documents=0.5, seeds=0.1, answers=1.5)
    generator = np.random.default_rng(1)
    found = [
        between(answers(generator, parts, seeds=4, documents=60), 4, missing=generator if missing else None)
        for _ in range(200)
    ]
    # Of four answers of which a fifth is missing, the mean has 1.365 times the variance of four.
    expected = dataclasses.asdict(parts) | ({"answers": 1.365 * parts.answers} if missing else {})
    for name, value in expected.items():
        mean = sum(getattr(one.components, name) for one in found) / len(found)
        # An arm that looks uneven counts alone and in the mean, so that the part of the seeds is rather too large.
        assert mean == pytest.approx(value, rel=0.4 if name == "seeds" else 0.2), name
    held = sum(one.low <= 0 <= one.high for one in found) / len(found)
    assert 0.92 < held < 0.985


@pytest.mark.parametrize(
    ("fractions", "bounds"),
    [((0.2, 0.4, 0.6, 0.8, 1.0), (4.877, 3.357, 2.680, 2.290, 2.031)), ((0.5, 1.0), (2.963, 1.969))],
)
def test_levels_are_those_of_lan_and_demets(fractions: tuple[float, ...], bounds: tuple[float, ...]):
    """Published boundaries of the O'Brien and Fleming type, two-sided 5 %."""
    looks = Looks(tuple(range(1, len(fractions) + 1)), fractions)
    found = [NormalDist().inv_cdf(1 - looks.level(seeds) / 2) for seeds in looks.seeds]
    assert found == pytest.approx(bounds, abs=2e-3)
    assert Looks((3,), (1.0,)).level(3) == pytest.approx(0.05, rel=1e-3)
    for seeds in looks.seeds:
        assert looks.p_value(looks.level(seeds), seeds) == pytest.approx(0.05, rel=1e-6)
        assert looks.p_value(0.9, seeds) == 0.9
        assert math.isnan(looks.p_value(math.nan, seeds))
    assert (np.diff(nominal_levels(fractions), axis=0) >= 0).all(), "p-values rise with p"


def test_simulated_comparisons_keep_the_error_rates_and_the_power(monkeypatch: pytest.MonkeyPatch):
    """Pilot, plan and looks of 50 comparisons with three equal rivals, and of 50 with two better ones."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "bench"))
    import stopping_rule  # of scripts/bench

    world = stopping_rule.World(components=stopping_rule.SETTINGS["seeds"], rivals=3)
    equal = stopping_rule.sequential(world, 3, runs=50, seed=1)
    assert equal["false"] <= 0.1, "of the family of three"
    assert equal["naive"] > 0.1, "t-tests after each look exceed the bound"
    assert equal["held"] > 0.94
    apart = stopping_rule.sequential(dataclasses.replace(world, better=2), 3, runs=50, seed=2)
    assert apart["power"] > 0.7
    assert apart["held"] > 0.93
    assert apart["seeds"] < 0.9 * apart["planned"], "arms that are decided early stop"
    early = between(answers(np.random.default_rng(0), ASSUMED, seeds=3, documents=20), 3).at_level(1e-40)
    assert 5 < early.high < math.inf, "a look at little information has a wide interval"
    held, _ = stopping_rule.intervals(dataclasses.replace(world, rivals=7, tasks=2), 3, runs=40, seed=3)
    assert held.min() > 0.85
    assert held.mean() > 0.93


def test_a_look_that_brings_little_is_left_out():
    """Where documents make the error, further seeds bring no information."""
    looks = planned_looks(3, 9, [1.0 + 0.001 / seeds for seeds in range(3, 10)])
    assert looks == Looks((9,), (1.0,))
    apart = planned_looks(2, 10, [1 / seeds for seeds in range(2, 11)], step=3)
    assert apart.seeds == (2, 5, 8, 10)
    assert apart.fractions == pytest.approx((0.2, 0.5, 0.8, 1.0))


def test_the_plan_names_what_more_seeds_and_documents_would_do():
    planner = Planner(components=ASSUMED, points=0.03, comparisons=1, first=3)
    found, lines = plan_resolution(planner, 2000)
    assert found is not None
    assert found.detectable <= 0.03 < planner.size(found.seeds - 1, 2000).detectable
    assert found.half_width < 0.03
    assert "More seeds would cut up to 97 % of the squared error, more documents up to 14 %." in lines[0]
    assert f"For 3 points: {found.seeds:.0f} seeds on 2000 documents" in lines[1]
    narrow = planner.fewest_for_width(2000)
    assert narrow is not None
    assert narrow.half_width <= 0.03 < planner.size(narrow.seeds - 1, 2000).half_width
    assert f"A half-width of 3 points takes {narrow.seeds:.0f} seeds." in lines[0]
    none, lines = plan_resolution(dataclasses.replace(planner, comparisons=3), 40)
    assert none is None
    assert "A difference of 3 points is beyond what 40 documents allow: any number of seeds shows" in lines[1]
    assert "documents and 16 seeds" in lines[2]
    certain = dataclasses.replace(ASSUMED, documents=0.0, answers=0.0)
    few, lines = plan_resolution(dataclasses.replace(planner, components=certain, points=0.001), 100)
    assert few is None
    assert "would need more than 64 seeds" in lines[1]
    assert math.isfinite(planner.size(3, 1).detectable)
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed (extra dev)")
    for seeds in (3, 5, 12):  # with all documents known, the test of two arms has seeds - 1 degrees of freedom
        size = dataclasses.replace(planner, components=certain).size(seeds, 100)
        level = dataclasses.replace(planner, components=certain).looks(seeds, 100).level(seeds)
        shift, bound = size.detectable / math.sqrt(certain.seeds / seeds), stats.t.ppf(1 - level / 2, seeds - 1)
        assert stats.nct.sf(bound, seeds - 1, shift) == pytest.approx(0.8, abs=0.005)
    assert planner.fewest_seeds(1) is None


def planned(folder: Path, says: Any, points: float) -> tuple[Resolution, SimpleNamespace]:
    _, comparison = analysed(folder, says, controls=False)
    comparison.documents, comparison.run_seconds = 40, math.nan
    return Resolution(comparison, points), comparison


def test_the_pilot_plans_the_looks_and_the_results_hold_for_all_of_them(tmp_path: Path):
    resolution, comparison = planned(tmp_path, (sees, sees_badly), 0.5)
    assert "from the runs so far: 2 seeds on 40 documents" in resolution.lines()[0]
    assert resolution.lines()[-1].startswith("18 runs of about"), "9 seeds have 8 degrees of freedom"
    assert resolution.settings_after().seeds == 9
    state = read_state(tmp_path)
    assert state is not None
    assert (state.looks.seeds, state.ended) == ((9,), ""), (
        "the pilot is no look, although its interval is narrow enough"
    )
    assert "looks after 9 seeds" in resolution.lines()[0]
    assert "It goes on to 9 seeds." in resolution.lines()[0]
    rows = json.loads((tmp_path / "results.json").read_text())["comparisons"]
    assert [row["verdict"] for row in rows] == ["between looks"]
    assert rows[0]["p_corrected"] is None
    rows = [row | {"run_degrees": 8.0, "p_corrected": 1.0} for row in rows]
    assert after_look(state, rows, 9).ended == "every arm is decided", "the interval lies within 50 points"
    results = json.loads((tmp_path / "results.json").read_text())
    wide = results["comparisons"][0]
    state = dataclasses.replace(state, looks=Looks((2, 4), (0.6, 1.0)), ended="", seeds=4)
    (tmp_path / FILE).write_text(json.dumps(dataclasses.asdict(state)))
    again = analyse(comparison)
    row = again["comparisons"][0]
    assert row["low"] < wide["low"]
    assert row["p_corrected"] > wide["p"]
    assert row["nats"]["own"]["low"] < wide["nats"]["own"]["low"]
    assert any("looks after 2, 4 seeds" in line and "It goes on to 4 seeds." in line for line in again["says"])
    with pytest.raises(ConfigError, match="was planned with --resolve 50, now it is 3"):
        Resolution(comparison, 0.03)
    alone = {"run_degrees": 3.9, "p_corrected": 1e-9, "low": 0.1, "high": 0.2}
    assert not is_decided(alone, 0.5), "a variance of runs with so few degrees of freedom is often too small"
    assert not is_decided(alone | {"run_degrees": 4.0, "p_corrected": None}, 0.5), "between two looks"
    assert is_decided(alone | {"run_degrees": 4.0}, 0.5)
    (tmp_path / FILE).write_text('{"points": 0.03}')
    with pytest.raises(ConfigError, match="is damaged"):
        analyse(comparison)


def test_nothing_is_judged_between_two_looks():
    """The plan spends no error rate there: the interval is that of these seeds alone, and there is no p-value."""
    a, b = np.random.default_rng(8).normal(0, 1, (2, 5, 30))
    arms = {"a": {"t": TaskScores(scores=a + 3, clusters=range(30))}}
    reference = {"t": TaskScores(scores=b, clusters=range(30))}
    looks = Looks((3, 5), (0.6, 1.0))
    off, on = (judge(arms, reference, {"a": seeds}, looks=looks, bounded=False)["a"] for seeds in (4, 5))
    assert (off.look, on.look) == (False, True)
    assert math.isnan(off.p_corrected)
    assert on.p_corrected < 0.05
    plain = judge(arms, reference, {"a": 4}, looks=None, bounded=False)["a"]
    assert off.estimate == plain.estimate


def test_arms_between_two_looks_count_in_the_correction():
    """Arm a stopped at the look; that b and c are on the way to the next one does not make its p-value smaller."""
    generator = np.random.default_rng(9)
    drawn = {name: generator.normal(0, 1, (5, 30)) + (name == "a") for name in ("a", "b", "c", "reference")}
    arms = {name: {"t": TaskScores(scores=table, clusters=range(30))} for name, table in drawn.items()}
    reference, looks = arms.pop("reference"), Looks((3, 5), (0.6, 1.0))

    def p(seeds: int) -> float:
        found = judge(arms, reference, {"a": 3, "b": seeds, "c": seeds}, looks=looks, bounded=False)
        return found["a"].p_corrected

    assert p(4) == pytest.approx(p(3))


def test_few_pictures_give_few_degrees_of_freedom():
    """48 pictures of 8 subjects are judged with 7 degrees of freedom, and planned with them."""
    components = Components(documents=1.0, seeds=0.0, answers=0.0)
    alone, grouped = (
        Planner(components=components, points=0.1, comparisons=1, first=3, independent=share).size(3, 48).half_width
        for share in (1.0, 8 / 48)
    )
    assert grouped / alone == pytest.approx(t_quantile(0.95, 7) / t_quantile(0.95, 47), rel=1e-3)


def test_a_decided_arm_runs_no_more_and_keeps_its_numbers():
    """Arm 1 differs clearly and is decided at the first look; the reference and arm 2 go on, arm 2 to the end."""
    generator, looks, clusters = np.random.default_rng(5), Looks((3, 5), (0.6, 1.0)), range(30)
    hard = generator.normal(0, 1, 30)
    drawn = [
        {"t": TaskScores(scores=hard + shift + generator.normal(0, 1, (5, 30)), clusters=clusters)}
        for shift in (0, 3, 0)
    ]
    reference, arms = drawn[0], {"one": drawn[1], "two": drawn[2]}

    def at(seeds: dict[str, int]) -> tuple[dict[str, Judged], list[dict[str, Any]]]:
        found = judge(arms, reference, seeds, looks=looks, bounded=False)
        return found, [one.numbers(comparisons=2) | {"arm": arm} for arm, one in found.items()]

    first, rows = at({"one": 3, "two": 3})
    state = after_look(LookState(points=0.1, seeds=3, looks=looks, components={}), rows, 3)
    assert (state.seeds, state.arms, state.ended) == (5, {"one": 3}, "")
    last, rows = at({"one": 3, "two": 5})
    assert last["one"].estimate == first["one"].estimate
    assert last["two"].estimate.size == (5, 30)
    assert after_look(state, rows, 5).ended == "all 5 planned seeds are over"
    recipe = Recipe(model=ModelConfig(language="none"))
    settings = ComparisonSettings(
        arms=parse_arms("lora,dora,tsm", recipe), rates=[1e-4], seeds=5, tasks=["t"], decided={"dora": 3}
    )
    cells = reported_cells(settings, choose_rates(settings, {}))
    assert len(cells) == run_count(settings) == 13
    assert max(cell.seed for cell in cells if cell.arm.name == "dora") == 2


@pytest.mark.parametrize(
    ("says", "reason"),
    [((sees, sees_badly), "beyond what 40 documents allow"), ((sees, sees), "no answers of the pilot differ")],
    ids=["too few documents", "all answers right"],
)
def test_a_pilot_that_seeds_do_not_help_ends_the_comparison(tmp_path: Path, says: Any, reason: str):
    resolution, comparison = planned(tmp_path, says, 0.01)
    assert resolution.settings_after().seeds == comparison.settings.seeds == 2
    state = read_state(tmp_path)
    assert state is not None
    assert reason in state.ended
    assert any(reason in line for line in analyse(comparison)["says"])


def test_bad_resolutions_are_refused(tmp_path: Path):
    comparison = SimpleNamespace(settings=SimpleNamespace(seeds=1), folder=tmp_path)
    with pytest.raises(ConfigError, match="at least 2 seeds"):
        Resolution(comparison, 0.03)
    for points in (0.0, -1.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="expected points between 0 and 100"):
            Resolution(comparison, points)


@pytest.mark.parametrize(
    ("row", "summary", "fault"),
    [
        ({}, {"components": [{"trainable": 7}, {"trainable": 3.0}]}, ""), ({"epoch": 0.0}, {"components": []}, "zero"),
        ({"step": "x"}, {"components": []}, "unsupported"), ({}, {"components": [{"trainable": "x"}]}, "expected int"),
        ({"step_seconds": "x"}, {"components": []}, "'<' not supported"), ({}, {"components": 5}, "not iterable"),
        ({}, {}, "components"),
    ],
)  # fmt: skip
def test_the_cost_of_a_damaged_run_is_named_as_unknown(
    row: dict[str, object], summary: dict[str, object], fault: str, tmp_path: Path
) -> None:
    rows = [{"step": 1, "epoch": 0.5, "step_seconds": 2.0, "memory_gib": 1.0} | row for row in ({}, {}, {}, row)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(item) + "\n" for item in rows))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    train = SimpleNamespace(total_steps=lambda per_epoch: round(per_epoch * 3))
    job: Any = SimpleNamespace(run_folder=tmp_path, recipe=SimpleNamespace(train=train))
    cost = cost_of("lora", 4, (), job)
    if fault:
        assert cost.problem.startswith(f"{tmp_path} is damaged (")
        assert fault in cost.problem
        assert math.isnan(cost.run_seconds)
    else:
        assert (cost.trainable, cost.steps, cost.run_seconds) == (10, 6, 12.0)
