"""Checkpoints of the MoSLoRA paper's authors: `load_adapter` gives the outputs of their layer, other ways refuse them.

Their layer is written here from its definition, y = W0 x + s B(AB(A(x))), without code of this package or of PEFT.
"""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_moslora.adapters import MoSLoRAConfig, export_adapter, load_adapter
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, logits

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 6


class _Authors(nn.Module):
    """Their linear layer; `AB` None where it has no mixer."""

    def __init__(self, base: nn.Linear, A: Tensor, AB: Tensor | None, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.A, self.AB, self.B, self.scaling = base, A, AB, B, scaling

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.linear(x, self.A)
        if self.AB is not None:
            inner = nn.functional.linear(inner, self.AB)
        return self.base(x) + self.scaling * nn.functional.linear(inner, self.B)


def _with_their_layers(model: nn.Module, targets: list[str], rank: int, scaling: float, *, without: str = "") -> dict:
    """Replace the targets of a model; gives A, AB and B by module path."""
    found = [(path, module) for path, module in model.named_modules() if path.endswith(tuple(targets))]
    generator = torch.Generator().manual_seed(1)
    factors: dict[str, dict[str, Tensor]] = {}
    for path, base in found:
        A, B = (torch.randn(shape, generator=generator) / 4 for shape in ((rank, base.in_features),
                                                                         (base.out_features, rank)))  # fmt: skip
        AB = None if without and without in path else torch.randn(rank, rank, generator=generator)
        factors[path] = {"lora_A": A, "lora_B": B} | ({} if AB is None else {"lora_AB": AB})
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _Authors(base, A, AB, B, scaling))
    return factors


def _named(factors: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{path}.{name}.weight": tensor for path, parts in factors.items() for name, tensor in parts.items()}


def _folder(folder: Path, *, without: str = "", **changes) -> tuple[Path, Tensor]:
    """What their fork of PEFT 0.10 writes, and the logits of their layers."""
    model = llama()
    factors = _with_their_layers(model, TARGETS, RANK, ALPHA / RANK, without=without)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in _named(factors).items()}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "lora_dropout": 0.05,
              "lora_use_mixer": True, "lora_use_mixer_pattern": {}, "bias": "none", "task_type": "CAUSAL_LM",
              "fan_in_fan_out": False, "inference_mode": True, "merge_weights": False}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, logits(model.eval())


def test_the_outputs_are_those_of_the_authors_layer(tmp_path: Path) -> None:
    folder, expected = _folder(tmp_path / "a")
    model = load_adapter(llama(), folder)
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    assert (logits(llama()) - expected).abs().max() > 0.05
    assert any("lora_mixer" in name for name, _ in model.named_parameters())
    stock = peft.PeftModel.from_pretrained(llama(), export_adapter(folder, tmp_path / "out", layout="peft"))
    torch.testing.assert_close(logits(stock), expected, atol=5e-6, rtol=1e-4)


def test_modules_that_their_pattern_leaves_out_have_no_mixer(tmp_path: Path) -> None:
    told = {"lora_use_mixer_pattern": {"down_proj": False}}
    folder, expected = _folder(tmp_path / "a", without="down_proj", **told)
    model = load_adapter(llama(), folder, trainable=True)
    assert sum("lora_mixer" in name for name, p in model.named_parameters() if p.requires_grad) == 4
    torch.testing.assert_close(logits(model.eval()), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("without", "changes", "words"), [
    ("layers.1.self_attn.v_proj", {}, r"no lora_AB.*v_proj"),
    ("layers", {}, "holds no lora_AB"),
    ("", {"lora_use_mixer": False}, "declares none"),
    ("", {"enable_lora": [True, False]}, "not understood"),
    ("", {"lora_mask_file": "m.pt"}, "not understood"),
    ("", {"use_dora": True}, "no right reading"),
])  # fmt: skip
def test_a_folder_that_does_not_tell_what_it_computes_is_refused(
    without: str, changes: dict, words: str, tmp_path: Path
) -> None:
    folder, _ = _folder(tmp_path / "a", without=without, **changes)
    with pytest.raises(AdapterError, match=words):
        load_adapter(llama(), folder)


@pytest.mark.parametrize(("part", "tensor", "words"), [
    ("A.weight", torch.ones(2, 32), r"q_proj.* has shape \[2, 32\], expected \[4, 32\]"),
    ("AB.bias", torch.ones(RANK), r"lora_AB\.bias.*not understood"),
    ("AB.weight", torch.ones(RANK), r"has shape \[4\], expected \[4, 4\]"),
    ("AB.weight", torch.ones(RANK, RANK + 1), r"has shape \[4, 5\], expected \[4, 4\]"),
    ("AB.weight", torch.ones(RANK, RANK).char(), "holds torch.int8, expected floats"),
    ("AB.weight", torch.full((RANK, RANK), torch.nan), "NaN or infinity"),
])  # fmt: skip
def test_factors_that_do_not_fit_are_refused(part: str, tensor: Tensor, words: str, tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}"
    save_file(tensors | {name: tensor}, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=words):
        load_adapter(llama(), folder)


