"""Adapters on quantised bases: a class of ours, or an error; never plain LoRA in silence."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALayer,
    add_moslora,
    load_adapter,
    merge,
    resolve_targets,
    save_adapter,
    use_kernel,
)
from mm_moslora.adapters.layers.base_weights import quantisation, stop_repacking
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import folded, train_a_bit

every_kind = pytest.mark.parametrize("kind", ["4bit", "8bit"])


class _Net(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def _quantised(kind: str) -> _Net:
    torch.manual_seed(0)
    plain = [nn.Linear(64, 64) for _ in range(2)]
    head = nn.Linear(64, 3)
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made: list[nn.Module] = []
    for layer in plain:
        if kind == "4bit":
            own = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
            own.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
        else:
            own = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            own.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        own.bias = layer.bias
        made.append(own.to("cpu"))
    net = _Net(made)
    net.head = head
    return net.eval()


X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _run(model: nn.Module) -> Tensor:
    return model(X)


def _config(**changes) -> MoSLoRAConfig:
    return MoSLoRAConfig(**({"r": 4, "lora_alpha": 8} | changes))


def _layers(model: nn.Module) -> list[MoSLoRALayer]:
    return [module for module in model.modules() if isinstance(module, MoSLoRALayer)]


@every_kind
def test_the_mixer_is_there_and_is_used(kind: str) -> None:
    bare = _quantised(kind)
    stop_repacking(bare)
    base = _run(bare)
    model = add_moslora(_quantised(kind), _config(mixer_pattern={"layers.1": "butterfly"}), targets=["0", "1"])
    assert torch.equal(_run(model), base)
    train_a_bit(model)
    live = _run(model)
    layers = _layers(model)
    assert [layer.mixer_init["default"] for layer in layers] == ["orthogonal", "butterfly"]
    assert quantisation(layers[0].get_base_layer()) is not None
    for layer in layers:
        layer.lora_mixer["default"].weight.data.mul_(-1)
    assert (_run(model) - live).abs().max() > 1e-2
    for layer in layers:
        layer.lora_mixer["default"].weight.data.mul_(-1)
    with use_kernel(model, "reference"):
        torch.testing.assert_close(_run(model), live, atol=1e-5, rtol=1e-5)


@every_kind
def test_all_linear_finds_quantised_layers_and_training_reaches_every_factor(kind: str) -> None:
    net = _quantised(kind)
    assert resolve_targets(net) == ["layers.0", "layers.1", "head"]
    model = add_moslora(net, _config(lora_dropout=0.1), targets=["0", "1"]).train()
    train_a_bit(model)
    model(X).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert len(trained) == 6
    assert all("lora_" in name for name in trained)


@every_kind
def test_a_batch_of_mixed_adapters_has_the_mixers(kind: str) -> None:
    bare = _quantised(kind)
    stop_repacking(bare)
    model = add_moslora(bare, _config(), targets=["0", "1"])
    add_moslora(model, _config(mixer_init="butterfly"), targets=["0", "1"], adapter_name="second")
    train_a_bit(model)
    expected = _run(model)
    model.set_adapter("second")
    expected[1::2] = _run(model)[1::2]
    with model.disable_adapter():
        expected[4] = _run(model)[4]
    names = ["default", "second", "default", "second", "__base__"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X, adapter_names=names), expected, atol=1e-5, rtol=1e-5)


@every_kind
def test_a_folder_goes_to_a_quantised_base_and_back(kind: str, tmp_path: Path) -> None:
    model = add_moslora(_quantised(kind), _config(), targets=["0", "1"])
    train_a_bit(model)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(_quantised(kind), tmp_path / "a")
    torch.testing.assert_close(_run(loaded), _run(model), atol=5e-3, rtol=1e-2)  # bitsandbytes evaluates in bfloat16
    again = load_adapter(_quantised(kind), tmp_path / "a", trainable=True).eval()
    assert torch.equal(_run(again), _run(model))
    stock = folded(_quantised(kind), tmp_path / "a")
    torch.testing.assert_close(_run(stock), _run(loaded), atol=1e-4, rtol=1e-4)


@every_kind
def test_merging_adds_the_mixed_update(kind: str) -> None:
    model = add_moslora(_quantised(kind), _config(), targets=["0", "1"])
    train_a_bit(model)
    live, base = _run(model), _run(_quantised(kind))
    merged = _run(merge(model))
    assert (merged - live).norm() < 0.2 * (live - base).norm()


@every_kind
def test_dora_on_a_quantised_base_on_a_cpu_is_refused(kind: str) -> None:
    plain = {"mixer_init": "identity", "mixer_trainable": False}
    with pytest.raises(AdapterError, match="works on a GPU only"):
        add_moslora(_quantised(kind), _config(use_dora=True, **plain), targets=["0", "1"])


@every_kind
def test_identity_and_frozen_is_pefts_own_branch(kind: str) -> None:
    plain = {"mixer_init": "identity", "mixer_trainable": False}
    model = add_moslora(_quantised(kind), _config(**plain), targets=["0", "1"])
    assert not any(layer.lora_mixer for layer in _layers(model))
    train_a_bit(model)
    layer = _layers(model)[0]
    branch = X @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T * 2.0
    with torch.no_grad():
        torch.testing.assert_close(layer(X), layer.get_base_layer()(X) + branch, atol=1e-4, rtol=1e-4)


@every_kind
def test_a_mixer_on_a_layer_that_stock_peft_wrapped_is_refused(kind: str) -> None:
    net = _quantised(kind)
    setattr(net, f"is_loaded_in_{kind}", True)
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["layers.0"]))
    with pytest.raises(AdapterError, match="cannot hold a mixer"):
        model.add_adapter("second", MoSLoRAConfig(r=4, target_modules=["layers.0"]))


class HQQLinear(nn.Module):
    """What a layer of HQQ, GPTQ or AWQ looks like: packed integers, no weight."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 64, 64
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("targets", ["all-linear", ["0"]])
def test_another_quantisation_is_refused_by_name_and_the_error_says_which_to_take(targets: str | list[str]) -> None:
    net = _Net([HQQLinear(), nn.Linear(64, 64)])
    with pytest.raises(AdapterError, match=r"layers\.0.*cannot carry MoSLoRA.*HQQLinear.*bitsandbytes"):
        add_moslora(net, _config(), targets=targets)
    with pytest.raises(AdapterError, match=r"cannot carry MoSLoRA.*HQQLinear.*bitsandbytes"):
        peft.get_peft_model(net, _config(target_modules=["layers.0"]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_kind
def test_quantised_base_on_a_gpu(kind: str) -> None:
    model = add_moslora(_quantised(kind).to("cuda"), _config(), targets=["0", "1"]).train()
    train_a_bit(model)
    model(X.to("cuda")).square().sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 6
