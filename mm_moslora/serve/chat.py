"""Talking to a model: one conversation with its pictures, and a loop for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mm_moslora.data.conversation import Encoder
from mm_moslora.data.images import open_image
from mm_moslora.data.records import Turn
from mm_moslora.errors import DataError, MoSLoRAError
from mm_moslora.models.build import Assembly
from mm_moslora.models.generation import Prompt, encode_images, stop_token_ids, stream
from mm_moslora.models.load import load
from mm_moslora.models.processor import image_transform

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
            assembly.tokenizer, image_token_id=assembly.image_token_id, tokens_per_image=assembly.tokens_per_image
        )
        self.turns: list[Turn] = []
        self.features: list[Tensor] = []
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
        if self.assembly.processor is None:
            raise DataError("This model has no vision encoder, so it cannot look at a picture.")
        pixels = image_transform(self.assembly.processor.image_processor)(open_image(path))
        self.features.append(encode_images(self.assembly.model, pixels[None])[0])
        self.pending += 1

    def stream(self, question: str) -> Iterator[str]:
        """Ask; yields the answer piece by piece and remembers it."""
        self.turns.append(Turn.asking(question, images=self.pending))
        self.pending = 0
        ids = self.encoder.encode_prompt(self.turns)
        features = torch.cat(self.features) if self.features else None
        stops = stop_token_ids(self.assembly.model, self.assembly.tokenizer.eos_token_id)
        tokens: list[int] = []
        said = ""
        prompt = Prompt(input_ids=ids, features=features)
        for (token,) in stream(self.assembly.model, [prompt], max_new_tokens=self.max_new_tokens, stop_ids=stops):
            if token is None:
                break
            tokens.append(token)
            text = self.encoder.decode_answer(tokens)
            if not text.endswith("\ufffd"):  # half a character so far
                yield text[len(said) :]
                said = text
        self.turns.append(Turn(role="assistant", text=said))

    def ask(self, question: str) -> str:
        """Ask and wait for the whole answer."""
        return "".join(self.stream(question))

    def reset(self) -> None:
        """Forget the conversation and its pictures."""
        self.turns, self.features, self.pending = [], [], 0


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
