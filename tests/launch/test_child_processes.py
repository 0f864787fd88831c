"""Child processes: nothing of the working folder runs in them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mm_moslora.launch.child_processes import child_environment, output_of, python_words, start
from mm_moslora.tracking.run_environment import git_state

CHECKOUT = Path(__file__).parents[2]


def test_the_shell_scripts_start_safe_pythons() -> None:
    for script in (CHECKOUT / "scripts").glob("*.s*"):
        for line in script.read_text("utf-8").splitlines():
            if "-m mm_moslora" in line:
                assert "-P -m mm_moslora" in line, f"{script.name}: {line}"


def test_children_read_no_input_and_have_a_complete_environment(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ABOVE", "1")
    told = "os.environ['ABOVE'], os.environ['PYTHONSAFEPATH'], sys.flags.safe_path, sys.stdin.read()"
    code = f"import os, sys; print({told})"
    done = output_of(python_words("-I", "-c", code))
    assert (done.returncode, done.stdout, done.stderr) == (0, "1 1 True \n", "")
    with pytest.raises(TimeoutError, match=r"sleep did not end within 0\.1 seconds"):
        output_of(["sleep", "5"], seconds=0.1)
    with pytest.raises(FileNotFoundError):
        output_of([tmp_path / "none"])
    assert start(["sh", "-c", "[ $ABOVE-$CHANGED = 1-2 ]"], env=child_environment({"CHANGED": "2"})).wait() == 0


MARK = "import pathlib\npathlib.Path({mark!r}).touch()\n"
HOSTILE = ("regex", "datasets", "sitecustomize", "usercustomize", "yaml", "numpy", "psutil")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose modules and git configuration leave marks, as an unpacked archive may hold."""
    folder, marks = tmp_path / "hostile", tmp_path / "marks"
    folder.mkdir()
    marks.mkdir()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(folder)]
    (folder / "a.txt").write_text("1")
    for words in (["init", "-q"], ["add", "a.txt"], ["commit", "-qm", "a"]):
        subprocess.run([*git, *words], check=True)
    (folder / ".gitattributes").write_text("* filter=evil diff=evil\n")
    for key in (
        "core.fsmonitor",
        "filter.evil.clean",
        "filter.evil.process",
        "diff.evil.textconv",
        "core.pager",
        "core.sshCommand",
        "alias.status",
        "alias.rev-parse",
    ):
        command = f"touch {shlex.quote(str(marks / key))}; false"
        subprocess.run([*git, "config", key, f"!{command}" if key.startswith("alias") else command], check=True)
    hooks = folder / "hooks"
    hooks.mkdir()
    for name in ("post-index-change", "post-checkout", "reference-transaction", "fsmonitor-watchman"):
        (hooks / name).write_text(f"#!/bin/sh\ntouch {shlex.quote(str(marks / name))}\n")
        (hooks / name).chmod(0o755)
    subprocess.run([*git, "config", "core.hooksPath", str(hooks)], check=True)
    (folder / "a.txt").write_text("2")
    for mark in marks.iterdir():
        mark.unlink()
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(MARK.format(mark=str(marks / name)))
    return folder


def _marks(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder.parent / "marks").iterdir())


def test_the_folder_is_hostile(hostile: Path) -> None:
    subprocess.run(["git", "-C", str(hostile), "status"], capture_output=True, check=False)
    subprocess.run([sys.executable, "-c", "import regex, datasets"], cwd=hostile, check=True)
    assert {"core.fsmonitor", "regex", "datasets"} <= set(_marks(hostile))


