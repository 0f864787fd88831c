"""Training data and held-out questions from a file of a user's records."""

from __future__ import annotations

import itertools
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora_eval.metrics.exact_match import relaxed
from mm_moslora_eval.sources.llava_file import reference_of

from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.images.record_picture import LocalPicture
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.sources.record_file import RecordSource
from mm_moslora.quickstart.instruction_data import YES_NO, ImageQuestion, question_record
from mm_moslora.quickstart.own_data import OwnData, decode_all, draw, lopsided
from mm_moslora.utils.errors import DataError

CAPTION_WORDS = 5
"""Median words of a question's answers above which they are scored as captions, since no two people word them alike."""


class _SourceRows(Sequence[Any]):
    """A selection of a file's records, read on access."""

    def __init__(self, source: RecordSource, rows: Sequence[int]) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._source.value(self._rows[index])


@dataclass(kw_only=True)
class _Rows:
    """Rows of a file by what they show; equal pixels count as one picture."""

    by_picture: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Rows by their one picture."""
    paths: dict[str, Path] = field(default_factory=dict)
    """The first file name of every picture."""
    several: dict[int, set[str]] = field(default_factory=dict)
    """Rows without a picture, or with several."""
    answers: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    """The answers to the questions about every picture."""
    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """How often every question has every answer."""
    faults: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: RecordSource) -> _Rows:
        """Read all records of a file, and decode each picture once."""
        rows, (same, damaged) = cls(), _decoded(source)
        for row in range(len(source)):
            try:
                record = source[row]
                shown = [same[picture.name] for picture in record.images]
            except (RecordError, KeyError) as fault:
                rows.faults.append(damaged[fault.args[0]] if isinstance(fault, KeyError) else str(fault))
                continue
            if len(shown) == 1 and isinstance(record.images[0], LocalPicture):
                rows.by_picture[shown[0]].append(row)
                rows.paths.setdefault(shown[0], record.images[0].path)
                for question, answer in _pairs(record):
                    rows.answers[shown[0]][question] = relaxed(answer)
                    rows.counts[question][relaxed(answer)] += 1
            else:
                rows.several[row] = set(shown)
        return rows


def _decoded(source: RecordSource) -> tuple[dict[str, str], dict[str, str]]:
    """See `decode_all`, of all pictures of a file."""
    first: dict[str, int] = {}
    for row in range(len(source)):
        with suppress(RecordError):  # named with the faults
            for picture in source[row].images:
                first.setdefault(picture.name, row)
    shown_first = (
        picture for row in dict.fromkeys(first.values()) for picture in source[row].images if first[picture.name] == row
    )
    return decode_all(shown_first, len(first))


def from_file(path: Path, images: Path | None, rng: random.Random, *, follow_links: bool) -> OwnData:
    """Build data from a LLaVA JSON or JSONL file."""
    folder = str(images) if images else None
    source = open_source(SourceConfig(path=str(path), format="json", image_folder=folder, follow_links=follow_links))
    found = _Rows.of(source)
    if len(found.by_picture) < 2:
        raise DataError(
            f"{path} has {len(found.by_picture)} different pictures with usable questions, expected at least 2: some "
            f"to learn from and some to hold out. {len(found.several)} of {len(source)} records have no picture or "
            f"several, {len(found.faults)} could not be used"
            f"{', the first: ' + found.faults[0] if found.faults else ''}."
        )
    held_out = draw(found.answers, found.paths, rng)
    rows = [row for name, rows in found.by_picture.items() if name not in held_out for row in rows]
    others = [row for row, shown in found.several.items() if not shown & held_out]
    hidden = len(found.several) - len(others)
    rows = sorted([*rows, *others])
    asked = [(found.paths[name], source[row]) for name in found.by_picture if name in held_out
             for row in found.by_picture[name]]  # fmt: skip
    test, captions = _questions_of(asked, source.rules.folder, found.counts)
    return OwnData(
        images=source.rules.folder,
        follow_links=follow_links,
        source=f"{len(source)} records of {path}",
        train=_SourceRows(source, rows),
        test=test,
        captions=captions,
        train_pictures=len(found.by_picture) - len(held_out),
        test_pictures=len(held_out),
        lopsided=lopsided(found.counts),
        used=len(source) - len(found.faults),
        faults=found.faults,
        notes=[f"{hidden} records with several pictures show a held-out one"] if hidden else [],
        **_sizes(source[row] for row in rows),
    )


def _sizes(records: Iterable[Record]) -> dict[str, Any]:
    sizes, turns, answers = [], [], [1]
    for record in records:
        sizes.append(sum(len(turn.said.encode()) for turn in record.turns))
        turns.append(sum(turn.role == "assistant" for turn in record.turns))
        answers += [len(turn.said.encode()) for turn in record.turns if turn.role == "assistant"]
    return {
        "turns": sum(turns) / len(turns),
        "text_bytes": (sum(sizes) / len(sizes), max(sizes)),
        "longest": (max(turns), max(answers)),
    }


def _pairs(record: Record) -> Iterator[tuple[str, str]]:
    """The questions of a record with their answers, as evaluation compares them: without thinking."""
    for question, answer in itertools.pairwise(record.turns):
        if question.role != "user" or not answer.text:  # the result of a tool, or its call
            continue
        yield "".join(question.parts()).strip(), (reference_of(answer.text) or answer.text).strip()


def _questions_of(
    records: Sequence[tuple[Path, Record]], folder: Path, counts: Mapping[str, Counter[str]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every question of the records with all its answers: those with short answers, and those with sentences."""
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, record in records:
        for question, answer in _pairs(record):
            answers[path.relative_to(folder).as_posix(), question].append(answer)
    rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for number, ((image, text), texts) in enumerate(answers.items()):
        row = question_record(str(number), ImageQuestion(image=image, text=text, answer=texts[0]), "open")
        row["category"] = "yes_no" if {relaxed(answer) for answer in texts} <= set(YES_NO) else "open"
        rows[_is_caption(counts[text])].append(row | ({"answers": texts} if len(texts) > 1 else {}))
    return rows


def _is_caption(answers: Counter[str]) -> bool:
    words = sorted(len(answer.split()) for answer in answers.elements())
    return words[(len(words) - 1) // 2] > CAPTION_WORDS
