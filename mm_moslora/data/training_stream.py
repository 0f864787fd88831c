"""Training data without an end: windows of usable records that are read ahead, each planned like an epoch.

Every rank tokenises a share of the records, and learns from the others what it needs to plan the same steps; then it
prepares the records of its own steps. The order depends on the seed, and not on the number of ranks. The place of a run
in its data is the beginning of a window and the steps done since.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.segment_encoder import Encoded
from mm_moslora.data.chat.thinking_form import SAMPLED, ThinkingForm, settled
from mm_moslora.data.epoch_order import with_replay
from mm_moslora.data.quarantine import StreamQuarantine, summary
from mm_moslora.data.record_examples import MeasuredRecords, RecordExamples
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.endless_sources import Reads, open_endless, what_changed
from mm_moslora.data.sources.open_sources import require_sources
from mm_moslora.data.stream_share import RecordSize, StoppedError, StreamShare
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import CheckpointError, DataError

logger = logging.getLogger(__name__)

_BEGINNINGS = 16
"""Beginnings of windows that are kept; steps are prepared a few ahead, and a window has at least one."""
_Known = tuple[Record, Encoded]
_HOPELESS = 10_000
"""Records in a row without a usable one that end a run."""


@dataclass(frozen=True, kw_only=True)
class StreamPlace:
    """Where a window begins."""

    window: int = 0
    """Its number."""
    step: int = 0
    """Optimiser steps before it."""
    taken: tuple[int, ...]
    """Records read before it, by source."""
    sources: tuple[dict[str, Any], ...]
    """The places of the sources."""


class _Entry(NamedTuple):
    """A record of a window."""

    number: int
    """In the stream."""
    reads: Reads
    size: RecordSize
    known: _Known | None
    """The record and its tokens; None where another rank has measured it."""


class Window(MeasuredRecords):
    """The usable records of a stretch of a stream, with their tokens.

    Args:
        stream: to which it belongs.
        place: where it begins.
        entries: its records.
    """

    def __init__(self, stream: TrainingStream, place: StreamPlace, entries: Sequence[_Entry]) -> None:
        super().__init__((), stream.encoder, stream.image_processing, stream.config)
        self.stream, self.place, self._entries = stream, place, entries
        self.members, self.weights = [range(len(entries))], [1.0]
        self.lengths = array("L", (entry.size.length for entry in entries))
        self.has_image = bytearray(bool(entry.size.pictures) for entry in entries)
        self.exact = stream.image_processing is None or stream.image_processing.fixed

    def __len__(self) -> int:
        return len(self._entries)

    def record(self, index: int) -> Record:
        """See `RecordExamples.record`; one that another rank has measured is read now."""
        entry = self._entries[index]
        return entry.reads() if entry.known is None else entry.known[0]

    def encoded(self, index: int, record: Record) -> Encoded:
        """The tokens of a record, made when it was measured, or now."""
        known = self._entries[index].known
        return self.encode(record) if known is None else known[1]

    def leave_out(self, index: int, error: RecordError) -> None:
        """See `MeasuredRecords.leave_out`."""
        self.stream.leave_out(self._entries[index].number, error)


class TrainingStream(RecordExamples):
    """The records of sources of which one or more have no end, in windows.

    Args:
        sources: mixed by the ratios of their weights.
        encoder: tokenises.
        image_processing: turns pictures into tensors; None for a language model alone.
        config: the recipe's `data`.
        seed: of the order.
        global_batch: records, or packed rows, of a step.
        fresh: whether the run starts, so that `thinking: auto` follows the first records and the quarantine is new.
        quarantine_path: file for bad records.
        share: of this rank; None: it measures all records.

    Raises:
        DataError: a source cannot be read.
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
        share: StreamShare | None = None,
    ) -> None:
        require_sources(sources)
        super().__init__((), encoder, image_processing, config)
        self.share = share
        shuffled = config.order != "sequential"
        self.sources = [
            open_endless(source, f"data.train.{index}", seed=seed, shuffled=shuffled, processing=image_processing)
            for index, source in enumerate(sources)
        ]
        parts = with_replay([source.weight for source in sources], [source.replay for source in sources])
        self.parts = [part / sum(parts) for part in parts]
        """Parts of the records, by source."""
        self.size = -(-config.shuffle_buffer // global_batch) * global_batch
        """Usable records of a window."""
        self.quarantine = StreamQuarantine(quarantine_path, config, fresh=fresh)
        self.contents = [source.contents() for source in self.sources]
        if share is not None:
            self._require_those_of_main(share)
        self.fingerprint = hashlib.sha256(repr([self.parts, *self.contents]).encode()).hexdigest()
        """A hash of the sources."""
        self._window: Window | None = None
        self._ahead: queue.Queue[Window | Exception] | None = None
        self._stop = threading.Event()
        start = StreamPlace(taken=(0,) * len(sources), sources=tuple(source.place() for source in self.sources))
        self.form: ThinkingForm | None = None
        if fresh:
            self.encoder, self.form = settled(encoder, [self._first_records()], config.supervise)
        self._go_to(start)

    @property
    def commits(self) -> dict[str, str]:
        """Commits of sources of the hub, by recipe key; a stream's is its `revision`."""
        return {}

    @property
    def at_hand(self) -> Window:
        """The window at hand."""
        if self._window is None:
            self._window = self._told()
        return self._window

    def read_ahead(self) -> None:
        """Read the window behind the one at hand in a thread."""
        self._stop.clear()
        if self._ahead is None:
            self._ahead = queue.Queue()
            threading.Thread(target=self._work, args=(self._ahead,), name="stream", daemon=True).start()

    def halt(self) -> None:
        """Let no thread wait for a further window."""
        self._stop.set()

    def stop(self) -> None:
        """End the thread that reads ahead; the stream is not used again, unless it goes to a place."""
        self._stop.set()
        if self._ahead is not None:
            with suppress(queue.Empty):  # a source that hangs
                self._ahead.get(timeout=30)

    def next_window(self, *, steps: int) -> Window:
        """Go on behind a window of so many steps; the window behind the new one is then read ahead.

        Raises:
            DataError: a source broke off, or too many records cannot be used.
        """
        before = self.at_hand.place
        self.read_ahead()
        assert self._ahead is not None
        read, self._ahead = self._ahead.get(), None
        if isinstance(read, Exception):
            raise read
        read.place = replace(read.place, step=before.step + steps)
        self._beginnings.append(read.place)
        self._window = read
        self.read_ahead()
        return read

    def place(self, step: int) -> dict[str, Any]:
        """The place of a run behind an optimiser step, and what the sources hold, as JSON."""
        place = next(place for place in reversed(tuple(self._beginnings)) if place.step <= step)
        return asdict(place) | {"contents": self.contents}

    def what_changed(self, stored: dict[str, Any]) -> str:
        """The files of sources that differ from those of a `place`; empty where no file does, or none is known."""
        pairs = zip(self.sources, stored.get("contents", ()), self.contents, strict=False)
        faults = [(source, what_changed(before, now)) for source, before, now in pairs]
        return "; ".join(f"{source.key} ({source.config.path}): {fault}" for source, fault in faults if fault)

    def go_to(self, stored: dict[str, Any]) -> None:
        """Go on from a place.

        Raises:
            CheckpointError: it is not a place of this stream.
        """
        try:
            self._go_to(
                StreamPlace(
                    window=stored["window"], step=stored["step"], taken=tuple(stored["taken"]),
                    sources=tuple(stored["sources"]),
                )
            )  # fmt: skip
        except (TypeError, LookupError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint holds no place in the stream of the training data ({error!r}). Choose another one."
            ) from error
        self.quarantine.remember()

    def leave_out(self, number: int, error: RecordError, *, write: bool = True) -> None:
        """Put a record in quarantine.

        Raises:
            DataError: `on_bad` is error, or the share of bad records is too large.
        """
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
            "records": sum(self._coming.taken),
            "unusable": len(self.quarantine),
            "empty_files": sum(len(source.empty) for source in self.sources),
            "with_pictures": sum(window.has_image),
            "tokens": sum(lengths),
            "tokens_per_record_median": lengths[len(lengths) // 2],
            "tokens_per_record_longest": lengths[-1],
        }

    def _require_those_of_main(self, share: StreamShare) -> None:
        """Refuse files that are others than those of rank 0, whose steps this rank could not plan."""
        if faults := self.what_changed({"contents": share.of_main(self.contents)}):
            raise DataError(f"Rank {share.rank} finds other training data than rank 0: {faults}. Give all the same.")

    def _first_records(self) -> list[Record]:
        """Some records from the beginning, which are read again later."""
        records: list[Record] = []
        taken = [0] * len(self.sources)
        for _ in range(2 * SAMPLED):
            try:
                records.append(self.sources[self._next_source(taken)].take()())
            except RecordError:  # counted when it is read again
                continue
            if len(records) == min(SAMPLED, self.size):
                break
        return records

    def _next_source(self, taken: list[int]) -> int:
        """The source that is furthest behind its part, which is counted as taken."""
        total = sum(taken) + 1
        number = max(range(len(taken)), key=lambda index: (self.parts[index] * total - taken[index], -index))
        taken[number] += 1
        return number

    def _go_to(self, place: StreamPlace) -> None:
        if self.share is not None:
            self.share.begin()
        for source, at in zip(self.sources, place.sources, strict=True):
            source.seek(at)
        self._coming, self._window, self._ahead = place, None, None
        self._beginnings = deque([place], maxlen=_BEGINNINGS)

    def _told(self) -> Window:
        """The next window, or an error, of which other ranks learn."""
        try:
            return self._read()
        except Exception as error:
            if self.share is not None and not isinstance(error, StoppedError):
                self.share.fail(error)
            raise

    def _read(self) -> Window:
        """Read the next window of the sources."""
        entries: list[_Entry] = []
        place, misses = self._coming, 0
        taken = list(place.taken)
        while len(entries) < self.size:
            asked: dict[int, Reads] = {}
            for _ in range(self.size - len(entries)):  # bad ones are replaced in another round
                number = sum(taken)
                asked[number] = self.sources[self._next_source(taken)].take()
            for number, (found, known) in self._measured(asked).items():
                if isinstance(found, RecordError):  # every rank learns of it
                    self.quarantine.read(number + 1)
                    self.leave_out(number, found, write=distributed.is_main())
                    misses += 1
                else:
                    entries.append(_Entry(number, asked[number], found, known))
                    misses = 0
                if misses >= _HOPELESS:
                    raise DataError(
                        f"{misses} records in a row cannot be used: {summary(self.quarantine.codes)}. The first one: "
                        f"{self.quarantine.first}. Look at the sources of data.train."
                    )
        self.quarantine.read(sum(taken))
        places = tuple(source.place() for source in self.sources)
        self._coming = StreamPlace(window=place.window + 1, taken=tuple(taken), sources=places)
        return Window(self, place, entries)

    def _measured(self, asked: dict[int, Reads]) -> dict[int, tuple[RecordSize | RecordError, _Known | None]]:
        """What is found in records, by their numbers, and those that this rank has read."""
        found: dict[int, RecordSize | RecordError] = {}
        known: dict[int, _Known] = {}
        for number, reads in asked.items():
            if self._stop.is_set():
                raise StoppedError("The stream is not read any further.")
            if self.share is not None and not self.share.mine(number):
                continue
            try:
                record = reads()
                known[number] = record, self.encode(record)
            except RecordError as error:
                found[number] = error
                continue
            length = int(known[number][1].input_ids.shape[0])
            found[number] = RecordSize(length=length, pictures=len(record.images))
        if self.share is not None:
            found = self.share.gathered(found, self._stop)
        return {number: (found[number], known.get(number)) for number in asked}

    def _work(self, ahead: queue.Queue[Window | Exception]) -> None:
        try:
            ahead.put(self._told())
        except Exception as error:  # raised by `next_window`
            ahead.put(error)
