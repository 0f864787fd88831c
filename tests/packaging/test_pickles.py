"""Pickles of others run nothing: one that leaves a mark, through every way by which a pickle is read."""

from __future__ import annotations

import ast
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from mm_moslora import adapters
from mm_moslora.models.importing.import_checkpoint import import_parts
from mm_moslora.models.load_model import load
from mm_moslora.utils.errors import MoSLoRAError
from tests.adapters.adapter_models import llama

CHECKOUT = Path(__file__).parents[2]


class _Mark:
    """A tensor that makes a folder when it is unpickled without limits, and then is a tensor."""

    def __init__(self, place: Path, value: Tensor) -> None:
        self.place, self.value = place, value

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (str(self.place), self.value)


def _made(place: str, value: Tensor) -> Tensor:
    os.makedirs(place, exist_ok=True)
    return value


def _marked(tensors: dict[str, Tensor], place: Path) -> dict[str, Any]:
    return {name: _Mark(place, tensor) for name, tensor in tensors.items()}


def _adapter(folder: Path, place: Path) -> Path:
    """A folder of PEFT whose weights are a pickle."""
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    tensors = {name: tensor.clone() for name, tensor in peft.get_peft_model_state_dict(model).items()}
    torch.save(_marked(tensors, place), folder / "adapter_model.bin")
    return folder


def _moslora(folder: Path, place: Path) -> None:
    adapters.load_adapter(llama(), _adapter(folder, place))


def _peft(folder: Path, place: Path) -> None:
    adapters.load_method(llama(), _adapter(folder, place))


def _projector(folder: Path, place: Path) -> None:
    folder.mkdir()
    tensors = {"model.mm_projector.weight": torch.ones(2, 2), "model.mm_projector.bias": torch.ones(2)}
    torch.save(_marked(tensors, place), folder / "mm_projector.bin")
    import_parts(folder, folder / "parts")


def _lora_of_llava(folder: Path, place: Path) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "a/b"}))
    tensors = {"model.mm_projector.weight": torch.ones(2, 2), "model.mm_projector.bias": torch.ones(2)}
    torch.save(_marked(tensors, place), folder / "non_lora_trainables.bin")
    import_parts(folder, folder / "parts")


def _whole(folder: Path, place: Path) -> None:
    model = llama()
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(_marked(dict(model.state_dict()), place), folder / "pytorch_model.bin")
    load(folder)


WAYS: list[Callable[[Path, Path], None]] = [_moslora, _peft, _projector, _lora_of_llava, _whole]


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_that_leaves_a_mark_leaves_none(tmp_path: Path, way: Callable[[Path, Path], None]) -> None:
    mark = tmp_path / "mark"
    with pytest.raises((MoSLoRAError, pickle.UnpicklingError)):
        way(tmp_path / "a", mark)
    assert not mark.exists()


def test_the_mark_is_left_by_whoever_unpickles_it(tmp_path: Path) -> None:
    torch.save(_marked({"a": torch.ones(1)}, tmp_path / "mark"), tmp_path / "a.bin")
    torch.load(tmp_path / "a.bin", weights_only=False)
    assert (tmp_path / "mark").exists()


def _unlimited(source: str) -> list[int]:
    """Lines that unpickle without limits: `torch.load` without `weights_only=True`, and `pickle`'s own functions."""
    found, nodes = [], list(ast.walk(ast.parse(source)))
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in ("pickle", "torch", "joblib", "dill"):
            found += [node.lineno for alias in node.names if alias.name in ("load", "loads", "Unpickler")]
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
            continue
        name = f"{node.value.id}.{node.attr}"
        if name in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load"):
            found.append(node.lineno)
        call = calls.get(id(node))
        if name == "torch.load":
            told = [word.value for word in call.keywords if word.arg == "weights_only"] if call else []
            if not (len(told) == 1 and isinstance(told[0], ast.Constant) and told[0].value is True):
                found.append(node.lineno)
    return found


def test_no_other_place_unpickles() -> None:
    folders = ("mm_moslora", "eval/mm_moslora_eval", "scripts", "examples")
    sources = {path.relative_to(CHECKOUT): path.read_text() for f in folders for path in (CHECKOUT / f).rglob("*.py")}
    hints = ("pickle", "torch.load", "joblib", "dill", "from torch import")
    found = {
        f"{path}:{line}" for path, text in sources.items() if any(hint in text for hint in hints)
        for line in _unlimited(text)
    }  # fmt: skip
    assert found == set()


def test_the_search_finds_what_unpickles() -> None:
    lines = (
        "torch.load(a, weights_only=True)", "torch.load(a)", "torch.load(a, weights_only=False)", "map(torch.load, a)",
        "pickle.loads(a)", "from torch import load", "class A(pickle.Unpickler): pass", "pickle.dumps(a)",
    )  # fmt: skip
    assert sorted(_unlimited("\n".join(lines))) == [2, 3, 4, 5, 6, 7]
