"""How a run computes: what ranks say of their GPUs, where weights are read to, rounding and the order of sums."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from trials import hexed, with_train

from mm_moslora.config import Recipe, TrainConfig
from mm_moslora.kernels.attention import attention_choice
from mm_moslora.kernels.attention.segment_attention import SEGMENTS
from mm_moslora.models.assembly import Parts
from mm_moslora.models.precision import run_arithmetic
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.training import run_setup
from mm_moslora.training.engine import model_execution, weights_device
from mm_moslora.training.training_loop import train
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


GPU, META = torch.device("cuda", 1), torch.device("meta")


@pytest.mark.parametrize(
    ("zero", "rank", "quantised", "on_gpu", "on_cpu"),
    [
        ("none", 0, False, GPU, None),
        ("zero2", 1, False, GPU, None),
        ("zero2_offload", 1, False, GPU, None),
        ("zero3", 0, False, None, None),
        ("zero3", 1, False, META, META),
        ("zero3_offload", 3, False, META, META),
        ("own.json", 1, False, META, META),
        ("zero3", 1, True, GPU, None),
    ],
)
def test_weights_go_to_the_device_below_zero3_and_to_rank_0_alone_under_it(
    zero, rank, quantised, on_gpu, on_cpu, monkeypatch, tmp_path
):
    (tmp_path / "own.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", str(rank))
    for device, expected in ((GPU, on_gpu), (torch.device("cpu"), on_cpu)):
        monkeypatch.setattr(distributed, "device", lambda found=device: found)
        assert weights_device(TrainConfig(output="run", zero=zero), quantised=quantised) == expected


PRODUCTS = torch.backends.cuda.matmul


def switches() -> tuple[object, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        PRODUCTS.allow_bf16_reduced_precision_reduction,
        PRODUCTS.allow_fp16_reduced_precision_reduction,
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("FLASH_ATTENTION_DETERMINISTIC"),
    )


def test_deterministic_training_gives_the_same_digits_and_leaves_no_switch(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "0")
    before, seen, prepare = switches(), [], run_setup.prepare
    monkeypatch.setattr(run_setup, "prepare", lambda *args, **more: seen.append(switches()) or prepare(*args, **more))
    runs = [with_train(recipe, steps=2, deterministic=on, output=str(tmp_path / str(on))) for on in (False, True)]
    for run in runs:
        train(run)
    assert seen == [(False, False, False, True, "0"), (True, False, False, False, "1")]
    assert switches() == before
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    plain, fixed = (hexed(Path(run.train.output)) for run in runs)
    assert plain == fixed


def test_the_variable_of_cublas_is_there_before_the_model(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with run_arithmetic(deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
