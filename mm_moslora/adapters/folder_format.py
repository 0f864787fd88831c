"""The adapter folder: one set of factors for this package, one for everybody else.

::

    adapter_config.json         stock PEFT's configuration, without keys of this package
    adapter_model.safetensors   folded factors A and B' = B M: a plain LoRA to stock PEFT, vLLM and llama.cpp, and right
    moslora.safetensors         A, M and B in float32, under PEFT's names
    moslora.json                full configuration, format version, sha256 of both weight files, the base they belong to

`moslora.json` is written last and names the other two by hash: an interrupted or half-replaced folder is noticed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_moslora.kernels.lora.lora_math import fold_right
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.files import sha256_of, staging
from mm_moslora.utils.run_paths import writing

FORMAT = "mm_moslora.adapter"
FORMAT_VERSION = 1
PREFIX = "base_model.model."
STOCK_CONFIG, STOCK_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "moslora.json", "moslora.safetensors"
MIXER = ".lora_mixer.weight"
# Embeddings keep their factors as bare parameters.
FACTORS_A = (".lora_A.weight", ".lora_embedding_A")
FACTORS_B = (".lora_B.weight", ".lora_embedding_B")
FACTORS = (*FACTORS_A, *FACTORS_B, MIXER)
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
"""What torch calls the module inside a wrapper: of torch.compile, of activation checkpointing, of FSDP."""


@dataclass(frozen=True, kw_only=True)
class PlainPair:
    """A folded adapter in one module."""

    A: Tensor
    """``[R, D_in]``, or ``[R, C, h, w]``."""
    B: Tensor
    """``[D_out, R]`` or ``[D_out, R, 1, 1]``, with the scaling inside."""


class AdapterOptions(Protocol):
    """What a folder needs to know of a configuration; `MoSLoRAConfig` has it."""

    @property
    def changes_base(self) -> bool:
        """Whether the start of A and B is taken out of the base weight."""

    def is_plain(self, module_path: str) -> bool:
        """Whether one module is plain LoRA."""

    def to_dict(self) -> dict[str, Any]:
        """Every field."""

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """The same without the mixer."""


def bare_name(name: str) -> str:
    """A name of a module or a parameter as it is without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


