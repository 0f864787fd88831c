"""Wheels for a GPU machine, and the command that tests and measures there: what they refuse, keep and do not repeat."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import gpu_preflight
import gpu_wheels

SCRIPTS = Path(gpu_wheels.__file__).parent
REQUIRES = {
    "one": ['two==2.0; python_version >= "3.12"', 'never>=1; python_version < "3.12"', 'extra>=1; extra == "all"'],
    "two": ["numpy>=2", "torch"],
    "three": ["two<2", "numpy<3"],
    "numpy": [],
    "torch": [],
}
"""What made-up packages require."""


def fetch(name, versions, folder, python, *, size=0):
    """A wheel of the version that is asked for exactly, else of 2.0."""
    version = str(versions)[2:] if str(versions).startswith("==") else "2.0"
    wheel = Path(folder) / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        lines = [f"Requires-Dist: {line}" for line in REQUIRES[name]]
        archive.writestr(
            f"{wheel.name[:-16]}.dist-info/METADATA", "\n".join(["Metadata-Version: 2.1", *lines]) + "\n\n"
        )
        archive.writestr("content", b"\0" * size)
    return wheel


@pytest.mark.parametrize(
    ("there", "carried"),
    [
        ("", {"one", "two", "numpy", "torch"}),
        ("torch\nTwo==2.0\n# numpy\n-e .\n", {"one"}),
        ("torch\ntwo @ file:///x\n", {"one"}),
        ("torch==2.11.0+cu130\nnumpy==1.9\n", {"one", "two", "numpy"}),
        ("torch==2.11.0\ntwo==1.0\nnumpy==2.5", {"one", "two"}),
    ],
)
def test_what_the_machine_has_decides_what_is_carried(there, carried, tmp_path: Path, monkeypatch) -> None:
    """Of an unknown version, as of a package from a path, nothing is carried."""
    monkeypatch.setattr(gpu_wheels, "fetch", fetch)
    (tmp_path / "list").write_text(there)
    (tmp_path / "wheels").mkdir()
    have = gpu_wheels.installed(tmp_path / "list")
    gpu_wheels.collect(["one"], tmp_path / "wheels", "3.12", "130", have=have)
    assert {path.name.split("-")[0] for path in (tmp_path / "wheels").iterdir()} == carried


PYTHON = """#!/bin/sh
case "$*" in
  *gpu_preflight*/gpu_wheels*) exit "${LACKS:-0}" ;;
  *gpu_preflight*) exit "${LACKS_AFTER:-0}" ;;
