"""What goes wrong in the ranks of the fault tests; each function is called in every rank, see `ranks.Ranks.start`."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from ranks import train_recipes

from mm_moslora.config import load_recipe
from mm_moslora.tracking import Trackers
from mm_moslora.training import snapshot, training_loop, weight_init
from mm_moslora.training.engine import TrainingEngine
from mm_moslora.training.image_dependence import ImageCheck
from mm_moslora.training.metrics import mixer_metrics
from mm_moslora.training.supervision import rank_agreement
from mm_moslora.utils import distributed


def poison(rank: str, step: str, *recipes: str) -> int:
    """Pictures of one rank are not finite in one step."""
    real = training_loop._Loop._step

    def poisoned_step(self, batches, *, first):
        def broken(batch):
            return replace(batch, pixel_values=torch.full_like(batch.pixel_values, torch.nan))

        if distributed.rank() == int(rank) and self.run.step == int(step):
            micro_batches = [broken(b) if b.pixel_values is not None else b for b in next(batches)]
            assert any(b.pixel_values is not None for b in micro_batches)
            batches = iter([micro_batches])
        return real(self, batches, first=first)

    training_loop._Loop._step = poisoned_step
    return train_recipes(list(recipes))


def failing_measures(*recipes: str) -> int:
    """What the adapter learned cannot be measured."""

    def failing(*_):
        raise IndexError("out of range")

    mixer_metrics.adapter_reports = failing
    return train_recipes(list(recipes))


def each_its_own(*recipes: str) -> int:
    """Every rank trains another recipe."""
    return train_recipes([recipes[distributed.rank()]])


def other_version(*recipes: str) -> int:
    """The second rank has another PEFT."""
    real = rank_agreement.installed_version
    if distributed.rank() == 1:
        rank_agreement.installed_version = lambda name: "0.1.0" if name == "peft" else real(name)
    return train_recipes(list(recipes))


def fit_on_main_alone(outcome: str, *recipes: str) -> int:
    """What the projector is fitted to is measured on rank 0 alone; there it may fail."""
    real = weight_init._fit

    def fit(*arguments, **keywords):
        assert distributed.is_main(), "measured twice"
        if outcome == "fails":
            raise RuntimeError("no room for the tower")
        real(*arguments, **keywords)

    weight_init._fit = fit
    return train_recipes(list(recipes))


def at_step(what: str, rank: str, step: str, *recipes: str) -> int:
    """One rank, or with `all` each, is killed, stopped, put to sleep, raises or gets a signal within one step."""
    _fail_within_step(what, rank, int(step))
    return train_recipes(list(recipes))


def commanded(what: str, rank: str, step: str, *words: str) -> int:
    """The same under `mm-moslora`, with a tracker that takes its time at the end; gives its exit code."""
    from mm_moslora import cli
    from mm_moslora.utils.errors import ExitStatus

    _fail_within_step(what, rank, int(step))
    finish = Trackers.finish

    def slowly(self, *, ending):
        if distributed.is_main():
            time.sleep(1)
        finish(self, ending=ending)

    Trackers.finish = slowly
    code = cli.run(list(words))
    mark = Path(load_recipe(words[-1]).train.output) / "STOPPED"
    assert code != ExitStatus.STOPPED or mark.exists(), "torchrun would end rank 0 before it can leave its mark"
    return code


def _fail_within_step(what: str, rank: str, step: int) -> None:
    real = TrainingEngine.queue

    def step_or_not(self, *arguments, **options):
        step_or_not.done += 1
        if rank in ("all", str(distributed.rank())) and step_or_not.done == step:
            if what == "sleep":
                lost_in_thought()
            elif what == "raise":
                raise RuntimeError("a bug of rank 1")
            else:
                signal.raise_signal(getattr(signal, what))
        return real(self, *arguments, **options)

    step_or_not.done = 0
    TrainingEngine.queue = step_or_not


def while_starting(rank: str, place: str, *words: str) -> int:
    """`mm-moslora` of which one rank is killed in its start-up, as it comes to a function (`module:name`)."""
    from mm_moslora import cli

    module, _, path = place.partition(":")
    owner, name = importlib.import_module(module), path.rpartition(".")[2]
    if "." in path:
        owner = getattr(owner, path.rpartition(".")[0])
    real = getattr(owner, name)

    def fatal(*arguments, **options):
        if distributed.rank() == int(rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(owner, name, fatal)
    return cli.run(list(words))


def while_measuring(what: str, rank: str, *recipes: str) -> int:
    """One rank gets SIGTERM in its first batch of the held-out loss, or at its first answer to a task's question."""
    from mm_moslora_eval.run.task_runner import _AnswerJob
    from trials import train_measured

    owner, name = {"loss": (TrainingEngine, "evaluate"), "task": (_AnswerJob, "_store")}[what]
    real = getattr(owner, name)

    def told(self, *arguments, **options):
        if distributed.rank() == int(rank) and not told.done:
            told.done = True
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments, **options)

    told.done = False
    setattr(owner, name, told)
    ImageCheck.__call__ = lambda *_: None  # it evaluates, too
    return train_measured(*recipes)


