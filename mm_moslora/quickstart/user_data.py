"""Training data and held-out questions from a user's pictures, a folder per class or a file, split by picture."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora_eval.metrics.exact_match import relaxed

from mm_moslora.data.chat.record_turns import IMAGE, VIDEO
from mm_moslora.data.images.record_picture import LocalPicture
from mm_moslora.quickstart.instruction_data import ImageQuestion, conversation, question_record, yes_no_questions
from mm_moslora.quickstart.own_data import LEAST_TEST, OwnData, decode_all, first_of, test_size
from mm_moslora.quickstart.user_file import from_file
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.untrusted_files import FileError, FileFault, find_below

OPEN = "What does the picture show?"
IS_IT = 'Does the picture show "{}"?'
TURNS = 3
"""Questions per generated conversation, at most."""
CONVERSATIONS = 4800
"""Target number of conversations about pictures of classes; more where there are more pictures."""
_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_SHOWN_CLASSES = 5


def read_own(path: Path, *, images: Path | None = None, seed: int = 0, follow_links: bool = False) -> OwnData:
    """Build data from a folder with a sub-folder per class, or from a LLaVA file and the folder of its `images`."""
    if path.is_dir():
        if images is not None:
            raise DataError(f"--image-folder is {images}, but {path} is a folder of pictures. Leave it out.")
        return _from_folder(path.resolve(), random.Random(f"own {seed}"), follow_links=follow_links)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a folder with a sub-folder of pictures per class, or a file.")
    return from_file(path, images, random.Random(f"own {seed}"), follow_links=follow_links)


@dataclass(frozen=True)
class _Picture:
    name: str
    label: str


def _from_folder(folder: Path, rng: random.Random, *, follow_links: bool) -> OwnData:
    faults, notes = list[str](), list[str]()
    pictures = list(_pictures(folder, faults, notes, follow_links=follow_links))
    counts = Counter(picture.label for picture in pictures)
    if counts and {label.lower() for label in counts} <= _SPLITS:
        raise DataError(
            f"The sub-folders of {folder} are {', '.join(sorted(counts))}: splits of a data set, not classes. "
            "Give the folder with the classes, such as the first of these; the held-out pictures are chosen from it."
        )
    if len(counts) < 2 or max(counts.values()) < 2:
        raise DataError(_too_little(folder, counts, faults))
    train, test = _split(pictures, counts, rng)
    by_times = _conversations(train, rng)
    records = [record for part in by_times.values() for record in part]
    sizes = [sum(len(turn["value"].encode()) for turn in record["conversations"]) for record in records]
    return OwnData(
        images=folder,
        follow_links=follow_links,
        source=f"{len(counts)} classes in {folder}",
        train=by_times.pop(1),
        repeated=by_times,
        test=_test_questions(test, rng),
        train_pictures=len(train),
        test_pictures=len(test),
        turns=sum(len(record["conversations"]) for record in records) / 2 / len(records),
        text_bytes=(sum(sizes) / len(sizes), max(sizes)),
        longest=(TURNS, max(len(label.encode()) for label in counts)),
        used=len(train) + len(test),
        faults=faults,
        notes=notes,
    )


def _pictures(folder: Path, faults: list[str], notes: list[str], *, follow_links: bool) -> Iterator[_Picture]:
    """The readable pictures in the class folders, without duplicates."""
    named: dict[str, _Picture] = {}
    others: Counter[str] = Counter()
    usable: Counter[str] = Counter()
    classes: dict[str, tuple[str, str]] = {}
    for path in sorted(_files(folder, faults, follow_links=follow_links)):
        parts = path.relative_to(folder).parts
        if len(parts) < 2 or any(part.startswith((".", "__MACOSX")) for part in parts):
            continue
        usable[parts[0]] += 0
        if path.suffix and path.suffix.lower() not in _SUFFIXES:
            others[path.suffix.lower()] += 1
            continue
        picture = _Picture("/".join(parts), _class_name(parts[0], classes))
        try:
            find_below(folder, picture.name, follow_links=follow_links)
            named[str(path)] = picture
        except FileError as fault:
            faults.append(f"{fault}{', or give --follow-links' if fault.fault is FileFault.ESCAPES else ''}")
    same, damaged = decode_all((LocalPicture(Path(path)) for path in named), len(named))
    faults[:] = [fault.encode("utf-8", "backslashreplace").decode() for fault in (*faults, *damaged.values())]
    seen: dict[str, _Picture] = {}
    for name, pixels in same.items():
        picture = named[name]
        first = seen.setdefault(pixels, picture)
        if first.label != picture.label:
            raise DataError(
                f"{picture.name} and {first.name} in {folder} are the same picture in two classes, {picture.label!a} "
                f"and {first.label!a}. Delete the one in the wrong folder."
            )
        if first is picture:
            usable[picture.name.partition("/")[0]] += 1
            yield picture
        else:
            notes.append(f"{picture.name}: the same picture as {first.name}; it is used once")
    notes[:0] = [f"{name}: gives no picture, so nothing is asked about it" for name, n in usable.items() if not n]
    if others:
        kinds = ", ".join(f"{count} {ascii(suffix)[1:-1]}" for suffix, count in others.most_common(5))
        notes.append(f"{others.total()} files of other kinds: {kinds}; pictures are {', '.join(sorted(_SUFFIXES))}")


def _files(folder: Path, faults: list[str], *, follow_links: bool) -> Iterator[Path]:
    """All files below a folder; a folder that several links lead to is entered once."""
    entered: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=follow_links):
        for name in sorted(folders):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if real in entered:
                folders.remove(name)
            elif os.path.islink(path) and not follow_links:
                faults.append(
                    f"{os.path.relpath(path, folder)}: is a link to a folder; copy it, or give --follow-links"
                )
            entered.add(real)
        yield from (Path(parent, name) for name in names)


def _class_name(folder: str, names: dict[str, tuple[str, str]]) -> str:
    """The readable class name of a folder; `names` has folder and name by the answer that exact match compares."""
    label = " ".join(folder.replace("_", " ").split())
    answer = relaxed(unicodedata.normalize("NFC", label))
    controls = any(unicodedata.category(mark) == "Cc" for mark in folder)
    if not answer or controls or any(mark in label for mark in (IMAGE, VIDEO, "<|")):
        raise DataError(f"The folder {folder!a} is not a class name that a question can hold. Rename it.")
    other, first = names.setdefault(answer, (folder, label))
    if first != label:
        raise DataError(
            f"The folders {other!a} and {folder!a} are one answer: they differ only in case, closing periods or "
            "encoding. Put their pictures into one folder, or rename one."
        )
    return label


def _too_little(folder: Path, counts: Counter[str], faults: list[str]) -> str:
    inner = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    readable = f"{sum(counts.values())} readable pictures of {len(counts)} classes ({_few(sorted(counts))})"
    loose = sum(path.is_file() and not path.name.startswith(".") for path in folder.iterdir())
    broken = f" {len(faults)} files could not be used, the first: {faults[0]}." if faults else ""
    beside = f" {loose} files lie beside the sub-folders, not in one." if loose else ""
    remedy = (
        f"Put pictures of each class into a sub-folder of its own, at least two classes (found: "
        f"{_few(inner) or 'no sub-folders'}), or write questions into a file "
        "(my_images.md in `mm-moslora config --files tutorials`)."
    )
    return f"{folder} holds {readable if counts else 'no readable pictures in sub-folders'}.{broken}{beside} {remedy}"


def _few(names: Sequence[str]) -> str:
    return first_of(names, between=", ", shown=_SHOWN_CLASSES)


def _split(
    pictures: Sequence[_Picture], counts: Counter[str], rng: random.Random
) -> tuple[list[_Picture], list[_Picture]]:
    """Training and held-out pictures, of every class the same share. A class keeps at least one training picture."""
    size = test_size(len(pictures))
    least = 1 if sum(count > 1 for count in counts.values()) > 1 else LEAST_TEST
    quota = {label: max(least, round(size * count / len(pictures))) for label, count in counts.items()}
    remaining = Counter(counts)
    train: list[_Picture] = []
    test: list[_Picture] = []
    for picture in rng.sample(pictures, len(pictures)):
        if len(test) == size or quota[picture.label] == 0 or remaining[picture.label] == 1:
            train.append(picture)
            continue
        remaining[picture.label] -= 1
        quota[picture.label] -= 1
        test.append(picture)
    return sorted(train, key=lambda picture: picture.name), sorted(test, key=lambda picture: picture.name)


def _conversations(pictures: Sequence[_Picture], rng: random.Random) -> dict[int, list[dict[str, Any]]]:
    """Distinct conversations, by the number of times that an epoch sees each; all classes get the same share."""
    # Every class gets as many as the smallest class allows, at most `CONVERSATIONS` in total. Every picture gets at
    # least one, so where a class has more pictures than that, the smaller classes are repeated.
    by_class: dict[str, list[_Picture]] = defaultdict(list)
    for picture in pictures:
        by_class[picture.label].append(picture)
    different = math.factorial(TURNS) * (len(by_class) - 1)  # per picture
    sizes = [len(members) for members in by_class.values()]
    per_class = max(max(sizes), min(math.ceil(CONVERSATIONS / len(by_class)), different * min(sizes)))
    by_times: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for label, members in by_class.items():
        times = math.ceil(per_class / (different * len(members)))
        others = rng.sample([other for other in by_class if other != label], len(by_class) - 1)
        by_times[times] += _of_class(members, others, round(per_class / times), rng)
    return by_times


def _of_class(
    pictures: Sequence[_Picture], others: Sequence[str], count: int, rng: random.Random
) -> Iterator[dict[str, Any]]:
    """Distinct conversations about pictures of one class."""
    # The other classes take turns over all pictures. Each class then occurs equally often, and both answers of every
    # yes/no question are about equally frequent. A picture gets one order again only with another class.
    turn = 0
    for index, picture in enumerate(pictures):
        orders: dict[str, list[list[tuple[str, str]]]] = {}
        for number in range(count // len(pictures) + (index < count % len(pictures))):
            other = others[turn % len(others)]
            turn += 1
            if other not in orders:
                orders[other] = _orders(picture, other, rng)
            yield conversation(f"{picture.name}#{number}", picture.name, orders[other].pop())


def _orders(picture: _Picture, other: str, rng: random.Random) -> list[list[tuple[str, str]]]:
    """The three questions about a picture (its class, one with yes, one with no) in all orders, shuffled."""
    # In about half of the questions, earlier answers determine the answer, and the model learns to compare in text. The
    # other half needs the picture.
    turns = [(OPEN, picture.label), (IS_IT.format(picture.label), "yes"), (IS_IT.format(other), "no")]
    orders = [list(order) for order in itertools.permutations(turns)]
    return rng.sample(orders, len(orders))


def _test_questions(test: Sequence[_Picture], rng: random.Random) -> list[dict[str, Any]]:
    """An open question about every picture, and as many yes as no answers of every yes/no question."""
    questions = [ImageQuestion(image=picture.name, text=OPEN, answer=picture.label) for picture in test]
    for label in sorted({picture.label for picture in test}):
        inside = [picture.name for picture in test if picture.label == label]
        outside = [picture.name for picture in test if picture.label != label]
        questions += yes_no_questions(IS_IT.format(label), inside, outside, rng)
    return [question_record(str(number), item, item.category) for number, item in enumerate(questions)]


def lines_of(records: Sequence[Any]) -> Iterator[str]:
    """Records as lines of a JSONL file."""
    for index in range(len(records)):
        yield json.dumps(records[index], ensure_ascii=False) + "\n"
