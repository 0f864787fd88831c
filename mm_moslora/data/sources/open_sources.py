"""Opens sources: JSON and JSONL files, Hugging Face tables (including parquet), webdataset tar files.

Every source has random access by row number, so that the order of training depends only on a seed.
"""

from __future__ import annotations

import bisect
import glob
import logging
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.config import HeldOut, Objective, SourceConfig
from mm_moslora.data.chat.preference_records import SHOWN
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Where
from mm_moslora.data.sources.record_file import EmptySourceError, RecordFile, RecordSource, require_file
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of_text

if TYPE_CHECKING:
    from mm_moslora.batch import ImageProcessing

logger = logging.getLogger(__name__)

TABLE_SUFFIXES = (".parquet", ".arrow")
READERS: dict[str, Callable[[Path, PictureRules], RecordSource]] = {}
"""Suffix of a file, such as `.csv` -> what reads it, from its path and the rules for its pictures (`--import`)."""


def require_sources(sources: Sequence[SourceConfig]) -> None:
    """Refuse no sources, missing files or picture folders, and a path named twice where a source holds records out."""
    if not sources:
        raise DataError("No data source is named. Add one to data.train, with the path of a LLaVA JSON or JSONL file.")
    _require_apart(sources)
    for config in sources:
        kind, path = _kind_of(config), Path(config.path)
        if config.streaming and stream_files(config):
            pass
        elif kind in ("json", "own"):
            require_file(path)
        elif kind == "webdataset":
            from mm_moslora.data.sources.webdataset_tars import files_of

            files_of(config.path)
        elif path.suffix in TABLE_SUFFIXES and not path.exists() and not glob.glob(config.path):
            raise DataError(f"No file matches {config.path}. Check its path.")
        rules_of(config)


def _require_apart(sources: Sequence[SourceConfig]) -> None:
    training = [source for source in sources if not isinstance(source, HeldOut)]
    named = Counter(map(_content_of, training))
    for source in training:
        if source.hold_out and named[_content_of(source)] > 1:
            raise DataError(
                f"data source {source.path!r} has hold_out: {source.hold_out}, but data.train names it "
                f"{named[_content_of(source)]} times, so that held-out records would be trained on. Name it once "
                "(weight repeats records), or write the records to hold out to a file of their own for data.validation."
            )


def _content_of(source: SourceConfig) -> tuple[str, str | None, str]:
    """What sources of the same records have in common."""
    return (os.path.realpath(source.path) if os.path.exists(source.path) else source.path), source.subset, source.split


def open_source(config: SourceConfig, *, processing: ImageProcessing | None = None) -> RecordSource:
    """Open one source; `processing` of the model decides whether a video stays one, without it it becomes pictures."""
    if config.endless:
        raise DataError(
            f"data source {config.path!r} has streaming without limit, so it has no end, and only training reads it. "
            "Set limit and limit_by: first, or name one of its files."
        )
    if config.streaming and (parts := files_of_stream(config)):
        return FirstRecords(config, _with_records(parts, processing))
    kind, rules = _kind_of(config), rules_of(config, processing)
    if kind == "json":
        source: RecordSource = RecordFile(Path(config.path), rules)
    elif kind == "own":
        source = READERS[Path(config.path).suffix.lower()](Path(config.path), rules)
    elif kind == "webdataset":
        from mm_moslora.data.sources.webdataset_tars import TarSource

        source = TarSource(config.path, rules)
    else:
        from mm_moslora.data.sources.hf_tables import TableSource

        source = TableSource(config, rules)
    return _held_apart(_limited(source, config), config)


def _with_records(parts: Sequence[SourceConfig], processing: ImageProcessing | None) -> Iterator[RecordSource]:
    for part in parts:
        try:
            yield open_source(part, processing=processing)
        except EmptySourceError as error:
            logger.warning("Left out: %s", error)


def stream_files(config: SourceConfig) -> list[Path]:
    """The files of JSON records or tar files that make up a stream, in order; none for a table."""
    from mm_moslora.data.sources.webdataset_tars import files_of

    folder = Path(config.path)
    if config.endless and config.format == "auto" and folder.is_dir():
        if (folder / "metadata.jsonl").is_file():  # a folder of pictures
            return []
        found = (sorted(folder.glob(pattern)) for pattern in ("*.jsonl", "*.tar"))
        return next((files for files in found if files), [])
    return [] if _kind_of(config) in ("table", "own") else files_of(config.path)


def files_of_stream(config: SourceConfig) -> list[SourceConfig]:
    """The files of `stream_files` as sources that have an end."""
    return [replace(config, path=str(path), streaming=False, limit=None, weight=1.0) for path in stream_files(config)]


def beginning(config: SourceConfig, records: int) -> SourceConfig:
    """A source without an end as its first records, any other as it is."""
    if not config.endless:
        return config
    path = config.path
    if Path(path).is_dir() and (files := stream_files(config)):  # with a limit, a folder is a table
        path = str(Path(glob.escape(path)) / f"*{files[0].suffix}")
    return replace(config, path=path, limit=records, limit_by="first")


