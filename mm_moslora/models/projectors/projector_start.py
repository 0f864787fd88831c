"""How a fresh projector begins: measured on pictures, in closed form, before anything trains.

Shapes: ``N`` pictures, ``Q`` visual tokens per picture, ``V`` width of what the first linear layer reads, ``H`` of what
the last one reads, ``D`` LLM width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from mm_moslora.utils.errors import ModelError

RIDGE = 0.02
"""Of the variance of every dimension: what is added to it, so that few pictures do not determine a fit by chance."""


TOKENS_TO_FIT = 16
"""Visual tokens of a picture, evenly spaced, that a fit is made from: more tell little and cost much."""


def embedding_scale(visual_tokens: Tensor, embeddings: Tensor) -> float:
    """The factor on a fresh projector's last layer that gives visual tokens the size of word embeddings.

    A fresh projector gives tokens several times larger or smaller than the words beside them; training first has to
    undo that.

    Args:
        visual_tokens: of some real pictures, ``[..., D]``.
        embeddings: word embeddings ``[vocabulary, D]``.
    """
    return embedding_size(embeddings) / max(1e-12, float(visual_tokens.float().pow(2).mean().sqrt()))


def embedding_size(embeddings: Tensor) -> float:
    """Root mean square of word embeddings ``[vocabulary, D]``."""
    return float(embeddings.float().pow(2).mean().sqrt())


def fold_into(projector: nn.Module, mean: Tensor, spread: Tensor) -> None:
    """Let a projector's first linear layer compute of features what it did of ``(features - mean) / spread``.

    Features of a vision tower have most of their size in common: of DINOv2's, the part that differs between pictures
    can be a tenth. A fresh layer then gives nearly the same token for every picture.

    Args:
        projector: changed in place; not at all where no dimension changes.
        mean: ``[V]``.
        spread: ``[V]``; dimensions that hardly change count as a tenth of the average.
    """
    layer = first_layer(projector)
    assert layer.bias is not None
    mean, spread = mean.to(layer.weight.device), spread.to(layer.weight.device)
    if not float(spread.mean()) > 0:  # nothing differs
        return
    weight = layer.weight.float() / spread.clamp_min(0.1 * float(spread.mean()))
    layer.bias.copy_(layer.bias.float() - weight @ mean)
    layer.weight.copy_(weight)


def fit_to_words(projector: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], *, size: float) -> float | None:
    """Set the last layer so that visual tokens point where the words that belong to their picture do.

    Least squares with a ridge, from what the layer reads to the mean embedding of the words. What all pictures have in
    common is left out, and what differs gets the size of a word embedding. A language model that can do something with
    a word, name it or compare it, then finds it in the picture, too.

    Args:
        projector: changed in place.
        pairs: for some pictures at a time, what the last layer reads ``[N, Q, H]``, and the mean embeddings ``[N, D]``.
        size: root mean square that the tokens get.

    Returns:
        The share of the words' variance that the tokens follow, 0 to 1; None, and nothing changed, where the words or
        the pictures do not differ.

    Raises:
        ModelError: what the layer reads is not finite.
    """
    layer = last_layer(projector)
    rows, moments = 0, _Moments(layer)
    for hidden, words in pairs:
        places = torch.linspace(0, hidden.shape[1] - 1, min(hidden.shape[1], TOKENS_TO_FIT)).round().long()
        x = hidden[:, places.to(hidden.device)].double()
        if not bool(x.isfinite().all()):
            raise ModelError(
                "The vision tower gives features that are not finite for a picture of the training data, so that the "
                "projector cannot be fitted. Train in fp32 or bf16, or leave model.projector.fit_to_answers out."
            )
        rows += x.shape[0] * x.shape[1]
        moments.add(x.flatten(0, 1), words.double().to(x.device).repeat_interleave(x.shape[1], 0))
    if not rows:
        return None
    mean_x, mean_y = moments.x / rows, moments.y / rows
    varying = moments.xx / rows - torch.outer(mean_x, mean_x)
    together = moments.xy / rows - torch.outer(mean_x, mean_y)
    variance = float(moments.yy / rows - mean_y.pow(2).sum())
    ridged = varying + torch.diag(RIDGE * varying.diagonal() + 1e-9 * varying.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(ridged, together).T
    fitted = float(((weight @ varying) * weight).sum())
    if min(fitted, variance) < 1e-12:
        return None
    weight *= size / (fitted / layer.out_features) ** 0.5
    layer.weight.copy_(weight)
    if layer.bias is not None:
        layer.bias.copy_(-weight @ mean_x)
    return min(1.0, fitted / variance)


class _Moments:
    """Sums over rows of what a least-squares fit needs, where the layer is."""

    def __init__(self, layer: nn.Linear) -> None:
        zeros = partial(torch.zeros, dtype=torch.double, device=layer.weight.device)
        self.x, self.y = zeros(layer.in_features), zeros(layer.out_features)
        self.xx = zeros(layer.in_features, layer.in_features)
        self.xy = zeros(layer.in_features, layer.out_features)
        self.yy = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += float(y.pow(2).sum())


def first_layer(projector: nn.Module) -> nn.Linear:
    """The linear layer that a projector begins with, behind a pooling or a norm at most."""
    return next(module for module in projector.modules() if isinstance(module, nn.Linear))


def last_layer(projector: nn.Module) -> nn.Linear:
    """The linear layer whose output is the visual tokens."""
    return cast(nn.Linear, projector.last if hasattr(projector, "last") else projector.linear_2)


@contextmanager
def inputs_of(layer: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Within the block, the function that it gives returns what the layer read since the last call, fp32."""
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().float()))

    def taken() -> Tensor:
        taken, seen[:] = torch.cat(seen), []
        return taken

    try:
        yield taken
    finally:
        hook.remove()
