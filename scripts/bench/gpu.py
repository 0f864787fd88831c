#!/usr/bin/env python
"""Training steps and decoding on a GPU: this project against transformers, PEFT and Liger.

    python scripts/bench/gpu.py --out rows.jsonl                LLaVA-1.5-7B, as far as 560 seconds go; run it again
    python scripts/bench/gpu.py --out rows.jsonl --shape 3b     or 1b, where launches dominate
    python scripts/bench/gpu.py --out rows.jsonl --only ours hf-best
    python scripts/bench/gpu.py --table rows.jsonl              print the table again
    python scripts/bench/gpu.py --shape tiny --device cpu       a try without a GPU

The checkout needs torch, transformers and peft; contenders that need more are left out with the reason. Models come
from configurations, with random bf16 weights made on the device. A contender runs in a process of its own, for about
60 seconds at most, and its row is written as it ends. A row that is there (same shape, contender, versions and card,
the same benchmark, and the same sources of this project where the contender runs them) is not measured again. A
contender that fails is a row with its error, and the rest goes on; --retry measures failed ones again. One that was
killed, such as a compiler with a cold cache, is measured once more by the next call. The exit code is 75 where
contenders are left: the same command goes on.

Training figures are of whole optimiser steps on three rotating batches of some 13,300 tokens each, in lengths like
those of LLaVA's 665k mix, and on a full one of 16,384 tokens. Where memory does not suffice, batches are split into 2,
4 or 8 micro-batches.

Contenders (rank 128, adapters in all linear layers of the decoder, a projector that trains, a frozen tower):
    hf                  transformers and PEFT: padded, fp32 adapters under autocast, all logits, checkpointing
    hf-best             the same with Liger's kernels and loss where they run, on padding-free rows with this project's
                        attention, bf16 adapters, logits at supervised positions only
    ours                the step of `mm-moslora train`; ours-torch, -triton, -liger and -inductor have other passes
    ours-lora           without mixers; -half-rank has half the rank; -dropout 0.05 of it; -zero1, -zero2 DeepSpeed
    decode-ours         greedy decoding, against `generate` of transformers and vLLM

Useful MFU is the speed of the needed FLOPs (no padding, no recomputation, no mixers, the head at supervised positions)
over that of the process's own 8192^3 product, and over the peak of the card's data sheet, which predictions and
targets are of; the two need not agree. `busy` is the share of a step in which a kernel runs (a profiled step's
kernels over an unprofiled step's time). Gradients are those of A, M and B in two layers of full width, against fp64:
relative differences, median and worst.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from contenders import BY_NAME, CONTENDERS, Contender
from gpu_table import PREDICTIONS, table
from harness import ROOT, Row, Rows, end_with_parent, read_rows, version_of

from mm_moslora.utils.hardware import hardware
from mm_moslora.utils.identity import sha256_of_bytes

logger = logging.getLogger("gpu")
LIMIT = 60.0
"""Seconds of a contender's process, its start included; three steps are measured even so. The first one, which also
fills the caches of the compilers, gets twice as many."""
GRACE = 30.0
"""Further seconds before the process is killed."""
AGAIN = 75
"""Exit code where the time was over before all contenders were measured."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
SHAPES = ("llava-1.5-7b", "3b", "1b", "tiny")
KEY = ("shape", "contender", "card", "versions")


def card_of(device: str) -> str:
    """The card's name, asked for in a process that then frees it; on a CPU the processor's."""
    if device == "cpu":
        return hardware()
    code = "import torch; print(torch.cuda.get_device_name(0))"
    probe = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if probe.returncode:
        why = last_line(probe.stderr)
        raise SystemExit(f"PyTorch finds no GPU here ({why}). For a try without one: --shape tiny --device cpu.")
    return probe.stdout.strip().splitlines()[-1]


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def digest_of(paths: Iterable[Path]) -> str:
    """A hash of files."""
    parts = (path.relative_to(ROOT).as_posix().encode() + path.read_bytes() for path in sorted(paths))
    return sha256_of_bytes(more=parts)[:12]


def sources() -> str:
    """A hash of the Python files that a step and decoding run."""
    project = ROOT / "mm_moslora"
    folders = [project / folder for folder in ("adapters", "kernels", "models", "training")]
    return digest_of([project / "batch.py", *(path for folder in folders for path in folder.rglob("*.py"))])


def measuring() -> str:
    """A hash of the files that build a contender and measure it."""
    names = ("contenders", "gpu_batches", "gpu_decode", "gpu_measure", "llava_models")
    return digest_of(Path(__file__).with_name(f"{name}.py") for name in names)


def key_of(contender: Contender, shape: str, card: str) -> Row:
    """What a row is found by."""
    versions = {package: version_of(package) for package in contender.packages} | {"benchmark": measuring()}
    if contender.runs_sources:
        versions["mm_moslora"] = sources()
    return {"shape": shape, "contender": contender.name, "card": card, "versions": versions}


def last_row(rows: Rows, key: Row) -> Row | None:
    """The last row with a key; None: there is none but that of a contender that was killed once."""
    found = rows.find(key)
    once = len(found) == 1 and found[0].get("killed")
    return found[-1] if found and not once else None


