"""Continuous batching against one answer at a time: process CPU time of the same answers, interleaved.

    python scripts/bench/serve.py MODEL --answers 16 --tokens 24 --rounds 3 [--json]

MODEL is a run, a checkpoint or an export with a vision encoder. One thread runs both ways on the same jobs in every
round, and the ratio is the median over rounds. The answers of both ways are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import queue
import sys
import time
from pathlib import Path
from typing import Any

import torch
from json_output import results_alone
from measuring import head, interleaved, ratio
from parent import end_with_parent
from PIL import Image

from mm_moslora.models.decoding.token_sampling import Sampling
from mm_moslora.serve.api.chat_request import ChatMessage, MessagePicture
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.continuous_batching import AnswerPart, GenerationEngine, GenerationJob
from mm_moslora.serve.inference.served_models import Models, load_models


def jobs_for(models: Models, count: int, tokens: int, done: queue.Queue[AnswerPart]) -> list[GenerationJob]:
    """Questions of different lengths, each about its own picture."""
    from mm_moslora.serve.inference.prompt_preparation import turns_of

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


def measure(engine: GenerationEngine, answers: int, tokens: int, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """CPU seconds of both ways in every round, and whether their answers are equal. Prompts are prepared beforehand."""
    done: queue.Queue[AnswerPart] = queue.Queue()
    ready = [jobs_for(engine.models, answers, tokens, done) for _ in range(2 * (rounds + 1))]
    answers_of: dict[str, list[Any]] = {}
    times = interleaved(
        {
            "alone": lambda: answer(engine, ready.pop(), done, together=False),
            "together": lambda: answer(engine, ready.pop(), done, together=True),
        },
        rounds,
        results=answers_of,
    )
    return times, answers_of["alone"] == answers_of["together"]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    end_with_parent()
    torch.set_num_threads(1)
    models = load_models(options.model)
    models.stops = []  # so that all answers have the same length
    engine = GenerationEngine(models, Limits(batch=options.answers))
    engine.start()
    try:
        times, same = measure(engine, options.answers, options.tokens, options.rounds)
    finally:
        engine.stop()
    speedup = ratio(times, "alone", "together")
    result = head("serve", "transformers") | {
        "rows": [
            {"alone_cpu_seconds": alone, "together_cpu_seconds": together}
            for alone, together in zip(times["alone"], times["together"], strict=True)
        ],
        "summary": {"speedup_continuous_batching": round(speedup, 2), "identical_answers": float(same)},
    }
    print(
        json.dumps(result)
        if options.json
        else f"{speedup:.2f} times less CPU time together; identical answers: {same}",
        file=output,
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
