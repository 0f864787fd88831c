"""Jobs of a real SLURM: a time limit, a preemption, a cancellation, a job that does not get on."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import slurm
from between import somebody_builds
from preloaded import SECONDS_PER_STEP, Preloaded
from ranks import free_port
from slurm import Cluster
from trials import hexed, make_recipe, weights, write
from waiting import stays
from waiting import wait_until as wait_longer

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not slurm.available(), reason=slurm.WHY_NOT)]
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "train_slurm.sbatch"
FOREVER = 100_000
wait_until = functools.partial(wait_longer, pause=0.2)
"""A question to SLURM starts a process."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


@pytest.fixture
def batch(monkeypatch, python):
    return words_of(monkeypatch, python)


def words_of(monkeypatch: pytest.MonkeyPatch, python: Preloaded) -> Callable[..., list[str]]:
    """The words before the recipe: the shipped script, with resources that this machine has."""
    for name, value in {
        "PYTHON": str(python.ours), "NPROC": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "60", SECONDS_PER_STEP: "0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    def words(*options: str) -> list[str]:
        return ["--gpus-per-node=0", "--cpus-per-task=2", f"--chdir={ROOT}", *options, str(SCRIPT)]

    return words


@pytest.fixture(scope="module")
def waiting(cluster, parts, ranks, python, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A job with ranks that wait for a cache, and its log. SLURM takes half a minute over it, beside the first test.

    With a limit of a minute and five minutes' notice SLURM sends the signal early.
    """
    folder = tmp_path_factory.mktemp("waiting")
    cache, log = folder / "cache", folder / "log"
    first, recipe = (
        replace(made, data=replace(made.data, cache=str(cache)))
        for made in (make_recipe(parts, folder / name, "zero2", steps=1) for name in ("first", "run"))
    )
    ranks.run([write(first)])
    with somebody_builds(cache), pytest.MonkeyPatch.context() as patch:
        words = words_of(patch, python)("--time=1", "--signal=B:USR1@300")
        with cluster.job(log, *words, write(recipe)) as job:
            patch.undo()
            yield job, log


def newest(run: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)


def steps(run: Path) -> int:
    """Steps with metrics in the file."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line).get("step", 0) for line in lines if line.endswith("\n")), default=0)


def launches(job: str, *, restarts: int) -> bool:
    """Whether the batch script of a restarted job has become `mm-moslora launch`, for which signals wait."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_RESTART_COUNT={restarts}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            words = process.joinpath("cmdline").read_bytes().split(b"\0")
            started = b"--requeue" in words and b"-c" not in words
            if started and wanted <= set(process.joinpath("environ").read_bytes().split(b"\0")):
                return True
    return False


def said(log: Path) -> str:
    return log.read_text()[-4000:] if log.exists() else "nothing"


def undisturbed(run: Path, step: int, parts, ranks) -> bool:
    """Whether a run has the losses and the weights of one that nobody stopped."""
    straight = make_recipe(parts, run.with_name("straight"), "zero2", steps=FOREVER, dropout=0.1)
    ranks.run([f"{write(straight)}@{step}"])
    same_losses = hexed(run)[:step] == hexed(run.with_name("straight"))
    return same_losses and weights(run, step) == weights(run.with_name("straight"), step)


@pytest.mark.usefixtures("waiting")
def test_the_time_limit_saves_and_goes_on_and_a_cancelled_job_stays_away(cluster, batch, parts, ranks, tmp_path):
    """The announcement comes by hand. SLURM, which looks at limits twice a minute, announces that of `waiting`."""
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = make_recipe(parts, run, "zero2", steps=FOREVER, dropout=0.1)
    with cluster.job(log, *batch("--time=10"), write(recipe)) as job:
        wait_until(lambda: steps(run) > 2, lambda: said(log))
        cluster.announce_limit(job)
        wait_until(lambda: cluster.show(job, "Restarts") == "1", lambda: said(log))
        first = newest(run)
        assert first > 0, said(log)
        wait_until(lambda: steps(run) > first + 3, lambda: said(log))
        cluster.ask("scancel", job)
        wait_until(lambda: cluster.show(job, "JobState") == "CANCELLED", "the end")
        wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job), "the end of its processes")
        assert cluster.show(job, "Restarts") == "1"
    last = newest(run)
    assert last > first, said(log)
    assert f"Continuing from checkpoint-{first:06d}" in log.read_text()
    assert undisturbed(run, last, parts, ranks)


def test_a_job_that_saves_nothing_before_its_time_limit_ends(cluster, waiting):
    job, log = waiting
    over = ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")
    wait_until(lambda: cluster.show(job, "Restarts") == "1", lambda: said(log))
    wait_until(lambda: launches(job, restarts=1), lambda: said(log))  # before, the signal would end the shell itself
    cluster.announce_limit(job)
    wait_until(lambda: cluster.show(job, "JobState") in over, lambda: said(log))
    assert cluster.show(job, "JobState") == "FAILED"
    assert cluster.show(job, "Restarts") == "1"
    assert "started 2 times, and its last run saved no checkpoint before its time limit" in log.read_text()


def test_a_preempted_job_saves_and_goes_on(cluster, batch, parts, ranks, monkeypatch, tmp_path):
    """On two nodes with a rank each, behind a script, as for containers and modules, and with a log for each rank."""
    run, log, logs = tmp_path / "run", tmp_path / "log", tmp_path / "logs"
    recipe = make_recipe(parts, run, "zero2", steps=FOREVER, dropout=0.1)
    monkeypatch.setenv("NPROC", "1")
    (tmp_path / "on a node").write_text('echo "node $SLURM_NODEID, label $LABEL"\nexec "$@"\n')
    words = batch("--time=10", "--nodes=2", "--cpus-per-task=1", "--partition=low")
    words += ["--through", f"env LABEL='a b' bash '{tmp_path / 'on a node'}'", "--srun", "--label"]
    words += ["--log-dir", str(logs)]
    with cluster.job(log, *words, write(recipe)) as job:
        wait_until(lambda: steps(run) > 2, lambda: said(log))
        urgent = ["--partition=high", "--nodes=2", "--cpus-per-task=2", "--wrap", "true"]
        with cluster.job(tmp_path / "urgent.log", *urgent) as other:
            wait_until(lambda: cluster.show(other, "JobState") == "COMPLETED", lambda: said(log))
        first = newest(run)
        assert first > 0, said(log)
        wait_until(lambda: steps(run) > first + 3, lambda: said(log))
        assert cluster.show(job, "Restarts") == "1"
        cluster.ask("scancel", job)
        wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job), "the end of its processes")
    last = newest(run)
    assert last > first, said(log)
    assert undisturbed(run, last, parts, ranks)
    for node in (0, 1):
        assert f"{node}: node {node}, label a b\n" in log.read_text()
        assert logs.joinpath(f"rank-0000{node}.log").read_text().count(f": rank {node} on ") == 2


def script(folder: Path, text: str) -> str:
    """A batch script of somebody's own, with this Python as $PYTHON."""
    path = folder / "job.sh"
    path.write_text(f'#!/bin/bash\nlaunch() {{ "$PYTHON" -P -m mm_moslora launch "$@"; }}\n{text}\n')
    return str(path)


def over(cluster: Cluster, job: str, log: Path) -> str:
    """How a job ended."""
    running = ("", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    wait_until(lambda: cluster.show(job, "JobState") not in running, lambda: said(log))
    return cluster.show(job, "JobState")


def test_a_job_with_several_tasks_on_a_node_has_one_torchrun_on_each(cluster, batch, parts, monkeypatch, tmp_path):
    """As users of other trainers write it."""
    monkeypatch.setenv("NPROC", "1")
    recipe, log = make_recipe(parts, tmp_path / "run", "zero2", steps=4), tmp_path / "log"
    tasks = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1")
    with cluster.job(log, *batch(*tasks), write(recipe)) as job:
        assert over(cluster, job, log) == "COMPLETED", said(log)
    assert steps(tmp_path / "run") == 4
    assert "can't honor" not in log.read_text()


def test_two_trainings_in_one_job_are_two_runs(cluster, batch, parts, monkeypatch, tmp_path):
    monkeypatch.setenv("NPROC", "1")
    first, second = (
        write(make_recipe(parts, tmp_path / name, "zero2", steps=4 + 2 * number))
        for number, name in enumerate(("first", "second"))
    )
    text = (
        f"launch --srun=--overlap {first} & one=$!\nlaunch --srun=--overlap {second} & two=$!\nwait $one && wait $two"
    )
    log = tmp_path / "log"
    words = [word for word in batch("--nodes=2") if word != str(SCRIPT)]
    with cluster.job(log, *words, script(tmp_path, text)) as job:
        assert over(cluster, job, log) == "COMPLETED", said(log)
    assert (steps(tmp_path / "first"), steps(tmp_path / "second")) == (4, 6), said(log)


def test_a_launch_in_a_step_of_one_task_runs_and_in_one_of_several_is_refused(
    cluster, batch, parts, monkeypatch, tmp_path
):
    monkeypatch.setenv("NPROC", "1")
    recipe, log = write(make_recipe(parts, tmp_path / "run", "zero2", steps=4)), tmp_path / "log"
    call = f'"$PYTHON" -P -m mm_moslora launch {recipe}'
    alone = f'"$PYTHON" -P -m mm_moslora train {recipe}'
    text = f"srun -N2 -n2 {call}; echo code $?\nsrun -N2 -n2 {alone}; echo code $?\nsrun -N1 -n1 {call}"
    words = [word for word in batch("--nodes=2") if word != str(SCRIPT)]
    with cluster.job(log, *words, script(tmp_path, text)) as job:
        assert over(cluster, job, log) == "COMPLETED", said(log)
    assert "runs in a step of 2 tasks, and each would start all ranks" in log.read_text()
    assert "SLURM_STEP_NUM_TASKS is 2, but RANK is not set, so this process would train alone" in log.read_text()
    assert log.read_text().splitlines().count("code 1") == 2
    assert steps(tmp_path / "run") == 4


def own(batch: Callable[..., list[str]], *options: str) -> list[str]:
    """The words before a script of somebody's own."""
    return [word for word in batch(*options) if word != str(SCRIPT)]


def state(run: Path) -> str:
    return str(json.loads((run / "state.json").read_text())["state"])


def test_an_element_of_an_array_goes_on_alone(cluster, batch, parts, monkeypatch, tmp_path):
    """The last one has the number of the whole array."""
    monkeypatch.setenv("NPROC", "1")
    recipe = write(make_recipe(parts, tmp_path / "run", "zero2", steps=FOREVER))
    text = f'exec bash {SCRIPT} {recipe} --train.output "{tmp_path}/run-$SLURM_ARRAY_TASK_ID"'
    words = own(batch, "--array=0-1", "--cpus-per-task=1")
    runs, log = [tmp_path / "run-0", tmp_path / "run-1"], tmp_path / "log"
    with cluster.job(log, *words, script(tmp_path, text)) as job:
        wait_until(lambda: all(steps(run) > 2 for run in runs), lambda: said(log))
        assert cluster.show(f"{job}_1", "JobId") == job
        cluster.announce_limit(f"{job}_1")
        wait_until(lambda: cluster.show(f"{job}_1", "Restarts") == "1", lambda: said(log))
        first, other = newest(runs[1]), steps(runs[0])
        assert first > 0, said(log)
        assert newest(runs[0]) == 0, said(log)
        wait_until(lambda: steps(runs[1]) > first + 3 and steps(runs[0]) > other, lambda: said(log))
        assert cluster.show(f"{job}_0", "Restarts") == "0"


def test_a_signal_that_slurm_sends_to_the_steps_saves(cluster, batch, parts, monkeypatch, tmp_path):
    """`--signal=USR1@SECONDS` without `B:`: the batch script does not get it, and each torchrun does."""
    monkeypatch.setenv("NPROC", "1")
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = make_recipe(parts, run, "zero2", steps=FOREVER, dropout=0.1)
    with cluster.job(log, *batch("--nodes=2", "--cpus-per-task=1", "--no-requeue"), write(recipe)) as job:
        wait_until(lambda: steps(run) > 2, lambda: said(log))
        cluster.ask("scancel", "--signal=USR1", job)
        assert over(cluster, job, log) == "FAILED", said(log)
        assert cluster.show(job, "ExitCode") == "75:0", said(log)
    assert (state(run), (run / "STOPPED").exists()) == ("stopped", True), said(log)
    assert newest(run) == steps(run)


def test_a_time_limit_that_nobody_announced_saves_within_killwait(cluster, batch, parts, monkeypatch, tmp_path):
    """In a step of srun, and in a batch script alone. SLURM looks at limits twice a minute."""
    monkeypatch.setenv("NPROC", "1")
    monkeypatch.setenv(SECONDS_PER_STEP, "0.5")
    names = ("step", "script")
    runs, logs = ([tmp_path / f"{name}{more}" for name in names] for more in ("", ".log"))
    with contextlib.ExitStack() as stack:
        jobs = []
        for run, log, nodes in zip(runs, logs, (2, 1), strict=True):
            recipe = write(make_recipe(parts, run, "zero2", steps=FOREVER, dropout=0.1))
            folder = tmp_path / f"{run.name}-script"
            folder.mkdir()
            words = own(batch, f"--nodes={nodes}", "--time=1", "--cpus-per-task=1")
            jobs.append(stack.enter_context(cluster.job(log, *words, script(folder, f"launch {recipe}"))))
        for job, log in zip(jobs, logs, strict=True):
            assert over(cluster, job, log) == "TIMEOUT", said(log)
    for run, log in zip(runs, logs, strict=True):
        assert (state(run), (run / "STOPPED").exists()) == ("stopped", True), said(log)
        assert newest(run) == steps(run) > 0, said(log)


def test_a_suspended_job_goes_on_and_saves_when_it_is_cancelled(cluster, batch, parts, ranks, monkeypatch, tmp_path):
    """By processes of its own, not forked ones: SLURM stops what descends from the batch script."""
    monkeypatch.setenv("PYTHON", sys.executable)
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = make_recipe(parts, run, "zero2", steps=FOREVER, dropout=0.1, step_timeout_minutes=0.1)
    with cluster.job(log, *batch("--time=10"), write(recipe)) as job:
        wait_until(lambda: steps(run) > 2, lambda: said(log))
        cluster.ask("scontrol", "suspend", job)
        wait_until(lambda: cluster.show(job, "JobState") == "SUSPENDED", "suspension")
        ranks_of_job = [json.loads(beat.read_text())["pid"] for beat in (run / "heartbeat").glob("rank-*.json")]
        wait_until(lambda: {psutil.Process(pid).status() for pid in ranks_of_job} == {"stopped"}, lambda: said(log))
        stood = steps(run)
        stays(lambda: steps(run) == stood, 12)  # longer than a step may take
        cluster.ask("scontrol", "resume", job)
        wait_until(lambda: steps(run) > stood + 3, lambda: said(log))
        cluster.ask("scancel", job)
        wait_until(lambda: not cluster.ask("squeue", "-h", "-j", job), "the end of its processes")
    assert state(run) == "stopped", said(log)
    assert undisturbed(run, newest(run), parts, ranks)


def test_a_batch_job_that_a_task_of_a_step_submits_is_in_no_step(cluster, batch, parts, monkeypatch, tmp_path):
    monkeypatch.setenv("NPROC", "1")
    made = {name: write(make_recipe(parts, tmp_path / name, "none", steps=2)) for name in ("launch", "train")}
    log, inner = tmp_path / "log", tmp_path / "inner.log"
    calls = f"bash {SCRIPT} {made['launch']} && $PYTHON -P -m mm_moslora train {made['train']}"
    submit = f'sbatch --ntasks=1 --cpus-per-task=2 --gpus-per-node=0 --output={inner} --wrap "{calls}"'
    (tmp_path / "task.sh").write_text(f'#!/bin/bash\n[ "$SLURM_PROCID" -gt 0 ] || {submit}\n')
    words = own(batch, "--ntasks=2", "--cpus-per-task=1")
    with cluster.job(log, *words, script(tmp_path, f"srun --ntasks=2 bash {tmp_path / 'task.sh'}")) as job:
        assert over(cluster, job, log) == "COMPLETED", said(log)
        wait_until(lambda: not cluster.ask("squeue", "-h"), "the end of the other job")
    assert [steps(tmp_path / name) for name in made] == [2, 2], said(log) + said(inner)


def test_ranks_that_srun_itself_starts_save_when_their_step_is_signalled(cluster, batch, parts, monkeypatch, tmp_path):
    """With the variables of a launcher by hand; srun itself would kill its step on SIGTERM."""
    run, log = tmp_path / "run", tmp_path / "log"
    recipe = write(make_recipe(parts, run, "zero2", steps=FOREVER))
    (tmp_path / "rank.sh").write_text(
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID\n"
        f"export MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}\n"
        f'exec "$PYTHON" -P -m mm_moslora train {recipe}\n'
    )
    words = own(batch, "--nodes=2", "--ntasks=2", "--cpus-per-task=1")
    with cluster.job(log, *words, script(tmp_path, f"srun bash {tmp_path / 'rank.sh'}")) as job:
        wait_until(lambda: steps(run) > 2, lambda: said(log))
        cluster.ask("scancel", "--signal=TERM", f"{job}.0")
        assert over(cluster, job, log) == "FAILED", said(log)
        assert cluster.show(job, "ExitCode") == "75:0", said(log)
    assert (state(run), newest(run)) == ("stopped", steps(run)), said(log)
