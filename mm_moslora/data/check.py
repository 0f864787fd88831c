"""Look at every record and every picture of some sources before a run, and count what there is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from mm_moslora.batch import Eyes
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.conversation import Encoded, Encoder
from mm_moslora.data.dataset import encode_record, image_fault, placeholders_of
from mm_moslora.data.faults import Code, RecordError
from mm_moslora.data.images import ImageError
from mm_moslora.data.pictures import Picture, check_picture, open_picture
from mm_moslora.data.records import Record
from mm_moslora.data.sources import RecordSource, open_sources

SHOWN = 20
"""Faults and repeated ids that a report names; all are counted."""
_TOGETHER = 256


@dataclass(kw_only=True)
class CheckReport:
    """What was found in some sources."""

    sources: list[str]
    """Their paths."""
    max_length: int
    """Tokens that a record may have."""
    max_bad_share: float
    """Share of bad records above which a run stops; 0 when any bad record stops it."""
    records: int = 0
    """Records in all."""
    bad: Counter[Code] = field(default_factory=Counter)
    """Bad records by fault."""
    faults: list[RecordError] = field(default_factory=list)
    """The first `SHOWN` of them."""
    text_only: int = 0
    """Usable records without a picture."""
    one_image: int = 0
    """Usable records with one picture."""
    several_images: int = 0
    """Usable records with more pictures."""
    images: set[str] = field(default_factory=set)
    """Picture files of usable records."""
    answers: int = 0
    """Answers that are trained on."""
    supervised_tokens: int = 0
    """Tokens of the answers and their ends of turn."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each usable record, visual tokens included."""
    truncated: int = 0
    """Usable records that lose turns because they are too long."""
    special_text: int = 0
    """Usable records whose texts spell special tokens; they stay text."""
    repeated_ids: Counter[str] = field(default_factory=Counter)
    """How often an id occurs beyond the first time."""

    @property
    def usable(self) -> int:
        """Records that can be trained on."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Tokens of all usable records, visual tokens included."""
        return sum(self.lengths)

    @property
    def supervised_share(self) -> float:
        """Supervised tokens divided by all."""
        return self.supervised_tokens / max(1, self.tokens)

    @property
    def ok(self) -> bool:
        """Whether a run would start."""
        return self.usable > 0 and self.records - self.usable <= self.max_bad_share * self.records

    def histogram(self, bins: int = 8) -> list[tuple[int, int]]:
        """Lengths as (upper bound in tokens, records) with bounds that double down from `max_length`."""
        bounds = [max(1, self.max_length >> shift) for shift in range(bins - 1, -1, -1)]
        counts = [0] * bins
        for length in self.lengths:
            counts[next(place for place, bound in enumerate(bounds) if length <= bound)] += 1
        return list(zip(bounds, counts, strict=True))


def check(
    sources: Sequence[SourceConfig],
    encoder: Encoder,
    *,
    config: DataConfig,
    vision: bool = True,
    eyes: Eyes | None = None,
    decode: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check sources as a run would use them.

    Args:
        sources: at least one.
        encoder: tokenises.
        config: the recipe's `data`.
        vision: whether the model has a vision encoder.
        eyes: count the tokens of every picture; None: all take as many as the encoder says.
        decode: decode every picture (in threads), not just its header; finds damage inside.
        on_progress: called with (records done, records in all).

    Raises:
        DataError: a source cannot be read at all.
    """
    files = open_sources(sources)
    share = 0.0 if config.on_bad == "error" else config.max_bad_share
    report = CheckReport(sources=[source.path for source in sources], max_length=config.max_length, max_bad_share=share)
    total = sum(len(file) for file in files)
    seen: set[str] = set()
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        for group in _groups(files):
            read = [_read(file, row, encoder, config, vision=vision, eyes=eyes) for file, row in group]
            pictures = pool.map(lambda item: _picture_fault(item, decode=decode), read)
            for item, fault in zip(read, pictures, strict=True):
                _count(report, item, fault, encoder, seen)
            if on_progress is not None:
                on_progress(report.records, total)
    return report


_Read = tuple[Record, Encoded] | RecordError


def _groups(files: Iterable[RecordSource]) -> Iterator[list[tuple[RecordSource, int]]]:
    for file in files:
        for start in range(0, len(file), _TOGETHER):
            yield [(file, row) for row in range(start, min(len(file), start + _TOGETHER))]


def _read(
    file: RecordSource, row: int, encoder: Encoder, config: DataConfig, *, vision: bool, eyes: Eyes | None
) -> _Read:
    try:
        record = file[row]
        pictures = placeholders_of(record, eyes)
        return record, encode_record(record, encoder, max_length=config.max_length, vision=vision, pictures=pictures)
    except RecordError as error:
        return error


def _picture_fault(item: _Read, *, decode: bool) -> RecordError | None:
    if isinstance(item, RecordError):
        return None
    record, encoded = item
    for number, path in enumerate(record.images[: encoded.images]):
        try:
            _look(path, decode=decode)
        except ImageError as error:
            return image_fault(record, number, error)
    return None


def _look(path: Picture, *, decode: bool) -> None:
    if decode:
        open_picture(path)
    else:
        check_picture(path)


def _count(report: CheckReport, item: _Read, fault: RecordError | None, encoder: Encoder, seen: set[str]) -> None:
    report.records += 1
    error = item if isinstance(item, RecordError) else fault
    if error is not None:
        report.bad[error.code] += 1
        if len(report.faults) < SHOWN:
            report.faults.append(error)
        return
    assert not isinstance(item, RecordError)
    record, encoded = item
    if record.id in seen:
        report.repeated_ids[record.id] += 1
    seen.add(record.id)
    kept = record.turns[: len(record.turns) - encoded.dropped_turns]
    report.lengths.append(int(encoded.input_ids.shape[0]))
    report.supervised_tokens += int(encoded.supervised.sum())
    report.answers += sum(turn.role == "assistant" for turn in kept)
    report.truncated += encoded.dropped_turns > 0
    report.special_text += any(encoder.tokens.spells_special(part) for turn in kept for part in turn.parts())
    report.images.update(record.image_names)
    if not record.images:
        report.text_only += 1
    elif len(record.images) == 1:
        report.one_image += 1
    else:
        report.several_images += 1
