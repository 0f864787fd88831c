"""Pictures that documents name, found by the rules of training, and pictures inside a Hugging Face table.

Pictures of a table are read when they are needed, because a benchmark's decoded pictures do not fit in memory.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora_eval.sources.document import ImageLike, StoredImage
from mm_moslora_eval.sources.source import Source
from mm_moslora_eval.sources.source_videos import frames_of_record

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

FRAMES = 8
"""Frames of a video, where neither a task nor the training of the model says how many."""
_AT_ONCE = 4096
_BASE64 = re.compile(r"[A-Za-z0-9+/]{256,}")
"""The beginning of a picture as base64; names of files are shorter or have a period."""


def rules_of(folder: Path, source: Source) -> PictureRules:
    """Rules for pictures: files below a resolved folder, bytes and data URLs are accepted; links out of it if asked."""
    from mm_moslora.data.images.record_picture import PictureRules

    return PictureRules(
        folder=folder, follow_links=source.follow_links, video_frames=source.video_frames or FRAMES,
        video_fps=source.video_fps,
        video_folder_fps=source.video_folder_fps, video_middles=source.video_sampling == "middles",
    )  # fmt: skip


def shown_of_record(
    record: Mapping[str, Any], *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The pictures of a record and the frames of its videos after them, and the first problem."""
    pictures, problem = pictures_of_record(record.get("image"), file=file, row=row, rules=rules)
    if record.get("video") in (None, ""):
        return pictures, problem
    frames, other = frames_of_record(record["video"], record.get, file=file, row=row, rules=rules)
    return ((), problem or other) if problem or other else (pictures + frames, None)


def pictures_of_record(
    images: Any, *, file: Path, row: int, rules: PictureRules
) -> tuple[tuple[ImageLike, ...], str | None]:
    """The pictures that a record gives (names, bytes, objects with either, a list, None), and the first problem."""
    from mm_moslora.data.images.record_picture import LocalPicture, find_picture
    from mm_moslora.data.record_faults import RecordError, Where

    where = Where(file=file, line=None, row=row)
    items = images if isinstance(images, list | tuple) else [] if images in (None, "") else [images]
    pictures: list[ImageLike] = []
    for index, item in enumerate(items):
        try:
            picture = find_picture(item, index, where, rules)
        except RecordError as error:
            return (), f"image {error.what}; {error.remedy}"
        pictures.append(picture.path if isinstance(picture, LocalPicture) else picture.read())
    return tuple(pictures), None


class Pictures:
    """The picture columns of a table."""

    def __init__(
        self, table: Any, names: Sequence[str], *, file: Path, rules: PictureRules, store: Sequence[Path] = ()
    ) -> None:
        import datasets

        features = table.features
        self.columns = [
            name
            for name in names
            if name in features and (isinstance(_item(features[name]), datasets.Image) or _is_base64(table, name))
        ]
        self._file, self._rules, self._store = file, rules, store
        self._arrow = table.select_columns(self.columns).with_format("arrow") if self.columns else None
        self._counts = {name: self._count(name, len(table)) for name in self.columns}

    def of(self, row: int) -> tuple[StoredImage, ...]:
        """The pictures of a row, in the order of the columns."""
        return tuple(
            StoredImage(self._read, row, name, number)
            for name in self.columns
            for number in range(self._counts[name][row])
        )

    def _count(self, name: str, rows: int) -> list[int]:
        import pyarrow

        counts: list[int] = []
        for start in range(0, rows, _AT_ONCE):
            column = self._arrow[start : min(rows, start + _AT_ONCE)].column(name)  # type: ignore[index]
            if pyarrow.types.is_list(column.type) or pyarrow.types.is_large_list(column.type):
                counts += [value or 0 for value in pyarrow.compute.list_value_length(column).to_pylist()]
            else:
                counts += [int(valid) for valid in column.is_valid().to_pylist()]
        return counts

    def _read(self, row: int, name: str, number: int) -> bytes:
        from mm_moslora.data.images.record_picture import LocalPicture, find_picture, read_picture
        from mm_moslora.data.record_faults import Where
        from mm_moslora.data.sources.hf_tables import fetched_file

        value = self._arrow[row : row + 1].column(name)[0].as_py()  # type: ignore[index]
        if isinstance(value, list):
            value = value[number]
        if isinstance(value, str):
            return base64.b64decode(value)
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        fetched = fetched_file(value.get("path"), self._store)
        if fetched is not None:
            return fetched.read()
        picture = find_picture(value, number, Where(file=self._file, line=None, row=row), self._rules)
        return read_picture(picture.path) if isinstance(picture, LocalPicture) else picture.read()


def _is_base64(table: Any, name: str) -> bool:
    """Whether the first row has a picture as base64."""
    value = table[0][name] if len(table) else None
    return isinstance(value, str) and _BASE64.match(value) is not None


def holds_pictures(feature: Any) -> bool:
    """Whether a column has pictures, or the objects in which tables store them."""
    import datasets

    item = _item(feature)
    return isinstance(item, datasets.Image) or (isinstance(item, dict) and item.keys() == {"bytes", "path"})


def _item(feature: Any) -> Any:
    """The element of a list feature, or the feature itself."""
    if isinstance(feature, list):
        return feature[0]
    return getattr(feature, "feature", feature)
