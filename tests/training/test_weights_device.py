"""Where a rank reads the base weights to, by ZeRO stage and rank."""

from __future__ import annotations

import json

import pytest
import torch

from mm_moslora.config import TrainConfig
from mm_moslora.training.engine import weights_device
from mm_moslora.utils import distributed

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
