"""What a checkpoint holds: complete, loadable, exported to the same logits; and what is tried before the first step."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import supervised_logits
from trials import hexed, losses, with_train

from mm_moslora.adapters import load_method
from mm_moslora.batch import Batch
from mm_moslora.config import AdapterConfig, Recipe
from mm_moslora.models.export.export_huggingface import export_lora, export_model
from mm_moslora.models.load_model import load
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training import resume
from mm_moslora.training.engine import TorchEngine
from mm_moslora.training.snapshot import OPTIMIZER, OPTIMIZER_DETAILS
from mm_moslora.training.training_loop import train
from mm_moslora.utils import files
from mm_moslora.utils.errors import CheckpointError, TrainingError


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


def test_the_state_of_a_rank_that_is_missing_is_a_gap(tmp_path):
    """Its folder may be gone with its host."""
    whole = torch.arange(12.0)
    for rank, (start, end) in enumerate(((0, 4), (4, 9), (9, 12))):
        folder = tmp_path / f"rank-{rank:05d}"
        folder.mkdir()
        save_file({f"exp_avg.{start}.head.weight": whole[start:end].clone()}, folder / OPTIMIZER)
        (folder / OPTIMIZER_DETAILS).write_text(json.dumps({"steps": {"head.weight": 3.0}, "scaler": {}}))
    folders = sorted(tmp_path.iterdir())
    assert torch.equal(resume.StoredOptimizer(folders[::-1]).whole("exp_avg", "head.weight"), whole)
    for there in (folders[1:], folders[::2]):
        with pytest.raises(CheckpointError, match=r"exp_avg of head\.weight has a gap at element"):
            resume.StoredOptimizer(there).whole("exp_avg", "head.weight")
    with pytest.raises(CheckpointError, match=r"has no state of tail\.weight, which trains"):
        resume.StoredOptimizer(folders).whole("exp_avg", "tail.weight")


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
    inputs = {"input_ids": example.input_ids[None], "pixel_values": batch.pixel_values}
    with torch.no_grad():
        torch.testing.assert_close(stock(**inputs).logits[0, batch.target_positions], expected, rtol=0, atol=1e-5)
    export_lora(live, tmp_path / "lora")
    base = load(tmp_path / "run", merge=False)
    base.model = base.peft_model.unload()
    plain = PeftModel.from_pretrained(base.model, tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits[0, batch.target_positions], expected, rtol=0, atol=1e-5)


def _example(assembly):
    from mm_moslora.batch import Example, ProcessedImage

    ids = torch.tensor([5, *[assembly.image_token_id] * assembly.tokens_per_image, 6, 7, 8])
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    supervised[-3:] = True
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    picture = ProcessedImage(tensors={"pixel_values": pixels})
    return Example(id="x", input_ids=ids, supervised=supervised, pictures=[picture])


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


def test_nothing_remains_of_it(recipe, tmp_path, caplog):
    caplog.set_level("INFO")
    short = replace(recipe, train=replace(recipe.train, steps=2))
    train(short)
    train(replace(short, train=replace(short.train, rehearsal=False, output=str(tmp_path / "other"))))
    assert hexed(tmp_path / "run") == hexed(tmp_path / "other")
    assert caplog.text.count("Rehearsal: a checkpoint takes") == 1
    assert not list((tmp_path / "run").glob(".tmp*"))


def test_a_micro_batch_that_does_not_fit_is_said_before_the_first_step(recipe, monkeypatch, tmp_path):
    def full(self, micro_batches, lr_factor):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TorchEngine, "step", full)
    with pytest.raises(TrainingError, match=r"4 examples with \d+ tokens .* does not fit .* Lower train\.micro_batch"):
        train(recipe)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_too_little_room_is_said_before_the_first_step(recipe, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    with pytest.raises(CheckpointError, match=r"0 MiB free, .* MiB are needed, .* MiB are missing"):
        train(recipe)


def test_a_disk_that_fills_up_later_costs_no_training(recipe, monkeypatch, caplog, tmp_path):
    """Two saves find no room, the later ones do; three in a row would stop the run."""
    real = files.free_bytes
    steps = replace(recipe.train, save_every=1, rehearsal=False, keep_last=0)

    remaining = {"full": 2}

    def free(folder):
        if remaining["full"]:
            remaining["full"] -= 1
            return 1000
        return real(folder)

    monkeypatch.setattr(files, "free_bytes", free)
    train(replace(recipe, train=steps))
    assert caplog.text.count("Training continues.") == 2
    names = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:06d}" for step in (3, 4, 5, 6)]
    remaining["full"] = 3
    with pytest.raises(CheckpointError, match="The last 3 saves failed"):
        train(replace(recipe, train=replace(steps, output=str(tmp_path / "full"))))


def test_a_trial_that_reads_back_otherwise_is_an_error(recipe, monkeypatch):
    hashes = iter(range(10**6))
    monkeypatch.setattr(resume, "sha256_of", lambda path: str(next(hashes)))
    with pytest.raises(CheckpointError, match="reads back differently than it was written"):
        train(recipe)


def test_a_run_is_saved_as_peft_saves_and_continues_bit_for_bit(recipe, tmp_path):
    options = {"type": "LORA", "init_lora_weights": "pissa"}
    given = replace(recipe, adapter=AdapterConfig(rank=4, alpha=8, peft=options))
    train(with_train(given, output=str(tmp_path / "whole"), save_every=2, steps=4))
    train(with_train(given, save_every=2, steps=4), stop_at=2)
    train(with_train(given, save_every=2, steps=4))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "run"))) == 4
    folder = tmp_path / "run" / "checkpoint-000004"
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    live, merged = load(folder, merge=False), load(folder)
    assert live.peft_model.peft_config["default"].peft_type == options["type"]
    assert merged.peft_model is None
    batch = Batch.from_examples([_example(live)])
    with torch.no_grad():
        expected = supervised_logits(live.model, batch)
        torch.testing.assert_close(supervised_logits(merged.model, batch), expected, rtol=0, atol=1e-5)
        with live.peft_model.disable_adapter():
            assert not torch.allclose(supervised_logits(live.model, batch), expected, atol=1e-4)
    weights = folder / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors was altered or truncated"):
        load_method(live.model, folder / "adapter")
