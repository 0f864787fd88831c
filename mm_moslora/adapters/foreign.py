"""Read adapter folders that others wrote: stock PEFT, the MoSLoRA authors' PEFT fork, PaddleNLP.

::

    stock PEFT   adapter_config.json + adapter_model.safetensors; lora_A, lora_B. Becomes a mixer that is the identity.
    authors      the same with lora_AB.weight [R, R] (arXiv 2406.11909's fork of PEFT 0.10), safetensors or .bin
    PaddleNLP    lora_config.json with lora_use_mixer; lora_A [D_in, R], lora_AB [R, R], lora_B [R, D_out]: y = x A M B,
                 every matrix transposed against ours; safetensors or .pdparams
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mm_moslora.adapters.config import MoSLoRAConfig, from_lora_config
from mm_moslora.adapters.state import MIXER, OWN_CONFIG, PREFIX, STOCK_CONFIG, STOCK_WEIGHTS, adapted_path, target_paths
from mm_moslora.errors import AdapterError
from mm_moslora.folders import adapters_inside
from mm_moslora.named_files import opened

PICKLED_WEIGHTS = "adapter_model.bin"
PADDLE_CONFIG = "lora_config.json"
_AUTHORS_MIXER = ".lora_AB.weight"


@dataclass(frozen=True, kw_only=True)
class AdapterFolder:
    """What a folder holds, read and verified."""

    config: MoSLoRAConfig
    """The adapter's configuration; its target_modules are whole module paths."""
    tensors: dict[str, Tensor]
    """A, M, B and other entries under PEFT's names."""
    base: dict[str, Any]
    """What was remembered of the base model; empty for a folder of another library."""


