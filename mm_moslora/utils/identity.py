"""Identity: what is hashed, over which bytes. No other module hashes.

Values stand in manifests, caches and results, so what is hashed here never changes; another choice gets another name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import MANIFEST
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora.utils.untrusted_files import opened

logger = logging.getLogger(__name__)

Bytes = bytes | bytearray | memoryview

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
_RESUME_ONLY = "trainer/"
"""Only a resumed run reads this part of a checkpoint, and checks it itself."""


def sha256_of(file: Path | BufferedReader) -> str:
    """Of a file, or of the rest of a stream: 64 hexadecimal digits, as of all functions of this name."""
    if isinstance(file, Path):
        with opened(file, most=None) as stream:
            return sha256_of(stream)
    return hashlib.file_digest(file, "sha256").hexdigest()


def md5_of(stream: BufferedReader) -> str:
    """Of the rest of a stream, for publishers who name no other checksum."""
    return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def sha256_of_bytes(*parts: Bytes, more: Iterable[Bytes] = ()) -> str:
    """Of bytes, one part behind the other."""
    digest = hashlib.sha256()
    for group in (parts, more):
        for part in group:
            digest.update(part)
    return digest.hexdigest()


def sha256_of_text(text: str) -> str:
    """Of a text in UTF-8; unpaired surrogates are kept."""
    return sha256_of_bytes(text.encode("utf-8", "surrogatepass"))


def sha256_of_values(value: Any, *, ascii_only: bool = False) -> str:
    """Of JSON-like data, the same in every process, whatever the order of keys.

    Args:
        ascii_only: the form of `json.dumps` by default, which runs and comparisons keep; else the shortest one, which
            results of the harness keep.
    """
    if ascii_only:
        return sha256_of_text(json.dumps(value, sort_keys=True))
    return sha256_of_text(json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":")))


def number_of(text: str) -> int:
    """A number that follows from a text, 56 bits, such as for a generator's seed."""
    return int(sha256_of_text(text)[:14], 16)


def quick_hash_of(parts: Iterable[Bytes]) -> str:
    """XXH3 of bytes, one part behind the other, 32 digits: for caches, where nobody gains by a collision."""
    import xxhash  # a step without a cache needs none

    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
    return str(digest.hexdigest())


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
    inside = sorted(path.iterdir()) if path.is_dir() else []
    configuration = (file for file in inside if file.name == "config.json")
    files = sorted({*weight_files(path, library), *configuration}) if inside else [path]
    parts = (part for file in files if file.is_file() for part in _parts(file, "" if file == path else file.name))
    return f"{_FORMAT}{sha256_of_bytes(more=parts)}" + (f".{_of_texts(path, texts)}" if inside and texts else "")


def _parts(file: Path, name: str) -> Iterator[bytes]:
    """What counts of a file: name, size and samples."""
    size = file.stat().st_size
    yield os.fsencode(f"{name} {size}\n")
    with file.open("rb") as stream:
        for start, count in _samples(stream, size):
            stream.seek(start)
            yield stream.read(count)


def _of_texts(folder: Path, texts: Collection[str]) -> str:
    first = _first_read(folder)
    slow = _VOCABULARIES if "tokenizer*.json" in texts and not (folder / "tokenizer.json").is_file() else ()
    chosen = {file for pattern in (*texts, *slow) for file in folder.glob(pattern) if file.is_file()}
    files = sorted(chosen | ({first} if first is not None and first.suffix == ".json" else set()))
    lines = (f"{file.relative_to(folder).as_posix()} {sha256_of(file)}\n" for file in files)
    return sha256_of_bytes(more=map(os.fsencode, lines))


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


def check_stored(path: Path) -> None:
    """Refuse weights that the manifest of the checkpoint that holds them shows as missing, truncated or altered.

    Other files may be edited, such as a chat template or the path of a base, which is said: `check_preprocessing`
    compares what they do.
    """
    checkpoint = next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
    if checkpoint is None:
        return
    try:
        stored = {str(name): entry["sha256"] for name, entry in read_json(checkpoint / MANIFEST)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is damaged ({error}). Copy the checkpoint again, or choose another one."
        ) from error
    inside = "" if path == checkpoint else path.relative_to(checkpoint).as_posix()
    for name, expected in stored.items():
        wanted = not inside or name == inside or name.startswith(f"{inside}/")
        if not wanted or name.startswith(_RESUME_ONLY):
            continue
        file = checkpoint / name
        if not name.endswith(".safetensors"):
            if file.is_file() and sha256_of(file) != expected:
                logger.warning("%s was edited after the checkpoint was saved; it counts as it is.", file)
            continue
        if not file.is_file() or sha256_of(file) != expected:
            what = "was altered or truncated: its sha256 differs from" if file.is_file() else "is missing, named by"
            raise CheckpointError(f"{file} {what} {MANIFEST}. Copy the checkpoint again, or choose another one.")
