"""Fuzz the image decoder with broken files: each must give RGB or one named error, in little time and memory.

    python scripts/soak/fuzz_images.py --count 200000 --seed 0

Files are small JPEG, PNG, GIF, TIFF and WebP pictures of every mode, with bytes flipped, cut, inserted or repeated, and
header fields set to extreme values. Decoders are C libraries, so they run in child processes, and a child that dies
counts as a crash. The exit code is 0 only when nothing but `ImageError` was raised, no file took a second of processor
time, no process died, and memory stayed below 1 GiB.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "soak")]

from fuzzing import Tally, main  # noqa: E402
from PIL import Image  # noqa: E402

from mm_moslora.data.images.picture_faults import ImageError  # noqa: E402
from mm_moslora.data.images.record_picture import check_image_bytes, open_image_bytes  # noqa: E402

CHUNK = 20_000
"""Files per child process."""
EXTREMES = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x00",
    b"\x80\x00",
    b"\x01",
    b"\xff\xd9",
)


def seeds() -> list[tuple[str, bytes]]:
    """Valid small pictures of every format and mode."""
    base = Image.effect_mandelbrot((40, 28), (-2, -1, 1, 1), 50)
    colour = Image.merge("RGB", (base, base.rotate(90, expand=False), base.rotate(180)))
    frames = [colour.rotate(angle) for angle in (30, 60)]
    exif = Image.Exif()
    exif[0x0112] = 6
    made: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", colour, {"quality": 80}), ("JPEG", colour, {"progressive": True, "exif": exif}),
        ("JPEG", colour.convert("CMYK"), {}), ("JPEG", base, {}), ("PNG", colour, {}),
        ("PNG", colour.convert("RGBA"), {}), ("PNG", colour.convert("P"), {"transparency": 0}),
        ("PNG", base.convert("I;16"), {}), ("PNG", base.convert("LA"), {}), ("PNG", base.convert("1"), {}),
        ("GIF", colour.convert("P"), {"save_all": True, "append_images": frames}), ("GIF", base, {}),
        ("TIFF", colour, {}), ("TIFF", colour, {"compression": "tiff_lzw"}), ("TIFF", colour, {"compression": "jpeg"}),
        ("TIFF", base.convert("F"), {}), ("TIFF", base.convert("I"), {}),
        ("TIFF", base.convert("1"), {"compression": "group4"}), ("WEBP", colour, {"lossless": True}),
        ("WEBP", colour.convert("RGBA"), {"quality": 70}),
        ("WEBP", colour, {"save_all": True, "append_images": frames}),
    ]  # fmt: skip
    result = []
    for kind, image, options in made:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        result.append((kind, buffer.getvalue()))
    return result


def damage(raw: bytes, draw: random.Random) -> bytes:
    """The file with one to four faults."""
    data = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        head = draw.random() < 0.3
        offset = draw.randrange(min(len(data), 120) if head else len(data)) if data else 0
        kind = draw.random()
        if kind < 0.35 and data:
            data[offset] = draw.randrange(256)
        elif kind < 0.55:
            value = draw.choice(EXTREMES)
            data[offset : offset + len(value)] = value
        elif kind < 0.7:
            del data[offset : offset + draw.randint(1, 64)]
        elif kind < 0.85:
            data[offset:offset] = draw.randbytes(draw.randint(1, 32))
        elif kind < 0.95:
            data = data[:offset]
        else:
            data[offset:offset] = data[offset : offset + 200]
    return bytes(data)


def run_chunk(count: int, *, seed: int) -> Tally:
    """Open `count` broken files in this process."""
    warnings.simplefilter("ignore")
    draw, pictures, tally = random.Random(seed), seeds(), Tally()
    for number in range(count):
        kind, raw = pictures[number % len(pictures)]
        data = damage(raw, draw)
        with tally.one(lambda kind=kind, number=number: f"{kind} (seed {seed}, number {number})"):
            try:
                size = open_image_bytes(data).size
                tally.outcomes["opened"] += 1
                assert min(size) >= 1
                check_image_bytes(data)
            except ImageError as error:
                tally.rejected(error.code.value, error)
    return tally.measured()


def _child(count: int, seed: int, results: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff writes its findings to stderr
    results.put(run_chunk(count, seed=seed))


def run(
    count: int, *, seed: int, chunk: int = CHUNK, progress: Callable[[int, Tally], None] | None = None
) -> dict[str, Any]:
    """Open `count` broken files in child processes, one after the other, and return the outcomes."""
    context = multiprocessing.get_context("fork")
    tally, crashes, done = Tally(), 0, 0
    for start in range(0, count, chunk):
        results = context.SimpleQueue()
        size = min(chunk, count - start)
        child = context.Process(target=_child, args=(size, seed * 1_000_003 + start, results))
        child.start()
        while child.is_alive() and results.empty():
            child.join(0.1)
        if results.empty():
            crashes += 1
            continue
        tally.add(results.get())
        child.join()
        done += size
        if progress is not None:
            progress(start + size, tally)
    return tally.report(files=done, seed=seed, crashes=crashes)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, count=200_000))
