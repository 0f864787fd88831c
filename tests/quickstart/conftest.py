"""A small easy-VQA."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mm_moslora.quickstart.instruction_data import COLORS, SHAPES


@pytest.fixture(scope="session")
def easy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small easy-VQA: the same files, made up of a few pictures."""
    root, rng = tmp_path_factory.mktemp("easy"), random.Random(0)
    for half, count in (("train", 60), ("test", 40)):
        (root / half / "images").mkdir(parents=True)
        rows = []
        for index in range(count):
            color, shape = rng.choice(COLORS), rng.choice(SHAPES)
            Image.new("RGB", (8, 8), color).save(root / half / "images" / f"{index}.png")
            rows += [["what color is the shape?", color, index], ["what shape is present?", shape, index]]
            for asked in rng.sample(SHAPES, 2):
                rows.append([f"is there a {asked}?", "yes" if asked == shape else "no", index])
                rows.append([f"is no {asked} present?", "no" if asked == shape else "yes", index])
            for named in rng.sample(COLORS, 2):
                rows.append([f"is there a {named} shape?", "yes" if named == color else "no", index])
        (root / half / "questions.json").write_text(json.dumps(rows))
    return root
