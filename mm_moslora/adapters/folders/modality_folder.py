"""One of the two mixers of an adapter by modality, as an adapter folder of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from mm_moslora.adapters.folder_format import MIXER_PART, OWN_CONFIG, START_PART, STOCK_CONFIG
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.folders.save_folder import write_folder
from mm_moslora.utils.errors import AdapterError, suggestion
from mm_moslora.utils.folder_marks import output_file

Modality = Literal["text", "visual"]


def take_modality(folder: str | Path, out: str | Path, modality: Modality) -> Path:
    """Write the update of one modality's tokens as an adapter with dense mixers, which folds, merges and exports.

    Args:
        folder: adapter folder of `mixer_form` by_modality.
        out: folder to write into, made if missing.
        modality: whose mixers stay. With text, answers to prompts without pictures stay what they were.

    Returns:
        `out`.

    Raises:
        AdapterError: another modality or another form; see `read_folder`.
        ConfigError: a file is there already.
        OSError: `out` cannot be written.
    """
    if modality not in get_args(Modality):
        raise AdapterError(
            f"The modality is {modality!r}, expected text or visual.{suggestion(modality, get_args(Modality))}"
        )
    content, target = read_folder(folder), Path(out)
    if content.config.mixer_form != "by_modality":
        raise AdapterError(
            f"{folder} has mixer_form {content.config.mixer_form!r}, which is one for all tokens, expected "
            "'by_modality'. Use it as it is."
        )
    for name in (STOCK_CONFIG, OWN_CONFIG):
        output_file(target / name)
    write_folder(
        target, replace(content.config, mixer_form="dense"), _kept(content.tensors, MIXER_PART, modality),
        base=content.base, start=_kept(content.start, START_PART, modality),
    )  # fmt: skip
    return target


def _kept(tensors: Mapping[str, Tensor], part: str, modality: Modality) -> dict[str, Tensor]:
    """Tensors without those of the other modality's mixers, and with these under the name of a dense one."""
    kept = {}
    for name, tensor in tensors.items():
        start, found, end = name.rpartition(part)
        if not found or end not in get_args(Modality):
            kept[name] = tensor
        elif end == modality:
            kept[f"{start}{found}weight"] = tensor
    return kept
