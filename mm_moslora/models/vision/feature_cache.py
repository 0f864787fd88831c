"""Features of pictures by key: in memory, and on disk where a store is given."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mm_moslora.batch import Batch
from mm_moslora.models.vision.feature_store import FeatureStore, tensor_hash
from mm_moslora.utils import distributed

MEMORY_BYTES = 2**30
"""Limit of features in memory; 576 tokens of width 4096 take 4.7 MB in bf16."""


class FeatureCache:
    """Features by key: on disk where a store is given, and in memory up to a limit, without the longest unused."""

    def __init__(self, *, memory_bytes: float = MEMORY_BYTES, store: FeatureStore | None = None) -> None:
        self.store = store
        self.hits = self.misses = 0
        self._memory_bytes, self._used = memory_bytes, 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        """Whether the features of a key are in memory."""
        return key in self._features

    def get_many(
        self,
        keys: Sequence[str],
        encode: Callable[[Sequence[int]], Sequence[Tensor]],
        *,
        device: torch.device | None = None,
    ) -> list[Tensor]:
        """Features of all keys; `encode` gives those at some indices.

        It is called once with the missing ones, even if there are none: ranks may have to agree about them.
        """
        indices: dict[str, int] = {}
        for index, key in enumerate(keys):
            indices.setdefault(key, index)
        features = {key: self._features[key] for key in indices if key in self._features}
        if self.store is not None:
            for key in indices:
                if key not in features and (value := self.store.read(key)) is not None:
                    features[key] = value.to(device=device, non_blocking=True)
        missing = [key for key in indices if key not in features]
        self.misses += len(missing)
        self.hits += len(keys) - len(missing)
        for key, value in zip(missing, encode([indices[key] for key in missing]), strict=True):
            features[key] = value
            if self.store is not None:
                self.store.write(key, value)
        self.forget(features)  # moves them to the end
        self._features.update(features)
        self._used += sum(value.nbytes for value in features.values())
        while self._used > self._memory_bytes:
            self.forget([next(iter(self._features))])
        return [features[key] for key in keys]

    def forget(self, keys: Iterable[str] | None = None) -> None:
        """Drop the features of these keys, or of all, from memory."""
        for key in list(self._features if keys is None else keys):
            if (value := self._features.pop(key, None)) is not None:
                self._used -= value.nbytes


class StepFeatureCache:
    """Features of the pictures of an optimiser step, and of earlier runs where a store is given."""

    def __init__(self, store: FeatureStore | None = None) -> None:
        self.cache = FeatureCache(memory_bytes=math.inf, store=store)
        self._to_come: Counter[str] = Counter()

    @property
    def store(self) -> FeatureStore | None:
        """Features on disk."""
        return self.cache.store

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Note the step's micro-batches: pictures of later ones stay in memory."""
        self.cache.forget()
        self._to_come = Counter(key for batch in micro_batches for key in set(batch.image_keys))

    def states(
        self, pixels: Tensor, keys: Sequence[str], encode: Callable[[Tensor], Tensor], *, together: bool
    ) -> Tensor:
        """Features of pictures, ``[N, ...]``; those of one `tensor_hash` (made here if missing) are encoded once.

        `together`: all ranks run `encode`, or none does (ZeRO-3 gathers the tower's weights while it runs).
        """
        if len(keys) != len(pixels):
            # Without a store nothing is gained by knowing which are the same.
            keys = [str(index) if self.store is None else tensor_hash(row) for index, row in enumerate(pixels)]

        def encode_missing(indices: Sequence[int]) -> Sequence[Tensor]:
            count = float(len(indices))
            if together and self.store is not None:
                (count,) = distributed.sum_over_ranks([count])
            if not count:
                return []
            chosen = pixels
            if len(indices) < len(pixels):
                # With a list as the index the host would wait for its copy to an accelerator.
                chosen = pixels[torch.tensor(list(indices) or [0]).to(pixels.device, non_blocking=True)]
            return list(encode(chosen))[: len(indices)]

        rows = self.cache.get_many(keys, encode_missing, device=pixels.device)
        self._to_come -= Counter(set(keys))
        # What is in memory differs between ranks; about what is on disk they agree.
        self.cache.forget(keys if together else [key for key in keys if key not in self._to_come])
        return torch.stack(rows)