def slow_between_steps(rank: str, seconds: str, *recipes: str) -> int:
    """One rank takes its time between its steps, as for a slow disk."""
    real = training_loop._Loop._periodically

    def slowly(self):
        if distributed.rank() == int(rank):
            time.sleep(float(seconds))
        real(self)

    training_loop._Loop._periodically = slowly
    return train_recipes(list(recipes))


def other_cards(known: str, *recipes: str) -> int:
    """Every rank has a GPU of another kind, of which only some have a known peak."""
    from mm_moslora.training.metrics import gpu_memory

    peaks = [float(peak) or None for peak in known.split(",")]
    gpu_memory.device_peak = lambda _: peaks[distributed.rank()]
    return train_recipes(list(recipes))


def lost_in_thought() -> None:
    """A hang; its place must show in the stacks."""
    time.sleep(3600)


def full_disk(rank: str, step: str, *recipes: str) -> int:
    """One rank cannot write the checkpoint of one step."""
    real = snapshot.Snapshot.write

    def write(self, folder):
        if distributed.rank() == int(rank) and self.manifest.step == int(step):
            raise OSError(28, "No space left on device")
        real(self, folder)

    snapshot.Snapshot.write = write
    return train_recipes(list(recipes))


def no_builds(folder: str, *recipes: str) -> int:
    """A compiler and ninja seem to be here, and whoever builds an operator fails; a stale lock waits for them."""
    import deepspeed.ops
    from deepspeed.ops.op_builder.builder import OpBuilder
    from torch.utils import cpp_extension

    def build(*_, **__):
        raise AssertionError("an operator is built")

    os.environ["TORCH_EXTENSIONS_DIR"] = folder
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = True
    OpBuilder.jit_load = cpp_extension.load = cpp_extension.load_inline = build
    return train_recipes(list(recipes))


def late(who: str, folder: str, *words: str) -> int:
    """`mm-moslora` with one rank that comes late to whatever it does with a file in a folder, each time it is new."""
    from mm_moslora import cli

    seen = set()

    def wait(event, arguments):
        if event.startswith(("open", "os.", "shutil.")) and arguments and str(arguments[0]).startswith(folder):
            way = tuple((f.filename, f.lineno) for f in traceback.extract_stack() if "mm_moslora" in f.filename)
            if way not in seen:
                seen.add(way)
                time.sleep(0.15)

    if distributed.rank() == int(who):
        sys.addaudithook(wait)
    code = cli.run(list(words))
    print(f"late {len(seen)} times")
    return code


def preferring(fault: str, rank: str, steps: str, *recipes: str) -> int:
    """Ranks learn from preferences; in some steps (`2,3`) one has numbers that are not finite, a full disk, or dies."""
    from pairs import break_steps, train

    if distributed.rank() == int(rank):
        break_steps(fault, {int(step) for step in steps.split(",")})
    return train(*recipes)
