#!/usr/bin/env python
"""Visual instruction tuning in small, made so hard that weak adapters fall behind: whose thing is it?

    python examples/experiments/visual_owners.py OUT [--train 960] [--questions 320] [--seed 0]

64 of Tux Paint's drawings and cut-out photos, eight of each of eight kinds, are drawn anew for every picture: larger or
smaller, mirrored or not, turned, at another place, on another colour. Two things are asked:

- kind: which of eight kinds of thing is shown, which the language model can nearly read in the visual tokens;
- owner: whose it is. Sixteen people own four things each, by lot, so that nothing but training tells whose a thing is.

Training and test show the same things, in pictures that are all different. The projector learns the things' sentences
in a first stage, and is frozen in the second: what is learned about owners has to go into the adapters.

Writes the pictures, the questions and two recipes, and prints two commands: the first aligns the projector, where every
arm begins; the second compares the arms.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from commonsense import KINDS, write_recipe
from stamps import fetch_stamps, find_stamps, same_thing, square

from mm_moslora.models.processing.llava_processor import IMAGE_TOKEN

ARMS = "lora,lora@rank=1@alpha=2"
EACH = 8
"""Things of a kind."""
OWNERS = (
    "Adam", "Alice", "Anna", "Ben", "Carl", "Daniel", "Frank", "George", "Henry", "Jack", "Jane", "Maria", "Mary",
    "Peter", "Rose", "Tom",
)  # fmt: skip
"""Names that are one token of SmolLM2's."""
TRAIN, VALIDATION, TEST = 960, 128, 320
"""Pictures to train with and to choose rates with, with both questions each; questions of a set to measure."""
ALIGN = 256
"""Pictures whose sentences the projector is fitted to and trained on."""
ALIGN_STEPS = 4
SIDE = 56
"""Of a picture, pixels."""
SMALLEST, TURN = 0.7, 20
"""Side of a thing, as a share of the picture's; degrees it is turned by at most."""
LONGEST = 40
"""Characters of a sentence."""
KIND, OWNER, SENTENCE = "What kind of thing is this?", "Who owns this?", "What is shown?"


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A stamp, and what is said of it."""

    cutout: Image.Image
    sentence: str
    kind: str
    owner: str

    @property
    def answers(self) -> dict[str, str]:
        """Answer by question."""
        return {KIND: self.kind, OWNER: self.owner, SENTENCE: self.sentence}


def choose(stamps: Path, rng: random.Random) -> list[Thing]:
    """Draw `EACH` things of every kind, no two of them alike, and their owners.

    Args:
        stamps: folder of `stamps.fetch_stamps`.
        rng: draws.
    """
    found = [s for s in find_stamps(stamps) if s.folder in KINDS and len(s.sentence) <= LONGEST]
    groups = same_thing(found, {stamp.name: square(stamp.path) for stamp in found})
    rng.shuffle(groups)
    counts: Counter[str] = Counter()
    chosen = []
    for stamp, *_ in groups:
        counts[stamp.folder] += 1
        if counts[stamp.folder] <= EACH:
            chosen.append(stamp)
    owners = [OWNERS[number % len(OWNERS)] for number in range(len(chosen))]
    rng.shuffle(owners)
    return [
        Thing(cutout=cut_out(stamp.path), sentence=stamp.sentence, kind=KINDS[stamp.folder], owner=owner)
        for stamp, owner in zip(chosen, owners, strict=True)
    ]


def cut_out(path: Path) -> Image.Image:
    """The visible part of a stamp, with its transparency."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    return picture.crop(picture.getchannel("A").getbbox())


def draw(thing: Thing, rng: random.Random) -> Image.Image:
    """A picture of a thing: its size, place, turn and side, and the light colour behind it, are by lot."""
    cut = thing.cutout.rotate(rng.uniform(-TURN, TURN), Image.Resampling.BICUBIC, expand=True)
    if rng.random() < 0.5:
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = SIDE * rng.uniform(SMALLEST, 1) / max(cut.size)
    width, height = (max(1, round(length * scale)) for length in cut.size)
    cut = cut.resize((width, height), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(rng.randrange(200, 256) for _ in range(3)))
    picture.paste(cut, (rng.randint(0, SIDE - width), rng.randint(0, SIDE - height)), cut)
    return picture


