"""Measuring during a run of several ranks: the same on every stage, on uneven work, and no trace in the training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_records
from trials import colour_task, hexed, make_recipe, metrics, weights, write

from mm_moslora.adapters.adapter_inspection import inspect_adapter, summary
from mm_moslora.config import Recipe, SourceConfig, ValidateConfig

pytestmark = pytest.mark.slow
STAGES = ("zero2", "zero3")
TINY = {"dropout": 0.1, "micro_batch": 2}
HELD_OUT, DOCUMENTS = 11, 7
"""Eight of the records make a step; of the other three, and of the documents, one rank gets one more."""


def measured(recipe: Recipe, held_out: Path, task: str, **validate) -> Recipe:
    """The same run, measured after every second step by loss, answers and a task of seven documents."""
    source = SourceConfig(path=str(held_out), image_folder=str(held_out.parent / "images"))
    return replace(
        recipe,
        data=replace(recipe.data, validation=[source]),
        train=replace(recipe.train, validate_every=2),
        validate=ValidateConfig(samples=2, sample_tokens=4, tasks=[task], task_limit=DOCUMENTS, **validate),
    )


def found(run: Path) -> list[dict]:
    """The validations of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory) -> Path:
    return make_records(tmp_path_factory.mktemp("held-out"), HELD_OUT)


@pytest.fixture(scope="module")
def task(held_out) -> str:
    return colour_task(held_out.parent / "images", held_out.parent)


@pytest.fixture(scope="module")
def runs(parts, ranks, held_out, task, tmp_path_factory) -> Path:
    """On two ranks, measured and not, and plain torch on one."""
    folder = tmp_path_factory.mktemp("measured")
    recipes = {name: make_recipe(parts, folder / name, name, **TINY) for name in (*STAGES, "none")}
    chosen = {name: write(measured(recipe, held_out, task)) for name, recipe in recipes.items()}
    ranks.run(["trials:train_measured", *(chosen[stage] for stage in STAGES)])
    ranks.run(["trials:train_measured", chosen["none"]], ranks=1)
    ranks.run([write(make_recipe(parts, folder / f"{stage}-alone", stage, **TINY)) for stage in STAGES])
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_measuring_leaves_the_training_of_two_ranks_bit_equal(stage, runs):
    assert hexed(runs / stage) == hexed(runs / f"{stage}-alone")
    assert weights(runs / stage) == weights(runs / f"{stage}-alone")


def test_two_ranks_measure_the_same_on_both_stages(runs):
    two, other = found(runs / "zero3"), found(runs / "zero2")
    assert [line["step"] for line in two] == [2, 4]
    for line, same in zip(two, other, strict=True):
        assert line["validation_loss"] == pytest.approx(same["validation_loss"], rel=1e-5)
        assert line["eval/colours/score"] == same["eval/colours/score"]
    # Dropout differs with the number of ranks, so what one rank finds is close only.
    alone = [line["validation_loss"] for line in found(runs / "none")]
    assert [line["validation_loss"] for line in two] == pytest.approx(alone, rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_answers_and_documents_are_there_once(stage, runs):
    samples = [json.loads(line) for line in (runs / stage / "tracked_samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2 * 2
    assert [s["question"] for s in samples[:2]] == [s["question"] for s in samples[2:]]
    answered = sorted((runs / stage / "validation").glob("step-*/*/own/*/samples.jsonl"))
    assert len(answered) == 2
    for path in answered:
        documents = [json.loads(line)["id"] for line in path.read_text().splitlines()]
        assert len(documents) == len(set(documents)) == DOCUMENTS


@pytest.mark.parametrize(("stage", "what"), [("zero2", "loss"), ("zero3", "task")])
def test_a_signal_to_one_rank_ends_the_validation_of_both_and_nothing_is_lost(
    stage, what, runs, parts, ranks, held_out, task, tmp_path
):
    recipe = write(measured(make_recipe(parts, tmp_path / "run", stage, **TINY), held_out, task))
    ranks.run(["faults:while_measuring", what, "1", recipe])
    run = tmp_path / "run"
    assert not found(run)
    answers = sum(len(path.read_text().splitlines()) for path in run.glob("validation/*/*/own/answers-*.jsonl"))
    assert 0 < answers <= 1 + 4 if what == "task" else not answers, "the other rank has done its share"
    assert json.loads((run / "summary.json").read_text())["steps"] == 2
    ranks.run(["trials:train_measured", recipe])
    times = ("time", "validation_seconds")
    untimed = [
        [{k: v for k, v in line.items() if k not in times} for line in found(one)] for one in (run, runs / stage)
    ]
    assert untimed[0] == untimed[1]
    assert hexed(run) == hexed(runs / stage)
    assert weights(run) == weights(runs / stage)


def test_all_ranks_lose_patience_at_the_same_step(parts, ranks, held_out, task, tmp_path):
    """The score of a task of which every answer is wrong never gets better."""
    recipe = make_recipe(parts, tmp_path / "run", "zero3", steps=20, micro_batch=4, save_every=2, keep_last=1)
    chosen = measured(recipe, held_out, task, best="eval/colours/score", best_is="highest", patience=2)
    ranks.run(["trials:train_measured", write(chosen)])
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["step"] == 2
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 6
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-000002", "checkpoint-000006"]


PRESETS = Path(__file__).parents[3] / "deepspeed_configs"


def mixer_lines(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "mixer/effective_rank" in line]


@pytest.mark.parametrize("stage", ["zero2", "zero3", "cut up"])
def test_measures_of_a_regular_save_are_those_of_its_folder(stage, parts, ranks, tmp_path):
    """Also at the first step of a session, in bf16, and under ZeRO-3 with every small weight cut up."""
    zero = stage
    if stage == "cut up":
        preset = json.loads((PRESETS / "zero3.json").read_text())
        preset["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        zero = str(tmp_path / "cut_up.json")
        Path(zero).write_text(json.dumps(preset))
    recipe = write(make_recipe(parts, tmp_path / "run", zero, precision="bf16", save_every=1, keep_last=9))
    ranks.run([f"{recipe}@1", recipe])
    found = {line["step"]: line for line in mixer_lines(tmp_path / "run")}
    assert sorted(found) == [1, 2, 3, 4]
    for step in found:
        for name, value in summary(inspect_adapter(tmp_path / f"run/checkpoint-{step:06d}/adapter")).items():
            assert found[step][name] == pytest.approx(value, rel=1e-4), (step, name)


def test_measures_that_fail_end_no_run(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero3", save_every=1, keep_last=9)
    group = ranks.run(["faults:failing_measures", write(recipe)])
    assert "The adapter could not be measured (IndexError: out of range). Training continues." in group.output(0)
    assert len(metrics(tmp_path / "run")) == 4
    assert {f"checkpoint-{step:06d}" for step in (1, 2, 3, 4)} <= {path.name for path in (tmp_path / "run").iterdir()}
