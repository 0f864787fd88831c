"""What ranks say about their GPUs when a run starts, and which of them they touch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import transformers

from mm_moslora.config import Recipe
from mm_moslora.kernels.attention import attention_choice
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training.engine import model_execution
from mm_moslora.utils import distributed


def test_different_gpus_among_the_ranks_are_named_once(monkeypatch, caplog):
    others = [([("A100, 80 GiB", "varlen")], ("one fault",)), ([("L4, 23 GiB", "loop")], ("one fault",))]
    monkeypatch.setattr(distributed, "gather_objects", lambda _: others)
    model_execution.log_what_runs(attention_choice.AttentionChoice(name=SEGMENTS, words="varlen"), "fp32")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings[0] == "one fault."
    assert "ranks 0: A100, 80 GiB (attention: varlen); ranks 1: L4, 23 GiB (attention: loop)" in warnings[1]
    assert len(warnings) == 2


def test_a_gpu_that_emulates_bf16_is_named(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "gpu_in_words", lambda: "T4, 15 GiB, compute capability 7.5")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    for precision in ("bf16", "fp16"):
        model_execution.log_what_runs(attention_choice.AttentionChoice(name=SEGMENTS), precision)
    assert caplog.text.count("T4, 15 GiB, compute capability 7.5 emulates bf16") == 1


def test_a_rank_touches_no_other_gpu_when_it_draws_adapters(language_folder, monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: touched.append(devices) or nullcontext())
    recipe = Recipe.from_dict({"model": {"language": "none"}})
    attach_adapters(
        Parts(model=transformers.AutoModelForCausalLM.from_pretrained(language_folder)), recipe.model, recipe.adapter
    )
    assert [devices for devices in touched if devices] == [[3]]
