"""Continuous batching against one answer after the other: process CPU time of the same answers, interleaved.

    python scripts/bench/serve.py MODEL --answers 16 --tokens 24 --rounds 3 [--json]

MODEL is a run, a checkpoint or an export that sees pictures. One thread; every round runs both ways on the same jobs,
and the ratio is the median over rounds. The answers of both ways are compared token by token.
"""

from __future__ import annotations

import argparse
import json
import platform
import queue
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from parent import end_with_parent
from PIL import Image

from mm_moslora.serve.engine import Engine, Job, Piece
from mm_moslora.serve.limits import Limits
from mm_moslora.serve.models import Models, load_models
from mm_moslora.serve.sampling import Sampling
from mm_moslora.serve.wire import Message, Picture


def jobs_for(models: Models, count: int, tokens: int, done: queue.Queue[Piece]) -> list[Job]:
    """Questions of different lengths, each about a picture of its own."""
    from mm_moslora.serve.prepare import turns_of

    made = []
    for index in range(count):
        picture = Image.new("RGB", (64, 64), (index * 37 % 256, index * 91 % 256, index * 53 % 256))
        question = "What is shown " + "here and there " * (index % 5) + f"in picture {index}? Answer at length."
        message = Message(role="user", parts=(Picture(url="", where=""), question), where="")
        ids, seen = models.prompt(turns_of([message]), [picture])
        made.append(
            Job(
                model=models.default, input_ids=ids, seen=seen, sampling=Sampling(max_tokens=tokens), deliver=done.put,
                deadline=time.monotonic() + 3600,
            )
        )  # fmt: skip
    return made


def answer(engine: Engine, count: int, tokens: int, *, together: bool) -> tuple[float, list[list[int]]]:
    """CPU seconds of the process, and the answers."""
    done: queue.Queue[Piece] = queue.Queue()
    jobs = jobs_for(engine.models, count, tokens, done)
    started = time.process_time()
    for group in [jobs] if together else [[job] for job in jobs]:
        engine.submit(group)
        ended = 0
        while ended < len(group):
            ended += done.get().ending is not None
    return time.process_time() - started, [job.tokens for job in jobs]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    options = parser.parse_args()
    end_with_parent()
    torch.set_num_threads(1)
    models = load_models(options.model)
    models.stops = []  # every answer has the same length
    engine = Engine(models, Limits(batch=options.answers))
    engine.start()
    rows: list[dict[str, Any]] = []
    same = True
    try:
        answer(engine, 2, 4, together=True)
        for number in range(options.rounds):
            order = (True, False) if number % 2 else (False, True)
            found = {way: answer(engine, options.answers, options.tokens, together=way) for way in order}
            same &= found[True][1] == found[False][1]
            rows.append({"alone_cpu_seconds": found[False][0], "together_cpu_seconds": found[True][0]})
            print(rows[-1], file=sys.stderr, flush=True)
    finally:
        engine.stop()
    speedup = statistics.median(row["alone_cpu_seconds"] / row["together_cpu_seconds"] for row in rows)
    result = {
        "benchmark": "serve", "hardware": f"{platform.processor() or platform.machine()}, one thread", "rows": rows,
        "versions": {"torch": torch.__version__.partition("+")[0]},
        "summary": {"speedup_continuous_batching": round(speedup, 2), "identical_answers": float(same)},
    }  # fmt: skip
    print(
        json.dumps(result) if options.json else f"{speedup:.2f} times less CPU time together; identical answers: {same}"
    )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
