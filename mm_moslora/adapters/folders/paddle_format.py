"""Adapter folders of PaddleNLP, with mixers (`lora_use_mixer`) and without.

::

    lora_config.json            r, lora_alpha, rslora, lora_use_mixer, ...
    lora_model_state.pdparams   a pickle of NumPy arrays by name; or peft_model.safetensors, whole or in parts

Paddle's linear layers keep W as ``[D_in, D_out]``, so the layer is ``y = x W + s x A M B`` with A ``[D_in, R]``, M
(`lora_AB`) ``[R, R]`` and B ``[R, D_out]``: every matrix is the transpose of PEFT's.
"""

from __future__ import annotations

import codecs
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from mm_moslora.adapters.folder_format import PREFIX, USE_MIXER, read_json
from mm_moslora.adapters.folders.authors_format import check_declared, check_options, read_tensors, with_known_names
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.untrusted_files import opened

PADDLE_CONFIG = "lora_config.json"
_PICKLED = "lora_model_state.pdparams"
_WHOLE = "peft_model.safetensors"
_PART = re.compile(r"peft_model-\d{5}-of-(\d{5})\.safetensors")
_NAME_TABLE = "StructuredToParameterName@@"
_FACTORS = (".lora_A", ".lora_B", ".lora_AB")
# How the layer is trained, or computed, not what it computes.
_KNOWN = {
    "r", "lora_alpha", "lora_dropout", "rslora", "scaling", USE_MIXER, "target_modules", "base_model_name_or_path",
    "dtype", "tensor_parallel_degree", "lora_plus_scale", "use_quick_lora", "head_dim", "trainable_modules",
    "lorapro", "lorapro_x_mode", "lorapro_scaling_factor", "use_intermediate_api",
}  # fmt: skip


def paddle_adapter(root: Path) -> tuple[dict[str, Any], LoraConfig, dict[str, Tensor]]:
    """Read a folder.

    Returns:
        Its configuration, what stock PEFT has of it, and the tensors under this package's names.

    Raises:
        AdapterError: a file that is missing or damaged, a part of several, an option or a tensor that is not
            understood, a tensor that is there twice, a target without tensors.
    """
    config = read_json(root / PADDLE_CONFIG)
    check_options(config, _KNOWN, str(root), file=PADDLE_CONFIG)
    _check_numbers(config, root)
    if (config.get("tensor_parallel_degree") or 1) > 1:
        raise AdapterError(
            f"{root} holds one of {config['tensor_parallel_degree']} parts of an adapter. Save it in PaddleNLP with "
            "merge_tensor_parallel."
        )
    stock = LoraConfig(
        r=config.get("r", 8), lora_alpha=config.get("lora_alpha", 8), lora_dropout=config.get("lora_dropout", 0.0),
        use_rslora=bool(config.get("rslora")), target_modules=["all"],
    )  # fmt: skip
    scaling = stock.lora_alpha / (math.sqrt(stock.r) if stock.use_rslora else stock.r)
    if not math.isclose(stated := config.get("scaling", scaling), scaling, rel_tol=1e-6):
        raise AdapterError(
            f"{root / PADDLE_CONFIG} stores the scaling {stated:g}; its rank and alpha give {scaling:g}. Copy the "
            "folder again."
        )
    stored = _read(root)
    _check_targets(config.get("target_modules") or [], stored, root)
    renamed: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        _add(renamed, {_name(name, root): tensor.t()}, root)
    tensors = with_known_names(renamed)
    if not config.get(USE_MIXER):
        check_declared(tensors, str(root), file=PADDLE_CONFIG)
    return config, stock, {name: tensor.contiguous() for name, tensor in tensors.items()}


def _check_numbers(config: Mapping[str, Any], root: Path) -> None:
    for key in ("r", "lora_alpha", "scaling"):
        value = config.get(key, 1)
        number = isinstance(value, int if key == "r" else int | float) and not isinstance(value, bool)
        if not number or (key == "r" and value < 1):
            expected = "a whole number from 1" if key == "r" else "a number"
            raise AdapterError(f"{root / PADDLE_CONFIG} sets {key} to {value!r}, expected {expected}.")


