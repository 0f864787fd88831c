"""Patch embeddings of ready-made towers run as products: same numbers, same names and shapes everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from small_families import small_family
from torch import nn
from transformers import AutoModelForImageTextToText
from vlms import make_vlm

from mm_moslora.config import AdapterConfig, ModelConfig, VisionConfig
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.export_huggingface import export_model
from mm_moslora.models.load_model import load
from mm_moslora.models.trainable_parts import attach_adapters
from mm_moslora.models.vision.patch_embedding import PatchConv3d, use_linear_patches

KERNEL = (2, 4, 4)
PATCH: dict[str, Any] = {"kernel_size": KERNEL, "stride": KERNEL}
LAYERS: dict[str, tuple[dict[str, Any], tuple[int, ...], bool]] = {
    "a patch a row": (PATCH, (5, 4, *KERNEL), True),
    "a patch a row, without bias": (PATCH | {"bias": False}, (5, 4, *KERNEL), True),
    "no row": (PATCH, (0, 4, *KERNEL), True),
    "whole videos": (PATCH, (2, 4, 4, 8, 12), True),
    "overlapping": (PATCH | {"stride": (1, 4, 4)}, (2, 4, 3, 4, 8), False),
    "padded": (PATCH | {"padding": (1, 0, 0)}, (5, 4, *KERNEL), False),
    "dilated": (PATCH | {"dilation": 2}, (2, 4, 4, 8, 8), False),
    "in groups": (PATCH | {"groups": 2}, (5, 4, *KERNEL), False),
}
"""Options of a convolution of 4 channels, its input, and whether it may multiply."""


def near(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LAYERS)
def test_outputs_and_gradients_are_those_of_the_convolution(case: str, dtype: torch.dtype) -> None:
    options, shape, multiplies = LAYERS[case]
    torch.manual_seed(0)
    stock, own = (nn.Sequential(nn.Conv3d(4, 6, **options)).to(dtype) for _ in range(2))
    own.load_state_dict(stock.state_dict())
    use_linear_patches(own)
    assert isinstance(own[0], PatchConv3d) == multiplies
    inputs = [torch.randn(shape).to(dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    results = [layer(value) for layer, value in zip((stock, own), inputs, strict=True)]
    near(results[1], results[0], dtype)
    for result in results:
        result.sin().sum().backward()
    near(inputs[1].grad, inputs[0].grad, dtype)
    for (name, one), two in zip(stock.named_parameters(), own.parameters(), strict=True):
        near(two.grad, one.grad, dtype) if one.grad is not None else pytest.fail(name)


def tensors_of(folder: Path) -> dict[str, tuple[list[int], str]]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: (file.get_slice(name).get_shape(), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_loaded_model_keeps_names_shapes_and_files_and_gives_the_features_of_transformers(
    family: str, tmp_path: Path
) -> None:
    folder = make_vlm(tmp_path / "vlm", family)
    stock: Any = AutoModelForImageTextToText.from_pretrained(folder).eval()
    parts = [load_parts(ModelConfig(vlm=str(folder))), load(folder)]
    for model in (item.model for item in parts):
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv3d)]
        assert [type(layer) for layer in layers] == [PatchConv3d]
        own, theirs = model.state_dict(), stock.state_dict()
        assert list(own) == list(theirs)
        assert all(torch.equal(value, theirs[name]) for name, value in own.items())
        pixels = torch.randn(16, layers[0].weight[0].numel())
        grid = torch.tensor([[1, 4, 4]])
        with torch.no_grad():
            found, expected = (item.model.visual(pixels, grid_thw=grid).pooler_output for item in (model, stock))
        near(found, expected)
    export_model(parts[1], tmp_path / "out")
    stock.save_pretrained(tmp_path / "stock")
    assert tensors_of(tmp_path / "out") == tensors_of(tmp_path / "stock")
    assert (tmp_path / "out" / "config.json").read_text() == (tmp_path / "stock" / "config.json").read_text()


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_vl_moe"])
def test_relatives_are_found_by_their_layers(family: str) -> None:
    layers = [layer for layer in small_family(family).model.modules() if isinstance(layer, nn.Conv3d)]
    assert {type(layer) for layer in layers} >= {PatchConv3d}


def test_adapters_of_a_tower_and_of_the_layer_itself_are_those_of_the_convolution(tmp_path: Path) -> None:
    folder = make_vlm(tmp_path, "qwen2_5_vl")
    config = ModelConfig(vlm=str(folder), vision=VisionConfig(mode="adapter"))
    parts, stock = load_parts(config), load_parts(config)
    for layer in stock.model.modules():
        if isinstance(layer, PatchConv3d):
            layer.__class__ = nn.Conv3d
    for item in (parts, stock):
        attach_adapters(item, config, AdapterConfig(rank=2), seed=0)
    trained = [{n: v.shape for n, v in item.model.named_parameters() if v.requires_grad} for item in (parts, stock)]
    assert trained[0] == trained[1]
    assert any("visual" in name for name in trained[0])

    own, plain = nn.Sequential(nn.Conv3d(4, 6, **PATCH)), nn.Sequential(nn.Conv3d(4, 6, **PATCH))
    own.load_state_dict(plain.state_dict())
    use_linear_patches(own)
    pixels, found = torch.randn(3, 4, *KERNEL), []
    for layer in (own, plain):
        torch.manual_seed(0)
        lora = peft.get_peft_model(layer, peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        found += [lora(pixels), lora.merge_and_unload()(pixels)]
    for value in found:
        near(value, found[-1])
