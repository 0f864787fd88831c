"""The tensors of an adapter folder: which must be there, their fold to a plain LoRA, and the initial mixers.

Initial mixers, ``base_model.model.PATH.lora_start.weight``, change no output: a folder without them loads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from mm_moslora.adapters.adapter_options import AdapterOptions
from mm_moslora.adapters.folder_format import (
    FACTORS_B,
    MIXER,
    PREFIX,
    START_MIXER,
    START_WEIGHTS,
    adapted_path,
    is_factor,
    mixers_in,
    read_tensors,
    target_paths,
)
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.kernels.lora.mixed_product import fold_right
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.identity import sha256_of

logger = logging.getLogger(__name__)


def check_shapes(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str = "The adapter"
) -> None:
    """Refuse factors that are missing, unknown, empty or of another shape."""
    factors = set(filter(is_factor, tensors))
    for problem, names in (("lacks", shapes.keys() - factors), ("has besides the expected", factors - shapes.keys())):
        if names:
            raise AdapterError(f"{source} {problem} {len(names)} factors, the first is {min(names)!r}.")
    if empty := next((name for name, tensor in tensors.items() if tensor.numel() == 0), None):
        raise AdapterError(
            f"{empty} is empty. Under ZeRO-3 a parameter is a shard of size 0 on most ranks: gather before saving."
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise AdapterError(
                f"{source}: {name} has shape {list(tensors[name].shape)}, expected {list(shape)}. It was made for "
                "another base model, or its files were changed."
            )


def check_values(tensors: Mapping[str, Tensor], *, source: str = "The adapter") -> None:
    """Refuse factors that are no floats, and NaN and infinity."""
    for name, tensor in tensors.items():
        if is_factor(name) and not tensor.is_floating_point():
            raise AdapterError(f"{source}: {name} holds {tensor.dtype}, expected floats. Its files were changed.")
        if not torch.isfinite(tensor).all():
            raise AdapterError(
                f"{source}: {name} holds NaN or infinity; it is broken. Go back to an earlier checkpoint."
            )


def unexpected_entry(
    tensors: Mapping[str, Tensor], config: LoraConfig, *, embeddings: Mapping[str, tuple[int, ...]] | None = None
) -> str | None:
    """The first entry, factors apart, that an adapter of this configuration cannot have; None: all belong to it."""
    # PEFT writes the base's embeddings beside the factors when they are adapted, when the vocabulary was resized, and
    # on request. Where the base is not known (no `embeddings`), up to two matrices of one number of rows may be them.
    ends = [".lora_magnitude_vector", ".lora_magnitude_vector.weight"] if config.use_dora else []
    ends += [".lora_B.bias"] if config.lora_bias else []
    ends += [".bias"] if config.bias != "none" else []
    inside = [f"{module}." for module in (*config.modules_to_save, "modules_to_save")] if config.modules_to_save else []
    inside += ["trainable_tokens_delta"] if config.trainable_token_indices else []
    inside += [f"{PREFIX}{path}.base_layer." for path in target_paths(tensors)]
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if not (is_factor(name) or name.endswith(tuple(ends)) or any(part in name for part in inside))
    }
    if embeddings is not None:
        return min((name for name in rest if embeddings.get(name) != tuple(rest[name].shape)), default=None)
    matrices = [name for name, tensor in rest.items() if name.endswith(".weight") and tensor.ndim == 2]
    if len(matrices) <= 2 and len({len(rest[name]) for name in matrices}) == 1:
        rest = {name: rest[name] for name in rest.keys() - matrices}
    return min(rest, default=None)


def shapes_by_rank(config: AdapterOptions, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors that a folder must have, by rank; widths are taken from the tensors."""
    shapes: dict[str, tuple[int, ...]] = {}
    mixers = mixers_in(tensors)
    for name, A in tensors.items():
        path = adapted_path(name)
        if path is None:
            continue
        rank = config.rank_for(path)
        shapes[name] = (rank, *A.shape[1:])
        start = f"{PREFIX}{path}"
        other = start + name.removeprefix(start).replace("_A", "_B")
        B = tensors.get(other)
        shapes[other] = (0, rank) if B is None else (*B.shape[:1], rank, *B.shape[2:])
        if start in mixers or not config.is_plain(path):
            shapes[f"{start}{MIXER}"] = (rank, rank)
    return shapes


def fold_state_dict(tensors: Mapping[str, Tensor], *, names_of_B: tuple[str, ...] = FACTORS_B) -> dict[str, Tensor]:
    """Factors with mixers as a plain LoRA of the same rank with the same update.

    Args:
        tensors: PEFT's names without the adapter's name; A, B and, where there is one, M. Other entries are kept.

    Returns:
        The same without mixers, ``B' = B M`` in B's dtype, contiguous: the product that the fused kernel uses, so
        that a plain LoRA rounds as the live adapter does.

    Raises:
        AdapterError: a mixer without its B, of another rank, or with NaN.
    """
    mixers = mixers_in(tensors)
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(MIXER):
            continue
        suffix = next((suffix for suffix in names_of_B if name.endswith(suffix)), None)
        mixer = None if suffix is None else mixers.pop(name.removesuffix(suffix), None)
        if mixer is not None:
            rank = tensor.shape[1]
            if mixer.shape != (rank, rank) or not torch.isfinite(mixer).all():
                content = f"{list(mixer.shape)}" if mixer.shape != (rank, rank) else "NaN or infinity"
                raise AdapterError(f"The mixer of {name} is {content}, expected {[rank, rank]} of finite numbers.")
            tensor = fold_right(tensor, mixer).to(tensor.dtype)
        folded[name] = tensor.contiguous()
    if mixers:
        raise AdapterError(
            f"{min(mixers)}{MIXER} has no B beside it, so it cannot be folded, and a reader of plain LoRA would drop "
            "it. Save the adapter again (mm_moslora.adapters.save_adapter)."
        )
    return folded


def initial_mixers(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The initial mixers of an adapter, as far as they are known, under their names in the folder."""
    return {
        f"{PREFIX}{path}{START_MIXER}": layer.initial_mixers[adapter_name]
        for path, layer in named_adapter_layers(model)
        if adapter_name in layer.initial_mixers
    }


def read_initial_mixers(root: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a folder keeps of them; empty where it keeps nothing, or its file is not the one it was saved with."""
    path, digest = root / START_WEIGHTS, manifest.get("start")
    if digest is None or not path.is_file():
        return {}
    try:
        if sha256_of(path) == digest:
            return {name: tensor for name, tensor in read_tensors(path).items() if name.endswith(START_MIXER)}
    except (AdapterError, OSError) as error:
        logger.info("%s", error)
    logger.warning("%s is damaged or of another adapter, so the start of training is not known.", path)
    return {}
