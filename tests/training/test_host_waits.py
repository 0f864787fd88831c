"""How often the host reads a value of the device in an optimiser step, and that reading it late changes nothing."""

from __future__ import annotations

import json
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from trials import make_parts, make_recipe, with_train

from mm_moslora.training import training_loop
from mm_moslora.training.engine import TorchEngine
from mm_moslora.training.engine.optimizers import OptimizerKind
from mm_moslora.training.training_loop import _Loop, train
from mm_moslora.utils.errors import DivergedError

LOG_EVERY, STEPS = 3, 5
ON_THE_HOST = {
    "deepspeed utils.py is_invalid_grad_norm",  # of the norm that was read
    "mm_moslora deepspeed_engine.py _update",
    "mm_moslora feature_store.py bytes_of",  # of pictures before they are sent
}
"""Reads of values that are on the host."""


class Reads(TorchDispatchMode):
    """Reads by package and function; those of torch's AdamW are of its step counts, which the host keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def note(self) -> None:
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if "optim" in path.parts:
                return
            package = next((part for part in ("mm_moslora", "deepspeed", "transformers") if part in path.parts), None)
            if package is not None:
                self.counts[f"{package} {path.name} {frame.name}"] += 1
                return

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_parts(tmp_path_factory.mktemp("parts"), records=20)


@pytest.mark.parametrize("zero", ["none", "zero1", "zero2"])
def test_a_step_reads_the_device_once_and_once_more_where_it_is_logged(
    zero: str, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if zero != "none":
        stage = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2", reason="DeepSpeed is not installed")
        if not hasattr(stage, "is_invalid_grad_norm"):
            pytest.skip("this DeepSpeed checks for overflow apart from the norm")
    reads, steps = Reads(), []
    for name in ("tolist", "cpu"):
        method = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, method: Any = method, **kwargs: Any) -> Any:
            reads.note()
            return method(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    if zero != "none":
        accelerator = pytest.importorskip(
            "deepspeed.accelerator", reason="DeepSpeed is not installed"
        ).get_accelerator()
        monkeypatch.setattr(accelerator, "synchronize", lambda *_: reads.note())
    step = training_loop._Loop._step

    def counted_step(loop: Any, *args: Any, **kwargs: Any) -> None:
        reads.counts.clear()
        with reads:
            step(loop, *args, **kwargs)
        steps.append(dict(reads.counts))

    monkeypatch.setattr(training_loop._Loop, "_step", counted_step)
    recipe = make_recipe(parts, tmp_path / "run", zero, steps=STEPS, global_batch=4, micro_batch=2)
    train(replace(recipe, train=replace(recipe.train, log_every=LOG_EVERY, rehearsal=False)))
    assert len(steps) == STEPS
    # The copy of the sums is one, and with DeepSpeed it arrives before the norm does.
    expected = {} if zero == "none" else {"mm_moslora deepspeed_patches.py <lambda>": 1}
    for number, counts in enumerate(steps[1:], 2):  # the first also compares pictures
        logged = number % LOG_EVERY == 0 or number == STEPS
        wanted = expected | {"mm_moslora step_result.py tolist": 1 + logged}
        assert {place: count for place, count in counts.items() if place not in ON_THE_HOST} == wanted


@pytest.fixture
def run(recipe, tmp_path, monkeypatch):
    """Trains with AdamW's one kernel; the losses of the steps in `poisoned` are NaN."""
    make, real = OptimizerKind.make, _Loop._step
    monkeypatch.setattr(OptimizerKind, "make", lambda *args, fused: make(*args, fused=True))

    def run(name, *, poisoned=(3,), late=True, **options):
        def step(loop, batches, *, first):
            number = loop.run.step + 1
            if number == options.get("fails_at"):
                raise MemoryError("no more")
            if number in poisoned:
                nan = [replace(batch, weights=torch.full_like(batch.targets, torch.nan, dtype=torch.float32))
                       for batch in next(batches)]  # fmt: skip
                batches = iter([nan])
            real(loop, batches, first=first)

        with monkeypatch.context() as patch:
            patch.setattr(_Loop, "_step", step)
            if not late:
                patch.setattr(TorchEngine, "late", False)
            output = str(tmp_path / name)
            return train(
                with_train(recipe, output=output, steps=6, save_every=2, max_skipped_steps=2, rehearsal=False),
                stop_at=options.get("stop_at"),
            )

    return run


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["step"], line["skipped_steps"], line["grad_norm"], line["loss"])
        for line in lines
        if "skipped_steps" in line
    ]


def test_late_numbers_are_those_that_are_read_at_once(run, tmp_path, caplog):
    run("late")
    assert "Step 3 skipped" in caplog.text
    assert not run("stopped", stop_at=4).finished
    run("stopped")
    run("soon", late=False)
    for other in ("stopped", "soon"):
        assert str(records(tmp_path / other)) == str(records(tmp_path / "late"))
        ours, theirs = (load_file(tmp_path / name / "checkpoint-000006/adapter/moslora.safetensors")
                        for name in ("late", other))  # fmt: skip
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_run_that_diverges_ends_at_the_step_that_shows_it(run, tmp_path):
    with pytest.raises(DivergedError, match="stopped at step 4"):
        run("run", poisoned=range(3, 9))
    assert records(tmp_path / "run")[-1][:2] == (4, 2)


def test_an_error_of_the_next_step_leaves_the_record_of_the_last_one(run, tmp_path):
    with pytest.raises(MemoryError):
        run("run", fails_at=6)
    assert records(tmp_path / "run")[-1][0] == 5
