"""`--batch-size auto`: a local model whose batches grow until memory or throughput says stop.

A batch that does not fit is asked again in halves; what was answered of it counts. In fp32 an answer does not depend on
its batch. In half precision it may in near-equal tokens, as with any other batch size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mm_moslora_eval.protocol.model_interface import Answer, Model, OptionRequest, OptionScore, Request

logger = logging.getLogger(__name__)

FIRST, MOST = 4, 128
"""The first and the largest batch."""
_FASTER = 1.05
"""A larger batch must be so much faster to be kept."""
_SPARE = 4.0
"""On a CPU, free memory for so many times what the process has grown by is needed for a larger batch."""
_TOKENS_PER_IMAGE, _CHARACTERS_PER_TOKEN = 576, 4
_NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")


class AutomaticBatch:
    """A model that is asked in batches of a size that is found while it answers."""

    def __init__(
        self, model: Model, *, clock: Callable[[], float] = time.monotonic, room: Callable[[], bool] | None = None
    ) -> None:
        self._model, self._clock = model, clock
        self._room = room or _MemoryWatch()
        self.size, self._most = FIRST, MOST
        self._speeds: dict[int, float] = {}
        self._tried: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)  # what only some models have, such as `thinking_tokens`

    @property
    def name(self) -> str:
        """The model's name."""
        return self._model.name

    @property
    def fingerprint(self) -> str:
        """The model's fingerprint."""
        return self._model.fingerprint

    def close(self) -> None:
        """Free the model."""
        self._model.close()

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        """See `Model.generate`; `batch_size` is not used."""
        return self._in_batches(self._model.generate, requests)

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        """See `Model.loglikelihood`; `batch_size` is not used."""
        return self._in_batches(self._model.loglikelihood, requests)

    def _in_batches(self, ask: Callable[..., Iterator[Any]], requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        left = list(range(len(requests)))
        while left:
            # Once the size is found, the model gets all at once and prepares pictures ahead of its batches.
            found = self.size == self._most
            taken = left if found else left[: self.size]
            started, answered = self._clock(), set()
            try:
                for number, result in ask([requests[index] for index in taken], batch_size=self.size):
                    answered.add(taken[number])
                    yield taken[number], result
            except Exception as error:
                if not is_out_of_memory(error) or self.size == 1:
                    raise
                self._shrink(self.size)
            else:
                if not found and len(taken) == self.size:  # the last batch of a window may be smaller
                    self._learn(sum(map(_cost, (requests[index] for index in taken))), self._clock() - started)
            left = [index for index in left if index not in answered]

    def _shrink(self, size: int) -> None:
        """A batch did not fit: halve it, for good."""
        self.size = self._most = size // 2
        logger.info("A batch of %d does not fit into memory; from here on at most %d.", size, self.size)
        _free_memory()

    def _learn(self, cost: float, seconds: float) -> None:
        """Take the speed of a whole batch, and choose the next size."""
        if self.size not in self._tried:  # the first one of a size allocates memory and compiles
            self._tried.add(self.size)
            return
        self._speeds[self.size] = cost / max(seconds, 1e-9)
        smaller = self._speeds.get(self.size // 2)
        if smaller is not None and self._speeds[self.size] < _FASTER * smaller:
            self._most, self.size = self.size // 2, self.size // 2
        elif not self._room():
            self._most = self.size
        else:
            self.size *= 2
            return
        logger.info("Batches of %d from here on.", self.size)


def opened_for(model: Callable[[], Model], *, automatic: bool) -> Model:
    """A loaded model; `automatic`: the size of its batches is found."""
    loaded = model()
    return AutomaticBatch(loaded) if automatic else loaded


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on an accelerator or on the machine."""
    import torch

    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    )


def _cost(request: Request | OptionRequest) -> float:
    """Rough tokens of a request: throughput is compared over questions of different length."""
    asked = request.request if isinstance(request, OptionRequest) else request
    characters = sum(len(message.text) for message in asked.messages)
    return characters / _CHARACTERS_PER_TOKEN + _TOKENS_PER_IMAGE * len(asked.images) + asked.max_new_tokens


class _MemoryWatch:
    """Whether this process may grow. An accelerator says so itself, where a batch does not fit."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._before = self._process.memory_info().rss

    def __call__(self) -> bool:
        import psutil
        import torch

        if torch.cuda.is_available():
            return True
        grown = max(0, self._process.memory_info().rss - self._before)
        return bool(psutil.virtual_memory().available > _SPARE * grown)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
