"""Instruction data of the quickstart: true, balanced, split without leaks, the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from mm_moslora.quickstart.instruction_data import ImageQuestion as Asked
from mm_moslora.quickstart.instruction_data import build_easy_vqa, easy_caption
from mm_moslora.utils.errors import DataError


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestEasyVqa:
    def test_first_turn_shows_the_picture_and_only_it(self, easy: Path, tmp_path: Path) -> None:
        records = read(build_easy_vqa(easy, tmp_path, turns=4).train)
        assert records
        for record in records:
            values = [turn["value"] for turn in record["conversations"]]
            assert values[0].startswith("<image>\n")
            assert sum("<image>" in value for value in values) == 1
            assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)
            assert len(values) == 8
            assert (easy / record["image"]).is_file()

    def test_every_answer_is_true(self, easy: Path, tmp_path: Path) -> None:
        """Open answers are the data set's own; yes/no answers follow from the picture's caption, as its own do."""
        rows = json.loads((easy / "train" / "questions.json").read_text())
        truth = {(f"train/images/{image}.png", text): answer for text, answer, image in rows}
        captions = {}
        files = build_easy_vqa(easy, tmp_path, turns=8)
        for record in read(files.align):
            captions[record["image"]] = record["conversations"][1]["value"].split()
        asked = 0
        for record in read(files.train):
            turns = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
            for text, answer in zip(turns[::2], turns[1::2], strict=True):
                if answer in ("yes", "no"):
                    words = text.rstrip("?").split()
                    present = bool(set(words) & set(captions[record["image"]][1:]))
                    assert (answer == "yes") == (present != bool({"no", "not"} & set(words)))
                    asked += 1
                # Where the data set asks the very same question, it gives the very same answer.
                assert truth.get((record["image"], text), answer) == answer
        assert asked

    def test_held_out_yes_no_is_balanced_per_text(self, easy: Path, tmp_path: Path) -> None:
        tally: dict[str, Counter[str]] = defaultdict(Counter)
        for record in read(build_easy_vqa(easy, tmp_path, test_questions=80).test):
            assert set(record) == {"question_id", "image", "text", "answer", "category"}
            if record["category"] == "yes_no":
                tally[record["text"]][record["answer"]] += 1
        assert tally
        assert all(counts["yes"] == counts["no"] for counts in tally.values())

    def test_training_yes_no_is_balanced(self, easy: Path, tmp_path: Path) -> None:
        """Exactly in every conversation, and within chance for every text."""
        tally: dict[str, Counter[str]] = defaultdict(Counter)
        for record in read(build_easy_vqa(easy, tmp_path, turns=202).train):
            values = [turn["value"].removeprefix("<image>\n") for turn in record["conversations"]]
            answers = Counter(values[1::2])
            assert answers["yes"] == answers["no"] == 100
            for text, answer in zip(values[::2], values[1::2], strict=True):
                if answer in ("yes", "no"):
                    tally[text][answer] += 1
        assert tally
        for counts in tally.values():
            total = counts["yes"] + counts["no"]
            assert total < 50 or abs(counts["yes"] / total - 0.5) < 0.25

    def test_an_odd_number_of_yes_no_questions_leans_to_neither_answer(self, easy: Path, tmp_path: Path) -> None:
        tally: Counter[str] = Counter()
        for seed in range(8):
            for record in read(build_easy_vqa(easy, tmp_path / str(seed), turns=5, seed=seed).train):
                tally.update(turn["value"] for turn in record["conversations"] if turn["value"] in ("yes", "no"))
        assert abs(tally["yes"] / tally.total() - 0.5) < 0.05

    def test_no_picture_on_both_sides(self, easy: Path, tmp_path: Path) -> None:
        files = build_easy_vqa(easy, tmp_path)
        assert not {r["image"] for r in read(files.train)} & {r["image"] for r in read(files.test)}

    def test_same_seed_same_bytes(self, easy: Path, tmp_path: Path) -> None:
        for name in ("a", "b"):
            build_easy_vqa(easy, tmp_path / name, seed=3)
        build_easy_vqa(easy, tmp_path / "c", seed=4)
        for file in ("align.jsonl", "train.jsonl", "test.jsonl"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()

    def test_held_out_questions_do_not_depend_on_seed_or_training_pictures(self, easy: Path, tmp_path: Path) -> None:
        """Or seeds could not be averaged, nor sizes compared."""
        first = build_easy_vqa(easy, tmp_path / "a", seed=0, train_images=10)
        second = build_easy_vqa(easy, tmp_path / "b", seed=1, train_images=20)
        assert first.test.read_bytes() == second.test.read_bytes()

    def test_caption_from_what_is_stated(self) -> None:
        def ask(text: str, answer: str) -> Asked:
            return Asked(image="x", text=text, answer=answer)

        assert easy_caption([ask("what is the red shape?", "circle")]) == "a red circle"
        assert easy_caption([ask("is there a red shape?", "yes"), ask("is no circle present?", "no")]) == "a red circle"
        assert easy_caption([ask("is there a red shape?", "no"), ask("what shape is present?", "circle")]) is None
        assert easy_caption([ask("is there not a red shape?", "yes"), ask("is there a circle?", "yes")]) is None

    def test_bad_arguments(self, easy: Path, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="turns is 0"):
            build_easy_vqa(easy, tmp_path, turns=0)
        with pytest.raises(DataError, match="cannot be read"):
            build_easy_vqa(tmp_path / "absent", tmp_path)
