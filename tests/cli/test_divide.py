"""`mm-moslora divide`: shards as jobs, and their merge; what it refuses."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import Preloaded
from tiny import make_records

from mm_moslora import cli


@pytest.fixture
def recipe(tmp_path: Path, language_folder: Path) -> str:
    path = make_records(tmp_path, 40)
    lines = path.read_text().splitlines()
    lines[8] = lines[8].replace('"gpt"', '"robot"')
    path.write_text("\n".join(lines))
    (tmp_path / "recipe.yaml").write_text(
        f"""
name: t
model: {{language: {language_folder}}}
data: {{train: [{{path: {path}, image_folder: {tmp_path / "images"}}}], max_bad_share: 0.5}}
train: {{output: {tmp_path / "run"}, precision: fp32}}
"""
    )
    return str(tmp_path / "recipe.yaml")


def moslora(python: Preloaded, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "400"}
    return subprocess.run(
        [python.ours, "-m", "mm_moslora", *words], cwd=folder, env=environment, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_a_check_in_shards_reports_what_the_undivided_one_reports(recipe: str, tmp_path: Path, python: Preloaded):
    whole = moslora(python, tmp_path, "data", "check", recipe)
    assert "BAD_ROLE" in whole.stdout
    command = ["data", "check", recipe, "--output", "shards"]
    parts = moslora(python, tmp_path, "divide", "3", "--parallel", "2", "--", *command)
    assert (parts.returncode, parts.stdout) == (whole.returncode, whole.stdout), parts.stderr
    assert sorted(re.findall(r"\[[123]/3\] shard ([123])-of-3: done", parts.stderr)) == ["1", "2", "3"]
    assert len(list(tmp_path.glob("runs/divide/*/[123]-of-3.txt"))) == 3

    array = moslora(python, tmp_path, "divide", "2", "--slurm", "--", *command)
    assert array.returncode == 0
    file, merge = re.fullmatch(r"Next: sbatch (.*)\nThen: (.*)\n", array.stdout).groups()
    assert shlex.split(merge) == ["mm-moslora", *command, "--merge"]
    assert "#SBATCH --array=0-1\n" in Path(file).read_text()
    assert subprocess.run(["bash", "-n", file], check=False).returncode == 0


@pytest.mark.slow
def test_shards_that_fail_are_named_and_nothing_is_merged(recipe: str, tmp_path: Path, python: Preloaded):
    done = moslora(python, tmp_path, "divide", "2", "--", "data", "check", f"{recipe}.gone", "--output", "shards")
    assert done.returncode == 1
    assert "2 of 2 shards failed: 1-of-2, 2-of-2. Their logs are in" in done.stderr
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["2", "--", "train", "r.yaml"], "expected one of eval run, data check, data cache"),
        (["2", "--", "data", "cache", "r.yaml", "--shard", "1/2"], "without --shard and --merge"),
        (["0", "--", "data", "cache", "r.yaml"], "expected I/N"),
        (["2", "--ray", "127.0.0.1:1", "--parallel", "3", "--", "data", "cache", "r.yaml"], "--parallel is for this"),
        (["2", "--gpus-per-shard", "0", "--", "data", "cache", "r.yaml"], "--gpus-per-shard is 0, expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["divide", *words]) == 1
    assert said in capsys.readouterr().err
