"""A divided evaluation has the results of the undivided one; what is missing or foreign is named."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Thread

import pytest
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora import cli
from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import ConfigError, EvalError
from tests.eval.eval_data import contents, write_questions
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_questions(tmp_path / "data", count=70, pictures=24)


def ask(data: Path, output: Path, text: str | None = None, *, model: FakeModel | None = None, **options: object):  # type: ignore[no-untyped-def]
    """One command: a share of the documents, or all of them."""
    shard = None if text is None else Shard.parse(text)
    settings = EvaluationSettings(batch_size=1, rank=0, world_size=1, shard=shard, **options)  # type: ignore[arg-type]
    return evaluate_tasks(
        model or FakeModel(), [f"llava:{data}"], output, modes=("own", "wrong"), baselines=("majority",),
        settings=settings, named="fake",
    )  # fmt: skip


def merge(
    data: Path, output: Path, *, modes: tuple[str, ...] = ("own", "wrong"), named: str = "fake", **options: object
):  # type: ignore[no-untyped-def]
    settings = EvaluationSettings(**({"batch_size": 1, "rank": 0, "world_size": 1} | options))  # type: ignore[arg-type]
    return evaluate_tasks(
        lambda: pytest.fail("a merge loads no model"), [f"llava:{data}"], output, modes=modes,  # type: ignore[arg-type]
        baselines=("majority",), settings=settings, named=named, merge=True,
    )  # fmt: skip


@pytest.mark.parametrize("of", [3, 24])  # shards of many documents, and as many shards as there are pictures
def test_shards_have_the_results_of_the_undivided_run(data: Path, tmp_path: Path, of: int) -> None:
    whole = ask(data, tmp_path / "whole")
    asked: list[str] = []
    for number in reversed(range(1, of + 1)):
        model = FakeModel()
        assert ask(data, tmp_path / "run", f"{number}/{of}", model=model) == []
        asked += model.asked
    assert sorted(asked) == sorted([f"q{number}" for number in range(70)] * 2)
    assert [result.to_dict() | {"about": 0} for result in merge(data, tmp_path / "run")] == [
        result.to_dict() | {"about": 0} for result in whole
    ]
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
    before = contents(tmp_path / "run")
    merge(data, tmp_path / "run")  # a second time changes nothing
    assert contents(tmp_path / "run") == before
    again = FakeModel()  # and an undivided run finds every answer
    ask(data, tmp_path / "run", model=again)
    assert again.asked == []


def test_an_interrupted_shard_is_missing_until_it_is_repeated(data: Path, tmp_path: Path) -> None:
    class Interrupted(FakeModel):
        def _answer(self, request):  # type: ignore[no-untyped-def]
            if len(self.asked) == 13:
                raise KeyboardInterrupt
            return super()._answer(request)

    run = tmp_path / "run"
    ask(data, run, "1/2")
    with pytest.raises(KeyboardInterrupt):
        ask(data, run, "2/2", model=Interrupted())
    with pytest.raises(ConfigError, match=r"1 of 2 shards are missing or not finished: 2/2\."):
        merge(data, run)
    assert not (run / "results.json").exists()
    again = FakeModel()
    ask(data, run, "2/2", model=again)
    assert len(again.asked) < 70
    merge(data, run)
    ask(data, tmp_path / "whole")
    assert contents(run) == contents(tmp_path / "whole")


def test_the_same_shard_twice_at_once_is_asked_once(data: Path, tmp_path: Path) -> None:
    """As an array may start an element again: the second one waits, and finds everything answered."""
    models = [FakeModel(delay=0.01), FakeModel(delay=0.01)]
    threads = [Thread(target=ask, args=(data, tmp_path / "run", "1/2"), kwargs={"model": model}) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(len(model.asked) > 0 for model in models) == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 5}, "its limit is None, expected 5"),
        ({"samples": ("q1",)}, r"its samples is \[\], expected \['q1'\]"),
        ({"seed": 1}, "its seed is 0, expected 1"),
        ({"batch_size": 2}, "its batch_size is 1, expected 2"),
        ({"world_size": 2}, "its world_size is 1, expected 2"),
        ({"modes": ("own",)}, r"its --modes is \['own', 'wrong'\], expected \['own'\]"),
        ({"named": "other"}, "its --model is 'fake', expected 'other'"),
    ],
)
def test_shards_of_another_command_are_refused(
    data: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    for number in (1, 2):
        ask(data, tmp_path / "run", f"{number}/2")
    with pytest.raises(ConfigError, match=message):
        merge(data, tmp_path / "run", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "run" / "results.json").exists()


def test_shards_of_another_model_task_or_data_are_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ask(data, run, "1/2")
    ask(data, run, "2/2", model=FakeModel(fingerprint="f2"))
    with pytest.raises(ConfigError, match=r"Shard 2/2 .*its model: fingerprint is 'f2', expected 'f1'"):
        merge(data, run)
    other = tmp_path / "other"
    ask(data, other, "1/2")
    data.write_text(data.read_text().replace("blue", "red"))
    ask(data, other, "2/2")
    with pytest.raises(ConfigError, match=r"Shard 1/2 .*sha256 of the data is '"):
        merge(data, other)
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(f"name: mine\nsource: {{kind: llava, path: {data}}}\n")
    settings = EvaluationSettings(batch_size=1, rank=0, world_size=1, shard=Shard(1, 1))
    evaluate_tasks(FakeModel(), [str(yaml)], tmp_path / "third", settings=settings)
    yaml.write_text(f"name: mine\nversion: 2\nsource: {{kind: llava, path: {data}}}\n")
    with pytest.raises(ConfigError, match=r"its mine@own: version is 1, expected 2"):
        evaluate_tasks(
            FakeModel(), [str(yaml)], tmp_path / "third", merge=True,
            settings=EvaluationSettings(batch_size=1, rank=0, world_size=1),
        )  # fmt: skip


def test_a_damaged_shard_is_named_and_repaired(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for number in (1, 2):
        ask(data, run, f"{number}/2")
    answers = run / "shards" / "2-of-2" / "questions@own" / "own" / "answers.jsonl"
    answers.write_bytes(answers.read_bytes()[:-20])
    with pytest.raises(
        EvalError, match=r"Shard 2/2 .* is damaged: \d+ of \d+ answers of questions@own/own can be read"
    ):
        merge(data, run)
    again = FakeModel()
    ask(data, run, "2/2", model=again)
    assert len(again.asked) == 1
    merge(data, run)
    for text in ("", "{", "[]", "{}", '{"work": {}, "answers": {"../..": 1}, "model": {}}'):
        (run / "shards" / "1-of-2" / "shard.json").write_text(text)
        with pytest.raises((ConfigError, EvalError), match=r"shard\.json"):
            merge(data, run)
    ask(data, run, "1/2")
    merge(data, run)


def test_pictures_that_changed_after_the_shards_are_named(data: Path, tmp_path: Path) -> None:
    ask(data, tmp_path / "run", "1/1")
    (data.parent / "1.png").write_bytes((data.parent / "2.png").read_bytes())
    with pytest.raises(EvalError, match="have no answer to some documents"):
        merge(data, tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()


def test_failed_samples_of_a_shard_count_as_in_the_undivided_run(data: Path, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        ask(data, tmp_path / "run", f"{number}/3", model=FakeModel(fail_on=("q3", "q50")))
    own, wrong, _ = merge(data, tmp_path / "run")
    assert (own.counts.failed, wrong.counts.failed, own.n) == (2, 2, 70)
    again = FakeModel()
    for number in (1, 2, 3):
        ask(data, tmp_path / "run", f"{number}/3", model=again)
    assert sorted(again.asked) == ["q3", "q3", "q50", "q50"]


def test_a_tiny_model_answers_alike_in_shards(tmp_path: Path, language_folder: Path, vision_folder: Path) -> None:
    """Answers and log-likelihoods of a real model, digit for digit, by the command line."""
    model = export_tiny(tmp_path / "model", language_folder, vision_folder)
    data = write_questions(tmp_path / "data", count=60, pictures=20)
    command = [
        "eval", "run", f"llava:{data}", "--model", str(model), "--precision", "fp32", "--batch-size", "2",
        "--modes", "own", "--modes", "wrong", "--max-new-tokens", "4",
    ]  # fmt: skip
    assert cli.run([*command, "--output", str(tmp_path / "whole")]) == 0
    for number in (1, 2, 3):
        assert cli.run([*command, "--output", str(tmp_path / "run"), "--shard", f"{number}/3"]) == 0
    assert cli.run([*command, "--output", str(tmp_path / "run"), "--merge"]) == 0
    whole, run = contents(tmp_path / "whole"), contents(tmp_path / "run")
    assert whole == run
    rows = read_samples(tmp_path / "run" / "questions@own" / "own")
    assert len({row["text"] for row in rows}) > 5
    assert len({json.dumps(row["reference"]) for row in rows}) > 5
    shares = [len(read_folder(path)) for path in (tmp_path / "run" / "shards").glob("*/questions@own/own")]
    assert sum(shares) == 60
    assert max(shares) < 60
    assert cli.run([*command, "--output", str(tmp_path / "run"), "--merge", "--shard", "1/3"]) == 1
    assert cli.run([*command, "--output", str(tmp_path / "run"), "--shard", "4/3"]) == 1
