"""Runs with `objective: grpo` on tiny real models: answers, log-probabilities, rewards, checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mm_moslora_eval.sources.document import Document
from pairs import logged, make_questions, make_recipe, plain_recipe

from mm_moslora.cli.cli_app import run as command
from mm_moslora.config import GrpoConfig, Recipe, load_recipe
from mm_moslora.data.chat.preference_records import parse_question
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.preference_set import Question
from mm_moslora.data.record_faults import Where
from mm_moslora.launch.imported_code import import_file, imported
from mm_moslora.models.batching.padded_batch import padded_inputs
from mm_moslora.models.load_model import load
from mm_moslora.preferences import rewards
from mm_moslora.preferences.preference_setup import prepare
from mm_moslora.preferences.preference_training import train_preferences
from mm_moslora.preferences.rewards import Scorer, find_rewards, scores_together
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import CheckpointError, ConfigError, DataError, TrainingError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of

pytest.importorskip("trl", reason="trl is not installed")
ANSWERS = {"generations": 4, "max_new_tokens": 4}
OWN = """
import math
from mm_moslora.preferences.rewards import REWARDS

def early(text, document):
    return sum(letter < "m" for letter in text) / max(1, len(text))

def sometimes(text, document):
    if document.id == "p3":
        raise ValueError("no rule for this question")
    return math.nan if document.id == "p4" else len(text)

def never(text, document):
    return math.nan

REWARDS.update(early=early, sometimes=sometimes, never=never)
"""


@pytest.fixture(scope="module")
def tuned(language_folder: Path, text_pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model that answers with one of three colours."""
    folder = tmp_path_factory.mktemp("tuned")
    records = text_pairs.parent / "colours.jsonl"
    records.write_text(text_pairs.read_text().replace('"rejected_response"', '"other"'))
    plain = plain_recipe(
        folder / "run", records, {"language": str(language_folder), "language_mode": "full"},
        objective="sft", optim={"lr": 1e-2},
        train={"steps": 13, "global_batch": 12, "micro_batch": 12, "zero": "none"},
    )  # fmt: skip
    del plain["adapter"]
    train(Recipe.from_dict(plain))
    assert command(["export", str(folder / "run"), str(folder / "model")]) == 0
    return folder / "model"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that adds rewards, imported as `--import` does."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    (file := tmp_path / "own.py").write_text(OWN)
    with imported([file]):
        yield file


def test_rewards_rise(tuned: Path, text_pairs: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path / "run", make_questions(text_pairs, "green.jsonl", solution="green"), {"language": str(tuned)},
        objective="grpo", adapter={"rank": 8, "alpha": 32}, optim={"lr": 1e-2},
        grpo={"generations": 8, "max_new_tokens": 6}, train={"steps": 16, "global_batch": 48, "micro_batch": 48},
    )  # fmt: skip
    train_preferences(recipe)
    rising = logged(tmp_path / "run", "reward")
    assert rising == logged(tmp_path / "run", "rewards/exact/mean")
    assert sum(rising[-5:]) > 2 * sum(rising[:5])


