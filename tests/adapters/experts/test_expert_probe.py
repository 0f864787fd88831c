"""The probe of layouts of experts: right ones pass, and those that lose an adapter's update are refused with why."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3_moe import modeling_qwen3_moe as code

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, resolve_targets
from mm_moslora.adapters.experts import expert_probe
from mm_moslora.adapters.experts.expert_targets import resolve_parameters
from mm_moslora.utils.errors import AdapterError
from tests.adapters.experts.test_experts import MODELS, NAMES, base, mixtral, qwen3_moe


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_probe, "_FINDINGS", {})


def _forward_without_call(self: nn.Module, hidden_states: Tensor) -> Tensor:
    flat = hidden_states.view(-1, hidden_states.shape[-1])
    _, weights, chosen = self.gate(flat)
    inner = self.experts
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return inner.forward(flat, chosen, weights).view(hidden_states.shape)


def _forward_of_data(self: nn.Module, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The delta is seen, and no gradient comes back."""
    out = torch.zeros_like(x)
    for expert in range(self.num_experts):
        rows, slots = torch.where(top_k_index == expert)
        gate, up = (x[rows] @ self.gate_up_proj.detach()[expert].T).chunk(2, -1)
        each = (self.act_fn(gate) * up) @ self.down_proj[expert].T
        out = out.index_add(0, rows, each * top_k_weights[rows, slots, None])
    return out


@pytest.mark.parametrize(
    ("place", "forward", "message"),
    [
        ("Qwen3MoeSparseMoeBlock", _forward_without_call, "changes no output until it is merged"),
        ("Qwen3MoeExperts", _forward_of_data, "gets no gradient"),
    ],
)
def test_a_layout_that_loses_the_update_is_refused(
    place: str, forward: object, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(getattr(code, place), "forward", forward)
    model = base()
    with pytest.raises(AdapterError, match=f"cannot carry an adapter: in a small random model.*{message}.*PEFT 0"):
        add_moslora(model, MoSLoRAConfig(r=4, target_parameters=NAMES))
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_the_probe_runs_once_for_a_class_and_needs_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    probed = expert_probe._probed
    monkeypatch.setattr(expert_probe, "_probed", lambda *given: runs.append(given) or probed(*given))
    state = torch.random.get_rng_state()
    with torch.device("meta"):
        models = [qwen3_moe(num_experts=64, hidden_size=256), qwen3_moe(), mixtral()]
        for model in models:
            expert_probe.refuse_mishandled(model, [f"model.layers.1.mlp.{name}" for name in NAMES])
    assert len(runs) == 2
    assert list(expert_probe._FINDINGS.values()) == ["", ""]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", MODELS)
def test_real_classes_pass(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = base(name)
    expert_probe.refuse_mishandled(model, resolve_parameters(model, [""], NAMES))
    assert list(expert_probe._FINDINGS.values()) == [""]
    assert "could not be probed" not in caplog.text


class _Own(nn.Module):
    """Experts of somebody's own, without a configuration."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->bo", x, self.w)


def test_a_module_of_ones_own_is_adapted_unprobed() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), _Own())
    wrapped = add_moslora(model, MoSLoRAConfig(r=2, target_parameters=["1.w"], init_lora_weights=False), targets=[])
    x = torch.randn(5, 4)
    live = wrapped(x)
    wrapped.merge_adapter()
    assert torch.allclose(wrapped(x), live, atol=1e-5)


def test_all_linear_names_what_to_write() -> None:
    with pytest.raises(AdapterError, match=r"with target_parameters .*\['experts.gate_up_proj', 'experts.down_proj'\]"):
        add_moslora(base(), MoSLoRAConfig(r=4))
    with pytest.raises(AdapterError, match="would leave out"):
        resolve_targets(base())
