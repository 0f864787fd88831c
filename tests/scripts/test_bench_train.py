"""The training benchmark compares like with like: the peer's loss and gradients, and FLOPs as the planner counts."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import train as bench
import yardstick

from mm_moslora.training.metrics.model_cost import FlopCounter, StepShape

SMALL = yardstick.Setting(layers=2)


@pytest.fixture(scope="module")
def contenders() -> dict[str, yardstick.Contender]:
    """On the yardstick with two of its six decoder layers."""
    made = {"hf": yardstick.peer, "ours": yardstick.ours}
    if importlib.util.find_spec("trl") is not None:
        made["trl"] = yardstick.trl
    return {name: make(600, torch.float32, SMALL) for name, make in made.items()}


def test_our_step_has_the_loss_and_gradients_of_hugging_faces_and_keeps_a_third(contenders) -> None:
    ours, peer = contenders["ours"], contenders["hf"]
    found = yardstick.check_equal({"hf": peer, "ours": ours}, "hf", "fp32")
    assert found["loss_difference"] < 1e-5
    assert found["gradient_difference"] < 1e-5
    assert yardstick.saved_bytes(ours) < 0.45 * yardstick.saved_bytes(peer)


def test_the_step_of_trl_is_the_same_computation(contenders) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    found = yardstick.check_equal({"hf": contenders["hf"], "trl": contenders["trl"]}, "hf", "fp32")
    assert max(found.values()) < 1e-5


def test_the_flops_that_a_step_needs_are_those_of_the_planner() -> None:
    ours = yardstick.ours(600, torch.float32)
    shape = StepShape.of(yardstick.LENGTHS, supervised=sum(yardstick.SUPERVISED), images=len(yardstick.LENGTHS))
    # The planner counts the tower's last block, which runs, and the mixers' products.
    assert bench.needed_flops(600) == pytest.approx(FlopCounter(ours.model).count(shape).total, rel=0.03)


def test_grouped_order_leaves_few_tokens_to_padding() -> None:
    shares = bench.padding_row(samples=12_000)["useful_share"]
    assert shares["ours"] >= 0.97
    assert shares["ours"] > shares["random, padded"]
