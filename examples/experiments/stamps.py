"""Visual instruction data from Tux Paint's stamps: cut-out pictures, each with an English sentence and a category.

Pictures with the same content never stand on both sides of the split: those with the same sentence, and those that
look nearly the same, stay together.
"""

from __future__ import annotations

import random
import re
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mm_moslora.launch.child_processes import output_of
from mm_moslora.quickstart.asset_cache import Asset, Say, cached, run_download, silent, verify
from mm_moslora.quickstart.instruction_data import (
    DatasetFiles,
    ImageQuestion,
    Record,
    claim,
    conversation,
    question_record,
    write_files,
    yes_no_questions,
)
from mm_moslora.utils.errors import AssetError, DataError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.untrusted_files import read_text

IMAGES = "images"
"""Folder of the pictures, below the data folder."""
SENTENCE = "What is shown?"
CATEGORY = "What kind of thing is this?"
SIDE = 224
"""Side of the square output pictures, pixels."""
MARGIN = 0.04
"""White border, as a share of the side."""

# Folder of the package -> (answer, "Is this ...?"). A folder below `MIN_CATEGORY` pictures has sentences only.
CATEGORIES = {
    "animals": ("animal", "an animal"),
    "clothes": ("clothing", "a piece of clothing"),
    "food": ("food", "food"),
    "hobbies": ("hobby", "something for a hobby"),
    "household": ("household", "a household item"),
    "medical": ("medical", "something medical"),
    "military": ("military", "something military"),
    "naturalforces": ("nature", "a force of nature"),
    "people": ("person", "a person"),
    "plants": ("plant", "a plant"),
    "seasonal": ("holiday", "something for a holiday"),
    "space": ("space", "something in space"),
    "sports": ("sport", "something for sports"),
    "symbols": ("symbol", "a symbol"),
    "town": ("town", "something in a town"),
    "vehicles": ("vehicle", "a vehicle"),
}
MIN_CATEGORY = 20
LEFT_OUT = ("symbols/alphabets",)
"""Letter shapes: 158 pictures with the letter as their sentence."""

THUMBNAIL = 16
NEAR = 14.0
"""Root mean square difference of 16 x 16 thumbnails, of 255, below which two pictures count as equal."""


STAMPS = Asset(
    name="tuxpaint-stamps-default",
    version="2025.03.31-1",
    sha256="6312d03a37d0220b10fc91a7467bf2a2a2336e08c2f416de04311d25fd7aeacb",
    licence="GPL-2.0-or-later",
    source="Debian",
    bytes=80_872_956,
    what="pictures and sentences of Tux Paint's stamps",
)


def fetch_stamps(say: Say = silent) -> Path:
    """Return the folder of Tux Paint's stamps: ``CATEGORY/.../NAME.png`` with ``NAME.txt`` beside it.

    Debian's apt-get and dpkg-deb fetch and unpack the package; a package that lies in the working directory is taken.

    Raises:
        AssetError: it cannot be downloaded or unpacked, or differs from the pinned file.
    """

    def build(folder: Path) -> None:
        name = f"{STAMPS.name}_{STAMPS.version}_all.deb"
        with tempfile.TemporaryDirectory() as work:
            package = Path(name) if Path(name).is_file() else Path(work) / name
            if package.parent == Path(work):
                say(f"downloading {STAMPS}")
                remedy = "run `apt-get update`, or put the package into the working directory"
                run_download(
                    ["apt-get", "download", f"{STAMPS.name}={STAMPS.version}"], STAMPS, remedy=remedy, cwd=Path(work)
                )
            verify(package, STAMPS)
            root = Path(work) / "root"
            done = output_of(["dpkg-deb", "-x", package, root])
            if done.returncode:
                raise AssetError(f"{package.name} cannot be unpacked: {done.stderr.strip()}. Download it again.")
            shared = root / "usr" / "share"
            for item in sorted((shared / "tuxpaint" / "stamps").rglob("*")):
                if item.suffix in {".png", ".txt"}:
                    target = folder / item.relative_to(shared / "tuxpaint" / "stamps")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(item, target)
            shutil.copy(shared / "doc" / STAMPS.name / "copyright", folder)

    return cached("tuxpaint-stamps", STAMPS, build, say)


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """A picture of the package."""

    path: Path
    name: str
    """Path below the package's folder, without suffix."""
    sentence: str
    folder: str
    """Top folder: the category."""