def test_answers_and_their_probabilities_are_those_of_each_question_alone(
    vlm: Path, picture_pairs: Path, tmp_path: Path
) -> None:
    """In a batch with other questions, of other lengths and with other pictures."""
    from mm_moslora.preferences.reward_trainer import RewardTrainer

    recipe = make_recipe(
        tmp_path / "run", make_questions(picture_pairs), {"vlm": str(vlm)}, objective="grpo",
        grpo={**ANSWERS, "temperature": 1e-4}, train={"global_batch": 48, "micro_batch": 16},
    )  # fmt: skip
    run = prepare(recipe)
    trainer = RewardTrainer(run, None)  # type: ignore[arg-type]
    trainer.shown = [1, 11, 3]
    trainer.questions = {number: run.records.item(number) for number in trainer.shown}
    rolled = trainer._roll_out([""] * 3, trainer)
    model = run.assembly.model.eval()
    for number, prompt, answer in zip(trainer.shown, rolled["prompt_ids"], rolled["completion_ids"], strict=True):
        row = torch.tensor([*prompt, *answer])
        inputs = padded_inputs(model, [row], *trainer._pictures([number]), answers=[len(prompt)])
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(prompt) - 1 : -1]
        logits[:, trainer.placeholders] = -torch.inf
        assert logits.argmax(-1).tolist() == answer
    prompts, answers = rolled["prompt_ids"], rolled["completion_ids"]
    answers[1] = answers[1][:2]
    width, longest = max(map(len, prompts)), max(map(len, answers))
    ids = torch.zeros(3, width + longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        place = slice(width - len(prompt), width + len(answer))
        ids[number, place], mask[number, place] = torch.tensor([*prompt, *answer]), 1
    with torch.no_grad():
        found, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, longest, batch_size=2, compute_entropy=True
        )
        assert entropies is not None
        assert entropies.shape == found.shape == (3, longest)
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            row = torch.tensor([*prompt, *answer])
            one = slice(number, number + 1)
            inputs = padded_inputs(model, [row], *trainer._pictures(trainer.shown[one]), answers=[len(prompt)])
            logits = model(**inputs).logits[0, len(prompt) - 1 : -1] / 1e-4
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(found[number, : len(answer)], expected, rtol=1e-3, atol=1e-2)
            assert not found[number, len(answer) :].any()


def test_a_stopped_run_goes_on_as_if_it_had_not_and_is_exported(
    vlm: Path, picture_pairs: Path, tmp_path: Path, own: Path
) -> None:
    sections: dict[str, Any] = {
        "objective": "grpo", "grpo": {**ANSWERS, "rewards": ["early", "contains"], "beta": 0.05},
        "train": {"steps": 4, "global_batch": 8, "micro_batch": 4}, "adapter": {"rank": 4, "alpha": 64},
    }  # fmt: skip
    questions, model = make_questions(picture_pairs), {"vlm": str(vlm)}
    straight = train_preferences(make_recipe(tmp_path / "straight", questions, model, **sections))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(plain_recipe(tmp_path / "run", questions, model, **sections)))
    assert command(["data", "check", str(file)]) == 0
    assert command(["train", str(file), "--stop-at", "2"]) == 0
    own.write_text(OWN + "\n")
    with imported([own]), pytest.raises(CheckpointError, match=r"file of --import own.py was changed since"):
        train_preferences(load_recipe(str(file)))
    own.write_text(OWN)
    import_file(own)
    assert command(["train", str(file)]) == 0
    for name in ("loss", "reward", "kl", "entropy"):
        assert logged(tmp_path / "run", name) == logged(tmp_path / "straight", name), name
    adapter = Path("adapter", "moslora.safetensors")
    assert sha256_of(tmp_path / "run" / straight.checkpoint.name / adapter) == sha256_of(straight.checkpoint / adapter)
    assert any(logged(tmp_path / "run"))
    assert command(["export", str(tmp_path / "run"), str(tmp_path / "model")]) == 0
    assert load(tmp_path / "model").processor is not None


