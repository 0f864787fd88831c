"""One tiny network per layer type that can carry an adapter, for the behaviour list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D


class _Net(nn.Module):
    """Two blocks of the same kind under `layers`, then a head; with optional gradient checkpointing of the blocks."""

    def __init__(self, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make(index) for index in range(2))
        self.head = nn.Linear(8, 3)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.head(x.mean(dim=(-1, -2)) if x.ndim == 4 else x)


class _Block(nn.Module):
    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.target = target

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.target(x))


class _EmbeddingBlock(nn.Module):
    """Looks up token ids that the first channel of its input stands for, so that two of them can be stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Embedding(11, 8)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x[..., 0].detach().abs() * 7).long() % 11
        return x + self.target(ids)


@dataclass(frozen=True, kw_only=True)
class LayerType:
    """How to build and feed one kind of layer."""

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...]


LAYERS = {
    "Linear": LayerType(make=lambda _: _Block(nn.Linear(8, 8)), shape=(4, 5, 8)),
    "Conv1D": LayerType(make=lambda _: _Block(Conv1D(8, 8)), shape=(4, 5, 8)),
    "Embedding": LayerType(make=lambda _: _EmbeddingBlock(), shape=(4, 5, 8)),
    "Conv2d-3x3": LayerType(make=lambda _: _Block(nn.Conv2d(8, 8, 3, padding=1)), shape=(4, 8, 3, 3)),
}


def network(kind: str, dtype: torch.dtype = torch.float32) -> _Net:
    """The network of one layer type; equal weights at every call."""
    torch.manual_seed(0)
    net = _Net(LAYERS[kind].make).to(dtype).eval()
    if kind.startswith("Conv2d"):
        # Averaging over positions leaves the channels for the head.
        net.head.weight.data.mul_(3)
    return net


def inputs(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch of four."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(LAYERS[kind].shape, generator=generator).to(dtype)
