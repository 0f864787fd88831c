"""Two ranks started in the ways that docs/cluster.md lists, stopped by a signal, started again, and compared.

Of each way: the exit codes after the signal (SIGTERM, or SIGUSR1 to `mpirun`, which kills its processes a moment after
SIGTERM), what the run folder says then, the exit codes of the same command again, and whether losses and weights are
those of an undisturbed run, bit for bit. Of a way that is refused: the line that says so. `ipv6-launch` runs in a
network namespace that has no address but ::1, which needs root and iproute2; those of `mpirun` need Open MPI.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from ranks import Ranks, free_port
from trials import hexed, make_recipe, metrics, weights, write
from waiting import wait_until

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
FOREVER, MORE = 100_000, 3
MPIRUN = "exec mpirun --allow-run-as-root --oversubscribe -n"
LAUNCH, TRAIN = "{python} -P -m mm_moslora launch", "{python} -P -m mm_moslora train"


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to start ranks on this machine; the words are for bash, with fields of `Trial.fields`."""

    words: str
    agents: int = 1
    """How often the command is started at once, as on so many hosts."""
    refused: str = ""
    """What it says instead of training."""
    number: signal.Signals = signal.SIGTERM
    """The signal."""
    needs: str = ""
    """A program that it needs."""
    ipv6: bool = False
    """In a namespace that has no address but ::1."""


_BY_HAND = (
    "export RANK=$OMPI_COMM_WORLD_RANK LOCAL_RANK=$OMPI_COMM_WORLD_LOCAL_RANK WORLD_SIZE=$OMPI_COMM_WORLD_SIZE "
    "MASTER_ADDR=localhost MASTER_PORT={port}; exec "
)
WAYS = {
    "launch": Way(words=f"exec {LAUNCH} {{recipe}}"),
    "train.sh": Way(words="exec bash {scripts}/train.sh {recipe}"),
    "two-agents": Way(words=f"NPROC=1 exec {LAUNCH} --nnodes 2 --rdzv 127.0.0.1:{{port}} {{recipe}}", agents=2),
    "torchrun": Way(
        words="exec {python} -m torch.distributed.run --standalone --nproc_per_node 2 -m mm_moslora train {recipe}"
    ),
    "deepspeed": Way(
        words="exec {python} -m deepspeed.launcher.runner --master_port {port} --num_gpus 2 "
        "--module mm_moslora train {recipe}"
    ),
    "mpirun": Way(
        words=f"{MPIRUN} 2 {TRAIN} {{recipe}}", needs="mpirun",
        refused="OMPI_COMM_WORLD_SIZE is 2, but RANK is not set, so this process would train alone",
    ),
    "mpirun-variables": Way(
        words=f"{MPIRUN} 2 bash -c '{_BY_HAND}{TRAIN} {{recipe}}'", needs="mpirun", number=signal.SIGUSR1
    ),
    "mpirun-launch": Way(words=f"{MPIRUN} 1 {LAUNCH} {{recipe}}", needs="mpirun", number=signal.SIGUSR1),
    "accelerate-cpu": Way(
        words="exec {python} -m accelerate.commands.accelerate_cli launch --cpu --num_processes 2 --num_machines 1 "
        "--mixed_precision no --dynamo_backend no -m mm_moslora train {recipe}",
        refused="accelerate launch was asked for several processes, but RANK is not set",
    ),
    "ipv6-launch": Way(words=f"exec {LAUNCH} {{recipe}}", needs="ip", ipv6=True),
}  # fmt: skip


@contextmanager
def only_ipv6() -> Iterator[str]:
    """A network namespace with ::1 alone; gives the words that run a line of bash in it."""
    name = f"mm-v6-{os.getpid()}"
    etc = Path("/etc/netns", name)
    try:
        for words in (
            ["netns", "add", name],
            ["-n", name, "link", "set", "lo", "up"],
            ["-n", name, "-4", "address", "flush", "dev", "lo"],
        ):
            subprocess.run(["ip", *words], check=True, capture_output=True)
        etc.mkdir(parents=True)
        (etc / "hosts").write_text(f"::1 localhost {name}\n")
        yield f"exec ip netns exec {name} unshare --uts bash -c 'hostname {name}; '"
    finally:
        subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
        shutil.rmtree(etc, ignore_errors=True)


