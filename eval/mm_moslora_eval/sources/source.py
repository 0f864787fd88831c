"""The source of a task's documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mm_moslora.utils.errors import EvalError, suggestion
from mm_moslora_eval.task_files.task_rules import all_rules, rule


@dataclass(frozen=True, kw_only=True)
class Source:
    """The source of a task's documents."""

    kind: Literal["llava", "tsv", "hf", "annotations"]
    path: str
    """A file (see `source_files.find_file`), or for `hf` a folder, a file or a hub id. Relative to the task file."""
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
    letter or an option, and what could be two of these is an error. hf, tsv: a box, see `reference_boxes.BoxForm`."""
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
