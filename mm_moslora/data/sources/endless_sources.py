"""Sources without an end: read in order, never as a whole, and begun again after the last record.

A source tells its place as plain data, from which it goes on exactly.
"""

from __future__ import annotations

import glob
import logging
import random
from abc import ABC, abstractmethod
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


class EndlessSource(ABC):
    """Records of one source in a fixed order, for ever.

    Args:
        config: of the source.
        key: of the source in the recipe, for messages.
    """

    def __init__(self, config: SourceConfig, key: str) -> None:
        self.config, self.key = config, key
        self.passes = self.row = 0
        """Passes over the source that are over, and records taken in this one."""
        self.empty: set[str] = set()
        """Files without a record that were passed over."""
        self.stamps: Mapping[str, FileStamp] = {}
        """Of local files, at the start."""

    @abstractmethod
    def contents(self) -> list[Any]:
        """Names and sizes of the files, as JSON; equal on all ranks, and as long as the files are the same."""

    @abstractmethod
    def seek(self, place: dict[str, Any]) -> None:
        """Go on from a place of the same source."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """The place behind the last record, as JSON."""

    @abstractmethod
    def _next(self) -> Reads | None:
        """What reads the next record of this pass, which is counted in `row`; None behind the last one."""

    @abstractmethod
    def _begin(self) -> None:
        """Begin the pass with the number `passes`."""

    @abstractmethod
    def _where(self) -> str:
        """The file at hand, for messages."""

    def take(self) -> Reads:
        """Go to the next record; what reads it raises RecordError where it cannot be used.

        Raises:
            DataError: the source is empty, or it is no longer there; also from what reads the record.
        """
        with self._breaking():
            if (reads := self._next()) is None and self.row:
                self.passes, self.row = self.passes + 1, 0
                self._begin()
                reads = self._next()
        if reads is None:
            raise DataError(f"{self.key} ({self.config.path}) is empty: 0 records. Check its path, subset and split.")
        return partial(self._read, reads, self._place())

    def _read(self, reads: Reads, place: str) -> Record:
        with self._breaking(place):
            return reads()

    def _place(self) -> str:
        return f"in pass {self.passes + 1} behind record {self.row}{self._where()}"

    @contextmanager
    def _breaking(self, place: str | None = None) -> Iterator[None]:
        """Make every error but that of a record one that names the source, and the place."""
        try:
            yield
        except RecordError:
            raise
        except Exception as error:  # libraries raise many types
            raise DataError(
                f"{self.key} ({self.config.path}) broke off {place or self._place()}: {type(error).__name__}: "
                f"{str(error)[:400].rstrip('.')}. Checkpoints are untouched. Bring the source back; the same command "
                "goes on from the last one."
            ) from error


class FileStream(EndlessSource):
    """The records of some files with random access, file by file.

    Args:
        config: of the source.
        key: see `EndlessSource`.
        files: their names, for messages, and what opens them.
        seed: of the order of the files in every pass; None: the given one.
        rows: shuffle the records of a file, too.
    """

    def __init__(
        self,
        config: SourceConfig,
        key: str,
        *,
        files: Sequence[tuple[str, Callable[[], RecordSource]]],
        seed: str | None,
        rows: bool,
    ) -> None:
        super().__init__(config, key)
        self.files, self.seed, self._rows = files, seed, rows
        self._order: Sequence[int] = ()
        self._file = self._taken = 0  # the file in the order, and records of it that were taken
        self._opened: RecordSource | None = None
        paths = [name for name, _ in files if Path(name).is_file()]
        self.stamps = {name: FileStamp.of(Path(name)) for name in paths}
        self._begin()

    def contents(self) -> list[Any]:
        """See `EndlessSource.contents`; of what is no file a hash of its content."""
        known = sizes_of_files(self.stamps, self.config.path)
        return known if len(known) == len(self.files) else [opens().content() for _, opens in self.files]

    def seek(self, place: dict[str, Any]) -> None:
        """See `EndlessSource.seek`."""
        self.passes = int(place["passes"])
        self._begin()
        self.row, self._file, self._taken = int(place["row"]), int(place["file"]), int(place["taken"])

    def place(self) -> dict[str, Any]:
        """See `EndlessSource.place`."""
        return {"passes": self.passes, "row": self.row, "file": self._file, "taken": self._taken}

    def _begin(self) -> None:
        self._order, self._file, self._taken, self._opened = self._shuffled(len(self.files), "files"), 0, 0, None

    def _shuffled(self, count: int, what: str) -> Sequence[int]:
        numbers = range(count)
        if self.seed is None:
            return numbers
        return random.Random(f"{self.seed} {self.key} {self.passes} {what}").sample(numbers, count)

    def _next(self) -> Reads | None:
        while self._file < len(self._order):
            if self._opened is None:
                self._opened = self._open(*self.files[self._order[self._file]])
                count = 0 if self._opened is None else len(self._opened)
                self._numbers = self._shuffled(count, "rows") if self._rows else range(count)
            if self._opened is not None and self._taken < len(self._numbers):
                self._taken, self.row = self._taken + 1, self.row + 1
                return partial(self._opened.__getitem__, self._numbers[self._taken - 1])
            self._file, self._taken, self._opened = self._file + 1, 0, None
        return None

    def _open(self, name: str, opens: Callable[[], RecordSource]) -> RecordSource | None:
        """A file in the version of the start; None where it is empty."""
        try:
            opened = opens()
        except EmptySourceError:
            opened = None
        if name in self.stamps:
            self.stamps[name].require(Path(name), Path(name))
        if opened is None and name not in self.empty:
            self.empty.add(name)
            logger.warning("%s: %s is empty and left out; empty files so far: %s", self.key, name, len(self.empty))
        return opened

    def _where(self) -> str:
        return f", at {self.files[self._order[self._file]][0]}" if self._file < len(self._order) else ""


class TableStream(EndlessSource):
    """The rows of a Hugging Face dataset, from its own stream; see `hf_tables.table_stream`."""

    def __init__(self, config: SourceConfig, key: str, processing: ImageProcessing | None) -> None:
        super().__init__(config, key)
        self._rules = rules_of(config, processing)
        folder = Path(config.path)
        found = folder.rglob("*") if folder.is_dir() else map(Path, glob.glob(config.path))
        self.stamps = {str(path): FileStamp.of(path) for path in sorted(found) if path.suffix in _OF_ROWS}
        self._begin()

    def contents(self) -> list[Any]:
        """See `EndlessSource.contents`; files of the hub are pinned by `revision`."""
        config, files = self.config, sizes_of_files(self.stamps, self.config.path)
        return [
            Path(config.path).name,
            config.subset,
            config.split,
            config.revision,
            sorted(config.columns.items()),
            *files,
        ]

    def seek(self, place: dict[str, Any]) -> None:
        """See `EndlessSource.seek`."""
        self._begin()
        self.passes, self.row = int(place["passes"]), int(place["row"])
        if place["state"] is not None:
            self._table.load_state_dict(place["state"])

    def place(self) -> dict[str, Any]:
        """See `EndlessSource.place`."""
        return {"passes": self.passes, "row": self.row, "state": self._table.state_dict() if self.row else None}

    def _begin(self) -> None:
        from mm_moslora.data.sources.hf_tables import table_stream

        self._table = table_stream(self.config)  # a stream that was set to a state begins there again
        self._iterator = iter(self._table)

    def _next(self) -> Reads | None:
        from mm_moslora.data.sources.hf_tables import row_of_stream

        if self.row % _UNCHECKED == 0:
            for name, stamp in self.stamps.items():
                stamp.require(Path(name), Path(name))
        if (row := next(self._iterator, None)) is None:
            return None
        self.row += 1
        where = Where(file=Path(self.config.path), line=None, row=self.row - 1)
        features = self._table.features
        return lambda: parse_record(row_of_stream(row, features, self.config), where, self._rules)

    def _where(self) -> str:
        return ""


def sizes_of_files(stamps: Mapping[str, FileStamp], pattern: str) -> list[tuple[str, int]]:
    """Names and sizes of the files of a folder or pattern, in their order; names from its part without wildcards on."""
    parts = Path(pattern).parts
    fixed = next((number for number, part in enumerate(parts) if glob.has_magic(part) or "{" in part), len(parts) - 1)
    root = Path(pattern) if Path(pattern).is_dir() else Path(*parts[:fixed])
    return [(Path(name).relative_to(root).as_posix(), stamp.size) for name, stamp in stamps.items()]


def what_changed(before: Sequence[Any], now: Sequence[Any]) -> str:
    """The files that differ between two `EndlessSource.contents`; empty where no file does.

    Args:
        before: as a checkpoint holds it.
        now: of the source as it is.
    """
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


def open_endless(
    config: SourceConfig, key: str, *, seed: int, shuffled: bool, processing: ImageProcessing | None = None
) -> EndlessSource:
    """Open a source of training data as a stream without an end.

    A source that has an end, such as one to replay beside a stream, is shuffled as a whole in every pass.

    Args:
        config: of the source.
        key: of the source in the recipe.
        seed: of the order.
        shuffled: whether files, and records of a source with an end, are shuffled.
        processing: see `open_source`.
    """
    order = str(seed) if shuffled else None
    if not config.endless:
        opens = partial(open_source, config, processing=processing)
        return FileStream(config, key, files=[(config.path, opens)], seed=order, rows=shuffled)
    if not (parts := files_of_stream(config)):
        return TableStream(config, key, processing)
    files = [(part.path, partial(open_source, part, processing=processing)) for part in parts]
    return FileStream(config, key, files=files, seed=order, rows=False)
