"""PaddleNLP's adapter folders: the outputs are those of its layer, and what is not understood is refused.

The layer is written here from its definition, y = x W + s x A AB B with Paddle's matrices.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_moslora.adapters import load_adapter
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import llama, logits

TARGETS = ["q_proj", "v_proj", "down_proj"]
RANK, ALPHA = 4, 6


class _Paddles(nn.Module):
    def __init__(self, base: nn.Linear, A: Tensor, AB: Tensor | None, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.A, self.AB, self.B, self.scaling = base, A, AB, B, scaling

    def forward(self, x: Tensor) -> Tensor:
        inner = x @ self.A if self.AB is None else x @ self.A @ self.AB
        return self.base(x) + self.scaling * (inner @ self.B)


def _made(*, mixers: bool, scaling: float) -> tuple[dict[str, Tensor], Tensor]:
    """An adapter under Paddle's names, and the logits with its layers."""
    model, generator = llama(), torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for path, base in [(path, m) for path, m in model.named_modules() if path.endswith(tuple(TARGETS))]:
        shapes = {"A": (base.in_features, RANK), "AB": (RANK, RANK), "B": (RANK, base.out_features)}
        made = {name: torch.randn(shape, generator=generator) / 4 for name, shape in shapes.items()}
        if not mixers:
            del made["AB"]
        tensors |= {f"llama.{path.removeprefix('model.')}.lora_{name}": tensor for name, tensor in made.items()}
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, _Paddles(base, made["A"], made.get("AB"), made["B"], scaling))
    return tensors, logits(model.eval())


def _write(folder: Path, tensors: dict[str, Tensor], *, layout: str, **changes) -> Path:
    config = {"r": RANK, "lora_alpha": ALPHA, "scaling": ALPHA / RANK, "lora_use_mixer": True, "rslora": False,
              "target_modules": [".*q_proj.*"], "tensor_parallel_degree": -1, "use_mora": False, "pissa": False,
              "trainable_bias": None, "enable_lora_list": None, "dtype": "float32", "lorapro": False}  # fmt: skip
    folder.mkdir()
    (folder / "lora_config.json").write_text(json.dumps(config | changes))
    if layout == "safetensors":
        save_file(tensors, folder / "peft_model.safetensors")
        return folder
    held = {name: (name, tensor.numpy()) if layout == "named" else tensor.numpy() for name, tensor in tensors.items()}
    names = {} if layout == "named" else {"StructuredToParameterName@@": dict.fromkeys(held, "linear_0.w_0")}
    (folder / "lora_model_state.pdparams").write_bytes(pickle.dumps(held | names, protocol=2 + 2 * bool(names)))
    return folder


@pytest.mark.parametrize("layout", ["arrays", "named", "safetensors"])
def test_the_outputs_are_those_of_paddles_layer(layout: str, tmp_path: Path) -> None:
    tensors, expected = _made(mixers=True, scaling=ALPHA / RANK)
    folder = _write(tmp_path / "a", tensors, layout=layout)
    model = load_adapter(llama(), folder, trainable=True)
    torch.testing.assert_close(logits(model.eval()), expected, atol=2e-6, rtol=1e-5)
    assert (logits(llama()) - expected).abs().max() > 0.05
    assert sum("lora_mixer" in name for name, p in model.named_parameters() if p.requires_grad) == 6


def test_plain_lora_with_rank_stabilised_scaling_and_bfloat16(tmp_path: Path) -> None:
    tensors, expected = _made(mixers=False, scaling=ALPHA / RANK**0.5)
    folder = _write(
        tmp_path / "a", tensors, layout="arrays", lora_use_mixer=False, rslora=True, scaling=ALPHA / RANK**0.5
    )
    torch.testing.assert_close(logits(load_adapter(llama(), folder)), expected, atol=2e-6, rtol=1e-5)
    bits = {name: tensor.bfloat16().view(torch.int16).numpy().view(np.uint16) for name, tensor in tensors.items()}
    (folder / "lora_model_state.pdparams").write_bytes(pickle.dumps(bits))
    rounded = load_adapter(llama(), folder).state_dict()
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    torch.testing.assert_close(rounded[name], tensors["llama.layers.0.self_attn.q_proj.lora_A"].t().bfloat16().float())


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


