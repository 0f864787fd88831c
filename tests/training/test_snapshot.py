"""What a checkpoint holds: complete, loadable, exported to the same logits."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tiny import supervised_logits
from trials import with_train

from mm_moslora.batch import Batch
from mm_moslora.config import Recipe
from mm_moslora.models.export.export_huggingface import export_lora, export_model
from mm_moslora.models.load_model import load
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.training_loop import train


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
