"""Two ranks train a diffusion model as one does that accumulates, plainly and under ZeRO-2, also when resumed."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers", reason="diffusers is not installed")

import diffusion_run
from safetensors.torch import load_file

from mm_moslora.diffusion.diffusion_training import train_diffusion
from mm_moslora.tracking import read_metrics

pytestmark = pytest.mark.slow


def curve(run):
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(run / "metrics.jsonl") if "loss" in line]


def test_two_ranks_train_as_one_that_accumulates(ranks, tmp_path):
    ranks.run(["diffusion_run:main", str(tmp_path)])
    train_diffusion(diffusion_run.make_recipe(str(tmp_path), "none", ranks=1))
    one, plain, sharded = (tmp_path / name for name in ("none-1", "none-2", "zero2-2"))
    expected = curve(one)
    assert len(expected) == 3
    weights = load_file(one / "checkpoint-000003" / "pytorch_lora_weights.safetensors")
    for run in (plain, sharded):
        for found, numbers in zip(curve(run), expected, strict=True):
            assert found == pytest.approx(numbers, rel=1e-4), run.name
        for name, value in load_file(run / "checkpoint-000003" / "pytorch_lora_weights.safetensors").items():
            assert (value - weights[name]).abs().max() < 1e-4, (run.name, name)
