"""`mm-moslora compare` end to end on tiny models: tuning, seeds, a failing arm, continuing, the page, bad input."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from between import just_before
from PIL import Image
from preloaded import Preloaded
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.compare import comparison_cell, comparison_run, holdout
from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import CellRun, metrics, read_outcome, write_outcome
from mm_moslora.compare.comparison_plan import (
    Outcome,
    Settings,
    choose_rates,
    grid_of,
    planned_for,
    recipe_hash,
    reported_cells,
    run_count,
    tuning_cells,
)
from mm_moslora.compare.comparison_run import Comparison, RunBudget, exclusive, short_names
from mm_moslora.compare.sequential_looks import Looks, LookState, read_state, write_state
from mm_moslora.config import DataConfig, ModelConfig, Recipe, SourceConfig
from mm_moslora.launch.jobs import ProcessEngine, cards_per_job
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.reporting.comparison_page import write_page
from mm_moslora.utils.errors import ConfigError

DIVERGING = "lora@alpha=1e30@train.max_skipped_steps=2"
ARMS = f"full,full@optim.max_grad_norm=0.5,lora@targets=[nope],{DIVERGING}"
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


def questions(records: Path, out: Path) -> Path:
    """The held-out questions: one on the colour per picture."""
    rows = []
    for line in records.read_text().splitlines():
        record = json.loads(line)
        if "image" in record:
            question, answer = record["conversations"][0]["value"], record["conversations"][1]["value"]
            rows.append(
                {"question_id": record["id"], "image": record["image"], "text": question.replace("<image>\n", ""),
                 "answer": answer}
            )  # fmt: skip
    out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return out


def test_data_files_of_one_name_are_two_columns() -> None:
    easy, hard, other = "llava:data/easy/test.jsonl@images", "llava:data/hard/test.jsonl", "tsv:/x/bench.tsv"
    assert short_names([easy, hard, other, "mme@llava"]) == {
        easy: "easy/test", hard: "hard/test", other: "bench", "mme@llava": "mme@llava",
    }  # fmt: skip
    names = short_names(["llava:test.jsonl", "llava:test.json", "tsv:a/test.tsv"])
    assert len(set(names.values())) == 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, language_folder: Path, vision_folder: Path, records: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    questions(records, folder / "test.jsonl")
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}
adapter: {{rank: 4, alpha: 8}}
data: {{train: [{{path: {records}, image_folder: {records.parent / "images"}}}], max_length: 256}}
train: {{steps: 5, global_batch: 8, micro_batch: 8, zero: none, precision: fp32}}
track: {{trackers: []}}
"""
    )
    return folder / "recipe.yaml"


def command(
    recipe: Path, records: Path, out: Path, *more: str, arms: str = ARMS, rates: str = "1e-3,1e-2"
) -> list[str]:
    task = f"llava:{recipe.parent / 'test.jsonl'}@{records.parent / 'images'}"
    return ["compare", str(recipe), "--arms", arms, "--lr", rates, "--seeds", "2", "--tasks", task, "--hold-out", "0.3",
            "--max-new-tokens", "3", "--output", str(out), *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe: Path, records: Path) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    assert cli.run(command(recipe, records, out)) == 1, "runs of an arm fail"
    return out


