"""The order in which contents reach the disk and names change: what a power loss would leave."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest


def trace_disk(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    """A list that grows by `sync NAME` and `NAME -> NAME` below a folder; `~` stands for a random part of a name."""
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def name(path: str | Path) -> str:
        return re.sub(r"\.[0-9a-f]{12}\.tmp$", "~", os.path.relpath(path, folder))

    def synced(descriptor: int) -> None:
        events.append(f"sync {name(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def replaced(path: Path, target: Path) -> Path:
        events.append(f"{name(path)} -> {name(target)}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    return events
