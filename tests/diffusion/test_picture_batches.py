"""Pictures of diffusion runs: which, in which order, and how they become pixels and latents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mm_moslora.diffusion.diffusion_recipe import PicturesConfig
from mm_moslora.diffusion.picture_batches import LatentBatches, PictureSet, pictures_in
from mm_moslora.diffusion.pipeline_families import load_family
from mm_moslora.utils.errors import DataError


def halves(path: Path, orientation: int = 1, **changes: Any) -> PictureSet:
    """A picture with a red left and a blue right half, and an EXIF orientation."""
    picture = Image.new("RGB", (48, 32), "blue")
    picture.paste("red", (0, 0, 24, 32))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif)
    config = PicturesConfig(pictures="", prompt="", **changes)
    return PictureSet(name="subject", files=[path], prompt="", weight=1.0, config=config, seed=0, side=16)


def test_a_picture_is_upright_and_sizes_tell_the_original_the_crop_and_the_target(tmp_path: Path) -> None:
    values, sizes = halves(tmp_path / "a.png").pixels(0, 0)
    assert sizes.tolist() == [32, 48, 0, 4, 16, 16]  # 48 x 32 becomes 24 x 16; the middle begins at 4
    assert values[0, :, 8, 1].tolist() == [1, -1, -1]
    values, sizes = halves(tmp_path / "b.jpg", orientation=6).pixels(0, 0)  # 6: the camera was turned
    assert sizes.tolist()[:2] == [48, 32]
    assert values[0, 0, 2, 8] > 0.8 > -0.8 > values[0, 0, 13, 8]  # red is above blue now


def test_orders_flips_and_random_crops_change_over_epochs(tmp_path: Path) -> None:
    pictures = halves(tmp_path / "a.png", flip=True, crop="random")
    seen = [pictures.pixels(0, epoch) for epoch in range(8)]
    assert len({tuple(sizes.tolist()) for _, sizes in seen}) > 2
    assert {bool(values[0, 0, 0, 0] > 0) for values, _ in seen} == {True, False}
    several = replace(pictures, files=[tmp_path] * 6)
    rows = list(several.entries(0, 12))
    assert [sorted(rows[i : i + 6]) for i in (0, 6)] == [[(entry, epoch) for entry in range(6)] for epoch in (0, 1)]
    assert [entry for entry, _ in rows[:6]] != [entry for entry, _ in rows[6:]]
    assert list(several.entries(5, 3)) == rows[5:8]
    assert list(replace(several, seed=1).entries(0, 6)) != rows[:6]


def test_a_cache_keeps_crops_and_latents_are_drawn_anew(recipe: Any, monkeypatch: Any, tmp_path: Path) -> None:
    fixed = halves(tmp_path / "a.png", flip=True, crop="random", cache_latents=True)
    assert torch.equal(fixed.pixels(0, 0)[0], fixed.pixels(0, 5)[0])
    batches = LatentBatches(load_family(recipe("data.cache_latents=true"), dtype=torch.float32, commits={}))
    batches.fill_caches()
    monkeypatch.setattr(batches.family.pipeline.vae, "encode", None)
    first, again, later = (batches.batch(step, 0, torch.device("cpu")).latents for step in (0, 0, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, later)


def test_a_folder_without_good_pictures_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.pictures .* holds no pictures"):
        pictures_in("x", str(tmp_path))
    (tmp_path / "1.png").symlink_to("/etc/passwd")
    with pytest.raises(DataError, match=r"x\.pictures: "):
        pictures_in("x", str(tmp_path))
