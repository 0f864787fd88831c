"""Checkpoints of the MoSLoRA paper's authors, through every way of loading: the outputs are those of their layer.

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

from mm_moslora.adapters import MoSLoRAConfig, load_adapter, plain_pipeline_weights
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


def _folder(folder: Path, *, without: str = "", pickled: bool = False, **changes) -> tuple[Path, Tensor]:
    """What their fork of PEFT 0.10 writes, and the logits of their layers."""
    model = llama()
    factors = _with_their_layers(model, TARGETS, RANK, ALPHA / RANK, without=without)
    tensors = {f"base_model.model.{name}": tensor for name, tensor in _named(factors).items()}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "lora_dropout": 0.05,
              "lora_use_mixer": True, "lora_use_mixer_pattern": {}, "bias": "none", "task_type": "CAUSAL_LM",
              "fan_in_fan_out": False, "inference_mode": True, "merge_weights": False}  # fmt: skip
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    if pickled:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder, logits(model.eval())


def _state_dict(folder: Path) -> peft.PeftModel:
    model = peft.get_peft_model(llama(), MoSLoRAConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    return model.eval()


def _beside_another(folder: Path) -> peft.PeftModel:
    model = peft.get_peft_model(llama(), MoSLoRAConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.load_adapter(folder, "theirs")
    model.set_adapter("theirs")
    return model.eval()


WAYS = {
    "load_adapter": lambda folder: load_adapter(llama(), folder),
    "from_pretrained": lambda folder: peft.PeftModel.from_pretrained(llama(), folder),
    "from_pretrained with config": lambda folder: peft.PeftModel.from_pretrained(
        llama(), folder, config=MoSLoRAConfig.from_pretrained(folder)
    ),
    "model.load_adapter": _beside_another,
    "set_peft_model_state_dict": _state_dict,
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_loading_gives_the_outputs_of_the_authors_layer(way: str, tmp_path: Path) -> None:
    folder, expected = _folder(tmp_path / "a")
    model = WAYS[way](folder)
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    assert (logits(llama()) - expected).abs().max() > 0.05
    assert any("lora_mixer" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("way", WAYS)
def test_a_mixer_that_is_missing_is_refused_by_every_way(way: str, tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a", without="layers.1.self_attn.v_proj")
    with pytest.raises(AdapterError, match=r"(no lora_AB|lack).*v_proj"):
        WAYS[way](folder)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "set_peft_model_state_dict"])
def test_ranks_that_differ_by_layer_without_a_word_in_the_configuration_are_refused(way: str, tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    start = "base_model.model.model.layers.1.self_attn.v_proj.lora_"
    for part, shape in (("A", (2, 32)), ("AB", (2, 2)), ("B", (len(tensors[f"{start}B.weight"]), 2))):
        tensors[f"{start}{part}.weight"] = torch.ones(shape)
    save_file(tensors, path)
    with pytest.raises(AdapterError, match=r"v_proj.* has shape \[2, 32\], expected \[4, 32\]"):
        WAYS[way](folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_modules_that_their_pattern_leaves_out_have_no_mixer_and_the_configuration_tells(
    pickled: bool, tmp_path: Path
) -> None:
    told = {"lora_use_mixer_pattern": {"down_proj": False}}
    folder, expected = _folder(tmp_path / "a", without="down_proj", pickled=pickled, **told)
    config = MoSLoRAConfig.from_pretrained(folder)
    assert (config.r, config.lora_alpha, config.mixer_trainable) == (RANK, ALPHA, True)
    assert config.mixer_for("model.layers.0.self_attn.q_proj") == "kaiming"
    assert config.mixer_for("model.layers.1.mlp.down_proj") == "none"
    loaded = peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True)
    for model in (load_adapter(llama(), folder, trainable=True), loaded):
        assert sum("lora_mixer" in name for name, p in model.named_parameters() if p.requires_grad) == 4
        torch.testing.assert_close(logits(model.eval()), expected, atol=2e-6, rtol=1e-5)


def test_a_folder_without_mixers_or_without_its_word_is_an_error(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a", lora_use_mixer=False)
    with pytest.raises(AdapterError, match="declares none"):
        load_adapter(llama(), folder)
    for read in (MoSLoRAConfig.from_pretrained, lambda folder: peft.PeftModel.from_pretrained(llama(), folder)):
        with pytest.raises(AdapterError, match="holds mixers and no configuration of them"):
            read(folder)
    plain = peft.get_peft_model(llama(), peft.LoraConfig(r=RANK, target_modules=TARGETS))
    with pytest.raises(AdapterError, match="declares none"):
        plain.load_adapter(folder, "default")
    folder, _ = _folder(tmp_path / "b", without="layers")
    with pytest.raises(AdapterError, match="holds no lora_AB"):
        load_adapter(llama(), folder)


def test_ways_that_would_drop_the_mixers_are_refused(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a")
    for way in (llama().load_adapter, peft.PeftConfig.from_pretrained, peft.LoraConfig.from_pretrained):
        with pytest.raises(AdapterError, match=r"mixers.*MoSLoRAConfig\.from_pretrained"):
            way(str(folder))


def test_into_plain_lora_the_mixers_are_folded(tmp_path: Path) -> None:
    folder, expected = _folder(tmp_path / "a")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    peft.set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))
    torch.testing.assert_close(logits(model.eval()), expected, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize(
    "mixer",
    [torch.ones(RANK), torch.ones(RANK, RANK + 1), torch.ones(RANK, RANK).char(), torch.full((RANK, RANK), torch.nan)],
)
def test_mixers_in_a_state_are_finite_square_matrices(mixer: Tensor, plain: bool, tmp_path: Path) -> None:
    tensors = load_file(_folder(tmp_path / "a")[0] / "adapter_model.safetensors")
    kind = peft.LoraConfig if plain else MoSLoRAConfig
    model = peft.get_peft_model(llama(), kind(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)).eval()
    name = next(name for name in tensors if "lora_AB" in name)
    stray = name.replace("mlp.down_proj", "self_attn.k_proj")
    for wrong in ({name: mixer}, {stray: torch.eye(RANK)}):
        with pytest.raises(AdapterError, match=r"expected \[R, R\] of finite floats|no B beside it|it has no"):
            peft.set_peft_model_state_dict(model, tensors | wrong)
    assert torch.equal(logits(model), logits(llama()))


@pytest.mark.parametrize("changes", [{"enable_lora": [True, False]}, {"use_dora": True}, {"lora_mask_file": "m.pt"}])
def test_options_that_are_not_understood_are_refused(changes: dict, tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a", **changes)
    for read in (lambda: load_adapter(llama(), folder), lambda: MoSLoRAConfig.from_pretrained(folder)):
        with pytest.raises(AdapterError, match=r"not understood|no right reading"):
            read()


def test_a_part_of_a_mixer_that_is_not_its_weight_is_refused(tmp_path: Path) -> None:
    folder, _ = _folder(tmp_path / "a")
    tensors = load_file(folder / "adapter_model.safetensors")
    stray = "base_model.model.model.layers.0.self_attn.q_proj.lora_AB.bias"
    save_file(tensors | {stray: torch.ones(RANK)}, folder / "adapter_model.safetensors")
    for way in WAYS.values():
        with pytest.raises(AdapterError, match=r"lora_AB\.bias.*not understood"):
            way(folder)


# Their SDXL script.

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]


def _their_pipeline(folder: Path):
    """A pipeline with their layers, and the file that their script makes diffusers write of it."""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.utils import convert_state_dict_to_diffusers

    from mm_moslora.diffusion.tiny_pipelines import tiny_pipeline

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
    from mm_moslora.diffusion.tiny_pipelines import SIDE

    pipeline.set_progress_bar_config(disable=True)
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": 1}
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline("a cat", generator=noise, output_type="np", **size).images)


def test_the_authors_sdxl_file_draws_the_same_picture(tmp_path: Path) -> None:
    theirs, written = _their_pipeline(tmp_path / "a")
    from mm_moslora.diffusion.tiny_pipelines import tiny_pipeline

    assert any("downB" in name for name in written)
    expected = _drawn(theirs)
    assert (_drawn(tiny_pipeline("tiny-sdxl")) - expected).abs().max() > 0.01
    stock = tiny_pipeline("tiny-sdxl")
    stock.load_lora_weights(plain_pipeline_weights(tmp_path / "a"))
    torch.testing.assert_close(_drawn(stock), expected, atol=1e-5, rtol=0)
    read = tiny_pipeline("tiny-sdxl")
    read.load_lora_weights(tmp_path / "a")  # dropped the mixers of text encoders
    torch.testing.assert_close(_drawn(read), expected, atol=1e-5, rtol=0)
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
    with pytest.raises(AdapterError, match="holds no lora_AB of"):
        plain_pipeline_weights(tmp_path / "a")
    odd = {mixer.replace("downB", "down"): torch.ones(2, 8)}
    save_file(written | odd, path)
    with pytest.raises(AdapterError, match="holds ranks 2, 4 of unet"):
        load_adapter(pipeline.unet, tmp_path / "a", component="unet")
    save_file(written | {"unet.a.alpha": torch.ones(1)}, path)
    from mm_moslora.diffusion.tiny_pipelines import tiny_pipeline

    fresh = tiny_pipeline("tiny-sdxl")
    ways = (
        lambda: load_adapter(pipeline.unet, tmp_path / "a", component="unet"),
        lambda: plain_pipeline_weights(tmp_path / "a"),
        lambda: fresh.load_lora_weights(tmp_path / "a"),
    )
    for changed, words in (
        ({"unet.a.alpha": torch.ones(1)}, r"unet\.a\.alpha, which is not understood"),
        ({mixer: torch.ones(RANK)}, r"downB.* holds \[4\].*expected \[R, R\]"),
        ({mixer: torch.full((RANK, RANK), torch.nan)}, "holds NaN or infinity"),
        ({mixer: torch.eye(RANK + 1)}, r"shape \[5, 5\], expected \[4, 4\]"),
        ({mixer.replace("downB", "down"): torch.full((RANK, 8), torch.nan)}, "holds NaN or infinity"),
    ):
        save_file(written | changed, path)
        for way in ways:
            with pytest.raises(AdapterError, match=words):
                way()
    assert not getattr(fresh.unet, "peft_config", None)
