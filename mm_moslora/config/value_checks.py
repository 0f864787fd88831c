"""Checks of one value of a recipe."""

from __future__ import annotations

from mm_moslora.utils.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise `ConfigError` unless the value of the named key is at least the minimum."""
    require(value >= minimum, f"{name} is {value}, expected at least {minimum}.")
