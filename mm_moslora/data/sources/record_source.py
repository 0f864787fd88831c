"""Random access to records: the interface of a source, JSON files, and some rows of a source."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_moslora.data.chat.records import Record, parse_record
from mm_moslora.data.images.locate_image import PictureRules
from mm_moslora.data.record_faults import Code, Where
from mm_moslora.data.sources.json_file import JsonFile, StrictJsonError
from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.untrusted_files import opened


class RecordSource(ABC):
    """Random access to the records of one source.

    Args:
        path: path of the source, for messages.
        rules: rules for its pictures.
    """

    def __init__(self, path: Path, rules: PictureRules) -> None:
        self.path, self.rules = path, rules

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def value(self, row: int) -> Any:
        """The unchecked value of a row.

        Raises:
            StrictJsonError: it is not strict JSON.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes with the source's texts; computing it may read them all."""

    def where(self, row: int) -> Where:
        """The place of a record, for messages."""
        return Where(file=self.path, line=None, row=row)

    def __getitem__(self, row: int) -> Record:
        """Read and check one record.

        Raises:
            RecordError: the record cannot be used.
        """
        where = self.where(row)
        try:
            value = self.value(row)
        except StrictJsonError as fault:
            code = Code.TOO_DEEP if fault.deep else Code.TOO_LARGE if fault.large else Code.BAD_JSON
            raise where.error(code, "-", str(fault), "repair or remove the record") from fault
        return parse_record(value, where, self.rules)


class RecordFile(RecordSource):
    """The records of a LLaVA JSON list or a JSONL file.

    Args:
        path: the file.
        rules: rules for its pictures; None: files below the file's folder.

    Raises:
        DataError: the file is missing, empty, or not JSON.
    """

    def __init__(self, path: Path, rules: PictureRules | None = None) -> None:
        super().__init__(path, rules or PictureRules(folder=path.parent.resolve()))
        self._values = JsonFile(path)

    def __len__(self) -> int:
        return len(self._values)

    def where(self, row: int) -> Where:
        """The place of a record, with its line in a JSONL file."""
        return Where(file=self.path, line=self._values.line(row), row=row)

    def value(self, row: int) -> Any:
        """The parsed value of a row."""
        return self._values[row]

    def fingerprint(self) -> str:
        """A hash of the file's bytes."""
        with opened(self.path, most=None) as stream:
            return sha256_of(stream)


class Selection(RecordSource):
    """Some rows of a source.

    Args:
        source: the whole source.
        rows: numbers of the rows, in order.
    """

    def __init__(self, source: RecordSource, rows: Sequence[int]) -> None:
        super().__init__(source.path, source.rules)
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def where(self, row: int) -> Where:
        """The place in the whole source."""
        return self.source.where(self.rows[row])

    def value(self, row: int) -> Any:
        """The value in the whole source."""
        return self.source.value(self.rows[row])

    def fingerprint(self) -> str:
        """A hash of the whole source and the chosen rows."""
        choice = hashlib.sha256(repr(list(self.rows)).encode()).hexdigest()
        return f"{self.source.fingerprint()}-{choice[:16]}"
