"""The start of a new projector: fitted to pictures in closed form, before training.

Shapes: ``N`` pictures, ``Q`` visual tokens per picture, ``V`` input width of the first linear layer, ``D`` LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from mm_moslora.utils.errors import ModelError

TOKENS_TO_FIT = 16
"""Visual tokens per picture in a fit, evenly spaced: more add little and cost much."""


def embedding_scale(visual_tokens: Tensor, embeddings: Tensor) -> float:
    """The factor on a new last layer that gives visual tokens the size of word embeddings: training had to find it."""
    return embedding_size(embeddings) / max(1e-12, float(visual_tokens.float().pow(2).mean().sqrt()))


def embedding_size(embeddings: Tensor) -> float:
    """Root mean square of word embeddings ``[vocabulary, D]``."""
    return float(embeddings.float().pow(2).mean().sqrt())


def fold_into(projector: nn.Module, mean: Tensor, spread: Tensor) -> None:
    """Fold ``(features - mean) / spread``, each ``[V]``, into a projector's first linear layer, in place.

    Most of a vision tower's features is common to all pictures: in DINOv2 the part that differs can be a tenth. Without
    the normalisation a new layer gives nearly the same token for every picture.
    """
    layer = linear_layers(projector)[0]
    assert layer.bias is not None
    mean, spread = mean.to(layer.weight.device), spread.to(layer.weight.device)
    if not float(spread.mean()) > 0:  # no dimension varies
        return
    weight = layer.weight.float() / spread.clamp_min(0.1 * float(spread.mean()))
    layer.bias.copy_(layer.bias.float() - weight @ mean)
    layer.weight.copy_(weight)


def fit_to_words(projector: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], *, size: float) -> float | None:
    """Fit linear layers with GELU between them so that visual tokens point in the directions of their picture's words.

    The fit is ridge regression from the features to the mean embedding of the words. The mean over all pictures is left
    out, and the rest gets the `size` of word embeddings, so that the language model reads in the picture what it can
    already read in a word. Every nonlinear layer begins as a linear one for the fitted directions, since
    `gelu(x) - gelu(-x)` is `x`: random directions would lose a part of what the features tell. Its other units keep
    their random start.

    `pairs`: some pictures' inputs of the first layer ``[N, Q, V]`` and the mean embeddings ``[N, D]`` of their words.
    Gives the share of the words' variance that is explained, 0 to 1; None, and nothing changed, where none differ.
    """
    layers = linear_layers(projector)
    rows, pictures, moments = 0, 0, _Moments(layers[0].in_features, layers[-1])
    for features, words in pairs:
        chosen = torch.linspace(0, features.shape[1] - 1, min(features.shape[1], TOKENS_TO_FIT)).round().long()
        x = features[:, chosen.to(features.device)].double()
        if not bool(x.isfinite().all()):
            raise ModelError(
                "The vision tower gives features that are not finite for a picture of the training data: the projector "
                "cannot be fitted. Train in fp32 or bf16, or leave model.projector.fit_to_answers out."
            )
        rows, pictures = rows + x.shape[0] * x.shape[1], pictures + x.shape[0]
        moments.add(x.flatten(0, 1), words.double().to(x.device).repeat_interleave(x.shape[1], 0))
    if not rows:
        return None
    mean_x, mean_y = moments.x / rows, moments.y / rows
    varying = moments.xx.div_(rows).addr_(mean_x, mean_x, alpha=-1)  # in place: folded patches are wide
    together = moments.xy / rows - torch.outer(mean_x, mean_y)
    variance = float(moments.yy / rows - mean_y.pow(2).sum())
    ridge = len(mean_x) / pictures  # the fewer pictures there are for a dimension, the less its slope is known
    variances = varying.diagonal().clone()
    varying.diagonal().add_(ridge * variances + 1e-9 * variances.mean() + 1e-12)
    weight = torch.linalg.solve(varying, together).T
    varying.diagonal().copy_(variances)
    fitted = float(((weight @ varying) * weight).sum())
    if min(fitted, variance) < 1e-12:
        return None
    weight *= size / (fitted / len(weight)) ** 0.5
    _write(layers, weight, mean_x, weight @ varying @ weight.T)
    return min(1.0, fitted / variance)


def _write(layers: Sequence[nn.Linear], weight: Tensor, mean: Tensor, covariance: Tensor) -> None:
    """Write the linear map ``weight (x - mean)`` into layers with GELU between them.

    Layers too narrow for all outputs get the directions with the largest variance, by the outputs' `covariance`.
    """
    if len(layers) > 1:
        variances, directions = torch.linalg.eigh(covariance)
        room = min(layer.out_features for layer in layers[:-1]) // 2
        rank = min(room, int((variances > 1e-6 * variances[-1]).sum()))
        out, spread = directions[:, -rank:], variances[-rank:].sqrt()
        weight = (out / spread).T @ weight
        signs = torch.cat([torch.eye(rank), -torch.eye(rank)]).to(weight)
        _set(layers[0], signs @ weight, -signs @ weight @ mean)
        for layer in layers[1:-1]:
            _set(layer, signs @ signs.T, 0)
        _set(layers[-1], (out * spread) @ signs.T, 0)
    else:
        _set(layers[0], weight, -weight @ mean)


def _set(layer: nn.Linear, weight: Tensor, bias: Tensor | int) -> None:
    """Set the first rows of a layer, which read the first inputs alone; a last layer reads nothing else, too."""
    rows, columns = weight.shape
    layer.weight[:rows] = 0
    layer.weight[:rows, :columns] = weight.to(layer.weight)
    if layer.bias is not None:
        layer.bias[:rows] = bias


class _Moments:
    """Sums over rows for a least-squares fit, on the last layer's device."""

    def __init__(self, width: int, last: nn.Linear) -> None:
        zeros = partial(torch.zeros, dtype=torch.double, device=last.weight.device)
        self.x, self.y = zeros(width), zeros(last.out_features)
        self.xx = zeros(width, width)
        self.xy = zeros(width, last.out_features)
        self.yy = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += float(y.pow(2).sum())


