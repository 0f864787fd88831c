"""Optimisers by their names in recipes: what each keeps and needs. `training/engine/optimizers.py` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "adamw_torch_8bit", "muon", "schedule_free_adamw"
]

_BLOCKS = 2 * 4 / 256
"""Bytes of the largest value of every block, of two states: a block has 256 values."""


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """What is known of an optimiser without importing it."""

    state_bytes: float
    """Of its state, per trained value; masters are not counted."""
    package: str = ""
    """Distribution that has it; empty: torch."""
    module: str = ""
    """Its name for imports."""
    paged: bool = False
    """Whether the state may leave the GPU for main memory."""
    whole_because: str = ""
    """Why it cannot step the flat parts of parameters that ZeRO-1 to 3 give a rank; empty: it can."""
    off_manifold_because: str = ""
    """Why it cannot keep factors orthonormal; empty: it can."""
    takes_schedule: bool = True
    """Whether the learning rate may decay after the warm-up."""


_FLAT = "its {} are of whole parameters, so that any number of ranks reads a checkpoint"

OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(state_bytes=8),
    "adamw_8bit": OptimizerTraits(
        state_bytes=2 + _BLOCKS, package="bitsandbytes", module="bitsandbytes", whole_because=_FLAT.format("blocks"),
    ),
    "paged_adamw_32bit": OptimizerTraits(
        state_bytes=8, package="bitsandbytes", module="bitsandbytes", paged=True,
        whole_because=_FLAT.format("states"),
    ),
    "paged_adamw_8bit": OptimizerTraits(
        state_bytes=2 + _BLOCKS, package="bitsandbytes", module="bitsandbytes", paged=True,
        whole_because=_FLAT.format("blocks"),
    ),
    "adamw_torch_8bit": OptimizerTraits(
        state_bytes=2 + _BLOCKS, package="torchao", module="torchao", whole_because=_FLAT.format("blocks"),
    ),
    "muon": OptimizerTraits(
        state_bytes=4, whole_because="it orthogonalises whole matrices",
        off_manifold_because="its step is orthogonalised again after the gradient was converted",
    ),
    "schedule_free_adamw": OptimizerTraits(
        state_bytes=8, package="schedulefree", module="schedulefree",
        whole_because="its average is taken of whole parameters",
        off_manifold_because="the average of orthonormal matrices is not orthonormal", takes_schedule=False,
    ),
}  # fmt: skip
"""`optim.optimizer`; the names are those of transformers' `optim`, where it has one."""
