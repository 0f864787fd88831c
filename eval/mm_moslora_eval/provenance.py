"""Under which circumstances the answers of a run folder came about: one line per call in `invocations.jsonl`.

Nothing of this changes a score, so it stands beside `results.json` and not in it.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .answers import line
from .model import Model
from .results import environment
from .runner import Settings

FILE = "invocations.jsonl"
_SECONDS = 5


def record(folder: Path, model: Model, settings: Settings) -> None:
    """Append what this call is: command, settings, hardware and precision, versions, commit."""
    details: Mapping[str, Any] = getattr(model, "details", {})
    row = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": asdict(settings),
        "model": {"name": model.name, "fingerprint": model.fingerprint, **details},
        "environment": environment(),
        "code": commit(),
    }
    with (folder / FILE).open("a", encoding="utf-8") as stream:
        stream.write(line(row))


def read(folder: Path) -> list[dict[str, Any]]:
    """The recorded calls; a torn line is left out."""
    rows = []
    try:
        texts = (folder / FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    for text in texts:
        try:
            rows.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return rows


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that this code runs from and whether it was changed; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        found = [
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True, text=True, timeout=_SECONDS, check=True,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": found[0], "dirty": bool(found[1])}