esac
echo "$*" >>"$CALLS"
case "$*" in
  *pip*install*) exit 0 ;;
  *-m" "pytest*) echo "$PYTHONPATH" >>"$CALLS"; exit "$TESTS" ;;
  *--table*) echo table; exit 0 ;;
  *gpu.py*) exit "$ROWS" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with tests for GPUs, and a Python that notes what it is asked for."""
    for name in ("gpu.sh", "common.sh"):
        (tmp_path / "scripts").mkdir(exist_ok=True)
        shutil.copy(SCRIPTS / name, tmp_path / "scripts" / name)
    for file in ("mm_moslora/code.py", "tests/gpu/test_one.py", "build/gpu_wheels/two-2.0-py3-none-any.whl"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def run(checkout: Path, *, tests: int = 0, rows: int = 0, **more: str) -> tuple[int, list[str], str]:
    """Exit code, the calls of Python, and stderr."""
    calls = checkout / "calls"
    calls.write_text("")
    environment = os.environ | {
        "PYTHON": str(checkout / "python"), "CALLS": str(calls), "TESTS": str(tests), "ROWS": str(rows), **more,
    }  # fmt: skip
    done = subprocess.run([checkout / "scripts" / "gpu.sh"], env=environment, capture_output=True, text=True)
    return done.returncode, calls.read_text().splitlines(), done.stderr


def test_the_rows_of_the_targets_come_before_the_tests_and_the_other_rows(checkout: Path) -> None:
    code, calls, _ = run(checkout)
    assert code == 0
    assert "--no-index --no-deps" in calls[0]
    assert calls[0].endswith("build/gpu_wheels/two-2.0-py3-none-any.whl")
    work = [call for call in calls if ("-m pytest" in call and "-k" not in call) or "gpu.py --out" in call]
    shapes = [call.split("--shape ")[1].split()[0] if "--shape" in call else "tests" for call in work]
    assert shapes == ["llava-1.5-7b", "tests", "llava-1.5-7b", "1b", "3b"]
    assert "--only ours hf-best hf " in work[0]
    assert "--only" not in work[2]
    site = Path(next(call for call in calls if call.startswith("/")).split(":")[0])
    assert str(site) in calls[0]
    assert not site.exists()  # removed at the end


def test_failed_tests_do_not_stop_the_benchmark(checkout: Path) -> None:
    ended = checkout / "build" / "gpu" / "tests.ended"
    sources = "cat mm_moslora/code.py tests/gpu/test_one.py | sha256sum | cut -c 1-12"
    digest = subprocess.run(sources, shell=True, cwd=checkout, capture_output=True, text=True).stdout.strip()
    ended.parent.mkdir(parents=True)
    ended.write_text(f"other failed tests/gpu/test_one.py::test_a\n{digest} passed tests/gpu/test_one.py::test_a\n")
    assert run(checkout)[0] == 0
    ended.write_text(ended.read_text() + f"{digest} failed tests/gpu/test_one.py::test_b\n")
    code, calls, said = run(checkout, tests=1)
    assert code == 1
    assert "Tests of tests/gpu failed" in said
    assert sum("gpu.py --out" in call for call in calls) == 4


def test_a_test_that_ended_or_was_cut_off_twice_is_not_run_again(tmp_path: Path) -> None:
    file, ended = "tests/gpu/test_gpu_budget.py", tmp_path / "ended"
    environment = os.environ | {"GPU_TESTS_ENDED": str(ended), "GPU_TESTS_SOURCES": "now", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("GPU_TESTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", file]

    def noted(text: str) -> tuple[int, list[str]]:
        ended.write_text(text)
        done = subprocess.run(command, cwd=SCRIPTS.parent, env=environment, capture_output=True, text=True)
        return done.returncode, ended.read_text().removeprefix(text).splitlines()

    code, lines = noted("")  # no GPU: each is skipped
    tests = [line.split(" ", 2)[2] for line in lines if line.startswith("now skipped ")]
    assert code == 0
    assert len(tests) > 1
    first, rest = tests[0], "".join(f"now passed {name}\n" for name in tests[1:])
    assert noted(f"{rest}now begun {first}\n") == (0, [f"now begun {first}", f"now skipped {first}"])
    assert noted(f"{rest}now begun {first}\nnow begun {first}\n") == (5, [f"now cut {first}"])
    assert noted(f"{rest}now failed {first}\n") == (5, [])


def test_this_environment_lacks_nothing_for_a_try_on_the_cpu() -> None:
    code = subprocess.run([sys.executable, SCRIPTS / "gpu_preflight.py", "--device", "cpu", "--wheels", "none"])
    assert code.returncode == 0


def test_what_is_imported_at_the_start_of_the_tests_is_on_the_list() -> None:
    """Packages that are not on it are hidden, and what tests/gpu imports still imports."""
    project = tomllib.loads((SCRIPTS.parent / "pyproject.toml").read_text())["project"]
    names = {gpu_preflight.canonical(Requirement(line).name) for line in project["dependencies"]}
    others = names - set(gpu_preflight.NEEDED)
    hidden = [
        top
        for top, packages in importlib.metadata.packages_distributions().items()
        if set(map(gpu_preflight.canonical, packages)) <= others
    ]
    assert {"wandb", "onnx", "matplotlib"} <= set(hidden)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(sys.argv[1].split(',')));"
        "import mm_moslora.training.training_loop, mm_moslora.cli, trials, tiny, ranks"
    )
    paths = ("", "eval", "tests", "tests/support", "tests/builders", "tests/distributed")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(SCRIPTS.parent / part) for part in paths)}
    subprocess.run([sys.executable, "-c", code, ",".join(hidden)], check=True, env=environment)


def test_rows_that_are_left_ask_for_another_call_with_the_results_of_this_one(checkout: Path) -> None:
    code, calls, _ = run(checkout, rows=75)
    assert code == 75
    assert sum("gpu.py --out" in call for call in calls) == 1
    (checkout / "build" / "gpu" / "rows.jsonl").write_text("{}\n")
    code, calls, _ = run(checkout, OUT=str(checkout / "elsewhere"))
    assert code == 0
    assert (checkout / "elsewhere" / "rows.jsonl").read_text() == "{}\n"
