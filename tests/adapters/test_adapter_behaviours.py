"""What PEFT promises of an adapter, for every layer type: one test per behaviour and layer.

The first line of a test's docstring names the behaviour, its parameters are the layer types.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    MoSLoRALayer,
    add_moslora,
    load_adapter,
    merge,
    save_adapter,
)
from tests.adapters.adapter_models import folded, train_a_bit
from tests.adapters.behaviour_models import LAYERS, inputs, network

every_layer = pytest.mark.parametrize("kind", list(LAYERS))
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def _config(**changes) -> MoSLoRAConfig:
    return MoSLoRAConfig(**({"r": 4, "lora_alpha": 8} | changes))


def _adapted(kind: str, *, seed: int = 1, **changes) -> peft.PeftModel:
    model = add_moslora(network(kind), _config(**changes), targets=["target"])
    train_a_bit(model, seed=seed)
    return model.eval()


def _second(model: peft.PeftModel, *, seed: int = 2, name: str = "second", **changes) -> peft.PeftModel:
    add_moslora(model, _config(**({"r": 2, "mixer_init": "kaiming"} | changes)), targets=["target"], adapter_name=name)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if f".{name}" in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


@torch.no_grad()
def _run(model: nn.Module, kind: str, **options) -> Tensor:
    return model(inputs(kind), **options)


def _assert_same(first: Tensor, second: Tensor) -> None:
    """Equal but for the order of additions: convolutions choose it by memory layout."""
    torch.testing.assert_close(first, second, atol=1e-6, rtol=1e-6)


def _layers(model: nn.Module) -> list[MoSLoRALayer]:
    found = [module for module in model.modules() if isinstance(module, MoSLoRALayer)]
    assert found
    return found


@every_layer
def test_starts_at_base(kind: str) -> None:
    """A fresh adapter changes nothing"""
    model = add_moslora(network(kind), _config(), targets=["target"])
    assert torch.equal(_run(model, kind), _run(network(kind), kind))
    assert all("default" in layer.lora_mixer for layer in _layers(model))


@every_layer
def test_trains(kind: str) -> None:
    """A, M and B get gradients; the base gets none"""
    model = _adapted(kind).train()
    model(inputs(kind)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert "lora_" not in name or parameter.grad.abs().max() > 0, name
    assert sum("lora_mixer" in name for name, _ in model.named_parameters()) == len(_layers(model))


WRITERS = {"save_adapter": save_adapter, "save_pretrained": peft.PeftModel.save_pretrained}


@every_layer
@pytest.mark.parametrize("writer", WRITERS)
def test_save_and_load(kind: str, writer: str, tmp_path: Path) -> None:
    """Both savers write the double folder; without this package PEFT reads plain LoRA with the same output"""
    model = _adapted(kind)
    WRITERS[writer](model, tmp_path / "a")
    _assert_same(_run(load_adapter(network(kind), tmp_path / "a"), kind), _run(model, kind))
    names = [list(load_file(tmp_path / "a" / f"{name}.safetensors")) for name in ("moslora", "adapter_model")]
    assert [any("lora_mixer" in name for name in own) for own in names] == [True, False]
    stock = folded(network(kind), tmp_path / "a")
    assert not any(isinstance(module, MoSLoRALayer) for module in stock.modules())
    torch.testing.assert_close(_run(stock, kind), _run(model, kind), **CLOSE)


@every_layer
def test_selected_adapters(kind: str, tmp_path: Path) -> None:
    """Save selected adapters only"""
    model = _second(_adapted(kind))
    model.save_pretrained(tmp_path / "a", selected_adapters=["second"])
    assert [path.name for path in (tmp_path / "a").iterdir() if path.is_dir()] == ["second"]
    model.set_adapter("second")
    loaded = load_adapter(network(kind), tmp_path / "a" / "second")
    torch.testing.assert_close(_run(loaded, kind), _run(model, kind), **CLOSE)


@every_layer
@pytest.mark.parametrize("trainable", [True, False])
def test_low_memory_load(kind: str, trainable: bool, tmp_path: Path) -> None:
    """Low-memory loading through the meta device"""
    model = _adapted(kind, mixer_trainable=trainable)
    save_adapter(model, tmp_path / "a")
    config = MoSLoRAConfig.from_pretrained(str(tmp_path / "a"))
    loaded = peft.PeftModel.from_pretrained(network(kind), tmp_path / "a", config=config, low_cpu_mem_usage=True)
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    torch.testing.assert_close(_run(loaded.eval(), kind), _run(model, kind), **CLOSE)


@every_layer
@pytest.mark.parametrize("part", ["moslora", "adapter_model"])
def test_state_dict(kind: str, part: str, tmp_path: Path) -> None:
    """PEFT's state dict carries A, M and B; one without mixers counts as identity mixers"""
    model, fresh = _adapted(kind), _adapted(kind, seed=9)
    save_adapter(model, tmp_path / "a")
    state = load_file(tmp_path / "a" / f"{part}.safetensors")
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    assert part != "moslora" or {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in state.items()
    }
    assert not peft.set_peft_model_state_dict(fresh, state).unexpected_keys
    torch.testing.assert_close(_run(fresh, kind), _run(model, kind), **CLOSE)