def test_a_reward_that_fails_is_counted_and_one_that_always_fails_ends_the_run(
    tuned: Path, text_pairs: Path, tmp_path: Path, own: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def recipe(name: str, reward: str) -> Recipe:
        return make_recipe(
            tmp_path / name, make_questions(text_pairs), {"language": str(tuned)}, objective="grpo",
            grpo={**ANSWERS, "rewards": [reward]}, train={"steps": 2, "global_batch": 24, "micro_batch": 24},
        )  # fmt: skip

    assert train_preferences(recipe("some", "sometimes")).finished
    assert read_json(tmp_path / "some" / "summary.json")["counters"]["failed_rewards"] == 8  # two questions, once each
    assert all(torch.isfinite(torch.tensor(logged(tmp_path / "some", "reward"))))
    assert "The reward 'sometimes' failed, and its answer does not count: question p" in caplog.text
    with pytest.raises(TrainingError, match=r"reward 'never' failed for all 24 answers.*gave nan, expected a finite"):
        train_preferences(recipe("none", "never"))


def test_steps_whose_rewards_are_all_equal_are_said(
    tuned: Path, text_pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = make_questions(text_pairs, "nobody.jsonl", solution="nobody says this")
    recipe = make_recipe(
        tmp_path / "run", questions, {"language": str(tuned)}, objective="grpo", grpo=ANSWERS,
        train={"steps": 3, "global_batch": 8, "micro_batch": 4},
    )  # fmt: skip
    train_preferences(recipe)
    assert read_json(tmp_path / "run" / "summary.json")["counters"]["equal_rewards"] == 3
    assert caplog.text.count("it teaches nothing") == 2
    assert command(["report", str(tmp_path / "run")]) == 0
    assert "Steps that taught nothing" in (tmp_path / "run" / "report.html").read_text()


def test_an_answer_for_which_a_reward_fails_is_judged_by_no_other() -> None:
    def first(text: str, _: Document) -> float:
        return 1e300 if text == "large" else float(len(text))

    class Panic(BaseException):
        pass

    def second(text: str, _: Document) -> float:
        if text == "panic":
            raise Panic
        return 1 / (text != "bad")

    scorers, document = [Scorer("first", first), Scorer("second", second)], Document(id="d", question="q")
    columns = scores_together(scorers, ["good", "bad", "large", "panic"], [document] * 4)
    assert [[value for value in column if not math.isnan(value)] for column in columns] == [[4.0], [1.0]]
    assert [scorer.failed for scorer in scorers] == [1, 2]
    with pytest.raises(TrainingError, match="'first', 'second' failed so often that no answer"):
        scores_together(scorers, ["bad", "large"], [document] * 2)


def test_questions_without_references_are_counted_and_named(tuned: Path, text_pairs: Path, tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    lines = make_questions(text_pairs).read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1].replace("solution", "level")]))
    model = {"language": str(tuned)}
    sections: dict[str, Any] = {"objective": "grpo", "grpo": ANSWERS}
    with pytest.raises(DataError, match="NO_REFERENCE 1"):
        prepare(make_recipe(tmp_path / "a", file, model, data={"max_bad_share": 0.0}, **sections))
    run = prepare(make_recipe(tmp_path / "b", file, model, data={"max_bad_share": 0.1}, **sections))
    assert len(run.records.usable) == 11


def test_a_reward_of_no_file_is_named(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"grpo.rewards holds 'erly', expected any of .*early.*--import FILE.py"):
        find_rewards(GrpoConfig(rewards=["erly"]))


@pytest.mark.parametrize(
    ("reward", "record", "right", "wrong"),
    [
        ("exact", {"solution": "red"}, " Red.", "red car"),
        ("exact", {"solution": "red"}, "<think>blue?</think>red", "<think>red"),
        ("relaxed", {"solution": 100}, "104", "106"),
        ("letter", {"solution": "blue", "options": ["red", "blue"]}, "B.", "A"),
        ("contains", {"answers": ["red", "crimson"]}, "It is crimson, I think.", "It is blue."),
        ("contains", {"solution": "B", "options": ["a red car", "a blue car"]}, "That is a blue car.", "a red car"),
        ("yes_no", {"solution": "yes"}, "Yes, it is.", "No"),
        ("mmmu", {"solution": "3.5"}, "So the answer is 3.5", "4"),
    ],
)
def test_rewards_by_name(reward: str, record: dict[str, Any], right: str, wrong: str) -> None:
    from mm_moslora.preferences.rewards import document_of

    asked = parse_question(
        {"prompt": "which?", **record}, Where(file=Path("q.jsonl"), line=1, row=0), PictureRules(folder=Path("/tmp"))
    )
    document = document_of(Question(prompt=None, text="which?", asked=asked))  # type: ignore[arg-type]
    score = find_rewards(GrpoConfig(rewards=[reward]))[reward]
    assert (score(right, document), score(wrong, document)) == (1.0, 0.0)
