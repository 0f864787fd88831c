"""The linear probe: what a linear classifier of the frozen features answers, before training and beside a score."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from mm_moslora.cli import run

COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
ASK = "what colour is it?"


def records(folder: Path, count: int, answers=lambda number, colour: colour, ask: str = ASK) -> None:
    """Pictures of three colours: `count` to learn from, 24 to be asked about."""
    rng = random.Random(0)
    (folder / "images").mkdir()
    rows = {"train": [], "test": []}
    for number in range(count + 24):
        colour = list(COLOURS)[number % 3]
        value = tuple(part + rng.randint(-20, 20) for part in COLOURS[colour])
        Image.new("RGB", (32, 32), value).save(folder / "images" / f"{number}.png")
        held_out = number >= count
        says = answers(number, colour)
        asked = ask if not held_out else ASK
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": says}]
        row = {"id": number, "image": f"{number}.png", "conversations": turns}
        if held_out:
            row = {"question_id": number, "image": f"{number}.png", "text": asked, "answer": says}
        rows["test" if held_out else "train"].append(row)
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.fixture
def probe(tmp_path, language_folder, vision_folder, capsys):
    """Probe records; the exit code and what was printed."""

    def call(model: str = "recipe.yaml", **made) -> tuple[int, str]:
        records(tmp_path, made.pop("count", 48), **made)
        (tmp_path / "recipe.yaml").write_text(
            f"model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}\n"
            f"data: {{train: [{{path: {tmp_path}/train.jsonl, image_folder: {tmp_path}/images}}]}}\n"
            f"train: {{output: {tmp_path}/run}}\n"
        )
        words = [f"llava:{tmp_path}/test.jsonl@{tmp_path}/images", "--model", str(tmp_path / model), "--probe"]
        code = run(["eval", "run", *words, "--output", str(tmp_path / "eval")])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def test_a_probe_before_training_scores_what_a_line_can_tell_with_a_learning_curve(probe, tmp_path):
    code, said = probe()
    assert code == 0
    assert "linear probe of the frozen encoder: 100.0 % (95 %" in said
    assert "from 48 training pictures" in said
    assert all(f"from 1/{part}" in said for part in (2, 4))
    assert "All against 1/2 of them: +0.0 points" in said
    assert not (tmp_path / "eval").exists()


@pytest.mark.parametrize(
    ("made", "why"),
    [
        ({"answers": lambda number, colour: "red"}, "nothing to tell apart"),
        ({"count": 3}, "3 training pictures"),
        ({"answers": lambda number, colour: f"{colour} number {number}"}, "answers to a question are no classes"),
        ({"ask": "which colour do you see?"}, "training records ask 0"),
    ],
    ids=["one-class", "three-pictures", "open-answers", "other-questions"],
)
def test_what_a_probe_cannot_tell_is_said_and_not_scored(made, why, probe):
    code, said = probe(**made)
    assert code == 0
    assert "no linear probe" in said
    assert why in said
    assert "%" not in said.partition("no linear probe")[2]


def test_a_model_without_a_recipe_is_refused(probe):
    code, said = probe(model="train.jsonl")
    assert code == 1
    assert "error: " in said