def named_as_modules(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict under the names that PEFT looks for: those of modules, FSDP's wrappers left out.

    A wrapper for activation checkpointing leaves itself out of state dicts, and PEFT would then write nothing in it.
    """
    held = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    places = {bare_name(name): name.replace("_fsdp_wrapped_module.", "") for name, _ in held}
    return {places.get(bare_name(name), name): tensor for name, tensor in state.items()}


def is_inner(path: str) -> bool:
    """Whether a module path lies inside an adapted layer: the out_proj of `nn.MultiheadAttention`, adapted with it."""
    return ".base_layer." in path


def adapted_path(name: str) -> str | None:
    """The module path of an A factor's name in the folder; None for every other name."""
    for suffix in FACTORS_A:
        if name.endswith(suffix):
            return name.removeprefix(PREFIX).removesuffix(suffix)
    return None


def target_paths(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules to adapt, from the names of their factors; what lies inside an adapted module comes with it."""
    paths = (adapted_path(name) for name in tensors)
    return sorted(path for path in paths if path is not None and not is_inner(path))


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str = "The adapter"
) -> None:
    """Refuse factors that are not what the model needs.

    Args:
        tensors: name to tensor.
        shapes: every name that must be there, and its shape.
        source: what holds them, for the message.

    Raises:
        AdapterError: a factor is missing, unknown, empty, of another shape or no floats, or holds NaN or infinity.
    """
    factors = {name for name in tensors if name.endswith(FACTORS)}
    for problem, names in (("lacks", shapes.keys() - factors), ("has besides the expected", factors - shapes.keys())):
        if names:
            raise AdapterError(f"{source} {problem} {len(names)} factors, the first is {min(names)!r}.")
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            raise AdapterError(
                f"{name} is empty. Under ZeRO-3 a parameter is a shard of size 0 on most ranks: gather before saving."
            )
        if name in shapes and tuple(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shapes[name])}. It was made for "
                "another base model, or its files were changed."
            )
        if name in shapes and not tensor.is_floating_point():
            raise AdapterError(f"{source}: {name} holds {tensor.dtype}, expected floats. Its files were changed.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{source}: {name} holds NaN or infinity; it is broken. Go back to an earlier checkpoint."
            )


def fold_state_dict(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors with mixers as a plain LoRA of the same rank with the same update.

    Args:
        tensors: PEFT's names without the adapter's name; A, B and, where there is one, M. Other entries are kept.

    Returns:
        The same without mixers, ``B' = B M`` in B's dtype, contiguous: the product that the fused kernel uses, so
        that a plain LoRA rounds as the live adapter does.
    """
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(MIXER):
            continue
        suffix = next((suffix for suffix in FACTORS_B if name.endswith(suffix)), None)
        mixer = None if suffix is None else tensors.get(name.removesuffix(suffix) + MIXER)
        folded[name] = (tensor if mixer is None else fold_right(tensor, mixer).to(tensor.dtype)).contiguous()
    return folded


def write_folder(
    folder: Path,
    config: AdapterOptions,
    tensors: Mapping[str, Tensor],
    *,
    base: Mapping[str, Any],
    auto_mapping: Mapping[str, Any] | None = None,
) -> None:
    """Write the double folder from factors under their names in the folder.

    Args:
        folder: made if missing.
        config: the adapter's configuration.
        tensors: A, M, B and whatever else PEFT saves, in float32.
        base: what to remember about the base model.
        auto_mapping: PEFT's class hint for models without a task type.
    """
    paths = target_paths(tensors)
    with writing(folder), staging(folder, (STOCK_CONFIG, STOCK_WEIGHTS, OWN_WEIGHTS, OWN_CONFIG)) as staged:
        for name, content in ((STOCK_WEIGHTS, fold_state_dict(tensors)), (OWN_WEIGHTS, tensors)):
            save_file(_apart(content), staged / name, metadata={"format": "pt"})
        _write_json(staged / STOCK_CONFIG, stock_config(config, paths, auto_mapping))
        own = config_to_dict(config) | {"target_modules": paths, "inference_mode": True}
        files = {name: sha256_of(staged / name) for name in (STOCK_WEIGHTS, OWN_WEIGHTS)}
        _write_json(staged / OWN_CONFIG, _manifest(own, files=files, base=base))


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors contiguous and without shared memory (tied modules that train whole), as safetensors wants them."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        own = tensor.contiguous()
        result[name] = own.clone() if own.data_ptr() in seen else own
        seen.add(own.data_ptr())
    return result


def _manifest(config: dict[str, Any], *, files: Mapping[str, str], base: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config,
        "files": dict(files),
        "base": dict(base),
    }


def downloaded(model_id: str | Path, names: Sequence[str], *, subfolder: str | None = None, **hub: Any) -> Path | None:
    """The folder of an adapter with mixers, on this machine; None for every other adapter.

    Args:
        model_id: folder, or name on the hub.
        names: files to fetch from the hub; the first decides.
        subfolder: folder inside it.
        **hub: arguments of `huggingface_hub.hf_hub_download`; others are ignored.
    """
    root = Path(model_id, subfolder or "")
    if root.is_dir():
        return root if any((root / name).is_file() for name in (OWN_CONFIG, OWN_WEIGHTS)) else None
    known = {key: value for key, value in hub.items() if key in inspect.signature(hf_hub_download).parameters}
    try:
        first, *_ = [hf_hub_download(str(model_id), name, subfolder=subfolder, **known) for name in names]
    except (EntryNotFoundError, HFValidationError):
        return None
    return Path(first).parent


def read_manifest(root: Path) -> dict[str, Any]:
    """The content of `moslora.json`, of a version and with the parts that this release reads.

    Raises:
        AdapterError: another format or version, a part that is missing, damaged JSON.
    """
    manifest = read_json(root / OWN_CONFIG)
    if manifest.get("format") != FORMAT:
        found = manifest.get("format")
        raise AdapterError(f"{root / OWN_CONFIG} is not an adapter manifest: its format is {found!r}, not {FORMAT!r}.")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise AdapterError(
            f"{root / OWN_CONFIG} has format version {manifest.get('format_version')!r}, this release reads "
            f"{FORMAT_VERSION}. Update mm-moslora."
        )
    for part in ("config", "files", "base"):
        if not isinstance(manifest.get(part), dict):
            raise AdapterError(f"{root / OWN_CONFIG} lacks {part!r}, or it is no object. Copy the folder again.")
    return manifest


def complete_folder(folder: Path, config: AdapterOptions, *, auto_mapping: Mapping[str, Any] | None) -> None:
    """Turn what `PeftModel.save_pretrained` just wrote into the double folder.

    Args:
        folder: holds `adapter_model.safetensors` with mixers inside; without it, only the configuration is written.
        config: the adapter's configuration. In a folder that is a double folder already it is all that is written.
        auto_mapping: PEFT's class hint.

    Raises:
        AdapterError: the weights were pickled, hold an empty or broken factor, or lack mixers.
    """
    weights = folder / STOCK_WEIGHTS
    if (folder / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{folder / 'adapter_model.bin'} is a pickle: stock PEFT would load it and drop the mixers. "
            "Save with safe_serialization=True, and remove that file."
        )
    if not weights.is_file():
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_json(folder / STOCK_CONFIG, stock_config(config, None, auto_mapping))
            _write_json(folder / OWN_CONFIG, _manifest(config_to_dict(config), files={}, base={}))
        return
    if _is_fold(folder):  # of what lies beside it: those are the factors, and this is the configuration alone
        base = json.loads((folder / OWN_CONFIG).read_text(encoding="utf-8"))["base"]
        write_folder(folder, config, load_file(folder / OWN_WEIGHTS), base=base, auto_mapping=auto_mapping)
        return
    # The base weight of an adapted embedding, which PEFT adds unless save_embedding_layers is False, keeps its dtype.
    tensors = {bare_name(name): t if ".base_layer." in name else t.float() for name, t in load_file(weights).items()}
    check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith(FACTORS)})
    mixed = (path for path in target_paths(tensors) if not config.is_plain(path))
    bare = next((path for path in mixed if f"{PREFIX}{path}{MIXER}" not in tensors), None)
    if bare is not None:
        raise AdapterError(
            f"{weights} has no mixer for {bare}, and the configuration gives it one: they are not of one adapter. Save "
            "the model (save_adapter, save_pretrained), or write the configuration into a folder of its own."
        )
    write_folder(folder, config, tensors, base={}, auto_mapping=auto_mapping)


