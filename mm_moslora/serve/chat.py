"""Talking to a model: one conversation with its pictures, and a loop for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mm_moslora.batch import Example, Seen
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.images import open_image
from mm_moslora.data.records import Turn
from mm_moslora.errors import DataError, MoSLoRAError
from mm_moslora.models.build import Assembly
from mm_moslora.models.generation import Prompt, encode_images, stop_token_ids, stream
from mm_moslora.models.load import load
from mm_moslora.models.rows import generate_rows
from mm_moslora.models.vlm import takes_rows

HELP = "/image PATH shows a picture, /reset starts over, /quit leaves."


class Chat:
    """A conversation with one model.

    Args:
        assembly: loaded with `mm_moslora.models.load.load`.
        max_new_tokens: longest answer, tokens.
    """

    def __init__(self, assembly: Assembly, *, max_new_tokens: int = 128) -> None:
        self.assembly, self.max_new_tokens = assembly, max_new_tokens
        self.encoder = Encoder(
            assembly.tokenizer,
            image_token_id=assembly.image_token_id,
            tokens_per_image=assembly.tokens_per_image,
            processor=assembly.processor if assembly.ready_made else None,
        )
        self.turns: list[Turn] = []
        self.images: list[Image.Image] = []
        self.features: dict[int, Tensor] = {}
        self.pending = 0

    @classmethod
    def from_folder(cls, folder: Path, *, max_new_tokens: int = 128) -> Chat:
        """Load a run, a checkpoint or an export and start a conversation."""
        return cls(load(folder), max_new_tokens=max_new_tokens)

    def show(self, path: Path) -> None:
        """Put a picture before the next question.

        Raises:
            DataError: no picture there, or the model has no vision encoder.
        """
        if self.assembly.eyes is None:
            raise DataError("This model has no vision encoder, so it cannot look at a picture.")
        self.images.append(open_image(path))
        self.pending += 1

    def stream(self, question: str) -> Iterator[str]:
        """Ask; yields the answer piece by piece and remembers it."""
        self.turns.append(Turn.asking(question, images=self.pending))
        self.pending = 0
        seen = self.assembly.eyes.see(self.images) if self.assembly.eyes else []
        ids = self.encoder.encode_prompt(self.turns, pictures=[picture.placeholders for picture in seen])
        tokens: list[int] = []
        said = ""
        for token in self._tokens(ids, seen):
            tokens.append(token)
            text = self.encoder.decode_answer(tokens)
            if not text.endswith("\ufffd"):  # half a character so far
                yield text[len(said) :]
                said = text
        self.turns.append(Turn(role="assistant", text=said))

    def _tokens(self, ids: Tensor, seen: list[Seen]) -> Iterator[int]:
        model = self.assembly.model
        stops = stop_token_ids(model, self.assembly.tokenizer.eos_token_id)
        if takes_rows(model):
            nothing = torch.zeros(len(ids), dtype=torch.bool)
            prompt = Example.of(id="", input_ids=ids, supervised=nothing, seen=seen)
            yield from generate_rows(model, prompt, max_new_tokens=self.max_new_tokens, stop_ids=stops)
            return
        for number in range(len(self.features), len(seen)):
            self.features[number] = encode_images(model, seen[number].tensors["pixel_values"])[0]
        features = torch.cat(list(self.features.values())) if self.features else None
        asked = Prompt(input_ids=ids, features=features)
        for (token,) in stream(model, [asked], max_new_tokens=self.max_new_tokens, stop_ids=stops):
            if token is None:
                return
            yield token

    def ask(self, question: str) -> str:
        """Ask and wait for the whole answer."""
        return "".join(self.stream(question))

    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self.turns, self.images, self.features, self.pending = [], [], {}, 0


def interactive(chat: Chat) -> None:
    """Read questions from the terminal until the end of input."""
    write = sys.stdout.write
    write(f"{HELP}\n")
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            write("\n")
            return
        try:
            if line in ("/quit", "/exit"):
                return
            if line == "/reset":
                chat.reset()
            elif line.startswith("/image "):
                chat.show(Path(line.removeprefix("/image ").strip()))
            elif line.startswith("/"):
                write(f"Unknown command. {HELP}\n")
            elif line:
                for piece in chat.stream(line):
                    write(piece)
                    sys.stdout.flush()
                write("\n")
        except MoSLoRAError as error:
            write(f"{error}\n")