def measure(contender: Contender, shape: str, device: str, seconds: float) -> Row:
    """Run a contender's process; its figures, or its error."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        row, log = Path(folder) / "row.json", Path(folder) / "log"
        command = [
            sys.executable, str(Path(__file__).with_name("gpu_measure.py")), contender.name, "--shape", shape,
            "--device", device, "--until", str(started + seconds), "--row", str(row),
        ]  # fmt: skip
        with log.open("w") as stream:
            environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ  # lengths vary
            if device == "cpu":  # this project takes a GPU that it sees
                environment["CUDA_VISIBLE_DEVICES"] = ""
            process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=ROOT, env=environment)
            try:
                code = process.wait(timeout=seconds + GRACE)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                process.kill()
                process.wait()
        spent = {"process_seconds": round(time.monotonic() - started, 1)}
        try:  # the row counts even where the process then failed to end
            return json.loads(row.read_text()) | spent
        except (OSError, ValueError):
            why = f"killed after {seconds + GRACE:.0f} s" if code is None else f"exit code {code}"
            error = {"error": f"{why}: {last_line(log.read_text(errors='replace'))}"}
            return error | {"killed": code is None} | spent


def run(wanted: Sequence[Contender], rows: Rows, options: argparse.Namespace, started: float) -> int:
    """Measure what is missing while there is time; returns the number of contenders that are left."""
    card = card_of(options.device)
    keys = {contender.name: key_of(contender, options.shape, card) for contender in wanted}

    def is_missing(contender: Contender) -> bool:
        row = last_row(rows, keys[contender.name])
        return row is None or (options.retry and "error" in row)

    missing = [contender for contender in wanted if is_missing(contender)]
    logger.info("%s on %s: %d of %d rows are there.", options.shape, card, len(wanted) - len(missing), len(wanted))
    longest = 0.0
    for number, contender in enumerate(missing):
        left = options.budget - (time.monotonic() - started)
        if left < min(LIMIT, max(longest, LIMIT / 2)):
            logger.info("%d contenders are left; the same command goes on with them.", len(missing) - number)
            return len(missing) - number
        if contender.needs and version_of(contender.needs) is None:
            row: Row = {"left_out": f"{contender.needs} is not installed", "process_seconds": 0.0}
        else:
            limit = LIMIT if rows.rows else 2 * LIMIT
            row = measure(contender, options.shape, options.device, max(1.0, min(limit, left - 10.0)))
        rows.add(keys[contender.name] | {"date": datetime.now(UTC).isoformat(timespec="seconds")} | row)
        longest = max(longest, row["process_seconds"])
        spent = time.monotonic() - started
        rest = longest * (len(missing) - number - 1)
        logger.info(
            "%d/%d %s: %s; %.0f s spent, at most %.0f s left", number + 1, len(missing), contender.name, words(row),
            spent, rest,
        )  # fmt: skip
    again = sum(is_missing(contender) for contender in missing if not options.retry)
    if again:
        logger.info("%d contenders were killed; the same command tries them once more.", again)
    return again


def words(row: Row) -> str:
    """A row in a few words."""
    if "error" in row:
        return f"failed ({row['error']})"
    if "left_out" in row:
        return f"left out ({row['left_out']})"
    if "decoding" in row:
        speeds = {size: one.get("tokens_per_second", 0.0) for size, one in row["decoding"].items()}
        return ", ".join(f"batch {size} {speed:,.0f} tokens/s" for size, speed in speeds.items())
    return f"{row['seconds']:.3f} s, {row['tokens_per_second']:,.0f} tokens/s, MFU {row['mfu']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark, or print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON Lines file of rows; only missing ones are measured")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="CONTENDER", help="contenders to measure")
    parser.add_argument("--budget", type=float, default=560.0, metavar="SECONDS", help="start no contender after them")
    parser.add_argument("--retry", action="store_true", help="measure contenders with an error again")
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS, help="JSON file, shown beside the figures")
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the table of these rows and measure nothing")
    options = parser.parse_args(arguments)
    if options.table is not None:
        if not options.table.is_file():
            parser.error(f"{options.table} does not exist.")
        print(table(read_rows(options.table, *KEY), options.predictions))
        return 0
    if options.device == "cpu" and options.shape != "tiny":
        parser.error("--device cpu takes --shape tiny; the others are for GPUs.")
    started = time.monotonic()
    end_with_parent()
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    rows = Rows(options.out, *KEY)
    wanted = [BY_NAME[name] for name in options.only] if options.only else CONTENDERS
    try:
        left = run(wanted, rows, options, started)
    except KeyboardInterrupt:
        outcome = (
            f"{len(rows.rows)} rows are in {options.out}; the same command goes on" if options.out else "nothing kept"
        )
        logger.info("Interrupted: %s.", outcome)
        return INTERRUPTED
    print(table(rows.rows, options.predictions))
    return AGAIN if left else 0


if __name__ == "__main__":
    sys.exit(main())
