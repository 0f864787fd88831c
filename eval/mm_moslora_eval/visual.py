"""Visual tokens of pictures: decoded ahead in worker threads, encoded in batches, each picture once.

Shapes: ``N`` images, ``Q`` visual tokens per image, ``D`` LLM width.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mm_moslora.errors import EvalError
from mm_moslora.models.build import Assembly
from mm_moslora.models.generation import encode_images

from .documents import ImageLike
from .images import Hasher, open_image

CACHE_BYTES = 1 << 30
"""Visual tokens that are kept; the least recently used go first. 576 tokens of width 4096 take 4.7 MB in bf16."""
_ENCODE_TOGETHER = 16
_WORKERS = max(1, min(4, os.cpu_count() or 1))


class VisualTokens:
    """Visual tokens by picture.

    Args:
        assembly: with a vision tower.
        keep: False encodes every picture anew and alone (reference mode).
    """

    def __init__(self, assembly: Assembly, *, keep: bool = True) -> None:
        self._assembly, self._keep = assembly, keep
        self._hash = Hasher()
        self._features: OrderedDict[str, Tensor] = OrderedDict()
        self._decoding: dict[str, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def keys(self, images: Sequence[ImageLike]) -> tuple[str, ...]:
        """Hashes of pictures."""
        return tuple(self._hash(image) for image in images)

    def ahead(self, images: Sequence[ImageLike]) -> None:
        """Start to decode pictures that will be needed soon."""
        if not self._keep:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
        for image in images:
            key = self._hash(image)
            if key not in self._features and key not in self._decoding:
                self._decoding[key] = self._pool.submit(self._decode, image)

    def __call__(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """Visual tokens ``[Q, D]`` of pictures, by hash.

        Raises:
            DataError: a picture cannot be decoded.
            EvalError: the model has no vision tower.
        """
        wanted = {self._hash(image): image for image in images}
        found = {key: self._features[key] for key in wanted if key in self._features}
        missing = [key for key in wanted if key not in found]
        together = _ENCODE_TOGETHER if self._keep else 1
        for start in range(0, len(missing), together):
            names = missing[start : start + together]
            pixels = torch.stack([self._decoded(name, wanted[name]) for name in names])
            # A copy of each row, so that dropping one picture frees its memory.
            found |= {
                name: row.clone() for name, row in zip(names, encode_images(self._assembly.model, pixels), strict=True)
            }
        if self._keep:
            self._remember(found)
        return found

    def close(self) -> None:
        """Drop what is kept and stop the threads."""
        self._features.clear()
        self._decoding.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _decoded(self, key: str, image: ImageLike) -> Tensor:
        waiting = self._decoding.pop(key, None)
        return self._decode(image) if waiting is None else waiting.result()

    def _decode(self, image: ImageLike) -> Tensor:
        if self._assembly.eyes is None:
            raise EvalError("The task shows pictures, but this model has no vision encoder. Choose a text task.")
        (seen,) = self._assembly.eyes.see([open_image(image)])
        return seen.tensors["pixel_values"][0]

    def _remember(self, found: dict[str, Tensor]) -> None:
        for key, tokens in found.items():
            self._features[key] = tokens
            self._features.move_to_end(key)
        size = sum(tokens.numel() * tokens.element_size() for tokens in self._features.values())
        while size > CACHE_BYTES and len(self._features) > 1:
            _, dropped = self._features.popitem(last=False)
            size -= dropped.numel() * dropped.element_size()
