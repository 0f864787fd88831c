"""Staying alive: values that are not finite, ranks that die, hang, come late or are told to stop, full disks."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import make_records
from trials import STAGES, hexed, losses, make_recipe, metrics, weights, write
from waiting import wait_until

from mm_moslora.config import ProjectorConfig, SourceConfig, ValidateConfig
from mm_moslora.launch.launcher import stopped_text
from mm_moslora.reporting.run_status import read_state
from mm_moslora.training.supervision import watchdog
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ExitStatus

pytestmark = pytest.mark.slow
OFFLOADED = ("zero2_offload", "zero3_offload")


def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(parts, ranks, tmp_path):
    recipes = {stage: make_recipe(parts, tmp_path / stage, stage) for stage in STAGES}
    recipes["bf16"] = make_recipe(parts, tmp_path / "bf16", "zero2", precision="bf16")
    group = ranks.run(["faults:poison", "1", "1", *map(write, recipes.values())])
    assert group.output(1).count("skipped: the loss or a gradient is not finite") == len(recipes)
    assert "Records of rank 1: r" in group.output(1)
    assert "Records of rank 0: r" not in group.output(0), "its own loss was finite"
    assert group.output(0).count("skipped: the loss of another rank is not finite") == len(recipes)
    for name in recipes:
        lines = metrics(tmp_path / name)
        assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1]
        assert all(math.isfinite(line["loss"]) for line in lines[2:])
        # Applied steps alone advance the learning rate.
        rates = [line["lr/adapter"] for line in lines]
        assert rates[2] == rates[1]
    for stage in STAGES[1:]:
        assert metrics(tmp_path / stage)[3]["loss"] == pytest.approx(metrics(tmp_path / "zero0")[3]["loss"], rel=1e-5)


def test_cards_with_and_without_a_known_peak_run_together(parts, ranks, tmp_path):
    for name, peaks in (("one", "0,3e12"), ("both", "1e12,3e12")):
        ranks.run(["faults:other_cards", peaks, write(make_recipe(parts, tmp_path / name, "zero2", steps=2))])
    assert not any("mfu" in line for line in metrics(tmp_path / "one"))
    line = metrics(tmp_path / "both")[-1]
    assert 0 < line["mfu"] < 1
    assert hexed(tmp_path / "one") == hexed(tmp_path / "both")


def test_the_time_that_a_slow_rank_costs_is_a_metric(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2", steps=4)
    started = time.monotonic()
    ranks.run(["faults:slow_between_steps", "1", "2", write(recipe)])
    longest = time.monotonic() - started
    lines = metrics(tmp_path / "run")[1:]
    assert len(lines) == 3
    for line in lines:
        assert line["wall_seconds"] > max(2, line["step_seconds"] + 1)  # half: a busy machine slows the other, too
        assert line["work_seconds"] > max(2, line["work_seconds_min"] + 1)
        assert line["slowest_rank"] == 1
        assert line["tokens_per_second"] == pytest.approx(line["tokens"] / line["wall_seconds"])
        assert line["samples_per_second"] == pytest.approx(recipe.train.global_batch / line["wall_seconds"])
        assert line["memory_gib"] >= line["memory_gib_min"] > 0
    last = metrics(tmp_path / "run")[-1]
    assert last["samples_seen"] == 4 * recipe.train.global_batch
    assert last["eta_seconds"] == 0
    assert 2.1 < last["elapsed_seconds"] < longest
    counters = json.loads((tmp_path / "run" / "summary.json").read_text())["counters"]
    assert counters["wall_seconds"] >= last["elapsed_seconds"] > counters["seconds"]


def _interrupted(parts, ranks, tmp_path, arguments, **train):
    recipe = make_recipe(parts, tmp_path / "run", "zero2", save_every=1, **train)
    group = ranks.finish(ranks.start([*arguments, write(recipe)]))
    return recipe, group


def test_a_killed_rank_is_named_and_the_run_goes_on_exactly(parts, ranks, tmp_path):
    straight = make_recipe(parts, tmp_path / "straight", "zero2")
    recipe, group = _interrupted(parts, ranks, tmp_path, ["faults:at_step", "SIGKILL", "1", "3"])
    assert group.codes[1] == -signal.SIGKILL
    assert group.codes[0] not in (0, -signal.SIGKILL)
    assert f"rank 1 (process {group.pids[1]} on" in group.output(0)
    assert "died; last seen at step" in group.output(0)
    state = read_state(tmp_path / "run")
    assert (state.name, state.ranks) == ("failed", (1,))
    assert f"rank 1 (process {group.pids[1]} on" in str(state.reason)
    ranks.run([write(recipe), write(straight)])
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")


def test_the_end_of_a_run_whose_main_rank_was_killed_is_recorded_by_the_other(parts, ranks, tmp_path):
    _, group = _interrupted(parts, ranks, tmp_path, ["faults:at_step", "SIGKILL", "0", "2"])
    told = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (told["state"], told["ranks"]) == ("failed", [0])
    assert f"rank 0 (process {group.pids[0]} on" in told["reason"]
    assert "died; last seen at step" in told["reason"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "place",
    [
        "mm_moslora.training.training_loop:check_recipe",
        "mm_moslora.training.supervision.watchdog:Watchdog._begin",
        "mm_moslora.training.run_setup:load_parts",
        "mm_moslora.training.run_setup:build_engine",  # the other waits for an address in a group of DeepSpeed's
        "mm_moslora.training.run_driver:build_trackers",
    ],
)
def test_a_rank_that_dies_while_it_starts_is_named(place, rank, parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2")
    group = ranks.start(["faults:while_starting", str(rank), place, "train", write(recipe)])
    ranks.finish(group)
    said = group.output(1 - rank)
    assert group.codes[rank] == -signal.SIGKILL
    assert group.codes[1 - rank] in (1, ExitStatus.HANG), said
    assert "Traceback" not in said
    # A rank that is killed as it enters the loop may be gone before the other has joined.
    unjoined = "could not join the others" in said and place.endswith("check_recipe")
    assert unjoined or re.search(rf"The other ranks cannot be reached\. .*rank {rank}\b", said), said
    if place.endswith("check_recipe"):
        assert not (tmp_path / "run").exists()
    else:
        state = read_state(tmp_path / "run")
        assert (state.name, state.ranks) == ("failed", (rank,))
        assert f"rank {rank}" in str(state.reason)


def test_a_rank_that_cannot_join_says_where_it_tried_and_what_to_look_at(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2")
    place = "torch.distributed.distributed_c10d:_new_process_group_helper"  # rank 0 listens by then
    group = ranks.start(["faults:while_starting", "0", place, "train", write(recipe)])
    ranks.finish(group)
    assert group.codes == [-signal.SIGKILL, 1], group.outputs
    assert re.search(
        r"Rank 1 of 2 could not join the others at 127\.0\.0\.1:\d+, where rank 0 listens", group.output(1)
    )
    assert "that none has ended (its output says why)" in group.output(1)


def hang(how, parts, ranks, tmp_path):
    """A run in which rank 1 hangs at step 2, when rank 0 has said so."""
    recipe = make_recipe(parts, tmp_path / "run", "zero2", step_timeout_minutes=0.1)
    group = ranks.start(["faults:at_step", how, "1", "2", write(recipe)])
    wait_until(lambda: "No progress for" in group.output(0), lambda: group.outputs)
    return group


def check_named(group, run):
    """Rank 0 has named rank 1, said where it waits itself, and ended."""
    assert f"rank 1 (process {group.pids[1]} on" in group.output(0), group.outputs
    assert "in step_or_not" in (run / "stacks" / "rank-00000.txt").read_text()
    state = read_state(run)
    assert (state.name, state.ranks) == ("failed", (1,))
    assert str(state.reason).startswith("No progress for ")
    assert group.codes[0] == ExitStatus.HANG


def test_a_rank_that_is_stopped_is_named_and_says_so_when_it_is_woken(parts, ranks, tmp_path):
    group = hang("SIGSTOP", parts, ranks, tmp_path)
    time.sleep(watchdog._STANDSTILL)
    os.kill(group.pids[1], signal.SIGCONT)
    ranks.finish(group)
    check_named(group, tmp_path / "run")
    assert "is silent for" in group.output(0)
    assert f"rank 1 (process {group.pids[1]} on" in group.output(1)
    assert "it was stopped, or its machine slept" in group.output(1)
    assert "network" not in group.output(1)
    assert "is silent for" in str(read_state(tmp_path / "run").reason), "the first word counts"


def test_a_rank_that_hangs_is_named_with_stacks_in_time(parts, ranks, tmp_path):
    group = ranks.finish(hang("sleep", parts, ranks, tmp_path))
    check_named(group, tmp_path / "run")
    assert "does not wait for others: it is in lost_in_thought (faults.py:" in group.output(0)
    assert "in lost_in_thought" in (tmp_path / "run" / "stacks" / "rank-00001.txt").read_text()
    assert group.codes == [ExitStatus.HANG] * 2


@pytest.fixture(scope="module")
def undisturbed(parts, ranks, tmp_path_factory):
    """The run that is stopped below, not stopped."""
    recipe = make_recipe(parts, tmp_path_factory.mktemp("undisturbed") / "run", "zero1")
    ranks.run([write(recipe)])
    return Path(recipe.train.output)


@pytest.mark.parametrize(("number", "rank"), [("SIGTERM", "1"), ("SIGUSR1", "0"), ("SIGINT", "all")])
def test_a_signal_stops_all_ranks_at_the_same_step(number, rank, undisturbed, parts, ranks, tmp_path):
    """A scheduler tells one rank or several, Ctrl-C in a terminal tells all."""
    recipe = make_recipe(parts, tmp_path / "run", "zero1")
    group = ranks.finish(ranks.start(["faults:commanded", number, rank, "2", "train", write(recipe)]))
    assert group.codes == [75, 75], group.outputs
    assert len(metrics(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "checkpoint-000002" / "manifest.json").is_file()
    mark = tmp_path / "run" / "STOPPED"
    assert mark.read_text() == stopped_text(getattr(signal, number))
    ranks.run(["faults:commanded", "nothing", "0", "0", "train", write(recipe)])
    assert not mark.exists()
    assert hexed(tmp_path / "run") == hexed(undisturbed)


def test_no_operator_of_deepspeeds_is_built_on_a_cpu_and_a_stale_lock_does_not_hang_a_run(parts, ranks, tmp_path):
    lock = tmp_path / "cache" / "py311" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, 0))
    recipes = [make_recipe(parts, tmp_path / zero, zero, steps=1) for zero in ("zero1", "zero3", *OFFLOADED)]
    group = ranks.run(["faults:no_builds", str(tmp_path / "cache"), *map(write, recipes)])
    assert f"rm {lock}" in group.output(0)
    built = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path for path in built if not path.name.startswith("kernels-")] == [lock]  # ours are built once, see native


def test_a_bug_of_one_rank_is_reported_by_the_others(parts, ranks, tmp_path):
    _, group = _interrupted(parts, ranks, tmp_path, ["faults:at_step", "raise", "1", "2"])
    assert group.codes == [1, 1]
    assert "failed: RuntimeError: a bug of rank 1 at step 1" in group.output(0)
    assert read_state(tmp_path / "run").ranks == (1,)


def test_the_projector_is_fitted_by_one_rank_for_all(parts, ranks, tmp_path):
    stages = {"none": "none", "zero2": "zero2", "zero3": "zero3", "failing": "zero2"}
    recipes = [make_recipe(parts, tmp_path / name, stage, steps=2) for name, stage in stages.items()]
    projector = ProjectorConfig(fit_to_answers=True)
    alone, *both, failing = (write(replace(r, model=replace(r.model, projector=projector))) for r in recipes)
    ranks.run([alone], ranks=1)
    ranks.run(["faults:fit_on_main_alone", "works", *both])
    for stage in ("zero2", "zero3"):
        assert losses(tmp_path / stage) == pytest.approx(losses(tmp_path / "none"), rel=1e-5)
    group = ranks.finish(ranks.start(["faults:fit_on_main_alone", "fails", failing]))
    assert group.codes == [1, 1]
    assert "Fitting the projector failed on other ranks: rank 0: RuntimeError: no room" in group.output(1)


def test_a_rank_that_cannot_write_costs_one_checkpoint_only(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2", save_every=1, keep_last=0)
    group = ranks.run(["faults:full_disk", "1", "2", write(recipe)])
    assert "could not be written" in group.output(0)
    assert "rank 1: OSError: [Errno 28] No space left on device" in group.output(0)
    assert "Training continues." in group.output(0)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept == ["checkpoint-000001", "checkpoint-000003", "checkpoint-000004"]
    assert not list((tmp_path / "run").glob(".tmp-*"))
    assert [line["failed_saves"] for line in metrics(tmp_path / "run") if "failed_saves" in line] == [1]


def test_a_folder_that_cannot_be_had_is_told_on_every_rank(parts, ranks, tmp_path):
    recipe = make_recipe(parts, tmp_path / "run", "zero2")
    recipe = replace(recipe, train=replace(recipe.train, output="/proc/run"))
    path = tmp_path / "run.yaml"
    path.write_text(recipe.to_yaml())
    group = ranks.finish(ranks.start([str(path)]))
    assert group.codes == [1, 1]
    assert "TrainingError: The run folder /proc/run cannot be written" in group.output(0)
    assert "DistributedError: Taking the run folder failed on other ranks: rank 0: TrainingError" in group.output(1)


def test_a_rank_does_not_end_while_a_thread_of_gloo_is_at_work():
    """Such a thread drops tensors late; a process aborts if its interpreter ends meanwhile."""
    begun, over = threading.Event(), []

    def work():
        ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop")  # PR_SET_NAME
        begun.set()
        hashlib.sha256(bytes(1 << 27))  # without the interpreter's lock
        over.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    distributed.wait_for_gloo(seconds=60)
    assert over
    thread.join()


def test_a_rank_that_is_late_everywhere_changes_nothing(parts, ranks, tmp_path):
    held_out = make_records(tmp_path / "held-out", 6)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "text": "say red", "answer": "red"}\n')
    source = SourceConfig(path=str(held_out), image_folder=str(held_out.parent / "images"))
    straight = make_recipe(parts, tmp_path / "straight", "zero2", dropout=0.1)
    recipe = make_recipe(
        parts, tmp_path / "run", "zero2", dropout=0.1, rehearsal=True, save_every=1, keep_last=1, validate_every=1
    )
    recipe = replace(
        recipe,
        data=replace(recipe.data, validation=[source], cache=str(tmp_path / "tokens")),
        validate=ValidateConfig(samples=1, sample_tokens=2, tasks=[f"llava:{questions}"], best="validation_loss"),
    )
    for words in (["--stop-at", "2"], []):  # and on from the checkpoint
        group = ranks.run(["faults:late", "1", str(tmp_path), "train", write(recipe), *words])
        assert int(re.search(r"late (\d+) times", group.output(1))[1]) > 15
    ranks.run([write(straight)])
    assert hexed(tmp_path / "run") == hexed(tmp_path / "straight")
    assert weights(tmp_path / "run") == weights(tmp_path / "straight")
    assert not list((tmp_path / "run").glob(".t*"))
