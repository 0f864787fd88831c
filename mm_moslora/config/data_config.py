"""Recipes: the training data and their order."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from mm_moslora.config.recipe_keys import FREE, OF_DPO, OWN_LOOP, PATH, VIDEOS, at_least, require

MAX_VIDEO_FRAMES = 8192
"""Most frames that are shown of one video."""
MAX_VIDEO_FPS = 1000


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training records."""

    path: str = field(metadata=PATH | FREE)
    """LLaVA JSON or JSONL, .parquet, .arrow, webdataset .tar (`*` and {000..012} allowed), a folder, or hf:NAME."""
    format: Literal["auto", "json", "table", "webdataset"] = "auto"
    """auto chooses by the path; table is a Hugging Face dataset."""
    image_folder: str | None = field(default=None, metadata=PATH | FREE)
    """Folder of the images; a path that leaves it is refused. None: the folder of `path`."""
    image_hosts: list[str] = field(default_factory=list)
    """Hosts from which images named by URL may be fetched. Each image is fetched once. Empty: no host is allowed."""
    video_frames: int = field(default=8, metadata=VIDEOS)
    """Number of frames taken from a video, as the model's own video processor chooses them, or evenly spaced where it
    has none and each frame is an image of the record."""
    video_fps: float | None = field(default=None, metadata=VIDEOS)
    """Frames per second taken from a video instead of `video_frames`."""
    weight: float = field(default=1.0, metadata=OWN_LOOP)
    """Repeats of each record per epoch (0.5: every other record, 2: twice). With data.mixing parts, and with
    streams: the source's part of the records."""
    replay: bool = False
    """Older data that keeps a model from forgetting: `weight` is its share of all records (0.05: one in twenty),
    however many records it and the other sources have."""
    limit: int | None = None
    """Use at most this many records."""
    limit_by: Literal["random", "first"] = "random"
    """Choice of records under a limit: a fixed random choice, or the first records."""
    hold_out: int = 0
    """data.train only: records that are taken out of the source, by a fixed random choice, and validated on instead.
    They may share pictures with others; name a file of its own in data.validation where that matters."""
    follow_links: bool = False
    """Accept symbolic links that lead out of the image folder (download caches that link to a store need it)."""
    subset: str | None = None
    """Hugging Face datasets: the configuration's name."""
    split: str = "train"
    """Hugging Face datasets: the split."""
    revision: str | None = None
    """Hugging Face datasets: commit, tag or branch."""
    columns: dict[str, str] = field(default_factory=dict)
    """Hugging Face datasets: record field -> column, such as question: query, answer: label, image: picture."""
    streaming: bool = False
    """Read the source in order, never as a whole, and begin again after its last record: `.jsonl` and `.tar` files (a
    folder, `*`), tables, hf:NAME. It needs train.steps. With `limit` and limit_by first, of a Hugging Face dataset: the
    first rows are read from the stream once, and kept on this machine."""

    def __post_init__(self) -> None:
        source = f"data source {self.path!r}"
        require(0 < self.weight <= 1e6, f"{source}: weight is {self.weight}, expected more than 0, finite.")
        require(
            not self.replay or self.weight < 1,
            f"{source}: replay is set and weight is {self.weight}, expected its share of all records: below 1, such as "
            "0.05.",
        )
        frames, fps = self.video_frames, self.video_fps
        require(
            1 <= frames <= MAX_VIDEO_FRAMES,
            f"{source}: video_frames is {frames}, expected at least 1, at most {MAX_VIDEO_FRAMES}.",
        )
        require(
            fps is None or 0 < fps <= MAX_VIDEO_FPS,
            f"{source}: video_fps is {fps}, expected more than 0, at most {MAX_VIDEO_FPS}.",
        )
        require(self.limit is None or self.limit >= 1, f"{source}: limit is {self.limit}, expected 1 or more.")
        at_least(f"{source}: hold_out", self.hold_out, 0)
        require(
            not self.streaming or self.limit is None or self.limit_by == "first",
            f"{source}: streaming and limit are set, so set limit_by: first; the stream is read up to the limit.",
        )
        require(
            not (self.endless and self.hold_out),
            f"{source}: hold_out is {self.hold_out}, and nothing can be taken out of a stream. Name a file of its own "
            "in data.validation.",
        )

    @property
    def endless(self) -> bool:
        """Whether it is read as a stream without an end."""
        return self.streaming and self.limit is None