def _is_fold(folder: Path) -> bool:
    """Whether the folded weights that stock PEFT reads are the fold of A, M and B beside them."""
    try:
        manifest = json.loads((folder / OWN_CONFIG).read_text(encoding="utf-8"))
        return all(sha256_of(folder / name) == manifest["files"][name] for name in (STOCK_WEIGHTS, OWN_WEIGHTS))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def stock_config(
    config: AdapterOptions, paths: Sequence[str] | None, auto_mapping: Mapping[str, Any] | None
) -> dict[str, Any]:
    """The content of stock PEFT's `adapter_config.json`.

    Args:
        config: the adapter's configuration.
        paths: the adapted modules; None keeps the targets as they are.
        auto_mapping: PEFT's class hint.
    """
    changes: dict[str, Any] = {"inference_mode": True, "auto_mapping": auto_mapping}
    if not config.changes_base:  # else PEFT must take the same start out of its base
        changes["init_lora_weights"] = True
    if paths is not None:
        changes |= {"target_modules": list(paths), "exclude_modules": None}
        changes |= {"layers_to_transform": None, "layers_pattern": None}
    data = config.to_lora_config(**changes).to_dict()
    alpha = data["lora_alpha"]
    data["lora_alpha"] = int(alpha) if float(alpha).is_integer() else alpha
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(data.items())}


def config_to_dict(config: AdapterOptions) -> dict[str, Any]:
    """Plain JSON data of a configuration; `config_from_dict` reads it back equal."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


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


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
