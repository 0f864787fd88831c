"""The launchers: clean by shellcheck, explained by --help, honest in a dry run, gentle when they are stopped."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import psutil
import pytest

from mm_moslora.cli import run

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
LAUNCHERS = ["train.sh", "train_deepspeed.sh", "train_slurm.sbatch"]


def _run(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments], env=environment, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHON": sys.executable, "NPROC": "2",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}",
    }  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "a recipe.yaml"
    path.write_text(f"model: {{language: tiny}}\ntrain: {{output: {json.dumps(str(tmp_path / 'run'))}}}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").touch()
    return path


@pytest.fixture
def stub(tmp_path: Path, environment: dict[str, str]) -> dict[str, str]:
    """A Python that answers `config` for real and runs $TRAIN in place of the launcher."""
    path = tmp_path / "stub-python"
    path.write_text(
        f'#!/usr/bin/env bash\ncase "$*" in *" train "*) printf "%s\\n" "$@" >"$HOME/arguments"; eval "$TRAIN" ;;'
        f' *) exec {shlex.quote(sys.executable)} "$@" ;; esac\n'
    )
    path.chmod(0o755)
    return environment | {"PYTHON": str(path)}


def test_shellcheck_finds_nothing() -> None:
    files = sorted(str(path) for pattern in ("*.sh", "*.sbatch") for path in SCRIPTS.rglob(pattern))
    assert len(files) >= len(LAUNCHERS)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([str(shellcheck), "-x", *files], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_explains_and_starts_nothing(script: str, environment: dict[str, str]) -> None:
    result = _run(script, "--help", environment=environment)
    assert result.returncode == 0
    assert result.stdout.startswith("Usage: ")
    for word in ("RECIPE", "NPROC", "--dry-run"):
        assert word in result.stdout


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run_shows_the_recipe_and_the_command(script: str, environment: dict[str, str], recipe: Path) -> None:
    arguments = ["--dry-run", str(recipe), "--optim.lr", "3e-4", "--resume", "never"]
    result = _run(script, *arguments, environment=environment)
    assert result.returncode == 0, result.stderr
    said = result.stdout + result.stderr
    assert "lr: 0.0003" in said
    (line,) = [line for line in said.splitlines() if "-m mm_moslora train" in line or "--module mm_moslora" in line]
    command = shlex.split(line.removeprefix("# "))
    assert command[-6:] == ["train", str(recipe), "--optim.lr", "3e-4", "--resume", "never"]
    assert "2" in command
    assert not (recipe.parent / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_an_installed_script_uses_the_python_that_it_is_installed_for(
    script: str, environment: dict[str, str], recipe: Path
) -> None:
    """From a folder that is no checkout; the environment of SLURM's script is active, since SLURM runs a copy."""
    place = recipe.parent / "env" / "lib" / "python3.11" / "site-packages" / "mm_moslora" / "scripts"
    shutil.copytree(SCRIPTS, place, ignore=shutil.ignore_patterns("soak", "bench"))
    (recipe.parent / "env" / "bin").mkdir()
    for name, words in (("python", ""), ("mm-moslora", " -m mm_moslora")):
        path = recipe.parent / "env" / "bin" / name
        path.write_text(f'#!/bin/sh\necho installed >&2\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        path.chmod(0o755)
    where = {name: value for name, value in environment.items() if name != "PYTHON"}
    if script == "train_slurm.sbatch":
        where["PATH"] = f"{recipe.parent / 'env' / 'bin'}:{where['PATH']}"
    words = ["bash", str(place / script), "--dry-run", recipe.name]
    result = subprocess.run(
        words, env=where, cwd=recipe.parent, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "installed" in result.stderr.splitlines()
    assert "mm_moslora train" in result.stderr


def test_the_wheel_holds_the_launchers_and_the_command_line_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    included = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for name in ("common.sh", *LAUNCHERS):
        assert included["force-include"][f"scripts/{name}"] == f"mm_moslora/scripts/{name}"
    assert run(["files", "scripts"]) == 0
    assert Path(capsys.readouterr().out.strip()) == SCRIPTS
    assert run(["files"]) == 0
    assert str(ROOT / "deepspeed_configs") in capsys.readouterr().out
    assert run(["files", "script"]) == 1
    assert "Did you mean 'scripts'" in capsys.readouterr().err


@pytest.mark.parametrize("script", LAUNCHERS)
def test_wrong_use_is_one_clear_line(script: str, environment: dict[str, str], recipe: Path) -> None:
    result = _run(script, environment=environment)
    assert result.returncode == 2
    assert "RECIPE is missing" in result.stderr
    result = _run(script, "--dry-run", str(recipe), "--optim.lrr", "1", environment=environment)
    assert result.returncode != 0
    assert "lrr" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "nproc", "said"),
    [
        (["--nnodes", "two"], "1", "--nnodes is 'two', expected a number from 1 on"),
        (["--nnodes", "2"], "1", "--nnodes 2 needs --rdzv HOST:PORT"),
        (["--nnodes", "2", "--rdzv", "node-1"], "1", "--rdzv is 'node-1', expected HOST:PORT"),
        (["--max-restarts", "-1"], "1", "--max-restarts is '-1', expected a number from 0 on"),
        (["--rdzv"], "1", "--rdzv has no value"),
        ([], "many", "NPROC is 'many', expected a number from 1 on"),
    ],
)
def test_an_option_that_cannot_be_is_one_line(
    options: list[str], nproc: str, said: str, stub: dict[str, str], recipe: Path
) -> None:
    """Before anything starts; `config` is answered without loading it."""
    python = Path(stub["PYTHON"])
    python.write_text(f"#!/usr/bin/env bash\ncat {shlex.quote(str(recipe))}\n")
    last = [] if options == ["--rdzv"] else [str(recipe)]
    result = _run("train.sh", "--dry-run", *options, *last, environment=stub | {"NPROC": nproc})
    assert result.returncode == 2
    assert said in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_every_script_answers_help_and_starts_nothing(environment: dict[str, str]) -> None:
    """Those of `soak` and the rest of the folder; parts of others say so."""
    common = _run("common.sh", "--help", environment=environment)
    assert common.stdout.startswith("Shared functions of train.sh, train_deepspeed.sh and train_slurm.sbatch")
    for name in ("adapter_table.py", "readme_results.py", "soak/parts.py", "soak/fuzzing.py", "soak/simulated_disk.py"):
        words = [sys.executable, str(SCRIPTS / name), "--help"]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert result.returncode == 0, result.stderr
        assert "usage: " in result.stdout or "nothing to run" in result.stdout, name


