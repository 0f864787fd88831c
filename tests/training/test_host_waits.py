"""How often the host reads a value of the device in an optimiser step; on a GPU every such read is a wait.

Counted on a CPU, where a read is one of the same calls: `item`, `tolist`, `bool`, `float`, and the copy to the host.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from trials import make_parts, make_recipe

from mm_moslora.training import training_loop
from mm_moslora.training.training_loop import train

LOG_EVERY, STEPS = 3, 5
ON_THE_HOST = {
    "deepspeed utils.py is_invalid_grad_norm",  # of the norm that was read
    "mm_moslora deepspeed_engine.py _update",
    "mm_moslora feature_cache.py bytes_of",  # of pictures before they are sent
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
