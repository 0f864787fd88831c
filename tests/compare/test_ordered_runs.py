"""One run of a comparison: its order, its outcome, its devices, and starting it by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from preloaded import Preloaded
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.compare import comparison_cell
from mm_moslora.compare.comparison_cell import read_outcome, write_outcome
from mm_moslora.compare.comparison_plan import (
    Outcome,
    recipe_hash,
    reported_cells,
)
from mm_moslora.compare.comparison_run import ArmComparison, RunBudget
from mm_moslora.config import Recipe
from mm_moslora.launch.jobs import ProcessEngine
from mm_moslora.utils.errors import ConfigError
from tests.compare.comparisons import RECIPE, fake_devices, ordered, other_runs, settings


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"status": "ok", "odd": 1}', '{"status": [1]}', '{"status": NaN}', '{"status": "ok", "test": 5}',
     '{"status": "ok", "total_seconds": "x"}', '{"status": "ok", "steps": 1e308}',
     '{"status": "ok", "test": {"a": []}}', '{"status": "ok", "places": {"t": {"own": 1}}}'],
)  # fmt: skip
def test_a_damaged_outcome_is_named_and_never_overwritten(tmp_path: Path, text: str):
    assert read_outcome(tmp_path) is None
    (tmp_path / "outcome.json").write_text(text)
    with pytest.raises(ConfigError, match=r"outcome\.json is damaged .*Delete it"):
        read_outcome(tmp_path)


def test_a_damaged_outcome_counts_as_failed_and_hides_no_other(tmp_path: Path, monkeypatch):
    other_runs(monkeypatch, "die")  # a run that starts is killed
    comparison = ArmComparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
    for cell in reported_cells(comparison.settings, {"lora": 1e-4, "moslora:kaiming": 1e-4}):
        recipe = cell.recipe(RECIPE, tmp_path)
        write_outcome(Path(recipe.train.output), Outcome(status="ok", recipe=recipe_hash(recipe)))
    file = tmp_path / "runs" / "lora_lr0.0001_seed0" / "outcome.json"
    file.write_text('{"status": "ok"')
    comparison._read_outcomes()
    assert Counter(outcome.status for outcome in comparison.outcomes.values()) == {"ok": 3, "failed": 1}
    assert "outcome.json is damaged" in comparison.outcomes["lora_lr0.0001_seed0"].reason
    assert comparison.run(RunBudget(), ProcessEngine(parallel=1)), "a damaged outcome stops no others"
    assert "outcome.json is damaged" in comparison.outcomes["lora_lr0.0001_seed0"].reason
    assert file.read_text() == '{"status": "ok"', "the user may restore it"


def test_keys_that_a_finished_run_leaves_out_count_with_their_defaults(tmp_path: Path):
    """Hashes differ then; the recipe decides."""
    asked = settings(rates=[1e-4])
    cell = reported_cells(asked, {"lora": 1e-4})[0]
    place = Path(cell.recipe(RECIPE, tmp_path).train.output)
    write_outcome(place, Outcome(status="ok", recipe="another hash"))

    def read(recipe: Recipe = RECIPE) -> set[str]:
        comparison = ArmComparison(recipe, asked, tmp_path, hold_out=0.1)
        comparison._read_outcomes()
        return set(comparison.outcomes)

    with pytest.raises(ConfigError, match=r"its recipe\.yaml is missing"):
        read()
    stored = cell.recipe(RECIPE, tmp_path).to_dict()
    del stored["optim"]["warmup"], stored["adapter"]["dropout"], stored["train"]["output"]
    (place / "recipe.yaml").write_text(json.dumps(stored))
    assert read() == {cell.name}
    changed = dataclasses.replace(RECIPE, optim=dataclasses.replace(RECIPE.optim, warmup=0.5))
    with pytest.raises(ConfigError, match=r"another recipe \(optim\.warmup: 0\.03 -> 0\.5\)"):
        read(changed)
    (place / "recipe.yaml").write_text(json.dumps({**stored, "gone": 1}))
    with pytest.raises(ConfigError, match=r"recipe\.yaml: unknown key 'gone'"):
        read()


def test_a_run_refuses_the_devices_of_others(tmp_path: Path, monkeypatch):
    fake_devices(monkeypatch, 8)
    run = ordered(tmp_path)
    comparison_cell._require_own_accelerators(dataclasses.replace(run, cards=8))
    outcome = comparison_cell._outcome(dataclasses.replace(run, cards=1), None)
    assert outcome is not None
    assert outcome.status == "failed"
    assert outcome.reason.startswith("The run sees 8 accelerators, expected 1.")


def test_a_run_by_hand_that_does_not_exist_or_is_damaged_is_one_line(tmp_path: Path, capsys):
    assert cli.run(["compare", str(tmp_path / "no"), "--cell", "a"]) == 1
    assert "has no run 'a'" in capsys.readouterr().err
    place = ordered(tmp_path).run_folder
    for more in (["--stop-at", "3"], ["--cell", place.name, "--optim.lr=1"]):
        assert cli.run(["compare", str(tmp_path), *more]) == 1
        assert "--cell does one run as it was planned" in capsys.readouterr().err
    assert cli.run(["compare", str(tmp_path), "--cell", "../a"]) == 1
    assert f"there are {place.name}." in capsys.readouterr().err
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert cli.run(["compare", str(tmp_path.with_name("copy")), "--cell", place.name]) == 1
    assert "Repeat the comparison's command for this folder" in capsys.readouterr().err
    for text in ("{", "[]", "{}", '{"cell": {}, "settings": {}, "odd": 1}'):
        (place / "cell.json").write_text(text)
        assert cli.run(["compare", str(tmp_path), "--cell", place.name]) == 1
        assert "cell.json is damaged" in capsys.readouterr().err


def test_a_run_by_hand_that_fails_says_so(tmp_path: Path, monkeypatch, capsys):
    run = ordered(tmp_path)
    line = ["compare", str(tmp_path), "--cell", run.cell.name]

    def fail(*_):
        assert read_outcome(run.run_folder) is None, "a killed run would have the reason of an earlier one"
        raise OSError("no picture")

    for _ in range(2):
        monkeypatch.setattr(comparison_cell, "_run", fail)
        assert cli.run(line) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("OSError: no picture")
        assert read_outcome(run.run_folder).status == "failed"
    monkeypatch.setattr(comparison_cell, "_run", lambda *_: Outcome(status="ok"))
    assert cli.run(line) == 0


@pytest.mark.parametrize(
    "changes",
    [{"folder": "ELSEWHERE"}, {"cards": "2"}, {"keep_all": "no"}, {"cell.tuning": "no"}, {"cell.arm.changes": "x"},
     {"cell.arm.about": 1}, {"settings.batch_size": "8"}, {"settings.tasks": "t"},
     {"settings.rates": [None]}],
)  # fmt: skip
def test_an_order_of_other_types_or_of_another_folder_is_refused(tmp_path: Path, monkeypatch, capsys, changes):
    run, elsewhere = ordered(tmp_path / "own"), tmp_path / "elsewhere"
    told = json.loads((run.run_folder / "cell.json").read_text())
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = told
        for part in groups:
            group = group[part]
        group[last] = str(elsewhere) if value == "ELSEWHERE" else value
    (run.run_folder / "cell.json").write_text(json.dumps(told))
    monkeypatch.setattr(comparison_cell, "_run", lambda *_: pytest.fail("it was run"))
    assert cli.run(["compare", str(tmp_path / "own"), "--cell", run.cell.name]) == 1
    assert "Repeat the comparison's command" in capsys.readouterr().err
    assert not elsewhere.exists()
    assert [path.name for path in run.run_folder.iterdir()] == ["cell.json"]


def test_a_run_that_is_started_twice_at_once_happens_once(tmp_path: Path, monkeypatch, python: Preloaded):
    """As two elements of an array, or an attempt after a node that was only thought lost."""
    other_runs(monkeypatch, "wait")
    run = ordered(tmp_path)
    words = [python.ours, "-m", "tests.compare.other_runs", "compare", str(tmp_path), "--cell", run.cell.name]
    both = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    wait_until((tmp_path / "begun").exists)
    (tmp_path / "go").touch()
    said = [one.communicate(timeout=100)[1] for one in both]
    assert [one.returncode for one in both] == [0, 0], said
    assert (tmp_path / "begun").read_text() == f"{run.cell.name}\n", said
    before = (run.run_folder / "outcome.json").stat().st_mtime_ns
    assert subprocess.run(words, check=True, timeout=100).returncode == 0
    assert (run.run_folder / "outcome.json").stat().st_mtime_ns == before


def test_runs_that_are_killed_three_times_are_in_the_table_and_the_others_go_on(tmp_path: Path, monkeypatch):
    other_runs(monkeypatch, "die")
    comparison = ArmComparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
    assert comparison.run(RunBudget(), ProcessEngine(parallel=2))
    assert Counter(outcome.status for outcome in comparison.outcomes.values()) == {"ok": 2, "failed": 2}
    assert "ended by signal 9" in comparison.outcomes["lora_lr0.0001_seed0"].reason


def test_with_several_devices_one_run_is_on_each_in_parallel(tmp_path: Path, monkeypatch, caplog):
    fake_devices(monkeypatch, 2, visible="4,7")
    other_runs(monkeypatch, "meet")
    comparison = ArmComparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
    with caplog.at_level("INFO"):
        assert comparison.run(RunBudget(cards=1), ProcessEngine())
    met = {path.name.removeprefix("here-"): path.read_text() for path in tmp_path.glob("here-*")}
    assert sorted(met) == ["4-0", "4-1", "7-0", "7-1"], "each device has had two of the four runs"
    assert len(set(met.values())) == 4
    ended = {name: outcome.status for name, outcome in comparison.outcomes.items()}
    assert sorted(ended.values()) == ["failed", "ok", "ok", "ok"]
    (failed,) = [name for name, status in ended.items() if status == "failed"]
    assert failed == "moslora-kaiming_lr0.0001_seed0"
    assert comparison.outcomes[failed].reason.startswith("AssertionError: boom")
    assert "moslora:kaiming at 0.0001, seed 0: failed: AssertionError: boom" in caplog.text
