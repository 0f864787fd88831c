"""Metrics of the server in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from mm_moslora.serve.api.request_intake import Intake
from mm_moslora.serve.inference.continuous_batching import GenerationEngine

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Metrics:
    """Counters of one server; the engine and the memory that requests hold are read whenever they are requested."""

    def __init__(self, engine: GenerationEngine, intake: Intake) -> None:
        self._engine, self._intake, self._registry = engine, intake, CollectorRegistry()
        at: dict[str, Any] = {"registry": self._registry, "namespace": "mm_moslora"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **at)
        self.refused = Counter("refused", "Refused requests by reason.", ["code"], **at)
        self.first_token = Histogram("first_token_seconds", "Arrival to first token.", buckets=_SECONDS, **at)
        self.request_seconds = Histogram("request_seconds", "Arrival to last byte.", ["route"], buckets=_SECONDS, **at)
        self.images = Counter("images", "Pictures received.", **at)
        self._registry.register(self)  # type: ignore[arg-type]  # it is asked for `collect` only

    def text(self) -> bytes:
        """The page."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Any]:
        """Figures of others, now."""
        engine, cache = self._engine, self._engine.models.features
        bodies, pictures = self._intake.bodies, self._intake.pictures
        for name, what, value in (
            ("running", "Answers being decoded.", engine.running),
            ("waiting", "Answers in the queue.", engine.waiting),
            ("engine_alive", "1 while the engine can answer.", int(engine.alive)),
            ("bodies_bytes", "Bytes of requests in memory, until their answers end.", bodies.used),
            ("bodies_bytes_highest", "Maximum of bodies_bytes so far.", bodies.highest),
            ("pictures_bytes", "Bytes of memory for pictures that are being decoded.", pictures.used),
            ("pictures_bytes_highest", "Maximum of pictures_bytes so far.", pictures.highest),
        ):
            yield GaugeMetricFamily(f"mm_moslora_{name}", what, value=value)
        for name, what, value in (
            ("prompt_tokens", "Tokens of prompts read.", engine.prompt_tokens),
            ("answer_tokens", "Tokens of answers.", engine.answer_tokens),
            ("decoding_steps", "Decoding steps, each over one batch.", engine.steps),
            ("engine_failures", "Steps that failed.", engine.failures),
            ("image_cache_hits", "Pictures with visual tokens in the cache.", cache.hits),
            ("image_cache_misses", "Pictures that were encoded.", cache.misses),
        ):
            yield CounterMetricFamily(f"mm_moslora_{name}", what, value=value)