@dataclass(kw_only=True)
class Trial:
    """The ways on this machine, with tiny parts."""

    folder: Path
    parts: dict[str, Path]
    ranks: Ranks
    python: str = sys.executable
    seconds: float = 300.0
    """For a start, or an end."""

    def run(self, name: str, *, again: bool = True) -> dict[str, Any]:
        """Try a way; returns what came of it, with `good`.

        Args:
            name: the way.
            again: start it a second time, and compare with an undisturbed run.
        """
        way, run = WAYS[name], self.folder / name
        recipe = write(make_recipe(self.parts, run, "zero2", steps=FOREVER, dropout=0.1))
        log = self.folder / f"{name}.log"
        with self._started(way, recipe, log) as processes:
            if way.refused:
                codes = self._codes(processes, log)
                return {"way": name, "codes": codes, "good": all(codes) and way.refused in log.read_text()}
            self._wait(lambda: steps(run) > 1, processes, log)
            for process in processes:
                process.send_signal(way.number)
            stopped = self._codes(processes, log)
        told = {"state": json.loads((run / "state.json").read_text())["state"], "mark": (run / "STOPPED").is_file()}
        first, last = newest(run), newest(run) + MORE
        if not again:
            return {"way": name, "codes": stopped, **told, "saved": first, "good": ranks_of(run) == {0, 1}}
        with self._started(way, f"{recipe} --stop-at {last}", log) as processes:
            again = self._codes(processes, log)
        straight = make_recipe(self.parts, self.folder / f"{name}-straight", "zero2", steps=FOREVER, dropout=0.1)
        self.ranks.run([f"{write(straight)}@{last}"])
        whole = Path(straight.train.output)
        equal = newest(run) == last and hexed(run)[:last] == hexed(whole) and weights(run, last) == weights(whole, last)
        summary = json.loads((run / "summary.json").read_text())
        return {
            "way": name, "codes": stopped, **told, "saved": first, "again": again, "equal": equal,
            "good": equal and summary["world_size"] == 2,
        }  # fmt: skip

    @contextmanager
    def _started(self, way: Way, recipe: str, log: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The processes of a way; nothing of them is left afterwards."""
        line = way.words.format(python=self.python, scripts=ROOT / "scripts", recipe=recipe, port=free_port())
        environment = os.environ | {
            "NPROC": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHON": self.python,
            "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
        }  # fmt: skip
        with contextlib.ExitStack() as stack:
            if way.ipv6:
                words = stack.enter_context(only_ipv6())
                line = f"{words}{_quoted(line)}"
            processes = [
                subprocess.Popen(
                    ["bash", "-c", line], env=environment, cwd=self.folder, stdout=log.open("ab"),
                    stderr=subprocess.STDOUT, start_new_session=True,
                ) for _ in range(way.agents)
            ]  # fmt: skip
            try:
                yield processes
            finally:
                sessions = {process.pid for process in processes}
                for other in psutil.process_iter():  # launchers put what they start into groups of their own
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        if os.getsid(other.pid) in sessions or recipe.split()[0] in other.cmdline():
                            other.kill()
                for process in processes:
                    process.wait()

    def _codes(self, processes: list[subprocess.Popen[bytes]], log: Path) -> list[int]:
        deadline = time.monotonic() + self.seconds
        try:
            return [process.wait(timeout=max(1.0, deadline - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"Not over within {self.seconds:.0f} s.\n{log.read_text()[-3000:]}") from None

    def _wait(self, condition: Callable[[], bool], processes: list[subprocess.Popen[bytes]], log: Path) -> None:
        def tail() -> str:
            return log.read_text(errors="replace")[-3000:]

        def met() -> bool:
            done = condition()
            assert done or all(process.poll() is None for process in processes), tail()
            return done

        wait_until(met, tail, seconds=self.seconds)


def _quoted(line: str) -> str:
    """A line as one more word of a line in single quotes."""
    return "'" + line.replace("'", "'\\''") + "'"


def steps(run: Path) -> int:
    """Steps whose metrics are on the disk."""
    return len(metrics(run)) if (run / "metrics.jsonl").is_file() else 0


def ranks_of(run: Path) -> set[int]:
    """Ranks that took part."""
    return {int(path.stem.split("-")[1]) for path in (run / "heartbeat").glob("rank-*.json")}


def newest(run: Path) -> int:
    """Step of the newest checkpoint."""
    return max((int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")), default=0)


def impossible(name: str) -> str | None:
    """Why a way cannot be tried here; None where it can."""
    way = WAYS[name]
    if way.needs and shutil.which(way.needs) is None:
        return f"{way.needs} is not installed"
    if way.ipv6 and os.geteuid() != 0:
        return "making network namespaces needs root"
    return None


STOPS = {name for name, way in WAYS.items() if not way.refused and not name.startswith("deepspeed")}
"""Ways that save on the signal; DeepSpeed's runner hands none on."""
AGAIN = ("launch", "torchrun")
"""Ways that are started a second time, ours and the launcher below it: the ranks of all others read the same."""


@pytest.mark.parametrize("name", WAYS)
def test_a_launcher_trains_two_ranks_stops_and_goes_on(name, parts, ranks, python, tmp_path):
    if reason := impossible(name):
        pytest.skip(reason)
    # Where parents and children are the point: what is forked from a process outside of a namespace is outside, too.
    own = sys.executable if name.startswith("ipv6") or "deepspeed" in name else str(python.ours)
    came = Trial(folder=tmp_path, parts=parts, ranks=ranks, python=own).run(name, again=name in AGAIN)
    assert came["good"], came
    if name in STOPS:
        assert (came["state"], came["mark"]) == ("stopped", True), came
        assert came["saved"] > 0, came