class HeldOut(SourceConfig):
    """The records that a source of data.train holds out; see `DataConfig.held_out`."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training data and their order."""

    train: list[SourceConfig] = field(default_factory=list)
    """Sources that are mixed."""
    validation: list[SourceConfig] = field(default_factory=list, metadata=FREE)
    """Held-out sources for the validation loss, besides the records of data.train's `hold_out`; may be empty."""
    mixing: Literal["repeats", "parts"] = field(default="repeats", metadata=OWN_LOOP)
    """Meaning of `weight`: repeats per record, or parts of the epoch (weights 3 and 1: three quarters and one
    quarter)."""
    epoch_records: int | None = field(default=None, metadata=OWN_LOOP)
    """mixing parts only: records per epoch; None: the number of records in the sources."""
    max_length: int = 2048
    """Most tokens per example, visual tokens included. A longer example loses whole turns at the end; an image is never
    cut."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """Handling of a record whose first question and answer do not fit: refuse counts it as unusable, drop leaves it out
    without counting it against max_bad_share, truncate cuts any longer text off at max_length, within an answer too. A
    record with pictures is never cut, nor one that would keep no supervised token; truncate refuses these."""
    train_on: Literal["answers", "all"] = field(default="answers", metadata=OWN_LOOP)
    """Tokens that the loss is on: answers and their ends of turn, or the whole text (with model.language alone)."""
    supervise: Literal["all", "last"] = field(default="all", metadata=OWN_LOOP)
    """Answers that are learned, with the weights that a record gives them: all, or the last of each record; the others
    are context."""
    order: Literal["grouped", "random", "sequential"] = "grouped"
    """grouped: steps of one modality and similar lengths, so that ranks finish together. random. sequential: the order
    of the files."""
    on_bad: Literal["error", "quarantine"] = "quarantine"
    """How to handle a record that cannot be used: stop, or write it to quarantine.jsonl and go on."""
    max_bad_share: float = 0.01
    """The run stops when more than this share of the records cannot be used."""
    workers: int | None = field(default=None, metadata=FREE)
    """Worker processes that prepare examples ahead of the step; 0: a thread prepares them. None: beside a GPU up to 8,
    as the cores and the shared memory of the rank allow; 0 on a CPU."""
    cache: str | None = field(default=None, metadata=PATH | FREE | OWN_LOOP)
    """Folder of tokenised records that all runs share; None: no cache."""
    shuffle_buffer: int = field(default=1024, metadata=OWN_LOOP)
    """Streams without an end: usable records that are read ahead, shuffled, and grouped by length or packed together;
    rounded up to whole steps. Every rank keeps two buffers in memory, with the pictures of tables."""
    pack_tokens: int = field(default=0, metadata=OF_DPO)
    """Pack examples into rows of up to this many tokens; train.global_batch and micro_batch then count rows. 0: off.
    objective dpo: a pair counts its prompt once, where both answers can share it."""

    @property
    def longest_key(self) -> str:
        """The key that bounds what is never cut: an example, or a packed row."""
        return "data.pack_tokens" if self.pack_tokens else "data.max_length"

    @property
    def longest(self) -> int:
        """Most tokens of an example, or of a packed row."""
        return self.pack_tokens or self.max_length

    @property
    def endless(self) -> bool:
        """Whether a source of data.train is a stream without an end; then all are read as streams."""
        return any(source.endless for source in self.train)

    @property
    def video_sampling(self) -> tuple[int | None, float | None]:
        """Frames, or frames a second, that all sources of data.train show of a video; None, None where they differ."""
        shown = {(None if source.video_fps else source.video_frames, source.video_fps) for source in self.train}
        return shown.pop() if len(shown) == 1 else (None, None)

    @property
    def held_out(self) -> list[SourceConfig]:
        """All sources of the validation loss: data.validation, and what sources of data.train hold out."""
        shares = [{item.name: getattr(source, item.name) for item in fields(source)} for source in self.train
                 if source.hold_out]  # fmt: skip
        return [*self.validation, *(HeldOut(**values | {"weight": 1.0}) for values in shares)]

    def __post_init__(self) -> None:
        for source in self.validation:
            require(
                source.hold_out == 0, f"data.validation, {source.path!r}: hold_out is for data.train. Leave it out."
            )
            require(
                not source.endless,
                f"data.validation, {source.path!r}: streaming is set without limit, and a validation has an end. Set "
                "limit and limit_by: first, or name a file.",
            )
        replayed = [source.weight for source in self.train if source.replay]
        require(
            not replayed or (len(replayed) < len(self.train) and sum(replayed) < 1),
            f"data.train replays {len(replayed)} of {len(self.train)} sources, with {sum(replayed):g} of all records. "
            "Leave at least one source without replay, and let the weights of the others add up to less than 1.",
        )
        self._check_streams()
        at_least("data.max_length", self.max_length, 8)
        at_least("data.workers", self.workers or 0, 0)
        require(
            self.pack_tokens == 0 or self.pack_tokens >= self.max_length,
            f"data.pack_tokens is {self.pack_tokens}, expected 0 or at least data.max_length ({self.max_length}).",
        )
        require(
            self.train_on == "answers" or self.supervise == "all",
            f"data.train_on is {self.train_on!r} and data.supervise {self.supervise!r}: the whole text and the last "
            "answer alone exclude each other. Leave one of them out.",
        )
        require(
            self.epoch_records is None or (self.mixing == "parts" and self.epoch_records >= 1),
            f"data.epoch_records is {self.epoch_records}; it needs data.mixing: parts and 1 or more.",
        )
        require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}, expected 0 to 1.")

    def _check_streams(self) -> None:
        at_least("data.shuffle_buffer", self.shuffle_buffer, 1)
        if not self.endless:
            return
        require(
            self.cache is None,
            f"data.cache is {self.cache!r}, and a source of data.train has streaming without limit: a stream is never "
            "tokenised as a whole. Leave data.cache out.",
        )
        require(
            self.epoch_records is None,
            f"data.epoch_records is {self.epoch_records}, and a stream without an end has no epochs. Leave it out; "
            "train.steps ends the run.",
        )
        for source in self.train:
            require(
                source.hold_out == 0,
                f"data source {source.path!r} has hold_out: {source.hold_out} beside a stream without an end. Name a "
                "file of its own in data.validation.",
            )
