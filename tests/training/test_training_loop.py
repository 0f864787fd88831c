"""The training loop on one process: exact resume, complete checkpoints, named failures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import supervised_logits
from transformers import AutoConfig

from mm_moslora.batch import Batch
from mm_moslora.config import OptimConfig, ProjectorConfig, Recipe, SourceConfig
from mm_moslora.models.export.export_huggingface import export_lora, export_model
from mm_moslora.models.load_model import load
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.training_loop import lr_factor, train
from mm_moslora.utils.errors import CheckpointError, ConfigError, ModelError, MoSLoRAError, TrainingError
from mm_moslora.utils.run_paths import RUN_FILES


def with_train(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, train=replace(recipe.train, **changes))


def losses(recipe: Recipe) -> list[str]:
    path = Path(recipe.train.output) / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["loss"].hex() for line in lines if "loss" in line]


def test_a_stopped_run_continues_exactly(recipe, tmp_path, caplog):
    caplog.set_level("INFO", logger="mm_moslora")
    straight = with_train(recipe, output=str(tmp_path / "straight"))
    train(straight)
    first = train(recipe, stop_at=2)
    assert not first.finished
    assert train(recipe).finished
    assert "Continuing from checkpoint-000002, step 2." in caplog.text
    caplog.clear()
    assert losses(recipe) == losses(straight)
    name = "checkpoint-000006/adapter/moslora.safetensors"
    ours, theirs = load_file(tmp_path / "run" / name), load_file(tmp_path / "straight" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    mixers = (tmp_path / "run" / "mixers.json").read_text()
    assert mixers == (tmp_path / "straight" / "mixers.json").read_text()
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


def test_a_projector_that_is_not_there_is_named(recipe, tmp_path):
    for weights, said in ((tmp_path / "gone", "does not exist"), (tmp_path, "is a folder without checkpoints")):
        model = replace(recipe.model, projector=replace(recipe.model.projector, weights=str(weights)))
        with pytest.raises(ModelError, match=said):
            train(replace(recipe, model=model))


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


def test_a_model_folder_that_is_gone_is_told(recipe, tmp_path):
    gone = replace(recipe.model, language=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match=r"model\.language is '.*gone', and nothing is there"):
        train(replace(recipe, model=gone))


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


def test_the_loss_goes_down(recipe):
    # A random language model has little for an adapter to build on, so this one trains whole.
    fast = replace(recipe, model=replace(recipe.model, language_mode="full"))
    train(with_train(fast, steps=40))
    values = [float.fromhex(value) for value in losses(recipe)]
    assert sum(values[-5:]) < 0.6 * sum(values[:5])


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


def test_a_signal_saves_and_the_same_command_goes_on(recipe):
    recipe = with_train(recipe, steps=200)

    def interrupt() -> None:
        path = Path(recipe.train.output) / "metrics.jsonl"
        while not (path.is_file() and len(path.read_text().splitlines()) >= 3):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    helper = threading.Thread(target=interrupt)
    helper.start()
    result = train(recipe)
    helper.join()
    assert result.stopped_by == signal.SIGTERM
    assert 3 <= result.step < 200
    assert train(recipe, stop_at=result.step + 1).step == result.step + 1


def test_every_checkpoint_is_complete_and_loads(recipe, tmp_path):
    train(with_train(recipe, save_every=2))
    run = tmp_path / "run"
    kept = sorted(path.name for path in run.glob("checkpoint-*"))
    assert kept == ["checkpoint-000004", "checkpoint-000006"]
    for name in kept:
        files = {path.relative_to(run / name).as_posix() for path in (run / name).rglob("*") if path.is_file()}
        assert {
            "manifest.json", "config.yaml", "projector.safetensors", "adapter/adapter_config.json",
            "adapter/adapter_model.safetensors", "adapter/moslora.safetensors", "processor/processor_config.json",
            "processor/preprocessor_config.json", "processor/tokenizer.json",
        } <= files  # fmt: skip
        assert load(run / name).peft_model is None
    assert Recipe.from_yaml((run / kept[-1] / "config.yaml").read_text()) == with_train(recipe, save_every=2)
    assert json.loads((run / "mixers.json").read_text())[0]["moved"] > 0
    assert json.loads((run / "summary.json").read_text())["counters"]["steps"] == 6
    assert read_state(run).name == "finished"


def test_what_the_mixers_learned_is_logged_as_the_folder_tells_it(recipe, tmp_path):
    from mm_moslora.adapters.adapter_inspection import inspect_adapter, summary

    result = train(replace(recipe, track=replace(recipe.track, mixers_every=3)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "mixer/effective_rank" in line]
    assert [line["step"] for line in found] == [3, 6]
    for name, value in summary(inspect_adapter(result.checkpoint / "adapter")).items():
        assert found[-1][name] == pytest.approx(value, rel=1e-4)


def test_the_loaded_model_gives_the_logits_of_the_trained_one(recipe, records, tmp_path):
    """Live adapter, merged, exported to stock LLaVA, and plain LoRA on the exported base: the same logits."""
    from peft import PeftModel
    from transformers import LlavaForConditionalGeneration

    train(recipe)
    live, merged = load(tmp_path / "run", merge=False), load(tmp_path / "run")
    example = _example(live)
    batch = Batch.from_examples([example])
    with torch.no_grad():
        expected = supervised_logits(live.model, batch)
        torch.testing.assert_close(supervised_logits(merged.model, batch), expected, rtol=0, atol=1e-5)
    exported = export_model(merged, tmp_path / "export", require_stock=True)
    assert exported.stock
    assert exported.max_logit_difference < 1e-4
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path / "export").eval()
    inputs = {"input_ids": example.input_ids[None], "pixel_values": example.pixel_values}
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).logits[0, batch.target_positions], expected, rtol=0, atol=1e-5)
    export_lora(live, tmp_path / "lora")
    base = load(tmp_path / "run", merge=False)
    base.model = base.peft_model.unload()
    plain = PeftModel.from_pretrained(base.model, tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits[0, batch.target_positions], expected, rtol=0, atol=1e-5)


def _example(assembly):
    from mm_moslora.batch import Example

    ids = torch.tensor([5, *[assembly.image_token_id] * assembly.tokens_per_image, 6, 7, 8])
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[-3:] = True
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return Example(id="x", input_ids=ids, supervised=supervised, pixel_values=pixels)


@pytest.mark.parametrize("mode", ["frozen", "last_n", "full"])
def test_components_train_as_asked(recipe, tmp_path, mode):
    model = replace(
        recipe.model,
        language_mode=mode,
        language_last_n=1 if mode == "last_n" else 0,
        vision=replace(recipe.model.vision, mode="adapter" if mode == "full" else "frozen"),
    )
    train(with_train(replace(recipe, model=model), steps=2))
    folder = tmp_path / "run" / "checkpoint-000002"
    assert (folder / "language.safetensors").is_file() == (mode != "frozen")
    assert (folder / "adapter").is_dir() == (mode == "full")
    changed = load(folder)
    names = set(load_file(folder / "language.safetensors")) if mode != "frozen" else set()
    if mode == "last_n":
        assert names
        assert all(".layers.1." in name for name in names)
    assert changed.model is not None


def test_a_language_model_that_trains_whole_trains_its_head(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "untied"
    config = AutoConfig.from_pretrained(recipe.model.language, tie_word_embeddings=False)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(recipe.model.language).save_pretrained(folder)
    whole = replace(recipe.model, language=str(folder), language_mode="full")
    train(with_train(replace(recipe, model=whole), steps=2))
    before = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    after = load(tmp_path / "run").model.lm_head.weight[: len(before)]
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, atol=0.1)


def test_a_worker_that_dies_is_told_in_a_line(recipe, monkeypatch):
    from mm_moslora.data.training_set import TrainingSet

    def die(self, number):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(TrainingSet, "load", die)
    with pytest.raises(TrainingError, match=r"A process that prepares examples died .* lower data\.workers"):
        train(with_train(replace(recipe, data=replace(recipe.data, workers=1)), rehearsal=False))


def test_a_language_model_alone_trains_too(recipe, tmp_path):
    lines = [
        {"id": i, "conversations": [{"from": "human", "value": "say red"}, {"from": "gpt", "value": "red"}]}
        for i in range(16)
    ]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    recipe = replace(
        recipe,
        model=replace(recipe.model, vision=None),
        data=replace(recipe.data, train=[SourceConfig(path=str(path))]),
    )
    train(with_train(recipe, steps=3))
    assert load(tmp_path / "run").processor is None


def test_the_loss_does_not_depend_on_micro_batches(recipe, tmp_path):
    recipe = replace(recipe, adapter=replace(recipe.adapter, dropout=0.0))
    for micro in (1, 2, 8):
        train(with_train(recipe, micro_batch=micro, output=str(tmp_path / f"m{micro}")))
    values = {
        micro: [float.fromhex(v) for v in losses(with_train(recipe, output=str(tmp_path / f"m{micro}")))]
        for micro in (1, 2, 8)
    }
    assert values[1] == pytest.approx(values[8], rel=1e-5)
    assert values[2] == pytest.approx(values[8], rel=1e-5)


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
    assert [alert["title"] for alert in alerts] == ["Not a number", "Diverged"]
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


def test_a_checkpoint_of_another_run_is_refused_with_the_keys(recipe):
    train(recipe, stop_at=2)
    other = replace(recipe, optim=replace(recipe.optim, lr=5e-3))
    with pytest.raises(CheckpointError, match=r"1 recipe keys differ \(optim.lr: 0.002 -> 0.005\)"):
        train(other)
    run = Path(recipe.train.output)
    assert read_state(run).name == "stopped", "a refused attempt says nothing about the run that is there"
    assert Recipe.from_yaml((run / "config.yaml").read_text()) == recipe
    with pytest.raises(CheckpointError, match="already holds checkpoints, but resume is never"):
        train(recipe, resume="never")


def test_without_deepspeed_one_process_trains_and_a_stage_says_what_is_missing(recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    assert train(recipe, stop_at=1).step == 1
    staged = with_train(recipe, zero="zero2", output=f"{recipe.train.output}-staged")
    with pytest.raises(ConfigError, match=r"zero2 needs deepspeed, .*pip install 'deepspeed>=.*zero none"):
        train(staged)
    assert not Path(staged.train.output).exists()


def test_resume_required_needs_a_checkpoint(recipe):
    with pytest.raises(CheckpointError, match="holds no checkpoint, but resume is required"):
        train(recipe, resume="required")


@pytest.mark.parametrize("what", ["another format", "damaged"])
def test_a_checkpoint_that_cannot_be_read_never_leads_to_a_fresh_start(recipe, what):
    train(recipe, stop_at=2)
    run, before = Path(recipe.train.output), losses(recipe)
    manifest = run / "checkpoint-000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"format": 3}) if what == "another format" else "{")
    for _ in range(3):  # as `--max-restarts` and a requeued job do
        with pytest.raises(CheckpointError, match="format 3" if what == "another format" else "All 1 checkpoints"):
            train(recipe)
    assert losses(recipe) == before
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-000002"]
    (run / "checkpoint-000002").rename(run / "checkpoint-000002.corrupt")  # as an earlier release left it
    with pytest.raises(CheckpointError, match=r"checkpoint-000002\.corrupt"):
        train(recipe)
    assert train(recipe, resume="never", stop_at=1).step == 1


def test_files_of_the_user_in_the_run_folder_are_left_alone(recipe):
    run = Path(recipe.train.output)
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("# my own recipe\n")
    with pytest.raises(ConfigError, match=r"already holds config\.yaml"):
        train(recipe, stop_at=1)
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    (run / "config.yaml").rename(run / "recipe.yaml")
    train(recipe, stop_at=1)
    written = {path.name for path in run.iterdir()} - {"recipe.yaml"}
    assert {name for name in written if not name.startswith(("checkpoint-", "."))} <= {*RUN_FILES}
    assert (run / "recipe.yaml").read_text() == "# my own recipe\n"


def test_a_run_goes_on_from_an_older_checkpoint_of_its_own_and_from_there_again(recipe):
    recipe = with_train(recipe, save_every=2, keep_last=2)
    train(recipe)
    run, expected = Path(recipe.train.output), losses(recipe)
    stopped = train(recipe, resume=str(run / "checkpoint-000004"), stop_at=5)
    folders = ["checkpoint-000004", "checkpoint-000005", "checkpoint-000006.superseded"]
    assert sorted(path.name for path in run.glob("checkpoint-*")) == folders
    assert stopped.checkpoint == run / "checkpoint-000005"
    assert train(recipe).finished
    assert losses(recipe) == expected


def test_a_machine_with_another_precision_is_told(recipe, monkeypatch, caplog):
    """`auto` is bf16 on one machine and fp32 on another, whatever the recipe says."""
    caplog.set_level("INFO", logger="mm_moslora")
    recipe = with_train(recipe, precision="auto")
    for here, step in (("bf16", 2), ("bf16", 4), ("fp32", 6)):
        for module in ("run_setup", "resume"):
            monkeypatch.setattr(f"mm_moslora.training.{module}.resolve_precision", lambda _, here=here: here)
        assert train(recipe, stop_at=step).step == step
        assert ("precision on this machine: bf16 -> fp32" in caplog.text) == (here == "fp32")


def test_resume_from_a_named_folder_continues_exactly(recipe, tmp_path):
    straight = with_train(recipe, save_every=2, keep_last=0, output=str(tmp_path / "straight"))
    train(straight)
    assert train(recipe, resume=str(tmp_path / "straight" / "checkpoint-000004")).finished
    assert losses(recipe) == losses(straight)[4:]
    with pytest.raises(CheckpointError, match=r"resume is 'requird', which is not a folder.*Did you mean 'required'"):
        train(recipe, resume="requird")


def test_two_runs_in_one_folder_are_refused(recipe):
    from mm_moslora.training.run_setup import exclusive

    pid = os.fork()
    if pid == 0:
        with exclusive(Path(recipe.train.output)):
            time.sleep(120)
        os._exit(0)
    try:
        lock, deadline = Path(recipe.train.output) / "run.lock", time.monotonic() + 60
        while not (lock.is_file() and lock.read_text()):  # written by whoever holds it
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(TrainingError, match=f"in use by another run \\(process {pid} on"):
            train(recipe)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


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


def test_an_align_stage_feeds_a_tune_stage(recipe, tmp_path):
    align = replace(recipe, model=replace(recipe.model, language_mode="frozen"))
    result = train(with_train(align, output=str(tmp_path / "align"), steps=2))
    weights = result.checkpoint / "projector.safetensors"
    tune = replace(recipe, model=replace(recipe.model, projector=ProjectorConfig(weights=str(weights))))
    train(with_train(tune, steps=1))
    first = load_file(weights)
    later = load_file(tmp_path / "run" / "checkpoint-000001" / "projector.safetensors")
    assert first.keys() == later.keys()


@pytest.mark.parametrize("mode", ["full", "frozen"])
def test_a_run_goes_on_when_the_stage_before_it_is_gone(recipe, tmp_path, mode):
    """Projector and adapter of an earlier run, whose folder was cleaned up meanwhile."""
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
    assert losses(recipe) == losses(straight)


def test_validation_disturbs_nothing(recipe, tmp_path):
    source = recipe.data.train
    watched = replace(recipe, data=replace(recipe.data, validation=source))
    train(with_train(watched, validate_every=2))
    train(with_train(recipe, output=str(tmp_path / "plain")))
    plain = losses(with_train(recipe, output=str(tmp_path / "plain")))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"].hex() for line in lines if "loss" in line] == plain
    assert len([line for line in lines if "validation_loss" in line]) == 3


def test_the_learning_rate_warms_up_and_comes_down():
    optim = OptimConfig(warmup=0.1, min_lr_ratio=0.1)
    values = [lr_factor(step, 100, optim) for step in range(100)]
    assert values[0] == pytest.approx(1 / 11)
    assert max(values) == values[10] == 1.0
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[-1] == pytest.approx(0.1, abs=0.01)


def test_a_save_in_the_background_looks_at_no_weight_of_the_live_model(recipe, monkeypatch):
    """Under ZeRO-3 a look during a forward pass is a gather, which the other ranks do not join: all would wait."""
    looked = set()

    def noting(plain):
        def call(self, *args, **kwargs):
            looked.add(threading.current_thread().name)
            return plain(self, *args, **kwargs)

        return call

    for name in ("named_parameters", "parameters", "state_dict"):
        monkeypatch.setattr(torch.nn.Module, name, noting(getattr(torch.nn.Module, name)))
    train(with_train(recipe, steps=2, save_every=1))
    assert looked == {"MainThread"}
