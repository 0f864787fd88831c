"""Pictures of every kind come out right, everything else is one named error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_moslora.data.images import record_picture
from mm_moslora.data.images.record_picture import ImageError, check_image, open_image, open_image_bytes
from mm_moslora.data.record_faults import Code


def data(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(raw: bytes, place: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    image = open_image_bytes(raw)
    assert image.mode == "RGB"
    return image.getpixel(place)


def png(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))  # noqa: E731
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


RED = Image.new("RGB", (8, 6), (200, 30, 20))


class TestPixels:
    @pytest.mark.parametrize(("kind", "options"), [
        ("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 95}),
    ])  # fmt: skip
    def test_formats(self, kind: str, options: dict[str, object]) -> None:
        assert np.abs(np.subtract(pixel(data(RED, kind, **options)), (200, 30, 20))).max() <= 3

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_rotation_is_applied(self, orientation: int) -> None:
        upright = Image.new("RGB", (16, 32), (255, 255, 255))
        upright.paste((0, 0, 0), (0, 0, 8, 8))
        undo = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}  # PIL.Image.Transpose, inverse of the tag's
        stored = upright
        for step in undo.get(orientation, []):
            stored = stored.transpose(Image.Transpose(step))
        exif = Image.Exif()
        exif[0x0112] = orientation
        opened = open_image_bytes(data(stored, "PNG", exif=exif))
        assert opened.size == (16, 32)
        assert opened.getpixel((2, 2)) == (0, 0, 0)
        assert opened.getpixel((14, 30)) == (255, 255, 255)
        assert open_image_bytes(data(stored, "JPEG", exif=exif)).size == (16, 32)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize(
        "exif", [b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0", b"Exif\0\0broken"]
    )
    def test_a_rotation_that_makes_no_sense_is_ignored(self, exif: bytes) -> None:
        assert open_image_bytes(data(RED, "JPEG", exif=exif)).size == (8, 6)

    def test_colour_hidden_under_transparency_does_not_show(self) -> None:
        hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        assert pixel(data(hidden)) == (255, 255, 255)
        assert pixel(data(Image.new("RGBA", (4, 4), (255, 0, 0, 128)))) == (255, 127, 127)
        assert pixel(data(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        assert pixel(data(palette)) == (10, 20, 30)
        assert pixel(data(palette, transparency=1)) == (255, 255, 255)
        assert pixel(data(RED, transparency=(200, 30, 20))) == (255, 255, 255)

    def test_grey_multiplied_with_its_transparency(self) -> None:
        raw = bytearray(data(Image.new("LA", (4, 4), (50, 128)), "TIFF"))
        entry = raw.find(struct.pack("<HH", 338, 3))  # ExtraSamples: 1 says that alpha is multiplied in
        raw[entry + 8 : entry + 10] = struct.pack("<H", 1)
        assert Image.open(io.BytesIO(raw)).mode == "La"
        assert np.abs(np.subtract(pixel(bytes(raw)), 50 + 127)).max() <= 1

    def test_cmyk_and_lab(self) -> None:
        cyan = pixel(data(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "TIFF"))
        assert cyan[0] < 10 < 200 < cyan[2]
        inverted = pixel(data(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG", quality=95))
        assert np.abs(np.subtract(inverted, cyan)).max() <= 5
        white = Image.new("LAB", (4, 4), (255, 128, 128))
        assert min(pixel(data(white, "TIFF"))) > 240

    def test_wide_grey_is_scaled_not_clipped(self) -> None:
        ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
        opened = np.asarray(open_image_bytes(data(Image.fromarray(ramp))))[..., 0].ravel()
        assert np.array_equal(opened, np.arange(256))
        assert pixel(data(Image.fromarray(np.full((4, 4), 300, np.uint16)))) == (1, 1, 1)

    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([0.0, 0.5, 1.0, np.nan], [0, 128, 255, 0]),
            ([0.0, 51.0, 255.0, np.inf], [0, 51, 255, 255]),
            ([0.0, 13107.0, 65535.0, -np.inf], [0, 51, 255, 0]),
            ([-1.0, 0.0, 1.0, 0.0], [0, 128, 255, 128]),
            ([7e5, 7e5, 7e5, 7e5], [0, 0, 0, 0]),
        ],
    )
    def test_float_pictures(self, values: list[float], expected: list[int]) -> None:
        image = Image.fromarray(np.array(values, np.float32).reshape(2, 2))
        assert np.asarray(open_image_bytes(data(image, "TIFF")))[..., 0].ravel().tolist() == expected

    def test_32_bit_integers(self) -> None:
        image = Image.fromarray(np.array([[0, 200], [100, 255]], np.int32))
        assert np.asarray(open_image_bytes(data(image, "TIFF")))[..., 0].tolist() == [[0, 200], [100, 255]]
        image = Image.fromarray(np.array([[0, 2**30], [2**29, 0]], np.int32))
        assert np.asarray(open_image_bytes(data(image, "TIFF")))[..., 0].tolist() == [[0, 255], [128, 0]]

    @pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
    def test_of_an_animation_the_first_frame_counts(self, kind: str) -> None:
        options = {"lossless": True} if kind == "WEBP" else {}
        raw = data(RED, kind, save_all=True, append_images=[Image.new("RGB", (8, 6), (0, 0, 255))], **options)
        assert np.abs(np.subtract(pixel(raw), (200, 30, 20))).max() <= 8

    def test_the_suffix_does_not_matter(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(data(RED, "TIFF"))
        assert open_image(tmp_path / "a.jpg").getpixel((0, 0)) == (200, 30, 20)

    @pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1)])
    def test_tiny_and_narrow_pictures(self, size: tuple[int, int]) -> None:
        assert open_image_bytes(data(Image.new("RGB", size))).size == size


BAD = {
    "empty": (b"", Code.IMAGE_EMPTY, "0 bytes"),
    "html": (b"<!DOCTYPE html><html>404", Code.IMAGE_FORMAT, "HTML page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid", Code.IMAGE_FORMAT, "git lfs pull"),
    "svg without a header": (b"<svg xmlns='x'/>", Code.IMAGE_FORMAT, "SVG"),
    "svg": (b"<?xml version='1.0'?><svg/>", Code.IMAGE_FORMAT, "XML or SVG"),
    "noise": (bytes(range(256)), Code.IMAGE_FORMAT, "no picture"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Code.IMAGE_FORMAT, "PostScript"),
    "exotic format": (data(RED, "PPM"), Code.IMAGE_FORMAT, "expected one of JPEG"),
    "truncated png": (data(Image.effect_noise((64, 64), 50))[:-600], Code.IMAGE_DAMAGED, "cut short"),
    "truncated jpeg": (data(Image.effect_noise((64, 64), 50), "JPEG")[:-600], Code.IMAGE_DAMAGED, "cut short"),
    "bomb": (png(60_000, 60_000), Code.IMAGE_TOO_LARGE, "pixels"),
    "beyond our own limit": (png(8001, 8000), Code.IMAGE_TOO_LARGE, "8001 x 8000"),
    "too long": (png(20_000, 101), Code.IMAGE_TOO_LARGE, "sides of 16384"),
    "a line": (png(1, 201), Code.IMAGE_ASPECT, "factor of 200"),
    "a flat line": (png(201, 1), Code.IMAGE_ASPECT, "factor of 200"),
    "no width": (png(0, 5), Code.IMAGE_FORMAT, "accepted format"),
}


class TestRefusals:
    @pytest.mark.parametrize("name", BAD)
    def test_named(self, tmp_path: Path, name: str) -> None:
        raw, code, text = BAD[name]
        path = tmp_path / "x.png"
        path.write_bytes(raw)
        with pytest.raises(ImageError) as caught:
            open_image(path)
        assert caught.value.code == code, str(caught.value)
        assert text in str(caught.value)
        assert str(path) in str(caught.value)

    @pytest.mark.parametrize("name", [name for name in BAD if "truncated" not in name])
    def test_the_header_alone_shows_it_too(self, tmp_path: Path, name: str) -> None:
        path = tmp_path / "x.png"
        path.write_bytes(BAD[name][0])
        with pytest.raises(ImageError) as caught:
            check_image(path)
        assert caught.value.code == BAD[name][1]

    def test_what_is_no_regular_file(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for ever
        for path, code in (
            (tmp_path / "pipe.png", Code.IMAGE_NOT_A_FILE),
            (tmp_path, Code.IMAGE_NOT_A_FILE),
            (tmp_path / "missing.png", Code.IMAGE_MISSING),
            (tmp_path / ("x" * 300), Code.IMAGE_MISSING),
        ):
            with pytest.raises(ImageError) as caught:
                open_image(path)
            assert caught.value.code == code

    def test_a_file_beyond_the_limit_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(record_picture, "MAX_BYTES", 10)
        (tmp_path / "a.png").write_bytes(data(RED))
        with pytest.raises(ImageError, match="IMAGE_TOO_LARGE"):
            open_image(tmp_path / "a.png")

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_damaged_files_are_refused_or_read_but_never_crash(self) -> None:
        rng = np.random.default_rng(0)
        noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), np.uint8))
        sources = [data(noise, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP")]
        refused = 0
        for round_number in range(600):
            raw = bytearray(sources[round_number % len(sources)])
            for place in rng.integers(0, len(raw), rng.integers(1, 6)):
                raw[place] = rng.integers(0, 256)
            try:
                open_image_bytes(bytes(raw[: rng.integers(1, len(raw) + 1)]))
            except ImageError:
                refused += 1
        assert refused > 100


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "RGBa", "PA"])
def test_transparency_in_strips_gives_the_pixels_of_the_whole(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:

    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    image = Image.fromarray(pixels, "RGBA")
    if mode in ("P", "PA"):
        image = image.convert("RGB").quantize(16)
        image.info["transparency"] = 3
        image = image if mode == "P" else image.convert("PA")
    elif mode == "RGB":
        image = image.convert("RGB")
        image.info["transparency"] = image.getpixel((3, 3))
    else:
        image = image.convert(mode)
    layer = image.convert("RGBA")
    whole = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer).convert("RGB")
    monkeypatch.setattr(record_picture, "_STRIP", 100)  # strips of one row
    assert record_picture.as_rgb(image).tobytes() == whole.tobytes()
