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
import ranks
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


def test_wheels_go_together_and_the_rest_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_wheels, "fetch", fetch)
    assert gpu_wheels.collect(["one", "two"], tmp_path, "3.12", "130") == ["numpy>=2", "torch"]
    assert sorted(wheel.name for wheel in tmp_path.iterdir()) == [
        "one-2.0-py3-none-any.whl",
        "two-2.0-py3-none-any.whl",
    ]
    with pytest.raises(SystemExit, match=r"three-2.0-py3-none-any.whl requires two<2, and 2.0 was collected"):
        gpu_wheels.collect(["one", "two", "three"], tmp_path, "3.12", "130")


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


def test_wheels_above_the_limit_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(gpu_wheels, "PACKAGES", ("two",))
    monkeypatch.setattr(gpu_wheels, "fetch", lambda *given: fetch(*given, size=2**20))
    (tmp_path / "earlier.whl").touch()
    arguments = ["--out", str(tmp_path), "--limit"]
    with pytest.raises(SystemExit, match="above the limit"):
        gpu_wheels.main([*arguments, "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["earlier.whl"]
    gpu_wheels.main([*arguments, "2"])
    assert [path.name for path in tmp_path.iterdir()] == [
        "two-2.0-py3-none-any.whl"
    ]  # two versions cannot be installed
    assert "1.00 MiB  two-2.0-py3-none-any.whl" in capsys.readouterr().out


def test_only_the_library_of_the_machines_cuda_is_carried(tmp_path: Path) -> None:
    names = ["bnb/libbnb_cuda130.so", "bnb/libbnb_cuda118.so", "bnb/libbnb_rocm70.so", "bnb/libbnb_cpu.so"]
    wheel = tmp_path / "bnb-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in names:
            archive.writestr(name, name)
        archive.writestr("bnb-1.dist-info/RECORD", "".join(f"{name},sha256=0,1\n" for name in names))
    gpu_wheels.slim(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == ["bnb/libbnb_cuda130.so", "bnb/libbnb_cpu.so", "bnb-1.dist-info/RECORD"]
        assert archive.read("bnb-1.dist-info/RECORD").decode().split() == [
            "bnb/libbnb_cuda130.so,sha256=0,1", "bnb/libbnb_cpu.so,sha256=0,1",
        ]  # fmt: skip


def test_every_wheel_has_a_declared_version_or_is_required_by_another() -> None:
    assert str(gpu_wheels.declared()["transformers"]) == "<6,>=5.23"
    assert {"deepspeed", "liger-kernel", "cyclopts", "datasets"} <= gpu_wheels.declared().keys()


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


def test_wheels_then_tests_then_the_shapes(checkout: Path) -> None:
    code, calls, _ = run(checkout)
    assert code == 0
    install, tests, path, *shapes = calls
    assert "--no-index --no-deps" in install
    assert install.endswith("build/gpu_wheels/two-2.0-py3-none-any.whl")
    assert tests.endswith("tests/gpu/test_one.py")
    site = Path(path.split(":")[0])
    assert str(site) in install
    assert not site.exists()  # removed at the end
    assert [call.split("--shape ")[1].split()[0] for call in shapes] == ["llava-1.5-7b", "1b", "3b"]


def test_failed_tests_do_not_stop_the_benchmark_and_are_not_repeated(checkout: Path) -> None:
    code, calls, said = run(checkout, tests=1)
    assert code == 1
    assert "Tests of tests/gpu failed" in said
    assert sum("gpu.py --out" in call for call in calls) == 3
    code, calls, _ = run(checkout, tests=0)
    assert code == 1  # as it was on these sources
    assert not any("-m pytest" in call for call in calls)
    (checkout / "mm_moslora" / "code.py").write_text("changed = 1\n")
    code, calls, _ = run(checkout, tests=0)
    assert code == 0
    assert any("-m pytest" in call for call in calls)


@pytest.mark.parametrize("code", [2, 3, 4, 5, 127])
def test_tests_that_could_not_run_are_not_recorded(checkout: Path, code: int) -> None:
    """Errors in the collection, pytest's own, of its command line, no tests, and no such program."""
    found, calls, said = run(checkout, tests=code)
    assert found == 1
    assert f"did not run (exit code {code} of pytest)" in said
    assert (checkout / "build" / "gpu" / "tests.ended").read_text() == ""
    found, calls, _ = run(checkout, tests=0)
    assert found == 0
    assert any("-m pytest" in call for call in calls)


def test_a_machine_that_lacks_something_gets_a_list_and_nothing_is_recorded(checkout: Path) -> None:
    code, calls, _ = run(checkout, LACKS="1")
    assert (code, calls) == (1, [])
    assert not (checkout / "build" / "gpu").exists()
    code, calls, _ = run(checkout, LACKS_AFTER="1")  # a PyTorch from a wheel sees no GPU
    assert (code, len(calls)) == (1, 1)
    assert not (checkout / "build" / "gpu" / "tests.ended").exists()


def test_the_list_names_versions_tools_and_what_carried_wheels_require(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(REQUIRES, "one", ["two==2.0"])
    fetch("one", "==1.0", tmp_path, "3.12")
    monkeypatch.setitem(REQUIRES, "pytest", ["two==2.0", "never; extra == 'all'", "numpy>=99"])
    fetch("pytest", "==1.0", tmp_path, "3.12")
    for wheel in tmp_path.iterdir():
        with zipfile.ZipFile(wheel, "a") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
            content = archive.read(name).decode().strip()
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(name, f"{content}\nName: {wheel.name.split('-')[0]}\nVersion: 1.0\n\n")
    monkeypatch.setattr(gpu_preflight.sys, "argv", ["gpu_preflight.py", "--wheels", str(tmp_path)])
    monkeypatch.setattr(gpu_preflight.shutil, "which", lambda _: None)
    monkeypatch.setattr(gpu_preflight.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(gpu_preflight, "lacking_gpu", lambda: ["a GPU"])
    find = importlib.util.find_spec
    monkeypatch.setattr(gpu_preflight.importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    assert gpu_preflight.main() == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.strip() for line in said[:-1]] == [
        "Tests and contenders that need one of these may fail:",
        "two==2.0 (one): not installed",
        "This machine lacks:",
        "pytest>=8.3 (the project): 1.0 is installed",
        "two==2.0 (pytest): not installed",
        f"numpy>=99 (pytest): {importlib.metadata.version('numpy')} is installed",
        "pip, which installs the wheels: this Python has none (PIP names another)",
        "a C compiler for Triton: CC names none, and neither gcc nor clang is on the PATH",
        f"{tmp_path}/Python.h for Triton: not there (Debian: apt-get install python3-dev)",
        "a GPU",
    ]


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


def test_processes_of_the_gpu_tests_find_what_was_carried(monkeypatch) -> None:
    """Such as PyYAML, which an image may lack."""
    monkeypatch.setenv("PYTHONPATH", "/carried")
    assert ranks.python_path().endswith(f"{os.pathsep}/carried")
    for file in (SCRIPTS.parent / "tests" / "gpu").glob("*.py"):
        settings = [line for line in file.read_text().splitlines() if "PYTHONPATH" in line]
        assert all('"PYTHONPATH": python_path()' in line for line in settings), file


def test_files_of_tests_that_have_ended_are_not_repeated(checkout: Path) -> None:
    assert run(checkout)[0] == 0
    (checkout / "tests" / "gpu" / "test_two.py").touch()
    ended = checkout / "build" / "gpu" / "tests.ended"
    sources = ended.read_text().split()[0]
    code, calls, _ = run(checkout)  # an empty file more: the sources are the same
    assert code == 0
    assert [call.split()[-1] for call in calls if "-m pytest" in call] == ["tests/gpu/test_two.py"]
    assert ended.read_text() == f"{sources} tests/gpu/test_one.py 0\n{sources} tests/gpu/test_two.py 0\n"


def test_rows_that_are_left_ask_for_another_call_with_the_results_of_this_one(checkout: Path) -> None:
    code, calls, _ = run(checkout, rows=75)
    assert code == 75
    assert sum("gpu.py --out" in call for call in calls) == 1
    (checkout / "build" / "gpu" / "rows.jsonl").write_text("{}\n")
    code, calls, _ = run(checkout, OUT=str(checkout / "elsewhere"))
    assert code == 0
    assert not any("-m pytest" in call for call in calls)
    assert (checkout / "elsewhere" / "rows.jsonl").read_text() == "{}\n"


def test_missing_tests_and_wheels_are_said(checkout: Path) -> None:
    shutil.rmtree(checkout / "tests")
    shutil.rmtree(checkout / "build")
    code, _, said = run(checkout, SHAPES="tiny", DEVICE="cpu")
    assert code == 0
    assert "There are no tests in tests/gpu." in said
    assert "No wheels in build/gpu_wheels" in said
    code, _, said = run(checkout, LIMIT="soon")
    assert code != 0
    assert "LIMIT is 'soon', expected a number from 60 on" in said