def test_ways_that_would_drop_the_mixers_are_refused(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a")
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS}
    plain, mixed = (peft.get_peft_model(llama(), kind(**options)) for kind in (peft.LoraConfig, MoSLoRAConfig))
    state = load_file(folder / "adapter_model.safetensors")
    ways = [
        llama().load_adapter, peft.PeftConfig.from_pretrained, peft.LoraConfig.from_pretrained,
        MoSLoRAConfig.from_pretrained, lambda name: peft.PeftModel.from_pretrained(llama(), name),
        *(
            lambda name, kind=kind: peft.PeftModel.from_pretrained(llama(), name, config=kind(**options))
            for kind in (peft.LoraConfig, MoSLoRAConfig)
        ),
        *(lambda name, model=model: model.load_adapter(name, "theirs") for model in (plain, mixed)),
        *(lambda _, model=model: peft.set_peft_model_state_dict(model, state) for model in (plain, mixed)),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(AdapterError, match=r"mixers.*load_adapter"):
            way(str(folder))


# Their SDXL script.

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def _their_pipeline(folder: Path):
    """A pipeline with their layers, and the file that their script makes diffusers write of it."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.utils import convert_state_dict_to_diffusers

    from tests.builders.tiny_pipelines import tiny_pipeline

    pipeline = tiny_pipeline("tiny-sdxl")
    written = {}
    for component, targets in (("unet", ATTENTION), ("text_encoder", TEXT)):
        factors = _with_their_layers(getattr(pipeline, component), targets, RANK, 1.0)
        named = convert_state_dict_to_diffusers(_named(factors))
        written |= {f"{component}.{name}": tensor.contiguous() for name, tensor in named.items()}
    folder.mkdir()
    save_file(written, folder / "pytorch_lora_weights.safetensors")
    return pipeline, written


def _drawn(pipeline) -> Tensor:
    from tests.builders.tiny_pipelines import SIDE

    pipeline.set_progress_bar_config(disable=True)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1}
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a cat", generator=noise, output_type="np", **size).images)


def test_the_authors_sdxl_file_draws_the_same_picture(tmp_path: Path) -> None:
    theirs, written = _their_pipeline(tmp_path / "a")
    from tests.builders.tiny_pipelines import tiny_pipeline

    assert any("downB" in name for name in written)
    expected = _drawn(theirs)
    assert (_drawn(tiny_pipeline("tiny-sdxl")) - expected).abs().max() > 0.01
    folders = dict.fromkeys(("unet", "text_encoder"), tmp_path / "a")
    stock = tiny_pipeline("tiny-sdxl")
    stock.load_lora_weights(export_adapter(folders, tmp_path / "out", layout="diffusers"))
    torch.testing.assert_close(_drawn(stock), expected, atol=1e-5, rtol=0)
    own = tiny_pipeline("tiny-sdxl")
    for component in ("unet", "text_encoder"):
        load_adapter(getattr(own, component), tmp_path / "a", component=component)
    torch.testing.assert_close(_drawn(own), expected, atol=1e-5, rtol=0)


def test_what_an_sdxl_file_lacks_is_one_clear_error(tmp_path: Path) -> None:
    pipeline, written = _their_pipeline(tmp_path / "a")
    path = tmp_path / "a" / "pytorch_lora_weights.safetensors"
    with pytest.raises(AdapterError, match=r"holds adapters of text_encoder, unet.*component='text_encoder'"):
        load_adapter(pipeline.unet, tmp_path / "a")
    mixer = next(name for name in written if name.startswith("unet") and "downB" in name)
    save_file({name: tensor for name, tensor in written.items() if name != mixer}, path)
    with pytest.raises(AdapterError, match="holds no lora_AB of"):
        load_adapter(pipeline.unet, tmp_path / "a", component="unet")
    odd = {mixer.replace("downB", "down"): torch.ones(2, 8)}
    save_file(written | odd, path)
    with pytest.raises(AdapterError, match="holds ranks 2, 4 of unet"):
        load_adapter(pipeline.unet, tmp_path / "a", component="unet")
    for changed, words in (
        ({"unet.a.alpha": torch.ones(1)}, r"unet\.a\.alpha, which is not understood"),
        ({mixer: torch.ones(RANK)}, r"shape \[4\], expected \[4, 4\]"),
        ({mixer: torch.full((RANK, RANK), torch.nan)}, "holds NaN or infinity"),
        ({mixer: torch.eye(RANK + 1)}, r"shape \[5, 5\], expected \[4, 4\]"),
        ({mixer.replace("downB", "down"): torch.full((RANK, 8), torch.nan)}, "holds NaN or infinity"),
    ):
        save_file(written | changed, path)
        with pytest.raises(AdapterError, match=words):
            load_adapter(pipeline.unet, tmp_path / "a", component="unet")
    save_file(written, path)
    from tests.builders.tiny_pipelines import tiny_pipeline

    with pytest.raises(AdapterError, match=r"mixers.*load_adapter"):
        tiny_pipeline("tiny-sdxl").load_lora_weights(tmp_path / "a")
