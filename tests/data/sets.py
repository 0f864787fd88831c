"""Records, encoders and training sets for tests of data preparation."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny import CHATML

from mm_moslora.batch import PictureFrame, ProcessedImage
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.chat.record_turns import Record, Turn
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Where
from mm_moslora.data.training_set import TrainingSet
from tests.data.chat_templates import build_tokenizer, shared_tokenizer

OF_SET = ("quarantine_path", "on_progress", "exact_limit")


class TinyTower:
    """Image processing without a tower: every picture takes the same number of tokens."""

    fixed, boxes = True, "qwen3_vl"
    videos = None

    def __init__(self, transform, *, token: int, tokens: int = 4) -> None:
        self.transform, self.ids = transform, (token,) * tokens

    def frame(self, size):
        """See `ImageProcessing.frame`."""
        return PictureFrame(width=size[0], height=size[1])

    def process(self, images):
        """See `ImageProcessing.process`."""
        return [
            ProcessedImage(placeholders=self.ids, tensors={"pixel_values": self.transform(i)[None]}) for i in images
        ]

    def placeholders(self, sizes):
        """See `ImageProcessing.placeholders`."""
        return [self.ids] * len(sizes)


def to_pixels(image: Image.Image) -> torch.Tensor:
    """A tiny image transform."""
    return torch.from_numpy(np.asarray(image.resize((4, 4)), dtype=np.float32)).permute(2, 0, 1) / 255


def turns(*texts: str) -> list[Turn]:
    """Questions and answers in turn."""
    return [Turn(role="assistant" if index % 2 else "user", text=text) for index, text in enumerate(texts)]


def parsed(value: object, folder: Path | None = None, **rules: object) -> Record:
    """The record of a value, whose pictures lie in a folder."""
    where = Where(file=Path("data.jsonl"), line=1, row=0)
    return parse_record(value, where, PictureRules(folder=folder or Path.cwd(), **rules))


@functools.cache
def shared_encoder(name: str) -> ConversationEncoder:
    """An encoder for one of `chat_templates.TEMPLATES`, with three tokens an image."""
    tokenizer = shared_tokenizer(name)
    return ConversationEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=3)


@functools.cache
def chatml_encoder() -> ConversationEncoder:
    tokenizer = build_tokenizer("bytes", CHATML)
    return ConversationEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=4)


def tiny_tower() -> TinyTower:
    """The one that goes with `chatml_encoder`."""
    return TinyTower(to_pixels, token=chatml_encoder().image_token_id)


def make_set(*paths: Path, weights: list[float] | None = None, vision: bool = True, **options) -> TrainingSet:
    """A training set over record files with their pictures in `images` beside them.

    Other keyword arguments are those of `DataConfig` and of `TrainingSet`.
    """
    of_set = {name: options.pop(name) for name in OF_SET if name in options}
    sources = [
        SourceConfig(path=str(path), image_folder=str(path.parent / "images"), weight=weight)
        for path, weight in zip(paths, weights or [1.0] * len(paths), strict=True)
    ]
    image_processing = tiny_tower() if vision else None
    return TrainingSet(sources, chatml_encoder(), image_processing, config=DataConfig(**options), **of_set)


def damage(picture: Path) -> None:
    """Replace a picture by one that is cut short: its header is fine, its pixels are not."""
    Image.effect_noise((64, 64), 80).convert("RGB").save(picture)
    picture.write_bytes(picture.read_bytes()[:2000])


def picture(colour: tuple[int, int, int] = (200, 30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(buffer, "PNG")
    return buffer.getvalue()


def colour_of(record, number: int = 0) -> tuple[int, ...]:
    return record.images[number].rgb().getpixel((0, 0))


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
