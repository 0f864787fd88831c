"""Ranks of a next run by the singular values of a warm-up: what is kept, what it costs, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mm_moslora.adapters import MoSLoRAConfig, adapted_modules, add_moslora, save_adapter
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.cli import run
from mm_moslora.config import AdapterConfig
from mm_moslora.models.trainable_parts import moslora_config
from mm_moslora.planning.rank_allocation import allocate_ranks
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, train_a_bit

STRONG = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 8, one module of which has learned far more than the others."""
    model = add_moslora(llama(), MoSLoRAConfig(r=8, lora_alpha=16))
    train_a_bit(model)
    with torch.no_grad():
        dict(named_adapter_layers(model))[STRONG].outer_factors("default")[1].mul_(100)
    folder = tmp_path_factory.mktemp("warm")
    save_adapter(model, folder)
    return folder


def test_the_recipe_that_is_printed_has_as_many_parameters_and_one_scaling(warm: Path, capsys) -> None:
    assert run(["adapters", "ranks", str(warm), "--rank", "4"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["adapter"]
    ranks = printed["rank_pattern"]
    assert ranks[STRONG] == 8
    assert min(ranks.values()) < 4
    uneven = moslora_config(AdapterConfig(mixer_init="orthogonal", **printed))
    found, even = (
        adapted_modules(add_moslora(llama(), config)) for config in (uneven, MoSLoRAConfig(r=4, lora_alpha=8))
    )
    assert {row.scaling for row in found} == {2.0}
    count, budget = (sum(row.parameters for row in rows) for rows in (found, even))
    assert 0.95 * budget < count <= budget
    allocation = allocate_ranks(warm)
    assert (count, budget) == (allocation.parameters, allocation.budget)


def test_what_has_no_ranks_to_share_out_is_refused(warm: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="The rank is 8, expected 1 to 7"):
        allocate_ranks(warm, rank=8)
    save_adapter(add_moslora(llama(), MoSLoRAConfig(r=8, share="inputs")), tmp_path)
    with pytest.raises(AdapterError, match="has shared_factors"):
        allocate_ranks(tmp_path)
    refused = {
        "has alpha_pattern": {"alpha_pattern": {"q_proj": 3}},
        "its A and B do not train": {"factor_form": "svd"},
        "that mixer_form 'block_diagonal:2' does not take: .* Warm up with dense": {"mixer_form": "block_diagonal:2"},
    }
    for number, (message, options) in enumerate(refused.items()):
        model = add_moslora(llama(), MoSLoRAConfig(r=8, **options))
        train_a_bit(model)
        save_adapter(model, tmp_path / f"{number}")
        with pytest.raises(AdapterError, match=message):
            allocate_ranks(tmp_path / f"{number}", rank=3)
