"""The format of an adapter folder: one set of factors for this package, one for everybody else.

::

    adapter_config.json         stock PEFT's configuration, without keys of this package
    adapter_model.safetensors   folded factors A and B' = B M: a plain LoRA to stock PEFT, vLLM and llama.cpp, and right
    moslora.safetensors         A, M and B in float32, under PEFT's names
    moslora_start.safetensors   the mixers as training began, for `adapter_inspection`
    moslora.json                full configuration, format version, sha256 of all of them, the base they belong to

`moslora.json` is written last and names the others by hash: an interrupted or half-replaced folder is noticed. A folder
without the start loads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mm_moslora.utils import files
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.network.hub_access import hub_or_cache

FORMAT = "mm_moslora.adapter"
FORMAT_VERSION = 1
PREFIX = "base_model.model."
STOCK_CONFIG, STOCK_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
OWN_CONFIG, OWN_WEIGHTS, START_WEIGHTS = "moslora.json", "moslora.safetensors", "moslora_start.safetensors"
OWN_TYPE = "MOSLORA"
"""`peft_type` of an `adapter_config.json` written by hand with keys of `MoSLoRAConfig`. PEFT alone refuses it."""
USE_MIXER, USE_MIXER_PATTERN = "lora_use_mixer", "lora_use_mixer_pattern"
"""The authors' options."""
REFERENCE_MIXERS = ("lora_AB", ".downB.")
"""In the names of the mixers of the authors' code."""
MIXER_PART = ".lora_mixer."
MIXER = f"{MIXER_PART}weight"
START_PART = ".lora_start."
"""Before the names of what is kept of the start of training."""
START_MIXER = f"{START_PART}weight"
# Embeddings keep their factors as bare parameters.
FACTORS_A = (".lora_A.weight", ".lora_embedding_A")
FACTORS_B = (".lora_B.weight", ".lora_embedding_B")
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""Torch's names for the module inside a wrapper: torch.compile, activation checkpointing, FSDP."""


@dataclass(frozen=True, kw_only=True)
class PlainPair:
    """A folded adapter in one module."""

    A: Tensor
    """``[R, D_in]``, or ``[R, C, h, w]``."""
    B: Tensor
    """``[D_out, R]`` or ``[D_out, R, 1, 1]``, with the scaling inside."""


def bare_name(name: str) -> str:
    """A name of a module or a parameter without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_as_modules(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that PEFT looks for: those of modules, FSDP's wrappers left out."""
    # A wrapper for activation checkpointing leaves itself out of state dicts, and PEFT would then write nothing in it.
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    names = {bare_name(name): name.replace("_fsdp_wrapped_module.", "") for name, _ in tensors}
    return {names.get(bare_name(name), name): tensor for name, tensor in state.items()}


def is_factor(name: str) -> bool:
    """Whether a name, as in the folder, is that of A, of B or in a mixer."""
    return name.endswith((*FACTORS_A, *FACTORS_B)) or (MIXER_PART in name and "." not in name.rpartition(MIXER_PART)[2])


def mixers_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """M ``[R, R]`` of every mixer, by what stands before ``.lora_mixer.weight`` in its name in the folder."""
    return {name.removesuffix(MIXER): tensor for name, tensor in tensors.items() if name.endswith(MIXER)}


def adapted_path(name: str) -> str | None:
    """The module path of an A factor's name in the folder; None for every other name."""
    for suffix in FACTORS_A:
        if name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix)
    return None


def target_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules to adapt, by the names of their factors."""
    paths = (adapted_path(name) for name in tensors)
    return sorted(path for path in paths if path is not None)


def downloaded(model_id: str | Path, names: Sequence[str], *, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The double folder of an adapter, on this machine; None for every other adapter. The first of `names` decides."""
    root = Path(model_id, subfolder or "")
    if root.is_dir():
        return root if any((root / name).is_file() for name in (OWN_CONFIG, OWN_WEIGHTS)) else None
    arguments = {key: value for key, value in hub.items() if key in inspect.signature(hf_hub_download).parameters}

    def fetched(*filenames: str) -> Path | None:
        try:
            with hub_or_cache(model_id):
                first, *_ = [
                    hf_hub_download(str(model_id), file, subfolder=subfolder, **arguments) for file in filenames
                ]
        except (EntryNotFoundError, HFValidationError):
            return None
        return Path(first)

    first = fetched(*names)
    if first is None:
        return None
    if OWN_WEIGHTS in names:
        fetched(START_WEIGHTS)
    return first.parent


def declares_mixers(config: Mapping[str, Any]) -> bool:
    """Whether an `adapter_config.json` is one of the MoSLoRA authors' fork of PEFT, with mixers."""
    return bool(config.get(USE_MIXER) or config.get(USE_MIXER_PATTERN))


def first_mixer(names: Iterable[str], signs: Sequence[str] = ("lora_mixer", *REFERENCE_MIXERS)) -> str | None:
    """The first name of a mixer's tensor, of this package or of the authors' code; None: there is none."""
    return next((name for name in names if any(sign in name for sign in signs)), None)


def read_manifest(root: Path) -> dict[str, Any]:
    """The content of `moslora.json`, of a version and with the parts that this release reads."""
    manifest = read_json(root / OWN_CONFIG)
    if manifest.get("format") != FORMAT:
        kind = manifest.get("format")
        raise AdapterError(f"{root / OWN_CONFIG} is not an adapter manifest: its format is {kind!r}, not {FORMAT!r}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{root / OWN_CONFIG} has format version {manifest.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}. Update mm-moslora."
        )
    for part in ("config", "files", "base"):
        if not isinstance(manifest.get(part), dict):
            raise AdapterError(f"{root / OWN_CONFIG} lacks {part!r}, or it is no object. Copy the folder again.")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of an adapter folder; see `files.read_json`."""
    try:
        return dict(files.read_json(path))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{error}. Copy the folder again.") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise AdapterError(f"{path} is damaged or truncated ({error}). Copy the folder again.") from error
