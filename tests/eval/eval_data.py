"""Generated pictures and question files, nothing is downloaded; and what a run has written."""

from __future__ import annotations

import io
import json
import random
import re
from pathlib import Path

from PIL import Image


def picture(seed: int, size: tuple[int, int] = (8, 6)) -> bytes:
    """A PNG of random pixels."""
    generator = random.Random(seed)
    image = Image.new("RGB", size)
    image.putdata(
        [
            (generator.randrange(256), generator.randrange(256), generator.randrange(256))
            for _ in range(size[0] * size[1])
        ]
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_questions(folder: Path, *, count: int, pictures: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(pictures):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = [
        {
            "question_id": f"q{number}",
            "image": f"{number % pictures}.png",
            "text": ("Is it red?" if number % 2 else "What colour is it?") + f" ({number // 4})",
            "answer": ("yes", "no", "blue", "green")[number % 4],
            "category": "yes/no" if number % 2 else "colour",
        }
        for number in range(count)
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TIMES = re.compile(rb'"(date|time|seconds|commit|dirty)": ("[^"]*"|[0-9.e-]+|null|true|false)')


def contents(run: Path) -> dict[str, bytes]:
    """The results of a run without times; its shards and its log of commands are left out."""
    return {
        str(path.relative_to(run)): TIMES.sub(b"", path.read_bytes())
        for path in sorted(run.rglob("*.json*"))
        if "shards" not in path.parts and path.name != "invocations.jsonl"
    }
