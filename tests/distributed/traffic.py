"""Counts what travels between ranks in each optimiser step: collectives by kind, and bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm_moslora import distributed
from mm_moslora.config import load_recipe
from mm_moslora.training.engine import Engine


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Traffic(TorchDispatchMode):
    """Collectives of torch.distributed in its block; bytes are those of the whole tensor that travels in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = function._schema.name.removeprefix("c10d::").strip("_")
            sizes = [sum(t.numel() * t.element_size() for t in _tensors(arg)) for arg in args]
            if max(sizes) > 64:  # counts and flags of the step are no weights and no gradients
                self.calls[kind] += 1
                self.bytes[kind] += max(sizes)
        return function(*args, **(kwargs or {}))


def train_counting(*arguments: str) -> int:
    """Train each recipe, and leave in its folder what every step sent, as rank 0 saw it."""
    from ranks import train_recipes

    plain = Engine.step
    for argument in arguments:
        found = []

        def counted(self, micro_batches, lr_factor, found=found):
            with Traffic() as traffic:
                result = plain(self, micro_batches, lr_factor)
            trainable = sum(getattr(p, "ds_numel", p.numel()) for g in self.groups for p in g.parameters)
            whole = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
            found.append(
                {"calls": traffic.calls, "bytes": traffic.bytes, "trainable": trainable, "parameters": whole}
            )  # fmt: skip
            return result

        Engine.step = counted
        try:
            code = train_recipes([argument])
        finally:
            Engine.step = plain
        if code:
            return code
        if distributed.is_main():
            (Path(load_recipe(argument).train.output) / "traffic.json").write_text(json.dumps(found))
    return 0
