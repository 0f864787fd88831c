"""Continuous batching against one answer at a time: process CPU time of the same answers, interleaved.

    python scripts/bench/serve.py MODEL --answers 16 --tokens 24 --rounds 3

MODEL is a run, a checkpoint or an export with a vision encoder. One thread runs both ways on the same jobs in every
round, and the ratio is the median over rounds. The answers of both ways are compared token by token.
"""

from __future__ import annotations

import argparse
import queue
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from harness import Benchmark, Case, Row, interleaved, ratio
from PIL import Image

from mm_moslora.models.decoding.token_sampling import Sampling
from mm_moslora.serve.chat_request import ChatMessage, MessagePicture
from mm_moslora.serve.continuous_batching import AnswerPart, GenerationEngine, GenerationJob
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models, load_models


def jobs_for(models: Models, count: int, tokens: int, done: queue.Queue[AnswerPart]) -> list[GenerationJob]:
    """Questions of different lengths, each about its own image."""
    from mm_moslora.serve.prompt_preparation import turns_of

    jobs = []
    for index in range(count):
        picture = Image.new("RGB", (64, 64), (index * 37 % 256, index * 91 % 256, index * 53 % 256))
        question = "What is shown " + "here and there " * (index % 5) + f"in picture {index}? Answer at length."
        message = ChatMessage(role="user", parts=(MessagePicture(url="", where=""), question))
        ids, images = models.prompt(turns_of([message]), [picture])
        jobs.append(
            GenerationJob(
                model=models.default, input_ids=ids, images=images, sampling=Sampling(max_tokens=tokens),
                deliver=done.put, deadline=time.monotonic() + 3600,
            )
        )  # fmt: skip
    return jobs


def answer(
    engine: GenerationEngine, jobs: list[GenerationJob], done: queue.Queue[AnswerPart], *, together: bool
) -> list[list[int]]:
    """The answers to all jobs, submitted at once or one after the other."""
    for group in [jobs] if together else [[job] for job in jobs]:
        engine.submit(group)
        ended = 0
        while ended < len(group):
            ended += done.get().ending is not None
    return [job.tokens for job in jobs]


def measure(options: argparse.Namespace) -> Row:
    """CPU seconds of both ways in every round, and whether their answers are equal. Prompts are prepared beforehand."""
    models = load_models(Path(options.model))
    models.stops = []  # so that all answers have the same length
    engine = GenerationEngine(models, Limits(batch=options.answers))
    done: queue.Queue[AnswerPart] = queue.Queue()
    ready = [jobs_for(models, options.answers, options.tokens, done) for _ in range(2 * (options.rounds + 1))]
    answers: dict[str, list[Any]] = {}

    def way(*, together: bool) -> list[list[int]]:
        return answer(engine, ready.pop(), done, together=together)

    engine.start()
    try:
        steps = {"alone": partial(way, together=False), "together": partial(way, together=True)}
        times = interleaved(steps, options.rounds, results=answers)
    finally:
        engine.stop()
    return {
        "alone_cpu_seconds": times["alone"], "together_cpu_seconds": times["together"],
        "speedup": ratio(times, "alone", "together"), "identical": answers["alone"] == answers["together"],
    }  # fmt: skip


def summarise(rows: list[Row]) -> dict[str, float]:
    """The one row's."""
    (row,) = rows
    speedup, same = round(row["speedup"], 2), float(row["identical"])
    return {"speedup_continuous_batching": speedup, "identical_answers": same}


def lines(row: Row) -> Iterator[dict[str, str]]:
    """The rounds."""
    for alone, together in zip(row["alone_cpu_seconds"], row["together_cpu_seconds"], strict=True):
        yield {"alone, CPU s": f"{alone:.2f}", "together": f"{together:.2f}"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The model, and what is asked of it."""
    parser.add_argument("model")
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)


BENCHMARK = Benchmark(
    name="serve", about=__doc__, lines=lines, summarise=summarise, add_options=add_options, rounds=3,
    cases=lambda options: [Case(names={"case": "serve"}, measure=partial(measure, options))],
    packages=("transformers",),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