def build_stamps(
    source: Path, out: Path, *, test_share: float = 0.15, seed: int = 0, limit: int | None = None, replace: bool = True
) -> DatasetFiles:
    """Write square pictures on white, training and held-out files from a stamps folder.

    Args:
        seed: chooses the split and the negative pictures of yes/no questions.
        limit: maximum number of pictures (for a smoke run).

    Raises:
        DataError: `source` holds no stamps, or `test_share` is not between 0 and 1.
        ConfigError: `out` holds files of another program; see `write_files`.
    """
    if not 0 < test_share < 1:
        raise DataError(f"test_share is {test_share}, expected a share between 0 and 1.")
    rng = random.Random(f"stamps {seed}")
    stamps = find_stamps(source)
    if limit is not None and limit < len(stamps):
        stamps = sorted(rng.sample(stamps, limit), key=lambda stamp: stamp.name)
    pictures = {stamp.name: square(stamp.path) for stamp in stamps}
    train, test = split(stamps, pictures, test_share, rng)
    claim(out, [IMAGES])
    images = out / IMAGES
    counts = Counter(stamp.folder for stamp in stamps)
    usable = {folder for folder in counts if counts[folder] >= MIN_CATEGORY or limit is not None}
    align, records = _align_records(train, usable), _train_records(train, usable, rng)
    files = write_files(out, images, align, records, _test_records(test, usable, rng), replace=replace)
    for name, picture in pictures.items():
        target = images / f"{name}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            picture.save(part, "PNG")
    return files


def find_stamps(source: Path) -> list[Stamp]:
    """Return the pictures with an English sentence, sorted by name, without the letter shapes.

    Raises:
        DataError: there are none.
    """
    stamps = []
    for text in sorted(source.rglob("*.txt")):
        name = text.relative_to(source).with_suffix("").as_posix()
        picture = text.with_suffix(".png")
        folder = name.split("/")[0]
        if name.startswith(LEFT_OUT) or folder not in CATEGORIES or not picture.is_file():
            continue
        lines = read_text(text).splitlines()
        if lines and (sentence := lines[0].strip()):
            stamps.append(Stamp(path=picture, name=name, sentence=sentence, folder=folder))
    if not stamps:
        raise DataError(f"{source} holds no stamps (pictures with a .txt beside them). Delete it and run again.")
    return stamps