def test_the_commit_of_a_folder_is_read_without_git(hostile: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(hostile), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    for mark in (hostile.parent / "marks").iterdir():
        mark.unlink()
    (hostile / "below").mkdir()
    assert git_state(hostile) == git_state(hostile / "below") == {"git_commit": head}
    assert _marks(hostile) == []


def test_commits_of_all_kinds_of_working_trees_are_found(tmp_path: Path) -> None:
    main, other = tmp_path / "main", tmp_path / "other"

    def git(*words: str, at: Path = main) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(at), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    main.mkdir()
    git("init", "-q")
    assert git_state(main) == {}, "it has no commit yet"
    git("commit", "-q", "--allow-empty", "-m", "a")
    git("worktree", "add", "-q", "-b", "topic/x", str(other))
    git("commit", "-q", "--allow-empty", "-m", "b", at=other)
    for _ in range(2):
        assert git_state(main) == {"git_commit": git("rev-parse", "HEAD")}
        assert git_state(other) == {"git_commit": git("rev-parse", "HEAD", at=other)}
        git("pack-refs", "--all")
    git("checkout", "-q", "--detach", at=other)
    assert git_state(other) == {"git_commit": git("rev-parse", "HEAD", at=other)}
    git("-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other), "sub")
    assert git_state(main / "sub") == {"git_commit": git("rev-parse", "HEAD", at=other)}


@pytest.mark.parametrize(
    "files",
    [
        {".git": "gitdir: /etc\n"},
        {".git": "gitdir: ~nobody-here/x"},
        {".git": "\0"},
        {".git/HEAD": "ref: ../../secret"},
        {".git/HEAD": "ref: /etc/passwd"},
        {".git/HEAD": "x" * 40},
        {".git/HEAD": "\xff"},
        {".git/HEAD": "ref:"},
        {},
    ],
)
def test_damaged_and_hostile_repositories_have_no_commit(tmp_path: Path, files: dict[str, str]) -> None:
    (tmp_path / "secret").write_text("0" * 40)
    folder = tmp_path / "deep" / "folder"
    folder.mkdir(parents=True)
    if not files:
        (folder / ".git").mkdir()
        os.mkfifo(folder / ".git" / "HEAD")
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode("latin-1"))
    assert git_state(folder) == {}


@pytest.fixture
def work(hostile: Path, language_folder: Path, records: Path) -> Path:
    """A small recipe and questions in the hostile folder."""
    texts = [line for line in records.read_text().splitlines(keepends=True) if '"image"' not in line]
    (hostile / "texts.jsonl").write_text("".join(texts * 3))
    rows = [{"question_id": str(n), "text": "Which?", "answer": "red"} for n in range(3)]
    (hostile / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"language": str(language_folder)},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {"train": [{"path": "texts.jsonl"}], "max_length": 256, "workers": 1},
        "train": {
            "steps": 2,
            "global_batch": 4,
            "micro_batch": 4,
            "zero": "none",
            "precision": "fp32",
            "output": "run",
        },
        "track": {"trackers": []},
    }
    (hostile / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return hostile


def _mm_moslora(folder: Path, *lines: list[str]) -> None:
    """Run command lines in a folder, in one process that starts as the console script does."""
    code = "import json, sys; from mm_moslora.cli import run; sys.exit(any(map(run, json.loads(sys.argv[1]))))"
    if len(lines) == 1:
        code = "from mm_moslora.__main__ import main; main()"
    words = lines[0] if len(lines) == 1 else [json.dumps(lines)]
    given = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words], cwd=folder, env=given, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("way", ["torchrun", "deepspeed"])
def test_launches_in_a_hostile_folder_run_nothing_of_it(work: Path, way: str) -> None:
    """One process, which torchrun starts where it is to be started again; all ranks have the same words."""
    more = {"torchrun": ["--max-restarts", "1"], "deepspeed": ["--deepspeed"]}[way]
    _mm_moslora(work, ["launch", "recipe.yaml", "--nproc", "1", *more, "--train.zero", "zero2"])
    assert json.loads((work / "run" / "state.json").read_text())["state"] == "finished"
    known = json.loads((work / "run" / "environment.json").read_text())
    assert len(known["git_commit"]) == 40
    assert _marks(work) == []


@pytest.mark.slow
def test_other_verbs_in_a_hostile_folder_run_nothing_of_it(work: Path) -> None:
    task, of_task = "llava:test.jsonl", ["--max-new-tokens", "2", "--output", "compared"]
    _mm_moslora(
        work,
        ["compare", "recipe.yaml", "--arms", "lora,tsm", "--seeds", "1", "--tasks", task, "--limit", "1", *of_task],
        ["eval", "run", task, "--model", str(work / "compared" / "runs" / "lora_lr0.0002_seed0"), "--limit", "1"],
        ["data", "check", "recipe.yaml", "--processes", "2"],
    )
    assert len(list(work.glob("compared/runs/*/outcome.json"))) == 2
    assert _marks(work) == []


@pytest.mark.parametrize("script", ["train.sh", "train_deepspeed.sh", "train_slurm.sbatch"])
def test_launch_scripts_in_a_hostile_folder_run_nothing_of_it(work: Path, script: str) -> None:
    given = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    words = ["bash", str(CHECKOUT / "scripts" / script), "--dry-run", "recipe.yaml"]
    done = subprocess.run(words, cwd=work, env=given, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert _marks(work) == []


def test_downloads_of_the_quickstart_do_not_import_the_folder(hostile: Path, monkeypatch) -> None:
    """pip runs in the working folder, by the same words."""
    monkeypatch.chdir(hostile)
    (hostile / "pip.py").write_text(MARK.format(mark=str(hostile.parent / "marks" / "pip")))
    done = output_of(python_words("-m", "pip", "--version"))
    assert done.stdout.startswith("pip "), done.stderr
    assert _marks(hostile) == []
