"""The pictures of a diffusion run: which ones, with which prompts, in which order, and how one becomes pixels.

Nothing here keeps a state: order, crops and flips follow from the seed and a position alone, so that a resumed run sees
what the straight run would have seen.

Shapes: pixels ``[3, S, S]`` from -1 to 1; sizes ``[6]``: original height and width, top and left of the crop, target
height and width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mm_moslora.data.images.record_picture import open_image
from mm_moslora.diffusion.diffusion_recipe import PicturesConfig
from mm_moslora.utils.errors import DataError, suggestion
from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.untrusted_data import parse_object
from mm_moslora.utils.untrusted_files import FileError, find_below, read_text_below

METADATA = "metadata.jsonl"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def generator(*key: object) -> torch.Generator:
    """A generator on the CPU whose numbers follow from the key alone."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


@dataclass(frozen=True, kw_only=True)
class PromptedPicture:
    """A picture file and its prompt."""

    path: Path
    prompt: str


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """A picture as the VAE takes it."""

    values: Tensor
    sizes: Tensor


@dataclass(frozen=True, kw_only=True)
class PictureSet:
    """Pictures with prompts, repeated and in an order.

    Entry number ``i`` of an epoch of ``len(pictures) * repeats`` entries is one repeat of one picture.
    """

    pictures: list[PromptedPicture]
    name: str
    """Tells the draws of several sets apart."""
    seed: int
    side: int
    """S, pixels."""
    crop: str = "centre"
    flip: bool = False
    repeats: int = 1
    fixed: bool = False
    """Whether crops and flips stay the same over epochs, as cached latents need."""

    def __len__(self) -> int:
        return len(self.pictures) * self.repeats

    def entries(self, start: int, count: int) -> Iterator[tuple[int, int]]:
        """Entry and epoch at the positions of the endless shuffled order, from `start` on."""
        orders: dict[int, list[int]] = {}
        for position in range(start, start + count):
            epoch, index = divmod(position, len(self))
            if epoch not in orders:
                draws = generator(self.seed, self.name, "order", epoch)
                orders[epoch] = torch.randperm(len(self), generator=draws).tolist()
            yield orders[epoch][index], epoch

    def prompt(self, entry: int) -> str:
        """The prompt of an entry."""
        return self.pictures[entry % len(self.pictures)].prompt

    def pixels(self, entry: int, epoch: int) -> Pixels:
        """Read, mirror, resize and crop the picture of an entry.

        Raises:
            ImageError: the file cannot be read as a picture.
        """
        draws = generator(self.seed, self.name, "picture", entry, 0 if self.fixed else epoch)
        picture = open_image(self.pictures[entry % len(self.pictures)].path)
        if self.flip and torch.rand((), generator=draws) < 0.5:
            picture = ImageOps.mirror(picture)
        original = (picture.height, picture.width)
        scale = self.side / min(picture.size)
        width, height = (max(self.side, round(scale * length)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        top, left = (height - self.side) // 2, (width - self.side) // 2
        if self.crop == "random":
            top, left = (int(torch.randint(length - self.side + 1, (), generator=draws)) for length in (height, width))
        square = picture.crop((left, top, left + self.side, top + self.side))
        values = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(self.side, self.side, 3)
        sizes = torch.tensor([*original, top, left, self.side, self.side])
        return Pixels(values=values.permute(2, 0, 1).float() / 127.5 - 1, sizes=sizes)

    def fingerprint(self, *, sizes_only: bool = False) -> str:
        """Digest of the names, contents and prompts.

        Args:
            sizes_only: sizes on disk instead of contents, as checkpoints of earlier versions have it.
        """
        files = [item.path for item in self.pictures]
        contents = [path.stat().st_size if sizes_only else sha256_of(path) for path in files]
        rows = [[item.path.name, content, item.prompt] for item, content in zip(self.pictures, contents, strict=True)]
        return hashlib.sha256(json.dumps([rows, self.repeats]).encode()).hexdigest()


def picture_files(folder: Path) -> list[Path]:
    """The files with a picture's suffix in a folder, sorted; none where it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def subject_pictures(config: PicturesConfig, folder: Path) -> list[PromptedPicture]:
    """The pictures of a recipe with their prompts.

    Args:
        config: the recipe's `data`.
        folder: `data.pictures`, or where the drawn ones are.

    Raises:
        DataError: no pictures, or a caption that is missing or refers to no picture.
    """
    if config.caption_column is not None:
        return _captioned(folder, config.caption_column)
    files = picture_files(folder)
    if not files:
        what = "holds no pictures" if folder.is_dir() else "is no folder"
        raise DataError(f"data.pictures {folder} {what} ({', '.join(SUFFIXES)}). Name a folder with pictures in it.")
    root = folder.resolve()
    return [PromptedPicture(path=_below(root, path.name), prompt=config.prompt or "") for path in files]


def _below(root: Path, name: str) -> Path:
    try:
        return find_below(root, name)
    except FileError as error:
        raise DataError(f"data.pictures: {error}") from error


def _captioned(folder: Path, column: str) -> list[PromptedPicture]:
    """The lines of `metadata.jsonl`, as diffusers' scripts and `datasets` read it."""
    try:
        text = read_text_below(folder, METADATA)
    except (FileError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / METADATA} cannot be read: {error}") from error
    if text is None:
        raise DataError(
            f"data.caption_column is {column!r}, but {folder} has no {METADATA}. Write one line per picture: "
            f'{{"file_name": "1.jpg", "{column}": "a photo of ..."}}; or give data.prompt.'
        )
    pictures, root = [], folder.resolve()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{folder / METADATA}, line {number}"
        try:
            row: dict[str, str] = parse_object(line)
        except ValueError as error:
            raise DataError(f"{where} {error}; expected an object with file_name.") from error
        for key in ("file_name", column):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(
                    f"{where} has {key} {row.get(key)!r}, expected text.{suggestion(key, row)} Its keys: "
                    f"{', '.join(row) or 'none'}."
                )
        pictures.append(PromptedPicture(path=_below(root, row["file_name"]), prompt=row[column]))
    if not pictures:
        raise DataError(f"{folder / METADATA} has no lines, expected one per picture.")
    missing = [item.path.name for item in pictures if not item.path.is_file()]
    if missing:
        raise DataError(
            f"{folder / METADATA} names {len(missing)} pictures that are not in its folder, first {missing[0]}. "
            "Correct file_name, or add the files."
        )
    return pictures
