"""A fingerprint of a model's files: names, sizes, samples of weights, and all of its texts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path

from mm_moslora.utils.files import read_json
from mm_moslora.utils.untrusted_data import parse_json

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_FORMAT = "2-"
"""Begins every fingerprint; another choice of samples gets another number."""
_SAMPLES, _SAMPLE_BYTES, _TENSOR_BYTES = 256, 4096, 1024
_MOST_HEADER = 2**27
PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
LANGUAGE_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Read where there is no `tokenizer.json`."""
ALL_FILES = (*LANGUAGE_FILES, *PICTURE_FILES, "video_preprocessor_config.json", "chat_template.json")


def difference(own: str, expected: str) -> tuple[str, str, str]:
    """What two fingerprints differ in, and each, for people."""
    (own, own_texts), (old, old_texts) = (mark.split(".") if "." in mark else (mark, "") for mark in (own, expected))
    if own == old:
        return "files of its tokenizer, chat template, pictures or shards", own_texts[:8], old_texts[:8]
    return "weights", own[:10], old[:10]


def fingerprint(path: Path, *, library: str = "", texts: Collection[str] = ALL_FILES) -> str:
    """A hash of what a model's files are called, how large they are, and of samples all over them.

    A folder's has a second one, behind a point: of all that its tokenizer, chat template, settings for pictures and
    index of shards contain.

    Args:
        path: a folder with a configuration and weights, or one file, regardless of its name.
        library: whose weights are read, where a folder has those of several.
        texts: patterns for the files of the second hash; none: it is left out.
    """
    digest = hashlib.sha256()
    inside = sorted(path.iterdir()) if path.is_dir() else []
    configuration = (file for file in inside if file.name == "config.json")
    for file in sorted({*weight_files(path, library), *configuration}) if inside else [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(os.fsencode(f"{'' if file == path else file.name} {size}\n"))
        with file.open("rb") as stream:
            for start, count in _samples(stream, size):
                stream.seek(start)
                digest.update(stream.read(count))
    return f"{_FORMAT}{digest.hexdigest()}" + (f".{_of_texts(path, texts)}" if inside and texts else "")


def _of_texts(folder: Path, texts: Collection[str]) -> str:
    digest, first = hashlib.sha256(), _first_read(folder)
    slow = _VOCABULARIES if "tokenizer*.json" in texts and not (folder / "tokenizer.json").is_file() else ()
    chosen = {file for pattern in (*texts, *slow) for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(chosen | ({first} if first is not None and first.suffix == ".json" else set())):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(os.fsencode(f"{file.relative_to(folder).as_posix()} {content}\n"))
    return digest.hexdigest()


def _first_read(folder: Path, library: str = "") -> Path | None:
    """The file that loaders look for first: all weights, or the index of the files that have them."""
    names = (f"{library}_model.safetensors", "model.safetensors", "pytorch_model.bin")
    files = (folder / f"{name}{ending}" for name in names for ending in ("", ".index.json"))
    return next((file for file in files if file.is_file()), None)


def weight_files(folder: Path, library: str = "") -> list[Path]:
    """The files of weights that are read from a folder; none where some are missing."""
    first = _first_read(folder, library)
    if first is None:
        return sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted({str(item) for item in read_json(first, linked=True)["weight_map"].values()})
        shards = [folder / name for name in names]  # as loaders do, wherever that leads
        return shards if all(shard.is_file() for shard in shards) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _samples(stream: BufferedReader, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of the samples of a file: the header of safetensors and four places in every tensor."""
    header = int.from_bytes(stream.read(8), "little")
    try:
        if not 0 < header <= min(size, _MOST_HEADER):
            raise ValueError("no safetensors")
        tensors = parse_json(stream.read(header))
        spans = sorted(item["data_offsets"] for name, item in tensors.items() if name != "__metadata__")
        ends = [[min(max(0, 8 + header + int(end)), size) for end in span] for span in spans]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        for index in range(_SAMPLES):
            yield max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1), _SAMPLE_BYTES
        return
    yield 0, 8 + header
    for start, end in ends:
        if end - start <= 4 * _TENSOR_BYTES:
            yield start, max(0, end - start)
        else:
            yield from ((start + (end - start - _TENSOR_BYTES) * part // 3, _TENSOR_BYTES) for part in range(4))
