"""Pictures inside a Hugging Face table, read when they are needed: decoded, a benchmark's do not fit in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..documents import StoredImage

_AT_ONCE = 4096


class Pictures:
    """The picture columns of a table.

    Args:
        table: a `datasets.Dataset`.
        names: candidates; those that hold pictures or lists of them are used.
    """

    def __init__(self, table: Any, names: Sequence[str]) -> None:
        import datasets

        features = table.features
        self.columns = [
            name for name in names if name in features and isinstance(_item(features[name]), datasets.Image)
        ]
        self._arrow = table.select_columns(self.columns).with_format("arrow") if self.columns else None
        self._counts = {name: self._count(name, len(table)) for name in self.columns}

    def of(self, row: int) -> tuple[StoredImage, ...]:
        """The pictures of a row, in the order of the columns."""
        return tuple(
            StoredImage(self._read, row, name, place)
            for name in self.columns
            for place in range(self._counts[name][row])
        )

    def _count(self, name: str, rows: int) -> list[int]:
        import pyarrow

        counts: list[int] = []
        for start in range(0, rows, _AT_ONCE):
            column = self._arrow[start : min(rows, start + _AT_ONCE)].column(name)  # type: ignore[index]
            if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                counts += [value or 0 for value in pyarrow.compute.list_value_length(column).to_pylist()]
            else:
                counts += [int(there) for there in column.is_valid().to_pylist()]
        return counts

    def _read(self, row: int, name: str, place: int) -> bytes:
        value = self._arrow[row : row + 1].column(name)[0].as_py()  # type: ignore[index]
        if isinstance(value, list):
            value = value[place]
        stored = value.get("bytes")
        return stored if stored is not None else Path(value["path"]).read_bytes()


def _item(feature: Any) -> Any:
    """What a list feature holds, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)
