"""Measuring during the run: it changes nothing, names the best checkpoint, and knows when to stop."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from between import just_before
from mm_moslora_eval.protocol.task_groups import tasks_of
from mm_moslora_eval.run.in_training import measure
from mm_moslora_eval.run.task_runner import _AnswerJob
from trials import colour_task, hexed

from mm_moslora.config import ValidateConfig
from mm_moslora.data.batch_loader import BatchLoader
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.checkpointing.checkpoint_folder import Saver
from mm_moslora.training.checkpointing.run_checkpoints import Best, lower_is_better
from mm_moslora.training.engine import TrainingEngine
from mm_moslora.training.image_dependence import ImageCheck
from mm_moslora.training.run_setup import prepare
from mm_moslora.training.training_loop import train
from mm_moslora.training.validation import Validator
from mm_moslora.utils.errors import CheckpointError, EvalError, TrainingError


def watched(recipe, **validate):
    return replace(
        recipe,
        data=replace(recipe.data, validation=recipe.data.train),
        train=replace(recipe.train, validate_every=2, output=f"{recipe.train.output}-watched"),
        validate=ValidateConfig(**validate),
    )


def unruly(moment):
    """A harness that uses up random numbers and gradients' settings."""
    random.random()
    torch.rand(7)
    assert not moment.assembly.model.training
    return {"eval/fake/score": 10.0 - moment.step}


