"""Jobs on a real Ray cluster of two nodes on this machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ranks import free_port
from waiting import wait_until

from mm_moslora.launch import ray_engine
from mm_moslora.launch.jobs import Job, run_jobs
from mm_moslora.launch.ray_engine import RayEngine, open_engine
from mm_moslora.utils.errors import ConfigError, reason_of
from tests.launch.job_runs import CHECKOUT, job, starts

ray = pytest.importorskip("ray", reason="needs the extra ray; make test-extras has it")
STORE = 80 * 2**20
"""Bytes of a node's object store; the smallest that Ray takes."""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # it looks at the whole machine
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{CHECKOUT / 'eval'}:{CHECKOUT / 'tests' / 'distributed'}")
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind a shell's `&`
    started = Cluster(initialize_head=True, head_node_args=head)
    signal.signal(signal.SIGINT, before)
    try:
        yield started
    finally:
        ray.shutdown()
        started.shutdown()


def ends(jobs: list[Job], engine: RayEngine, **options) -> tuple[dict[str, str], dict[str, str]]:
    told: dict[str, str] = {}
    failed = run_jobs(lambda: jobs, engine, over=lambda one, why: told.update({one.name: why}), **options)
    return failed, told


@pytest.mark.slow
def test_a_lost_node_a_failing_job_and_a_stop(cluster, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    second = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=STORE)
    monkeypatch.chdir(tmp_path)
    engine = RayEngine(cluster.address)
    paths = ray.get(ray.remote(lambda: __import__("sys").path).remote())
    assert not {"", str(tmp_path)} & set(paths), "files of the working folder would be imported in place of libraries"
    assert (engine.cards, engine.width(0), engine.width(1)) == (0, 2, 0)
    assert all(engine.takes(job(tmp_path, "works", cards=1)) for _ in range(2))
    assert caplog.messages == [
        "Jobs wait for a node with 1 CPUs and 1 GPUs. Ray's nodes have 1 CPUs and 0 GPUs, 1 CPUs and 0 GPUs."
    ]
    begun = [tmp_path / name / "ready" for name in ("one", "two")]

    def lost() -> bool:
        """Once both run, a node is lost; once its job is gone, both may end. Nothing is stopped."""
        nonlocal second
        if second is not None and all(path.exists() for path in begun):
            cluster.remove_node(second, allow_graceful=False)
            second = None
        gone = [
            p for p in begun if second is None and not Path(f"/proc/{starts(tmp_path, p.parent.name)[0][0]}").exists()
        ]
        if gone:
            for path in begun:
                path.with_name("done").touch()
        return False

    jobs = [job(tmp_path, "saves", "one"), job(tmp_path, "saves", "two"), job(tmp_path, "fails")]
    failed, told = ends([*jobs, job(tmp_path, "works")], engine, stop=lost)
    assert told == failed | {"one": "", "two": "", "works": ""}
    assert failed == {"fails": f"the process ended with code 4; see {tmp_path / 'fails' / 'log.txt'}"}
    assert sorted(len(starts(tmp_path, name)) for name in ("one", "two")) == [1, 2]
    assert len(starts(tmp_path, "fails")) == 3
    assert "this went wrong" in (tmp_path / "fails" / "log.txt").read_text()

    stopped = job(tmp_path, "saves", "stopped")
    ready = tmp_path / "stopped" / "ready"
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # else the latest cluster of the machine, maybe another test's
    assert ends([stopped, job(tmp_path, "works", "queued")], RayEngine("auto"), stop=ready.exists) == ({}, {})
    assert (tmp_path / "stopped" / "saved").exists(), "it was not asked to save"
    assert not (tmp_path / "queued" / "starts").exists()


@pytest.mark.slow
def test_a_node_that_does_not_see_the_folder_is_named(cluster, tmp_path: Path) -> None:
    engine = RayEngine(cluster.address)
    one = job(tmp_path, "works")
    run = ray_engine._run_on_node
    engine._task = ray.remote(lambda job, sign, threads: run(job, f"{sign} of another file", threads))
    failed, _ = ends([one], engine)
    assert f" does not see {tmp_path / 'works'}, which must be on a shared file system" in failed["works"]
    assert not (tmp_path / "works" / "starts").exists()


@pytest.mark.slow
def test_what_a_stop_does_not_save_is_named_and_a_killed_parent_lets_jobs_save(cluster, tmp_path, caplog):
    engine = RayEngine(cluster.address)
    run = ray_engine._run_on_node

    def soon(*arguments) -> int:
        ray_engine.GRACE = 1.0
        return run(*arguments)

    engine._task = ray.remote(soon)
    jobs = [job(tmp_path, "ignores"), job(tmp_path, "works", "queued")]
    assert ends(jobs, engine, stop=(tmp_path / "ignores" / "ready").exists) == ({}, {})
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("ignores did not save when it was asked to (killed")

    program = (
        "import sys; from pathlib import Path; from tests.launch.job_runs import job, ends;"
        "from mm_moslora.launch.ray_engine import RayEngine;"
        "ends([job(Path(sys.argv[1]), 'saves')], RayEngine(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-P", "-c", program, str(tmp_path), cluster.address], env=environment)
    for name in ("ready", "saved"):
        wait_until((tmp_path / "saves" / name).exists, name)
        parent.kill()
    parent.wait()


def test_odd_addresses_and_errors_are_one_line() -> None:
    for address in (f"{'a' * 70}:6379", "localhost:99999999"):
        with pytest.raises(ConfigError, match="nothing answers there"):
            RayEngine(address)
    assert reason_of(ValueError("")) == "ValueError"
    assert reason_of(ValueError("\n a\nb")) == "a"
    if socket.has_dualstack_ipv6():
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
            ray_engine._require_listener(f"[::1]:{server.getsockname()[1]}")


def test_an_address_without_a_cluster_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="nothing answers there"):
        RayEngine(f"127.0.0.1:{free_port()}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/nonexistent")
    with pytest.raises(ConfigError, match="--ray nowhere: no Ray cluster answers there"):
        RayEngine("nowhere")
    monkeypatch.setattr(ray_engine, "_CONNECTED", 5.0)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")  # as a lost cluster leaves it
    with pytest.raises(ConfigError, match=r"--ray auto: no Ray cluster answers there \(not within 5 seconds\)"):
        RayEngine("auto")
    assert time.monotonic() - began < 60


def test_without_ray_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'ray>="):
        open_engine("auto", parallel=None)
    with pytest.raises(ConfigError, match="--parallel is for this machine"):
        open_engine("auto", parallel=2)
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
