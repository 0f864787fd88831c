"""The source of a task's documents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mm_moslora.utils.errors import EvalError


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
    video_frames: int = 8
    """Frames that are shown of a video (the key or column `video`), from its first to its last."""
    video_fps: float | None = None
    """Frames that are shown of a second instead."""
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
    lm_eval_task: str | None = None
    """hf: records of this lm-evaluation-harness task (`metrics.commonsense.LM_EVAL_TASKS`) in the original columns."""
    answer_is: Literal["auto", "letter", "index", "text", "box_xyxy", "box_xywh", "box_norm1"] = "auto"
    """hf: form of the answer to a question with options; auto: a number is an index from 0, text a letter or an
    option. hf and tsv: a box, see `reference_boxes.BoxForm`."""
    where: dict[str, str] = field(default_factory=dict)
    """Only rows with these values, such as `split: validation`; other rows count as dropped."""
    texts: dict[str, str] = field(default_factory=dict)
    """hf: further column -> name of a text file below the folder of the data, such as `subtitle/{videoID}.srt`; without
    that file it is empty."""
    without: tuple[str, ...] = ()
    """annotations: keys, at any depth, without which an annotation is kept as the reference."""
    columns: dict[str, str] = field(default_factory=dict)
    """hf: document field (id, image, video, question, options, answer, category, hint) -> the data set's column. An
    image or a video may be a name with columns in braces, such as `data/{videoID}.mp4`. annotations: id, image and
    category -> the place of a value, such as `page_info.image_path`."""

    def __post_init__(self) -> None:
        if self.video_frames < 1 or (self.video_fps is not None and not self.video_fps > 0):
            raise EvalError(
                f"source.video_frames is {self.video_frames} and video_fps {self.video_fps}; expected 1 or more, and "
                "frames a second above 0."
            )
