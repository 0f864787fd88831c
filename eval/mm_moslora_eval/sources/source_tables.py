"""Tables of Hugging Face data sets: opened, checked for their columns, with the pictures in them.

Pictures of a table are read when they are needed, because a benchmark's decoded pictures do not fit in memory.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.utils.errors import EvalError, MoSLoRAError, suggestion
from mm_moslora.utils.identity import sha256_of, sha256_of_values
from mm_moslora.utils.untrusted_files import find_below, opened
from mm_moslora_eval.sources.document import StoredImage
from mm_moslora_eval.sources.source import Source, folder_checksum
from mm_moslora_eval.sources.source_videos import END, START

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

KEYS = ("id", "image", "video", START, END, "question", "options", "answer", "category", "hint")
READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}
BRACED = re.compile(r"\{([^{}]+)\}")
_AT_ONCE = 4096
_BASE64 = re.compile(r"[A-Za-z0-9+/]{256,}")
"""The beginning of a picture as base64; names of files are shorter or have a period."""


@contextmanager
def from_cache() -> Iterator[None]:
    """Read data sets of the hub from the caches of its libraries alone; the network is not touched."""
    import datasets
    from huggingface_hub import constants

    places: tuple[Any, ...] = (constants, datasets.config)
    before = [place.HF_HUB_OFFLINE for place in places]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True
        yield
    finally:
        for place, offline in zip(places, before, strict=True):
            place.HF_HUB_OFFLINE = offline


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of `datasets`, and the columns that the task adds to its rows."""

    table: Any
    name: str
    """For messages."""
    source: Source
    added: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def own(self) -> dict[str, None]:
        """Names of its columns, and of those of the rows that its rows stand for."""
        names = dict.fromkeys(self.table.column_names)
        shown = [name for name, feature in self.table.features.items() if holds_pictures(feature)]
        for row in self.table.remove_columns(shown) if self.source.rows else ():
            with suppress(ValueError):
                names |= {key: None for one in self.source.rows_of(row) for key in one}
        return names

    @property
    def names(self) -> dict[str, None]:
        """Names of all columns of its rows."""
        return {**self.own, **dict.fromkeys(self.added)}


def open_tables(source: Source, path: Path | None) -> tuple[list[Table], str]:
    """The tables of a source, at a path or on the hub, and their checksum."""
    import datasets

    from mm_moslora.data.sources.hf_tables import load_saved, undecoded

    datasets.disable_progress_bars()  # they would overwrite this package's own progress
    try:
        if source.files:
            return _named_files(source, path)
        if path is None:
            whole = _split(source, source.path, revision=source.revision)
            sha256 = str(getattr(whole, "_fingerprint", ""))
        elif path.is_dir():
            saved = (path / "dataset_info.json").is_file()
            whole = undecoded(load_saved(path)) if saved else _split(source, str(path))
            sha256 = folder_checksum(path)
        elif path.is_file():
            whole, sha256 = _file(path)
        else:
            raise EvalError(f"{path} is neither a file nor a folder.")
        return [Table(table=whole, name=source.path, source=source)], sha256
    except MoSLoRAError:
        raise
    except Exception as error:  # datasets raises many types and wraps the cause
        cause = error.__cause__ or error
        raise EvalError(
            f"Data set {source.path!r} cannot be opened ({type(cause).__name__}: {str(cause)[:300]}). "
            "Give a local parquet file or folder, or a hub id; online, `mm-moslora eval plan TASK --check` fetches it."
        ) from error


def _split(source: Source, name: str, **options: Any) -> Any:
    """The split of a folder or of a set of the hub, with the rows of all configurations that the source names."""
    import datasets

    from mm_moslora.data.sources.hf_tables import load_checked, undecoded

    configs = [name.strip() for name in source.config.split(",")] if source.config else [None]
    tables = [load_checked(name, name=config, split=source.split, **options) for config in configs]
    if len(tables) > 1:  # what one lacks is empty in the joined table
        parts = zip(tables, configs, strict=True)
        check_columns(
            [Table(table=one, name=f"{source.path}, {config}", source=source) for one, config in parts], source
        )
    return undecoded(tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables))


def _file(file: Path) -> tuple[Any, str]:
    """The table of a file and the file's checksum."""
    from mm_moslora.data.sources.hf_tables import load_checked, undecoded

    kind = READERS.get(file.suffix)
    if kind is None:
        raise EvalError(f"{file} is neither parquet, JSON nor CSV.")
    with opened(file, most=None) as stream:
        sha256 = sha256_of(stream)
    return undecoded(load_checked(kind, data_files=str(file), split="train")), sha256


def _named_files(source: Source, folder: Path | None) -> tuple[list[Table], str]:
    """A table of each file that the source names, in a folder or on the hub, with the columns that it adds."""
    from mm_moslora.data.sources.hf_tables import load_checked, undecoded

    tables, checksums = [], []
    for name, more in source.files.items():
        if folder is not None:
            table, sha256 = _file(find_below(folder, name, follow_links=source.follow_links))
        else:
            table = undecoded(load_checked(source.path, data_files=name, split="train", revision=source.revision))
            sha256 = str(getattr(table, "_fingerprint", ""))
        tables.append(Table(table=table, name=f"{source.path}/{name}", source=source, added=more))
        checksums.append(sha256)
    return tables, sha256_of_values(checksums)


def check_columns(tables: Sequence[Table], source: Source) -> None:
    """Refuse tables without a column that is named or that another one has, and further columns that they have already.

    Columns of documents that no table has and that are not named are optional.
    """
    named = {name: name for name in source.has} | source.columns
    some = {name: name for name in KEYS if name not in named and any(name in one.names for one in tables)}
    wanted = [
        (name, f"for {document_field}")
        for document_field, columns in (named | some).items()
        for part in columns.split(",")
        for name in BRACED.findall(part) or [part.strip()]
    ]
    wanted += [(name, "for source.where") for name in source.where]
    lists = [columns.split(",")[1:] for columns in named.values()] if not source.files else []
    optional = {name.strip() for names in lists for name in names}  # a configuration may have fewer pictures or options
    known = {name for one in tables for name in one.names if name in optional}
    for one, (name, use) in product(tables, wanted):
        if name not in one.names and name not in known:
            none = f" If this file has none, say so in source.files: `{name}: ''`." if source.files else ""
            raise EvalError(
                f"{one.name} has no column {name!r} ({use}).{suggestion(name, one.names)} "
                f"Columns: {', '.join(one.names)}.{none}"
            )
    for one in tables:
        added = [name for name, text in one.added.items() if text]  # an empty one states that there is none
        further = [*added, *source.texts]
        for number, name in enumerate(further):
            if name in one.own or name in further[:number]:
                raise EvalError(
                    f"{one.name} has a column {name!r} already, and source.files or texts makes another one; "
                    "take another name."
                )


def refuse_unread_pictures(tables: Sequence[Table], source: Source) -> None:
    """Refuse a table with pictures of which none is read."""
    unread = [name for one in tables for name, feature in one.table.features.items() if holds_pictures(feature)]
    if unread:
        raise EvalError(
            f"{source.path}: no document has a picture, but the column {unread[0]!r} holds pictures; name it, such as "
            f"`columns: {{image: {unread[0]}}}`."
        )


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