def test_measuring_leaves_a_base_in_four_bits_and_its_training_bit_equal(recipe, tmp_path):
    """On a CPU bitsandbytes repacks what it evaluates, with other scales, and that layout has no gradient."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    recipe = replace(recipe, model=replace(recipe.model, quantisation="nf4"))
    train(recipe)
    chosen = watched(recipe, samples=3, sample_tokens=5)
    run = Path(chosen.train.output)
    assert not train(chosen, stop_at=3).finished
    assert train(chosen).finished
    assert hexed(run) == hexed(tmp_path / "run")


def test_loss_answers_and_tasks_leave_the_training_bit_equal(recipe, tmp_path):
    train(recipe)
    chosen = watched(recipe, samples=3, sample_tokens=5, tasks=["fake"])
    train(chosen, measure=unruly)
    run = Path(chosen.train.output)
    assert hexed(run) == hexed(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    assert [line["eval/fake/score"] for line in measured] == [8.0, 6.0, 4.0]
    samples = [json.loads(line) for line in (run / "tracked_samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9
    assert {Path(sample["image"]).suffix for sample in samples if sample["image"]} == {".png"}
    assert samples[0]["question"] == samples[3]["question"]  # the same records every time
    assert all(sample["expected"] for sample in samples)


def test_patience_ends_the_run_and_the_best_checkpoint_is_kept(recipe):
    chosen = watched(recipe, tasks=["fake"], best="eval/fake/score", patience=2)
    chosen = replace(chosen, train=replace(chosen.train, steps=40, save_every=2, keep_last=1))
    first = train(chosen, measure=unruly, stop_at=4)
    assert not first.finished
    result = train(chosen, measure=unruly)  # patience goes on where it was
    assert result.stopped_early
    assert result.finished
    assert result.step == 6
    run = Path(chosen.train.output)
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["value"], best["checkpoint"]) == (2, 8.0, "checkpoint-000002")
    written = {name: (run / name).read_text() for name in ("metrics.jsonl", "best.json")}
    assert train(chosen, measure=unruly).step == 6  # asked again, it does not go on
    assert {name: (run / name).read_text() for name in written} == written
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000006"]


def test_what_was_measured_before_the_step_a_run_goes_on_from_counts(recipe):
    """The newest checkpoint, which was the best, is damaged: the one before it is the best again."""
    values = {2: 3.0, 4: 2.0, 6: 9.0, 8: 1.0, 10: 0.0}

    def measured(moment):
        return {"eval/fake/score": values[moment.step]}

    chosen = watched(recipe, tasks=["fake"], best="eval/fake/score", patience=3)
    chosen = replace(chosen, train=replace(chosen.train, steps=40, save_every=2, keep_last=3))
    train(chosen, measure=measured, stop_at=6)
    run = Path(chosen.train.output)
    assert json.loads((run / "best.json").read_text())["step"] == 6
    (run / "checkpoint-000006" / "manifest.json").write_text("{}")
    values[6] = 1.5
    result = train(chosen, measure=measured)
    assert result.step == 8  # the third validation after step 2's
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["value"], best["checkpoint"]) == (2, 3.0, "checkpoint-000002")
    assert best["history"] == [{"step": step, "value": values[step]} for step in (2, 4, 6, 8)]
    assert (run / "checkpoint-000002").is_dir()


def test_a_finished_run_that_is_started_again_measures_and_writes_nothing(recipe, monkeypatch):
    chosen = watched(recipe, samples=2, sample_tokens=3, tasks=["fake"])
    for memory, stop_at in ((3.0, 4), (2.0, None)):
        monkeypatch.setattr("mm_moslora.training.supervision.run_faults.peak_memory_gib", lambda memory=memory: memory)
        train(chosen, measure=unruly, stop_at=stop_at)
    run = Path(chosen.train.output)
    its_session = ("state.json", "run.lock")
    written = {path: path.read_text() for path in run.iterdir() if path.is_file() and path.name not in its_session}
    assert {"summary.json", "config.yaml", "environment.json", "mixers.json"} <= {path.name for path in written}
    assert sum('"mixer/moved"' in line for line in written[run / "metrics.jsonl"].splitlines()) == 1
    assert json.loads(written[run / "summary.json"])["memory_gib"] == 3.0

    def never(moment):
        raise AssertionError("measured again")

    monkeypatch.setattr("mm_moslora.training.supervision.run_faults.peak_memory_gib", lambda: 99.0)
    again = train(replace(chosen, name="again"), measure=never)
    assert again.finished
    assert again.checkpoint == run / "checkpoint-000006"
    assert {path: path.read_text() for path in written} == written


@pytest.mark.parametrize("every", [0, 7])
def test_a_run_is_saved_before_its_end_is_measured(recipe, every):
    """A harness that fails at the end, here at the seventh step, must not cost the training."""
    chosen = watched(recipe, tasks=["fake"])
    chosen = replace(chosen, train=replace(chosen.train, steps=7, validate_every=every))

    def failing(moment):
        if moment.step == 7:
            raise TrainingError("no answers")
        return {}

    with pytest.raises(TrainingError, match="no answers"):
        train(chosen, measure=failing)
    trained = hexed(Path(chosen.train.output))
    assert len(trained) == 7
    for _ in range(2):  # the second time everything was measured
        assert train(chosen, measure=unruly).finished
    lines = [json.loads(line) for line in (Path(chosen.train.output) / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/fake/score"] for line in lines if "eval/fake/score" in line] == [3.0]
    assert hexed(Path(chosen.train.output)) == trained


def test_a_signal_while_the_end_is_measured_costs_nothing(recipe):
    chosen = watched(recipe, tasks=["fake"])
    chosen = replace(chosen, train=replace(chosen.train, validate_every=0))

    def interrupted(moment):
        signal.raise_signal(signal.SIGTERM)
        return unruly(moment)

    result = train(chosen, measure=interrupted)
    assert result.finished
    assert result.checkpoint.is_dir()


def test_the_best_checkpoint_stays_until_a_better_one_is_there(recipe, monkeypatch):
    """The save of the better one fails."""
    values = {2: 1.0, 4: 2.0, 6: 0.0}
    chosen = watched(recipe, tasks=["fake"], best="eval/fake/score")
    chosen = replace(chosen, train=replace(chosen.train, steps=8, save_every=2, keep_last=1))
    start = Saver.start

    def failing(saver, manifest, write, **options):
        if manifest.step == 4:
            raise CheckpointError("no room")
        start(saver, manifest, write, **options)

    monkeypatch.setattr(Saver, "start", failing)
    train(chosen, measure=lambda moment: {"eval/fake/score": values[moment.step]}, stop_at=6)
    run = Path(chosen.train.output)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000006"]
    best = json.loads((run / "best.json").read_text())
    assert (best["step"], best["value"], best["checkpoint"]) == (4, 2.0, "checkpoint-000002")


def test_held_out_records_are_seen_once_however_training_mixes(recipe):
    held_out = replace(recipe.data.train[0], limit=5)
    data = replace(recipe.data, validation=[held_out], mixing="parts", epoch_records=200)
    run = prepare(replace(recipe, data=data))
    loader = BatchLoader(run.validation_set, rank=0, world_size=1, config=data, global_batch=4, limit=run.limit)
    assert sorted(number for step in loader.plan(0) for number in step) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (["pop"], "Did you mean 'pope'"),
        (["pope", "pope@llava"], "would both be measured as eval/pope/"),
        (["@llava15", "mme"], "'mme@llava' and 'mme' would both be measured as eval/mme/"),
        (["@llava1"], r"no group @llava1\. Did you mean 'llava15'"),
    ],
)
def test_tasks_that_cannot_be_told_apart_or_found_are_named(tasks, said):
    with pytest.raises(EvalError, match=said):
        tasks_of(tasks)


@pytest.mark.parametrize(
    ("metric", "lower"),
    [
        ("validation_loss", True), ("eval/gqa/score", False), ("eval/x/perplexity", True), ("eval/x/WER", True),
        ("eval/x/answer_accuracy", False),
    ],
)  # fmt: skip
def test_which_way_is_better(metric, lower):
    assert lower_is_better(metric, "auto") == lower
    assert lower_is_better(metric, "highest") is False


def test_a_value_that_is_not_a_number_is_never_the_best():
    best = Best(config=ValidateConfig(best="validation_loss"))
    assert best.update({"validation_loss": 2.0}, 1)
    assert not best.update({"validation_loss": float("nan")}, 2)
    assert not best.update({"eval/x/score": 1.0}, 3)  # a task's metrics that are no numbers are left out
    assert best.since == 2
    assert best.update({"validation_loss": 1.0}, 4)
    assert (best.step, best.since) == (4, 0)


def test_a_best_checkpoint_that_is_not_there_is_not_named():
    best = Best(config=ValidateConfig(best="validation_loss"))
    for step, loss in ((1, 2.0), (2, 3.0), (3, 1.0)):
        best.update({"validation_loss": loss}, step)
    assert best.among([]) is None
    assert best.among([2]) == 2
    assert best.among([1, 2]) == 1
    assert best.among([1, 2, 3, 4]) == 3


def test_a_full_disk_does_not_end_a_run_for_the_sake_of_best_json(tmp_path, monkeypatch, caplog):
    best = Best(config=ValidateConfig(best="validation_loss"))
    best.update({"validation_loss": 1.0}, 4)
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", mock.Mock(side_effect=OSError(28, "No space left on device")))
        best.write(tmp_path, "checkpoint-000004")
    assert "best.json is not written: [Errno 28]" in caplog.text
    best.write(tmp_path, "checkpoint-000004")
    assert Best.of(tmp_path, best.config, resume_step=4).value == 1.0


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def story(run: Path) -> dict[str, object]:
    """All that a run measured, answered and chose, without times."""
    timed = ("second", "memory", "time")
    return {
        "metrics": [
            {k: v for k, v in line.items() if not any(word in k for word in timed)}
            for line in read(run / "metrics.jsonl")
        ],
        "samples": read(run / "tracked_samples.jsonl"),
        "best": json.loads((run / "best.json").read_text()),
        "weights": [path.read_bytes() for path in sorted((run / "checkpoint-000006").rglob("*.safetensors"))],
        "counters": sorted(json.loads((run / "checkpoint-000006" / "manifest.json").read_text())["counters"]),
    }


def test_signals_cut_validations_short_and_nothing_is_lost(recipe, records, tmp_path, monkeypatch):
    """In the loss of three batches, two answers and a task of four documents, at step 4, again and again, and at 6."""
    monkeypatch.setattr(ImageCheck, "__call__", lambda *_: None)  # it evaluates, too
    chosen = watched(
        recipe,
        samples=2,
        sample_tokens=3,
        tasks=[colour_task(records.parent / "images", tmp_path)],
        task_limit=4,
        best="validation_loss",
    )
    straight = replace(chosen, train=replace(chosen.train, output=str(tmp_path / "straight")))
    train(straight, measure=measure)
    run = Path(chosen.train.output)
    told = functools.partial(signal.raise_signal, signal.SIGTERM)
    for owner, name, call, step in (
        (TrainingEngine, "evaluate", 5, 4), (Validator, "_answer", 1, 4), (_AnswerJob, "_store", 2, 4),
        (TrainingEngine, "evaluate", 5, 6), (_AnswerJob, "_store", 2, 6),
    ):  # fmt: skip
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            just_before(patch, owner, name, told, when=lambda *_, n=calls, call=call: next(n) == call)
            stopped = train(chosen, measure=measure)
        assert (stopped.step, stopped.stopped_by, stopped.finished) == (step, signal.SIGTERM, False)
        assert read(run / "metrics.jsonl")[-1]["step"] == step
        assert "validation_loss" not in read(run / "metrics.jsonl")[-1]
        assert read_state(run).name == "stopped"
    assert train(chosen, measure=measure).finished
    assert story(run) == story(tmp_path / "straight")


def test_a_validation_that_is_done_again_may_be_cut_short_again_and_end_the_run(recipe, monkeypatch):
    """Its result is the one that patience waited for."""
    monkeypatch.setattr(ImageCheck, "__call__", lambda *_: None)  # it evaluates, too
    chosen = watched(recipe, tasks=["fake"], best="eval/fake/score", patience=1)
    for first in (4, 1):
        calls = itertools.count(1)
        with monkeypatch.context() as patch:
            told = functools.partial(signal.raise_signal, signal.SIGTERM)
            just_before(patch, TrainingEngine, "evaluate", told, when=lambda *_, n=calls, first=first: next(n) == first)
            stopped = train(chosen, measure=unruly)
        assert (stopped.step, stopped.stopped_by) == (4, signal.SIGTERM)
    result = train(chosen, measure=unruly)
    assert (result.step, result.stopped_early, result.finished) == (4, True, True)