MERGES = {
    "unsafe": lambda model: model.merge_and_unload(),
    "safe": lambda model: model.merge_and_unload(safe_merge=True),
    "checked": merge,
}


@every_layer
@pytest.mark.parametrize("way", MERGES)
@pytest.mark.filterwarnings("error::UserWarning")
def test_merge(kind: str, way: str) -> None:
    """Merge and unload; `mm_moslora.adapters.merge` compares outputs before and after"""
    model = _adapted(kind)
    live = _run(model, kind)
    merged = MERGES[way](model)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(_run(merged, kind), live, **CLOSE)


@every_layer
def test_safe_merge_refuses_nan(kind: str) -> None:
    """Safe merge refuses NaN"""
    model = _adapted(kind)
    _layers(model)[0].lora_mixer["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


@every_layer
def test_unmerge(kind: str) -> None:
    """Merge, unmerge, and merge twice"""
    model = _adapted(kind)
    live = _run(model, kind)
    model.merge_adapter()
    torch.testing.assert_close(_run(model, kind), live, **CLOSE)
    model.merge_adapter()
    torch.testing.assert_close(_run(model, kind), live, **CLOSE)
    model.unmerge_adapter()
    torch.testing.assert_close(_run(model, kind), live, **CLOSE)


@every_layer
def test_switch(kind: str) -> None:
    """Several adapters, switching between them"""
    model = _second(_adapted(kind))
    first = _run(model, kind)
    model.set_adapter("second")
    second = _run(model, kind)
    assert (first - second).abs().max() > 1e-3
    assert {".second" in name for name, p in model.named_parameters() if p.requires_grad} == {True}
    model.set_adapter("default")
    assert torch.equal(_run(model, kind), first)


@every_layer
def test_mixed_batch(kind: str) -> None:
    """Mixed-adapter batches (`adapter_names`)"""
    model = _second(_adapted(kind))
    alone = {"__base__": _run(network(kind), kind), "default": _run(model, kind)}
    model.set_adapter("second")
    alone["second"] = _run(model, kind)
    names = ["second", "default", "__base__", "second"]
    mixed = _run(model, kind, adapter_names=names)
    for row, name in enumerate(names):
        torch.testing.assert_close(mixed[row], alone[name][row], **CLOSE)


@every_layer
def test_disable(kind: str) -> None:
    """Disabling restores the base bit for bit"""
    model = _adapted(kind)
    live = _run(model, kind)
    with model.disable_adapter():
        assert torch.equal(_run(model, kind), _run(network(kind), kind))
    assert torch.equal(_run(model, kind), live)


@every_layer
def test_delete(kind: str) -> None:
    """Delete leaves nothing behind"""
    model = _second(_adapted(kind))
    first = _run(model, kind)
    model.delete_adapter("second")
    assert not any("second" in name for name in model.state_dict())
    assert torch.equal(_run(model, kind), first)


@every_layer
def test_unload(kind: str) -> None:
    """Unload gives the base back bit for bit"""
    base = _adapted(kind).unload()
    assert torch.equal(_run(base, kind), _run(network(kind), kind))
    assert base.state_dict().keys() == network(kind).state_dict().keys()


@every_layer
def test_modules_to_save(kind: str, tmp_path: Path) -> None:
    """`modules_to_save` trains, saves and loads"""
    model = _adapted(kind, modules_to_save=["head"])
    model.base_model.model.head.modules_to_save["default"].weight.data.add_(0.5)
    save_adapter(model, tmp_path / "a")
    _assert_same(_run(load_adapter(network(kind), tmp_path / "a"), kind), _run(model, kind))
    torch.testing.assert_close(_run(folded(network(kind), tmp_path / "a"), kind), _run(model, kind), **CLOSE)


@pytest.mark.parametrize(
    ("wrap", "layers"),
    [
        (lambda net: add_moslora(net, _config(), targets=r"layers\.0\.target"), ["0"]),
        (lambda net: add_moslora(net, _config()), ["0", "1"]),
        (
            lambda net: peft.get_peft_model(
                net, _config(target_modules=["target"], layers_to_transform=[1], layers_pattern="layers")
            ),
            ["1"],
        ),
    ],
    ids=["expression", "all-linear", "layers_to_transform"],
)
@pytest.mark.parametrize("kind", ["Linear", "Conv1D"])
def test_targets(kind: str, wrap, layers: list[str]) -> None:
    """A regular expression, `all-linear` and `layers_to_transform` as targets"""
    model = wrap(network(kind))
    adapted = [name.split(".") for name, module in model.named_modules() if isinstance(module, MoSLoRALayer)]
    assert [parts[3] for parts in adapted if parts[-1] == "target"] == layers


@every_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Half-precision base, float32 factors"""
    model = add_moslora(network(kind, dtype), _config(), targets=["target"])
    train_a_bit(model)
    exact = _run(_adapted(kind), kind)
    with torch.no_grad():
        half = model(inputs(kind, dtype))
    assert half.dtype == dtype
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    # An id that rounds to another token is another input.
    if kind != "Embedding":
        assert (half.float() - exact).abs().max() < 0.1 * exact.abs().max()


@every_layer
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing(kind: str, reentrant: bool) -> None:
    """Gradient checkpointing, both modes"""
    gradients = []
    for mode in (None, reentrant):
        model = _adapted(kind).train()
        model.get_base_model().reentrant = mode
        model(inputs(kind).requires_grad_()).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@every_layer
def test_compile(kind: str) -> None:
    """`torch.compile` (graph capture, `aot_eager`)"""
    model = _adapted(kind)
    live = _run(model, kind)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(_run(compiled, kind), live, **CLOSE)


@every_layer
def test_entrances(kind: str, tmp_path: Path) -> None:
    """PEFT's `from_pretrained` and `load_adapter` give A, M and B back"""
    model = _adapted(kind)
    save_adapter(model, tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(network(kind), tmp_path / "a", is_trainable=True)
    loaded.load_adapter(tmp_path / "a", "second")
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    found = loaded.state_dict()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(found[name.replace(".default", ".second")], tensor)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained


@every_layer
def test_rslora_and_patterns(kind: str) -> None:
    """`use_rslora`, `rank_pattern`, `alpha_pattern`, `mixer_pattern`"""
    patterns = {"rank_pattern": {"layers.1.target": 2}, "alpha_pattern": {"layers.1.target": 6}}
    model = _adapted(kind, use_rslora=True, mixer_pattern={"layers.1.target": "butterfly"}, **patterns)
    first, last = _layers(model)[0], _layers(model)[-1]
    assert (first.r["default"], last.r["default"]) == (4, 2)
    assert first.scaling["default"] == 8 / 4**0.5
    assert last.scaling["default"] == 6 / 2**0.5
    assert (first.mixer_init["default"], last.mixer_init["default"]) == ("orthogonal", "butterfly")


def test_trainable_token_indices(tmp_path: Path) -> None:
    """`trainable_token_indices` next to adapters"""
    from tests.adapters.adapter_models import llama, logits

    config = _config(trainable_token_indices={"embed_tokens": [1, 2]})
    model = add_moslora(llama(), config, targets=["q_proj"])
    train_a_bit(model)
    name = next(name for name, _ in model.named_parameters() if "token_adapter" in name and "trainable" in name)
    model.get_parameter(name).data.add_(0.5)
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(llama(), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model))
    assert (logits(model) - logits(llama())).abs().max() > 1e-2
