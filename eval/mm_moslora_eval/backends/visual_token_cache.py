"""Cache of visual tokens: pictures are decoded ahead in worker threads and encoded in batches, each once.

Shapes: ``N`` images, ``Q`` visual tokens per image, ``D`` LLM width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mm_moslora.models.assembly import Parts
from mm_moslora.models.decoding.generation import encode_images
from mm_moslora.models.vision.feature_cache import MEMORY_BYTES, FeatureCache, FeatureStore, StepFeatureCache
from mm_moslora.utils.errors import EvalError
from mm_moslora_eval.sources.document import ImageLike
from mm_moslora_eval.sources.image_controls import Hasher, open_image

logger = logging.getLogger(__name__)

_ENCODE_TOGETHER = 16
_WORKERS = max(1, min(4, os.cpu_count() or 1))


class VisualTokens:
    """Visual tokens by picture."""

    def __init__(self, assembly: Parts, *, keep: bool = True, store: FeatureStore | None = None) -> None:
        self._assembly, self._keep = assembly, keep
        self._hash = Hasher()
        self._cache = FeatureCache(memory_bytes=MEMORY_BYTES if keep else 0)
        self._states = StepFeatureCache(store)
        self._decoding: dict[str, Future[Tensor]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def keys(self, images: Sequence[ImageLike]) -> tuple[str, ...]:
        """Hashes of pictures."""
        return tuple(self._hash(image) for image in images)

    def ahead(self, images: Sequence[ImageLike]) -> None:
        """Start to decode the pictures of later batches."""
        if not self._keep:
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="decode")
        for image in images:
            key = self._hash(image)
            if key not in self._cache and key not in self._decoding:
                self._decoding[key] = self._pool.submit(self._decode, image)

    def __call__(self, images: Sequence[ImageLike]) -> dict[str, Tensor]:
        """Visual tokens ``[Q, D]`` of pictures, by hash."""
        keys = self.keys(images)
        together = _ENCODE_TOGETHER if self._keep else 1

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            rows: list[Tensor] = []
            for start in range(0, len(numbers), together):
                chosen = numbers[start : start + together]
                pixels = torch.stack([self._decoded(keys[number], images[number]) for number in chosen])
                # Each row is copied, so that dropping one picture frees its memory.
                rows += [row.clone() for row in encode_images(self._assembly.model, pixels, self._states)]
            return rows

        return dict(zip(keys, self._cache.get_many(keys, encode), strict=True))

    def close(self) -> None:
        """Drop the cached tokens and stop the threads."""
        if (store := self._states.store) is not None:
            total = store.counts.read + store.counts.encoded
            logger.info("Features of %d of %d pictures were in %s.", store.counts.read, total, store.folder)
        self._cache.forget()
        self._decoding.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _decoded(self, key: str, image: ImageLike) -> Tensor:
        waiting = self._decoding.pop(key, None)
        return self._decode(image) if waiting is None else waiting.result()

    def _decode(self, image: ImageLike) -> Tensor:
        if self._assembly.image_processing is None:
            raise EvalError("The task shows pictures, but this model has no vision encoder. Choose a text task.")
        (seen,) = self._assembly.image_processing.process([open_image(image)])
        return seen.tensors["pixel_values"][0]