def read_foreign(root: Path, *, trainable: bool = False) -> AdapterFolder:
    """Read a folder of another library.

    Args:
        root: the folder.
        trainable: for plain LoRA, whether the identity mixer trains.

    Raises:
        AdapterError: not an adapter folder; a file that is missing, damaged or of another method.
    """
    if (root / STOCK_CONFIG).is_file():
        return _read_peft(root, trainable)
    if (root / PADDLE_CONFIG).is_file():
        return _read_paddle(root)
    if inside := adapters_inside(root):
        raise AdapterError(inside)
    raise AdapterError(
        f"{root} holds none of {OWN_CONFIG}, {STOCK_CONFIG} and {PADDLE_CONFIG}; it is not an adapter folder."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        AdapterError: damaged, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{path} is not valid JSON ({error}). Copy the folder again.") from error
    if not isinstance(data, dict):
        raise AdapterError(f"{path} holds a {type(data).__name__}, expected an object.")
    return data


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        AdapterError: damaged or truncated.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or truncated ({error}). Copy the folder again.") from error


def _read_peft(root: Path, trainable: bool) -> AdapterFolder:
    data = read_json(root / STOCK_CONFIG)
    if data.get("peft_type") != "LORA":
        raise AdapterError(
            f"{root} holds an adapter of peft_type {data.get('peft_type')!r}; LORA (MoSLoRA and plain LoRA) is read "
            "here. Load it with PEFT itself."
        )
    is_authors = bool(data.get("lora_use_mixer") or data.get("lora_use_mixer_pattern"))
    tensors = _peft_tensors(root, pickled=is_authors)
    lost = [name for name in tensors if "lora_mixer" in name or ("lora_AB" in name and not is_authors)]
    if lost:
        raise AdapterError(
            f"{root} holds mixers ({lost[0]!r}) that its configuration does not speak of. Loaded as plain LoRA it "
            "would be wrong."
        )
    known = {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_type"}
    stock = LoraConfig(**{key: value for key, value in data.items() if key in known})
    if is_authors:
        return _authors(root, stock, tensors)
    config = from_lora_config(stock, mixer_trainable=trainable and not stock.use_dora)
    config.target_modules = target_paths(tensors)
    if config.mixer_trainable:
        # The mixers are not in the file; the identity makes them exactly this adapter.
        adapted = {adapted_path(name): len(tensor) for name, tensor in tensors.items() if adapted_path(name)}
        tensors |= {f"{PREFIX}{path}{MIXER}": torch.eye(rank) for path, rank in adapted.items()}
    return AdapterFolder(config=config, tensors=tensors, base={})


def _peft_tensors(root: Path, *, pickled: bool) -> dict[str, Tensor]:
    if (root / STOCK_WEIGHTS).is_file():
        return read_tensors(root / STOCK_WEIGHTS)
    if pickled and (root / PICKLED_WEIGHTS).is_file():
        # The authors' older fork writes nothing else; weights_only keeps a pickle from running code.
        path = root / PICKLED_WEIGHTS
        with _damage(path):
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
            raise AdapterError(f"{path} holds no tensors by name. Copy the folder again.")
        return {str(name): tensor for name, tensor in loaded.items()}
    raise AdapterError(f"{root} lacks {STOCK_WEIGHTS}. Pickled weights (.bin) are not read; save as safetensors.")


def _authors(root: Path, stock: LoraConfig, tensors: dict[str, Tensor]) -> AdapterFolder:
    """Their mixer has another name; a module that `lora_use_mixer_pattern` left out has none and gets the identity."""
    if stock.use_dora:
        raise AdapterError(
            f"{root} combines use_dora with lora_AB. The authors' code trains and merges that differently; it has no "
            "right reading."
        )
    renamed = {name.replace(_AUTHORS_MIXER, MIXER): tensor for name, tensor in tensors.items()}
    if not any(name.endswith(MIXER) for name in renamed):
        raise AdapterError(f"{root} announces mixers (lora_use_mixer) but holds no lora_AB. Copy the folder again.")
    for name, tensor in list(renamed.items()):
        path = adapted_path(name)
        if path is not None:
            renamed.setdefault(f"{PREFIX}{path}{MIXER}", torch.eye(len(tensor), dtype=tensor.dtype))
    config = MoSLoRAConfig(**_fields_of(stock), mixer_init="kaiming")
    config.target_modules = target_paths(renamed)
    return AdapterFolder(config=config, tensors=renamed, base={})


def _fields_of(stock: LoraConfig) -> dict[str, Any]:
    names = {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_type"}
    return {name: getattr(stock, name) for name in names}


def _read_paddle(root: Path) -> AdapterFolder:
    data = read_json(root / PADDLE_CONFIG)
    raw = _paddle_tensors(root)
    tensors: dict[str, Tensor] = {}
    for name, tensor in raw.items():
        path, _, kind = name.rpartition(".")
        if kind not in ("lora_A", "lora_B", "lora_AB"):
            raise AdapterError(
                f"{root} holds {name!r}; expected lora_A, lora_AB and lora_B only. Save the adapter without the model."
            )
        # The first component is the model's family there (llama., qwen2.) and `model.` in transformers.
        inside = path.split(".", 1)[1]
        own = "lora_mixer" if kind == "lora_AB" else kind
        tensors[f"{PREFIX}model.{inside}.{own}.weight"] = tensor.float().T.contiguous()
    mixed = bool(data.get("lora_use_mixer"))
    if mixed != any(name.endswith(MIXER) for name in tensors):
        raise AdapterError(f"{root} has lora_use_mixer={mixed}, but its tensors say otherwise. Copy the folder again.")
    config = MoSLoRAConfig(
        r=int(data["r"]),
        lora_alpha=int(data["lora_alpha"]),
        lora_dropout=float(data.get("lora_dropout", 0.0)),
        use_rslora=bool(data.get("rslora", False)),
        target_modules=target_paths(tensors),
        task_type="CAUSAL_LM",
        mixer_init="kaiming" if mixed else "identity",
        mixer_trainable=mixed,
    )
    return AdapterFolder(config=config, tensors=tensors, base={})


def _paddle_tensors(root: Path) -> dict[str, Tensor]:
    files = sorted(root.glob("*.safetensors"))
    if files:
        return {name: tensor for path in files for name, tensor in read_tensors(path).items()}
    pickles = sorted(root.glob("*.pdparams"))
    if not pickles:
        raise AdapterError(f"{root} holds neither a .safetensors nor a .pdparams file.")
    arrays: dict[str, Tensor] = {}
    for path in pickles:
        with _damage(path), opened(path, most=None) as file:
            content = _ArrayUnpickler(file, size=path.stat().st_size).load()
        if not isinstance(content, dict):
            raise AdapterError(f"{path} holds a {type(content).__name__}, expected arrays by name. Copy it again.")
        arrays |= {name: _from_numpy(value) for name, value in content.items() if isinstance(value, np.ndarray)}
    return arrays


def _from_numpy(array: np.ndarray) -> Tensor:
    # Paddle keeps bfloat16 as its bits in uint16.
    if array.dtype == np.uint16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turn whatever reading a pickle raises into one kind of error."""
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything, and its sizes MemoryError
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
        raise AdapterError(f"{path} is damaged, or holds more than tensors ({what}). Copy the folder again.") from error


_ARRAY = object()
"""Stands for the class of arrays, which a pickle names and must not call."""


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of arrays: nothing that could run code, and no array larger than the file.

    Args:
        file: opened.
        size: of the file, bytes.
    """

    _ALLOWED = frozenset(
        {("numpy", "ndarray"), ("numpy", "dtype")}
        | {(f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
        | {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}
        | {("_codecs", "encode"), ("collections", "OrderedDict")}
    )

    def __init__(self, file: IO[bytes], *, size: int) -> None:
        super().__init__(file)
        self._size = size

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise AdapterError(f"A .pdparams file asks for {module}.{name}, which is no array. It was not read.")
        if name == "_reconstruct":
            return self._empty
        return _ARRAY if name == "ndarray" else super().find_class(module, name)

    def _empty(self, kind: object, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array to be filled; pickles call this with a shape of their own choice."""
        if kind is not _ARRAY or math.prod(shape) * np.dtype(dtype).itemsize > self._size:
            raise AdapterError(f"A .pdparams file asks for an array of shape {shape}, which it does not hold.")
        return np.ndarray(shape, dtype)