def _limited(source: RecordSource, config: SourceConfig) -> RecordSource:
    if config.limit is None or config.limit >= len(source):
        return source
    rows = range(config.limit)
    if config.limit_by == "first":
        return SelectedRecords(source, rows)
    # A fixed seed, so that runs that differ only in their seed see the same records.
    return SelectedRecords(source, sorted(random.Random("limit").sample(range(len(source)), config.limit)))


def _held_apart(source: RecordSource, config: SourceConfig) -> RecordSource:
    """What is left of a source without the records that it holds out, or for `HeldOut` these."""
    if not config.hold_out:
        return source
    if config.hold_out >= len(source):
        raise DataError(
            f"data source {config.path!r}: hold_out is {config.hold_out} of {len(source)} records, so that none is "
            "left to train on. Lower it."
        )
    chosen = set(random.Random("hold_out").sample(range(len(source)), config.hold_out))
    wanted = isinstance(config, HeldOut)
    return SelectedRecords(source, [row for row in range(len(source)) if (row in chosen) == wanted])


def open_sources(
    sources: Sequence[SourceConfig], *, objective: Objective = "sft", processing: ImageProcessing | None = None
) -> list[RecordSource]:
    """Open several sources; records of another objective become conversations, see `preference_records.SHOWN`."""
    require_sources(sources)
    opened = [open_source(source, processing=processing) for source in sources]
    return opened if objective == "sft" else [ShownRecords(source, objective) for source in opened]


def rules_of(config: SourceConfig, processing: ImageProcessing | None = None) -> PictureRules:
    """Where a source's pictures may lie, and whether its videos stay videos."""
    path = Path(config.path)
    folder = Path(config.image_folder) if config.image_folder else path if path.is_dir() else path.parent
    if config.image_folder and not folder.is_dir():
        raise DataError(
            f"image_folder of {config.path} is {folder}, which is no folder. Name the folder of its images."
        )
    return PictureRules(
        folder=folder.resolve(),
        follow_links=config.follow_links,
        hosts=tuple(host.lower() for host in config.image_hosts),
        video_frames=config.video_frames,
        video_fps=config.video_fps,
        videos=None if processing is None else processing.videos,
    )


def _kind_of(config: SourceConfig) -> str:
    """The kind of a source: the configured one, or with auto by its path."""
    path, lower = config.path, config.path.lower()
    if config.format != "auto":
        return config.format
    if Path(lower).suffix in READERS:
        return "own"
    if lower.startswith("hf:") or Path(path).is_dir() or lower.endswith(TABLE_SUFFIXES):
        return "table"
    if lower.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")):
        return "webdataset"
    return "json"


class SelectedRecords(RecordSource):
    """Some rows of a source."""

    def __init__(self, source: RecordSource, rows: Sequence[int]) -> None:
        super().__init__(source.path, source.rules)
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> Where:
        """See `RecordSource.where`; in the whole source."""
        return self.source.where(self.rows[row])

    def value(self, row: int) -> Any:
        """The value in the whole source."""
        return self.source.value(self.rows[row])

    def fingerprint(self) -> str:
        """A hash of the whole source and the chosen rows."""
        choice = sha256_of_text(repr(list(self.rows)))
        return f"{self.source.fingerprint()}-{choice[:16]}"

    def content(self) -> str:
        """See `RecordSource.content`."""
        return self.source.content()

    def commit(self) -> str | None:
        """See `RecordSource.commit`."""
        return self.source.commit()


class FirstRecords(RecordSource):
    """The first records of several files; files behind them are not opened."""

    def __init__(self, config: SourceConfig, files: Iterable[RecordSource]) -> None:
        assert config.limit is not None, "checked by SourceConfig"
        self.files: list[RecordSource] = []
        self._starts = [0]
        for file in files:
            self.files.append(file)
            self._starts.append(min(config.limit, self._starts[-1] + len(file)))
            if self._starts[-1] == config.limit:
                break
        if not self.files:
            raise EmptySourceError(config.path)
        super().__init__(Path(config.path), self.files[0].rules)

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, row: int) -> Record:
        """See `RecordSource.__getitem__`; by the rules of its file."""
        file, own = self._at(row)
        return file[own]

    def where(self, row: int) -> Where:
        """See `RecordSource.where`; in its file."""
        file, own = self._at(row)
        return file.where(own)

    def value(self, row: int) -> Any:
        """The value in its file."""
        file, own = self._at(row)
        return file.value(own)

    def fingerprint(self) -> str:
        """A hash of the files, and of the number of records."""
        parts = [file.fingerprint() for file in self.files]
        return sha256_of_text(repr([len(self), *parts]))

    def _at(self, row: int) -> tuple[RecordSource, int]:
        number = bisect.bisect_right(self._starts, row) - 1
        return self.files[number], row - self._starts[number]


class ShownRecords(SelectedRecords):
    """The records of an objective as conversations; one that does not fit the objective is an error."""

    def __init__(self, source: RecordSource, objective: Objective) -> None:
        super().__init__(source, range(len(source)))
        self.objective = objective

    def __getitem__(self, row: int) -> Record:
        """See `RecordSource.__getitem__`."""
        return self.parsed(row, SHOWN[self.objective])