@pytest.mark.parametrize(
    ("train", "code"),
    [("exit 0", 0), ("exit 3", 3), ('touch "$HOME/run/STOPPED"; exit 1', 75)],
)
def test_exit_code_says_how_the_run_ended(train: str, code: int, stub: dict[str, str], recipe: Path) -> None:
    (recipe.parent / "run" / "STOPPED").touch()  # of an earlier stop: must not count
    result = _run("train.sh", str(recipe), "--optim.lr", "1e-4", environment=stub | {"TRAIN": train})
    assert result.returncode == code, result.stderr
    passed = (recipe.parent / "arguments").read_text().splitlines()
    assert passed[-4:] == ["train", str(recipe), "--optim.lr", "1e-4"]
    assert passed[:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_a_file_of_the_user_that_is_called_stopped_is_left_alone(stub: dict[str, str], recipe: Path) -> None:
    """In a folder that is no run's; it says nothing about how a run ended."""
    (recipe.parent / "run" / "run.lock").unlink()
    (recipe.parent / "run" / "STOPPED").write_text("mine")
    result = _run("train.sh", str(recipe), environment=stub | {"TRAIN": "exit 3"})
    assert result.returncode == 3, result.stderr
    assert (recipe.parent / "run" / "STOPPED").read_text() == "mine"


def test_a_run_that_has_failed_before_it_is_waited_for_is_no_success(tmp_path: Path) -> None:
    """A shell forgets processes that ended, but not their codes; everything that it does is slow here."""
    code = f"""source {shlex.quote(str(SCRIPTS / "common.sh"))}
RUN_FOLDER={shlex.quote(str(tmp_path))}
trap() {{ sleep 0.2; builtin trap "$@"; }}
kill() {{ sleep 0.2; builtin kill "$@"; }}
run_and_report bash -c 'exit 3'"""
    assert subprocess.run(["bash", "-c", code], check=False).returncode == 3


def test_a_scheduler_that_repeats_itself_is_handed_on_once_and_the_third_ctrl_c_ends_all() -> None:
    code = f"""source {shlex.quote(str(SCRIPTS / "common.sh"))}
hand_on() {{ echo told; }}
kill_tree() {{ echo "ended $1"; }}
CHILD=7 SECONDS=100
heard; heard INT
SECONDS=200; heard; heard INT; heard INT
SECONDS=300; heard; heard INT"""
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["told", "ended 7"]
    assert done.stderr.splitlines() == [
        "The run saves before it ends. Ctrl-C again, more than 3 s later, ends it unsaved."
    ]


def test_all_that_a_launcher_started_ends_with_it() -> None:
    rank = "import time; print(flush=True); time.sleep(60)"
    torchrun = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}], start_new_session=True)"
    with subprocess.Popen([sys.executable, "-c", torchrun], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        ranks = psutil.Process(process.pid).children(recursive=True)
        assert ranks
        code = f"source {shlex.quote(str(SCRIPTS / 'common.sh'))}; kill_tree {process.pid}"
        subprocess.run(["bash", "-c", code], check=True)
        assert process.wait(20) == -signal.SIGKILL
        assert not psutil.wait_procs(ranks, timeout=20)[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_which_saves_first(number: int, stub: dict[str, str], recipe: Path) -> None:
    train = (
        'trap \'sleep 0.5; touch "$HOME/run/saved" "$HOME/run/STOPPED"; exit 1\' TERM; touch "$HOME/run/started";'
        "for _ in $(seq 300); do sleep 0.1; done"
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "train.sh"), str(recipe)], env=stub | {"TRAIN": train}, stderr=subprocess.PIPE
    )
    try:
        _wait_for(recipe.parent / "run" / "started")
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75
    assert (recipe.parent / "run" / "saved").exists()
    assert b"continues the run" in errors


