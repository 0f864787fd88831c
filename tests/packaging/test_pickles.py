"""Pickles of others run nothing: one that leaves a mark, through every way by which a pickle is read."""

from __future__ import annotations

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
from mm_moslora.models.import_checkpoint import import_parts
from mm_moslora.models.load_model import load
from mm_moslora.utils.errors import MoSLoRAError
from tests.adapters.adapter_models import llama


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
