"""QMoSLoRA: a recipe whose language model is in 4 bits trains its adapters and leaves the packed weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_moslora.batch import Batch, Example
from mm_moslora.config import Recipe
from mm_moslora.errors import ModelError
from mm_moslora.losses import use_loss_head
from mm_moslora.models.attention import set_attention, training_attention
from mm_moslora.models.build import assemble
from mm_moslora.models.lean import use_lean_layers
from mm_moslora.models.trainable import attach_adapters
from mm_moslora.training.engine import LossModule, OptimizerSettings, TorchEngine
from mm_moslora.training.optim import parameter_groups


def quantised(folder: Path) -> Recipe:
    return Recipe.from_dict(
        {
            "model": {"language": str(folder), "quantisation": "nf4"},
            "adapter": {"rank": 4, "alpha": 8},
            "optim": {"lr": 1e-2},
        }
    )


def test_adapters_train_on_a_base_in_four_bits(language_folder: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    recipe = quantised(language_folder)
    assembly = assemble(recipe.model, dtype=torch.float32)
    attach_adapters(assembly, recipe.model, recipe.adapter)
    model = assembly.model.train()
    set_attention(model, training_attention(model))
    use_lean_layers(model)
    use_loss_head(model)
    packed = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert packed
    before = [module.weight.data.clone() for module in packed]
    module = LossModule(model, None)
    settings = OptimizerSettings(betas=(0.9, 0.999), eps=1e-8, max_grad_norm=1.0)
    engine = TorchEngine(module, parameter_groups(module, recipe.optim), settings)
    ids = torch.arange(10, 40)
    batch = Batch.from_examples([Example(id="", input_ids=ids, supervised=torch.arange(30) >= 10)])
    losses = [engine.step([batch], 1.0).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(module.weight.data, old) for module, old in zip(packed, before, strict=True))


def test_quantisation_without_its_library_is_one_clear_error(
    language_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        assemble(quantised(language_folder).model)
