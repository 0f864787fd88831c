"""The tensors of an adapter folder: which must be there, and their fold to a plain LoRA."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES
from torch import Tensor

from mm_moslora.adapters.folder_format import (
    FACTORS_B,
    MIXER,
    MIXER_PART,
    PREFIX,
    adapted_path,
    is_factor,
    mixers_in,
)
from mm_moslora.adapters.layers.adapter_layers import AdapterOptions
from mm_moslora.adapters.mixer import form_named, form_of
from mm_moslora.kernels.lora.mixed_product import fold_right
from mm_moslora.utils.errors import AdapterError


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], *, source: str = "The adapter"
) -> None:
    """Refuse factors that do not fit the model.

    Args:
        tensors: name to tensor.
        shapes: every name that must be there, and its shape.
        source: their folder or model, for the message.

    Raises:
        AdapterError: a factor is missing, unknown or empty, has another shape or dtype, or holds NaN or infinity.
    """
    factors = set(filter(is_factor, tensors))
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


def without_place(names: Collection[str], config: LoraConfig) -> str | None:
    """The first name besides the factors that cannot belong to an adapter of this configuration; None: there is none.

    Args:
        names: of the folder's tensors, or as PEFT renames them for modules that train whole.
        config: the adapter's.
    """
    parts = {part for name in names for part in name.split(".")}
    ends = [".lora_magnitude_vector", ".lora_magnitude_vector.weight"] if config.use_dora else []
    ends += [".lora_B.bias"] if config.lora_bias else []
    ends += [".bias"] if config.bias != "none" else []
    inside = [f"{module}." for module in config.modules_to_save or ()]
    inside += ["trainable_tokens_delta"] if config.trainable_token_indices else []
    # PEFT saves both embeddings of a model with a resized vocabulary; a head alone is never one of them.
    embeddings = set(EMBEDDING_LAYER_NAMES) & parts if "embed_tokens" in parts else set()

    def has_place(name: str) -> bool:
        return is_factor(name) or name.endswith(tuple(ends)) or any(part in name for part in inside)

    return min((n for n in names if not has_place(n) and embeddings.isdisjoint(n.split("."))), default=None)


def shapes_by_rank(config: AdapterOptions, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the factors that a folder must have, by rank; widths are taken from the tensors.

    Args:
        config: the adapter's configuration.
        tensors: the folder's.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    mixers, form = mixers_in(tensors), form_named(config.mixer_form)
    for name, A in tensors.items():
        path = adapted_path(name)
        if path is None:
            continue
        outer = path.partition(".base_layer.")[0]
        rank = config.rank_for(outer)
        shapes[name] = (rank, *A.shape[1:])
        start = f"{PREFIX}{path}"
        other = start + name.removeprefix(start).replace("_A", "_B")
        B = tensors.get(other)
        shapes[other] = (0, rank) if B is None else (*B.shape[:1], rank, *B.shape[2:])
        if start in mixers or not config.is_plain(outer):
            shapes |= {f"{start}{MIXER_PART}{part}": shape for part, shape in form.shapes(rank).items()}
    return shapes


def fold_state_dict(
    tensors: Mapping[str, Tensor], *, mixer_form: str | None = None, names_of_B: tuple[str, ...] = FACTORS_B
) -> dict[str, Tensor]:
    """Factors with mixers as a plain LoRA of the same rank with the same update.

    Args:
        tensors: PEFT's names without the adapter's name; A, B and, where there is one, M. Other entries are kept.
        mixer_form: of the mixers; None takes what their reader told (`mixer.tell_form`), else reads M itself,
            ``[R, R]`` or the ``[R]`` of a diagonal.
        names_of_B: the ends of B's names.

    Returns:
        The same without mixers, ``B' = B M`` in B's dtype, contiguous: the product that the fused kernel uses, so
        that a plain LoRA rounds as the live adapter does.

    Raises:
        AdapterError: the form has no matrix, or must be named; a mixer without its B, of another rank, or with NaN.
    """
    matrices = mixer_matrices(tensors, mixer_form=mixer_form)
    folded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if MIXER_PART in name:
            continue
        suffix = next((suffix for suffix in names_of_B if name.endswith(suffix)), None)
        mixer = None if suffix is None else matrices.pop(name.removesuffix(suffix), None)
        if mixer is not None:
            rank = tensor.shape[1]
            if mixer.shape != (rank, rank) or not torch.isfinite(mixer).all():
                found = f"{list(mixer.shape)}" if mixer.shape != (rank, rank) else "NaN or infinity"
                raise AdapterError(f"The mixer of {name} is {found}, expected {[rank, rank]} of finite numbers.")
            tensor = fold_right(tensor, mixer).to(tensor.dtype)
        folded[name] = tensor.contiguous()
    if matrices:
        raise AdapterError(
            f"{min(matrices)}{MIXER} has no B beside it, so it cannot be folded, and a reader of plain LoRA would drop "
            "it. Save the adapter again (mm_moslora.adapters.save_adapter)."
        )
    return folded


def mixer_matrices(tensors: Mapping[str, Tensor], *, mixer_form: str | None = None) -> dict[str, Tensor]:
    """M ``[R, R]`` of every mixer, by what stands before ``.lora_mixer.`` in its name; see `fold_state_dict`."""
    return {
        start: (form_of(found) if mixer_form is None else form_named(mixer_form)).matrix(found)
        for start, found in mixers_in(tensors).items()
    }
