"""A comparison on two Ray nodes and as a SLURM array has the numbers of the one on this machine, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import slurm
from preloaded import CHECKOUT, Preloaded
from trials import write_questions
from waiting import wait_until

from mm_moslora.compare.comparison_cell import metrics
from mm_moslora.utils.package_requirements import is_installed

pytestmark = pytest.mark.slow
RUNS = 6
"""Two arms at two rates, and the reported run of each."""
STEPS = 120 if is_installed("ray") else 20
"""On Ray, runs are stopped and lose their node on the way."""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, language_folder: Path, vision_folder: Path, records: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_questions(records, folder / "test.jsonl")
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}
adapter: {{rank: 4, alpha: 8, dropout: 0.1}}
data: {{train: [{{path: {records}, image_folder: {records.parent / "images"}}}], max_length: 256}}
train: {{steps: {STEPS}, global_batch: 8, micro_batch: 4, zero: none, precision: fp32, log_every: 1}}
track: {{trackers: []}}
"""
    )
    return folder / "recipe.yaml"


def words(recipe: Path, records: Path, out: Path, *more: str) -> list[str]:
    task = f"llava:{recipe.parent / 'test.jsonl'}@{records.parent / 'images'}"
    return ["compare", str(recipe), "--arms", "lora,moslora:kaiming", "--lr", "1e-3,1e-2", "--seeds", "1", "--tasks",
            task, "--limit", "6", "--hold-out", "0.3", "--max-new-tokens", "3", "--output", str(out),
            *more]  # fmt: skip


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": f"{CHECKOUT}{os.pathsep}{CHECKOUT / 'eval'}",
        "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def local(tmp_path_factory, recipe: Path, records: Path, python: Preloaded) -> Path:
    out = tmp_path_factory.mktemp("local") / "out"
    done = subprocess.run(
        [python.ours, "-m", "mm_moslora", *words(recipe, records, out)], capture_output=True, text=True, timeout=500,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def numbers(out: Path) -> dict[str, Any]:
    """What a comparison measured, without times: outcomes, losses, answers, adapters, the analysis."""
    found: dict[str, Any] = {}
    for place in sorted(path.parent for path in out.glob("runs/*/outcome.json")):
        outcome = json.loads((place / "outcome.json").read_text())
        kept = ("status", "reason", "validation", "test", "first_loss", "last_loss", "trainable", "steps", "processes")
        found[place.name] = {key: outcome[key] for key in kept}
        found[f"{place.name} losses"] = [(row["loss"], row["grad_norm"]) for row in metrics(place) if "loss" in row]
        for pattern in ("checkpoint-*/adapter/*.safetensors", "eval/*/*/*/samples.jsonl"):
            found |= {str(path.relative_to(out)): path.read_bytes() for path in sorted(place.glob(pattern))}
    results = json.loads((out / "results.json").read_text())
    return found | {"comparisons": results["comparisons"], "rates": [arm["rate"] for arm in results["arms"]]}


def begun(out: Path, rows: int = 3) -> list[Path]:
    """Runs that are in their steps."""
    return [path for path in out.glob("runs/*") if not (path / "outcome.json").exists() and len(metrics(path)) >= rows]


@pytest.fixture
def ray_cluster(environment: None) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    store = 80 * 2**20
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "object_store_memory": store}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.second = cluster.add_node(num_cpus=1, num_gpus=0, object_store_memory=store)
        yield cluster
    finally:
        cluster.shutdown()


@pytest.mark.skipif(not is_installed("ray"), reason="needs the extra ray; make test-extras has it")
def test_on_two_ray_nodes_stopped_and_one_of_them_lost(ray_cluster, local: Path, recipe, records, tmp_path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, "-P", "-m", "mm_moslora", *words(recipe, records, out, "--ray", ray_cluster.address)]

    def driver() -> subprocess.Popen[bytes]:
        with log.open("ab") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream)

    first = driver()
    wait_until(lambda: len(begun(out)) == 2 or first.poll() is not None, log.read_text)
    first.send_signal(signal.SIGINT)
    assert first.wait(150) == 75, log.read_text()
    assert "Stopped by signal 2. The same" in log.read_text()
    assert "did not save" not in log.read_text()
    stopped = [place for place in out.glob("runs/*") if list(place.glob("checkpoint-*"))]
    assert len(stopped) == 2, "what was trained is lost"

    second = driver()
    already = {place.name: len(metrics(place)) for place in stopped}
    wait_until(
        lambda: all(len(metrics(place)) > already[place.name] for place in stopped) or second.poll() is not None,
        log.read_text,
    )
    ray_cluster.remove_node(ray_cluster.second, allow_graceful=False)
    assert second.wait(500) == 0, log.read_text()
    assert len(list(out.glob("runs/*/outcome.json"))) == RUNS
    continued = sum((place / "log.txt").read_text().count("Continuing from checkpoint") for place in stopped)
    assert continued == 3, "two after the stop, one after the node"
    assert numbers(out) == numbers(local)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm.Cluster]:
    if not slurm.available():
        pytest.skip(slurm.WHY_NOT)
    with slurm.Cluster(tmp_path_factory.mktemp("slurm")) as started:
        yield started


def test_as_a_slurm_array(cluster, environment, local: Path, recipe, records, tmp_path, python: Preloaded) -> None:
    """Two rounds: the runs that choose the rates, and the reported ones; one element runs twice at once."""
    out = tmp_path / "out" / "a b"
    command = [python.ours, "-m", "mm_moslora", *words(recipe, records, out, "--slurm")]
    counts = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 75, done.stderr
        (file,) = shlex.split(re.findall(r"Next: sbatch (.*)\n", done.stdout)[0])
        text = Path(file).read_text()
        counts.append(int(re.findall(r"--array=0-(\d+)", text)[0]) + 1)
        Path(file).write_text(text.replace(sys.executable, str(python.ours)))
        options = ("--export=ALL", file)
        with cluster.job(tmp_path / "log", *options) as job, cluster.job(tmp_path / "log", *options) as twice:
            wait_until(
                lambda ids=(job, twice): not cluster.ask("squeue", "-h", "-j", ",".join(ids)), "the end", seconds=300
            )
    assert counts == [4, 2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Next:" not in done.stdout
    assert not (out / "array.sbatch").exists()
    assert numbers(out) == numbers(local)
