"""Checks every record and every picture of some sources before a run, in parallel, and collects statistics."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import NamedTuple

import numpy as np
from PIL import Image

from mm_moslora.batch import ImageProcessing
from mm_moslora.config import DataConfig, Objective, SourceConfig
from mm_moslora.data.chat.answer_thinking import masked_block
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.thinking_form import Ending, ThinkingForm, ending, form_of
from mm_moslora.data.chat.tool_records import names_not_offered
from mm_moslora.data.images.video_clip import Clip, Frame
from mm_moslora.data.record_examples import encode_record, faults_of_picture
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.data.sources.open_sources import open_sources
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.data.worker_processes import in_processes, usable_processes
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of_text

DISTANCE = 3
"""Bits of 64 that may differ. Of two hashes this close, at least one of four bands of 16 bits is equal."""
COLOUR_DISTANCE = 16
"""Largest difference of mean colours (per channel, of 255); needed because flat pictures have equal gradients."""
_BANDS = 4
_TOGETHER = 128
_SHORT_ANSWER = 60
_OF_RECIPE = ("sources", "max_length", "max_bad_share", "too_long", "form")
"""Fields of a report that all its parts have in common, or that follow from the others."""


class Fingerprint(NamedTuple):
    """The perceptual hash and mean colour of a picture."""

    gradient: int
    """64 bits: whether grey grows to the right, in 8 x 8 cells."""
    colour: tuple[int, int, int]
    """Mean red, green and blue."""


class Match(NamedTuple):
    """Two pictures with similar fingerprints."""

    first: str
    second: str


@dataclass(kw_only=True)
class CheckReport:
    """The result of checking some sources."""

    sources: list[str]
    """Their paths."""
    max_length: int
    """Tokens that a record may have."""
    max_bad_share: float
    """Share of bad records above which a run stops; 0 when any bad record stops it."""
    too_long: str = "refuse"
    """See `DataConfig.too_long`; dropped records do not count as bad ones."""
    records: int = 0
    """All records."""
    bad: Counter[Code] = field(default_factory=Counter)
    """Bad records by fault."""
    faults: list[RecordError] = field(default_factory=list)
    """Every one of these faults."""
    text_only: int = 0
    """Usable records without a picture."""
    one_image: int = 0
    """Usable records with one picture."""
    several_images: int = 0
    """Usable records with more pictures."""
    videos: int = 0
    """Usable records with a video; every frame counts as a picture where the model takes no videos."""
    boxes: int = 0
    """Boxes and points of usable records."""
    pictures: int = 0
    """Pictures of usable records, repeated ones included."""
    images: dict[str, Fingerprint | None] = field(default_factory=dict)
    """Pictures of usable records, with perceptual hashes of the decoded ones."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Width and height in pixels of the pictures that were read."""
    answers: int = 0
    """Answers that are trained on."""
    context_answers: int = 0
    """Answers that weigh 0 in the loss, by their record or `data.supervise`."""
    weighed: int = 0
    """Usable records with other weights than 0 and 1."""
    tools: int = 0
    """Usable records with tools, calls or their results."""
    not_offered: Counter[str] = field(default_factory=Counter)
    """Tools that answers call and their record does not offer, with the number of usable records."""
    supervised_tokens: int = 0
    """Tokens of the answers and their ends of turn."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each usable record, visual tokens included."""
    truncated: int = 0
    """Usable records that lose turns, or with truncate the end of their text, because they are too long."""
    thoughts: int = 0
    """Answers with thinking that is learned."""
    dropped_thoughts: int = 0
    """Answers with thinking that the chat template or `model.thinking` leaves out."""
    endings: Counter[Ending] = field(default_factory=Counter)
    """What decides the form of the answers of usable records."""
    form: ThinkingForm | None = None
    """How often answers think, and the form in which the model is asked."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Keys that are not read, with the number of usable records that have them."""
    special_text: int = 0
    """Usable records with texts that spell special tokens; these stay text."""
    separator_text: int = 0
    """Usable records with texts that spell the chat template's ordinary text between turns, such as `USER:`."""
    endless: int = 0
    """Usable records with an answer without an end-of-turn token as its last supervised token."""
    turns: Counter[int] = field(default_factory=Counter)
    """Answers per usable record."""
    short_answers: Counter[str] = field(default_factory=Counter)
    """Frequency of each short answer."""
    ids: Counter[str] = field(default_factory=Counter)
    """Frequency of each id."""
    contents: Counter[bytes] = field(default_factory=Counter)
    """Frequency of each conversation with the same pictures, by hash."""

    @property
    def repeated_ids(self) -> Counter[str]:
        """Further occurrences of each id after the first."""
        return Counter({name: count - 1 for name, count in self.ids.items() if count > 1})

    @property
    def duplicates(self) -> int:
        """Usable records that repeat the conversation and pictures of an earlier record."""
        return sum(self.contents.values()) - len(self.contents)

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
        return self.usable > 0 and self.refused <= self.max_bad_share * self.records

    @property
    def refused(self) -> int:
        """Records that count against `max_bad_share`."""
        return self.records - self.usable - self.dropped

    @property
    def dropped(self) -> int:
        """Records that are too long and left out on purpose."""
        return self.bad[Code.TOO_LONG] if self.too_long == "drop" else 0

    def histogram(self) -> list[tuple[int, int]]:
        """Histogram of lengths in eight bins: (upper bound in tokens, records), with bounds `max_length` / 2^i."""
        bounds = [max(1, self.max_length >> shift) for shift in range(7, -1, -1)]
        counts = [0] * len(bounds)
        for length in self.lengths:
            counts[next(index for index, bound in enumerate(bounds) if length <= bound)] += 1
        return list(zip(bounds, counts, strict=True))

    def add(self, other: CheckReport) -> None:
        """Add the report of further records."""
        for name in (item.name for item in fields(self) if item.name not in _OF_RECIPE):
            own, more = getattr(self, name), getattr(other, name)
            if isinstance(own, dict):  # counters, too
                own.update(more)
            elif isinstance(own, list):  # in place: a sum would copy the lengths of all records for every chunk
                own.extend(more)
            else:
                setattr(self, name, own + more)


