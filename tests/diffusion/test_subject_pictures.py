"""Pictures of diffusion runs: which, in which order, and how they become pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_moslora.diffusion.diffusion_recipe import PicturesConfig
from mm_moslora.diffusion.subject_pictures import PictureSet, PromptedPicture, subject_pictures
from mm_moslora.utils.errors import DataError


def halves(path: Path, size: tuple[int, int] = (48, 32), orientation: int = 1) -> Path:
    """A picture with a red left and a blue right half, and an EXIF orientation."""
    picture = Image.new("RGB", size, "blue")
    picture.paste("red", (0, 0, size[0] // 2, size[1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    return path


def one(path: Path, **more: object) -> PictureSet:
    pictures = [PromptedPicture(path=path, prompt="a thing")]
    return replace(PictureSet(pictures=pictures, name="subject", seed=0, side=16), **more)


def test_a_picture_is_upright_and_sizes_tell_the_original_the_crop_and_the_target(tmp_path: Path) -> None:
    upright = one(halves(tmp_path / "a.png")).pixels(0, 0)
    assert upright.sizes.tolist() == [32, 48, 0, 4, 16, 16]  # 48 x 32 becomes 24 x 16; the middle begins at 4
    red, blue = upright.values[:, 8, 1], upright.values[:, 8, 14]
    assert red.tolist() == [1, -1, -1]
    assert blue.tolist() == [-1, -1, 1]
    turned = one(halves(tmp_path / "b.jpg", orientation=6)).pixels(0, 0)  # 6: the camera was turned
    assert turned.sizes.tolist()[:2] == [48, 32]
    assert turned.values[0, 2, 8] > 0.8 > -0.8 > turned.values[0, 13, 8]  # red is above blue now


def test_flips_and_random_crops_change_over_epochs_and_stay_where_latents_are_cached(tmp_path: Path) -> None:
    pictures = one(halves(tmp_path / "a.png"), flip=True, crop="random")
    seen = [pictures.pixels(0, epoch) for epoch in range(8)]
    assert len({tuple(item.sizes.tolist()) for item in seen}) > 2
    assert {bool(item.values[0, 0, 0] > 0) for item in seen} == {True, False}
    assert torch.equal(pictures.pixels(0, 3).values, seen[3].values)
    fixed = replace(pictures, fixed=True)
    assert torch.equal(fixed.pixels(0, 0).values, fixed.pixels(0, 5).values)


def test_each_epoch_holds_every_repeat_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    pictures = one(tmp_path, repeats=6)
    rows = list(pictures.entries(0, 12))
    assert sorted(rows[:6]) == [(entry, 0) for entry in range(6)]
    assert sorted(rows[6:]) == [(entry, 1) for entry in range(6)]
    assert [entry for entry, _ in rows[:6]] != [entry for entry, _ in rows[6:]]
    assert list(pictures.entries(5, 3)) == rows[5:8]


def test_a_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    prints = []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "a.bmp")
        prints.append((one(tmp_path / "a.bmp").fingerprint(), one(tmp_path / "a.bmp").fingerprint(sizes_only=True)))
    assert prints[0][0] != prints[1][0]
    assert prints[0][1] == prints[1][1]


def captions(folder: Path, *lines: object) -> PicturesConfig:
    folder.mkdir(exist_ok=True)
    halves(folder / "1.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return PicturesConfig(pictures=str(folder), caption_column="text")


def test_captions_are_read_from_metadata(tmp_path: Path) -> None:
    config = captions(tmp_path / "set", {"file_name": "1.png", "text": "a flag"})
    (found,) = subject_pictures(config, tmp_path / "set")
    assert (found.path.name, found.prompt) == ("1.png", "a flag")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"file_name": "1.png", "txt": "x"}, "Did you mean 'txt'"),
        ({"file_name": "2.png", "text": "x"}, "not in its folder, first 2.png"),
        ({"file_name": "../1.png", "text": "x"}, "path_escapes|leaves"),
        ("text", "expected an object"),
    ],
)
def test_a_wrong_caption_is_one_error(line: object, said: str, tmp_path: Path) -> None:
    config = captions(tmp_path / "set", line)
    with pytest.raises(DataError, match=said):
        subject_pictures(config, tmp_path / "set")


def test_a_folder_without_pictures_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no pictures"):
        subject_pictures(PicturesConfig(pictures=str(tmp_path), prompt="x"), tmp_path)
    halves(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="HTML"):
        one(tmp_path / "1.png").pixels(0, 0)
