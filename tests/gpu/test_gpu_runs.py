"""Whole runs: presets, two ranks on one card, kill and resume, the same digits, host waits, quantised bases."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import CHECKOUT, python_path
from trials import hexed, losses, make_recipe, with_train, write
from waiting import wait_until

from mm_moslora.batch import Batch
from mm_moslora.config import Recipe
from mm_moslora.training import run_setup
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import ConfigError

COMPILED = ("zero2_cpuadam", "zeropp", "zero3_nvme")
"""Presets with operators that DeepSpeed builds at their first use."""
PRESETS = [
    pytest.param(name, marks=pytest.mark.slow) if name in COMPILED else name
    for name in sorted(path.stem for path in (CHECKOUT / "deepspeed_configs").glob("*.json"))
]
WORKER = Path(__file__).with_name("train_recipes.py")


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": python_path(), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | more


def train_elsewhere(*words: str, ranks: int = 1, **more: str) -> None:
    """Train recipes in processes of their own."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(WORKER), *words]
    done = subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_losses_of_plain_torch(preset, parts, tmp_path, monkeypatch) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    monkeypatch.setenv("MM_MOSLORA_NVME", str(tmp_path))
    train(make_recipe(parts, tmp_path / "none", "none", micro_batch=4))
    try:
        train(make_recipe(parts, tmp_path / preset, preset, micro_batch=4))
    except ConfigError as error:
        if preset not in COMPILED:
            raise
        pytest.skip(str(error))
    rounded = 0.05 if preset == "zeropp" else 1e-4
    assert losses(tmp_path / preset) == pytest.approx(losses(tmp_path / "none"), rel=rounded)


@pytest.mark.parametrize(("stage", "together"), [("zero1", 1), ("zero2", 1), ("zero3", 1), ("zero2", 2)])
def test_two_ranks_share_a_card_by_gloo(stage, together, parts, tmp_path) -> None:
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    one = make_recipe(parts, tmp_path / "one", "none", micro_batch=4)
    two = make_recipe(parts, tmp_path / "two", stage, micro_batch=2, sequence_parallel=together)
    train(one)
    train_elsewhere(write(two), ranks=2, MM_MOSLORA_BACKEND="gloo")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_killed_run_continues_bit_for_bit(parts, tmp_path) -> None:
    """In bf16 with dropout, from the checkpoint that was there when the process was killed."""
    settings = {"steps": 12, "save_every": 2, "dropout": 0.1, "precision": "bf16", "deterministic": True}
    straight, killed = (make_recipe(parts, tmp_path / name, "none", **settings) for name in ("straight", "killed"))
    train_elsewhere(write(straight))  # cuBLAS reads its variable at the first product of a process
    process = subprocess.Popen([sys.executable, str(WORKER), write(killed)], env=environment())
    wait_until(lambda: list((tmp_path / "killed").glob("checkpoint-*")), process=process, seconds=240)
    process.send_signal(signal.SIGKILL)
    process.wait()
    train_elsewhere(write(killed))
    assert hexed(tmp_path / "killed") == hexed(tmp_path / "straight")


def test_a_deterministic_run_repeats_its_digits(parts, tmp_path) -> None:
    settings = {"dropout": 0.1, "precision": "bf16", "deterministic": True, "gradient_checkpointing": True}
    train_elsewhere(*(write(make_recipe(parts, tmp_path / name, "none", **settings)) for name in ("first", "second")))
    assert hexed(tmp_path / "first") == hexed(tmp_path / "second")


@pytest.mark.parametrize("change", ["plain", "dropout", "checkpointing", "fp32"])
def test_micro_batches_do_not_wait_for_the_device(change, parts, tmp_path) -> None:
    recipe = make_recipe(parts, tmp_path / "run", "none", precision="fp32" if change == "fp32" else "bf16",
                         dropout=0.1 if change == "dropout" else 0.0,
                         gradient_checkpointing=change == "checkpointing")  # fmt: skip
    (tmp_path / "run").mkdir()
    run = run_setup.prepare(recipe)
    engine, data = run.engine, run.training_set
    examples = [data.load(number) for number in data.usable]
    batches = [Batch.from_examples(examples[start : start + 4]) for start in (0, 4)]
    batches = [batch.pin_memory() for batch in batches] if torch.cuda.is_available() else batches
    assert engine.step(batches, 1.0).applied  # the first one compiles and tries kernels
    right = torch.zeros((), dtype=torch.int64, device=engine.device)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            loss = engine._forward(batch.to(engine.device), True, right, last=False)
            engine._backward(loss, last=False)
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    assert math.isfinite(float(loss))


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base_trains(kind, parts, tmp_path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    made = make_recipe(parts, tmp_path / kind, "none", precision="bf16", steps=20)
    recipe = replace(
        made, model=replace(made.model, quantisation=kind), optim=replace(made.optim, lr=1e-2, projector_lr=1e-2)
    )
    train(recipe)
    values = losses(tmp_path / kind)
    assert sum(values[-3:]) < 0.9 * sum(values[:3])


@pytest.mark.parametrize("mode", ["full", "last_n"])
def test_other_modes_train(mode, parts, tmp_path) -> None:
    made = make_recipe(parts, tmp_path / mode, "none", precision="bf16", steps=10)
    model = replace(made.model, language_mode="full" if mode == "full" else "adapter")
    if mode == "last_n":
        model = replace(model, vision=replace(model.vision, mode="adapter"))
    train(with_train(replace(made, model=model), vision_gradient_checkpointing=mode == "last_n"))
    assert all(map(math.isfinite, losses(tmp_path / mode)))


@pytest.mark.parametrize("backend", ["inductor"])
def test_compiled_passes_give_the_losses_of_eager_ones(backend, parts, tmp_path) -> None:
    if torch.cuda.is_available():
        pytest.importorskip("triton", reason="triton is not installed")
    runs: list[Recipe] = [
        make_recipe(parts, tmp_path / str(compiled), "none", steps=2, compile=compiled) for compiled in (None, backend)
    ]
    for run in runs:
        train(run)
    plain, compiled = (losses(Path(run.train.output)) for run in runs)
    assert compiled == pytest.approx(plain, rel=1e-4)