def _check_targets(targets: str | list[str], names: Iterable[str], root: Path) -> None:
    """Refuse a target (PaddleNLP matches whole module paths) of which no tensor is there."""
    paths = {name.rpartition(".")[0] for name in names}
    for pattern in [targets] if isinstance(targets, str) else targets:
        try:
            met = any(re.fullmatch(pattern, path) for path in paths)
        except (re.error, TypeError) as error:
            raise AdapterError(
                f"{root / PADDLE_CONFIG} has {pattern!r} in target_modules, which is no regular expression ({error})."
            ) from error
        if not met:
            raise AdapterError(
                f"{root} holds no tensors of {pattern!r}, which its target_modules name. Copy the folder again; if the "
                f"base model has no such modules, remove the pattern from {PADDLE_CONFIG}."
            )


def _add(tensors: dict[str, Tensor], more: Mapping[str, Tensor], root: Path) -> None:
    if twice := sorted(tensors.keys() & more.keys()):
        raise AdapterError(
            f"{root} holds {twice[0]!r} twice, so which one is meant is unknown. Save the adapter again in an empty "
            "folder."
        )
    tensors.update(more)


def _name(name: str, root: Path) -> str:
    """PEFT's name: Paddle's models call the decoder after themselves (`llama.layers.0`), transformers' `model`."""
    if not name.endswith(_FACTORS):
        raise AdapterError(
            f"{root} holds {name!r}, which is not understood: {', '.join(_FACTORS)} are read. Without it the adapter "
            "would compute other values; save the adapter alone in PaddleNLP (no trainable_modules, no trainable_bias)."
        )
    return PREFIX + re.sub(r"^\w+\.(?=layers\.\d)", "model.", name) + ".weight"


def _read(root: Path) -> dict[str, Tensor]:
    parts = sorted(root.glob("peft_model*.safetensors"))
    _check_parts([part.name for part in parts], root)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        _add(tensors, read_tensors(part), root)
    if not parts:
        tensors = _unpickled(root / _PICKLED)
    odd = next((name for name, tensor in tensors.items() if tensor.ndim != 2), None)
    if odd is not None or not tensors:
        what = f"holds {odd!r}, which is no matrix" if odd else "holds no tensors"
        raise AdapterError(f"{root} {what}. Copy the folder again.")
    return tensors


def _check_parts(names: list[str], root: Path) -> None:
    """Refuse a file that is neither the whole adapter nor a part of one saving, and parts of which one is missing."""
    if not names or names == [_WHOLE]:
        return
    counts = {match[1] for name in names if (match := _PART.fullmatch(name))}
    total = max(counts, default="00001")
    expected = {f"peft_model-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)}
    if odd := sorted(set(names) - expected):
        raise AdapterError(
            f"{root} holds {odd[0]} beside other files or under an unknown name; {_WHOLE} alone or all of "
            "peft_model-NNNNN-of-NNNNN.safetensors is expected. Remove what is of another saving."
        )
    if missing := sorted(expected - set(names)):
        raise AdapterError(f"{root} lacks {missing[0]}, a part of the adapter. Copy the folder again.")


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Arrays by name; the pickle can make nothing else, and runs no code."""
    if not path.is_file():
        raise AdapterError(f"{path.parent} lacks {_PICKLED} and peft_model.safetensors. Copy the folder again.")
    try:
        with opened(path, most=None) as stream:
            arrays = _Arrays(stream).load()
        tensors = {}
        for name, value in dict(arrays).items():
            if name == _NAME_TABLE:
                continue
            array = value[1] if isinstance(value, tuple) else value  # newer versions add the tensor's name
            tensors[str(name)] = _tensor(array)
    except Exception as error:  # a broken pickle raises nearly anything, and its sizes MemoryError
        what = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
        raise AdapterError(f"{path} is damaged, or holds more than arrays ({what}). Copy the folder again.") from error
    return tensors


def _tensor(array: Any) -> Tensor:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"a {type(array).__name__} is no array")
    if array.dtype == np.uint16:  # Paddle's bfloat16
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    if array.dtype.kind != "f":
        raise TypeError(f"an array of {array.dtype} is no weight")
    return torch.from_numpy(array.copy())


class _Arrays(pickle.Unpickler):
    """Finds what makes a NumPy array, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return lambda *_: np.ndarray((0,), np.uint8)  # its state, which follows, has as many bytes as it says
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if (module, name) == ("numpy", "ndarray"):
            return None  # an argument of _reconstruct, never called
        if (module, name) == ("_codecs", "encode"):
            return codecs.encode
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")
