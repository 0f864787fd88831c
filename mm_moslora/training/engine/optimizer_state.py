"""Optimiser state that does not know how it was split: masters and moments as named pieces of flat parameters.

Every engine tells which pieces of which parameters this rank holds. Each rank writes its own pieces as safetensors, and
any number of ranks on any ZeRO stage reads from all files what it needs, so the state of two ranks on ZeRO-2 continues
on four ranks on ZeRO-3, or in plain torch. Nothing here needs pickle.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_moslora.utils.errors import CheckpointError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
TENSORS, DETAILS = "optimizer.safetensors", "optimizer.json"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some consecutive elements of one parameter that this rank keeps the state of.

    All tensors are flat views of equal length into what the optimiser uses; writing to them changes it.
    """

    name: str
    """Parameter name in the engine's module."""
    start: int
    """First element, in the flattened parameter."""
    master: Tensor
    """fp32 values."""
    moments: dict[str, Tensor]
    """Adam's `exp_avg` and `exp_avg_sq`."""
    step: Tensor
    """Adam's step count; pieces of one flat group share it."""


def adam_state(optimizer: torch.optim.Optimizer, tensor: Tensor) -> dict[str, Tensor]:
    """Adam's state of one tensor, made as Adam makes it where there is none yet."""
    state = optimizer.state[tensor]
    if "step" not in state:
        state["step"] = torch.tensor(0.0)
        for kind in MOMENTS:
            state[kind] = torch.zeros_like(tensor, memory_format=torch.preserve_format)
    return state


@dataclass(kw_only=True)
class HostState:
    """A copy of this rank's pieces in main memory: what a checkpoint writes while training goes on."""

    tensors: dict[str, Tensor]
    """`KIND.START.NAME` to flat values."""
    steps: dict[str, float]
    """Adam's step count by parameter name."""
    scaler: dict[str, float] = field(default_factory=dict)
    """Dynamic loss scale (fp16)."""

    @classmethod
    def copy_of(cls, pieces: Iterable[Piece], *, scaler: dict[str, float]) -> HostState:
        """Copy pieces; the copy shares no memory with the optimiser."""
        state = cls(tensors={}, steps={}, scaler=scaler)
        for piece in pieces:
            for kind, value in {MASTER: piece.master, **piece.moments}.items():
                state.tensors[f"{kind}.{piece.start}.{piece.name}"] = value.detach().to("cpu", copy=True).contiguous()
            state.steps[piece.name] = float(piece.step)
        return state

    @property
    def bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def write(self, folder: Path) -> None:
        """Write both files into a folder that exists."""
        save_file(self.tensors, folder / TENSORS)
        details = {"steps": self.steps, "scaler": self.scaler}
        (folder / DETAILS).write_text(json.dumps(details), encoding="utf-8")


class StoredState:
    """The pieces that all ranks of a checkpoint wrote, as whole parameters. Use it in a `with` block.

    Args:
        folders: one per rank that wrote.

    Raises:
        CheckpointError: a folder without state.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = list(folders)
        self.steps: dict[str, float] = {}
        self.scaler: dict[str, float] = {}
        self._places: dict[tuple[str, str], list[tuple[int, Any, str]]] = defaultdict(list)
        self._files = ExitStack()
        if not self.folders:
            raise CheckpointError("The checkpoint holds no trainer state, expected one folder per rank.")

    def __enter__(self) -> StoredState:
        for folder in self.folders:
            try:
                details = json.loads((folder / DETAILS).read_text(encoding="utf-8"))
                file = self._files.enter_context(safe_open(folder / TENSORS, framework="pt"))
            except OSError as error:
                raise CheckpointError(f"{folder} lacks trainer state ({error}). Choose another checkpoint.") from error
            self.steps |= details["steps"]
            self.scaler = self.scaler or details["scaler"]
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                kind, start, name = key.split(".", 2)
                self._places[kind, name].append((int(start), file, key))
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    @property
    def names(self) -> set[str]:
        """Parameters that the checkpoint has state of."""
        return {name for kind, name in self._places if kind == MASTER}

    def whole(self, kind: str, name: str) -> Tensor:
        """One flat fp32 tensor, put together from its pieces.

        Raises:
            CheckpointError: a gap between pieces.
        """
        places = sorted(self._places[kind, name], key=lambda place: place[0])
        parts, end = [], 0
        for start, file, key in places:
            if start != end:
                raise CheckpointError(
                    f"{self.folders[0].parent}: {kind} of {name} has a gap at element {end}, the next piece starts at "
                    f"{start}. The checkpoint is incomplete; choose another one."
                )
            parts.append(file.get_tensor(key))
            end += parts[-1].numel()
        return torch.cat(parts)

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write stored values into an engine's pieces.

        Raises:
            CheckpointError: a parameter that the checkpoint lacks, or of another size.
        """
        groups: dict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            if piece.name not in self.names:
                raise CheckpointError(f"{self.folders[0].parent} has no state of {piece.name}, which trains.")
            for kind, target in {MASTER: piece.master, **piece.moments}.items():
                value = self.whole(kind, piece.name)
                if piece.start + target.numel() > value.numel():
                    raise CheckpointError(
                        f"{self.folders[0].parent}: {piece.name} has {value.numel()} elements, expected at least "
                        f"{piece.start + target.numel()}."
                    )
                target.copy_(value.narrow(0, piece.start, target.numel()))
            groups[id(piece.step)].append(piece)
        for members in groups.values():
            # A flat group has one count; parameters that were ever stepped alone may differ, the most steps win.
            members[0].step.fill_(max(self.steps.get(piece.name, 0.0) for piece in members))