def check(
    sources: Sequence[SourceConfig],
    encoder: ConversationEncoder,
    *,
    config: DataConfig,
    image_processing: ImageProcessing | None = None,
    decode: bool = True,
    processes: int | None = None,
    objective: Objective = "sft",
    on_progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Check sources as a run would use them; of preference records the chosen answers are counted.

    Args:
        decode: decode every picture instead of reading its header only; finds damage inside, and gives the hashes.
        processes: number of processes that share the work; None: one per processor.
        on_progress: called with (records done, all records).
    """
    files = open_sources(sources, objective=objective, processing=image_processing)
    share = 0.0 if config.on_bad == "error" else config.max_bad_share
    empty = partial(
        CheckReport,
        sources=[source.path for source in sources],
        max_length=config.max_length,
        max_bad_share=share,
        too_long=config.too_long,
    )
    check_rows = _RowCheck(files, encoder, config, image_processing=image_processing, decode=decode, empty=empty)
    chunks = [
        (number, range(start, min(len(file), start + _TOGETHER)))
        for number, file in enumerate(files)
        for start in range(0, len(file), _TOGETHER)
    ]
    report, total = empty(), sum(len(rows) for _, rows in chunks)
    if processes is not None and processes < 1:
        raise DataError(f"processes is {processes}, expected 1 or more. Leave it out for one per processor.")
    if processes is None:
        processes = usable_processes() if total > 2 * _TOGETHER else 1
    for part in in_processes(check_rows, chunks, processes=processes):
        report.add(part)
        if on_progress is not None:
            on_progress(report.records, total)
    report.form = form_of(encoder, report.endings)
    return report


class _RowCheck:
    """Check some rows of a source; runs in a worker process."""

    def __init__(
        self,
        files: Sequence[RecordSource],
        encoder: ConversationEncoder,
        config: DataConfig,
        *,
        image_processing: ImageProcessing | None,
        decode: bool,
        empty: Callable[[], CheckReport],
    ) -> None:
        self.files, self.encoder, self.config, self.empty = files, encoder, config, empty
        self.image_processing, self.decode = image_processing, decode
        self.separators = _separators(encoder)
        eos = encoder.tokenizer.eos_token_id
        self.ends = set(encoder.tokens.guarded.values()) | ({int(eos)} if isinstance(eos, int) else set())

    def __call__(self, chunk: tuple[int, range]) -> CheckReport:
        report = self.empty()
        file = self.files[chunk[0]]
        for row in chunk[1]:
            report.records += 1
            try:
                record = file[row]
                encoded = encode_record(record, self.encoder, self.image_processing, config=self.config)
                self._pictures(report, record, encoded)
            except RecordError as error:
                report.bad[error.code] += 1
                report.faults.append(error)
                continue
            self._count(report, record, encoded)
        return report

    def _pictures(self, report: CheckReport, record: Record, encoded: Encoded) -> None:
        hashes: dict[str, Fingerprint | None] = {}
        for number, picture in enumerate(record.images):
            if number >= encoded.images or picture.name in report.images:
                continue
            with faults_of_picture(record, number):
                size = picture.size()
                hashes[picture.name] = fingerprint(picture.rgb()) if self.decode else None
            if size is not None:
                report.sizes[size] += 1
        report.images.update(hashes)

    def _count(self, report: CheckReport, record: Record, encoded: Encoded) -> None:
        fitting = record.learned(self.config.supervise)[: len(record.turns) - encoded.dropped_turns]
        answers = [turn.text for turn in fitting if turn.role == "assistant"]
        # The block of thinking at the start of an answer becomes the template's own tokens.
        texts = [
            part[masked_block(part) if turn.role == "assistant" else 0 :] for turn in fitting for part in turn.parts()
        ]
        report.ids[record.id] += 1
        content = repr([(turn.role, turn.said) for turn in record.turns] + record.image_names)
        content += repr(record.objects) if record.objects is not None else ""
        report.contents[bytes.fromhex(sha256_of_text(content)[:24])] += 1
        report.lengths.append(int(encoded.input_ids.shape[0]))
        report.supervised_tokens += int(encoded.supervised.sum())
        learned = sum(turn.weight > 0 for turn in fitting if turn.role == "assistant")
        report.answers += learned
        report.context_answers += len(answers) - learned
        tools = any(turn.tools for turn in record.turns)
        report.tools += tools
        calls = [turn.tools for turn in record.turns if turn.role == "assistant"]
        report.not_offered.update(names_not_offered(record.turns[0].tools, *calls) if tools else ())
        report.weighed += encoded.weights is not None
        report.turns[len(answers)] += 1
        report.short_answers.update(text.strip() for text in answers if text and len(text) <= _SHORT_ANSWER)
        report.truncated += encoded.dropped_turns > 0
        report.thoughts += encoded.thoughts
        report.ignored.update(record.ignored)
        if fitting and not record.is_document:
            report.endings[ending(fitting)] += 1
        report.dropped_thoughts += encoded.dropped_thoughts
        report.special_text += any(self.encoder.tokens.first_special(text) for text in texts)
        report.separator_text += self.separators is not None and any(self.separators.search(text) for text in texts)
        report.endless += not (tools or record.is_document) and _ends(encoded) - self.ends != set()
        report.text_only += not record.images
        report.one_image += len(record.images) == 1
        report.several_images += len(record.images) > 1
        report.pictures += encoded.images
        report.boxes += len(record.objects.regions) if record.objects is not None else 0
        report.videos += any(isinstance(picture, Frame | Clip) for picture in record.images)


def _ends(encoded: Encoded) -> set[int]:
    """The last supervised token of every stretch."""
    flags = encoded.supervised
    last = flags.clone()
    last[:-1] &= ~flags[1:]
    return set(encoded.input_ids[last].tolist())


def _separators(encoder: ConversationEncoder) -> re.Pattern[str] | None:
    """Ordinary text that the template writes between turns; in a user's text it looks like a change of speaker."""
    plan = encoder.template.plan(("user", "assistant", "user", "assistant"))
    lines: set[str] = set()
    for text in (plan.slots[1].before, plan.slots[2].before, plan.slots[3].before):
        for special in encoder.tokens.guarded:
            text = text.replace(special, "\n")
        lines |= {line.strip() for line in text.splitlines() if len(line.strip()) > 2 and not line.strip().isalnum()}
    return re.compile("|".join(map(re.escape, sorted(lines, key=len, reverse=True)))) if lines else None


def fingerprint(image: Image.Image) -> Fingerprint:
    """The fingerprint of an RGB picture."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert isinstance(mean, tuple)
    return Fingerprint(int.from_bytes(bits.tobytes(), "big"), (int(mean[0]), int(mean[1]), int(mean[2])))


def matches(first: Mapping[str, Fingerprint], second: Mapping[str, Fingerprint]) -> list[Match]:
    """Pictures of the first set that look like one of the second set, each with its nearest match."""
    table: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, mark in second.items():
        for band in _bands(mark.gradient):
            table[band].append(name)
    pairs = []
    for name, mark in first.items():
        near = {other for band in _bands(mark.gradient) for other in table.get(band, ())}
        alike = [other for other in near if _alike(mark, second[other])]
        ranked = sorted(((mark.gradient ^ second[other].gradient).bit_count(), other) for other in alike)
        if ranked:
            pairs.append(Match(name, ranked[0][1]))
    return pairs


def _bands(gradient: int) -> Iterable[tuple[int, int]]:
    return ((band, gradient >> (16 * band) & 0xFFFF) for band in range(_BANDS))


def _alike(one: Fingerprint, other: Fingerprint) -> bool:
    near = max(abs(a - b) for a, b in zip(one.colour, other.colour, strict=True)) <= COLOUR_DISTANCE
    return near and (one.gradient ^ other.gradient).bit_count() <= DISTANCE
