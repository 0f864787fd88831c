#!/usr/bin/env python
"""Visual instruction tuning in small: arms of `mm-moslora compare` on the quickstart's parts and data.

    python examples/experiments/visual.py QUICKSTART OUT

QUICKSTART is the folder of a finished `mm-moslora quickstart` (easy-VQA): its aligned projector is where every arm
begins, so that the arms differ in the second stage alone, as in the paper. Writes a part of its conversations for
training, others for validation, and the recipe; prints the command.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from commonsense import write_recipe

from mm_moslora.config import load_recipe

TRAIN, VALIDATION, TEST = 240, 32, 200
"""Pictures to train and to choose rates with, questions to measure."""


def build(quickstart: Path, out: Path, *, seed: int = 0) -> tuple[Path, str]:
    """Write data and recipe.

    Args:
        quickstart: run folder of the quickstart.
        out: folder of the experiment.
        seed: chooses conversations and questions.

    Returns:
        The recipe's path and the test task.
    """
    tuned = load_recipe(quickstart / "tune")
    source = tuned.data.train[0]
    rng = random.Random(seed)
    records = Path(source.path).read_text(encoding="utf-8").splitlines()
    drawn = rng.sample(records, min(len(records), TRAIN + VALIDATION))
    questions = [json.loads(line) for line in (quickstart / "data" / "test.jsonl").read_text().splitlines()]
    out.mkdir(parents=True, exist_ok=True)
    (out / "train.jsonl").write_text("\n".join(drawn[VALIDATION:]) + "\n", encoding="utf-8")
    (out / "validation.jsonl").write_text("\n".join(drawn[:VALIDATION]) + "\n", encoding="utf-8")
    asked = rng.sample(questions, min(len(questions), TEST))
    (out / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), encoding="utf-8")
    images = source.image_folder
    assert tuned.model.vision is not None
    recipe = write_recipe(
        "visual_small", out / "recipe.yaml",
        {
            "model.language": tuned.model.language,
            "model.vision.name": tuned.model.vision.name,
            "model.vision.image_size": tuned.model.vision.image_size,
            "model.vision.feature_layer": tuned.model.vision.feature_layer,
            "model.projector.weights": tuned.model.projector.weights,
            "data.train": [{"path": str(out / "train.jsonl"), "image_folder": images}],
            "data.validation": [{"path": str(out / "validation.jsonl"), "image_folder": images}],
        },
    )  # fmt: skip
    return recipe, f"llava:{out / 'test.jsonl'}@{images}"


def main() -> int:
    """Write the data and the recipe; print the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    recipe, task = build(options.quickstart.resolve(), options.out.resolve())
    print(
        f"mm-moslora compare {recipe} --arms lora,moslora:orthogonal,moslora:kaiming --lr 5e-4,2e-3,8e-3 --seeds 3 "
        f"--tasks {task} --max-new-tokens 6 --output {options.out.resolve() / 'compare'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
