"""What another process or thread does at the worst moment, without waiting for that moment to come by itself."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def just_before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[..., Any], *, when: Callable[..., bool]
) -> None:
    """Run `act` once, right before the first call of `owner.name` with arguments that `when` accepts."""
    inner, came = getattr(owner, name), []

    def called(*arguments: Any, **options: Any) -> Any:
        if not came and when(*arguments):
            came.append(True)
            act()
        return inner(*arguments, **options)

    monkeypatch.setattr(owner, name, called)


@contextmanager
def somebody_builds(cache: Path) -> Iterator[None]:
    """Runs that want the tokenised records of a cache wait for them: another process builds them, as it seems."""
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    away = folder.rename(cache.parent / "away")
    with (cache / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    away.rename(folder)
