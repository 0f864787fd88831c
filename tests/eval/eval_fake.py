"""A model without weights: its answers are a function of prompt and pictures."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from mm_moslora_eval.protocol.model_interface import Answer, OptionRequest, OptionScore, Request
from mm_moslora_eval.sources.source_images import Hasher

WORDS = ("yes", "no", "blue", "green")


class FakeModel:
    """Answers by hash of prompt and pictures; counts calls; fails on request."""

    name = "fake"

    def __init__(
        self, *, fingerprint: str = "f1", fail_on: Sequence[str] = (), log: Path | None = None, delay: float = 0.0
    ) -> None:
        self.fingerprint = fingerprint
        self.fail_on = set(fail_on)
        self.asked: list[str] = []
        self.requests: list[Request] = []
        self.closed = False
        self._log, self._delay = log, delay

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        # Backwards within a batch: the runner must not rely on the order.
        for start in range(0, len(requests), batch_size):
            for index in reversed(range(start, min(start + batch_size, len(requests)))):
                yield index, self._answer(requests[index])

    def _answer(self, request: Request) -> Answer:
        self.asked.append(request.id)
        self.requests.append(request)
        if self._log is not None:
            with self._log.open("a") as stream:
                stream.write(f"{os.environ.get('RANK', '0')} {request.id}\n")
        time.sleep(self._delay)
        if request.id in self.fail_on:
            raise RuntimeError(f"cannot answer {request.id}")
        digest = hashlib.sha256(request.messages[-1].text.encode())
        for image in request.images:
            digest.update(Hasher()(image).encode())
        value = digest.digest()[0]
        return Answer(text=WORDS[value % 4], tokens=2, finish_reason="length" if value > 250 else "stop")

    def loglikelihood(
        self, requests: Sequence[OptionRequest], *, batch_size: int
    ) -> Iterator[tuple[int, tuple[OptionScore, ...]]]:
        for index, request in enumerate(requests):
            self.asked.append(request.request.id)
            yield index, tuple(OptionScore(logprob=-1.0 - (option != "B"), tokens=1) for option in request.options)

    def close(self) -> None:
        self.closed = True
