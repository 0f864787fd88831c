"""Layers that read the same input are computed in one node, and compute for themselves when they turn out not to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, link_siblings, use_kernel
from mm_moslora.kernels.lora.lora_linear import TENSORS, _FusedLinears
from tests.adapters.adapter_models import IDS, llama, train_a_bit

WITHOUT = {r"layers\.0\..*": "none", "k_proj": "none", "up_proj": "none"}
"""Modules without a mixer: a layer, and one of each family of the other."""


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers in each node made."""
    made: list[int] = []
    original = _FusedLinears.apply

    def counted(*args):
        made.append((len(args) - 2) // TENSORS)
        return original(*args)

    monkeypatch.setattr(_FusedLinears, "apply", counted)
    return made


class CrossAttention(nn.Module):
    """Names of self-attention, but keys and values are read from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return torch.softmax(self.q_proj(x) @ self.k_proj(other).mT, -1) @ self.v_proj(other)


class Wrapped(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.attention, self.checkpointed = CrossAttention(), checkpointed

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        if self.checkpointed:
            return checkpoint(self.attention, x, other, use_reentrant=False)
        return self.attention(x, other)


def _llama(**changes):
    model = add_moslora(llama(), MoSLoRAConfig(**({"r": 4, "lora_alpha": 8} | changes))).train()
    train_a_bit(model)
    return model


def _gradients(model, **inputs) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    model(IDS, labels=IDS).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    return found


def test_query_key_value_and_gate_up_are_one_node_each(nodes: list[int]) -> None:
    model = _llama()
    nodes.clear()
    _gradients(model)
    assert nodes == [3, 1, 2, 1] * 2
    nodes.clear()
    with torch.no_grad():
        model(IDS)
    assert nodes == [1] * 14


def test_plain_lora_beside_mixers_is_computed_as_they_are_and_alone_by_peft(nodes: list[int]) -> None:
    model = _llama(mixer_init="kaiming", mixer_pattern=WITHOUT)
    nodes.clear()
    _gradients(model)
    assert nodes == [3, 1, 2, 1] * 2
    model = _llama(mixer_init="identity", mixer_trainable=False)
    nodes.clear()
    _gradients(model)
    assert not nodes


@pytest.mark.parametrize(
    "changes", [{"lora_dropout": 0.0}, {"lora_dropout": 0.3}, {"mixer_init": "kaiming", "mixer_pattern": WITHOUT}]
)
def test_together_alone_and_by_modules_the_gradients_are_the_same(changes: dict[str, Any]) -> None:
    model = _llama(**changes).double()
    together = _gradients(model)
    with use_kernel(model, "reference"):
        reference = _gradients(model)
    for module in model.modules():
        if hasattr(module, "siblings"):
            module.siblings = None
    alone = _gradients(model)
    for name, gradient in together.items():
        assert gradient.dtype is torch.float64
        torch.testing.assert_close(gradient, alone[name], atol=1e-13, rtol=1e-10)
        torch.testing.assert_close(gradient, reference[name], atol=1e-13, rtol=1e-10)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_family_that_reads_two_inputs_is_right_and_stops_computing_together(
    nodes: list[int], checkpointed: bool
) -> None:
    torch.manual_seed(0)
    model = (
        add_moslora(Wrapped(checkpointed), MoSLoRAConfig(r=2), targets=["q_proj", "k_proj", "v_proj"]).train().double()
    )
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    x, other = torch.randn(1, 3, 6, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, 6, dtype=torch.float64)
    results = []
    for kernel in ("reference", "auto", "auto"):
        model.zero_grad()
        nodes.clear()
        with use_kernel(model, kernel):
            model(x, other).square().sum().backward()
        results.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        made = list(nodes)
    assert 3 not in made
    for found in results[1:]:
        for gradient, right in zip(found, results[0], strict=True):
            torch.testing.assert_close(gradient, right, atol=1e-10, rtol=1e-9)


def test_a_layer_whose_output_nobody_uses_has_no_part_in_the_backward_pass() -> None:
    class OnlyValue(CrossAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.q_proj(x), self.k_proj(x)
            return self.v_proj(x)

    model = add_moslora(OnlyValue(), MoSLoRAConfig(r=2)).train()
    for parameter in model.parameters():
        parameter.data.normal_()
    model(torch.randn(3, 6)).sum().backward()
    trained = {name.split(".")[-4] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"v_proj"}


def test_one_of_the_family_switched_off_keeps_its_base_output(nodes: list[int]) -> None:
    model = _llama()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.k_proj.enable_adapters(False)
    nodes.clear()
    model(IDS, labels=IDS).loss.backward()
    assert nodes == [2, 1, 2, 1, 3, 1, 2, 1]


def test_a_layer_with_a_hook_on_its_input_computes_for_itself(nodes: list[int]) -> None:
    model = _llama()
    attention = model.get_base_model().model.layers[0].self_attn
    attention.k_proj.register_forward_pre_hook(lambda module, given: (given[0].clone(),))
    nodes.clear()
    model(IDS, labels=IDS).loss.backward()
    assert nodes == [2, 1, 1, 2, 1, 3, 1, 2, 1]


def test_a_copy_of_the_model_computes_with_its_own_weights() -> None:
    model = _llama()
    twin = copy.deepcopy(model)
    family = twin.get_base_model().model.layers[0].self_attn.q_proj.siblings
    assert family.layers[1] is twin.get_base_model().model.layers[0].self_attn.k_proj
    before = model(IDS).logits
    for parameter in model.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(twin(IDS).logits, before)


def test_models_with_a_second_input_are_left_alone() -> None:
    class Attention(CrossAttention):
        def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, encoder_hidden_states)

    assert link_siblings(add_moslora(Attention(), MoSLoRAConfig(r=2))) == 0
    assert link_siblings(add_moslora(CrossAttention(), MoSLoRAConfig(r=2))) == 1
