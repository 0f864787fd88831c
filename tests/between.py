"""What another process or thread does at the worst moment, without waiting for that moment to come by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def just_before(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[..., Any], *, when: Callable[..., bool]
) -> None:
    """Run `act` once, right before the first call of `owner.name` whose arguments `when` is true of."""
    inner, came = getattr(owner, name), []

    def called(*arguments: Any, **options: Any) -> Any:
        if not came and when(*arguments):
            came.append(True)
            act()
        return inner(*arguments, **options)

    monkeypatch.setattr(owner, name, called)