@pytest.mark.slow
def test_a_comparison_tunes_runs_seeds_and_reports_the_arm_that_fails(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    full, clipped, broken, diverging = results["arms"]
    assert [len(arm["seeds"]) for arm in results["arms"]] == [2, 2, 0, 0]
    for arm in (full, clipped):
        curve = {point["rate"]: point["value"] for point in arm["curve"]}
        assert arm["rate"] == min(curve, key=curve.get)
        assert arm["tasks"]["test"]["documents"] == 18
        assert arm["cost"]["steps"] == 5
        assert arm["cost"]["trainable"] > 0
    assert broken["rate"] is diverging["rate"] is None
    how = {failure["arm"]: (failure["status"], failure["reason"]) for failure in results["failures"]}
    assert how[broken["name"]][0] == "failed"
    assert "matches no module" in how[broken["name"]][1]
    assert how[diverging["name"]][0] == "diverged"
    assert "2 steps in a row had a loss or gradient that is not finite" in how[diverging["name"]][1]
    (row,) = results["comparisons"]
    assert (row["arm"], row["reference"], row["seeds"]) == (clipped["name"], "full", 2)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["verdict"] == "nothing follows", "five steps teach nothing"
    assert all(set(arm["controls"]["test"]) >= {"rows", "above"} for arm in (full, clipped))
    assert any("no learning rate of the grid worked" in line for line in results["says"])
    tuning = {path.name for path in finished.glob("runs/*_tune0/checkpoint-*")}
    assert not tuning, "checkpoints of runs that only chose a rate stay"
    assert not (finished / "features").exists(), "ten GiB may stay"


@pytest.mark.slow
def test_validation_is_held_out_by_picture_and_never_trained_on(finished: Path):
    def pictures(name):
        lines = (finished / "data" / name).read_text().splitlines()
        return {json.loads(line).get("image") for line in lines} - {None}

    train, validation = pictures("train-0.jsonl"), pictures("validation-0.jsonl")
    assert train
    assert validation
    assert not train & validation


FORMS = {
    "image": lambda name: {"image": name},
    "list": lambda name: {"images": [name]},
    "other spelling": lambda name: {"image": f"./{name}"},
    "copy": lambda name: {"image": f"copy-{name}"},
    "parts": lambda name: {"content": [{"type": "image", "image": name}, {"type": "text", "text": "?"}]},
    "with another": lambda name: {"images": [name, "unlike.png"]},
}


def _asked(number: int, form: str, folder: Path) -> dict[str, object]:
    """Question `number` about picture `number % 10`."""
    name = f"{number % 10}.png"
    for path, shade in (
        (folder / name, number % 10),
        (folder / f"copy-{name}", number % 10),
        (folder / "unlike.png", 99),
    ):
        if not path.is_file():
            Image.new("RGB", (8, 8), (shade, 0, 0)).save(path)
    record = FORMS[form](name)
    marks = "<image>\n" * len(record.get("images", ["one"]))
    question = record.pop("content", f"{marks}?")
    return record | {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": str(number)}]}


def _held_out(tmp_path: Path, lines: list[dict[str, object]], share: float) -> tuple[list[str], list[str]]:
    """The answers that are kept and held out."""
    file = tmp_path / "records.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shared = dataclasses.replace(RECIPE, data=DataConfig(train=[SourceConfig(path=str(file))]))
    split = holdout.with_holdout(shared, tmp_path / "split", share=share).data
    kept, held = (
        [json.loads(line)["messages"][1]["content"] for line in Path(source.path).read_text().splitlines()]
        for source in (*split.train, *split.validation)
    )
    return kept, held


@pytest.mark.parametrize(("most", "expected"), [(1000, 40), (25, 20), (5, 10)], ids=["all", "fewer", "one picture"])
def test_the_most_that_is_held_out_is_of_whole_pictures(tmp_path: Path, monkeypatch, most: int, expected: int):
    """Ten pictures with ten questions each, four of them in the share; the records of a picture are not together."""
    monkeypatch.setattr(holdout, "MOST", most)
    lines = [_asked(i, "image", tmp_path) for i in range(100)]
    share = sorted(holdout._number(holdout._identity_of_file(tmp_path / f"{i}.png")) for i in range(10))[4]
    kept, held = _held_out(tmp_path, lines, share)
    assert len(held) == expected
    assert len(kept) + len(held) == 100
    assert not {int(answer) % 10 for answer in kept} & {int(answer) % 10 for answer in held}


@pytest.mark.parametrize("form", [form for form in FORMS if form != "image"])
def test_a_picture_is_one_in_every_form_and_under_every_name(tmp_path: Path, form: str):
    lines = [_asked(i, "image" if i % 3 else form, tmp_path) for i in range(60)]
    if form == "with another":  # one record links its two pictures, and with them all records about either
        lines = [_asked(i, form if i in (0, 1) else "image", tmp_path) for i in range(60)]
    kept, held = _held_out(tmp_path, lines, 0.5)
    groups = {int(answer) % 10 for answer in held}
    assert not groups & {int(answer) % 10 for answer in kept}
    assert form != "with another" or (0 in groups) == (1 in groups)


@pytest.mark.parametrize("changed", ["records", "other file", "questions", "share", "base"])
def test_changed_data_are_refused_before_anything_runs(
    tmp_path: Path, recipe: Path, records: Path, language_folder: Path, capsys, changed: str
):
    """The split of the first call is not used for other data."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(records.read_text())
    test.write_text((recipe.parent / "test.jsonl").read_text())
    line = command(recipe, records, tmp_path / "out", "--only-report")
    line[line.index("--tasks") + 1] = f"llava:{test}@{records.parent / 'images'}"
    train_at = [f'--data.train=[{{"path": "{train}", "image_folder": "{records.parent / "images"}"}}]']
    language = tmp_path / "language"
    shutil.copytree(language_folder, language)
    train_at.append(f"--model.language={language}")
    assert cli.run([*line, *train_at]) == 0
    assert cli.run([*line, *train_at]) == 0
    capsys.readouterr()
    fewer = "".join(records.read_text().splitlines(keepends=True)[:-2])
    match changed:
        case "records":
            train.write_text(fewer)
        case "other file":
            (tmp_path / "other.jsonl").write_text(fewer)
            train_at[0] = train_at[0].replace(str(train), str(tmp_path / "other.jsonl"))
        case "questions":
            test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
        case "share":
            line[line.index("--hold-out") + 1] = "0.4"
        case "base":
            weights = language / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert cli.run([*line, *train_at]) == 1
    said = capsys.readouterr().err
    expected = {"questions": "test.jsonl", "share": "hold_out 0.3", "base": "model.language changed"}
    assert expected.get(changed, "data.train 1 changed") in said
    assert "choose another --output" in said.lower()


def test_the_same_data_in_another_place_are_the_same(tmp_path: Path, recipe: Path, records: Path, capsys):
    line = command(recipe, records, tmp_path / "out", "--only-report")
    assert cli.run(line) == 0
    (tmp_path / "moved.jsonl").write_text(records.read_text())
    moved = f'--data.train=[{{"path": "{tmp_path / "moved.jsonl"}", "image_folder": "{records.parent / "images"}"}}]'
    assert cli.run([*line, moved]) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_a_stopped_comparison_continues(tmp_path: Path, recipe: Path, records: Path, capsys):
    stop = command(recipe, records, tmp_path / "out", "--max-minutes", "0", arms="lora,moslora:kaiming", rates="1e-3")
    assert cli.run(stop) == 75
    assert cli.run([*stop[:-2], "--plan", "--resolve", "1"]) == 0
    said = capsys.readouterr().out
    lora, moslora = re.findall(r"(lora|moslora:kaiming) +([\d,]+) +([\d.e-]+) +5 +[\d.]+ +[\d.]+ +[12] +[\d.]+\n", said)
    assert (lora[0], moslora[0]) == ("lora", "moslora:kaiming")
    assert int(lora[1].replace(",", "")) < int(moslora[1].replace(",", ""))
    assert re.search(r"all +[34] +\d", said)
    assert "--resolve 1, before a pilot, assumed:" in said
    assert "A difference of 1 points is beyond what 18 documents allow" in said
    assert re.search(r"4 runs of about \d+ s", said)
    looks = {"seeds": [2, 3], "fractions": [0.6, 1.0]}
    plan = {"points": 0.01, "seeds": 2, "looks": looks, "components": {}, "ended": "", "reference": "lora"}
    (tmp_path / "out" / "resolve.json").write_text(json.dumps(plan))
    assert cli.run([*stop[:-2], "--resolve", "1"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(arm["seeds"]) for arm in results["arms"]] == [3, 3], "two seeds do not decide one point"
    assert results["resolve"]["ended"] == "all 3 planned seeds are over"
    assert any("not tuned" in line for line in results["says"])
    capsys.readouterr()
    for further, said in (
        (["--reference", "moslora:kaiming"], "was decided against 'lora'"),
        (["--seeds", "4"], "ended after 3 seeds (all 3 planned seeds are over)"),
    ):
        assert cli.run([*_without(stop[:-2], further[0]), "--only-report", *further]) == 1
        assert said in capsys.readouterr().err


def _without(line: list[str], option: str) -> list[str]:
    if option not in line:
        return line
    index = line.index(option)
    return [*line[:index], *line[index + 2 :]]


@pytest.mark.slow
def test_a_signal_saves_running_runs_and_the_same_command_continues(
    tmp_path: Path, recipe: Path, records: Path, python: Preloaded
):
    line = command(recipe, records, tmp_path / "out", "--train.steps", "400", arms="lora,moslora:kaiming", rates="1e-3")
    process = subprocess.Popen(
        [python.ours, "-m", "mm_moslora", *line], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    place = tmp_path / "out" / "runs" / "lora_lr0.001_seed0"
    wait_until(lambda: len(metrics(place)) >= 3, process=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75
    assert read_outcome(place) is None
    assert list(place.glob("checkpoint-*")), "what was trained is lost"


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


def test_a_score_that_is_no_number_was_not_measured(tmp_path: Path):
    text = '{"status": "ok", "test": {"a": NaN, "b": 0.5}, "first_loss": Infinity, "step_seconds": NaN}'
    (tmp_path / "outcome.json").write_text(text)
    assert read_outcome(tmp_path) == Outcome(status="ok", test={"b": 0.5})


def test_a_damaged_outcome_counts_as_failed_and_hides_no_other(tmp_path: Path, monkeypatch):
    other_runs(monkeypatch, "die")  # a run that starts is killed
    comparison = Comparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
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


def test_a_finished_run_stays_finished_when_recipes_get_new_keys(tmp_path: Path):
    """Its hash is of fewer keys then; its recipe decides."""
    asked = settings(rates=[1e-4])
    cell = reported_cells(asked, {"lora": 1e-4})[0]
    place = Path(cell.recipe(RECIPE, tmp_path).train.output)
    write_outcome(place, Outcome(status="ok", recipe="of an earlier version"))

    def read(recipe: Recipe = RECIPE) -> set[str]:
        comparison = Comparison(recipe, asked, tmp_path, hold_out=0.1)
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


def test_a_folder_with_other_files_is_refused_for_a_comparison(tmp_path: Path):
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds results\.json"), exclusive(tmp_path):
        pytest.fail("it would be overwritten")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").unlink()
    for _ in range(2):
        with exclusive(tmp_path):
            (tmp_path / "results.json").touch()


def test_metrics_that_disappear_while_they_are_read_are_no_error(tmp_path: Path, monkeypatch):
    """A run that starts from step 0 moves them aside."""
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"loss": 1}\n{"lo')
    assert metrics(tmp_path) == [{"loss": 1}]
    just_before(monkeypatch, os, "open", file.unlink, when=lambda path, *_: path == file.resolve())
    assert metrics(tmp_path) == []
    assert not file.exists()


RECIPE = Recipe(model=ModelConfig(language="none"))


def test_a_run_refuses_the_devices_of_others(tmp_path: Path, monkeypatch):
    fake_devices(monkeypatch, 8)
    run = ordered(tmp_path)
    comparison_cell._require_own_accelerators(dataclasses.replace(run, cards=8))
    outcome = comparison_cell._outcome(dataclasses.replace(run, cards=1), None)
    assert outcome is not None
    assert outcome.status == "failed"
    assert outcome.reason.startswith("The run sees 8 accelerators, expected 1.")


def ordered(folder: Path) -> CellRun:
    """A run that is ordered in a comparison's folder."""
    asked = settings(rates=[1e-4])
    cell = reported_cells(asked, {"lora": 1e-4})[0]
    run = CellRun(cell=cell, recipe=cell.recipe(RECIPE, folder), settings=asked, folder=folder)
    run.order()
    return run


def test_a_run_by_hand_that_does_not_exist_or_is_damaged_is_one_line(tmp_path: Path, capsys):
    assert cli.run(["compare", str(tmp_path / "no"), "--cell", "a"]) == 1
    assert "has no run 'a'" in capsys.readouterr().err
    place = ordered(tmp_path).place
    for more in (["--stop-at", "3"], ["--cell", place.name, "--optim.lr=1"]):
        assert cli.run(["compare", str(tmp_path), *more]) == 1
        assert "--cell does one run as it was planned" in capsys.readouterr().err
    assert cli.run(["compare", str(tmp_path), "--cell", "../a"]) == 1
    assert f"there are {place.name}." in capsys.readouterr().err
    shutil.copytree(tmp_path, tmp_path.with_name("copy"))
    assert cli.run(["compare", str(tmp_path.with_name("copy")), "--cell", place.name]) == 1
    assert "Repeat the comparison's command in this place" in capsys.readouterr().err
    for text in ("{", "[]", "{}", '{"cell": {}, "settings": {}, "odd": 1}'):
        (place / "cell.json").write_text(text)
        assert cli.run(["compare", str(tmp_path), "--cell", place.name]) == 1
        assert "cell.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("way", ["relative", "linked"])
def test_a_run_by_hand_is_found_from_every_path_of_its_folder(tmp_path: Path, monkeypatch, way: str):
    folder = tmp_path / "runs of mine"
    name = ordered(folder).cell.name
    (tmp_path / "linked").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    asked: list[CellRun] = []
    monkeypatch.setattr(comparison_cell, "_run", lambda run, *_: asked.append(run) or Outcome(status="ok"))
    assert cli.run(["compare", folder.name if way == "relative" else "linked", "--cell", name]) == 0
    assert [run.place for run in asked] == [folder / "runs" / name]


def test_a_run_by_hand_starts_where_its_tasks_are_named(tmp_path: Path, monkeypatch):
    run, places = ordered(tmp_path / "own"), []
    monkeypatch.chdir("/")
    monkeypatch.setattr(comparison_cell, "_run", lambda *_: places.append(Path.cwd()) or Outcome(status="ok"))
    assert cli.run(["compare", str(tmp_path / "own"), "--cell", run.cell.name]) == 0
    assert [places, Path.cwd()] == [[run.start], Path("/")]


def test_a_run_by_hand_that_fails_says_so(tmp_path: Path, monkeypatch, capsys):
    run = ordered(tmp_path)
    line = ["compare", str(tmp_path), "--cell", run.cell.name]

    def fail(*_):
        assert read_outcome(run.place) is None, "a killed run would have the reason of an earlier one"
        raise OSError("no picture")

    for _ in range(2):
        monkeypatch.setattr(comparison_cell, "_run", fail)
        assert cli.run(line) == 1
        assert capsys.readouterr().err.splitlines()[-1].endswith("OSError: no picture")
        assert read_outcome(run.place).status == "failed"
    monkeypatch.setattr(comparison_cell, "_run", lambda *_: Outcome(status="ok"))
    assert cli.run(line) == 0


@pytest.mark.parametrize(
    "changes",
    [{"folder": "ELSEWHERE"}, {"cards": "2"}, {"keep_all": "no"}, {"cell.tuning": "no"}, {"cell.arm.changes": "x"},
     {"cell.arm.about": 1}, {"settings.batch_size": "8"}, {"settings.tasks": "t"}, {"settings.decided": ["lora"]},
     {"settings.rates": [None]}],
)  # fmt: skip
def test_an_order_of_other_types_or_of_another_folder_is_refused(tmp_path: Path, monkeypatch, capsys, changes):
    run, elsewhere = ordered(tmp_path / "own"), tmp_path / "elsewhere"
    told = json.loads((run.place / "cell.json").read_text())
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = told
        for part in groups:
            group = group[part]
        group[last] = str(elsewhere) if value == "ELSEWHERE" else value
    (run.place / "cell.json").write_text(json.dumps(told))
    monkeypatch.setattr(comparison_cell, "_run", lambda *_: pytest.fail("it was run"))
    assert cli.run(["compare", str(tmp_path / "own"), "--cell", run.cell.name]) == 1
    assert "Repeat the comparison's command" in capsys.readouterr().err
    assert not elsewhere.exists()
    assert [path.name for path in run.place.iterdir()] == ["cell.json"]


def other_runs(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the processes of runs do this function of `other_runs.py`."""
    monkeypatch.setattr(comparison_run, "PROGRAM", "tests.compare.other_runs")
    monkeypatch.setenv("RUN_OF_TESTS", name)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]))


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
    before = (run.place / "outcome.json").stat().st_mtime_ns
    assert subprocess.run(words, check=True, timeout=100).returncode == 0
    assert (run.place / "outcome.json").stat().st_mtime_ns == before


def test_runs_that_are_killed_three_times_are_in_the_table_and_the_others_go_on(tmp_path: Path, monkeypatch):
    other_runs(monkeypatch, "die")
    comparison = Comparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
    assert comparison.run(RunBudget(), ProcessEngine(parallel=2))
    assert Counter(outcome.status for outcome in comparison.outcomes.values()) == {"ok": 2, "failed": 2}
    assert "ended by signal 9" in comparison.outcomes["lora_lr0.0001_seed0"].reason


def settings(**changes) -> Settings:
    given = {
        "arms": parse_arms("lora,moslora:kaiming", RECIPE),
        "rates": [1e-4, 2e-4, 4e-4],
        "seeds": 2,
        "tasks": ["t"],
    }
    return Settings(**{**given, **changes})


def fake_devices(monkeypatch: pytest.MonkeyPatch, count: int, visible: str | None = None) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: count > 0)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


def test_with_several_devices_one_run_is_on_each_in_parallel(tmp_path: Path, monkeypatch, caplog):
    fake_devices(monkeypatch, 2, visible="4,7")
    other_runs(monkeypatch, "meet")
    comparison = Comparison(RECIPE, settings(rates=[1e-4]), tmp_path, hold_out=0.1)
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


def test_the_accelerators_of_a_run(monkeypatch):
    fake_devices(monkeypatch, 5)
    engine = ProcessEngine()
    asked = {number: cards_per_job(number, engine, option="--gpus-per-run") for number in (None, 1, 2, 5)}
    assert asked == {None: 1, 1: 1, 2: 2, 5: 5}
    with pytest.raises(ConfigError, match="--gpus-per-run is 8, but there are 5 accelerators"):
        cards_per_job(8, engine, option="--gpus-per-run")
    with pytest.raises(ConfigError, match="expected 1 or more"):
        cards_per_job(-1, engine, option="--gpus-per-run")
    fake_devices(monkeypatch, 0)
    assert cards_per_job(None, ProcessEngine(), option="--gpus-per-run") == 0


def test_rates_that_differ_in_the_eighth_digit_have_runs_of_their_own():
    asked = settings(rates=[1e-4, 1.0000001e-4])
    names = [cell.name for cell in tuning_cells(asked)]
    assert len(set(names)) == len(names)
    assert "lora_lr0.0001_tune0" in names


def test_a_rate_is_chosen_by_the_runs_that_did_not_diverge():
    asked = settings()
    losses = {1e-4: 2.0, 2e-4: 1.5, 4e-4: 1.0}
    outcomes = {cell.name: Outcome(status="ok", validation={"loss": losses[cell.rate]}) for cell in tuning_cells(asked)}
    assert set(choose_rates(asked, outcomes).values()) == {4e-4}
    bad = next(cell.name for cell in tuning_cells(asked) if cell.arm.name == "lora" and cell.rate == 4e-4)
    outcomes[bad] = Outcome(status="diverged", reason="the loss is not finite")
    assert choose_rates(asked, outcomes) == {"lora": 2e-4, "moslora:kaiming": 4e-4}
    by_task = settings(validation=["v"])
    scored = {cell.name: Outcome(status="ok", validation={"v": losses[cell.rate]}) for cell in tuning_cells(by_task)}
    assert set(choose_rates(by_task, scored).values()) == {1e-4}, "a score is the better the higher it is"
    del outcomes[bad]
    assert "lora" not in choose_rates(asked, outcomes), "its runs are not over"


def test_a_grid_grows_until_its_best_rate_is_inside(tmp_path: Path):
    """The best rate of LoRA lies two steps above the grid; the other arm diverges just above it."""
    asked = settings(rates=[1e-4, 2e-4, 4e-4], grow=3)
    outcomes: dict[str, Outcome] = {}

    def run(rates: set[float]) -> None:
        waiting = [cell for cell in tuning_cells(asked, outcomes) if cell.name not in outcomes]
        assert {cell.rate for cell in waiting} == rates
        for cell in waiting:
            loss = abs(math.log2(cell.rate / 16e-4))
            outcomes[cell.name] = Outcome(status="ok", validation={"loss": loss})
            if cell.arm.name != "lora" and cell.rate > 4e-4:
                outcomes[cell.name] = Outcome(status="diverged")

    run({1e-4, 2e-4, 4e-4})
    assert choose_rates(asked, outcomes) == {}, "neither is inside its grid"
    run({8e-4})
    assert choose_rates(asked, outcomes) == {"moslora:kaiming": 4e-4}
    run({16e-4})
    run({32e-4})
    run(set())
    assert choose_rates(asked, outcomes) == {"lora": 16e-4, "moslora:kaiming": 4e-4}
    assert run_count(asked, outcomes) == len(outcomes) + 2 * asked.seeds == 10 + 4
    assert run_count(dataclasses.replace(asked, grow=0), outcomes) == 6 + 4
    assert len(grid_of(dataclasses.replace(asked, grow=1), asked.arms[0], outcomes)) == 4, "at most so many"
    comparison = Comparison(RECIPE, dataclasses.replace(asked, validation=["v"]), tmp_path, hold_out=0.1)
    for cell in tuning_cells(asked, outcomes):
        recipe = cell.recipe(RECIPE, tmp_path)
        score = {"v": -outcomes[cell.name].validation.get("loss", math.nan)}
        found = dataclasses.replace(outcomes[cell.name], validation=score, recipe=recipe_hash(recipe))
        write_outcome(Path(recipe.train.output), found)
    comparison._read_outcomes()
    assert comparison.outcomes.keys() == outcomes.keys(), "a grown grid is read"
    flat = {cell.name: Outcome(status="ok", validation={"loss": 1.0}) for cell in tuning_cells(asked)}
    assert grid_of(asked, asked.arms[0], flat) == [1e-4, 2e-4, 4e-4], "an edge no better than its neighbour"
    assert len(tuning_cells(settings(rates=[1e-4, 2e-4], grow=3), outcomes)) == 4, "two rates have no inside"
    with pytest.raises(ConfigError, match="--grow is -1, expected 0 or more"):
        settings(grow=-1)


def test_arms_differ_only_in_the_keys_of_their_names():
    names = (
        "lora,tsm,moslora:kaiming,moslora-init,lora-xs,stella,stella@mixer_form=diagonal,orthonormal,diagonal,dora,rslora,"
        "lora+,full,moslora:orthogonal@rank=16@alpha=32"
    )
    adapter = {"use_rslora": True, "dropout": 0.1, "mixer_init": "kaiming", "factor_form": "svd"}
    shared = Recipe.from_dict({"model": {"language": "x"}, "adapter": adapter})
    made = {arm.name: arm.apply(shared) for arm in parse_arms(names, shared)}
    assert not made["lora"].adapter.mixer_trainable
    assert made["lora"].adapter.mixer_init == "identity"
    assert (made["tsm"].adapter.mixer_init, made["tsm"].adapter.mixer_trainable) == ("butterfly", False)
    assert made["moslora:kaiming"].adapter.mixer_trainable
    assert [name for name, one in made.items() if one.adapter.use_rslora] == ["rslora"]
    assert [name for name, one in made.items() if one.adapter.use_dora] == ["dora"]
    assert made["lora+"].optim.lora_plus_ratio == 16
    forms = {name: one.adapter.factor_form for name, one in made.items() if one.adapter.factor_form != "free"}
    expected = {"moslora-init": "mixed", "lora-xs": "svd", "stella": "stella", "orthonormal": "orthonormal"}
    assert forms == expected | {"stella@mixer_form=diagonal": "stella"}
    diagonal = [name for name, one in made.items() if one.adapter.mixer_form == "diagonal"]
    assert diagonal == ["stella@mixer_form=diagonal", "diagonal"]
    for one in made.values():
        moslora_config(one.adapter)  # a combination that exists
    assert made["full"].model.language_mode == "full"
    last = made["moslora:orthogonal@rank=16@alpha=32"].adapter
    assert (last.rank, last.alpha, last.dropout) == (16, 32.0, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "lora,moslra:kaiming"], "Did you mean 'moslora:kaiming'"),
        (["--arms", "lora"], "expected at least two"),
        (["--arms", "lora,lora"], "given twice"),
        (["--arms", "lora,lora@rnak=4"], "Did you mean 'rank'"),
        (["--arms", "lora,moslora:kaiming@mixer_init=zeros"], "expected one of"),
        (["--lr", "fast"], "expected numbers"),
        (["--lr", "1e-4,-1"], "expected positive numbers"),
        (["--lr", "1e-4,1e-4"], "twice"),
        (["--seeds", "0"], "expected 1 or more"),
        (["--tasks", ""], "No test task"),
        (["--tasks", "gqa_testdv"], "Did you mean"),
        (["--reference", "dora"], "is not an arm"),
        (["--lr", "1e-4,2e-4", "--validation", "SAME"], "chosen on the reported data"),
        (["--lr", "1e-4,2e-4", "--validation", "COPY"], "chosen on the reported data"),
        (["--lr", "1e-4,2e-4", "--data.validation", "RECORDS"], "chosen on the reported data"),
        (["--gpus-per-run", "2"], "accelerator"),
        (["--parallel", "2", "--ray", "auto"], "--parallel is for this machine"),
        (["--parallel", "2", "--slurm", "YES"], "give one of them"),
        (["--optim.lrr", "1"], "unknown key"),
    ],
)
def test_bad_input_is_one_line(arguments, message, recipe: Path, records: Path, tmp_path: Path, capsys):
    line = command(recipe, records, tmp_path / "out", rates="1e-3")
    task = line[line.index("--tasks") + 1]
    file, images = task.removeprefix("llava:").split("@")
    shutil.copy(file, tmp_path / "copy.jsonl")
    known = {
        "SAME": task,
        "COPY": f"llava:{tmp_path / 'copy.jsonl'}@{images}",
        "RECORDS": json.dumps([{"path": file, "image_folder": images}]),
    }
    for key, value in zip(arguments[::2], arguments[1::2], strict=True):
        value = known.get(value, value)
        if value == "YES":  # a switch
            line.append(key)
            continue
        if key in line:
            line[line.index(key) + 1] = value
        else:
            line += [key, value]
    assert cli.run(line) == 1
    assert re.search(re.escape(message), capsys.readouterr().err), capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 20}, "was planned for 7 seeds"),
        ({"arms": parse_arms("lora,dora", RECIPE)}, "planned with --resolve for arms ['lora', 'dora', 'tsm'], now"),
        ({"arms": parse_arms("lora,dora,tsm,rslora", RECIPE)}, "planned with --resolve for arms"),
        ({"rates": [1e-4, 2e-4]}, "planned with --resolve for rates [0.0001], now they are [0.0001, 0.0002]"),
        ({"tuning_seeds": 2}, "planned with --resolve for tuning seeds"),
        ({}, ""),
        ({"seeds": 7}, ""),
    ],
    ids=["seeds", "fewer arms", "an arm", "a rate", "tuning seeds", "nothing", "the last look"],
)
def test_what_the_error_rates_of_looks_count_on_stays_the_same(tmp_path: Path, changes, message: str):
    planned = Settings(arms=parse_arms("lora,dora,tsm", RECIPE), rates=[1e-4], seeds=3, tasks=["t"])
    looks = Looks((5, 7), (0.7, 1.0))
    state = LookState(
        points=0.03, seeds=5, looks=looks, components={}, reference="lora", fixed=planned_for(planned),
    )  # fmt: skip
    write_state(tmp_path, state)
    assert read_state(tmp_path) == state
    stored = json.loads((tmp_path / "resolve.json").read_text())
    for change in ({"seeds": "x"}, {"points": math.nan}, {"looks": {"seeds": [5, 7], "fractions": [0.7]}}, {"looks": 5},
                   {"looks": {"seeds": [7, 5], "fractions": [0.7, 1.0]}}, {"components": {"a": "b"}}):  # fmt: skip
        (tmp_path / "resolve.json").write_text(json.dumps(stored | change))
        with pytest.raises(ConfigError, match=r"resolve\.json is damaged"):
            read_state(tmp_path)
    comparison = Comparison(RECIPE, dataclasses.replace(planned, **changes), tmp_path, hold_out=0.1)
    if not message:
        comparison._refuse_other_looks(state)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        comparison._refuse_other_looks(state)


def test_a_folder_of_another_comparison_or_version_is_refused(recipe: Path, records: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    line = command(recipe, records, out, "--only-report")
    assert cli.run(line) == 0  # claims the folder; nothing has run
    assert "No comparison yet" in capsys.readouterr().out
    assert cli.run([*line, "--limit", "3"]) == 1
    assert "was started with limit None" in capsys.readouterr().err
    stored = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps(stored | {"format": 0}))
    assert cli.run(line) == 1
    assert "format 0, this version reads 2" in capsys.readouterr().err
    (out / "results.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ConfigError, match="format 9"):
        write_page(out / "results.json", out / "report.html")


@pytest.mark.slow
def test_the_last_output_of_a_run_is_in_its_log(finished: Path):
    place = finished / "runs" / "lora-targets=-nope_lr0.01_tune0"
    assert read_outcome(place).status == "failed"
    assert (place / "log.txt").is_file()
    good = next(finished.glob("runs/full_*_seed0"))
    assert "component" in (good / "log.txt").read_text(), "the run's own table is not in its log"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_the_page_loads_nothing_and_shows_every_part(finished: Path, tmp_path: Path):
    page = finished / "report.html"
    found = subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
         "--disable-background-networking", "--disable-dev-shm-usage", "--enable-logging=stderr",
         "--virtual-time-budget=2000",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in found.stderr, found.stderr
    for text in ("Score: points against", "nats against", "by learning rate", "by trained parameters", "by seconds of"):
        assert text in found.stdout
    for text in ("full@optim.max_grad_norm=0.5", "matches no module", "Most frequent answer", "mm-moslora"):
        assert text in found.stdout
    assert not re.findall(r'(?:src|href)="(?!data:|#)', found.stdout)


@pytest.mark.slow
def test_the_same_command_only_reports_and_a_seed_can_be_added(finished: Path, recipe: Path, records: Path, capsys):
    kept = {path: path.stat().st_mtime_ns for path in finished.glob("runs/full_*/outcome.json")}
    line = command(recipe, records, finished, arms="full,full@optim.max_grad_norm=0.5")
    assert cli.run(line) == 0
    assert "4 runs with 2 new seeds" in capsys.readouterr().out
    line[line.index("--seeds") + 1] = "3"
    assert cli.run(line) == 0
    results = json.loads((finished / "results.json").read_text())
    assert [len(arm["seeds"]) for arm in results["arms"]] == [3, 3]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "a finished run was run again"


@pytest.mark.slow
def test_the_plan_of_one_seed_names_its_limit(finished: Path, recipe: Path, records: Path, capsys):
    line = command(recipe, records, finished)
    line[line.index("--seeds") + 1] = "1"
    assert cli.run([*line, "--plan"]) == 0
    assert "one seed cannot show the variation between seeds" in capsys.readouterr().out
    assert cli.run(line) == 1, "runs of an arm fail"
    results = json.loads((finished / "results.json").read_text())
    assert [row["verdict"] for row in results["comparisons"]] == ["nothing follows"]
    assert [row["seeds"] for row in results["comparisons"]] == [1]
