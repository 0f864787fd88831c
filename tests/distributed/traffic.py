"""Counts what travels between ranks in each optimiser step, and the peak memory of a rank while a run is prepared."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mm_moslora.config import load_recipe
from mm_moslora.models.memory_efficient import decoder_layers
from mm_moslora.training import deepspeed_presets
from mm_moslora.training.engine import TrainingEngine
from mm_moslora.training.run_setup import prepare
from mm_moslora.training.supervision.run_folder import exclusive
from mm_moslora.utils import distributed


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
        self.calls, self.bytes, self.sizes = Counter(), Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            kind = function._schema.name.removeprefix("c10d::").strip("_")
            sizes = [sum(t.numel() * t.element_size() for t in _tensors(arg)) for arg in args]
            if max(sizes) > 64:  # counts and flags of the step are no weights and no gradients
                self.calls[kind] += 1
                self.bytes[kind] += max(sizes)
                self.sizes[max(sizes)] += 1
        return function(*args, **(kwargs or {}))


def _sharded(module) -> int:
    """Bytes of a module's weights that ZeRO-3 cuts up; the small ones stay whole."""
    shards = [p for p in module.parameters() if hasattr(p, "ds_id") and not p.ds_persist]
    return sum(p.ds_numel * p.element_size() for p in shards)


def train_counting(*arguments: str) -> int:
    """Train each recipe, and leave in its folder what the last step sent, as rank 0 saw it."""
    from ranks import train_recipes

    deepspeed_presets.PERSISTENT = 100  # less than an adapter, as 10^6 is to large ranks
    plain, mlp, passes = TrainingEngine.queue, decoder_layers.gated_mlp, Counter()

    def noted(*args):
        passes["lean"] += 1
        return mlp(*args)

    decoder_layers.gated_mlp = noted
    for argument in arguments:
        found, recipe = [], load_recipe(argument)

        def counted(self, *arguments, found=found, recipe=recipe, **options):
            found.append(None)
            if len(found) < recipe.train.steps:  # the first ones also sort out what must be fetched when
                return plain(self, *arguments, **options)
            passes.clear()
            with Traffic() as traffic:
                result = plain(self, *arguments, **options)
            trainable = sum(getattr(p, "ds_numel", p.numel()) for g in self.groups for p in g.parameters)
            whole = sum(getattr(p, "ds_numel", p.numel()) for p in self.module.parameters())
            lora = [p for name, p in self.module.named_parameters() if "lora_" in name]
            cut_up = sum(not getattr(p, "ds_persist", True) for p in lora)
            layer = next(m for name, m in self.module.named_modules() if name.endswith("language_model.layers.0"))
            mixers = self.trainable_state(only=".lora_mixer", keep=distributed.is_main())
            assert 0 < len(mixers) < len(lora)
            assert {value.is_meta for value in mixers.values()} == {not distributed.is_main()}
            shapes = {name: getattr(p, "ds_shape", p.shape) for name, p in self.module.named_parameters()}
            assert all(value.shape == shapes[f"model.{name}"] for name, value in mixers.items())
            found[-1] = {
                "calls": traffic.calls, "bytes": traffic.bytes, "sizes": traffic.sizes, "trainable": trainable,
                "parameters": whole, "layer": _sharded(layer), "lean_passes": passes["lean"],
                "adapters": len(lora), "adapters_cut_up": cut_up,
            }  # fmt: skip
            return result

        TrainingEngine.queue = counted
        try:
            code = train_recipes([argument])
        finally:
            TrainingEngine.queue = plain
        if code:
            return code
        assert torch.nn.functional.linear is torch._C._nn.linear, "ZeRO-3's is left behind"
        if distributed.is_main():
            (Path(recipe.train.output) / "traffic.json").write_text(json.dumps(found[-1]))
    return 0


def _mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def prepare_measured(*arguments: str) -> int:
    """Prepare each recipe, and leave in its folder how many MiB every rank had at most beyond what it had before."""
    distributed.join()
    for argument in arguments:
        recipe = load_recipe(argument)
        with exclusive(Path(recipe.train.output)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = _mib("VmRSS")
            run = prepare(recipe)
            grown = _mib("VmHWM") - before
            run.engine.close()
            peaks = [row[0] for row in distributed.table_over_ranks([grown])]
        if distributed.is_main():
            (Path(recipe.train.output) / "peaks.json").write_text(json.dumps(peaks))
        del run
    return 0
