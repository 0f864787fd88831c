"""Several drawn answers to a question: what they come to, how they are stored, and how a run with them goes on."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends.openai_endpoint import Endpoint, EndpointModel
from mm_moslora_eval.backends.replay_model import ReplayModel
from mm_moslora_eval.protocol.model_interface import Answer, Request
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult, read_results, score_folder
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.score_aggregation import OVER_SAMPLES, combined
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from tests.eval.eval_fake import WORDS, FakeModel
from tests.eval.eval_server import serve

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


class Drawing(FakeModel):
    """Answers by the seed of the draw."""

    def _answer(self, request: Request) -> Answer:
        answer = super()._answer(request)
        assert request.draw is not None
        return Answer(text=WORDS[request.draw.seed % 4], tokens=answer.tokens, finish_reason="stop")


def drawn(file: Path, **samples: int) -> Task:
    changes = ["decoding.temperature=0.8", *(f"decoding.{name}={value}" for name, value in samples.items())]
    return with_changes(get_task(f"llava:{file}"), changes)


def result_of(task: Task, output: Path, model: FakeModel) -> TaskResult:
    (result,) = evaluate(model, task, output, modes=("own",), baselines=(), settings=ONE)
    return result


def rows_of(output: Path, part: str = "") -> list[dict[str, Any]]:
    (path,) = output.rglob(f"{part}*/samples.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(*given: tuple[str, float]) -> list[Scored]:
    document = Document(id="1", question="?", answers=("a",))
    return [Scored(document=document, text=text, parsed=text, score=score, cluster="p") for text, score in given]


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_the_share_of_choices_of_k_answers_with_a_right_one(right: int) -> None:
    given = answers(*[("a", 1.0)] * right, *[("b", 0.0)] * (5 - right))
    for k in range(1, 6):
        choices = [max(one.score for one in some) for some in itertools.combinations(given, k)]
        assert combined(given, over_samples=f'pass_at {{"k": {k}}}').score == pytest.approx(fmean(choices))


@pytest.mark.parametrize("count", [1, 3])
def test_pass_at_k_does_not_guess_which_graded_answer_is_right(count: int) -> None:
    given = answers(*[("a", 0.9)] * count)
    assert "the metric gave 0.9; set its right_from" in combined(given, over_samples='pass_at {"k": 1}').fault
    assert combined(given, over_samples='pass_at {"k": 1, "right_from": 0.5}').score == 1.0
    assert combined(given, over_samples='pass_at {"k": 1, "right_from": 0.95}').score == 0.0


def test_the_majority_votes_by_extracted_answers_and_ties_have_a_rule() -> None:
    given = answers(("b", 0.0), ("a", 1.0), ("", 0.0), ("a", 1.0), ("b", 0.0), ("", 0.0), ("", 0.0))
    assert (combined(given, over_samples="majority").score, combined(given, over_samples="majority").parsed) == (0, "b")
    assert combined(given, over_samples='majority {"ties": "share"}').score == 0.5
    assert combined(given[1:], over_samples="majority").score == 1.0
    assert combined(given[2:3] * 2, over_samples="majority").parsed == ""
    assert combined(given, over_samples="mean").score == pytest.approx(2 / 7)


def test_answers_to_a_question_are_one_sample_with_all_of_them_beside_it(question_file: Path, tmp_path: Path) -> None:
    model = Drawing()
    result = result_of(drawn(question_file, samples=4), tmp_path / "run", model)
    rows = rows_of(tmp_path / "run")
    assert (result.n, len(rows), len(model.asked)) == (12, 12, 48)
    assert all(len({one["text"] for one in row["repeated"]}) > 1 for row in rows if row["score"] not in (0, 1))
    assert {row["score"] for row in rows} - {0.0, 1.0}
    assert result.score == pytest.approx(fmean(fmean(one["score"] for one in row["repeated"]) for row in rows))
    assert result.clusters == 4  # pictures: neither questions nor answers
    assert result.about["decoding"]["temperature"] == 0.8
    assert result.about["changed"] == ["decoding.temperature=0.8", "decoding.samples=4"]


def test_more_answers_are_asked_for_later_and_another_temperature_is_another_run(
    question_file: Path, tmp_path: Path
) -> None:
    two, four = Drawing(), Drawing()
    result_of(drawn(question_file, samples=2), tmp_path / "run", two)
    later = result_of(drawn(question_file, samples=4), tmp_path / "run", four)
    assert (len(two.asked), len(four.asked)) == (24, 24)
    whole = Drawing()
    result_of(drawn(question_file, samples=4), tmp_path / "whole", whole)
    texts = [
        [[one["text"] for one in row["repeated"]] for row in read_samples(tmp_path / run / later.folder)]
        for run in ("run", "whole")
    ]
    assert texts[0] == texts[1]
    with pytest.raises(
        EvalError, match=r"holds another run: its decoding\.temperature is 0\.8, this one's is 0\.9\. Choose"
    ):
        result_of(with_changes(drawn(question_file), ["decoding.temperature=0.9"]), tmp_path / "run", Drawing())


def test_a_missing_answer_of_several_is_a_failed_sample_until_it_is_there(question_file: Path, tmp_path: Path) -> None:
    task = drawn(question_file, samples=3)
    failed = result_of(task, tmp_path / "run", Drawing(fail_on=("q1",)))
    assert (failed.counts.failed, failed.counts.scored) == (1, 11)
    again = Drawing()
    assert result_of(task, tmp_path / "run", again).counts.failed == 0
    assert again.asked == ["q1"] * 3


def test_stored_answers_are_scored_again_by_another_rule_over_them(question_file: Path, tmp_path: Path) -> None:
    rules = "over_samples: {name: pass_at, k: 3}"
    source = f"source: {{kind: llava, path: {question_file}}}"
    file = question_file.parent / "own.yaml"
    decoding = "decoding: {temperature: 1, samples: 3}"
    file.write_text(f"name: own\n{source}\n{decoding}\nprotocols: {{avg: {{}}, best: {{{rules}}}}}\n")
    first = result_of(get_task(f"{file}@avg"), tmp_path / "run", Drawing())
    (best,) = eval_commands.score(tmp_path / "run", protocol=f"{file}@best")
    rows = rows_of(tmp_path / "run", "all-*-as-best")
    assert best.score == fmean(max(one["score"] for one in row["repeated"]) for row in rows) > first.score


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("decoding.samples=4", r"decoding.samples is 4, but decoding.temperature is 0"),
        ("decoding.temperature=-1", "temperature -1.0"),
        ("source.path=other", "expected KEY=VALUE with a key below prompt, decoding, over_samples, thinking"),
        ("decoding.temprature=1", "unknown key 'decoding.temprature'.*Did you mean 'temperature'"),
        ("over_samples=pass", "over_samples 'pass' is not known"),
        ("thinking.markers=[['', x]]", "expected pairs of texts that are not empty"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(question_file: Path, change: str, message: str) -> None:
    with pytest.raises(MoSLoRAError, match=message):
        with_changes(get_task(f"llava:{question_file}"), [change])


def test_stored_answers_stay_valid_where_nothing_is_drawn() -> None:
    task = get_task("mmstar")
    assert task.decoding.to_dict() == {"kind": "generate", "max_new_tokens": 128, "stop": ()}
    assert not {"over_samples", "thinking", "changed"} & task.to_dict().keys()
    assert {*OVER_SAMPLES} == {"mean", "pass_at", "majority"}


def test_an_endpoint_gets_the_draw_and_stored_answers_may_hold_several(question_file: Path, tmp_path: Path) -> None:
    task = with_changes(drawn(question_file, samples=2, top_k=5), ["decoding.top_p=0.9"])
    with serve(lambda payload: str(payload["seed"])) as server:
        model = EndpointModel(Endpoint.parse(f"{server.url}#m"))
        result_of(task, tmp_path / "endpoint", model)  # type: ignore[arg-type]
    assert {(one["temperature"], one["top_p"], one["top_k"]) for one in server.payloads} == {(0.8, 0.9, 5)}
    assert len({one["seed"] for one in server.payloads}) == 24
    stored = tmp_path / "stored.jsonl"
    lines = [{"question_id": f"q{number}", "text": text} for number in range(12) for text in ("yes", "no")]
    stored.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = result_of(task, tmp_path / "replay", ReplayModel(stored))  # type: ignore[arg-type]
    assert [[one["text"] for one in row["repeated"]] for row in rows_of(tmp_path / "replay")] == [["yes", "no"]] * 12
    assert result.counts.failed == 0
    assert not any("answers are 'yes'" in text for text in result.remarks)  # of all answers half are


def test_another_measurement_of_the_same_documents_stands_beside_the_first_one(
    question_file: Path, tmp_path: Path
) -> None:
    pass_at = 'pass_at {"k": 2}'
    tasks = [drawn(question_file, samples=4), drawn(question_file, samples=2)]
    tasks += [replace(tasks[0], over_samples=pass_at), replace(tasks[0], over_samples="majority")]
    made = [result_of(task, tmp_path / "run", Drawing()) for task in (*tasks, drawn(question_file))]
    stored = read_results(tmp_path / "run")
    assert [result.score for result in stored] == [result.score for result in made]
    assert len({result.subject for result in stored}) == len({result.key for result in stored}) == 5
    for result in stored:
        rows = read_samples(tmp_path / "run" / result.folder)
        assert fmean(row["score"] for row in rows) == pytest.approx(result.score)
        assert score_folder(tmp_path / "run" / result.folder).key == result.key
    again = result_of(tasks[2], tmp_path / "run", Drawing())
    assert len(read_results(tmp_path / "run")) == 5
    rescored = score_folder(tmp_path / "run" / again.folder, rules=tasks[3])
    assert (rescored.folder, rescored.score) == (stored[3].folder, stored[3].score)