def linear_layers(projector: nn.Module) -> list[nn.Linear]:
    """The linear layers of a projector in the order of registration, which a fit takes for that of their calls."""
    return [module for module in projector.modules() if isinstance(module, nn.Linear)]


@contextmanager
def last_layer(projector: nn.Module) -> Iterator[Callable[[], nn.Module]]:
    """Watch a pass within the block; the function then returns the layer that put out the visual tokens.

    It is the projector's `last`, else the one whose output lies in the memory of the tokens, else the last one called.
    """
    outputs: list[tuple[nn.Module, Tensor]] = []
    layers = [module for module in projector.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    hooks = [
        module.register_forward_hook(lambda module, _, output: outputs.append((module, output)))
        for module in [*layers, projector]
    ]

    def last() -> nn.Module:
        if hasattr(projector, "last"):
            return cast(nn.Module, projector.last)
        *called, (_, tokens) = outputs
        if not called:
            raise ModelError(
                f"{type(projector).__name__} calls no linear layer or convolution, so its output cannot be scaled. "
                "Give it a property `last`, the layer that puts out the visual tokens, or leave "
                "model.projector.scale_to_embeddings out."
            )
        memory = tokens.untyped_storage().data_ptr()
        inside = [layer for layer, output in called if output.untyped_storage().data_ptr() == memory]
        return inside[-1] if inside else called[-1][0]

    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Record a layer's inputs within the block; the function returns those since its last call, in fp32."""
    inputs: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().float()))

    def taken() -> Tensor:
        joined, inputs[:] = torch.cat(inputs), []
        return joined

    try:
        yield taken
    finally:
        hook.remove()
