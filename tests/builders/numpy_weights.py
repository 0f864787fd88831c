"""Weights that numpy draws: the same under every release of PyTorch, where random numbers change between releases."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Replace the random weights of a model in place.

    Every weight has a stream of its own, which its name chooses. Weights that were not drawn stay: those of one value
    (zeros, ones), identities, and those that are no floating-point numbers (quantised).
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _is_fixed(parameter):
            parameter.copy_(_draw(name, tuple(parameter.shape)))


def _is_fixed(weight: Tensor) -> bool:
    square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    if square and torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)):
        return True
    return bool((weight == weight.flatten()[0]).all())


def _draw(name: str, shape: tuple[int, ...]) -> Tensor:
    # RandomState's streams are frozen; those of numpy's newer generators may change.
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "lora_mixer" in name:
        q, r = np.linalg.qr(values)
        values = q * np.sign(np.diagonal(r))
    elif len(shape) > 1 and "embed" not in name:
        values /= np.sqrt(np.prod(shape[1:]))
    else:
        values *= 0.02
    return torch.from_numpy(values)
