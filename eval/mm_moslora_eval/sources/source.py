"""The source of a task's documents, and its files, which are found relative to the task file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora.utils.identity import sha256_of, sha256_of_bytes
from mm_moslora.utils.untrusted_files import beside as resolve_model_paths
from mm_moslora_eval.task_files.task_rules import all_rules, rule


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a task's documents."""

    kind: Literal["llava", "tsv", "hf", "annotations"]
    path: str
    """A file (see `find_file`), or for `hf` a folder, a file or a hub id. Relative to the task file."""
    image_folder: str | None = None
    """Folder of the pictures named by path, relative to the task file; None: the folder of the data."""
    follow_links: bool = False
    """Accept symbolic links that lead out of the image folder."""
    video_frames: int | None = None
    """Frames that are shown of a video (the key or column `video`), from its first to its last. None: as many as in the
    training of the model; 8 for a model of unknown training."""
    video_fps: float | None = None
    """Frames that are shown of a second instead."""
    video_sampling: Literal["ends", "middles"] = "ends"
    """Where frames lie that are shown as pictures: from the first to the last one, or in the middles of equal parts."""
    video_folder_fps: float | None = None
    """Frames a second of videos that are folders of frames, which clips of them and `video_fps` need."""
    pictures: int | None = None
    """Pictures of every document; one with another number of them is counted as failed."""
    has: tuple[Literal["image", "video", "options"], ...] = ()
    """What every document has: a column for it that is not there is an error, a document without it counted as failed.
    What `columns` or `image_folder` name, some documents must have."""
    drop_without_image: bool = False
    """tsv: leave out rows without a picture (counted)."""
    answer_lists: bool = True
    """tsv: an answer written as a list holds several references."""
    md5: str | None = None
    """Expected checksum of the file."""
    split: str = "test"
    """hf: split."""
    config: str | None = None
    """hf: configuration name, or several with commas, whose rows are joined."""
    revision: str | None = None
    """hf: commit, branch or tag of a set from the hub; None: its main branch. Results name the commit."""
    answer_is: Literal["auto", "letter", "index", "text", "box_xyxy", "box_xywh", "box_norm1"] = "auto"
    """hf: form of the answer to a question with options, and no other counts; auto: a number is an index from 0, text a
    letter or an option, and what could be two of these is an error. hf, tsv: a box, see `answer_options.BoxForm`."""
    unanswerable: tuple[str, ...] = ()
    """Ids of documents whose published reference is none of their options: they are asked, and no answer is right."""
    where: dict[str, str] = field(default_factory=dict)
    """Only rows with these values, such as `split: validation`; each `*` stands for any text (`category: "* en"`).
    Other rows count as dropped."""
    texts: dict[str, str] = field(default_factory=dict)
    """hf: further column -> name of a text file below the folder of the data, such as `subtitle/{videoID}.srt`; without
    that file it is empty."""
    columns: dict[str, str] = field(default_factory=dict)
    """hf: document field (id, image, video, video_start, video_end, question, options, answer, category, hint) -> the
    data set's column. An image or a video may be a name with columns in braces, such as `data/{videoID}.mp4`.
    annotations: id, image and category -> the place of a value, such as `page_info.image_path`."""
    files: dict[str, dict[str, str]] = field(default_factory=dict)
    """hf: data files below `path` -> further columns that are the same in each of their rows, such as a sub-task and
    the folder of its videos; an empty one states that the file has no such column. Empty: all data of `path`."""
    rows: str = ""
    """hf: a name in the `ROWS` of a benchmark's `rules.py`: a function of a row of the table, which gives the rows that
    it stands for, such as the questions in it. A ValueError of it is the problem of the row's document."""

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.video_fps, self.video_folder_fps) if rate is not None]
        if (self.video_frames is not None and self.video_frames < 1) or not all(rate > 0 for rate in rates):
            raise EvalError(
                f"source.video_frames is {self.video_frames}, video_fps {self.video_fps} and video_folder_fps "
                f"{self.video_folder_fps}; expected 1 or more, and frames a second above 0."
            )
        if self.pictures is not None and self.pictures < 0:
            raise EvalError(f"source.pictures is {self.pictures}, expected 0 or more.")
        if self.kind != "hf" and (self.files or self.rows):
            raise EvalError("source.files and rows are for kind hf.")
        if self.rows and rule("ROWS", self.rows) is None:
            known = all_rules("ROWS")
            raise EvalError(f"source.rows {self.rows!r} is not known.{suggestion(self.rows, known)}")

    @property
    def named(self) -> set[str]:
        """What some documents must have, since the task says where it is."""
        folder = {"image_folder"} if self.image_folder else set()
        return {*self.has, *(self.columns.keys() & {"image", "video", "options"}), *folder}

    def rows_of(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The rows that a row of the table stands for."""
        load: Callable[[Mapping[str, Any]], list[dict[str, Any]]] | None = (
            rule("ROWS", self.rows) if self.rows else None
        )
        return [dict(row)] if load is None else load(row)


_DERIVED = "cache-"
"""Prefix of the cache files that `datasets` writes into the folder of the data."""


def find_file(path: str, *, beside: Path | None = None, where: str = "") -> Path:
    """Look a data file up: beside the task file, then below MM_MOSLORA_DATA, LMUData and ~/LMUData."""
    file = _first(path, "Data file", Path.is_file, beside)
    if file is None:
        tried = ", ".join(map(str, _candidates(path, beside)))
        raise EvalError(
            f"Data file {path!r} was not found; looked at {tried}.{where} Put it there or set MM_MOSLORA_DATA to its "
            "folder."
        )
    return file


def find_data(path: str, *, beside: Path | None = None) -> Path | None:
    """A file or folder, looked up as by `find_file`; None if it does not exist, so that it may be an id on the hub."""
    return _first(path, "Data set", Path.exists, beside)


def picture_folder(image_folder: str | None, data: Path, *, beside: Path | None = None) -> Path:
    """The folder of a data file's pictures, resolved: as the task file beside it names it, else that of the data."""
    if image_folder is None:
        return (data if data.is_dir() else data.parent).resolve()
    folder = resolve_model_paths(beside or Path.cwd(), image_folder)
    if folder.is_dir():
        return folder.resolve()
    other = data.parent / image_folder
    hint = f" There is {other}; image folders are relative to the file that names them." if other.is_dir() else ""
    raise EvalError(f"The image folder {image_folder!r} of {data} would be {folder}, which is no folder.{hint}")


def _candidates(path: str, beside: Path | None) -> list[Path]:
    first = resolve_model_paths(beside or Path.cwd(), path)
    if Path(path).expanduser().is_absolute():
        return [first]
    roots = [*(os.environ.get(name) for name in ("MM_MOSLORA_DATA", "LMUData")), Path.home() / "LMUData"]
    return [first, *(Path(root) / path for root in roots if root)]


def _first(path: str, what: str, exists: Callable[[Path], bool], beside: Path | None) -> Path | None:
    """The first candidate that exists, resolved; a path that exists in the working directory alone is refused."""
    candidates = _candidates(path, beside)
    existing = next((candidate for candidate in candidates if exists(candidate)), None)
    if existing is None and exists(Path.cwd() / path):
        raise EvalError(
            f"{what} {path!r} is not at {candidates[0]}, but at {Path.cwd() / path}. Paths in a task file are relative "
            "to the task file, not to the working directory: correct the path, or write an absolute one."
        )
    return existing.resolve() if existing is not None else None


def matches(row: Mapping[str, Any], where: Mapping[str, str] | None) -> bool:
    """Whether a row has the wanted value in every named column; each `*` in it stands for any text."""
    return all(
        fnmatchcase(str(row.get(column)), re.sub(r"[?[]", r"[\g<0>]", wanted))
        for column, wanted in (where or {}).items()
    )


def folder_checksum(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files; equal for a copy in another place."""
    lines = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith((".", _DERIVED)) or not path.is_file():
                continue
            lines.append(f"{path.relative_to(folder).as_posix()}\0{sha256_of(path)}\n")
    return sha256_of_bytes("".join(lines).encode("utf-8", "surrogateescape"))
