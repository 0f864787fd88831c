"""What a data set from a user's pictures holds, and which of its pictures are held out."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moslora.data.images.record_picture import Picture
from mm_moslora.data.worker_processes import usable_processes
from mm_moslora.utils.errors import DataError
from mm_moslora.utils.identity import sha256_of, sha256_of_bytes
from mm_moslora.utils.progress_bar import Progress

TEST_SHARE, LEAST_TEST, MOST_TEST = 0.2, 2, 100
"""Share of held-out pictures, their minimum number where two are left for training, and their maximum number."""
LOPSIDED, LOPSIDED_OF_TWO, LEAST_ASKED = 0.5, 0.6, 10
"""Share of a question's most frequent answer above which a warning is due, for a question with two answers, and the
number of times that the question is asked at least."""
CANDIDATES = 1000
"""Pictures among which the next held-out one is chosen, so that the time does not grow with the data. An answer that
only later pictures of the random order have may not be held out."""
_SHOWN, _AT_ONCE = 3, 256


@dataclass(frozen=True, kw_only=True)
class OwnData:
    """A data set from the user's pictures."""

    images: Path
    """Root of the pictures' paths."""
    follow_links: bool
    """Whether links that lead out of the root are followed."""
    source: str
    """Description of the source."""
    train: Sequence[Any]
    """Records in the form that `data.train` takes; an epoch sees each once."""
    repeated: Mapping[int, Sequence[Any]] = field(default_factory=dict)
    """Further records, by the number of times that an epoch sees each."""
    test: list[dict[str, Any]]
    """Held-out questions with short answers, which are scored by exact match."""
    captions: list[dict[str, Any]] = field(default_factory=list)
    """Held-out questions with sentences as answers."""
    train_pictures: int
    test_pictures: int
    turns: float
    """Questions per conversation, on average."""
    text_bytes: tuple[float, int]
    """Bytes of text per conversation: the average, and the maximum."""
    longest: tuple[int, int]
    """Maximum questions per conversation, and bytes of the longest answer."""
    lopsided: list[str] = field(default_factory=list)
    """Questions that mostly have one answer."""
    used: int
    """Pictures of a folder, or records of a file, that are used."""
    faults: list[str] = field(default_factory=list)
    """Unusable pictures or records, each with its reason."""
    notes: list[str] = field(default_factory=list)
    """What else is left out: repeated pictures, files of other kinds, records that show a held-out picture."""

    @property
    def epoch(self) -> int:
        """Number of conversations of an epoch."""
        return len(self.train) + sum(times * len(records) for times, records in self.repeated.items())


def first_of(lines: Sequence[str], *, between: str = "\n", shown: int = _SHOWN) -> str:
    """The first texts of several, and the number of further ones."""
    more = len(lines) - shown
    return between.join([*lines[:shown], *([f"... and {more} more"] if more > 0 else [])])


def lopsided(answers: Mapping[str, Counter[str]]) -> list[str]:
    """The questions that can often be answered without the picture, the most frequently asked first."""
    lines = []
    for question, counts in sorted(answers.items(), key=lambda item: (-item[1].total(), item[0])):
        [(answer, times)] = counts.most_common(1)
        share = times / counts.total()
        if counts.total() >= LEAST_ASKED and share > (LOPSIDED_OF_TWO if len(counts) == 2 else LOPSIDED):
            lines.append(f'"{question}" has the answer "{answer}" {times} of {counts.total()} times')
    return lines


def test_size(pictures: int) -> int:
    """Number of held-out pictures; at least two where possible, since the mode `wrong` exchanges pictures."""
    return max(1, min(MOST_TEST, max(LEAST_TEST, round(TEST_SHARE * pictures)), pictures - 2))


def decode_all(pictures: Iterable[Picture], total: int) -> tuple[dict[str, str], dict[str, str]]:
    """Decode every picture once. By name: what equal pixels share, and what is wrong with those without it."""
    same, faults = dict[str, str](), dict[str, str]()
    remaining = iter(pictures)
    with ThreadPoolExecutor(usable_processes()) as pool, Progress("decode pictures", total, unit="picture") as progress:
        while part := list(itertools.islice(remaining, _AT_ONCE)):  # some hold their file's bytes
            for picture, (pixels, fault) in zip(part, pool.map(_decode, part), strict=True):
                (faults if fault else same)[picture.name] = fault or pixels
                progress.update(len(same) + len(faults))
    return same, faults


def _decode(picture: Picture) -> tuple[str, str]:
    """The hash of size and pixels, or what is wrong."""
    try:
        image = picture.rgb()
    except DataError as fault:
        return "", str(fault)
    return sha256_of_bytes(f"{image.size} ".encode(), image.tobytes()), ""


def draw(pictures: Mapping[str, Mapping[str, str]], paths: Mapping[str, Path], rng: random.Random) -> set[str]:
    """Draw pictures to hold out, so that every answer is held out as often as its share of the pictures."""
    # The next picture is always one whose answers lack most. An answer that occurs once has no share.
    size = test_size(len(pictures))
    times = Counter(pair for answers in pictures.values() for pair in answers.items())
    drawn: Counter[tuple[str, str]] = Counter()

    def lack(name: str) -> float:
        expected = {pair: times[pair] * size / len(pictures) for pair in pictures[name].items() if times[pair] > 1}
        return sum(1 - drawn[pair] / count for pair, count in expected.items()) / max(1, len(expected))

    by_content = sorted(pictures, key=lambda name: sha256_of(paths[name]))  # a new name alters no draw
    candidates = rng.sample(by_content, len(pictures))
    chosen: set[str] = set()
    while len(chosen) < size:
        name = max(candidates[:CANDIDATES], key=lack)
        candidates.remove(name)
        chosen.add(name)
        drawn.update(pictures[name].items())
    return chosen
