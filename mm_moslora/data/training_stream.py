"""Training data without an end: windows of usable records that are read ahead, each planned like an epoch.

Every rank reads and tokenises all records, from which all plan the same steps; then it prepares the records of its own
steps. The order depends on the seed, and not on the number of ranks. The place of a run in its data is the beginning of
a window and the steps done since.
"""

from __future__ import annotations

import logging
import threading
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.thinking_form import SAMPLED, ThinkingForm, settled
from mm_moslora.data.epoch_order import with_replay
from mm_moslora.data.quarantine import StreamQuarantine, summary
from mm_moslora.data.record_examples import MeasuredRecords, RecordExamples
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.endless_sources import EndlessSource, what_changed
from mm_moslora.data.sources.open_sources import require_sources
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, DataError
from mm_moslora.utils.identity import sha256_of_text

logger = logging.getLogger(__name__)

_BEGINNINGS = 16
"""Beginnings of windows that are kept; steps are prepared a few ahead, and a window has at least one."""
_HOPELESS = 10_000
"""Records at the beginning of a window without a usable one that end a run."""


class StreamPlace(NamedTuple):
    """Where a window begins: its number, the optimiser steps before it, and records read and place of each source."""

    window: int
    step: int
    taken: Sequence[int]
    sources: Sequence[dict[str, Any]]


class _Entry(NamedTuple):
    """A record of a window, and its number in the stream."""

    number: int
    record: Record
    encoded: Encoded


class Window(MeasuredRecords):
    """The usable records of a stretch of a stream, with their tokens."""

    def __init__(self, stream: TrainingStream, place: StreamPlace, entries: Sequence[_Entry]) -> None:
        super().__init__((), stream.encoder, stream.image_processing, stream.config)
        self.stream, self.place, self._entries = stream, place, entries
        self.members, self.weights = [range(len(entries))], [1.0]
        self.lengths = array("L", (len(entry.encoded.input_ids) for entry in entries))
        self.has_image = bytearray(bool(entry.record.images) for entry in entries)
        self.exact = stream.image_processing is None or stream.image_processing.fixed

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        """See `RecordExamples.record`."""
        return self._entries[index].record

    def encoded(self, index: int, record: Record) -> Encoded:
        """The tokens of a record, made when it was read."""
        return self._entries[index].encoded

    def leave_out(self, index: int, error: RecordError) -> None:
        """See `MeasuredRecords.leave_out`."""
        self.stream.leave_out(self._entries[index].number, error)


