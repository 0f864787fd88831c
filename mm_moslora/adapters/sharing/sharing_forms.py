"""Forms of sharing: which adapted layers share a factor, as a partition of them into groups.

Shapes: A ``[R, D_in]``, M ``[R, R]``, B ``[D_out, R]``. A group has one A (or one A and one B), and every layer of it a
mixer of its own. Nothing else changes: each layer's update is ``s B M A``, and folds, merges and is saved as such.

`SHARINGS` holds the forms by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from mm_moslora.adapters.mixer import read_spec
from mm_moslora.adapters.sharing.input_probe import layers_by_input
from mm_moslora.utils.errors import AdapterError

ALONE = "none"
"""`share` of an adapter whose layers share nothing."""


class Sharing:
    """A form: which factors a group shares, and which layers are a group."""

    factors: ClassVar[tuple[str, ...]] = ("A",)
    """A, B or both."""
    size_means: ClassVar[str] = ""
    """What SIZE is in the option ``share="name:SIZE"``; empty: the form takes none."""

    def __init__(self, spec: str, size: int) -> None:
        """Use `sharing_named`; `size` is the number in the option, 0 without one."""
        self.spec, self.size = spec, size

    def groups(self, model: nn.Module, paths: Sequence[str]) -> list[list[str]]:
        """The groups; layers that are left out, and groups of one, share nothing.

        Args:
            model: the base model, with or without adapters, maybe on the meta device.
            paths: module paths of the adapted linear layers, in the model's order.
        """
        raise NotImplementedError

    def partition(self, model: nn.Module, paths: Sequence[str]) -> dict[str, list[list[str]]]:
        """The groups by factor; see `groups`.

        Raises:
            AdapterError: no two layers are in one group.
        """
        groups = [group for group in self.groups(model, paths) if len(group) > 1]
        if not groups:
            raise AdapterError(
                f"share is {self.spec!r}, but no two of the {len(paths)} adapted linear layers are in one group (the "
                f"first: {', '.join(paths[:3]) or 'there is none'}), so there is nothing to share. Name more targets, "
                "or leave share out."
            )
        return dict.fromkeys(self.factors, groups)


class SameInputs(Sharing):
    """Layers that read the same tensor share A: query, key and value; gate and up. Each has an M and a B."""

    def groups(self, model: nn.Module, paths: Sequence[str]) -> list[list[str]]:
        """What layers read, a pass through a copy of the model without weights shows."""
        try:
            return layers_by_input(model, paths)
        except AdapterError as error:
            raise AdapterError(f"share is {self.spec!r}, which needs to know what layers read. {error}") from error


class SuccessiveLayers(Sharing):
    """SIZE successive layers of one kind share A and B: q_proj of the layers 0 to 3, say. Each has an M."""

    factors = ("A", "B")
    size_means = "how many successive layers of the model share"

    def __init__(self, spec: str, size: int) -> None:
        """Refuse groups of one."""
        super().__init__(spec, size)
        if size < 2:
            raise AdapterError(f"share is {spec!r}: one layer alone shares nothing. Give at least 2.")

    def groups(self, model: nn.Module, paths: Sequence[str]) -> list[list[str]]:
        """By the first number in a path that counts layers of equal widths; in a UNet it counts within a block."""
        kinds: dict[str, list[str]] = {}
        for path in paths:
            kinds.setdefault(".".join("*" if part.isdigit() else part for part in path.split(".")), []).append(path)
        groups: list[list[str]] = []
        for kind, layers in kinds.items():
            ways = [self._counted(layers, at) for at, part in enumerate(kind.split(".")) if part == "*"]
            equal = (way for way in ways if all(len({_widths(model, path) for path in group}) == 1 for group in way))
            groups += next(equal, ways[0] if ways else [])
        return groups

    def _counted(self, layers: Sequence[str], at: int) -> list[list[str]]:
        """SIZE after SIZE of the layers whose paths are the same but for part `at`."""
        lists: dict[tuple[str, ...], list[str]] = {}
        for path in layers:
            parts = path.split(".")
            lists.setdefault((*parts[:at], *parts[at + 1 :]), []).append(path)
        return [one[start : start + self.size] for one in lists.values() for start in range(0, len(one), self.size)]


def _widths(model: nn.Module, path: str) -> tuple[int, int]:
    """Input and output width of an adapted layer, or of a linear layer."""
    layer: Any = model.get_submodule(path)
    return layer.in_features, layer.out_features


SHARINGS: dict[str, type[Sharing]] = {"inputs": SameInputs, "layers": SuccessiveLayers}
"""Forms by their names in `share`; add those of your own."""


def sharing_named(spec: str) -> Sharing | None:
    """The form that an option names: `name`, or `name:SIZE` where the form takes a size; None for `none`.

    Raises:
        AdapterError: no such form, or a size that it lacks or does not take.
    """
    if spec == ALONE:
        return None
    form, size = read_spec(spec, SHARINGS, "share", table="SHARINGS", others=(ALONE,))
    return form(spec, size)
