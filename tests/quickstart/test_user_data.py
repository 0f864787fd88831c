"""`mm-moslora init`: questions and a recipe from a folder of pictures or a file of records, however they look."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mm_moslora_eval.eval_commands import training_answers
from mm_moslora_eval.protocol.task_registry import get_task
from PIL import Image
from tiny import make_vision
from vlm_runs import make_language_of
from vlms import make_vlm

from mm_moslora import cli
from mm_moslora.config import load_recipe
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.assembly import load_parts
from mm_moslora.models.export.gguf_model import export_gguf
from mm_moslora.models.load_model import load
from mm_moslora.quickstart import ready_made_recipe, user_recipe
from mm_moslora.quickstart.user_data import TURNS, read_own
from mm_moslora.quickstart.user_recipe import initialise
from mm_moslora.training.training_loop import train
from mm_moslora.utils import file_locks
from mm_moslora.utils.errors import ConfigError, DataError, ModelError


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(root: Path, **counts: int) -> Path:
    for number, (label, count) in enumerate(counts.items()):
        for index in range(count):
            picture(root / label / f"{index}.png", 1000 * number + index)
    return root


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def made(source: Path, out: Path, **options: Any) -> str:
    return initialise(source, out, **{"parts": "hub"} | options)


class TestFolder:
    def test_no_picture_is_on_both_sides_and_every_yes_no_question_is_balanced(self, tmp_path: Path) -> None:
        made(photos(tmp_path / "photos", cat=40, golden_retriever=20, tea_pot=10), tmp_path / "my")
        train, test = read(tmp_path / "my" / "train.jsonl"), read(tmp_path / "my" / "test.jsonl")
        learned, held_out = {row["image"] for row in train}, {row["image"] for row in test}
        assert not learned & held_out
        assert len(learned | held_out) == 70
        assert len(held_out) == 14
        answers: dict[str, Counter[str]] = defaultdict(Counter)
        for row in test:
            if row["category"] == "yes_no":
                answers[row["text"]][row["answer"]] += 1
        assert all(counts["yes"] == counts["no"] for counts in answers.values())
        assert 'Does the picture show "golden retriever"?' in answers
        for row in test:
            label = row["image"].split("/")[0].replace("_", " ")
            if row["category"] == "open":
                assert row["answer"] == label
            else:
                assert (row["answer"] == "yes") == (f'"{label}"' in row["text"])

    def test_conversations_say_the_truth_and_begin_with_any_kind_of_question(self, tmp_path: Path) -> None:
        data = read_own(photos(tmp_path, cat=40, dog=10, bird=10))
        first, of_text = Counter[str](), defaultdict(Counter)
        for row in data.train:
            label = row["image"].split("/")[0]
            turns = row["conversations"]
            assert turns[0]["value"].startswith("<image>\n")
            answers = [turn["value"] for turn in turns[1::2]]
            assert len(answers) == TURNS
            assert len({turn["value"].removeprefix("<image>\n") for turn in turns[::2]}) == len(answers)
            assert sorted(answers) == sorted([label, "yes", "no"])
            for question, answer in zip(turns[::2], turns[1::2], strict=True):
                if "Does" in question["value"]:
                    assert (answer["value"] == "yes") == (f'"{label}"' in question["value"])
                    of_text[question["value"].removeprefix("<image>\n")][answer["value"]] += 1
                else:
                    assert answer["value"] == label
            first[turns[1]["value"]] += 1
        assert {"yes", "no", "cat", "dog"} <= first.keys(), "every kind of question must be answered from the picture"
        assert not data.repeated
        for counts in of_text.values():
            assert 0.45 < counts["yes"] / counts.total() < 0.55

    @pytest.mark.parametrize(
        "counts",
        [{"cat": 2, "dog": 2}, {"cat": 12, "dog": 9}, {"cat": 40, "dog": 10, "bird": 10}, {"cat": 60, "dog": 3}],
    )
    def test_no_two_conversations_are_alike_and_an_epoch_talks_about_all_classes_alike(
        self, tmp_path: Path, counts: dict[str, int]
    ) -> None:
        data = read_own(photos(tmp_path, **counts))
        parts = {1: data.train, **data.repeated}
        everything = [row for rows in parts.values() for row in rows]
        told = [json.dumps([row["image"], row["conversations"]]) for row in everything]
        assert len(set(told)) == len(told) == len({row["id"] for row in everything})
        assert len({row["image"] for row in everything}) == data.train_pictures, "every picture is learned from"
        seen, answers = Counter[str](), defaultdict(Counter)
        for times, rows in parts.items():
            for row in rows:
                seen[row["image"].split("/")[0]] += times
                turns = [turn["value"].removeprefix("<image>\n") for turn in row["conversations"]]
                for text, answer in zip(turns[::2], turns[1::2], strict=True):
                    answers[text][answer] += times
        assert max(seen.values()) <= 1.1 * min(seen.values())
        assert sum(seen.values()) == data.epoch
        asked = [counted for counted in answers.values() if counted.keys() <= {"yes", "no"}]
        assert asked
        for counted in asked:
            assert 0.45 < counted["yes"] / counted.total() < 0.55

    def test_a_small_class_is_repeated_by_weight(self, tmp_path: Path) -> None:
        made(photos(tmp_path / "photos", cat=60, dog=3), tmp_path / "my")
        sources = load_recipe(tmp_path / "my" / "recipe.yaml").data.train
        assert [source.weight for source in sources] == [1, 4]
        about = [{row["image"].split("/")[0] for row in read(Path(source.path))} for source in sources]
        assert about == [{"cat"}, {"dog"}]

    def test_the_same_folder_gives_the_same_files(self, tmp_path: Path) -> None:
        source = photos(tmp_path / "photos", cat=10, dog=10)
        for name in ("a", "b"):
            made(source, tmp_path / name)
        for file in ("train.jsonl", "test.jsonl"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()

    def test_what_is_no_usable_picture_is_left_out_and_named(self, tmp_path: Path) -> None:
        source = photos(tmp_path / "photos", cat=6, dog=6)
        (source / "cat" / "broken.png").write_bytes(b"no picture")
        (source / "cat" / "empty.jpg").touch()
        (source / "dog" / "copy.png").write_bytes((source / "dog" / "0.png").read_bytes())
        (source / "dog" / "away.png").symlink_to(picture(tmp_path / "elsewhere.png", 7))
        os.mkfifo(source / "dog" / "pipe.png")
        (source / ".hidden").mkdir()
        picture(source / ".hidden" / "0.png", 8)
        picture(source / "cat" / "deep er" / "down" / "0 ä.png", 9)
        picture(source / "loose.png", 10)
        for name in ("a.txt", "b.TXT", "c.heic"):
            (source / "dog" / name).write_text("words")
        (source / "bird").mkdir()
        (source / "bird" / "0.heic").write_text("words")
        data = read_own(source)
        names = {row["image"] for row in [*data.train, *data.test]}
        assert len(names) == 13
        assert "cat/deep er/down/0 ä.png" in names
        faults, notes = "\n".join(data.faults), "\n".join(data.notes)
        assert (len(data.faults), len(data.notes)) == (4, 3)
        assert data.notes[0] == "bird: gives no picture, so nothing is asked about it"
        assert all(name in faults for name in ("broken.png", "empty.jpg", "away.png", "pipe.png"))
        assert "copy.png" in notes
        assert "4 files of other kinds: 2 .heic, 2 .txt" in notes
        with pytest.raises(DataError, match=r"^4 of 17 pictures or records of .* cannot be used \(24 %.*broken\.png"):
            made(source, tmp_path / "my")
        assert not (tmp_path / "my").exists()
        assert "names all 7" in made(source, tmp_path / "my", most_left_out=0.5)
        rows = [json.loads(line)["reason"] for line in (tmp_path / "my" / "left_out.jsonl").read_text().splitlines()]
        assert rows == [*data.faults, *data.notes]

    @pytest.mark.parametrize("name", ["a.png", "a.bmp"])
    def test_one_picture_in_two_classes_is_an_error_that_names_both(self, name: str, tmp_path: Path) -> None:
        source = photos(tmp_path / "photos", cat=4, dog=4)
        with Image.open(source / "cat" / "0.png") as image:
            image.save(source / "dog" / name)
        with pytest.raises(DataError, match=rf"dog/{name} and cat/0\.png in .* are the same picture in two classes"):
            read_own(source)

    def test_links_out_of_the_folder_are_followed_on_request(self, tmp_path: Path) -> None:
        source = photos(tmp_path / "photos", cat=4, dog=4)
        elsewhere = photos(tmp_path / "elsewhere", ant=1, bee=1, bird=4)
        (source / "dog" / "away.png").symlink_to(picture(elsewhere / "one.png", 77))
        (source / "bird").symlink_to(elsewhere / "bird")
        (source / "cat" / "again").symlink_to(source)
        refused = read_own(source)
        assert {row["image"].split("/")[0] for row in [*refused.train, *refused.test]} == {"cat", "dog"}
        assert sum("--follow-links" in fault for fault in refused.faults) == 3

        told = made(source, tmp_path / "my", follow_links=True)
        assert "Left out" not in told
        [recipe_source] = load_recipe(tmp_path / "my" / "recipe.yaml").data.train
        assert recipe_source.follow_links
        documents = get_task(str(tmp_path / "my" / "test.yaml")).load().documents
        assert all(document.problem is None for document in documents)
        shown = {Path(image).relative_to(source) for document in documents for image in document.images}
        learned = {Path(row["image"]) for row in read(tmp_path / "my" / "train.jsonl")}
        assert len(shown | learned) == 13
        assert {path.parts[0] for path in learned} == {"cat", "dog", "bird"}
        command = shlex.split(told.splitlines()[-2])
        assert training_answers(*(word for name, word in itertools.pairwise(command) if name == "--train-answers"))

    @pytest.mark.parametrize(
        ("counts", "message"),
        [({}, "no readable pictures"), ({"cat": 9}, "1 classes"), ({"cat": 1, "dog": 1}, "2 readable pictures"),
         ({"train": 5, "test": 5}, "splits of a data set")],
    )  # fmt: skip
    def test_a_folder_that_cannot_teach_anything_is_refused(
        self, tmp_path: Path, counts: dict[str, int], message: str
    ) -> None:
        (tmp_path / "photos").mkdir()
        with pytest.raises(DataError, match=message):
            made(photos(tmp_path / "photos", **counts), tmp_path / "my")
        assert not (tmp_path / "my").exists()

    @pytest.mark.parametrize("names", [("Cat", "cat"), ("a.", "a"), ("caf\xe9", "cafe\u0301"), ("x_Y", "x y")])
    def test_two_classes_that_are_one_answer_are_refused(self, tmp_path: Path, names: tuple[str, str]) -> None:
        with pytest.raises(DataError, match="one answer") as caught:
            read_own(photos(tmp_path, **dict.fromkeys([*names, "dog"], 4)))
        assert all(ascii(name) in str(caught.value) for name in names)

    @pytest.mark.parametrize("name", ["cat\x7f", "cat\n", "_.", "<image>"])
    def test_a_class_that_no_question_can_hold_is_named(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(DataError, match="not a class name") as caught:
            read_own(photos(tmp_path, **{name: 4, "dog": 4}))
        assert ascii(name) in str(caught.value)


def records(root: Path, count: int = 10, answer: str = "red") -> Path:
    rows = []
    for index in range(count):
        picture(root / "images" / f"{index}.png", index)
        turns = [("<image>\nWhat is it?", answer), ("Is it red?", "yes")]
        rows.append(
            {"id": str(index), "image": f"images/{index}.png", "conversations": [
                {"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair, strict=True)
            ]}
        )  # fmt: skip
    file = root / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def row(image: str, identity: int, /, **answers: str) -> dict[str, Any]:
    turns = [
        {"from": who, "value": text}
        for pair in answers.items()
        for who, text in zip(("human", "gpt"), pair, strict=True)
    ]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": str(identity), "image": image, "conversations": turns}


def written(root: Path, rows: list[dict[str, Any]]) -> Path:
    for item in rows:
        picture(root / item["image"], int(item["id"]))
    file = root / "mine.jsonl"
    file.write_text("".join(json.dumps(item) + "\n" for item in rows))
    return file


class TestFile:
    def test_records_of_a_held_out_picture_all_are_questions(self, tmp_path: Path) -> None:
        file = records(tmp_path)
        more = [{"id": "text", "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]}]
        more += [json.loads(line) | {"id": f"again-{number}"} for number, line in enumerate(file.open())]
        more.append(
            {"id": "two", "image": ["images/0.png", "images/1.png"], "conversations": [
                {"from": "human", "value": "<image><image>\nAlike?"}, {"from": "gpt", "value": "no"}]}
        )  # fmt: skip
        file.write_text(file.read_text() + "".join(json.dumps(row) + "\n" for row in more) + "{broken\n")
        data = read_own(file)
        learned = {name for row in data.train for name in np.atleast_1d(row.get("image", []))}
        held_out = {row["image"] for row in data.test}
        assert len(held_out) == 2
        assert not learned & held_out
        assert {row["text"]: row["category"] for row in data.test} == {"What is it?": "open", "Is it red?": "yes_no"}
        assert any("image" not in row for row in data.train)
        assert sum("BAD_JSON" in fault for fault in data.faults) == 1

    def test_the_same_picture_under_two_names_is_on_one_side(self, tmp_path: Path) -> None:
        file = records(tmp_path)
        rows = [json.loads(line) for line in file.open()]
        for index in range(10):
            (tmp_path / "images" / f"copy-{index}.png").write_bytes((tmp_path / "images" / f"{index}.png").read_bytes())
        rows += [row | {"id": f"copy-{row['id']}", "image": f"images/copy-{row['id']}.png"} for row in rows]
        link = "data:image/png;base64," + base64.b64encode((tmp_path / "images" / "0.png").read_bytes()).decode()
        pairs = [["images/0.png", f"images/copy-{index}.png"] for index in range(1, 10)]
        rows += [
            {"id": f"pair-{number}", "image": pair, "conversations": [
                {"from": "human", "value": "<image>" * len(pair) + "Alike?"}, {"from": "gpt", "value": "no"}]}
            for number, pair in enumerate([*pairs, [link]])
        ]  # fmt: skip
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def content(name: str) -> bytes:
            return base64.b64decode(name.split(",")[1]) if "," in name else (tmp_path / name).read_bytes()

        for seed in range(8):
            data = read_own(file, seed=seed)
            learned = {content(name) for row in data.train for name in np.atleast_1d(row["image"]).tolist()}
            held_out = {content(row["image"]) for row in data.test}
            assert not learned & held_out
            assert len(held_out) == data.test_pictures == 2
            assert data.train_pictures == 8
            used = len(data.train) + 2 * data.test_pictures
            assert str(data.notes).count("with several pictures show a held-out") == (used < len(rows))
            assert len(data.test) == 4, "questions that are asked again under another name are one question"

    def test_copies_of_one_picture_are_too_few(self, tmp_path: Path) -> None:
        file = records(tmp_path, 4)
        for path in (tmp_path / "images").iterdir():
            path.write_bytes((tmp_path / "images" / "0.png").read_bytes())
        with pytest.raises(DataError, match="has 1 different pictures"):
            read_own(file)

    def test_sentences_are_scored_as_captions_apart_from_short_answers(self, tmp_path: Path) -> None:
        file = records(tmp_path, answer="A small red square on a white wall.")
        told = made(file, tmp_path / "both")
        assert [row["text"] for row in read(tmp_path / "both" / "test.jsonl")] == ["Is it red?"] * 2
        assert "2 questions and 2 for a sentence about 2 held-out pictures" in told
        assert "test.jsonl@" in told
        captions = get_task(str(tmp_path / "both" / "captions.yaml"))
        assert captions.aggregation == "caption"
        assert [document.question for document in captions.load().documents] == ["What is it?"] * 2

        rows = [json.loads(line) for line in file.open()]
        for row in rows:
            row["conversations"] = row["conversations"][:2]
        twice = [row | {"id": row["id"] + "b"} for row in rows]
        file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *twice]))
        told = made(file, tmp_path / "sentences")
        assert "captions.yaml" in told
        assert "test.jsonl" not in told
        assert "--baselines" not in told
        assert not (tmp_path / "sentences" / "test.jsonl").exists()
        documents = get_task(str(tmp_path / "sentences" / "captions.yaml")).load().documents
        assert len(documents) == 2
        assert all(len(document.answers) == 2 for document in documents)

    def test_thinking_before_an_answer_is_no_part_of_the_reference(self, tmp_path: Path) -> None:
        """Evaluation removes it from the model's answer; a short answer stays one, however long its thinking."""
        thought = "<think>\nA long thought about the colours that are here.\n</think>\n\nred"
        file = records(tmp_path, answer=thought)
        told = made(file, tmp_path / "my")
        assert {row["answer"] for row in read(tmp_path / "my" / "test.jsonl")} == {"red", "yes"}
        assert not (tmp_path / "my" / "captions.jsonl").exists()
        assert '"What is it?" has the answer "red" 10 of 10 times' in told
        assert thought in (tmp_path / "my" / "train.jsonl").read_text().replace("\\n", "\n")
        questions = [row | {"answer": thought} for row in read(tmp_path / "my" / "test.jsonl")]
        (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
        documents = get_task(f"llava:{tmp_path / 'own.jsonl'}@{tmp_path}").load().documents
        assert {document.answers for document in documents} == {("red",)}

    @pytest.mark.parametrize("seed", range(4))
    def test_every_answer_is_held_out_as_often_as_its_share(self, tmp_path: Path, seed: int) -> None:
        kinds = ["thing"] * 60 + ["dog"] * 24 + ["bird"] * 12 + ["fish"] * 4
        rows = []
        for number, kind in enumerate(kinds):
            answers = {"kind": kind, "Is it alive?": "no" if kind == "thing" else "yes", "Even?": str(number % 2)}
            rows.append(
                row(f"{number}.png", number, **answers, **{f"Is it {number}?": "yes", "Name it.": f"n{number}"})
            )
        data = read_own(written(tmp_path, rows), seed=seed)
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for question in data.test:
            counts[question["text"]][question["answer"]] += 1
        assert abs(counts["Is it alive?"]["no"] - 12) <= 1
        for kind, share in {"thing": 12, "dog": 4.8, "bird": 2.4, "fish": 0.8}.items():
            assert abs(counts["kind"][kind] - share) <= 1
        assert abs(counts["Even?"]["0"] - 10) <= 1

    def test_the_baselines_learn_from_all_training_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The printed command, with a model that knows nothing."""
        told = made(photos(tmp_path / "photos", cat=60, dog=3), tmp_path / "my")
        command = shlex.split(told.splitlines()[-2])
        files = [word.split("@")[0] for name, word in itertools.pairwise(command) if name == "--train-answers"]
        assert files == [str(tmp_path / "my" / "train.jsonl"), str(tmp_path / "my" / "train-x4.jsonl")]
        answers = training_answers(*(word for name, word in itertools.pairwise(command) if name == "--train-answers"))
        assert {"cat", "dog"} <= {answer.answer for answer in answers}
        assert len(answers) == sum(len(item["conversations"]) // 2 for file in files for item in read(Path(file)))

    def test_a_file_without_usable_pictures_is_refused_with_the_first_reason(self, tmp_path: Path) -> None:
        file = records(tmp_path)
        for path in (tmp_path / "images").iterdir():
            path.unlink()
        with pytest.raises(DataError, match="10 could not be used, the first: IMAGE_MISSING"):
            read_own(file)
        with pytest.raises(DataError, match="does not exist"):
            read_own(tmp_path / "nothing.jsonl")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("of_file", [False, True], ids=["folder", "file"])
def test_truncated_pictures_are_left_out_and_named(tmp_path: Path, suffix: str, of_file: bool) -> None:
    """Most are: a few could happen to be among those that are held out."""
    rows = [row(f"{label}/{number}{suffix}", number, kind=label) for number in range(10) for label in ("cat", "dog")]
    file = written(tmp_path / "photos", [item | {"id": str(number)} for number, item in enumerate(rows)])
    cut = sorted((tmp_path / "photos").rglob(f"[0-6]{suffix}"))
    for path in cut:
        data = path.read_bytes()
        path.write_bytes(data[: 60 if suffix == ".png" else -60])  # the headers stay
    made(file if of_file else tmp_path / "photos", tmp_path / "my", most_left_out=1)
    used = {item["image"] for name in ("train", "test") for item in read(tmp_path / "my" / f"{name}.jsonl")}
    assert used == {item["image"] for item in rows} - {f"{path.parent.name}/{path.name}" for path in cut}
    reasons = [item["reason"] for item in read(tmp_path / "my" / "left_out.jsonl")]
    assert all(sum(str(path) in reason for reason in reasons) == 1 for path in cut)


class TestRecipe:
    def test_it_loads_from_anywhere_and_says_why(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(photos(tmp_path / "my photos", cat=10, dog=10).parent)
        assert cli.run(["init", "my photos", "a b", "--parts", "hub"]) == 0
        monkeypatch.chdir("/")
        recipe = load_recipe(tmp_path / "a b" / "recipe.yaml")
        [source] = recipe.data.train
        assert Path(source.path).resolve() == tmp_path / "a b" / "train.jsonl"
        assert source.image_folder == str(tmp_path / "my photos")
        assert Path(recipe.train.output).resolve() == tmp_path / "a b" / "run"
        text = (tmp_path / "a b" / "recipe.yaml").read_text()
        assert text.count("#") > 10
        assert max(map(len, text.splitlines())) <= 120 + len(str(tmp_path))

    @pytest.mark.parametrize(("count", "held_out"), [(2, 1), (3, 1), (4, 2), (7, 2), (20, 4)])
    def test_the_wrong_picture_is_asked_for_where_two_are_held_out(
        self, tmp_path: Path, count: int, held_out: int
    ) -> None:
        told = made(records(tmp_path, count), tmp_path / "my")
        assert len({row["image"] for row in read(tmp_path / "my" / "test.jsonl")}) == held_out
        assert ("--modes own,wrong,blind" in told) == (held_out > 1)
        assert ("Only 1 picture is held out" in told) == (held_out == 1)

    def test_nothing_of_the_user_is_overwritten(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        source, out = photos(tmp_path / "photos", cat=10, dog=10), tmp_path / "my"
        assert cli.run(["init", str(source), str(out), "--parts", "hub"]) == 0
        (out / "recipe.yaml").write_text("changed by hand")
        assert cli.run(["init", str(source), str(out), "--parts", "hub"]) == 1
        assert "not empty" in capsys.readouterr().err
        assert (out / "recipe.yaml").read_text() == "changed by hand"
        assert sorted(path.name for path in out.iterdir()) == ["recipe.yaml", "test.jsonl", "train.jsonl"]

    def test_of_two_at_once_one_is_refused_and_the_other_is_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sources = [photos(tmp_path / name, cat=10, dog=10) for name in ("photos", "others")]
        together = threading.Barrier(2)
        building = file_locks.building

        def slowly(*args: Any, **options: Any) -> Any:
            time.sleep(0.2)
            return building(*args, **options)

        def attempt(source: Path) -> str:
            try:
                return made(source, tmp_path / "my")
            except ConfigError as error:
                return str(error)

        monkeypatch.setattr(file_locks, "building", slowly)
        real = user_recipe.read_own
        monkeypatch.setattr(user_recipe, "read_own", lambda *a, **o: (real(*a, **o), together.wait(60))[0])
        with ThreadPoolExecutor(2) as pool:
            told = list(pool.map(attempt, sources))
        refused = ["not empty" in text for text in told]
        assert sorted(refused) == [False, True], told
        winner = sources[refused.index(False)]
        assert load_recipe(tmp_path / "my" / "recipe.yaml").data.train[0].image_folder == str(winner)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["my", "others", "photos"]
        assert sorted(path.name for path in (tmp_path / "my").iterdir()) == ["recipe.yaml", "test.jsonl", "train.jsonl"]

    @pytest.mark.parametrize("output", [".", ".."])
    def test_a_folder_without_a_name_of_its_own_is_refused(
        self, output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = photos(tmp_path / "photos", cat=10, dog=10)
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        with pytest.raises(ConfigError, match=r"Name a new folder, such as .*first"):
            made(source, Path(output))

    def test_it_is_not_put_among_the_pictures(self, tmp_path: Path) -> None:
        source = photos(tmp_path, cat=10, dog=10)
        with pytest.raises(ConfigError, match="among the pictures"):
            made(source, source / "cat" / "my")


class TestReadyMade:
    @pytest.fixture(scope="class")
    def model(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        return make_vlm(tmp_path_factory.mktemp("model") / "qwen", "qwen2_5_vl")

    def test_its_recipe_trains_as_it_stands(self, model: Path, tmp_path: Path) -> None:
        said = made(photos(tmp_path / "photos", cat=4, dog=3), tmp_path / "my", parts="quickstart", vlm=str(model))
        recipe = load_recipe(str(tmp_path / "my" / "recipe.yaml"))
        assert (recipe.model.vlm, recipe.model.quantisation) == (str(model), "none")
        assert f"{recipe.train.steps} steps" in said
        short = replace(recipe, train=replace(recipe.train, steps=2))
        assert train(short).finished
        assert not (tmp_path / "my" / "run" / "quarantine.jsonl").read_text()
        parts = load_parts(recipe.model, weights="none")
        data = TrainingSet(recipe.data.train, ConversationEncoder.of(parts), parts.image_processing, config=recipe.data)
        assert data.truncated == 0
        assert recipe.data.max_length <= max(128, 1.5 * max(data.lengths))

    def test_it_fits_the_card(self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source = photos(tmp_path / "photos", cat=4, dog=3)
        asked: list[str] = []

        def planned(recipe: Any, card: Any, size: Any) -> Any:
            asked.append(recipe.model.quantisation)
            option = SimpleNamespace(micro_batch=2, checkpointing=True, peak=30 * 2**30)
            return SimpleNamespace(best=option if len(asked) == 1 else None, options=[option])

        monkeypatch.setattr(ready_made_recipe, "plan", planned)
        made(source, tmp_path / "a", parts="quickstart", vlm=str(model), gpu="RTX4090")
        recipe = load_recipe(str(tmp_path / "a" / "recipe.yaml"))
        assert (recipe.train.micro_batch, recipe.train.gradient_checkpointing) == (2, True)
        with pytest.raises(ConfigError, match=r"does not fit RTX4090-24G with 22.4 GiB \(none: needs 30.0 GiB; nf4"):
            made(source, tmp_path / "b", parts="quickstart", vlm=str(model), gpu="RTX4090")
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize(
        ("options", "text"),
        [({"vlm": "m", "gpu": "8xA100-80G"}, "expected one card"), ({"vlm": "m", "gpu": "abacus"}, "no known GPU"),
         ({"gpu": "T4"}, "--vlm"), ({"vlm": "m", "parts": "hub"}, "--parts is hub")],
    )  # fmt: skip
    def test_what_does_not_go_together_is_refused(self, options: dict[str, str], text: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=text):
            made(photos(tmp_path / "photos", cat=4, dog=3), tmp_path / "my", **{"parts": "quickstart"} | options)

    def test_a_folder_without_its_processor_is_one_error(self, model: Path, tmp_path: Path) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("config.json", "model.safetensors"):
            (bare / name).write_bytes((model / name).read_bytes())
        with pytest.raises(ModelError, match=r"without an image processor.*save_pretrained"):
            made(photos(tmp_path / "photos", cat=4, dog=3), tmp_path / "my", parts="quickstart", vlm=str(bare))
        assert not (tmp_path / "my").exists()


@pytest.mark.slow
def test_the_parts_for_llama_cpp_train_on_two_ranks_and_become_its_files(tmp_path: Path) -> None:
    made(photos(tmp_path / "photos", cat=4, dog=3), tmp_path / "my", parts="gguf")
    recipe = tmp_path / "my" / "recipe.yaml"
    assert "openai/clip-vit-base-patch32" in recipe.read_text()
    parts = {
        "model.language": make_language_of(tmp_path / "language", "smollm2"),
        "model.vision.name": make_vision(tmp_path / "clip", "clip"),
    }
    overrides = [word for key, value in parts.items() for word in (f"--{key}", str(value))]
    assert (
        cli.run(["launch", str(recipe), "--nproc", "2", *overrides, "--train.steps", "1", "--train.precision", "fp32"])
        == 0
    )
    files = export_gguf(load(tmp_path / "my" / "run"), tmp_path / "gguf")
    assert files.mmproj is not None
    assert files.largest_difference == 0
