"""Our own model behind the runner's `Model` protocol: batched greedy decoding, each picture encoded once.

Shapes: ``Q`` visual tokens per image, ``D`` LLM width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mm_moslora.data.conversation import Encoder
from mm_moslora.data.images import open_image, open_image_bytes
from mm_moslora.data.records import Turn
from torch import Tensor

from mm_moslora.models.build import Assembly
from mm_moslora.models.generation import Prompt, encode_images, generate, option_scores, stop_token_ids
from mm_moslora.models.load import load
from mm_moslora.models.processor import image_transform

from .images import Hasher
from .model import Answer, ImageLike, Message, OptionRequest, OptionScore, Request

CACHED_IMAGES = 4096
"""Pictures whose visual tokens are kept; the least recently used go first."""


class LocalModel:
    """A model loaded with `mm_moslora.models.load.load`.

    Args:
        assembly: adapters merged, for speed.
        name: for people.
        system_prompt: as in training; None: the chat template's own.
    """

    def __init__(self, assembly: Assembly, *, name: str, system_prompt: str | None = None) -> None:
        self.assembly, self._name = assembly, name
        self.model = assembly.model.eval()
        self.encoder = Encoder(
            assembly.tokenizer,
            image_token_id=assembly.image_token_id,
            tokens_per_image=assembly.tokens_per_image,
            system_prompt=system_prompt,
        )
        self.stop_ids = stop_token_ids(self.model, assembly.tokenizer.eos_token_id)
        self._hash = Hasher()
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._fingerprint: str | None = None

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype = torch.float32) -> LocalModel:
        """Load a run, a checkpoint or an export."""
        return cls(load(folder, dtype=dtype), name=str(folder))

    @property
    def name(self) -> str:
        """For people."""
        return self._name

    @property
    def fingerprint(self) -> str:
        """Hash over every weight, the configuration and the chat template."""
        if self._fingerprint is None:
            digest = hashlib.sha256(self.model.config.to_json_string().encode())
            digest.update(str(self.assembly.tokenizer.chat_template).encode())
            for name, tensor in sorted(self.model.state_dict().items()):
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `mm_moslora_eval.model.Model.generate`."""
        for indices in _batches(requests, batch_size):
            chosen = [requests[index] for index in indices]
            prompts = [self._prompt(request) for request in chosen]
            limit = max(request.max_new_tokens for request in chosen)
            answers = generate(self.model, prompts, max_new_tokens=limit, stop_ids=self.stop_ids)
            for index, request, tokens in zip(indices, chosen, answers, strict=True):
                yield index, self._answer(request, tokens)

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """See `mm_moslora_eval.model.Model.loglikelihood`; the prompt is run once for all its options."""
        for index, item in enumerate(requests):
            options = [self.encoder.encode_answer(option) for option in item.options]
            scores = option_scores(self.model, self._prompt(item.request), options)
            yield (
                index,
                tuple(OptionScore(logprob=s.logprob, tokens=s.tokens, greedy=s.greedy) for s in scores),
            )

    def close(self) -> None:
        """Drop the cached visual tokens."""
        self._features.clear()

    def _answer(self, request: Request, tokens: list[int]) -> Answer:
        stopped = len(tokens) < request.max_new_tokens
        tokens = tokens[: request.max_new_tokens]
        text = self.assembly.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in request.stop:
            text = text.split(stop)[0]
        return Answer(text=text, tokens=len(tokens) + stopped, finish_reason="stop" if stopped else "length")

    def _prompt(self, request: Request) -> Prompt:
        turns = [_turn(message) for message in request.messages]
        features = [self._image(image) for image in request.images]
        return Prompt(input_ids=self.encoder.encode_prompt(turns), features=torch.cat(features) if features else None)

    def _image(self, image: ImageLike) -> Tensor:
        """Visual tokens ``[Q, D]`` of one picture."""
        assert self.assembly.processor is not None, "a request with images needs a model with a vision tower"
        key = self._hash(image)
        if key not in self._features:
            opened = (
                open_image_bytes(image)
                if isinstance(image, bytes)
                else (open_image(image) if isinstance(image, Path) else image.convert("RGB"))
            )
            pixels = image_transform(self.assembly.processor.image_processor)(opened)
            self._features[key] = encode_images(self.model, pixels[None])[0]
            while len(self._features) > CACHED_IMAGES:
                self._features.popitem(last=False)
        self._features.move_to_end(key)
        return self._features[key]


def _batches(requests: Sequence[Request], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first: memory shows at once, and the time left is honest."""
    order = sorted(range(len(requests)), key=lambda i: (-_size(requests[i]), i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _size(request: Request) -> int:
    return sum(len(message.text) for message in request.messages) + 1000 * len(request.images)


def _turn(message: Message) -> Turn:
    return Turn(role=message.role, text=message.text)
