"""The training benchmark compares like with like: the peer's loss and gradients, and FLOPs as the planner counts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import train as bench
import yardstick

from mm_moslora.training.flops import FlopCounter, StepShape


@pytest.fixture(scope="module")
def ours() -> yardstick.Contender:
    return yardstick.ours(600, torch.float32)


def test_our_step_has_the_loss_and_gradients_of_hugging_faces_and_keeps_a_third(ours: yardstick.Contender) -> None:
    peer = yardstick.peer(600, torch.float32)
    found = bench.check_equal({"hf": peer, "ours": ours}, "fp32")
    assert found["loss_difference"] < 1e-5
    assert found["gradient_difference"] < 1e-5
    assert yardstick.saved_bytes(ours) < 0.45 * yardstick.saved_bytes(peer)


def test_the_step_of_trl_is_the_same_computation(ours: yardstick.Contender) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    contenders = {"hf": yardstick.peer(600, torch.float32), "ours": ours, "trl": yardstick.trl(600, torch.float32)}
    found = bench.check_equal(contenders, "fp32")
    assert max(found.values()) < 1e-5


def test_the_flops_that_a_step_needs_are_those_of_the_planner(ours: yardstick.Contender) -> None:
    shape = StepShape.of(yardstick.LENGTHS, supervised=sum(yardstick.SUPERVISED), images=len(yardstick.LENGTHS))
    # The planner counts the tower's last block, which runs, and the mixers' products.
    assert bench.needed_flops(600) == pytest.approx(FlopCounter(ours.model).count(shape).total, rel=0.03)


def test_grouped_order_leaves_few_tokens_to_padding() -> None:
    shares = bench.padding_row(samples=12_000)["useful_share"]
    assert shares["ours"] >= 0.97
    assert shares["ours"] > shares["random, padded"]
