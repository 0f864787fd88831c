"""Layouts for other programs."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm_moslora.adapters import (
    MoSLoRAConfig,
    add_moslora,
    export_adapter,
    load_adapter,
    save_adapter,
)
from mm_moslora.adapters.folders.export_adapter import largest_difference
from mm_moslora.utils.errors import AdapterError, ConfigError
from tests.adapters.adapter_models import folded, llama, logits, train_a_bit

TARGETS = ["q_proj", "k_proj", "down_proj"]


def _trained(**changes) -> peft.PeftModel:
    config = MoSLoRAConfig(**({"r": 4, "lora_alpha": 8, "mixer_init": "kaiming"} | changes))
    model = add_moslora(llama(), config, targets=TARGETS)
    train_a_bit(model)
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[peft.PeftModel, Path]:
    model = _trained(rank_pattern={"down_proj": 2}, alpha_pattern={"k_proj": 3}, use_rslora=True)
    save_adapter(model, tmp_path / "ours")
    return model, tmp_path


@pytest.mark.parametrize("layout", ["peft", "vllm"])
def test_exported_folder_gives_the_same_logits_in_stock_peft(saved: tuple[peft.PeftModel, Path], layout: str) -> None:
    model, root = saved
    out = export_adapter(root / "ours", root / "out", layout=layout)
    assert sorted(path.name for path in out.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    stock = peft.PeftModel.from_pretrained(llama(), out)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)


def test_vllm_layout_has_one_rank_and_module_names(saved: tuple[peft.PeftModel, Path]) -> None:
    _, root = saved
    out = export_adapter(root / "ours", root / "out", layout="vllm")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(TARGETS)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (4, 4, {}, False)
    tensors = load_file(out / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if "layers.0.mlp" in name}
    prefix = "base_model.model.model.layers.0.mlp.down_proj"
    assert shapes == {f"{prefix}.lora_A.weight": (4, 48), f"{prefix}.lora_B.weight": (32, 4)}


def test_diffusers_layout_names_and_update(saved: tuple[peft.PeftModel, Path]) -> None:
    model, root = saved
    out = export_adapter(root / "ours", root / "out", layout="diffusers", component="transformer")
    tensors = load_file(out / "pytorch_lora_weights.safetensors")
    path = "model.layers.1.self_attn.k_proj"
    update = tensors[f"transformer.{path}.lora_B.weight"] @ tensors[f"transformer.{path}.lora_A.weight"]
    torch.testing.assert_close(update, model.get_base_model().get_submodule(path).wide_delta("default"))
    assert len(tensors) == 12


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": "vlm"}, "Did you mean 'vllm'"),
        ({"layout": "diffusers", "component": "text_encodr"}, "Did you mean 'text_encoder'"),
    ],
)
def test_what_a_layout_cannot_express_is_an_error(
    saved: tuple[peft.PeftModel, Path], options: dict, words: str
) -> None:
    with pytest.raises(AdapterError, match=words):
        export_adapter(saved[1] / "ours", saved[1] / "out", **options)


def test_dora_stays_with_peft(tmp_path: Path) -> None:
    model = _trained(use_dora=True, mixer_init="identity", mixer_trainable=False)
    save_adapter(model, tmp_path / "ours")
    with pytest.raises(AdapterError, match="layout cannot express"):
        export_adapter(tmp_path / "ours", tmp_path / "out", layout="diffusers")
    out = export_adapter(tmp_path / "ours", tmp_path / "out", layout="peft")
    stock = peft.PeftModel.from_pretrained(llama(), out)
    torch.testing.assert_close(logits(stock), logits(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changed_the_base_is_taken_out_of_it_again(tmp_path: Path, init: str) -> None:
    model = _trained(mixer_init="identity", init_lora_weights=init)
    save_adapter(model, tmp_path / "ours")
    out = export_adapter(tmp_path / "ours", tmp_path / "out", layout="peft")
    for loaded in (load_adapter(llama(), tmp_path / "ours"), *_stock(tmp_path / "ours", out)):
        torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=0)
    with pytest.raises(AdapterError, match="which changed the base"):
        export_adapter(tmp_path / "ours", tmp_path / "vllm", layout="vllm")


def _stock(*folders: Path) -> list[peft.PeftModel]:
    return [folded(llama(), folder) for folder in folders]


def test_a_convolution_is_an_error_to_vllm(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3))
    save_adapter(add_moslora(net, MoSLoRAConfig(r=2), targets=["0"]), tmp_path / "ours")
    with pytest.raises(AdapterError, match="0 is a convolution"):
        export_adapter(tmp_path / "ours", tmp_path / "out", layout="vllm")
    assert not (tmp_path / "out").exists()


def test_an_embedding_is_named_as_what_a_layout_cannot_hold(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), MoSLoRAConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    with pytest.raises(AdapterError, match=r"embed_tokens.*cannot express .*embeddings"):
        export_adapter(tmp_path / "a", tmp_path / "out", layout="vllm")


def test_one_file_holds_the_components_of_one_call_and_replaces_none(tmp_path: Path) -> None:
    """An export took over what a file held of other components: of an earlier run, or of another author."""
    for seed, (name, rank) in enumerate({"text_encoder": 2, "text_encoder_2": 4}.items()):
        adapted = add_moslora(llama(), MoSLoRAConfig(r=rank), targets=["q_proj"])
        train_a_bit(adapted, seed=seed)
        save_adapter(adapted, tmp_path / name)
    folders = {name: tmp_path / name for name in ("text_encoder", "text_encoder_2")}
    export_adapter(folders, tmp_path / "out", layout="diffusers")
    for name, folder in folders.items():
        assert largest_difference(folder, tmp_path / "out", layout="diffusers", component=name) < 1e-6
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    assert {len(factor) for name, factor in load_file(file).items() if ".lora_A" in name} == {2, 4}
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=r"pytorch_lora_weights.*is not replaced"):
        export_adapter(folders["text_encoder"], tmp_path / "out", layout="diffusers", component="text_encoder")
    stranger = tmp_path / "favourite.safetensors"
    save_file({"lora_te_x.lora_down.weight": torch.ones(2, 3)}, stranger)
    with pytest.raises(ConfigError, match=r"favourite.*is not replaced"):
        export_adapter(folders, stranger, layout="kohya")
    assert file.read_bytes() == before
    assert list(load_file(stranger)) == ["lora_te_x.lora_down.weight"]
    with pytest.raises(AdapterError, match="vllm holds one adapter, and 2 folders"):
        export_adapter(folders, tmp_path / "vllm", layout="vllm")
