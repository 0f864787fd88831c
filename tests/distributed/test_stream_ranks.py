"""Two ranks on a stream learn what one learns, stop, and go on on another number of ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trials import losses, make_recipe, write

from mm_moslora.config import Recipe, SourceConfig
from mm_moslora.training.training_loop import train

pytestmark = pytest.mark.slow


def test_ranks_learn_the_stream_of_one(parts: dict[str, Path], ranks: Any, tmp_path: Path) -> None:
    lines = parts["records"].read_text().splitlines()
    lines[5] = "{broken"
    (tmp_path / "shards").mkdir()
    for number in range(2):
        (tmp_path / "shards" / f"{number}.jsonl").write_text("\n".join(lines[20 * number : 20 * number + 20]))
    source = SourceConfig(
        path=str(tmp_path / "shards"), streaming=True, image_folder=str(parts["records"].parent / "images")
    )

    def recipe(name: str, micro_batch: int) -> Recipe:
        made = make_recipe(parts, tmp_path / name, "zero2", steps=8, micro_batch=micro_batch)
        return replace(made, data=replace(made.data, train=[source], shuffle_buffer=16, max_bad_share=0.1))

    one = recipe("one", 8)
    train(one)
    files = [write(recipe(name, 4)) for name in ("two", "resumed")]
    ranks.run([files[0], f"{files[1]}@3", files[1]])
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")
    alone = recipe("alone", 8)
    train(alone, stop_at=3)
    again = write(replace(alone, train=replace(alone.train, micro_batch=4)))
    ranks.run([again])
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    rows = (tmp_path / "two" / "quarantine.jsonl").read_text().splitlines()
    assert 1 <= len(rows) <= 3
    assert all('"code": "BAD_JSON"' in row for row in rows)
