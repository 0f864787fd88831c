"""Prove a merge from files alone: each tensor of the result is the base's, the base's plus the fold, or named.

A merged number is accepted where it is ``W + s B M A`` (DoRA: rescaled) up to one rounding each of the sum, the update
and the factors to the result's dtype u: ``|W' - E| <= 2u (|E| + |D|) + (4u + (R + 4) u32) |B| |M A|``. Where u is as
large as the update itself this says little, so the share of the update that arrived must be 1, too, up to six standard
deviations of that rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mm_moslora.adapters.folder_format import FACTORS_A, MIXER, PREFIX, adapted_path
from mm_moslora.adapters.folders.foreign_formats import AdapterFolder
from mm_moslora.adapters.folders.load_folder import read_folder
from mm_moslora.adapters.folders.weight_files import WeightFiles
from mm_moslora.adapters.name_mapping import exchanged, map_names
from mm_moslora.utils.errors import AdapterError

_UNIT = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True, kw_only=True)
class MergeProof:
    """What each tensor of a merged model is; names are the base's, of `extra` the merged model's."""

    base: tuple[str, ...]
    """Equal to the base, rounded to the result's dtype."""
    folded: tuple[str, ...]
    """Base + fold, or what the adapter keeps whole (`modules_to_save`)."""
    vanished: tuple[str, ...]
    """Of `folded`: the update is below the rounding of the dtype everywhere, so base and result are equal."""
    tied: tuple[str, ...]
    """Not written, and equal in the base to a tensor that is."""
    unmerged: tuple[str, ...]
    """Left as it was, though the adapter changes it."""
    different: dict[str, str]
    """Neither: name -> by how much."""
    lost: tuple[str, ...]
    extra: tuple[str, ...]
    renamed: dict[str, str]
    """Beginnings of names that were exchanged, base -> merged and adapter -> base."""
    largest: float
    """Largest difference from the fold, as a share of its bound."""

    @property
    def proved(self) -> bool:
        """Whether every tensor is accounted for."""
        return not (self.unmerged or self.different or self.lost or self.extra)


@dataclass(frozen=True, kw_only=True)
class _Update:
    """What an adapter does to one tensor: rows ``left @ right``, rescaled by DoRA, or another tensor in its place."""

    left: Tensor | None = None
    right: Tensor | None = None
    magnitude: Tensor | None = None
    whole: Tensor | None = None


@dataclass
class _Sums:
    """What is collected over the blocks of a tensor."""

    equal: bool = True
    moves: bool = False
    largest: float = 0.0
    ratio: float = 0.0
    arrived: float = 0.0
    size: float = 0.0
    noise: float = 0.0


def verify_merge(base: str | Path, adapter: str | Path, merged: str | Path) -> MergeProof:
    """Compare a merged model with its base and its adapter, block by block, without loading a model.

    Args:
        base: folder with safetensors.
        adapter: folder of this package, PEFT (LoRA, rsLoRA, DoRA) or the authors' fork.
        merged: folder with safetensors, of any trainer.

    Raises:
        AdapterError: files that are damaged, or an adapter of another base.
    """
    before, after = WeightFiles(Path(base)), WeightFiles(Path(merged))
    content = read_folder(adapter)
    updates, placed = _updates(content, before, source=str(adapter))
    pairs = map_names(before.shapes, after.shapes, source=str(base), target=str(merged), least=2)
    found: dict[str, list[str]] = {kind: [] for kind in ("base", "folded", "vanished", "unmerged")}
    different: dict[str, str] = {}
    largest = 0.0
    for name in sorted(pairs):
        kind, sums = _compare(before, name, after, pairs[name], updates.get(name))
        if kind in found:
            found[kind].append(name)
            found["folded"] += [name] if kind == "vanished" else []
        else:
            different[name] = kind
        largest = max(largest, sums.ratio if kind == "folded" else 0.0)
    absent = before.shapes.keys() - pairs.keys()
    tied = {name for name in absent if before.twin(name, pairs)}
    surplus = after.shapes.keys() - set(pairs.values())
    extra = {name for name in surplus if not after.twin(name, pairs.values())}
    return MergeProof(
        **{kind: tuple(names) for kind, names in found.items()}, different=different, largest=largest,
        tied=tuple(sorted(tied)), lost=tuple(sorted(absent - tied)), extra=tuple(sorted(extra)),
        renamed=exchanged(pairs) | exchanged(placed),
    )  # fmt: skip


def modules_in(base: str | Path, adapter: str | Path) -> dict[str, str]:
    """The modules that an adapter adapts -> their names in a model's files; refused as by `verify_merge`."""
    return _updates(read_folder(adapter), WeightFiles(Path(base)), source=str(adapter))[1]


