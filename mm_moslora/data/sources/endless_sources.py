"""Sources without an end: read in order, never as a whole, and begun again after the last record.

Each is an `IterableDataset`, whose place is plain data from which it goes on exactly. The shuffle buffer of `datasets`
is not used, because it loses the records that it holds when a run goes on.
"""

from __future__ import annotations

import glob
import logging
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.record_faults import RecordError, Where
from mm_moslora.data.sources.hf_tables import TableRows, stream_of_files, table_stream
from mm_moslora.data.sources.open_sources import TABLE_SUFFIXES, files_of_stream, open_source, rules_of, stream_files
from mm_moslora.data.sources.record_file import EmptySourceError, FileStamp, RecordSource
from mm_moslora.utils.errors import DataError

if TYPE_CHECKING:
    from mm_moslora.batch import ImageProcessing

logger = logging.getLogger(__name__)

_OF_ROWS = (*TABLE_SUFFIXES, ".csv", ".json", ".jsonl")
"""Suffixes of files that hold the rows of a table."""
_NAMED = 5
"""Changed files that a message names."""


class EndlessSource:
    """Records of one source, for ever, in an order that a seed gives every pass.

    A source that has an end, such as one to replay beside a stream, is shuffled as a whole in every pass.
    """

    def __init__(
        self, config: SourceConfig, key: str, *, seed: int, shuffled: bool, processing: ImageProcessing | None = None
    ) -> None:
        self.config, self.key = config, key
        self._seed = f"{seed} {key}" if shuffled else None
        self._rules = rules_of(config, processing)
        self._opens = {
            part.path: partial(open_source, part, processing=processing)
            for part in (files_of_stream(config) if config.endless else [config])
        }
        """What opens the files; none for a table without an end."""
        self._opened: dict[str, RecordSource] = {}  # the file at hand
        self.empty: set[str] = set()
        """Files without a record that were passed over."""
        self.stamps = {name: FileStamp.of(Path(name)) for name in _local_files(config)}
        """Of local files, at the start."""
        if self._opens:
            self._stream = stream_of_files(self._numbered, list(self._opens))
        else:
            self._stream = table_stream(config)
            self._values = TableRows(config, self._stream.features)
        self.seek({"passes": 0, "row": 0, "state": None})

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (self.key,)  # what `datasets` hashes of the generator of numbers

    def contents(self) -> dict[str, Any]:
        """What chooses the rows, and sizes of local files, as JSON, equal on all ranks; `revision` pins the hub's."""
        config, path = self.config, self.config.path
        rows = [config.subset, config.split, config.revision, sorted(map(list, config.columns.items()))]
        folder = path if os.path.isdir(path) else os.path.dirname(re.split(r"[*?[{]", path)[0])
        sizes = {os.path.relpath(name, folder or "."): f"{stamp.size} bytes" for name, stamp in self.stamps.items()}
        return {"rows": rows, **(sizes or {path: "not local"})}

    def place(self) -> dict[str, Any]:
        """The place behind the last record, as JSON."""
        return dict(self._sought or {"passes": self.passes, "row": self.row, "state": self._stream.state_dict()})

    def seek(self, place: Mapping[str, Any]) -> None:
        """Go on from a place of the same source."""
        self.passes, self.row = int(place["passes"]), int(place["row"])
        """Passes over the source that are over, and records taken in this one."""
        self._sought: Mapping[str, Any] | None = place  # the stream knows its state only behind a row
        self._stream.set_epoch(0 if self._seed is None else 1 + self._random().getrandbits(31))  # 0: files in order
        self._stream.load_state_dict(place["state"])
        self._rows = iter(self._stream)

    def take(self) -> Record:
        """Read the next record."""
        with self._breaking():
            row = next(self._rows, None)
            if row is None and self.row:
                self.seek({"passes": self.passes + 1, "row": 0, "state": None})
                row = next(self._rows, None)
            if row is None:
                raise EmptySourceError(f"{self.key} ({self.config.path})")
            self.row, self._sought = self.row + 1, None
            if self._opens:
                return self._at(row["file"])[row["row"]]
            where = Where(file=Path(self.config.path), line=None, row=self.row - 1)
            return parse_record(self._values(row, where.row), where, self._rules)

    def require_unchanged(self) -> None:
        """Refuse local files that are not those of the start."""
        with self._breaking():
            for name, stamp in self.stamps.items():
                stamp.require(Path(name), Path(name))

    def _numbered(self, files: list[str]) -> Iterator[dict[str, Any]]:
        """Files and row numbers of this pass."""
        for name in files:
            try:
                numbers: Sequence[int] = range(len(self._at(name)))
            except EmptySourceError:
                if name not in self.empty:
                    self.empty.add(name)
                    logger.warning("%s: %s is empty and left out; so far: %s", self.key, name, len(self.empty))
                continue
            if self._seed is not None and not self.config.endless:
                numbers = self._random().sample(numbers, len(numbers))
            yield from ({"file": name, "row": number} for number in numbers)

    def _at(self, name: str) -> RecordSource:
        if name not in self._opened:
            self._opened = {name: self._opens[name]()}
        return self._opened[name]

    def _random(self) -> random.Random:
        """Of the pass."""
        return random.Random(f"{self._seed} {self.passes}")

    @contextmanager
    def _breaking(self) -> Iterator[None]:
        """Make every error but that of a record one that names the source, and the place."""
        try:
            yield
        except (RecordError, EmptySourceError):
            raise
        except Exception as error:  # libraries raise many types
            raise DataError(
                f"{self.key} ({self.config.path}) broke off in pass {self.passes + 1} behind record {self.row}: "
                f"{type(error).__name__}: {str(error)[:400].rstrip('.')}. Checkpoints are untouched. Bring the source "
                "back; the same command goes on from the last one."
            ) from error


def _local_files(config: SourceConfig) -> list[str]:
    """The files of a source on this machine, in order."""
    folder = Path(config.path)
    if files := stream_files(config):
        return list(map(str, files))
    if folder.is_dir():
        return sorted(str(path) for path in folder.rglob("*") if path.suffix in _OF_ROWS)
    return [str(folder)] if folder.is_file() else sorted(glob.glob(config.path))


def what_changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs between two `EndlessSource.contents`; empty where nothing does."""
    odd = [name for name in sorted({**before, **now}) if before.get(name) != now.get(name)]
    faults = [f"{name} ({before.get(name, 'absent')} before, {now.get(name, 'absent')} now)" for name in odd[:_NAMED]]
    return ", ".join(faults) + (f" and {len(odd) - _NAMED} more" if len(odd) > _NAMED else "")
