"""Training data and held-out questions from a user's pictures: a folder per class, or a file of records.

The split is by picture: no picture stands on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora_eval.metrics.exact_match import relaxed

from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.records import IMAGE, VIDEO, Record
from mm_moslora.data.images.record_picture import (
    ImageError,
    LocalPicture,
    Picture,
    StoredPicture,
    check_image,
    open_image,
    read_picture,
)
from mm_moslora.data.record_faults import RecordError
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.sources.record_source import RecordSource
from mm_moslora.quickstart.instruction_data import YES_NO, Question, conversation, question_record
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import FileError, find_below

OPEN = "What does the picture show?"
IS_IT = 'Does the picture show "{}"?'
TURNS = 3
"""Questions per generated conversation, at most."""
CONVERSATIONS = 4800
"""Target number of conversations about pictures of classes; more where there are more pictures."""
TEST_SHARE, LEAST_TEST, MOST_TEST = 0.2, 2, 100
"""Share of held-out pictures, their minimum number where two are left for training, and their maximum number."""
CAPTION_WORDS = 5
"""Median words of an answer above which answers are scored as captions, since no two people word them alike."""
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SHOWN_FAULTS = 3


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A data set from the user's pictures."""

    images: Path
    """Root of the pictures' paths."""
    source: str
    """Description of the source."""
    train: Sequence[Any]
    """Records in the form that `data.train` takes; an epoch sees each once."""
    repeated: Mapping[int, Sequence[Any]] = field(default_factory=dict)
    """Further records, by the number of times that an epoch sees each."""
    test: list[dict[str, Any]]
    """Held-out questions with their answers."""
    train_pictures: int
    test_pictures: int
    turns: float
    """Questions per conversation, on average."""
    text_bytes: tuple[float, int]
    """Bytes of text per conversation: the average, and the maximum."""
    longest: tuple[int, int]
    """Maximum questions per conversation, and bytes of the longest answer."""
    faults: list[str] = field(default_factory=list)
    """Unusable files and records, each with its reason."""

    @property
    def epoch(self) -> int:
        """Number of conversations of an epoch."""
        return len(self.train) + sum(times * len(records) for times, records in self.repeated.items())

    @property
    def captions(self) -> bool:
        """Whether answers are sentences."""
        words = sorted(len(str(answer).split()) for row in self.test for answer in row.get("answers", [row["answer"]]))
        return words[(len(words) - 1) // 2] > CAPTION_WORDS

    def fault_lines(self) -> str:
        """The first faults, one per line, and the number of further ones."""
        more = len(self.faults) - _SHOWN_FAULTS
        return "\n".join([*self.faults[:_SHOWN_FAULTS], *([f"... and {more} more"] if more > 0 else [])])


def read_own(path: Path, *, images: Path | None = None, seed: int = 0) -> OwnData:
    """Build data from a folder with a sub-folder per class, or from a LLaVA JSON or JSONL file.

    Args:
        path: the folder or the file.
        images: for a file, the folder of its pictures; None: the file's own folder.
        seed: chooses the held-out pictures and the questions.

    Raises:
        DataError: no training data can be built; the message holds what was found.
    """
    if path.is_dir():
        if images is not None:
            raise DataError(f"--image-folder is {images}, but {path} is a folder of pictures. Leave it out.")
        return _from_folder(path.resolve(), random.Random(f"own {seed}"))
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a folder with a sub-folder of pictures per class, or a file.")
    return _from_file(path, images, random.Random(f"own {seed}"))


@dataclass(frozen=True)
class _Picture:
    name: str
    label: str


def _from_folder(folder: Path, rng: random.Random) -> OwnData:
    faults: list[str] = []
    pictures = list(_pictures(folder, faults))
    counts = Counter(picture.label for picture in pictures)
    if counts and {label.lower() for label in counts} <= _SPLITS:
        raise DataError(
            f"The sub-folders of {folder} are {', '.join(sorted(counts))}: splits of a data set, not classes. "
            "Give the folder with the classes, such as the first of these; the held-out pictures are chosen from it."
        )
    if len(counts) < 2 or max(counts.values()) < 2:
        raise DataError(_too_little(folder, counts, faults))
    train, test = _split(folder, pictures, counts, rng, faults)
    by_times = _conversations(train, rng)
    records = [record for part in by_times.values() for record in part]
    sizes = [sum(len(turn["value"].encode()) for turn in record["conversations"]) for record in records]
    return OwnData(
        images=folder,
        source=f"{len(counts)} classes in {folder}",
        train=by_times.pop(1),
        repeated=by_times,
        test=_test_questions(test, rng),
        train_pictures=len(train),
        test_pictures=len(test),
        turns=sum(len(record["conversations"]) for record in records) / 2 / len(records),
        text_bytes=(sum(sizes) / len(sizes), max(sizes)),
        longest=(TURNS, max(len(label.encode()) for label in counts)),
        faults=faults,
    )


def _pictures(folder: Path, faults: list[str]) -> Iterator[_Picture]:
    """The readable pictures in the class folders, without duplicates."""
    seen: dict[bytes, str] = {}
    others: Counter[str] = Counter()
    classes = _Classes()
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or path.is_dir() or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        if path.suffix and path.suffix.lower() not in _SUFFIXES:
            others[path.suffix.lower()] += 1
            continue
        name, label = "/".join(parts), classes.label(parts[0])
        try:
            find_below(folder, name)
            check_image(path)
            digest = hashlib.sha256(read_picture(path)).digest()
        except (FileError, ImageError) as fault:
            faults.append(str(fault).encode("utf-8", "backslashreplace").decode())
            continue
        if digest in seen:
            faults.append(f"{name}: the same picture as {seen[digest]}; it is used once")
            continue
        seen[digest] = name
        yield _Picture(name, label)
    if others:
        kinds = ", ".join(f"{count} {ascii(suffix)[1:-1]}" for suffix, count in others.most_common(5))
        faults.append(f"{others.total()} files of other kinds: {kinds}; pictures are {', '.join(sorted(_SUFFIXES))}")


class _Classes:
    """Class names from folder names, in readable form; exact match tells all of them apart."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[str, str]] = {}

    def label(self, folder: str) -> str:
        """The class name of a folder; several folders may have the same one, such as `tea_pot` and `tea pot`.

        Raises:
            DataError: a question cannot hold the name, or exact match would not tell it from another name.
        """
        label = " ".join(folder.replace("_", " ").split())
        answer = relaxed(unicodedata.normalize("NFC", label))
        controls = any(unicodedata.category(mark) == "Cc" for mark in folder)
        if not answer or controls or any(mark in label for mark in (IMAGE, VIDEO, "<|")):
            raise DataError(f"The folder {folder!a} is not a class name that a question can hold. Rename it.")
        other, known = self._known.setdefault(answer, (folder, label))
        if known != label:
            raise DataError(
                f"The folders {other!a} and {folder!a} are one answer: they differ only in case, closing periods or "
                "encoding. Put their pictures into one folder, or rename one."
            )
        return label


def _too_little(folder: Path, counts: Counter[str], faults: list[str]) -> str:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = f"{sum(counts.values())} readable pictures of {len(counts)} classes ({', '.join(sorted(counts)[:5])})"
    loose = sum(path.is_file() and not path.name.startswith(".") for path in folder.iterdir())
    broken = f" {len(faults)} files could not be used, the first: {faults[0]}." if faults else ""
    beside = f" {loose} files lie beside the sub-folders, not in one." if loose else ""
    remedy = (
        f"Put pictures of each class into a sub-folder of its own, at least two classes (found: "
        f"{', '.join(inner[:5]) or 'no sub-folders'}), or write questions into a file: my_images.md "
        "in the folder that `mm-moslora files tutorials` prints."
    )
    return f"{folder} holds {found if counts else 'no readable pictures in sub-folders'}.{broken}{beside} {remedy}"


def _split(
    folder: Path, pictures: Sequence[_Picture], counts: Counter[str], rng: random.Random, faults: list[str]
) -> tuple[list[_Picture], list[_Picture]]:
    """Training and held-out pictures. Every class keeps at least one training picture."""
    wanted = _test_size(len(pictures))
    least = 1 if sum(count > 1 for count in counts.values()) > 1 else LEAST_TEST
    quota = {label: max(least, round(TEST_SHARE * count)) for label, count in counts.items()}
    left = Counter(counts)
    train: list[_Picture] = []
    test: list[_Picture] = []
    for picture in rng.sample(pictures, len(pictures)):
        if len(test) == wanted or quota[picture.label] == 0 or left[picture.label] == 1:
            train.append(picture)
            continue
        left[picture.label] -= 1
        if _decodes(folder / picture.name, faults):
            quota[picture.label] -= 1
            test.append(picture)
    if not test:
        raise DataError(f"No picture can be held out, since all candidates are damaged: {faults[-1]}.")
    return sorted(train, key=lambda picture: picture.name), sorted(test, key=lambda picture: picture.name)


def _test_size(pictures: int) -> int:
    """Number of held-out pictures; at least two where possible, since the mode `wrong` exchanges pictures."""
    return max(1, min(MOST_TEST, max(LEAST_TEST, round(TEST_SHARE * pictures)), pictures - 2))


def _decodes(path: Path, faults: list[str]) -> bool:
    try:
        open_image(path)
    except ImageError as fault:
        faults.append(str(fault))
        return False
    return True


def _conversations(pictures: Sequence[_Picture], rng: random.Random) -> dict[int, list[dict[str, Any]]]:
    """Distinct conversations, by the number of times that an epoch sees each; all classes get the same share.

    Every class gets as many as the smallest class allows, at most `CONVERSATIONS` in total. Every picture gets at least
    one, so where a class has more pictures than that, the smaller classes are repeated.
    """
    by_class: dict[str, list[_Picture]] = defaultdict(list)
    for picture in pictures:
        by_class[picture.label].append(picture)
    different = math.factorial(TURNS) * (len(by_class) - 1)  # per picture
    sizes = [len(members) for members in by_class.values()]
    wanted = max(max(sizes), min(math.ceil(CONVERSATIONS / len(by_class)), different * min(sizes)))
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for label, members in by_class.items():
        times = math.ceil(wanted / (different * len(members)))
        others = rng.sample([other for other in by_class if other != label], len(by_class) - 1)
        found[times] += _of_class(members, others, round(wanted / times), rng)
    return found


def _of_class(
    pictures: Sequence[_Picture], others: Sequence[str], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Distinct conversations about pictures of one class.

    The other classes take turns over all pictures. Each class then occurs equally often, and both answers of every
    yes/no question are about equally frequent. A picture gets one order of its questions again only with another class.
    """
    turn = 0
    for place, picture in enumerate(pictures):
        orders: dict[str, list[list[tuple[str, str]]]] = {}
        for number in range(count // len(pictures) + (place < count % len(pictures))):
            other = others[turn % len(others)]
            turn += 1
            if other not in orders:
                orders[other] = _orders(picture, other, rng)
            yield conversation(f"{picture.name}#{number}", picture.name, orders[other].pop())


def _orders(picture: _Picture, other: str, rng: random.Random) -> list[list[tuple[str, str]]]:
    """The three questions about a picture (its class, one with yes, one with no) in all orders, shuffled.

    In about half of the questions, earlier answers determine the answer, and the model learns to compare in text. The
    other half needs the picture.
    """
    turns = [(OPEN, picture.label), (IS_IT.format(picture.label), "yes"), (IS_IT.format(other), "no")]
    orders = [list(order) for order in itertools.permutations(turns)]
    return rng.sample(orders, len(orders))


def _test_questions(test: Sequence[_Picture], rng: random.Random) -> list[dict[str, Any]]:
    """An open question about every picture, and as many yes as no answers of every yes/no question."""
    questions = [Question(image=picture.name, text=OPEN, answer=picture.label) for picture in test]
    for label in sorted({picture.label for picture in test}):
        inside = [picture for picture in test if picture.label == label]
        outside = [picture for picture in test if picture.label != label]
        count = min(len(inside), len(outside))
        for answer, pool in zip(YES_NO, (inside, outside), strict=True):
            text = IS_IT.format(label)
            questions += [Question(image=item.name, text=text, answer=answer) for item in rng.sample(pool, count)]
    return [question_record(str(number), item, item.category) for number, item in enumerate(questions)]


class _Rows(Sequence[Any]):
    """A selection of a file's records, read on access."""

    def __init__(self, source: RecordSource, rows: Sequence[int]) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._source.value(self._rows[index])


def _from_file(path: Path, images: Path | None, rng: random.Random) -> OwnData:
    source = open_source(SourceConfig(path=str(path), format="json", image_folder=str(images) if images else None))
    folder = source.rules.folder
    faults: list[str] = []
    asked: dict[str, list[int]] = defaultdict(list)
    """Rows by their one picture; equal files count as one picture."""
    paths: dict[str, Path] = {}
    """The first file name of every picture."""
    several: dict[int, set[str]] = {}
    """Rows without a picture, or with several."""
    contents = _Contents()
    for row in range(len(source)):
        try:
            record = source[row]
            for picture in record.images:
                picture.size()
            shown = [contents(picture) for picture in record.images]
        except (RecordError, ImageError, FileError) as fault:
            faults.append(str(fault))
            continue
        if len(shown) == 1 and isinstance(record.images[0], LocalPicture):
            asked[shown[0]].append(row)
            paths.setdefault(shown[0], record.images[0].path)
        else:
            several[row] = set(shown)
    if len(asked) < 2:
        raise DataError(
            f"{path} has {len(asked)} different pictures with usable questions, expected at least 2: some to learn "
            f"from and some to hold out. {len(several)} of {len(source)} records have no picture or several, "
            f"{len(faults)} could not be used{', the first: ' + faults[0] if faults else ''}."
        )
    held_out, broken = _held_out(paths, rng, faults)
    rows = [row for name, rows in asked.items() if name not in held_out | broken for row in rows]
    apart = [row for row, shown in several.items() if not shown & (held_out | broken)]
    if len(apart) < len(several):
        faults.append(f"{len(several) - len(apart)} records with several pictures show a held-out or a broken one")
    rows += apart
    test = [(paths[name], source[row]) for name in asked if name in held_out for row in asked[name]]
    kept = len(asked) - len(held_out | broken)
    return _of_records(path, folder, source, sorted(rows), test, faults, pictures=(kept, len(held_out)))


class _Contents:
    """Identity of pictures: the hash of the file, which is read once. Frames are identified by video and number."""

    def __init__(self) -> None:
        self._known: dict[Path, str] = {}

    def __call__(self, picture: Picture) -> str:
        """A text that equal files share.

        Raises:
            ImageError: the file cannot be read.
        """
        if isinstance(picture, StoredPicture):
            return hashlib.sha256(picture.read()).hexdigest()
        if not isinstance(picture, LocalPicture):
            return picture.name
        if picture.path not in self._known:
            self._known[picture.path] = hashlib.sha256(read_picture(picture.path)).hexdigest()
        return self._known[picture.path]


def _held_out(paths: dict[str, Path], rng: random.Random, faults: list[str]) -> tuple[set[str], set[str]]:
    """Candidate pictures for questions, and those that turned out to be damaged."""
    wanted = _test_size(len(paths))
    chosen: set[str] = set()
    broken: set[str] = set()
    for name in rng.sample(sorted(paths), len(paths)):
        if len(chosen) < wanted:
            (chosen if _decodes(paths[name], faults) else broken).add(name)
    if not chosen or len(chosen | broken) == len(paths):
        raise DataError(f"No picture can be held out while another one is left for training: {faults[-1]}.")
    return chosen, broken


def _of_records(
    path: Path,
    folder: Path,
    source: RecordSource,
    rows: list[int],
    test: list[tuple[Path, Record]],
    faults: list[str],
    *,
    pictures: tuple[int, int],
) -> OwnData:
    sizes, turns, answers = [], [], [1]
    for row in rows:
        record = source[row]
        sizes.append(sum(len(turn.text.encode()) for turn in record.turns))
        turns.append(sum(turn.role == "assistant" for turn in record.turns))
        answers += [len(turn.text.encode()) for turn in record.turns if turn.role == "assistant"]
    return OwnData(
        images=folder,
        source=f"{len(source)} records of {path}",
        train=_Rows(source, rows),
        test=_questions_of(test, folder),
        train_pictures=pictures[0],
        test_pictures=pictures[1],
        turns=sum(turns) / len(turns),
        text_bytes=(sum(sizes) / len(sizes), max(sizes)),
        longest=(max(turns), max(answers)),
        faults=faults,
    )


def _questions_of(records: Sequence[tuple[Path, Record]], folder: Path) -> list[dict[str, Any]]:
    """Every question of the records by itself; a repeated question about one picture gets several answers."""
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path, record in records:
        image = path.relative_to(folder).as_posix()
        turns = [turn for turn in record.turns if turn.role != "system"]
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            answers[image, "".join(question.parts()).strip()].append(answer.text.strip())
    rows = []
    for number, ((image, text), given) in enumerate(answers.items()):
        short = {answer.lower() for answer in given} <= set(YES_NO)
        row = question_record(str(number), Question(image=image, text=text, answer=given[0]), "open")
        row["category"] = "yes_no" if short else "open"
        rows.append(row | ({"answers": given} if len(given) > 1 else {}))
    return rows


def lines_of(records: Sequence[Any]) -> Iterator[str]:
    """Records as lines of a JSONL file."""
    for index in range(len(records)):
        yield json.dumps(records[index], ensure_ascii=False) + "\n"
