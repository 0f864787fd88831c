"""The records of the other objectives: pairs of answers, judged answers and questions, and the count of unusable ones.

Labels are those of `ConversationEncoder`, on the last answer alone. Shapes: ``T`` tokens of one example.
"""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from mm_moslora.batch import Example, ImageProcessing, Placeholders, ProcessedImage
from mm_moslora.config import DataConfig, Objective, SourceConfig
from mm_moslora.data.boxes.record_objects import ALL, BOX, pixel_filler, reference_box
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder, Encoded
from mm_moslora.data.chat.preference_records import (
    AskedQuestion,
    JudgedAnswer,
    PreferencePair,
    parse_judged,
    parse_pair,
    parse_question,
)
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.images.record_picture import ImageError
from mm_moslora.data.images.video_clip import Clip
from mm_moslora.data.quarantine import summary
from mm_moslora.data.record_examples import SourceExamples, check_headers, decoded, sizes_of, written
from mm_moslora.data.record_faults import Code, RecordError
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of_bytes, sha256_of_text

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class AnswerSet(SourceExamples, Generic[Item]):
    """All items of some sources; a subclass says what an item is.

    The constructor reads and tokenises all answers of every record and reads the header of every picture, so that all
    ranks know the bad records before the first step.
    """

    objective: ClassVar[Objective]
    sides: ClassVar[int] = 1
    """Most items of a record; item ``n`` belongs to record ``n // sides``."""

    def __init__(
        self,
        sources: Sequence[SourceConfig],
        encoder: ConversationEncoder,
        image_processing: ImageProcessing | None,
        *,
        config: DataConfig,
        settle: bool = False,
        quarantine_path: Path | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            sources, encoder, image_processing, config=config, objective=self.objective, settle=settle,
            quarantine_path=quarantine_path,
        )  # fmt: skip
        self.lengths = array("L")
        """Tokens of all answers of every usable record with their questions, one after the other."""
        self.usable: list[int] = []
        """Numbers of the items that were found usable when the set was built."""
        self.with_pictures = 0
        self.media: set[frozenset[str]] = set()
        """What usable records show: pictures, videos, both or nothing."""
        for index in range(len(self)):
            try:
                self._measure(index)
            except RecordError as error:
                self.quarantine.add(index, error)
            if on_progress is not None:
                on_progress(index + 1, len(self))
        self.quarantine.close()
        if len(self.quarantine):
            logger.warning("%d records cannot be used: %s", len(self.quarantine), summary(self.quarantine.codes))
        if not self.usable:
            raise DataError(
                f"None of the {len(self)} records can be learned from with objective: {self.objective}: "
                f"{summary(self.quarantine.codes)}. The first one: {self.quarantine.first}"
            )

    @abstractmethod
    def answered(self, index: int) -> Sequence[Record]:
        """The conversations of a record, one per answer; they share its pictures."""

    @abstractmethod
    def load_item(self, number: int) -> Item:
        """Make the item with a number; see `answered`."""

    @property
    def fingerprint(self) -> str:
        """A hash of the usable records and their lengths."""
        return sha256_of_bytes(bytes(self.lengths), bytes(array("L", self.usable)))

    def identity(self, key: str) -> dict[str, object]:
        """What must be the same on every rank, by name; see `TrainingSet.identity`."""
        return {f"the number of items of {key}": len(self.usable), f"the fingerprint of {key}": self.fingerprint[:12]}

    def statistics(self) -> dict[str, float]:
        """Counts for a report: records, those that cannot be used, those with pictures, and tokens per answer."""
        lengths = sorted(self.lengths)
        return {
            "records": len(self),
            "unusable": len(self.quarantine),
            "with_pictures": self.with_pictures,
            "tokens": sum(lengths),
            "tokens_per_record_median": lengths[len(lengths) // 2],
            "tokens_per_record_longest": lengths[-1],
        }

    def item(self, number: int) -> Item:
        """The usable item with a number, counted around; where its fault shows up now, the next one."""
        start = number % len(self.usable)
        for found in itertools.islice(itertools.cycle(self.usable), start, start + len(self.usable)):
            try:
                return self.load_item(found)
            except RecordError as error:
                index = found // self.sides
                if index not in self.quarantine:
                    logger.warning("Left out: %s", error)
                self.quarantine.add(index, error)
        raise DataError("No record is left that can be used.")

    def example(self, record: Record, pictures: Sequence[ProcessedImage]) -> Example:
        """A conversation of which the last answer is learned."""
        encoded = self._encode(record, None if self._fixed else [picture.placeholders for picture in pictures])
        supervised = last_answer(encoded.supervised)
        return Example(id=record.id, input_ids=encoded.input_ids, supervised=supervised, pictures=pictures)

    def _measure(self, index: int) -> None:
        """Check a record as far as this is possible without decoding its pictures, and count it."""
        records = self.answered(index)
        encoded = [self._encode(record) for record in records]
        learned = {tuple(one.input_ids[last_answer(one.supervised)].tolist()) for one in encoded}
        if len(learned) < len(records):
            what = "is learned as the same tokens as the chosen answer (model.thinking or the template drops the rest)"
            remedy = "keep it (model.thinking: always), or drop the record: it prefers nothing"
            raise records[-1].where.error(Code.EQUAL_ANSWERS, "rejected", what, remedy)
        check_headers(records[0], len(records[0].images))
        self.count(encoded)
        self.usable += [index * self.sides + side for side in range(min(self.sides, len(records)))]
        self.with_pictures += bool(records[0].images)
        kinds = ("videos" if isinstance(picture, Clip) else "pictures" for picture in records[0].images)
        self.media.add(frozenset(kinds))

    def count(self, encoded: Sequence[Encoded]) -> None:
        """Note what the answers of a usable record take."""
        self.lengths.extend(len(one.input_ids) for one in encoded)

    def _encode(self, record: Record, pictures: Sequence[Placeholders] | None = None) -> Encoded:
        encoded = self.encode(record, pictures)
        if encoded.dropped_turns:
            what, limit = "does not fit with its last answer", self.config.max_length
            remedy = f"raise data.max_length ({limit}), or set data.too_long: drop"
            raise record.where.error(Code.TOO_LONG, "conversations", what, remedy)
        return encoded

    @property
    def _fixed(self) -> bool:
        return self.image_processing is None or self.image_processing.fixed


class PreferenceSet(AnswerSet[tuple[Example, Example]]):
    """Pairs of examples, the chosen answer first; they share their pictures."""

    objective = "dpo"

    def __init__(self, *args: Any, **options: Any) -> None:
        self.prompts = array("L")
        """`shared_prompt` of every usable pair."""
        super().__init__(*args, **options)

    def count(self, encoded: Sequence[Encoded]) -> None:
        """See `AnswerSet.count`."""
        super().count(encoded)
        self.prompts.append(shared_prompt(*((one.input_ids, last_answer(one.supervised)) for one in encoded)))

    def answered(self, index: int) -> Sequence[Record]:
        """See `AnswerSet.answered`."""
        pair = self.pair(index)
        return pair.chosen, pair.rejected

    def load_item(self, number: int) -> tuple[Example, Example]:
        """See `AnswerSet.load_item`."""
        pair = self.pair(number)
        pictures = self.process(pair.chosen, len(pair.chosen.images))
        return self.example(pair.chosen, pictures), self.example(pair.rejected, pictures)

    def pair(self, index: int) -> PreferencePair:
        """The record with a number over all sources."""
        source, row = self.source_and_row(index)
        return self.files[source].parsed(row, parse_pair)


class JudgedSet(AnswerSet[tuple[Example, bool]]):
    """Examples with the judgement of their last answer, good and bad ones; a pair is two of them."""

    objective, sides = "kto", 2

    def __init__(self, *args: Any, **options: Any) -> None:
        self.labels = bytearray()
        """1 per usable item with a good answer."""
        super().__init__(*args, **options)
        if len({*self.labels}) < 2:
            kind, other = ("good", "bad") if self.labels[0] else ("bad", "good")
            raise DataError(
                f"All {len(self.labels)} answers are {kind}, and objective: kto learns from good and bad ones. Add "
                f"records with {other} answers, or set objective: sft to learn good answers alone."
            )

    @property
    def fingerprint(self) -> str:
        """See `AnswerSet.fingerprint`; with the labels."""
        return sha256_of_text(f"{super().fingerprint} {self.labels.hex()}")

    def answered(self, index: int) -> Sequence[Record]:
        """See `AnswerSet.answered`."""
        return [answer.record for answer in self.answers(index)]

    def load_item(self, number: int) -> tuple[Example, bool]:
        """See `AnswerSet.load_item`."""
        index, side = divmod(number, self.sides)
        answer = self.answers(index)[side]
        return self.example(answer.record, self.process(answer.record, len(answer.record.images))), answer.good

    def answers(self, index: int) -> tuple[JudgedAnswer, ...]:
        """The judged answers of the record with a number over all sources."""
        source, row = self.source_and_row(index)
        return self.files[source].parsed(row, parse_judged)

    def statistics(self) -> dict[str, float]:
        """Counts for a report; those of good and of bad answers, too."""
        return super().statistics() | {"good": sum(self.labels), "bad": self.labels.count(0)}

    def _measure(self, index: int) -> None:
        super()._measure(index)
        self.labels += bytes(answer.good for answer in self.answers(index))


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question for the model."""

    prompt: Example
    """Ends where the answer begins."""
    text: str
    """Of the last question."""
    asked: AskedQuestion
    """With boxes of its references in pixels of the picture's file."""
    size: tuple[int, int] | None = None
    """Width and height of the picture that they are about; None without pictures."""


class QuestionSet(AnswerSet[Question]):
    """Questions with their references."""

    objective = "grpo"

    def __init__(
        self, *args: Any, box_fault: Callable[[str, int, int], str | None] | None = None, **options: Any
    ) -> None:
        self.box_fault = box_fault
        """Why a reference is no box of a picture of this width and height; None: a reference need not be one."""
        self.with_boxes = 0
        """Usable questions whose reference holds a box."""
        super().__init__(*args, **options)

    def answered(self, index: int) -> Sequence[Record]:
        """See `AnswerSet.answered`; with its first reference."""
        return [self.asked(index).record]

    def load_item(self, number: int) -> Question:
        """See `AnswerSet.load_item`."""
        asked = self.asked(number)
        record = asked.record
        images = [] if self.image_processing is None else decoded(record, len(record.images))
        sizes, pictures = sizes_of(images), self._processed(record, images)
        placeholders = None if self._fixed else [picture.placeholders for picture in pictures]
        shown = written(record, self.image_processing, sizes=sizes)
        ids = self.encoder.encode_prompt(shown.turns[:-1], pictures=placeholders)
        none = torch.zeros(len(ids), dtype=torch.bool)
        prompt = Example(id=record.id, input_ids=ids, supervised=none, pictures=pictures)
        last = len(sizes) - 1
        if record.objects is not None:
            box = reference_box(record.objects, [turn.text for turn in record.turns])
            last = last if box is None else box.image
            fill = pixel_filler(record.objects, sizes, record.where)
            turns = tuple(turn.filled(fill) for turn in record.turns)
            record = replace(record, turns=turns)
            asked = replace(asked, references=asked.references if box is None else (turns[-1].text,))
        text = " ".join(record.turns[-2].parts()).strip()
        return Question(prompt=prompt, text=text, asked=asked, size=sizes[last] if sizes else None)

    def asked(self, index: int) -> AskedQuestion:
        """The record with a number over all sources."""
        source, row = self.source_and_row(index)
        return self.files[source].parsed(row, parse_question)

    def _measure(self, index: int) -> None:
        asked = self.asked(index)
        objects, turns = asked.record.objects, asked.record.turns
        boxed = objects is not None and reference_box(objects, [turn.text for turn in turns]) is not None
        several = boxed and (len(asked.references) > 1 or turns[-1].text.count(BOX) > 1)
        beside = any(mark in text for text in asked.references[1:] for mark in (BOX, ALL))
        if several or beside or (objects is not None and ALL in turns[-1].text):
            what = f"a reference holds {ALL}, or there are several boxes or references, and a reward compares one box"
            raise asked.record.where.error(Code.BAD_BOX, "objects", what, f"write one reference with {BOX}")
        if self.box_fault is not None and not boxed and (fault := self._fault_of_boxes(asked)):
            remedy = 'write "[x1, y1, x2, y2]" in pixels of the last picture'
            raise asked.record.where.error(Code.BAD_BOX, "reference", f"cannot be compared ({fault})", remedy)
        super()._measure(index)
        self.with_boxes += boxed

    def _fault_of_boxes(self, asked: AskedQuestion) -> str | None:
        assert self.box_fault is not None
        if not asked.record.images:
            return "the question has no picture"
        try:
            size = asked.record.images[-1].size()
        except ImageError:
            return None  # `AnswerSet._measure` names it
        if size is None:  # not fetched yet; the reward finds it
            return None
        return next(filter(None, (self.box_fault(text, *size) for text in asked.references)), None)


SETS: dict[Objective, type[PreferenceSet] | type[JudgedSet] | type[QuestionSet]] = {
    "dpo": PreferenceSet,
    "kto": JudgedSet,
    "grpo": QuestionSet,
}
"""Objective -> its records."""


def shared_prompt(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> int:
    """Tokens of the prompt of two answers, each ids and flags ``[T]``; 0 where their prompts differ."""
    starts = [int(answer.nonzero()[0]) for _, answer in (first, second)]
    prompts = [ids[:start] for (ids, _), start in zip((first, second), starts, strict=True)]
    return starts[0] if torch.equal(*prompts) else 0


def last_answer(supervised: Tensor) -> Tensor:
    """The flags of the last answer alone, bool ``[T]``; a question stands between two answers."""
    positions = supervised.nonzero().flatten()
    gaps = (positions.diff() > 1).nonzero().flatten()
    start = positions[gaps[-1] + 1] if len(gaps) else positions[0]
    return supervised & (torch.arange(len(supervised)) >= start)
