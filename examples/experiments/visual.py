#!/usr/bin/env python
"""Visual instruction tuning in small: arms of `mm-moslora compare` on the quickstart's parts and data.

    python examples/experiments/visual.py QUICKSTART OUT

QUICKSTART is the folder of a finished `mm-moslora quickstart` (easy-VQA): its aligned projector is where every arm
begins, so that the arms differ in the second stage alone, as in the paper. Writes a part of its conversations for
training, others for validation, questions of easy-VQA's test half, and the recipe; prints the command. Questions that
are answered by yes or no are left out: they take most of the tokens, and half of them are right by chance.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from commonsense import ARMS, write_recipe

from mm_moslora.config import load_recipe
from mm_moslora.models.processing.llava_processor import IMAGE_TOKEN
from mm_moslora.quickstart.instruction_data import build_easy_vqa

TRAIN, VALIDATION, TEST = 240, 64, 600
"""Pictures to train and to choose rates with, questions to measure."""
YES_NO = ("yes", "no")


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
    records = [kept for row in _read(Path(source.path)) if (kept := without_yes_no(row))["conversations"]]
    drawn = rng.sample(records, min(len(records), TRAIN + VALIDATION))
    images = source.image_folder
    assert tuned.model.vision is not None
    assert images is not None
    files = build_easy_vqa(Path(images), out / "easy-vqa", test_questions=2 * TEST, seed=seed)  # half are open
    _write(out / "train.jsonl", drawn[VALIDATION:])
    _write(out / "validation.jsonl", drawn[:VALIDATION])
    _write(out / "test.jsonl", [row for row in _read(files.test) if row["answer"] not in YES_NO])
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


def without_yes_no(record: dict[str, Any]) -> dict[str, Any]:
    """A conversation without its yes/no questions; the picture stands before the first one left."""
    turns = record["conversations"]
    kept = [pair for pair in zip(turns[::2], turns[1::2], strict=True) if pair[1]["value"] not in YES_NO]
    questions = [question["value"].removeprefix(f"{IMAGE_TOKEN}\n") for question, _ in kept]
    if questions:
        questions[0] = f"{IMAGE_TOKEN}\n{questions[0]}"
    asked = [{**question, "value": text} for (question, _), text in zip(kept, questions, strict=True)]
    return {
        **record,
        "conversations": [turn for pair in zip(asked, (a for _, a in kept), strict=True) for turn in pair],
    }


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Write the data and the recipe; print the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    recipe, task = build(options.quickstart.resolve(), options.out.resolve())
    print(
        f"mm-moslora compare {recipe} --arms {ARMS} --lr 2.5e-4,5e-4,1e-3 --seeds 4 --tasks {task} "
        f"--max-new-tokens 6 --batch-size 64 --output {options.out.resolve() / 'compare'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
