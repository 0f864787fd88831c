"""Generated pictures and question files; nothing is downloaded."""

from __future__ import annotations

import io
import json
import random
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