V = "llama.layers.1.self_attn.v_proj.lora_"
NARROW = {f"{V}A": torch.ones(32, 2), f"{V}AB": torch.ones(2, 2), f"{V}B": torch.ones(2, 16)}


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        (lambda held: _without(held, f"{V}AB"), {}, r"holds no lora_AB of 'model\.layers\.1\.self_attn\.v_proj'"),
        (lambda held: {n: t for n, t in held.items() if not n.endswith("AB")}, {}, "announces mixers"),
        (lambda held: held | NARROW, {}, r"v_proj.* has shape \[2, 32\], expected \[4, 32\]"),
        (lambda held: held, {"lora_use_mixer": False}, "declares none"),
        (lambda held: held, {"scaling": 4.0}, "stores the scaling 4"),
        (lambda held: held, {"tensor_parallel_degree": 2}, "one of 2 parts"),
        (lambda held: held, {"use_mora": True}, r"use_mora.*not understood.*lora_config\.json"),
        (lambda held: held, {"pissa": True}, "pissa.*not understood"),
        (lambda held: held | {"llama.norm.weight": torch.ones(32, 1)}, {}, "'llama.norm.weight', which is not underst"),
        (lambda held: held | {f"{V}A": torch.ones(4)}, {}, "no matrix"),
        (lambda held: {n.replace("layers.1", "layers.7"): t for n, t in held.items()}, {}, "which the model lacks"),
        (lambda held: held | {n.replace("llama", "model"): t for n, t in held.items()}, {}, r"lora_A\.weight' twice"),
        (lambda held: held, {"target_modules": [".*q_proj.*", ".*up_proj.*"]}, r"no tensors of '\.\*up_proj\.\*'"),
        (lambda held: held, {"target_modules": "*q"}, "no regular expression"),
        (lambda held: held, {"r": 0}, "r to 0, expected a whole number from 1"),
        (lambda held: held, {"lora_alpha": "6"}, "lora_alpha to '6', expected a number"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_one_clear_error(change, options: dict, said: str, tmp_path: Path) -> None:
    tensors, _ = _made(mixers=True, scaling=1.0)
    folder = _write(tmp_path / "a", change(tensors), layout="arrays", **options)
    with pytest.raises(AdapterError, match=said):
        load_adapter(llama(), folder)


def test_parts_of_safetensors_are_read_whole_or_not_at_all(tmp_path: Path) -> None:
    tensors, expected = _made(mixers=True, scaling=ALPHA / RANK)
    folder = _write(tmp_path / "a", {}, layout="arrays")
    first, second = (folder / f"peft_model-0000{number}-of-00002.safetensors" for number in (1, 2))
    halves = [{n: t for n, t in tensors.items() if f"layers.{layer}" in n} for layer in (0, 1)]
    save_file(halves[0], first)
    with pytest.raises(AdapterError, match="lacks peft_model-00002-of-00002"):
        load_adapter(llama(), folder)
    save_file(halves[1], second)
    torch.testing.assert_close(logits(load_adapter(llama(), folder)), expected, atol=2e-6, rtol=1e-5)
    save_file(tensors, second)
    with pytest.raises(AdapterError, match=r"layers\.0\..* twice"):
        load_adapter(llama(), folder)
    for other in ("peft_model.safetensors", "peft_model-00001-of-00001.safetensors", "peft_model_old.safetensors"):
        save_file(halves[0], folder / other)
        with pytest.raises(AdapterError, match=f"holds {other} beside other files"):
            load_adapter(llama(), folder)
        (folder / other).unlink()


class _Calls:
    def __init__(self, call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "content",
    [
        b"", b"no pickle", pickle.dumps([1]), pickle.dumps({"a.lora_A": np.zeros(4)})[:-9],
        pickle.dumps({"a.lora_A": _Calls((np.ndarray, ((2**40,),)))}),
        pickle.dumps({"a.lora_A": _Calls((print, (1,)))}),
        pickle.dumps({"a.lora_A": np.array([{}])}), pickle.dumps({"a.lora_A": np.array(["x"])}),
    ],
)  # fmt: skip
def test_pickles_that_are_damaged_huge_or_hold_code_are_one_clear_error(content: bytes, tmp_path: Path) -> None:
    folder = _write(tmp_path / "a", {}, layout="arrays")
    (folder / "lora_model_state.pdparams").write_bytes(content)
    with pytest.raises(AdapterError, match="damaged, or holds more than arrays"):
        load_adapter(llama(), folder)
    (folder / "lora_model_state.pdparams").unlink()
    with pytest.raises(AdapterError, match="lacks lora_model_state"):
        load_adapter(llama(), folder)