def _updates(content: AdapterFolder, base: WeightFiles, *, source: str) -> tuple[dict[str, _Update], dict[str, str]]:
    """What the adapter does, by names of the base, and which of its modules is which of the base's."""
    config, tensors = content.config, dict(content.tensors)
    updates: dict[str, _Update] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name in content.tensors:
        path = adapted_path(name)
        if path is None:
            continue
        suffix = next(suffix for suffix in FACTORS_A if name.endswith(suffix))
        start = f"{PREFIX}{path}"
        A, B = tensors.pop(name).float(), tensors.pop(f"{start}{suffix.replace('_A', '_B')}").float()
        mixer = tensors.pop(f"{start}{MIXER}", None)
        inner = (A.flatten(1) if mixer is None else mixer.float() @ A.flatten(1)) * config.scaling_for(path)
        left, right = B.flatten(1), inner
        if "embedding" in suffix or config.fan_in_fan_out:
            left, right = inner.T, B.flatten(1).T
        ends = (".lora_magnitude_vector.weight", ".lora_magnitude_vector")
        magnitude = next((tensors.pop(f"{start}{end}") for end in ends if f"{start}{end}" in tensors), None)
        if magnitude is not None and left is inner.T:
            raise AdapterError(f"{source}: DoRA of {path}, whose weight is transposed, cannot be verified from files.")
        updates[path] = _Update(left=left, right=right, magnitude=magnitude)
        shapes[path] = (len(left), *(A.shape[1:] if A.ndim > 2 else right.shape[1:]))
        bias = tensors.pop(f"{start}.lora_B.bias", None)
        if bias is not None:
            updates[f"{path}.bias"] = _Update(
                left=bias.float()[:, None] * config.scaling_for(path), right=torch.ones(1, 1)
            )
    modules = {name.removesuffix(".weight"): shape for name, shape in base.shapes.items() if name.endswith(".weight")}
    placed = map_names(shapes, modules, source=source, target=str(base.folder))
    if lost := shapes.keys() - placed.keys():
        path = min(lost)
        raise AdapterError(
            f"{source} adapts {len(lost)} modules that {base.folder} lacks, the first is {path!r} "
            f"{list(shapes[path])}. Give the base that the adapter was made for."
        )
    named = {f"{placed[path]}.weight": updates[path] for path in shapes}
    biases = {path: path.removesuffix(".bias") for path in updates.keys() - shapes.keys()}
    named |= {f"{placed[owner]}.bias": updates[path] for path, owner in biases.items()}
    rest = {name.removeprefix(PREFIX): value for name, value in tensors.items() if ".base_layer." not in name}
    kept = map_names(
        {name: tuple(value.shape) for name, value in rest.items()}, base.shapes, source=source,
        target=str(base.folder), least=2,
    )  # fmt: skip
    if unknown := rest.keys() - kept.keys():
        raise AdapterError(f"{source} holds {min(unknown)!r}, of which {base.folder} has nothing.")
    return named | {kept[name]: _Update(whole=value) for name, value in rest.items()}, placed


@torch.no_grad()
def _compare(
    base: WeightFiles, name: str, merged: WeightFiles, other: str, update: _Update | None
) -> tuple[str, _Sums]:
    """The list of `MergeProof` that a tensor belongs to, or by how much it differs."""
    sums = _Sums()
    for (start, W), (_, V) in zip(base.blocks(name), merged.blocks(other), strict=True):
        if not W.is_floating_point():
            sums.equal &= torch.equal(W, V)
            continue
        sums.equal &= torch.equal(W.to(V.dtype), V)
        _add(sums, start, W.float(), V, update)
    share = sums.arrived / sums.size if sums.size else 1.0
    sd = math.sqrt(sums.noise) / sums.size if sums.size else 0.0
    if update is None:
        return ("base" if sums.equal else f"largest difference {sums.largest:.3g}"), sums
    if sums.equal:
        return ("unmerged" if sums.moves else "vanished"), sums
    if sums.ratio <= 1 and abs(share - 1) <= 6 * sd + 1e-3:
        return "folded", sums
    return f"largest difference from base + fold {sums.largest:.3g}, {share:.1%} of the update arrived", sums


def _add(sums: _Sums, start: int, W: Tensor, V: Tensor, update: _Update | None) -> None:
    expected, change, bound, unit = W, None, torch.zeros(()), torch.finfo(V.dtype).eps / 2
    if update is not None and update.whole is not None:
        expected = update.whole[start : start + len(W)].float() if W.ndim else update.whole.float()
    elif update is not None and update.left is not None and update.right is not None:
        left, right = update.left[start : start + len(W)], update.right
        product, reach = (left @ right).reshape(W.shape), (left.abs() @ right.abs()).reshape(W.shape)
        expected = W + product
        if update.magnitude is not None:
            rows = update.magnitude.flatten()[start : start + len(W)].float()
            scale = (rows / expected.flatten(1).norm(dim=1)).reshape(-1, *[1] * (W.ndim - 1))
            expected, reach = expected * scale, reach * scale.abs()
        change = expected - W
        factor = 4 * unit + (len(right) + 4) * _UNIT
        bound = factor * (reach if update.magnitude is None else reach + expected.abs())
    off = (V.float() - expected).abs()
    bound = bound + 2 * unit * (expected.abs() + (0 if change is None else change.abs()))
    worst = off.max() if off.numel() else torch.zeros(())
    sums.largest = max(sums.largest, float(worst)) if worst == worst else math.nan  # NaN is a difference
    ratio = float((off / bound.clamp_min(torch.finfo(torch.float32).tiny)).max()) if off.numel() else 0.0
    sums.ratio = max(sums.ratio, ratio) if ratio == ratio else math.inf
    sums.moves |= not torch.equal(expected.to(V.dtype), W.to(V.dtype))
    if change is not None:
        sums.arrived += float(((V.float() - W) * change).sum(dtype=torch.float64))
        sums.size += float(change.square().sum(dtype=torch.float64))
        sums.noise += float((bound * change).square().sum(dtype=torch.float64)) / 3
