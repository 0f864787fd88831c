"""Runs that adapt experts: trained, continued, measured, loaded, merged and exported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from tiny import make_experts, supervised_logits
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trials import losses, with_train

from mm_moslora.adapters import MoSLoRAConfig, add_moslora
from mm_moslora.adapters.layers.expert_parameters import MoSLoRAExperts
from mm_moslora.batch import Batch
from mm_moslora.config import AdapterConfig, Recipe
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_lora
from mm_moslora.models.load_model import load
from mm_moslora.models.meta_model import build_meta_model
from mm_moslora.models.trainable_parts import attach_adapters, component_table
from mm_moslora.training.metrics.expert_balance import ExpertBalance
from mm_moslora.training.preflight import check_adapter_names
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import AdapterError
from tests.training.test_snapshot import _example

NAMES = ["experts.gate_up_proj", "experts.down_proj"]
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


@pytest.fixture
def moe(recipe: Recipe, tmp_path: Path) -> Recipe:
    model = replace(recipe.model, language=str(make_experts(tmp_path / "experts")))
    return replace(recipe, model=model, adapter=AdapterConfig(rank=4, alpha=8, target_parameters=NAMES))


def test_a_run_adapts_experts_continues_and_is_exported(moe: Recipe, tmp_path: Path) -> None:
    train(with_train(moe, output=str(tmp_path / "whole"), save_every=2, steps=4, log_every=1))
    train(with_train(moe, output=str(tmp_path / "recomputed"), steps=4, gradient_checkpointing=True))
    assert losses(tmp_path / "recomputed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    train(with_train(moe, save_every=2, steps=4, log_every=1), stop_at=2)
    train(with_train(moe, save_every=2, steps=4, log_every=1))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert len(set(losses(tmp_path / "run"))) == 4
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "experts/variation" in str(record)]
    assert len(logged) == 4
    shares = json.loads((tmp_path / "whole" / "experts.json").read_text())
    assert [len(row) for row in shares.values()] == [4, 4]
    assert all(sum(row) == pytest.approx(1) for row in shares.values())
    folder = tmp_path / "run" / "checkpoint-000004"
    live, merged = load(folder, merge=False), load(folder)
    layers = [layer for layer in live.model.modules() if isinstance(layer, MoSLoRAExperts)]
    assert len(layers) == 4
    assert all(bool(layer.factors("default").B.any()) for layer in layers)
    batch = Batch.from_examples([_example(live)])
    with torch.no_grad():
        expected = supervised_logits(live.model, batch)
        torch.testing.assert_close(supervised_logits(merged.model, batch), expected, rtol=0, atol=1e-5)
        with live.peft_model.disable_adapter():
            assert not torch.allclose(supervised_logits(live.model, batch), expected, atol=1e-5)
    exported = export_lora(live, tmp_path / "lora")
    assert exported.max_logit_difference < 1e-5


def test_the_plan_counts_what_trains(moe: Recipe) -> None:
    planned = build_meta_model(moe.model, moe.adapter).parameters()
    parts = load_parts(moe.model)
    attach_adapters(parts, moe.model, moe.adapter)
    rows = {row.name: row.trainable for row in component_table(parts)}
    assert planned["mixer"][1] == rows["mixer"] == 2 * (2 * 4 * 4 * 4 + 4 * 4 * 4)
    assert planned["adapter"][1] == rows["adapter"]


def balanced(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor | None = None) -> tuple[dict[str, float], float]:
    balance = ExpertBalance(model)
    model.train()
    with torch.no_grad():
        aux = float(model(ids, attention_mask=mask, output_router_logits=True).aux_loss)
        metrics = balance.metrics()
        model.eval()
        model(ids)
    assert balance.metrics() == {}  # what is not training does not count
    return metrics, aux


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("adapter", [False, True])
def test_the_balance_is_that_of_the_router_and_its_loss_the_models_own(kind: str, adapter: bool) -> None:
    torch.manual_seed(0)
    if kind == "mixtral":
        model: nn.Module = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_local_experts=4, **SIZES))
    else:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=64, num_experts=4, num_experts_per_tok=2, **SIZES))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    if adapter:
        model = add_moslora(model, MoSLoRAConfig(r=2, target_parameters=NAMES), targets=["q_proj"])
        assert isinstance(model, peft.PeftModel)
    metrics, aux = balanced(model, torch.arange(40).view(2, 20))
    assert metrics["experts/aux_loss"] == pytest.approx(aux, rel=1e-5)
    assert 0 <= metrics["experts/share_min"] <= 0.25 <= metrics["experts/share_max"] <= 0.5 + 1e-9
    assert 0 < metrics["experts/variation"] <= metrics["experts/variation_max"]
    padded, mask = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)
    padded[1, 8:], mask[1, 8:] = 0, 0
    metrics, aux = balanced(model, padded, mask)
    assert metrics["experts/aux_loss"] == pytest.approx(aux, rel=1e-5)
    apart = ExpertBalance(model)
    model.train()
    with torch.no_grad():
        for row in (padded[:1], padded[1:, :8]):
            model(row)
    assert metrics == pytest.approx(apart.metrics(), rel=1e-4)


def test_a_model_without_experts_has_no_such_metrics() -> None:
    balance = ExpertBalance(nn.Sequential(nn.Linear(2, 2)))
    assert balance.metrics() == {}


def test_options_that_experts_cannot_have_are_refused_before_the_model_is_read() -> None:
    with pytest.raises(AdapterError, match=r"lora_dropout is 0.1: an update of a weight has no input to drop"):
        check_adapter_names(AdapterConfig(dropout=0.1, target_parameters=NAMES))