@pytest.mark.parametrize(("state", "code"), [("finished", 0), ("running", 75)])
def test_a_launcher_that_takes_a_stop_for_a_success_is_not_believed(
    state: str, code: int, stub: dict[str, str], recipe: Path
) -> None:
    """The runner of DeepSpeed does, where the launcher below it was ended by a signal."""
    (recipe.parent / "run" / "state.json").write_text(json.dumps({"state": state}))
    train = 'trap "exit 0" TERM; touch "$HOME/run/started"; for _ in $(seq 300); do sleep 0.1; done'
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "train.sh"), str(recipe)], env=stub | {"TRAIN": train}, stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(recipe.parent / "run" / "started")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == code
    finally:
        process.kill()


def test_ctrl_c_in_a_terminal_reaches_the_launcher_once(stub: dict[str, str], recipe: Path) -> None:
    """A terminal sends it to the whole process group, and torchrun leaves its ranks when it hears a second one."""
    train = (
        'trap \'echo heard >>"$HOME/heard"\' TERM INT; touch "$HOME/run/started"; '
        'until [ -e "$HOME/heard" ]; do sleep 0.1; done; sleep 0.5; exit 1'
    )
    process = subprocess.Popen(
        ["bash", str(SCRIPTS / "train.sh"), str(recipe)], env=stub | {"TRAIN": train}, stderr=subprocess.DEVNULL,
        start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        _wait_for(recipe.parent / "run" / "started")
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=120) == 75
    finally:
        process.kill()
    assert (recipe.parent / "heard").read_text().splitlines() == ["heard"]


def _wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)
