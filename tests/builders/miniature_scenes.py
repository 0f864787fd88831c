"""The synthetic pictures of miniature documents, with their properties."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = {"red": (205, 50, 50), "green": (45, 150, 75), "blue": (50, 80, 200), "yellow": (230, 195, 50)}
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(frozen=True)
class Scene:
    """One synthetic picture and its properties."""

    colour: str
    shape: str
    count: int
    word: str

    def draw(self) -> Image:
        """The picture: `count` shapes in a row above the word."""
        from PIL import Image as Pillow
        from PIL import ImageDraw, ImageFont

        image = Pillow.new("RGB", (192, 144), (244, 242, 236))
        pen = ImageDraw.Draw(image)
        for number in range(self.count):
            self._shape(pen, 24 + number * 56, 24)
        pen.text((24, 104), self.word, fill=(20, 20, 20), font=ImageFont.load_default(size=24))
        return image

    def _shape(self, pen: Any, x: int, y: int) -> None:
        fill, side = COLOURS[self.colour], 44
        if self.shape == "circle":
            pen.ellipse((x, y, x + side, y + side), fill=fill)
        elif self.shape == "square":
            pen.rectangle((x, y, x + side, y + side), fill=fill)
        elif self.shape == "triangle":
            pen.polygon([(x, y + side), (x + side, y + side), (x + side / 2, y)], fill=fill)
        else:
            points = [(22, 0), (28, 16), (44, 16), (31, 26), (36, 43), (22, 33), (8, 43), (13, 26), (0, 16), (16, 16)]
            pen.polygon([(x + a, y + b) for a, b in points], fill=fill)

    def png(self) -> bytes:
        """The picture as a file."""
        buffer = io.BytesIO()
        self.draw().save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def encoded(self) -> str:
        """The picture as a cell of a TSV."""
        return base64.b64encode(self.png()).decode()


SCENES = tuple(
    Scene(colour, shape, 1 + number % 3, word)
    for number, (colour, shape, word) in enumerate(
        [
            ("red", "circle", "STOP"), ("green", "square", "OPEN"), ("blue", "triangle", "EXIT"),
            ("yellow", "star", "TAXI"), ("red", "square", "CAFE"), ("blue", "circle", "BANK"),
        ]
    )
)  # fmt: skip
