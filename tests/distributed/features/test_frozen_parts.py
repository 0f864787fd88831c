"""Steps without a gradient for what trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny import make_records
from trials import losses, make_recipe, write

from mm_moslora.config import Recipe

pytestmark = pytest.mark.slow


def test_a_text_alone_gives_frozen_parts_no_gradient_and_no_error(parts, ranks, tmp_path):
    """Micro-batches in which the projector would have no gradient."""
    mixed = parts | {"records": make_records(tmp_path / "records", 8, text_only_every=2)}

    def recipe(name: str, zero: str) -> Recipe:
        return make_recipe(mixed, tmp_path / name, zero, order="sequential", micro_batch=1, global_batch=4)

    align = [recipe(f"align-{zero}", zero) for zero in ("zero2", "none")]
    align = [replace(item, model=replace(item.model, language_mode="frozen")) for item in align]
    ranks.run([*map(write, align)], ranks=1)
    assert losses(tmp_path / "align-zero2") == pytest.approx(losses(tmp_path / "align-none"), rel=1e-5)
