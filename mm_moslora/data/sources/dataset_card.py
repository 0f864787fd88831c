"""The data files that the README of a Hugging Face dataset names, checked before `datasets` resolves any of them.

`datasets` hands each name to fsspec, which opens URLs, chains of protocols and templates on the way to a list of files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.untrusted_data import parse_yaml_value
from mm_moslora.utils.untrusted_files import FileError, find_below, read_text, read_text_below

_CARDS = ("README.md", ".huggingface.yaml")
"""Files that list data files, in their key `configs`."""


def check_named_files(path: str, options: Mapping[str, Any]) -> None:
    """Refuse a dataset that names a data file other than by a plain path below its folder or repository.

    Args:
        options: arguments of `datasets.load_dataset`: `revision`, and `data_files`, which are checked as well.
    """
    named = list(_texts(options.get("data_files")))
    for card in _CARDS:
        configs = _configs(path, card, options.get("revision"))
        parts = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
        named += [name for part in parts for key in ("data_files", "data_dir") for name in _texts(part.get(key))]
    for name in named:
        try:
            find_below(Path(os.path.realpath(path)), name)
        except FileError as error:
            raise DataError(
                f"{path} names the data file {ascii(name)[:200]}, which is not one of its own files ({error.what}). "
                "Correct `data_files` in its README.md, or do not use it."
            ) from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _configs(path: str, card: str, revision: str | None) -> Any:
    """The key `configs` of a README's front matter, or of a YAML file."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        text = read_text_below(Path(path), card) if Path(path).is_dir() else _of_hub(path, card, revision)
        text = (text or "").removeprefix("\ufeff")
        if card.endswith(".md"):
            block = REGEX_YAML_BLOCK.search(text)
            text = block[2] if block else ""
        found = parse_yaml_value(text)
    except (ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {card} {error}. Correct it, or do not use the data set.") from error
    return found.get("configs") if isinstance(found, dict) else None


def _of_hub(name: str, card: str, revision: str | None) -> str | None:
    """The text of a file of a repository; None where it has none, or where the hub is not asked and none is cached."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_text(Path(hf_hub_download(name, card, repo_type="dataset", revision=revision)))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise
        return None
