"""The training benchmark compares like with like: the peer's loss and gradients."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
import llava_models as models
import train as bench
from contenders import Way

SMALL = models.small(layers=2, vocabulary=600)
ITEMS = models.examples(SMALL, bench.LENGTHS, bench.SUPERVISED, seed=1)


@pytest.fixture(scope="module")
def contenders() -> dict[str, models.Runner]:
    """On the benchmark's model with two of its six decoder layers."""
    made = bench.contenders_on(SMALL, "fp32")
    if importlib.util.find_spec("trl") is not None:
        made["trl"] = models.trl(SMALL, Way(dtype="fp32", mixed=True))
    return made


def test_our_step_has_the_loss_and_gradients_of_hugging_faces_and_keeps_a_third(contenders) -> None:
    found = models.check_equal({"hf": contenders["hf"], "ours": contenders["ours"]}, ITEMS, "hf", "fp32")
    assert found["loss_difference"] < 1e-5
    assert found["gradient_difference"] < 1e-5
    saved = bench.saved_mib(contenders, ITEMS)
    assert saved["ours"] < 0.45 * saved["hf"]


def test_the_step_of_trl_is_the_same_computation(contenders) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    found = models.check_equal({"hf": contenders["hf"], "trl": contenders["trl"]}, ITEMS, "hf", "fp32")
    assert max(found.values()) < 1e-5


def test_grouped_order_leaves_few_tokens_to_padding() -> None:
    shares = bench.padding_row(samples=12_000)["useful_share"]
    assert shares["ours"] >= 0.97
    assert shares["ours"] > shares["random, padded"]
