"""Sources without an end: read in order, never as a whole, and begun again after the last record.

A source tells its place as plain data, from which it goes on exactly. The place in a table is that of `datasets`.
"""

from __future__ import annotations

import glob
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.record_faults import RecordError, Where
from mm_moslora.data.sources.open_sources import TABLE_SUFFIXES, files_of_stream, open_source, rules_of
from mm_moslora.data.sources.record_file import EmptySourceError, FileStamp, RecordSource
from mm_moslora.utils.errors import DataError

if TYPE_CHECKING:
    from mm_moslora.batch import ImageProcessing

logger = logging.getLogger(__name__)

Reads = Callable[[], Record]
"""Reads one record."""
_OF_ROWS = (*TABLE_SUFFIXES, ".csv", ".json", ".jsonl")
"""Suffixes of files that hold the rows of a table."""
_UNCHECKED = 256
"""Rows of a table between two looks at its files, which a library opens."""
_NAMED = 5
"""Changed files that a message names."""


class EndlessSource:
    """Records of one source in an order that a seed gives every pass, for ever.

    A source that has an end, such as one to replay beside a stream, is shuffled as a whole in every pass.
    """

    def __init__(
        self, config: SourceConfig, key: str, *, seed: int, shuffled: bool, processing: ImageProcessing | None = None
    ) -> None:
        self.config, self.key = config, key
        self.empty: set[str] = set()
        """Files without a record that were passed over."""
        self._seed = f"{seed} {key}" if shuffled else None
        self._rules = rules_of(config, processing)
        parts = files_of_stream(config) if config.endless else [config]
        self._files = [(part.path, partial(open_source, part, processing=processing)) for part in parts]
        """Names, for messages, and what opens them; none for a table."""
        self.stamps = {name: FileStamp.of(Path(name)) for name in self._named() if Path(name).is_file()}
        """Of local files, at the start."""
        self._name = ""  # of the file at hand, for messages
        self.seek({"passes": 0, "row": 0, "file": 0, "state": None})

    def contents(self) -> list[Any]:
        """Names and sizes of the files, as JSON, or a hash of what is no file; equal on all ranks, and as long as the
        files are the same. Files of the hub are pinned by `revision`."""
        config, files = self.config, sizes_of_files(self.stamps, self.config.path)
        if self._files:
            return files if len(files) == len(self._files) else [opens().content() for _, opens in self._files]
        columns = sorted(config.columns.items())
        return [Path(config.path).name, config.subset, config.split, config.revision, columns, *files]

    def place(self) -> dict[str, Any]:
        """The place behind the last record, as JSON."""
        state = self._taken if self._table is None else self._table.state_dict()
        return {"passes": self.passes, "row": self.row, "file": self._file, "state": state}

    def seek(self, place: Mapping[str, Any]) -> None:
        """Go on from a place of the same source."""
        self.passes, self.row, self._file = int(place["passes"]), int(place["row"]), int(place["file"])
        """Passes over the source that are over, records taken in this one, and the file in its order."""
        self._taken: Any = place["state"]
        self._table: Any = None
        self._records = self._from_here()

    def take(self) -> Reads:
        """Go to the next record; what reads it raises RecordError where it cannot be used.

        Raises:
            DataError: the source is empty, or it is no longer there; also from what reads the record.
        """
        with self._breaking():
            reads = next(self._records, None)
        if reads is None:
            raise DataError(f"{self.key} ({self.config.path}) is empty: 0 records. Check its path, subset and split.")
        self.row += 1
        return partial(self._read, reads, self._where())

    def _from_here(self) -> Iterator[Reads]:
        """The records behind the place, for ever; none where a pass has none."""
        while True:
            order = self._shuffled(len(self._files), "files")
            while self._file < len(order):
                yield from self._of_file(*self._files[order[self._file]])
                self._file, self._taken = self._file + 1, None
            if not self._files:
                yield from self._of_table()
            if not self.row:
                return
            self.passes, self.row, self._file, self._taken = self.passes + 1, 0, 0, None

    def _of_file(self, name: str, opens: Callable[[], RecordSource]) -> Iterator[Reads]:
        """The records of a file, in the version of the start, behind those that were taken."""
        self._name = name
        try:
            opened = opens()
        except EmptySourceError:
            opened = None
        if name in self.stamps:
            self.stamps[name].require(Path(name), Path(name))
        if opened is None:
            if name not in self.empty:
                self.empty.add(name)
                logger.warning("%s: %s is empty and left out; empty files so far: %s", self.key, name, len(self.empty))
            return
        rows = range(len(opened)) if self.config.endless else self._shuffled(len(opened), "rows")
        for taken in range(self._taken or 0, len(rows)):
            self._taken = taken + 1
            yield partial(opened.__getitem__, rows[taken])

    def _of_table(self) -> Iterator[Reads]:
        """The rows of a Hugging Face dataset behind those that were taken, from its own stream."""
        from mm_moslora.data.sources.hf_tables import row_of_stream, table_stream

        table = table_stream(self.config)
        if self._taken is not None:
            table.load_state_dict(self._taken)
        self._table, rows = table, iter(table)
        while True:
            if self.row % _UNCHECKED == 0:
                for name, stamp in self.stamps.items():
                    stamp.require(Path(name), Path(name))
            if (row := next(rows, None)) is None:
                return
            yield partial(self._parsed, partial(row_of_stream, row, table.features, self.config), self.row)

    def _parsed(self, value: Callable[[], dict[str, Any]], row: int) -> Record:
        return parse_record(value(), Where(file=Path(self.config.path), line=None, row=row), self._rules)

    def _shuffled(self, count: int, what: str) -> Sequence[int]:
        numbers = range(count)
        if self._seed is None:
            return numbers
        return random.Random(f"{self._seed} {self.passes} {what}").sample(numbers, count)

    def _named(self) -> list[str]:
        """The files, in their order; of a table those that are local."""
        if self._files:
            return [name for name, _ in self._files]
        folder = Path(self.config.path)
        found = folder.rglob("*") if folder.is_dir() else map(Path, glob.glob(self.config.path))
        return sorted(str(path) for path in found if path.suffix in _OF_ROWS)

    def _where(self) -> str:
        file = f", at {self._name}" if self._name else ""
        return f"in pass {self.passes + 1} behind record {self.row}{file}"

    def _read(self, reads: Reads, where: str) -> Record:
        with self._breaking(where):
            return reads()

    @contextmanager
    def _breaking(self, where: str | None = None) -> Iterator[None]:
        """Make every error but that of a record one that names the source, and the place."""
        try:
            yield
        except RecordError:
            raise
        except Exception as error:  # libraries raise many types
            raise DataError(
                f"{self.key} ({self.config.path}) broke off {where or self._where()}: {type(error).__name__}: "
                f"{str(error)[:400].rstrip('.')}. Checkpoints are untouched. Bring the source back; the same command "
                "goes on from the last one."
            ) from error


def sizes_of_files(stamps: Mapping[str, FileStamp], pattern: str) -> list[tuple[str, int]]:
    """Names and sizes of the files of a folder or pattern, in their order; names from its part without wildcards on."""
    parts = Path(pattern).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part) or "{" in part), len(parts) - 1)
    root = Path(pattern) if Path(pattern).is_dir() else Path(*parts[:fixed])
    return [(Path(name).relative_to(root).as_posix(), stamp.size) for name, stamp in stamps.items()]


def what_changed(before: Sequence[Any], now: Sequence[Any]) -> str:
    """The files that differ between two `EndlessSource.contents`; empty where no file does."""
    old, new = ({str(name): size for name, size in filter(_is_file, contents)} for contents in (before, now))
    faults = [f"{name} is gone" for name in old if name not in new]
    faults += [
        f"{name} has {new[name]} bytes instead of {old[name]}" for name in old if new.get(name, old[name]) != old[name]
    ]
    faults += [f"{name} is new" for name in new if name not in old]
    more = f" and {len(faults) - _NAMED} more" if len(faults) > _NAMED else ""
    return ", ".join(faults[:_NAMED]) + more


def _is_file(entry: Any) -> bool:
    return isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[1], int)
