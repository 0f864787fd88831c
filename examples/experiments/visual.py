#!/usr/bin/env python
"""Visual instruction tuning in small: arms of `mm-moslora compare` on the quickstart's parts and data.

    python examples/experiments/visual.py QUICKSTART OUT

QUICKSTART is the folder of a `mm-moslora quickstart` (easy-VQA) that has begun its second stage. Two sets of pictures
are learnt together and measured apart:

- shapes: a part of the quickstart's conversations, and questions of easy-VQA's test half. Questions that are answered
  by yes or no are left out: they take most of the tokens, and half of them are right by chance;
- stamps: Tux Paint's drawings and cut-out photos, and which kind of thing is shown.

Writes the data and two recipes, and prints two commands. The first aligns a projector on both sets, where every arm
begins, so that the arms differ in the second stage alone, as in the paper; the second compares the arms.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from commonsense import ARMS, write_recipe
from stamps import CATEGORY, build_stamps, fetch_stamps

from mm_moslora.config import SourceConfig, load_recipe
from mm_moslora.models.processing.llava_processor import IMAGE_TOKEN
from mm_moslora.quickstart.instruction_data import build_easy_vqa

TRAIN, VALIDATION, TEST = 256, 48, 300
"""Pictures of shapes to train and to choose rates with, questions to measure."""
STAMPS_TEST, STAMPS_VALIDATION = 0.4, 48
"""Share of the stamps to measure with; number of the others to choose rates with."""
ALIGN_STEPS = 4
"""After the projector is fitted to the answers."""
YES_NO = ("yes", "no")


def build(quickstart: Path, stamps: Path, out: Path, *, seed: int = 0) -> tuple[Path, str]:
    """Write the data, `align.yaml` and `recipe.yaml`.

    Args:
        quickstart: run folder of the quickstart.
        stamps: folder of `stamps.fetch_stamps`.
        out: folder of the experiment.
        seed: chooses conversations and questions.

    Returns:
        The path of `recipe.yaml` and the test tasks.
    """
    aligned, tuned = load_recipe(quickstart / "align"), load_recipe(quickstart / "tune")
    source = tuned.data.train[0]
    rng = random.Random(seed)
    records = [kept for row in _read(Path(source.path)) if (kept := without_yes_no(row))["conversations"]]
    drawn = rng.sample(records, min(len(records), TRAIN + VALIDATION))
    images = source.image_folder
    assert tuned.model.vision is not None
    assert images is not None
    files = build_easy_vqa(Path(images), out / "easy-vqa", test_questions=2 * TEST, seed=seed)  # half are open
    things = build_stamps(stamps, out / "stamps", test_share=STAMPS_TEST, seed=seed)
    kinds = _read(things.align)
    rng.shuffle(kinds)
    learnt = (drawn[VALIDATION:], kinds[STAMPS_VALIDATION:])
    pictures = {row["image"] for row in learnt[0]}
    parts = {
        "align": ([row for row in _read(Path(aligned.data.train[0].path)) if row["image"] in pictures], learnt[1]),
        "train": learnt,
        "validation": (drawn[:VALIDATION], kinds[:STAMPS_VALIDATION]),
        "test": (
            [row for row in _read(files.test) if row["answer"] not in YES_NO],
            [row for row in _read(things.test) if row["text"] == CATEGORY],
        ),
    }
    folders = {"shapes": images, "stamps": str(things.images)}
    for part, sets in parts.items():
        for name, rows in zip(folders, sets, strict=True):
            _write(out / f"{name}_{part}.jsonl", rows)

    def sources(part: str) -> list[SourceConfig]:
        return [SourceConfig(path=str(out / f"{name}_{part}.jsonl"), image_folder=folders[name]) for name in folders]

    first = replace(
        aligned,
        data=replace(aligned.data, train=sources("align")),
        train=replace(aligned.train, output=str(out / "align"), steps=ALIGN_STEPS, zero="none"),
        track=replace(aligned.track, trackers=[]),
    )
    (out / "align.yaml").write_text(first.to_yaml(), encoding="utf-8")

    recipe = write_recipe(
        "visual_small", out / "recipe.yaml",
        {
            "model.language": tuned.model.language,
            "model.vision.name": tuned.model.vision.name,
            "model.vision.image_size": tuned.model.vision.image_size,
            "model.vision.feature_layer": tuned.model.vision.feature_layer,
            "model.projector.weights": str(out / "align" / f"checkpoint-{ALIGN_STEPS:06d}" / "projector.safetensors"),
            "data.train": [asdict(source) for source in sources("train")],
            "data.validation": [asdict(source) for source in sources("validation")],
        },
    )  # fmt: skip
    return recipe, ",".join(f"llava:{out / f'{name}_test.jsonl'}@{folders[name]}" for name in folders)


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
    """Write the data and the recipes; print the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    recipe, tasks = build(options.quickstart.resolve(), fetch_stamps(print), options.out.resolve())
    print(f"mm-moslora train {recipe.with_name('align.yaml')}")
    print(
        f"mm-moslora compare {recipe} --arms {ARMS} --lr 5e-4,1e-3,2e-3 --seeds 6 --tasks {tasks} "
        f"--max-new-tokens 6 --batch-size 64 --output {options.out.resolve() / 'compare'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
