"""Rounding and order of sums within a run, and what was set before it."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from trials import hexed, with_train

from mm_moslora.models.precision import run_arithmetic
from mm_moslora.training import run_setup
from mm_moslora.training.training_loop import train

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
