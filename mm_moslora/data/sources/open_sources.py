"""Where records come from: JSON and JSONL files, Hugging Face tables (parquet among them), webdataset tar files.

Every source is random access by row number, so that the order of training depends on a seed alone.
"""

from __future__ import annotations

import glob
import random
from collections.abc import Sequence
from pathlib import Path

from mm_moslora.config import SourceConfig
from mm_moslora.data.images.locate_image import PictureRules
from mm_moslora.data.sources.json_file import require_file
from mm_moslora.data.sources.record_source import RecordFile, RecordSource, Selection
from mm_moslora.utils.errors import DataError

TABLE_SUFFIXES = (".parquet", ".arrow")


def require_sources(sources: Sequence[SourceConfig]) -> None:
    """Refuse sources whose files or picture folders are not there, by their paths alone.

    Raises:
        DataError: none is named, or a path leads nowhere.
    """
    if not sources:
        raise DataError("No data source is named. Add one to data.train, with the path of a LLaVA JSON or JSONL file.")
    for config in sources:
        kind, path = _kind_of(config), Path(config.path)
        if kind == "json":
            require_file(path)
        elif kind == "webdataset":
            from mm_moslora.data.sources.webdataset_tars import files_of

            files_of(config.path)
        elif path.suffix in TABLE_SUFFIXES and not path.exists() and not glob.glob(config.path):
            raise DataError(f"No file matches {config.path}. Check its path.")
        _rules(config, path.parent)


def open_source(config: SourceConfig) -> RecordSource:
    """Open one source by its configuration.

    Raises:
        DataError: it is missing, of no known kind, or cannot be read.
    """
    kind = _kind_of(config)
    if kind == "json":
        source: RecordSource = RecordFile(Path(config.path), _rules(config, Path(config.path).parent))
    elif kind == "webdataset":
        from mm_moslora.data.sources.webdataset_tars import TarSource

        source = TarSource(config.path, _rules(config, Path(config.path).parent))
    else:
        from mm_moslora.data.sources.hf_tables import TableSource

        path = Path(config.path)
        source = TableSource(config, _rules(config, path if path.is_dir() else path.parent))
    if config.limit is None or config.limit >= len(source):
        return source
    rows = range(config.limit)
    if config.limit_by == "first":
        return Selection(source, rows)
    # Of its own seed, so that runs that differ in seed alone see the same records.
    return Selection(source, sorted(random.Random("limit").sample(range(len(source)), config.limit)))


def open_sources(sources: Sequence[SourceConfig]) -> list[RecordSource]:
    """Open several sources.

    Raises:
        DataError: none is named, or one cannot be read.
    """
    require_sources(sources)
    return [open_source(source) for source in sources]


def _rules(config: SourceConfig, beside: Path) -> PictureRules:
    folder = Path(config.image_folder) if config.image_folder else beside
    if config.image_folder and not folder.is_dir():
        raise DataError(
            f"image_folder of {config.path} is {folder}, which is no folder. Name the folder of its images."
        )
    return PictureRules(
        folder=folder.resolve(),
        follow_links=config.follow_links,
        hosts=tuple(host.lower() for host in config.image_hosts),
        video_frames=config.video_frames,
    )


def _kind_of(config: SourceConfig) -> str:
    """The kind of a source, told by its path where nothing else says it."""
    path, lower = config.path, config.path.lower()
    if config.format != "auto":
        return config.format
    if lower.startswith("hf:") or Path(path).is_dir() or lower.endswith(TABLE_SUFFIXES):
        return "table"
    if lower.endswith((".tar", ".tar.gz", ".tgz", ".tar.zst")):
        return "webdataset"
    return "json"
