"""Optimisers by their names in recipes: what each keeps and needs. `training/engine/optimizers.py` builds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OptimizerName = Literal["adamw", "adamw_8bit", "muon"]

_BLOCKS = 2 * 4 / 256
"""Bytes of the largest value of every block, of two states: a block has 256 values."""


@dataclass(frozen=True, kw_only=True)
class OptimizerTraits:
    """What is known of an optimiser without importing it."""

    state_bytes: float
    """Of its state, per trained value; masters are not counted."""
    package: str = ""
    """Distribution that has it, and its name for imports; empty: torch."""
    whole_because: str = ""
    """Why it cannot step the flat parts of parameters that ZeRO-1 to 3 give a rank; empty: it can."""


OPTIMIZERS: dict[str, OptimizerTraits] = {
    "adamw": OptimizerTraits(state_bytes=8),
    "adamw_8bit": OptimizerTraits(
        state_bytes=2 + _BLOCKS, package="bitsandbytes",
        whole_because="its blocks are of whole parameters, so that any number of ranks reads a checkpoint",
    ),
    "muon": OptimizerTraits(
        state_bytes=4, whole_because="it orthogonalises whole matrices",
    ),
}  # fmt: skip
"""`optim.optimizer`; the names are those of transformers' `optim`, where it has one."""
