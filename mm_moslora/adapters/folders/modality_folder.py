"""One of the two mixers of an adapter by modality, as an adapter folder of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

from mm_moslora.adapters.folder_format import MIXER_PART
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
    end, tensors = f"{MIXER_PART}{modality}", {}
    for name, tensor in content.tensors.items():
        if name.endswith(end):
            tensors[f"{name.removesuffix(modality)}weight"] = tensor
        elif MIXER_PART not in name:
            tensors[name] = tensor
    output_file(target / "adapter_config.json")
    write_folder(target, replace(content.config, mixer_form="dense"), tensors, base=content.base)
    return target
