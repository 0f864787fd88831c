"""Bad records: writes each as a JSON line, counts them by code, and raises above a share."""

from __future__ import annotations

import json
import threading
from contextlib import suppress
from pathlib import Path

from mm_moslora.config import DataConfig
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.files import Appender, replace_text
from mm_moslora.utils.untrusted_data import parse_json
from mm_moslora.utils.untrusted_files import read_text_below


class Quarantine:
    """Counts and keeps bad records, also in a file where it has a path.

    Every rank finds the same bad records while the data set is built, so these are written at once, as a whole file.
    Records found later (pictures damaged inside) are appended one by one.
    """

    def __init__(self, path: Path | None, total: int, config: DataConfig) -> None:
        self.path, self.total, self.config = path, total, config
        self.codes: dict[str, int] = {}
        """Number of bad records by code."""
        self._numbers: set[int] = set()
        self._lines: list[str] | None = []
        self._late = None if path is None else Appender(path)
        self._adding = threading.Lock()
        self.first: RecordError | None = None
        """The first bad record."""

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, index: int) -> bool:
        return index in self._numbers

    def add(self, index: int, error: RecordError, *, write: bool = True) -> None:
        """Add one bad record, once; with `write` False another rank writes its line."""
        dropped = error.code is Code.TOO_LONG and self.config.too_long == "drop"
        if self.config.on_bad == "error" and not dropped:
            raise error
        with self._adding:  # a stream's reader and its batches find faults in threads of their own
            if index in self._numbers:
                return
            self._numbers.add(index)
            self.first = self.first or error
            self.codes[error.code.value] = self.codes.get(error.code.value, 0) + 1
            line = _line(index, error)
            if self._lines is not None:
                self._lines.append(line)
                return
            if self._late is not None and write:
                self._late.add(line)  # one write, so that lines of ranks do not mix
            self._check_share()

    def close(self) -> None:
        """Write the bad records found so far, and check their share; called when the data set is built."""
        if self.path is not None and self._late is not None and self._lines is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self.path, "".join(f"{line}\n" for line in self._lines))
            except OSError:  # a full disk must not stop the run, and may have room later
                for line in self._lines:
                    self._late.add(line)
        self._lines = None
        self._check_share()

    def _check_share(self) -> None:
        left_out = self.codes.get(Code.TOO_LONG.value, 0) if self.config.too_long == "drop" else 0
        bad = len(self._numbers) - left_out
        if bad <= self.config.max_bad_share * self.total:
            return
        remedy = "." if bad >= self.total else " or raise data.max_bad_share."
        remedy += " data.too_long can cut or drop long records." if self.codes.get(Code.TOO_LONG.value) else ""
        see = f"All are in {self.path}." if self.path is not None else ""
        raise DataError(
            f"{bad} of {self.total} records ({bad / self.total:.1%}) cannot be used, more than data.max_bad_share "
            f"({self.config.max_bad_share:.1%}): {summary(self.codes)}. The first one: {self.first}. {see} "
            f"Repair the data{remedy}"
        ) from self.first


class StreamQuarantine(Quarantine):
    """The bad records of a stream, which are found as it is read.

    Their share is of the records read so far, and of no fewer than `FIRST`. A resumed run keeps the file.
    """

    FIRST = 1000

    def __init__(self, path: Path | None, config: DataConfig, *, fresh: bool) -> None:
        super().__init__(path, self.FIRST, config)
        if fresh and distributed.is_main():
            self.close()
        self._lines = None

    def read(self, records: int) -> None:
        """Count the records read so far."""
        self.total = max(self.FIRST, records)

    def remember(self) -> None:
        """Count the bad records of the file, so that those which are read again count once."""
        if self.path is None:
            return
        for line in (read_text_below(self.path.parent, self.path.name) or "").splitlines():
            with suppress(DataError, TypeError, LookupError, ValueError):
                entry = parse_json(line)
                self._numbers.add(int(entry["record"]))
                self.codes[str(entry["code"])] = self.codes.get(str(entry["code"]), 0) + 1


def summary(codes: dict[str, int]) -> str:
    """Counts by code, the most frequent first."""
    return ", ".join(f"{code} {count}" for code, count in sorted(codes.items(), key=lambda item: (-item[1], item[0])))


def _line(index: int, error: RecordError) -> str:
    """`record` counts over all sources (as `data view --start` does), `row` within the file."""
    where = error.where
    entry = {
        "record": index, "file": str(where.file), "line": where.line, "row": where.row, "id": where.id,
        "field": error.field, "path": error.path, "code": error.code.value, "reason": str(error),
    }  # fmt: skip
    return json.dumps(entry, ensure_ascii=True)
