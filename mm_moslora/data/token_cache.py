"""Tokenised records on disk: each text is tokenised once for all runs, in parallel, and then read by number.

A cache is named by a hash of its inputs: the source's content, tokenizer, template, length limit. The first process
builds it while the others wait; it appears complete or not at all. An image is stored as one id, however many tokens it
expands to. Weights are stored for records with other ones than 0 and 1. Checksums find damage: a record is then
tokenised again, and a cache with a damaged table is built again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.segment_encoder import Encoded
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.data.worker_processes import in_processes, usable_processes
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import building, read_json, set_aside, sha256_of, sync
from mm_moslora.utils.folder_marks import is_built
from mm_moslora.utils.untrusted_data import read_value

logger = logging.getLogger(__name__)

VERSION = 5
"""Version of the format and of what is read and written, part of a cache's name. Caches of version 1 hold faults of
records with weights, those of version 2 other line breaks around pictures, those of version 3 faults of records with
tools or boxes, those of version 4 placeholders of boxes as text; none is read."""
_ROWS = 512
"""Records that a process tokenises at a time."""
_LAST, _SUMS = "faults.json", "sums.json"
_SUMMED = ("table.npy", _LAST)
"""Files that are read as a whole; `_SUMS` holds their sha256."""
_STREAMS: dict[str, tuple[type[np.generic], int]] = {
    "ids": (np.int32, 0), "supervised": (np.bool_, 0), "weights": (np.float32, 6)
}  # fmt: skip
"""What `NAME.bin` holds of all records, one after the other -> its type, and the column of the table with its count."""
_COLUMNS = 7

Encode = Callable[[Record], Encoded]


class _Fault(NamedTuple):
    """A RecordError without its record, which the source adds."""

    row: int
    id: str | None
    code: str
    field: str
    what: str
    remedy: str
    path: str | None


_FAULTS = list[tuple[int, str | None, str, str, str, str, str | None]]


@dataclass(kw_only=True)
class _TokenisedRecords:
    """Some tokenised records."""

    ids: NDArray[np.int32]
    supervised: NDArray[np.bool_]
    weights: NDArray[np.float32]
    table: NDArray[np.int32]
    """One row per record: stored ids, expanded length, images, images named, turns dropped, checksum of the stored ids,
    flags and weights, stored weights (none, or one for every id)."""
    faults: list[_Fault]


class TokenCache:
    """The tokenised records of one source.

    Args:
        tokens_per_image: tokens that an image expands to; 1 where the cache holds every picture's tokens.

    Raises:
        OSError, ValueError: it is damaged.
    """

    def __init__(
        self, folder: Path, source: RecordSource, *, encode: Encode, image_token_id: int | None, tokens_per_image: int
    ) -> None:
        self.folder, self.source, self.encode = folder, source, encode
        self.image_token_id, self.tokens_per_image = image_token_id, tokens_per_image
        table, faults = _load(folder, len(source))
        self._streams = [
            (
                np.memmap(folder / f"{name}.bin", dtype=dtype, mode="r"),
                np.cumsum([0, *table[:, column]], dtype=np.int64),
            )
            for name, (dtype, column) in _STREAMS.items()
        ]
        """Every stream with the start of each record, and its end."""
        self.lengths: NDArray[np.int32] = table[:, 1]
        """Tokens of every record, visual tokens included; 0 for a bad one."""
        self.has_image: NDArray[np.bool_] = table[:, 3] > 0
        self.dropped: NDArray[np.int32] = table[:, 4]
        """Turns that did not fit."""
        self._images = table[:, 2]
        self._checksums = table[:, 5]
        self.faults = {fault.row: fault for fault in faults}

    def fault(self, row: int) -> RecordError:
        """The error of a row in `faults`."""
        stored = self.faults[row]
        where = self.source.where(row)
        where = where.named(stored.id) if stored.id is not None else where
        return where.error(Code(stored.code), stored.field, stored.what, stored.remedy, path=stored.path)

    def encoded(self, row: int) -> Encoded:
        """A tokenised record.

        Raises:
            RecordError: it cannot be used.
        """
        if row in self.faults:
            raise self.fault(row)
        stored, supervised, weights = (np.array(data[starts[row] : starts[row + 1]]) for data, starts in self._streams)
        if _checksum(stored, supervised, weights) != self._checksums[row]:
            logger.warning("Record %d in the cache %s is damaged; it is tokenised again.", row, self.folder)
            return self.encode(self.source[row])
        ids = stored.astype(np.int64)
        if self._images[row] and self.tokens_per_image > 1:
            times = np.where(ids == self.image_token_id, self.tokens_per_image, 1)
            ids, supervised = np.repeat(ids, times), np.repeat(supervised, times)
            weights = np.repeat(weights, times) if len(weights) else weights
        return Encoded(
            input_ids=torch.from_numpy(ids), supervised=torch.from_numpy(supervised), images=int(self._images[row]),
            weights=torch.from_numpy(weights) if len(weights) else None, dropped_turns=int(self.dropped[row]),
        )  # fmt: skip


class SourceCache:
    """The cache of a source, built or not.

    Args:
        tokens_per_image: tokens of every picture, or 1 where they differ.
        on_progress: called with (records done, all records) while it is built.
    """

    def __init__(
        self,
        root: Path,
        source: RecordSource,
        encoder: ConversationEncoder,
        *,
        encode: Encode,
        settings: str,
        tokens_per_image: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        name = f"{source.fingerprint()} {encoder.fingerprint()} {settings} {len(source)} {VERSION}"
        self.folder = root / hashlib.sha256(name.encode()).hexdigest()[:32]
        self.source, self._encode, self._on_progress = source, encode, on_progress
        self._image_token_id, self._tokens_per_image = encoder.image_token_id, tokens_per_image

    def load(self) -> TokenCache:
        """The cache; build it first if it does not exist or is damaged."""
        if is_built(self.folder):
            with suppress(OSError, ValueError):
                return self._read()
        with self._locked(self.folder):
            if is_built(self.folder):
                try:
                    return self._read()
                except (OSError, ValueError) as error:
                    aside = set_aside(self.folder, "corrupt")
                    logger.warning("%s is damaged (%s), now %s; it is built again.", self.folder, error, aside.name)
            _write(self.folder, self._tokenised())
        return self._read()

    def _read(self) -> TokenCache:
        return TokenCache(
            self.folder, self.source, encode=self._encode, image_token_id=self._image_token_id,
            tokens_per_image=self._tokens_per_image,
        )  # fmt: skip

    @staticmethod
    def _locked(folder: Path) -> AbstractContextManager[int]:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return lock_file(folder.with_name(f"{folder.name}.lock"), wait=True)

    def _tokenised(self) -> Iterator[_TokenisedRecords]:
        numbers = range(len(self.source))
        parts = [numbers[start : start + _ROWS] for start in range(0, len(numbers), _ROWS)]
        fold = functools.partial(
            _first_of_images, image_token_id=self._image_token_id, tokens_per_image=self._tokens_per_image
        )
        work = functools.partial(_tokenise, self.source, encode=self._encode, fold=fold)
        done = 0
        for rows in in_processes(work, parts, processes=usable_processes() if len(parts) > 4 else 1):
            yield rows
            done += len(rows.table)
            if self._on_progress is not None:
                self._on_progress(done, len(numbers))


def _write(folder: Path, parts: Iterable[_TokenisedRecords]) -> None:
    """Write a cache; the caller holds the lock."""
    tables: list[NDArray[np.int32]] = [np.zeros((0, _COLUMNS), np.int32)]
    faults: list[_Fault] = []
    with building(folder) as part:
        with ExitStack() as stack:
            streams = {name: stack.enter_context((part / f"{name}.bin").open("wb")) for name in _STREAMS}
            for rows in parts:
                for name, stream in streams.items():
                    stream.write(getattr(rows, name).tobytes())
                tables.append(rows.table)
                faults += rows.faults
            for name, stream in streams.items():
                if not stream.tell():  # an empty file cannot be mapped
                    stream.write(bytes(np.dtype(_STREAMS[name][0]).itemsize))
        np.save(part / "table.npy", np.concatenate(tables))
        (part / _LAST).write_text(json.dumps(faults), encoding="utf-8")
        (part / _SUMS).write_text(json.dumps(_sums(part)), encoding="utf-8")
        for path in part.iterdir():
            sync(path)


def _load(folder: Path, records: int) -> tuple[NDArray[np.int32], list[_Fault]]:
    """Table and faults of a cache; OSError or ValueError where it is damaged."""
    if read_json(folder / _SUMS) != _sums(folder):
        raise ValueError("the checksum of its table differs")
    try:
        table = np.lib.format.open_memmap(folder / "table.npy", mode="r")
        faults = [
            _Fault(*item) for item in read_value(_FAULTS, read_json(folder / _LAST, list), source=_LAST, where="")
        ]
    except Exception as error:  # what numpy raises for a damaged header depends on the damage
        raise ValueError(str(error)) from error
    if table.dtype != np.int32 or table.shape != (records, _COLUMNS) or (table < 0).any():
        raise ValueError(f"table.npy has {table.dtype} {table.shape}, expected rows of {records} records")
    if ((table[:, 6] != 0) & (table[:, 6] != table[:, 0])).any():
        raise ValueError("table.npy has a record with another number of weights than of ids")
    for name, (dtype, column) in _STREAMS.items():
        size = np.dtype(dtype).itemsize * max(1, int(table[:, column].sum(dtype=np.int64)))
        if (stored := (folder / f"{name}.bin").stat().st_size) != size:
            raise ValueError(f"{name}.bin has {stored} bytes, expected {size}")
    codes = {code.value for code in Code}
    if any(item.code not in codes or item.row not in range(records) or table[item.row, 1] for item in faults):
        raise ValueError(f"{_LAST} has an unknown fault, or one of a record without faults")
    return np.array(table), faults


def _sums(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in _SUMMED}


def _checksum(*stored: NDArray[Any]) -> int:
    """A checksum that an `int32` holds."""
    return functools.reduce(lambda value, data: zlib.crc32(data.tobytes(), value), stored, 0) & 0x7FFFFFFF


def _tokenise(
    source: RecordSource, rows: Sequence[int], encode: Encode, fold: Callable[[NDArray[np.int32]], NDArray[np.bool_]]
) -> _TokenisedRecords:
    ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)]
    supervised: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    weights: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
    table = np.zeros((len(rows), _COLUMNS), dtype=np.int32)
    faults: list[_Fault] = []
    for index, row in enumerate(rows):
        try:
            record = source[row]
            encoded = encode(record)
        except RecordError as error:
            faults.append(
                _Fault(row, error.where.id, error.code.value, error.field, error.what, error.remedy, error.path)
            )
            continue
        tokens = encoded.input_ids.numpy().astype(np.int32)
        keep = fold(tokens)
        ids.append(tokens[keep])
        supervised.append(encoded.supervised.numpy()[keep])
        weights.append(weights[0] if encoded.weights is None else encoded.weights.numpy()[keep])
        table[index] = (
            len(ids[-1]), len(tokens), encoded.images, len(record.images), encoded.dropped_turns,
            _checksum(ids[-1], supervised[-1], weights[-1]), len(weights[-1]),
        )  # fmt: skip
    return _TokenisedRecords(
        ids=np.concatenate(ids), supervised=np.concatenate(supervised), weights=np.concatenate(weights), table=table,
        faults=faults,
    )  # fmt: skip


def _first_of_images(
    tokens: NDArray[np.int32], *, image_token_id: int | None, tokens_per_image: int
) -> NDArray[np.bool_]:
    """All ids except the second and further ids of each image."""
    keep = np.ones(len(tokens), dtype=np.bool_)
    if image_token_id is not None and tokens_per_image > 1:
        positions = np.flatnonzero(tokens == image_token_id)
        keep[positions[np.arange(len(positions)) % tokens_per_image > 0]] = False
    return keep
