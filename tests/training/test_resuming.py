"""Resuming: exactly, from a moved run and from older checkpoints; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trials import hexed, with_train

from mm_moslora.config import ProjectorConfig, Recipe
from mm_moslora.models.load_model import load
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.metrics.gpu_memory import RunEstimate
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import CheckpointError, ModelError


def test_a_stopped_run_continues_exactly(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="mm_moslora")
    straight = with_train(recipe, output=str(tmp_path / "straight"))
    train(straight)
    first = train(recipe, stop_at=2)
    assert not first.finished
    assert train(recipe).finished
    assert "Continuing from checkpoint-000002, step 2." in caplog.text
    caplog.clear()
    assert hexed(Path(recipe.train.output)) == hexed(Path(straight.train.output))
    name = "checkpoint-000006/adapter/moslora.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(tmp_path / "straight" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    mixers = (tmp_path / "run" / "mixers.json").read_text()
    assert mixers == (tmp_path / "straight" / "mixers.json").read_text()
    assert all(row["moved"] > 0 for row in json.loads(mixers))
    assert train(recipe).step == 6  # a third call finds everything done
    assert "The run is finished" in caplog.text
    assert "Continuing" not in caplog.text
    assert (tmp_path / "run" / "mixers.json").read_text() == mixers


def test_training_longer_is_refused_with_the_way_to_do_it(recipe, tmp_path):
    """The keys that the refusal names start another run from the weights of the first; a run folder will do, too."""
    train(with_train(recipe, steps=2))
    with pytest.raises(CheckpointError, match="belongs to another run") as refusal:
        train(with_train(recipe, steps=4))
    words = str(refusal.value).partition(" and give ")[2].rstrip(".").split()
    run = Path(recipe.train.output)
    assert words[::2] == ["--adapter.weights", "--model.projector.weights"]
    assert {Path(word) for word in words[1::2]} == {run / "checkpoint-000002"}
    files = ("adapter/moslora.safetensors", "projector.safetensors")
    first = [load_file(run / "checkpoint-000002" / file) for file in files]
    for start in (run / "checkpoint-000002", run):
        model = replace(recipe.model, projector=replace(recipe.model.projector, weights=str(start)))
        still = replace(recipe.optim, lr=0.0, projector_lr=0.0)
        longer = replace(recipe, model=model, adapter=replace(recipe.adapter, weights=str(start)), optim=still)
        output = tmp_path / f"from-{start.name}"
        train(with_train(longer, steps=1, output=str(output)))
        for old, new in zip(first, [load_file(output / "checkpoint-000001" / file) for file in files], strict=True):
            assert old.keys() == new.keys()
            assert all(torch.equal(old[key], new[key]) for key in old)


def test_a_run_is_used_and_goes_on_from_elsewhere(recipe, records, tmp_path, monkeypatch):
    """Its recipe names folders relative to where it was started; then the tree moves, the data goes to another disk."""
    project = tmp_path / "project"
    for name, folder in (("llm", recipe.model.language), ("tower", recipe.model.vision.name), ("data", records.parent)):
        shutil.copytree(folder, project / "parts" / name)
    monkeypatch.chdir(project)
    source = replace(recipe.data.train[0], path="parts/data/train.jsonl", image_folder="parts/data/images")
    model = replace(recipe.model, language="parts/llm", vision=replace(recipe.model.vision, name="parts/tower"))
    recipe = with_train(replace(recipe, model=model, data=replace(recipe.data, train=[source])), output="runs/x")
    train(recipe, stop_at=2)
    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert load(moved / "runs" / "x").model is not None

    shutil.move(moved / "parts" / "data", tmp_path / "disk")
    monkeypatch.chdir(moved)
    source = replace(source, path=str(tmp_path / "disk/train.jsonl"), image_folder=str(tmp_path / "disk/images"))
    assert train(replace(recipe, data=replace(recipe.data, train=[source]))).finished


def test_a_base_named_by_an_absolute_path_may_move(recipe, tmp_path, monkeypatch):
    old, new = tmp_path / "work" / "models", tmp_path / "work" / "store" / "models"
    for name, folder in (("llm", recipe.model.language), ("tower", recipe.model.vision.name)):
        shutil.copytree(folder, old / name)
    model = replace(
        recipe.model, language=str(old / "llm"), vision=replace(recipe.model.vision, name=str(old / "tower"))
    )
    recipe = replace(recipe, model=model, train=replace(recipe.train, output=str(tmp_path / "work" / "runs" / "x")))
    train(recipe, stop_at=2)
    run = Path(recipe.train.output)

    other = tmp_path / "work" / "runs" / "llm"  # lies nearer and is called the same, but is another model
    shutil.copytree(old / "llm", other)
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"else")
    new.parent.mkdir()
    old.rename(new)
    with pytest.raises(ModelError, match=r"nothing is there.*MM_MOSLORA_MODELS"):
        load(run)
    with pytest.raises(ModelError, match=r"nothing is there.*MM_MOSLORA_MODELS"):
        train(recipe)
    monkeypatch.setenv("MM_MOSLORA_MODELS", f"/nowhere:{new.parent}")
    assert load(run).model is not None
    train(recipe, stop_at=4)

    monkeypatch.delenv("MM_MOSLORA_MODELS")
    named = replace(model, language=str(other), vision=replace(model.vision, name=str(new / "tower")))
    with pytest.raises(CheckpointError, match=r"1 recipe keys differ \(model\.language"):
        train(replace(recipe, model=named))
    assert train(replace(recipe, model=replace(named, language=str(new / "llm")))).finished

    (new / "llm").rename(run.parent / "beside")  # its name is gone, too
    (new / "tower").rename(tmp_path / "tower")
    with pytest.raises(ModelError, match="nothing is there"):
        load(run)
    shutil.rmtree(other)
    (run.parent / "beside").rename(other)
    assert load(run).model is not None  # both are found by what is in them


def test_data_that_changed_in_between_is_told(recipe, records, tmp_path):
    lines = records.read_text().splitlines()
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(lines))
    source = replace(recipe.data.train[0], path=str(path))
    recipe = replace(recipe, data=replace(recipe.data, train=[source]))
    train(recipe, stop_at=2)
    path.write_text("\n".join([*lines, lines[0]]))
    with pytest.raises(CheckpointError, match=r"data differs from that of .*checkpoint-000002"):
        train(recipe)
    path.write_text("\n".join(lines))
    assert train(recipe).finished


def test_a_checkpoint_of_another_run_is_refused_with_the_keys(recipe):
    with pytest.raises(CheckpointError, match="holds no checkpoint, but resume is required"):
        train(recipe, resume="required")
    train(recipe, stop_at=2)
    other = with_train(
        replace(recipe, optim=replace(recipe.optim, lr=5e-3)), save_every=9
    )  # which every run may change
    with pytest.raises(CheckpointError, match=r"1 recipe keys differ \(optim.lr: 0.002 -> 0.005\)"):
        train(other)
    run = Path(recipe.train.output)
    assert read_state(run).name == "stopped", "a refused attempt says nothing about the run that is there"
    assert Recipe.from_yaml((run / "config.yaml").read_text()) == recipe
    with pytest.raises(CheckpointError, match="already holds checkpoints, but resume is never"):
        train(recipe, resume="never")


@pytest.mark.parametrize("what", ["another format", "damaged"])
def test_a_checkpoint_that_cannot_be_read_never_leads_to_a_fresh_start(recipe, what):
    train(recipe, stop_at=2)
    run, before = Path(recipe.train.output), hexed(Path(recipe.train.output))
    manifest = run / "checkpoint-000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 3, "version": "9.0"}) if what == "another format" else "{")
    for _ in range(3):  # as `--max-restarts` and a requeued job do
        with pytest.raises(CheckpointError, match="format 3" if what == "another format" else "All 1 checkpoints"):
            train(recipe)
    assert hexed(Path(recipe.train.output)) == before
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-000002"]
    (run / "checkpoint-000002").rename(run / "checkpoint-000002.corrupt")
    with pytest.raises(CheckpointError, match=r"checkpoint-000002\.corrupt"):
        train(recipe)
    assert train(recipe, resume="never", stop_at=1).step == 1


def test_a_run_goes_on_from_an_older_checkpoint_of_its_own_and_from_there_again(recipe):
    recipe = with_train(recipe, save_every=2, keep_last=2)
    train(recipe)
    run, expected = Path(recipe.train.output), hexed(Path(recipe.train.output))
    stopped = train(recipe, resume=str(run / "checkpoint-000004"), stop_at=5)
    folders = ["checkpoint-000004", "checkpoint-000005", "checkpoint-000006.superseded"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == folders
    assert stopped.checkpoint == run / "checkpoint-000005"
    assert train(recipe).finished
    assert hexed(Path(recipe.train.output)) == expected


def test_a_run_that_names_no_stage_keeps_that_of_its_checkpoint(recipe, caplog):
    started = with_train(recipe, zero="zero2", steps=4, rehearsal=False)
    train(started, stop_at=2)
    with caplog.at_level("INFO"):
        result = train(with_train(started, zero="auto"))
    assert result.finished
    assert "train.zero" not in caplog.text
    assert Recipe.from_yaml(Path(started.train.output, "config.yaml").read_text()).train.zero == "zero2"


def test_a_machine_with_another_precision_or_token_budget_is_told(recipe, monkeypatch, caplog):
    """`auto` is bf16 on one machine and fp32 on another, and a GPU has room for more tokens than another."""
    caplog.set_level("INFO", logger="mm_moslora")
    recipe = with_train(recipe, precision="auto")
    recipe = replace(recipe, data=replace(recipe.data, max_length=64))
    for here, tokens, step in (("bf16", 256, 2), ("bf16", 256, 4), ("fp32", 128, 6)):
        monkeypatch.setattr(
            "mm_moslora.training.run_setup.estimate_run", lambda *_, tokens=tokens, **__: RunEstimate(tokens, None)
        )
        for module in ("run_setup", "checkpointing.run_checkpoints"):
            monkeypatch.setattr(f"mm_moslora.training.{module}.resolve_precision", lambda _, here=here: here)
        assert train(recipe, stop_at=step).step == step
        assert ("precision on this machine: bf16 -> fp32" in caplog.text) == (here == "fp32")
        assert ("at most 128 tokens on this machine, and 256 where checkpoint-000004" in caplog.text) == (step == 6)


def test_resume_from_a_named_folder_continues_exactly(recipe, tmp_path):
    straight = with_train(recipe, save_every=2, keep_last=0, output=str(tmp_path / "straight"))
    train(straight)
    assert train(recipe, resume=str(tmp_path / "straight" / "checkpoint-000004")).finished
    assert hexed(Path(recipe.train.output)) == hexed(Path(straight.train.output))[4:]
    with pytest.raises(CheckpointError, match=r"resume is 'requird', which is not a folder.*Did you mean 'required'"):
        train(recipe, resume="requird")


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_run_goes_on_when_the_stage_before_it_is_gone(recipe, tmp_path, mode):
    """Projector and adapter of an earlier run; its folder was cleaned up meanwhile."""
    before = with_train(recipe, output=str(tmp_path / "before"), steps=2)
    stage = train(before).checkpoint
    projector = ProjectorConfig(weights=str(stage / "projector.safetensors"), mode=mode)
    adapter = replace(recipe.adapter, weights=str(stage / "adapter"))
    recipe = replace(recipe, model=replace(recipe.model, projector=projector), adapter=adapter)
    straight = with_train(recipe, output=str(tmp_path / "straight"))
    train(straight)
    train(recipe, stop_at=2)
    shutil.rmtree(tmp_path / "before")
    assert train(recipe).finished
    assert hexed(Path(recipe.train.output)) == hexed(Path(straight.train.output))
    found, expected = (json.loads((tmp_path / name / "mixers.json").read_text()) for name in ("run", "straight"))
    assert [row["moved"] for row in found] == [row["moved"] for row in expected]
