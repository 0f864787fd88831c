"""Code blocks of the documents, and how each line is tested: run on tiny stand-ins, or checked without running it.

A block is run where it can be. What needs a GPU, a network or a person is checked: commands are parsed against the
real command line, scripts and make targets must exist. A comment
`<!-- docs: skip REASON -->` before a block says why neither is possible; there is no other way out.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([
    ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", ROOT / "eval" / "README.md",
    ROOT / "tests" / "README.md", ROOT / "deepspeed_configs" / "README.md",
    *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md"),
])  # fmt: skip
_FENCE = re.compile(r"^(?P<mark>`{3,})(?P<kind>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=mark)[ \t]*$", re.M | re.S)
_SKIP = re.compile(r"<!-- docs: skip (?P<reason>.+?) -->\s*$", re.S)
PARSED_ONLY = {"quickstart", "chat", "serve", "doctor", "launch"}
"""Verbs that need a person or a network, or take minutes: their options are checked, nothing is run."""
PLAIN = {"", "text", "bibtex", "json", "console", "html", "mermaid"}


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    document: Path
    line: int
    kind: str
    text: str
    skip: str | None

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(document: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = document.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        before = _SKIP.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(document, line, match["kind"], match["text"], before["reason"] if before else None))
    return found


def commands(text: str) -> list[list[str]]:
    """The commands of a shell block: comments dropped, continued lines joined, `$ ` taken off."""
    joined = text.replace("\\\n", " ")
    lines = [line.strip().removeprefix("$ ") for line in joined.splitlines()]
    parts = [part for line in lines for part in re.split(r"\s&&\s", line)]
    split = [shlex.split(part, comments=True) for part in parts]
    return [words for words in split if words]


def check_command(words: list[str]) -> None:
    """Check a command that is not run: the files, targets and options that it names must exist.

    Raises:
        AssertionError: one of them does not exist, or the program is unknown here.
    """
    while "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # VARIABLE=value in front
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets), f"make has no target {targets}"
    elif program in ("git", "cd", "source", "ls", "export", "nvidia-smi", "mkdir", "tar"):
        pass
    elif program == "pip":
        check_extras(rest)
    elif program == "mm-moslora":
        parse(rest)
    elif program in ("torchrun", "deepspeed"):
        assert "mm_moslora" in rest
        parse(rest[rest.index("mm_moslora") + 1 :])
    elif program == "sbatch" and "--wrap" in rest:
        wrapped = shlex.split(rest[rest.index("--wrap") + 1])
        parse(wrapped[wrapped.index("mm-moslora") + 1 :])
    elif program in ("python", "sbatch", "bash") or program.startswith("scripts/"):
        scripts = [word for word in words if word.startswith(("scripts/", "examples/", "eval/", "tests/"))]
        assert scripts, f"nothing to check in {words}"
        for script in scripts:
            assert (ROOT / script).is_file(), f"{script} does not exist"
    else:
        raise AssertionError(f"there is no check for the program {program!r}; add one")


def check_extras(words: list[str]) -> None:
    """`pip install ".[extra]"`: the extra must be declared. By name nothing can be installed: no index has it."""
    declared = (ROOT / "pyproject.toml").read_text()
    assert not any(word.startswith("mm-moslora") for word in words), words
    for extra in re.findall(r"\.(?:whl)?\[([\w,-]+)\]", " ".join(words)):
        for name in extra.split(","):
            assert re.search(rf"^{re.escape(name)} = \[", declared, re.M), f"there is no extra {name!r}"


def parse(words: list[str]) -> None:
    """Parse an mm-moslora command line without running it."""
    from mm_moslora.cli import app

    app.parse_args(words, exit_on_error=False, print_error=False)
