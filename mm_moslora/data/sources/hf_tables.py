"""Hugging Face datasets as sources: from the hub, a folder saved to disk, parquet or Arrow files, also streamed.

Tables stay on disk (Arrow, memory-mapped). The bytes of a picture are read only when the picture is used.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_moslora.config import SourceConfig
from mm_moslora.data.images.record_picture import PictureRules, StoredPicture, read_picture
from mm_moslora.data.images.remote_files import is_of_set, read_hub_file
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.utils.errors import ConfigError, DataError, suggestion
from mm_moslora.utils.file_locks import lock_file
from mm_moslora.utils.files import building
from mm_moslora.utils.folder_marks import is_built
from mm_moslora.utils.identity import sha256_of_values
from mm_moslora.utils.network.hub_access import hub_or_cache
from mm_moslora.utils.run_paths import cache_folder
from mm_moslora.utils.untrusted_data import parse_json, parse_object, parse_yaml_value
from mm_moslora.utils.untrusted_files import FileError, find_below, read_text, read_text_below

if TYPE_CHECKING:
    from datasets import Dataset


class TableSource(RecordSource):
    """The rows of a Hugging Face dataset: `hf:NAME`, a folder, or .parquet or .arrow files with wildcards."""

    def __init__(self, config: SourceConfig, rules: PictureRules) -> None:
        super().__init__(Path(config.path), rules)
        table = _load(config)
        _check_columns(config, table.column_names)
        self._values = TableRows(config, table.features)
        self._table = table.with_format("arrow")
        names = json.dumps({own: name for name, own in config.columns.items()}, sort_keys=True)
        self._identity = f"{table._fingerprint}{_store_of(table)}-{names}"
        if not len(table):
            raise DataError(f"{config.path} is empty: 0 records. Check the split ({config.split}).")

    def __len__(self) -> int:
        return len(self._table)

    def value(self, row: int) -> dict[str, Any]:
        """A row with references to its pictures, which are not read yet."""
        return self._values(self._table[row], row)

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` computes."""
        return self._identity

    def content(self) -> str:
        """The commit."""
        return self.commit() or ""

    def commit(self) -> str | None:
        """The commit of a data set of the hub."""
        return hub_revision(self._table) if str(self.path).startswith("hf:") else None


class TableRows:
    """Makes records of the rows of a table in the arrow format; pictures in them become references."""

    def __init__(self, config: SourceConfig, features: Any) -> None:
        self.path, self.features = config.path, features or {}
        self._names = {own: name for name, own in config.columns.items()}
        self._set = config.path.removeprefix("hf:") if config.path.startswith("hf:") else ""
        self._store = hub_store(self._set) if self._set else ()

    def __call__(self, row: Any, number: int) -> dict[str, Any]:
        """The fields of the only row of an arrow table."""
        cells = (
            (own, self._cell(row.column(own)[0], self.features.get(own), f"{self.path}:{number}#{own}"))
            for own in row.column_names
        )
        return {self._names.get(own, own): value for own, value in cells if value is not None}

    def _cell(self, cell: Any, feature: Any, name: str) -> Any:
        """A cell as plain data."""
        import datasets
        import pyarrow as pa

        kind = cell.type
        if not cell.is_valid:
            return None
        if isinstance(feature, datasets.ClassLabel):
            return feature.names[cell.as_py()] if cell.as_py() >= 0 else None
        if isinstance(feature, datasets.Json):
            return parse_json(cell.as_py(), constants=True, surrogates=True)
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return StoredPicture(name, cell.as_py)
        if pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
            path = cell["path"].as_py()
            return StoredPicture(name, cell["bytes"].as_py) if cell["bytes"].is_valid else self._file(path)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            inner = getattr(feature, "feature", None)
            return [self._cell(item, inner, f"{name}[{index}]") for index, item in enumerate(cell.values)]
        if pa.types.is_struct(kind):  # Arrow adds the keys of all parts to every part of a message
            inner = feature if isinstance(feature, dict) else {}
            pairs = (
                (field.name, self._cell(cell[field.name], inner.get(field.name), f"{name}.{field.name}"))
                for field in kind
            )
            return {key: value for key, value in pairs if value is not None}
        return cell.as_py()

    def _file(self, path: Any) -> Any:
        """A file of the data set on the hub, fetched before or when it is read; any other path stays a path."""
        if self._set and isinstance(path, str) and is_of_set(path, self._set):
            return StoredPicture(path, partial(read_hub_file, path, self._set))
        return fetched_file(path, self._store) or path