def square(path: Path) -> Image.Image:
    """Return the picture on white, centred in a square of `SIDE` pixels."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    scale = round(SIDE * (1 - 2 * MARGIN)) / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Resampling in premultiplied alpha, so that the colour under transparent pixels does not bleed into the edges.
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB").resize(size, Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    canvas.paste(flat, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return canvas


def split(
    stamps: Sequence[Stamp], pictures: dict[str, Image.Image], test_share: float, rng: random.Random
) -> tuple[list[Stamp], list[Stamp]]:
    """Split by picture and category; groups of `same_thing` stay together."""
    quota = {folder: round(count * test_share) for folder, count in Counter(s.folder for s in stamps).items()}
    groups = same_thing(stamps, pictures)
    rng.shuffle(groups)
    train, test = [], []
    for group in groups:
        counts = Counter(stamp.folder for stamp in group)
        if all(counts[folder] <= quota[folder] for folder in counts):
            quota = {folder: count - counts[folder] for folder, count in quota.items()}
            test += group
        else:
            train += group
    return sorted(train, key=lambda stamp: stamp.name), sorted(test, key=lambda stamp: stamp.name)


def same_thing(stamps: Sequence[Stamp], pictures: dict[str, Image.Image]) -> list[list[Stamp]]:
    """Group stamps with the same sentence, or with nearly equal pictures, mirrored ones included."""
    parent = list(range(len(stamps)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first: dict[str, int] = {}
    for index, stamp in enumerate(stamps):
        parent[root(index)] = root(first.setdefault(_key(stamp.sentence), index))
    size, box = (THUMBNAIL, THUMBNAIL), Image.Resampling.BOX
    thumbnails = np.stack([np.asarray(pictures[stamp.name].resize(size, box), dtype=np.float32) for stamp in stamps])
    mirrored = thumbnails[:, :, ::-1]
    for index in range(len(stamps)):
        for others in (thumbnails, mirrored):
            difference = np.sqrt(np.mean((others - thumbnails[index]) ** 2, axis=(1, 2, 3)))
            for other in np.flatnonzero(difference < NEAR):
                parent[root(int(other))] = root(index)
    groups: dict[int, list[Stamp]] = defaultdict(list)
    for index, stamp in enumerate(stamps):
        groups[root(index)].append(stamp)
    return [groups[key] for key in sorted(groups)]


def _key(sentence: str) -> str:
    words = re.findall(r"[a-z]+", sentence.lower())
    return " ".join(word for word in words if word not in {"a", "an", "the", "another", "some"}) or sentence


def _image(stamp: Stamp) -> str:
    return f"{stamp.name}.png"


def category_questions(stamps: Sequence[Stamp], usable: set[str], rng: random.Random) -> list[ImageQuestion]:
    """Whether pictures show something of a category, with as many yes as no answers."""
    questions = []
    for folder in sorted(usable):
        inside = [_image(stamp) for stamp in stamps if stamp.folder == folder]
        outside = [_image(stamp) for stamp in stamps if stamp.folder != folder]
        questions += yes_no_questions(f"Is this {CATEGORIES[folder][1]}?", inside, outside, rng)
    return questions


VARIANTS = 4
"""Conversations per picture, each with other yes/no questions."""
SENTENCES = 2
"""Number of these conversations that ask for the sentence."""


def _align_records(stamps: Sequence[Stamp], usable: set[str]) -> list[Record]:
    """Category questions only: per minute, one word per picture teaches a projector more than a sentence."""
    return [
        conversation(f"stamps/{stamp.name}", _image(stamp), [(CATEGORY, CATEGORIES[stamp.folder][0])])
        for stamp in stamps
        if stamp.folder in usable
    ]


def _train_records(stamps: Sequence[Stamp], usable: set[str], rng: random.Random) -> list[Record]:
    """Short conversations of one question each, several per picture: category, yes/no and, less often, the sentence.

    A yes to "Is this an animal?" reveals the category, and the category answers the yes/no questions. In longer
    conversations most answers would follow from earlier ones, and the picture would hardly matter.
    """
    records = []
    for variant in range(VARIANTS):
        by_image: dict[str, list[ImageQuestion]] = defaultdict(list)
        for question in category_questions(stamps, usable, rng):
            by_image[question.image].append(question)
        for stamp in stamps:
            image = _image(stamp)
            turns = [(question.text, question.answer) for question in by_image[image][:1]]
            if stamp.folder in usable:
                turns.append((CATEGORY, CATEGORIES[stamp.folder][0]))
            if variant < SENTENCES:
                turns.append((SENTENCE, stamp.sentence))
            for index, turn in enumerate(turns):
                records.append(conversation(f"stamps/{stamp.name}#{variant}.{index}", image, [turn]))
    return records


def _test_records(stamps: Sequence[Stamp], usable: set[str], rng: random.Random) -> list[Record]:
    records = []
    for stamp in stamps:
        sentence = ImageQuestion(image=_image(stamp), text=SENTENCE, answer=stamp.sentence)
        records.append(question_record(f"{stamp.name}#sentence", sentence, "sentence"))
        if stamp.folder in usable:
            kind = ImageQuestion(image=_image(stamp), text=CATEGORY, answer=CATEGORIES[stamp.folder][0])
            records.append(question_record(f"{stamp.name}#category", kind, "category"))
    for index, question in enumerate(category_questions(stamps, usable, rng)):
        records.append(question_record(f"yes_no#{index}", question, "yes_no"))
    return records