def build(
    stamps: Path, models: dict[str, str], out: Path, *, train: int = TRAIN, questions: int = TEST, seed: int = 0
) -> tuple[Path, str]:
    """Write pictures, questions, `align.yaml` and `recipe.yaml`.

    Args:
        stamps: folder of `stamps.fetch_stamps`.
        models: recipe keys of the language model and the vision encoder.
        out: folder of the experiment.
        train: pictures to train with.
        questions: of a set, to measure.
        seed: draws the things, their owners and the pictures.

    Returns:
        The path of `recipe.yaml` and the test tasks.
    """
    rng = random.Random(f"owners {seed}")
    things, images = choose(stamps, rng), out / "images"
    images.mkdir(parents=True, exist_ok=True)

    def pictures(part: str, count: int, asked: Sequence[str]) -> list[dict[str, Any]]:
        """Conversations about new pictures; the things take turns, so that all are shown equally often."""
        records = []
        for number in range(count):
            thing, name = things[number % len(things)], f"{part}-{number}"
            draw(thing, rng).save(images / f"{name}.png")
            order = rng.sample(asked, len(asked))
            turns = [(f"{IMAGE_TOKEN}\n" * (n == 0) + text, thing.answers[text]) for n, text in enumerate(order)]
            said = [
                {"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)
            ]
            records.append({"id": name, "image": f"{name}.png", "conversations": said})
        return records

    for part, count, asked in (
        ("align", ALIGN, [SENTENCE]),
        ("train", train, [KIND, OWNER]),
        ("validation", VALIDATION, [KIND, OWNER]),
    ):
        _write(out / f"{part}.jsonl", pictures(part, count, asked))
    for name, text in (("kind", KIND), ("owner", OWNER)):
        rows = [
            {"question_id": row["id"], "image": row["image"], "text": text, "answer": row["conversations"][1]["value"]}
            for row in pictures(name, questions, [text])
        ]
        _write(out / f"{name}.jsonl", rows)

    def source(part: str) -> list[dict[str, str]]:
        return [{"path": str(out / f"{part}.jsonl"), "image_folder": str(images)}]

    shared = {**models, "model.vision.image_size": SIDE, "model.vision.feature_cache": str(out / "features")}
    write_recipe(
        "visual_small", out / "align.yaml",
        {
            **shared,
            "model.language_mode": "frozen",
            "model.projector.fit_to_answers": True,
            "data.train": source("align"),
            "optim.projector_lr": 5e-4,
            "train.global_batch": 32,
            "train.micro_batch": 32,
            "train.steps": ALIGN_STEPS,
            "train.output": str(out / "align"),
        },
    )  # fmt: skip
    recipe = write_recipe(
        "visual_small", out / "recipe.yaml",
        {
            **shared,
            "model.projector.weights": str(out / "align" / f"checkpoint-{ALIGN_STEPS:06d}" / "projector.safetensors"),
            "model.projector.mode": "frozen",
            "data.train": source("train"),
            "data.validation": source("validation"),
        },
    )  # fmt: skip
    return recipe, ",".join(f"llava:{out / name}.jsonl@{images}" for name in ("kind", "owner"))


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Write the data and the recipes; print the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=TRAIN, help=f"pictures to train with (default: {TRAIN})")
    parser.add_argument("--questions", type=int, default=TEST, help=f"of a set, to measure (default: {TEST})")
    parser.add_argument("--seed", type=int, default=0, help="another one draws things, owners and pictures anew")
    options = parser.parse_args()
    for name in ("train", "questions"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: expected 1 or more")
    out = options.out.resolve()
    from mm_moslora.quickstart import model_assets

    models = {
        "model.language": str(model_assets.language_model(print)),
        "model.vision.name": str(model_assets.dinov2(print)),
    }
    stamps = fetch_stamps(print)
    recipe, tasks = build(stamps, models, out, train=options.train, questions=options.questions, seed=options.seed)
    print(f"mm-moslora train {recipe.with_name('align.yaml')}")
    print(
        f"mm-moslora compare {recipe} --arms {ARMS} --lr 2e-3,4e-3,8e-3 --seeds 3 --tasks {tasks} "
        f"--max-new-tokens 6 --batch-size 64 --output {out / 'compare'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
