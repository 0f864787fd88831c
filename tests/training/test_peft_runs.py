"""Runs with a method of PEFT in the place of MoSLoRA: trained, saved as PEFT saves, continued, loaded and merged."""

from __future__ import annotations

from dataclasses import replace

import torch
from tiny import supervised_logits
from trials import losses, with_train

from mm_moslora.batch import Batch
from mm_moslora.config import AdapterConfig
from mm_moslora.models.load_model import load
from mm_moslora.training.training_loop import train
from tests.training.test_snapshot import _example


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
