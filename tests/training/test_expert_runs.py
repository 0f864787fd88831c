"""How routers spread tokens over experts in training."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from mm_moslora.adapters import MoSLoRAConfig, add_moslora
from mm_moslora.training.metrics.expert_balance import ExpertBalance

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


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
        model = add_moslora(model, MoSLoRAConfig(r=2), targets=["q_proj"])
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
