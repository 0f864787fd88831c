"""The paper's experiments: valid recipes, valid question sets, splits without overlap."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_lowercase
from types import ModuleType

import pytest
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from mm_moslora.config import load_recipe

EXPERIMENTS = Path(__file__).parents[2] / "examples" / "experiments"


def script(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, EXPERIMENTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path, sys.modules[name] = list(sys.path), module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]
    sys.path[:] = path


@pytest.fixture(scope="module")
def commonsense():
    yield from script("commonsense")


@pytest.fixture(scope="module")
def visual():
    yield from script("visual")


@pytest.fixture(scope="module")
def visual_owners():
    yield from script("visual_owners")


@pytest.fixture(scope="module")
def subject():
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    yield from script("subject")


@pytest.mark.parametrize("recipe", sorted((EXPERIMENTS / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_recipes(recipe: Path):
    assert load_recipe(recipe).name.replace("-", "_") == recipe.stem


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_small_test_sets_share_no_question_with_training(commonsense, tmp_path: Path):
    folders = list(commonsense.KINDS)
    stamps = [(f"A thing number {n}.", folders[n % len(folders)]) for n in range(60)]
    words = [(f"word{chr(97 + n // 26)}{chr(97 + n % 26)}", f"meaning {n}") for n in range(60)]
    commonsense.build_small(stamps, words, tmp_path, kinds=(20, 8, 16), definitions=(20, 8, 16))
    taught = {turn["value"] for row in rows(tmp_path / "train.jsonl") for turn in row["conversations"][::2]}
    chosen_by = {turn["value"] for row in rows(tmp_path / "validation.jsonl") for turn in row["conversations"][::2]}
    assert len(taught) == 40
    for name in commonsense.SETS:
        asked = rows(tmp_path / f"{name}.jsonl")
        assert len(asked) == 16
        assert not {row["text"] for row in asked} & (taught | chosen_by)
    kinds = rows(tmp_path / "kind.jsonl")
    assert set() < {row["answer"] for row in kinds} <= set(commonsense.KINDS.values())
    assert all(row["answer"] in row["text"] for row in rows(tmp_path / "word.jsonl"))
    assert not taught & chosen_by


def test_the_visual_experiment_takes_two_sets_of_pictures_and_held_out_questions(visual, tmp_path: Path):
    quickstart = tmp_path / "quickstart"
    for stage in ("data", "align", "tune"):
        (quickstart / stage).mkdir(parents=True)
    said = ("<image>\nis it red?", "no", "what is it?", "circle", "is it blue?", "yes", "what color is it?", "blue")
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    taught = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(700)]
    taught.append({"id": "yes-no", "image": "0.png", "conversations": turns[:2]})
    described = [{**row, "conversations": turns[:2]} for row in taught[:-1]]
    for half, count in (("train", 10), ("test", 900)):
        asked = [["what color is the shape?", "blue", n] for n in range(count)]
        asked += [["what shape is shown?", "circle", n] for n in range(10)]
        asked += [[f"is there a {('circle', 'square')[n % 2]}?", ("no", "yes")[n % 2], n] for n in range(count)]
        (tmp_path / half).mkdir()
        (tmp_path / half / "questions.json").write_text(json.dumps(asked))
    for stage, records in (("align", described), ("tune", taught)):
        file = quickstart / "data" / f"{stage}.jsonl"
        file.write_text("\n".join(map(json.dumps, records)))
        source = json.dumps([{"path": str(file), "image_folder": str(tmp_path)}])
        recipe = load_recipe(f"quickstart_{stage}", [f"data.train={source}"])
        (quickstart / stage / "config.yaml").write_text(recipe.to_yaml())
    stamps = stamps_folder(tmp_path / "stamps", kinds=("animals", "symbols", "vehicles"), each=90)
    path, tasks = visual.build(quickstart, stamps, tmp_path / "out")
    recipe, aligned = load_recipe(path), load_recipe(path.with_name("align.yaml"))

    def names(sources) -> list[set[str]]:
        return [{row["image"] for row in rows(Path(source.path))} for source in sources]

    learnt, validated, first = names(recipe.data.train), names(recipe.data.validation), names(aligned.data.train)
    assert learnt == first, "the projector sees the pictures that the arms learn from, and no others"
    assert [len(part) for part in validated] == [visual.VALIDATION, visual.STAMPS_VALIDATION]
    assert len(learnt[0]) == visual.TRAIN
    kept = ["<image>\nwhat is it?", "circle", "what color is it?", "blue"]
    shapes = rows(Path(recipe.data.train[0].path))
    assert all([turn["value"] for turn in row["conversations"]] == kept for row in shapes)
    assert recipe.model.projector.weights.startswith(aligned.train.output)
    questions = [rows(Path(task.removeprefix("llava:").split("@")[0])) for task in tasks.split(",")]
    assert ({row["answer"] for row in questions[0]}, len(questions[0])) == ({"blue", "circle"}, visual.TEST)
    assert all(row["image"].startswith("test/") for row in questions[0])
    assert {row["answer"] for row in questions[1]} == {"animal", "symbol", "vehicle"}
    assert {row["text"] for row in questions[1]} == {"What kind of thing is this?"}
    for part, other, asked in zip(learnt, validated, questions, strict=True):
        assert not part & other
        assert not (part | other) & {row["image"] for row in asked}


def stamps_folder(folder: Path, *, kinds: Sequence[str] = ("animals", "vehicles"), each: int = 30) -> Path:
    draw = random.Random(0)
    for kind in kinds:
        (folder / kind).mkdir(parents=True)
        for number in range(each):
            blocks = Image.frombytes("RGB", (4, 4), draw.randbytes(48)).resize((20, 16), Image.Resampling.NEAREST)
            blocks.convert("RGBA").save(folder / kind / f"{number}.png")
            (folder / kind / f"{number}.txt").write_text("".join(draw.choices(ascii_lowercase, k=12)))
    return folder


@pytest.mark.slow
def test_the_subject_experiment_runs_stops_and_continues(subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stamps = stamps_folder(tmp_path / "stamps")
    shape = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetModel(shape).save_pretrained(tmp_path / "encoder")
    plan = subject.Plan(
        arms="lora,moslora:orthogonal,peft:MISS@r=4", rates=(1e-2,), seeds=2, subjects=2, base_steps=2, steps=2,
        batch=4, pictures=2, sampling_steps=2,
    )  # fmt: skip
    out = tmp_path / "out"
    assert subject.run(plan, stamps, tmp_path / "encoder", out, limit_minutes=0.0) == 75
    assert subject.run(plan, stamps, tmp_path / "encoder", out) == 0
    said = capsys.readouterr().out
    assert "Before tuning" in said
    results = json.loads((out / "results.json").read_text())
    assert results["runs"] == {"over": 9, "planned": 9} | results["runs"]
    lora, mixed, peft = results["arms"]
    assert mixed["cost"]["trainable"] > lora["cost"]["trainable"] > peft["cost"]["trainable"] > 0
    assert [seed["status"] for seed in mixed["seeds"]] == ["ok", "ok"]
    capsys.readouterr()
    assert subject.run(plan, stamps, tmp_path / "encoder", out) == 0
    assert "[1/" not in capsys.readouterr().out  # nothing is done twice
