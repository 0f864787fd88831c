"""Checks of one value of a recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mm_moslora.utils.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise `ConfigError` unless the value of the named key is at least the minimum."""
    require(value >= minimum, f"{name} is {value}, expected at least {minimum}.")


def positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless the value of the named key is more than 0, and finite."""
    require(value > 0 and math.isfinite(value), f"{name} is {value}, expected more than 0, and finite.")


def check_adam(betas: Sequence[float], eps: float) -> None:
    """Raise `ConfigError` unless `optim.betas` and `optim.eps` are Adam's."""
    require(eps > 0, f"optim.eps is {eps}, expected more than 0.")
    require(all(0 <= beta < 1 for beta in betas), f"optim.betas is {betas}, expected two numbers from 0 to 1.")


def check_mixer_rate(mixer_lr: float | None, mixer_factor: float) -> None:
    """Raise `ConfigError` unless at most one of `optim.mixer_lr` and `optim.mixer_factor` sets the mixers' rate."""
    require(
        0 < mixer_factor < math.inf, f"optim.mixer_factor is {mixer_factor}, expected a finite number of more than 0."
    )
    require(
        mixer_lr is None or mixer_factor == 1,
        f"optim.mixer_lr {mixer_lr} and optim.mixer_factor {mixer_factor:g} both set the rate of the mixers. Set one.",
    )


def check_mixers_train(mixer_factor: float, *, train: bool) -> None:
    """Raise `ConfigError` where `optim.mixer_factor` sets the rate of mixers and none trains."""
    require(
        mixer_factor == 1 or train,
        f"optim.mixer_factor is {mixer_factor:g}, which is of the mixers, and none trains. Leave it out, or set "
        "adapter.mixer_trainable.",
    )