def _check_columns(config: SourceConfig, found: Sequence[str]) -> None:
    if odd := sorted(set(config.columns.values()) - set(found)):
        raise DataError(
            f"{config.path}: columns names {odd[0]!r}, but the columns are {', '.join(found)}."
            f"{suggestion(odd[0], found)}"
        )


def hub_revision(table: Any) -> str | None:
    """The commit at which a data set from the hub was read; None for local data or if `datasets` does not record it."""
    named = [str(name) for name in (getattr(table.info, "download_checksums", None) or {})]
    commits = [match for name in named if name.startswith("hf://") and (match := re.search(r"@([0-9a-f]{40})/", name))]
    if commits:
        return commits[0][1]
    folders = (Path(file["filename"]).parent.name for file in table.cache_files)  # .../CONFIG/VERSION/COMMIT/...
    return next((folder for folder in folders if re.fullmatch(r"[0-9a-f]{40}", folder)), None)


def hub_store(name: str) -> tuple[Path, ...]:
    """Folders of the files that `datasets` fetches from the hub for a data set; the first is that of the set itself."""
    import datasets
    import huggingface_hub
    from huggingface_hub.file_download import repo_folder_name

    return (
        Path(huggingface_hub.constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset"),
        Path(datasets.config.DOWNLOADED_DATASETS_PATH),
        Path(datasets.config.EXTRACTED_DATASETS_PATH),
    )


def fetched_file(path: Any, store: Sequence[Path]) -> StoredPicture | None:
    """A file that `datasets` has fetched from the hub; None for any other path."""
    for folder in store:
        try:
            if isinstance(path, str) and os.path.isabs(path):
                return StoredPicture(path, partial(read_picture, find_below(Path(os.path.realpath(folder)), path)))
        except FileError:
            continue
    return None


def _load(config: SourceConfig) -> Dataset:
    path, name = Path(config.path), config.path.removeprefix("hf:")
    with _loading(config):
        if config.streaming and not _is_saved(path):
            return _streamed(config, name)
        if _is_saved(path):
            return _of_split(load_saved(path), config)
        return _of_split(load_checked(**_arguments(config, name)), config)


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


@contextmanager
def _loading(config: SourceConfig) -> Iterator[None]:
    """Make every error of `datasets` a DataError that names the source."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # datasets raises many types
        raise DataError(
            f"{config.path} does not load as a Hugging Face dataset ({type(error).__name__}: {str(error)[:300]}). "
            "Check path, subset, split and revision."
        ) from error


def _arguments(config: SourceConfig, name: str) -> dict[str, Any]:
    """The arguments of `datasets.load_dataset`."""
    path = Path(config.path)
    suffix = path.suffix if path.suffix in (".parquet", ".arrow") else ""
    files = sorted(glob.glob(config.path)) if suffix else []
    if path.is_dir() and any(path.glob("*.parquet")):
        suffix, files = ".parquet", sorted(str(item) for item in path.glob("*.parquet"))
    if suffix:
        if not files:
            raise DataError(f"No file matches {config.path}. Check its path.")
        return {"path": suffix[1:], "data_files": {config.split: files}, "split": config.split}
    return {"path": name, "name": config.subset, "split": config.split, "revision": config.revision}


def _of_split(loaded: Any, config: SourceConfig) -> Dataset:
    import datasets

    if isinstance(loaded, datasets.DatasetDict):
        if config.split not in loaded:
            raise DataError(f"{config.path} has no split {config.split!r}, only {', '.join(loaded)}. Set split.")
        loaded = loaded[config.split]
    if not isinstance(loaded, datasets.Dataset):
        raise DataError(f"{config.path} is {type(loaded).__name__}, expected a dataset with rows.")
    return undecoded(loaded)


_CARDS = ("README.md", ".huggingface.yaml")
"""Files that list data files, in their key `configs`."""
_FORMATS = ("parquet", "arrow", "json", "csv")


def load_checked(path: str, *, streaming: bool = False, **options: Any) -> Any:
    """Call `datasets.load_dataset` after checking that every data file belongs to the data set itself.

    A data set's README lists its data files, and `datasets` opens every file named there. `path` is a format such as
    `parquet` with `data_files`, a folder, or an id on the hub.
    """
    import datasets

    with hub_or_cache(None if path in _FORMATS else path):
        if path not in _FORMATS:
            files = _own_files(path, options)
            if Path(path).is_dir():
                options["cache_dir"] = str(_kept() / _state(files))
        return datasets.load_dataset(path, streaming=streaming, **options)


def _own_files(path: str, options: Mapping[str, Any]) -> list[str]:
    """The files of a data set, by its README or by their names; all are its own."""
    import datasets

    _check_named_files(path, options)
    given = {key: options[key] for key in ("name", "revision", "data_files") if options.get(key) is not None}
    files = datasets.load_dataset_builder(path, **given).config.data_files or {}
    found = [str(file) for own in files.values() for file in own]
    if odd := next((file for file in found if not _is_own(file, path)), None):
        raise DataError(
            f"{path} names the data file {ascii(odd)[:200]}, which is not one of its own files. Correct `data_files` "
            "in its README.md, or do not use it."
        )
    return found


def _check_named_files(path: str, options: Mapping[str, Any]) -> None:
    """Refuse a dataset that names a data file other than by a plain path below its folder or repository.

    `datasets` hands each name to fsspec, which opens URLs, chains of protocols and templates on the way to a list of
    files.
    """
    named = list(_texts(options.get("data_files")))
    for card in _CARDS:
        configs = _configs(path, card, options.get("revision"))
        parts = [config for config in configs if isinstance(config, dict)] if isinstance(configs, list) else []
        named += [name for part in parts for key in ("data_files", "data_dir") for name in _texts(part.get(key))]
    for name in named:
        try:
            find_below(Path(os.path.realpath(path)), name)
        except FileError as error:
            raise DataError(
                f"{path} names the data file {ascii(name)[:200]}, which is not one of its own files ({error.what}). "
                "Correct `data_files` in its README.md, or do not use it."
            ) from error


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of plain data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _configs(path: str, card: str, revision: str | None) -> Any:
    """The key `configs` of a README's front matter, or of a YAML file."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    try:
        text = read_text_below(Path(path), card) if Path(path).is_dir() else _of_hub(path, card, revision)
        text = (text or "").removeprefix("\ufeff")
        if card.endswith(".md"):
            block = REGEX_YAML_BLOCK.search(text)
            text = block[2] if block else ""
        found = parse_yaml_value(text)
    except (ConfigError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {card} {error}. Correct it, or do not use the data set.") from error
    return found.get("configs") if isinstance(found, dict) else None


def _of_hub(name: str, card: str, revision: str | None) -> str | None:
    """The text of a file of a repository; None where it has none, or where the hub is not asked and none is cached."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return read_text(Path(hf_hub_download(name, card, repo_type="dataset", revision=revision)))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
            raise
        return None


def _kept() -> Path:
    """Where `datasets` stores the rows of folders, by their files: it knows them by their name and README alone."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "folders"


def _store_of(table: Dataset) -> str:
    """The name of the store of a folder's rows; empty for other tables."""
    places = (Path(file["filename"]) for file in table.cache_files)
    return next((place.relative_to(_kept()).parts[0] for place in places if place.is_relative_to(_kept())), "")


def _state(files: Iterable[str]) -> str:
    """A hash of the paths, sizes and times of files."""
    rows = sorted((os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files)
    return sha256_of_values(rows, ascii_only=True)[:24]


def load_saved(folder: Path) -> Any:
    """Call `datasets.load_from_disk` after checking that every table lies in the folder itself."""
    import datasets

    root = folder.resolve()
    splits = parse_object(read_text_below(folder, "dataset_dict.json") or "{}").get("splits", ())
    for part in (root, *(find_below(root, name) for name in splits)):
        for item in parse_object(read_text_below(part, "state.json") or "{}").get("_data_files") or ():
            find_below(part, item["filename"])
    return datasets.load_from_disk(str(folder))


def _is_own(file: str, path: str) -> bool:
    """Whether a data file lies in the folder of the data set, or in its repository on the hub."""
    if not Path(path).is_dir():
        return is_of_set(file, path)
    try:
        find_below(Path(path).resolve(), os.path.abspath(file))
    except FileError:
        return False
    return True


def undecoded(table: Any) -> Any:
    """The table with files as bytes or paths, which are opened by the rules of `data.images` and not by `datasets`."""
    if table.features and hasattr(table, "decode"):  # a stream of the hub decodes in threads, whatever its features
        table = table.decode(False)
    for name, feature in (table.features or {}).items():
        plain = _replaced(feature, lambda file: dataclasses.replace(file, decode=False))
        if plain != feature:
            table = table.cast_column(name, plain)
    return table


def _replaced(feature: Any, change: Callable[[Any], Any]) -> Any:
    """A feature with all features of files, at any depth, changed."""
    import pyarrow

    if isinstance(feature, dict):
        return {name: _replaced(item, change) for name, item in feature.items()}
    if hasattr(feature, "decode"):  # a file, or an object as JSON, which is stored as text
        return change(feature) if pyarrow.types.is_struct(feature()) else feature
    if dataclasses.is_dataclass(feature) and not isinstance(feature, type) and hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_replaced(feature.feature, change))
    return feature


def table_stream(config: SourceConfig) -> Any:
    """The rows of a table in order, as an `IterableDataset` in the arrow format, for `TableRows`."""
    path, name = Path(config.path), config.path.removeprefix("hf:")
    with _loading(config):
        if _is_saved(path):
            stream = _of_split(load_saved(path), config).to_iterable_dataset()
        else:
            stream = undecoded(load_checked(**_arguments(config, name), streaming=True))
    if stream.column_names is not None:
        _check_columns(config, stream.column_names)
    return stream.with_format("arrow")


def stream_of_files(rows: Callable[[list[str]], Iterator[dict[str, Any]]], files: list[str]) -> Any:
    """An `IterableDataset` of what `rows` gives for each of some files: the `file`, and the number of a `row`."""
    import datasets

    features = datasets.Features({"file": datasets.Value("string"), "row": datasets.Value("int64")})
    return datasets.IterableDataset.from_generator(rows, features=features, gen_kwargs={"files": files})


def _streamed(config: SourceConfig, name: str) -> Dataset:
    """The first `limit` rows of a stream, stored here for random access by one process; others wait for it."""
    import datasets

    assert config.limit is not None, "checked by SourceConfig"
    arguments = _arguments(config, name)
    if "data_files" in arguments:
        files = next(iter(arguments["data_files"].values()))
    else:
        files = _own_files(name, arguments) if Path(name).is_dir() else []
    key = sha256_of_values([arguments, _state(files), config.limit], ascii_only=True)[:24]
    folder = cache_folder("data") / "streams" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(folder.with_suffix(".lock"), wait=True):
        if not is_built(folder):
            stream = undecoded(load_checked(**arguments, streaming=True)).take(config.limit)
            table = datasets.Dataset.from_generator(
                lambda: (_fetched(row, name) for row in stream),
                features=_unread(stream.features),
                cache_dir=str(folder.parent / "parts"),
            )
            with building(folder) as part:
                table.save_to_disk(str(part))
    loaded: Dataset = datasets.load_from_disk(str(folder))
    return loaded


def _unread(features: Any) -> Any:
    """The features with pictures and other files as plain bytes and paths, so that `datasets` does not open them."""
    import datasets

    plain = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    return features and datasets.Features(
        {name: _replaced(feature, lambda _: plain) for name, feature in features.items()}
    )


def _fetched(value: Any, name: str) -> Any:
    """A row of a stream with the files of the hub's dataset `name` as bytes; other paths stay paths."""
    if isinstance(value, list):
        return [_fetched(item, name) for item in value]
    if not isinstance(value, dict):
        return value
    path = value.get("path")
    if value.keys() != {"bytes", "path"} or value["bytes"] is not None or not isinstance(path, str):
        return {key: _fetched(item, name) for key, item in value.items()}
    return {"bytes": read_hub_file(path, name), "path": path} if is_of_set(path, name) else value
