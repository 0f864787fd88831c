"""MoSLoRA against what it must equal: PEFT's LoRA, two-subspaces mixing, its own fold and its own merge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from mm_moslora.adapters import MIXER_INITS, MoSLoRAConfig, add_moslora, merge
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, llama, logits, train_a_bit

TARGETS = ["q_proj", "v_proj", "down_proj"]
PLAIN = {"mixer_init": "identity", "mixer_trainable": False}


def _train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(7)
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_identity_and_frozen_is_peft_lora_bit_for_bit(dtype: torch.dtype, dropout: float) -> None:
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": dropout, "target_modules": TARGETS}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(dtype), peft.LoraConfig(**options))
    torch.manual_seed(1)
    ours = add_moslora(llama(dtype), MoSLoRAConfig(**options, **PLAIN), targets=TARGETS)
    assert torch.equal(torch.stack(_train(theirs)), torch.stack(_train(ours)))
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    assert torch.equal(logits(theirs.eval()), logits(ours.eval()))


@pytest.mark.parametrize("kind", MIXER_INITS)
def test_training_starts_at_the_base_model_and_reaches_every_factor(kind: str) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_init=kind))
    assert torch.equal(logits(model), logits(llama()))
    _train(model, 1)
    model(IDS, labels=IDS).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_mixer" in name for name in trained)
    assert all(gradient.abs().max() > 0 for gradient in trained.values())


@pytest.mark.parametrize("kind", ["orthogonal", "butterfly"])
def test_a_frozen_mixer_never_moves(kind: str) -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_init=kind, mixer_trainable=False))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_mixer" in name}
    assert len(before) == 14
    model.set_adapter("default")
    assert not any("lora_mixer" in name for name, _ in model.named_parameters())
    _train(model)
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("rslora", [True, False])
@pytest.mark.parametrize("kind", MIXER_INITS)
def test_live_merged_and_unmerged_agree(kind: str, rslora: bool) -> None:
    base = logits(llama())
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=6, mixer_init=kind, use_rslora=rslora))
    train_a_bit(model)
    live = logits(model)
    assert (live - base).abs().max() > 0.05
    model.merge_adapter()
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=0)
    merged = merge(model)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize("merging", [merge, lambda model: model.merge_and_unload()])
@pytest.mark.parametrize("options", [{}, {"mixer_init": "identity", "mixer_trainable": False}])
def test_autocast_does_not_round_what_is_merged(
    options: dict[str, Any], merging: Callable[[nn.Module], nn.Module]
) -> None:
    models = []
    for on in (False, True):
        model = add_moslora(llama(), MoSLoRAConfig(r=4, **options), targets=["q_proj", "embed_tokens"])
        train_a_bit(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            models.append(merging(model).state_dict())
    torch.testing.assert_close(*models, rtol=0, atol=0)


def test_a_merge_that_changes_outputs_is_undone() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8))
    train_a_bit(model)
    live = logits(model)
    with pytest.raises(AdapterError, match="expected at most 0e"):
        merge(model, tolerance=0.0)
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=0)


def test_two_active_adapters_add_up() -> None:
    model = add_moslora(llama(), MoSLoRAConfig(r=4, lora_alpha=8), targets=["q_proj"])
    add_moslora(model, MoSLoRAConfig(r=2, lora_alpha=8), adapter_name="second", targets=["q_proj"])
    train_a_bit(model)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.set_adapter(["default", "second"])
    x = torch.randn(3, 32)
    weight = layer.get_base_layer().weight + layer.wide_delta("default") + layer.wide_delta("second")
    torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)


def test_a_mixer_on_a_stock_lora_layer_is_refused() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    names, both = list(model.state_dict()), ["q_proj", "v_proj"]
    with pytest.raises(AdapterError, match=r"v_proj carries a plain .* cannot hold a mixer"):
        add_moslora(model, MoSLoRAConfig(r=4), targets=both, adapter_name="second")
    with pytest.raises(AdapterError, match="cannot hold a mixer"):
        model.add_adapter("second", MoSLoRAConfig(r=4, target_modules=both))
    assert list(model.state_dict()) == names
    assert list(model.peft_config) == ["default"]


def test_other_variants_are_refused_with_a_mixer_only() -> None:
    with pytest.raises(AdapterError, match="alora_invocation_tokens"):
        MoSLoRAConfig(r=4, alora_invocation_tokens=[1])
    MoSLoRAConfig(r=4, alora_invocation_tokens=[1], **PLAIN)
    model = add_moslora(llama(), MoSLoRAConfig(r=4, use_dora=True, **PLAIN), targets=["q_proj"])
    assert torch.allclose(logits(model), logits(llama()), atol=1e-6)


@pytest.mark.parametrize("mixer", [{}, PLAIN])
@pytest.mark.parametrize(
    "options",
    [
        {"use_bdlora": peft.tuners.lora.config.BdLoraConfig(nblocks=2)},
        {"kasa_config": peft.tuners.lora.config.KasaConfig()},
        {"velora_config": peft.tuners.lora.config.VeloraConfig()},
        {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
        {"layer_replication": [(0, 2), (0, 2)]},
    ],
)
def test_options_that_no_folder_of_ours_holds_are_refused(options: dict, mixer: dict) -> None:
    """With a frozen identity they trained, and the folder could not be loaded."""
    with pytest.raises(AdapterError, match=f"{next(iter(options))} is set.* use peft.LoraConfig"):
        MoSLoRAConfig(r=4, **options, **mixer)
