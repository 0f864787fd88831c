"""Pairs in rows without padding: losses and gradients are those of TRL's padded rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import logged, make_recipe
from PIL import Image
from tiny import COLOURS
from torch import nn
from vlms import make_vlm

from mm_moslora.config import Recipe
from mm_moslora.models.vlm import VlmForConditionalGeneration, is_multimodal
from mm_moslora.preferences.preference_setup import PreferenceRun, prepare
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.files import sha256_of

pytest.importorskip("trl", reason="trl is not installed")
MIXTURE = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "beta": 0.5}
PACKED = {"pack_tokens": 512}


@pytest.fixture(scope="module")
def mixed_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No, one and two pictures of different sizes, answers of other lengths, which begin alike or not."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "images").mkdir()
    names, lines = list(COLOURS), []
    for index in range(10):
        pictures = [f"{index}-{number}.png" for number in range((1, 2, 0, 1, 1)[index % 5])]
        for number, name in enumerate(pictures):
            size = (30 + 25 * (index % 3), 33 + 20 * number)
            Image.new("RGB", size, COLOURS[names[index % 3]]).save(folder / "images" / name)
        question = "<image>" * len(pictures) + f"what is the color? {index}"
        chosen, rejected = "red " * (1 + index % 4), "red " * (index % 2) + "green blue " * (1 + index % 3)
        turns = [
            {"role": "user", "content": "say red"}, {"role": "assistant", "content": "red"},
            {"role": "user", "content": question}, {"role": "assistant", "content": chosen.strip()},
        ]  # fmt: skip
        record = {"id": f"m{index}", "messages": turns[0 if index % 3 else 2 :], "images": pictures}
        lines.append(json.dumps(record | {"rejected_response": rejected.strip()}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(params=["assembled", "qwen2_5_vl", "qwen3_vl"])
def model(request: Any, recipe: Recipe, tmp_path: Path) -> dict[str, Any]:
    """Adapters in the tower of ready-made ones; of the assembled one it is frozen."""
    if request.param != "assembled":
        return {"vlm": str(make_vlm(tmp_path / "model", request.param)), "vision": {"mode": "adapter"}}
    from mm_moslora.training.training_loop import train

    train(recipe)
    assert recipe.model.vision is not None
    return {
        "language": recipe.model.language, "vision": {"name": recipe.model.vision.name},
        "projector": {"weights": recipe.train.output, "mode": "frozen"},
    }  # fmt: skip


def with_effect(run: PreferenceRun) -> None:
    """Factors other than the reference's."""
    torch.manual_seed(3)
    for name, parameter in run.assembly.model.named_parameters():
        if "lora_B" in name and ".default" in name:
            nn.init.normal_(parameter, std=0.05)


def losses_and_gradients(recipe: Recipe, batches: list[list[int]]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Of micro-batches of these pairs."""
    from mm_moslora.preferences.trl_trainers import PairTrainer

    run = prepare(recipe)
    trainer = PairTrainer(run, saver=None, tidier=None)  # type: ignore[arg-type]
    with_effect(run)
    run.peft_model.train()
    losses = []
    for numbers in batches:
        rows = [{"item": number, "held_out": 0} for number in numbers]
        inputs = trainer.data_collator(rows)
        trainer.mean_sizes = torch.tensor([4.0, 20.0])
        loss = trainer.compute_loss(run.peft_model, inputs)
        loss.backward()
        losses.append(loss.item())
    return losses, {
        name: parameter.grad for name, parameter in run.assembly.model.named_parameters() if parameter.grad is not None
    }


def test_losses_and_gradients_are_those_of_padded_rows(
    model: dict[str, Any], mixed_pairs: Path, tmp_path: Path
) -> None:
    """Of several micro-batches, and with answers that share a beginning."""
    batches = [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9], [2]]

    def recipe(name: str, **data: Any) -> Recipe:
        return make_recipe(tmp_path / name, mixed_pairs, model, preference=MIXTURE, data=data)

    expected, gradients = losses_and_gradients(recipe("padded"), batches)
    found, own = losses_and_gradients(recipe("packed", **PACKED), batches)
    assert found == pytest.approx(expected, rel=1e-5)
    assert own.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (own[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-8, name