class TrainingStream(RecordExamples):
    """The records of sources of which one or more have no end, in windows, mixed by the ratios of their weights.

    Only at the `fresh` start of a run `thinking: auto` follows the first records, and the quarantine is new.
    """

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: ConversationEncoder,
        image_processing: ImageProcessing | None,
        *,
        config: DataConfig,
        seed: int,
        global_batch: int,
        fresh: bool = True,
        quarantine_path: Path | None = None,
    ) -> None:
        require_sources(sources)
        super().__init__((), encoder, image_processing, config)
        shuffled = config.order != "sequential"
        self.sources = [
            EndlessSource(source, f"data.train.{index}", seed=seed, shuffled=shuffled, processing=image_processing)
            for index, source in enumerate(sources)
        ]
        parts = with_replay([source.weight for source in sources], [source.replay for source in sources])
        self.parts = [part / sum(parts) for part in parts]
        """Parts of the records, by source."""
        self.size = -(-config.shuffle_buffer // global_batch) * global_batch
        """Usable records of a window."""
        self.quarantine = StreamQuarantine(quarantine_path, config, fresh=fresh)
        self.contents = [source.contents() for source in self.sources]
        self.fingerprint = sha256_of_text(repr([self.parts, self.contents]))
        """A hash of the sources."""
        self._stop = threading.Event()
        self._window: Window | None = None
        self._ahead: Future[Window] | None = None
        self.form: ThinkingForm | None = None
        start = StreamPlace(0, 0, [0] * len(sources), [source.place() for source in self.sources])
        self._go_to(start)
        if fresh:
            self.encoder, self.form = settled(encoder, [self._first_records()], config.supervise)
            self._go_to(start)

    commits: Mapping[str, str] = {}
    """Of no source: that of a stream is its `revision`."""

    @property
    def at_hand(self) -> Window:
        """The window at hand."""
        if self._window is None:
            self._window = self._read()
        return self._window

    def read_ahead(self) -> None:
        """Read the window behind the one at hand in a thread."""
        if self._ahead is None:
            ahead = self._ahead = Future()

            def work() -> None:
                try:
                    ahead.set_result(self._read())
                except Exception as error:  # raised by `next_window`
                    ahead.set_exception(error)

            threading.Thread(target=work, name="stream", daemon=True).start()

    def stop(self) -> None:
        """End the thread that reads ahead; the stream is not used again, unless it goes to a place."""
        self._stop.set()
        if self._ahead is not None:
            wait([self._ahead], timeout=30)  # a source may hang

    def next_window(self, *, steps: int) -> Window:
        """Go on behind a window of so many steps; the window behind the new one is then read ahead."""
        before = self.at_hand.place
        self.read_ahead()
        assert self._ahead is not None
        self._window = read = self._ahead.result()
        read.place = read.place._replace(step=before.step + steps)
        self._beginnings.append(read.place)
        self._ahead = None
        self.read_ahead()
        return read

    def place(self, step: int) -> dict[str, Any]:
        """The place of a run behind an optimiser step, and what the sources hold, as JSON."""
        place = next(place for place in reversed(tuple(self._beginnings)) if place.step <= step)
        return place._asdict() | {"contents": self.contents}

    def what_changed(self, stored: dict[str, Any]) -> str:
        """The files of sources that differ from those of a `place`; empty where no file does, or none is known."""
        pairs = zip(self.sources, stored["contents"], self.contents, strict=False)
        faults = [(source, what_changed(before, now)) for source, before, now in pairs]
        return "; ".join(f"{source.key} ({source.config.path}): {fault}" for source, fault in faults if fault)

    def go_to(self, stored: dict[str, Any]) -> None:
        """Go on from a place."""
        try:
            self._go_to(StreamPlace(**{key: stored[key] for key in StreamPlace._fields}))
        except (TypeError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint holds no place in the stream of the training data ({error!r}). Choose another one."
            ) from error
        self.quarantine.remember()

    def leave_out(self, number: int, error: RecordError, *, write: bool = True) -> None:
        """Put a record in quarantine."""
        if number not in self.quarantine:
            logger.warning("Left out: %s", error)
        self.quarantine.add(number, error, write=write)

    def identity(self, key: str) -> dict[str, object]:
        """What must be the same on every rank, by name; see `TrainingSet.identity`."""
        return {f"the fingerprint of {key}": self.fingerprint[:12]}

    def statistics(self) -> dict[str, float]:
        """Counts for a report, of the records read so far and of the window at hand."""
        window = self.at_hand
        lengths = sorted(window.lengths)
        return {
            "records": sum(self._taken),
            "unusable": len(self.quarantine),
            "empty_files": sum(len(source.empty) for source in self.sources),
            "with_pictures": sum(window.has_image),
            "tokens": sum(lengths),
            "tokens_per_record_median": lengths[len(lengths) // 2],
            "tokens_per_record_longest": lengths[-1],
        }

    def _first_records(self) -> list[Record]:
        """Some records from the beginning, which are read again later."""
        records: list[Record] = []
        for _ in range(2 * SAMPLED):
            with suppress(RecordError):  # counted when it is read again
                records.append(self._take())
            if len(records) == min(SAMPLED, self.size):
                break
        return records

    def _take(self) -> Record:
        """Read the next record, of the source that is furthest behind its part."""
        taken = self._taken
        total = sum(taken) + 1
        number = max(range(len(taken)), key=lambda index: (self.parts[index] * total - taken[index], -index))
        taken[number] += 1
        return self.sources[number].take()

    def _go_to(self, place: StreamPlace) -> None:
        self._stop.clear()
        for source, at in zip(self.sources, place.sources, strict=True):
            source.seek(at)
        self._windows, self._taken = int(place.window), list(place.taken)
        self._beginnings = deque([place], maxlen=_BEGINNINGS)
        self._window = self._ahead = None

    def _read(self) -> Window:
        """Read the next window of the sources."""
        step = self._beginnings[-1].step  # `next_window` knows that of a later one
        place = StreamPlace(self._windows, step, list(self._taken), [source.place() for source in self.sources])
        entries: list[_Entry] = []
        while len(entries) < self.size:  # bad ones are replaced
            if self._stop.is_set():
                raise DataError("The stream is not read any further.")
            number = sum(self._taken)
            self.quarantine.read(number + 1)
            try:
                record = self._take()
                entries.append(_Entry(number, record, self.encode(record)))
            except RecordError as error:  # every rank finds it
                self.leave_out(number, error, write=distributed.is_main())
            if not entries and number - sum(place.taken) >= _HOPELESS:
                raise DataError(
                    f"{_HOPELESS} records in a row cannot be used: {summary(self.quarantine.codes)}. The first one: "
                    f"{self.quarantine.first}. Look at the sources of data.train."
                )
        for source in self.sources:
            source.require_unchanged()
        self._windows += 1
        return Window(self, place, entries)
