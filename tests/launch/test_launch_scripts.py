"""The launch scripts: clean by shellcheck, explained by --help, honest in a dry run. The rest: `test_launcher.py`."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

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
    assert run(["config", "--files", "scripts"]) == 0
    assert Path(capsys.readouterr().out.strip()) == SCRIPTS
    assert run(["config", "--files"]) == 0
    assert str(ROOT / "deepspeed_configs") in capsys.readouterr().out
    assert run(["config", "--files", "script"]) == 1
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


def test_every_script_answers_help_and_starts_nothing(environment: dict[str, str]) -> None:
    """Those of `soak` and the rest of the folder; parts of others say so."""
    common = _run("common.sh", "--help", environment=environment)
    assert common.stdout.startswith("Shared functions of train.sh and train_deepspeed.sh")
    for name in ("soak/parts.py", "soak/simulated_disk.py"):
        words = [sys.executable, str(SCRIPTS / name), "--help"]
        result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=180, check=False)
        assert result.returncode == 0, result.stderr
        assert "usage: " in result.stdout or "nothing to run" in result.stdout, name
