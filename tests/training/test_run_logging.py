"""What a run logs: metrics, mixers, alerts, quarantined records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from trials import with_train

from mm_moslora.config import SourceConfig
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import CheckpointError, MoSLoRAError, TrainingError


def test_time_tokens_and_accuracy_are_metrics_and_go_on_after_a_stop(recipe, tmp_path):
    held_out = replace(recipe, data=replace(recipe.data, validation=recipe.data.train))
    train(with_train(held_out, log_every=2, validate_every=3), stop_at=4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4]
    assert all(0 <= line["token_accuracy"] <= 1 for line in steps)
    assert steps[0]["eta_seconds"] > steps[0]["wall_seconds"] > 0
    validations = [line for line in lines if "validation_loss" in line]
    assert all(0 <= line["validation_token_accuracy"] <= 1 for line in validations)
    assert 2 * steps[1]["wall_seconds"] > validations[0]["validation_seconds"], "a validation takes time, too"
    train(with_train(held_out, log_every=2, validate_every=3))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["samples_seen"] == 6 * recipe.train.global_batch
    counters = json.loads((tmp_path / "run" / "summary.json").read_text())["counters"]
    assert last["tokens_seen"] == counters["tokens"]
    assert last["elapsed_seconds"] > steps[1]["elapsed_seconds"]
    assert last["eta_seconds"] == 0


def test_what_the_mixers_learned_is_logged_as_the_folder_tells_it(recipe, tmp_path):
    from mm_moslora.adapters.adapter_inspection import inspect_adapter, summary

    result = train(replace(recipe, track=replace(recipe.track, mixers_every=3)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "mixer/effective_rank" in line]
    assert [line["step"] for line in found] == [3, 6]
    for name, value in summary(inspect_adapter(result.checkpoint / "adapter")).items():
        assert found[-1][name] == pytest.approx(value, rel=1e-4)


def test_a_step_that_is_not_finite_is_skipped_and_too_many_stop_the_run(recipe, tmp_path, caplog):
    huge = replace(recipe, optim=replace(recipe.optim, lr=1e30, projector_lr=1e30, warmup=0, max_grad_norm=0))
    with pytest.raises(TrainingError, match=r"5 steps in a row .* not finite; stopped at step"):
        train(with_train(huge, steps=20))
    assert "skipped: the loss or a gradient is not finite" in caplog.text
    state = read_state(tmp_path / "run")
    assert state.name == "failed"
    assert "5 steps in a row" in str(state.reason)
    logged = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert f"stopped at step {logged[-1]}." in str(state.reason)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    alerts = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [alert["title"] for alert in alerts] == ["Diverged"]
    assert "5 steps in a row" in alerts[-1]["text"]


def test_a_save_that_fails_and_a_run_that_fails_are_told_to_whoever_is_not_looking(recipe, tmp_path, monkeypatch):
    def full(self, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm_moslora.training.snapshot.Snapshot.write", full)
    with pytest.raises(CheckpointError):
        train(with_train(recipe, save_every=1, background_save=False, rehearsal=False))
    alerts = [json.loads(line) for line in (tmp_path / "run" / "alerts.jsonl").read_text().splitlines()]
    assert [alert["title"] for alert in alerts] == ["Save failed", "Save failed", "Run failed"]
    assert "No space left on device" in alerts[-1]["text"]


def test_bad_records_are_counted_and_too_many_stop_the_run(recipe, records, tmp_path):
    lines = records.read_text().splitlines()
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join([*lines, '{"id": "bad", "image": "missing.png"}', "{not json"]))
    source = SourceConfig(path=str(broken), image_folder=str(records.parent / "images"))
    some = replace(recipe, data=replace(recipe.data, train=[source], max_bad_share=0.2))
    train(with_train(some, steps=2))
    quarantined = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [line["record"] for line in quarantined] == [len(lines), len(lines) + 1]
    strict = replace(recipe, data=replace(recipe.data, train=[source], max_bad_share=0.01))
    with pytest.raises(MoSLoRAError, match="max_bad_share"):
        train(with_train(strict, output=str(tmp_path / "strict")))


def test_a_step_of_more_records_than_there_are_is_remarked(recipe, records, caplog):
    train(with_train(recipe, global_batch=100, steps=1, rehearsal=False))
    there = len(records.read_text().splitlines())
    assert f"train.global_batch is 100, and the data has {there} records" in caplog.text
