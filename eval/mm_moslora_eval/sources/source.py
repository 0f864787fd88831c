"""The source of a task's documents."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mm_moslora.utils.errors import EvalError

_NAME = re.compile(r"\{(\w+)\}")


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
    each: str = ""
    """hf: column with a list of objects, each of which is a document with the columns of its row, its own keys first. A
    row with an empty list counts as dropped."""
    parts: dict[str, str] = field(default_factory=dict)
    """hf: column -> its form, such as `{split}-{number}`; what stands in the braces becomes further columns."""

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.video_fps, self.video_folder_fps) if rate is not None]
        if (self.video_frames is not None and self.video_frames < 1) or not all(rate > 0 for rate in rates):
            raise EvalError(
                f"source.video_frames is {self.video_frames}, video_fps {self.video_fps} and video_folder_fps "
                f"{self.video_folder_fps}; expected 1 or more, and frames a second above 0."
            )
        if self.pictures is not None and self.pictures < 0:
            raise EvalError(f"source.pictures is {self.pictures}, expected 0 or more.")
        if self.kind != "hf" and (self.files or self.each or self.parts):
            raise EvalError("source.files, each and parts are for kind hf.")
        for column, form in self.parts.items():
            if not self._names_of(form):
                raise EvalError(f"source.parts: {form!r} of {column!r} has no {{name}}, or one twice or without a gap.")

    @property
    def names_of_parts(self) -> list[str]:
        """The columns that `parts` makes."""
        return [name for form in self.parts.values() for name in self._names_of(form)]

    @property
    def named(self) -> set[str]:
        """What some documents must have, since the task says where it is."""
        folder = {"image_folder"} if self.image_folder else set()
        return {*self.has, *(self.columns.keys() & {"image", "video", "options"}), *folder}

    def parts_of(self, column: str, value: object) -> dict[str, str] | None:
        """The parts of a value by the form of its column; None where it has another form."""
        pieces = enumerate(_NAME.split(self.parts[column]))
        pattern = "".join(f"(?P<{piece}>.+?)" if number % 2 else re.escape(piece) for number, piece in pieces)
        match = re.fullmatch(pattern, str(value), re.S)
        return match.groupdict() if match else None

    @staticmethod
    def _names_of(form: str) -> list[str]:
        """The names in braces; none where two are the same, one is no name, or nothing stands between two."""
        names = _NAME.findall(form)
        usable = len(set(names)) == len(names) and "}{" not in form and all(name.isidentifier() for name in names)
        return names if usable else []
