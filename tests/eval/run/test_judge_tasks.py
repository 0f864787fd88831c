"""Judged tasks: a task file with its own judge, graded answers, graders of imported files, shipped protocols."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends.endpoints.local_chat import LocalChat
from mm_moslora_eval.backends.openai_endpoint import Endpoint
from mm_moslora_eval.protocol.grading import Grading
from mm_moslora_eval.protocol.task_registry import load_file
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult, read_results, score_folder
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.document import Document

from mm_moslora.launch.imported_code import import_file
from mm_moslora.utils.errors import EvalError, MoSLoRAError
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_server import serve
from tests.eval.protocol_runs import GivenAnswers, Run, Runs, answered, judge_at

ONE = EvaluationSettings(batch_size=8, rank=0, world_size=1)
TASK = """
name: charts
source: {{kind: llava, path: questions.jsonl}}
prompt: {{template: "{{question}}"}}
metric: judge
grading:
  prompt: |
    {{question}} ({{topic}}) Reference: {{reference}} Answer: {{response}}
    Reply with one word.
  {replies}
  rule: exact
  check: graded.jsonl
"""
WORDS = "replies: {Correct: 1, incorrect: 0}"
SAID = ("a cat", "A dog.", "three mice", "")


def written(folder: Path, *, replies: str = WORDS, graded: int = 10) -> Path:
    folder.mkdir(exist_ok=True)
    rows = [
        {"question_id": str(n), "text": f"Q{n}?", "answer": ("a cat", "a dog", "mice", "none")[n], "topic": "animals"}
        for n in range(4)
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checks = [
        {"question": f"C{n}?", "answer": "x", "response": f"said {n}", "grade": n % 2, "topic": "checks"}
        for n in range(graded)
    ]
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checks))
    (folder / "charts.yaml").write_text(TASK.format(replies=replies))
    return folder / "charts.yaml"


def asked(payload: dict[str, Any]) -> tuple[str, int]:
    """The kind and number of the question that a judge was asked about."""
    text = payload["messages"][0]["content"]
    return text[0], int(text[1 : text.index("?")])


def good(payload: dict[str, Any]) -> str:
    kind, number = asked(payload)
    right = number % 2 == 1 if kind == "C" else number != 3
    return "correct." if right else "Incorrect"


def run(folder: Path, judge: Judge | None = None, *, said: tuple[str, ...] = SAID, **options: Any) -> TaskResult:
    model = GivenAnswers({str(n): text for n, text in enumerate(said)})
    task = str(written(folder, **options))
    (result,) = evaluate_tasks(model, [task], folder / "run", settings=ONE, judge=judge)
    return result


def test_a_task_file_has_its_own_judge_which_is_checked_and_both_scores_are_printed(tmp_path: Path) -> None:
    with serve(good) as server:
        result = run(tmp_path, judge_at(server.url, tmp_path))
        prompts = [payload["messages"][0]["content"] for payload in server.payloads]
    assert result.score == 0.75
    assert "Q1? (animals) Reference: a dog Answer: A dog.\nReply with one word.\n" in prompts
    judge = result.about["judge"]
    assert judge["wording"] == "charts@own version 1"
    assert len(judge["prompt_sha256"]) == 64
    assert (judge["agreement"]["agreed"], judge["agreement"]["n"], judge["agreement"]["share"]) == (10, 10, 1.0)
    assert judge["agreement"]["mean_difference"] == 0
    assert result.about["by_rules"]["score"] == 0.5  # exact match does not read `three mice`
    assert not any("agrees" in remark for remark in result.remarks)
    printed = eval_commands.table([result])
    assert "0.7500" in printed
    assert "0.5000 (" in printed
    assert "without a judge, by the rules text and exact." in printed
    assert "The judge agrees with 10 of 10 graded answers of graded.jsonl (100%" in printed
    (stored,) = read_results(tmp_path / "run")
    assert eval_commands.table([stored]).count("agrees with 10 of 10") == 1
    page = write_report(tmp_path / "run").read_text()
    assert "The judge agrees with 10 of 10 graded answers" in page
    assert "0.5000 (" in page
    described = eval_commands.describe(str(tmp_path / "charts.yaml"))
    assert "judge:       replies Correct, incorrect" in described
    assert "  | Reply with one word." in described
    # Scoring again needs neither the task file nor its graded answers, and asks nothing.
    (tmp_path / "graded.jsonl").unlink()
    again = judge_at(server.url, tmp_path)
    assert score_folder(tmp_path / "run" / "charts@own" / "own", judge=again).score == 0.75
    assert again.cached == 14


def test_without_a_judge_the_rules_are_beside_an_unscored_task(tmp_path: Path) -> None:
    result = run(tmp_path)
    assert math.isnan(result.score)
    assert eval_commands.exit_code([result]) == 0
    assert "0.5000" in eval_commands.table([result])
    with pytest.raises(EvalError, match="is unscored"):
        compare(tmp_path / "run" / "charts@own" / "own", tmp_path / "run" / "charts@own" / "own")


def test_a_judge_that_disagrees_is_remarked_and_the_users_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"question": f"C{n}?", "text": "x", "grade": 1.0, "topic": "t"}) + "\n" for n in range(4))
    )
    with serve(good) as server:
        judge = judge_at(server.url, tmp_path, graded=tmp_path / "mine.jsonl")
        result = run(tmp_path, judge)
    assert result.score == 0.75
    found = result.about["judge"]["agreement"]
    assert (found["file"], found["agreed"], found["n"], found["mean_difference"]) == ("mine.jsonl", 2, 4, 0.5)
    assert found["low"] < 0.5 < found["high"]
    (remark,) = [text for text in result.remarks if "agrees with 2 of 4" in text]
    assert "less than 80%" in remark
    assert remark in eval_commands.table([result])


@pytest.mark.parametrize(
    ("replies", "reply", "grade"),
    [
        (WORDS, "correct", 1.0), (WORDS, " INCORRECT.\n", 0.0), (WORDS, "correct, mostly", None), (WORDS, "", None),
        ("scale: [0, 10]", "7.5", 0.75), ("scale: [0, 10]", "11", None), ("scale: [0, 10]", "7/10", None),
        ("scale: [5, 1]", "4", 0.25), ("scale: [0, 10]", "1e999", None),
        ("scale: [0, 1]\n  json_key: score", '{"extracted_answer": "b", "score": 1}', 1.0),
        ("scale: [0, 1]\n  json_key: score", '```json\n{"score": 0.0}\n```', 0.0),
        ("scale: [0, 1]\n  json_key: score", '{"score": true}', None),
        ("scale: [0, 1]\n  json_key: score", '{"score": 1, "score": 0}', None),
        ("scale: [0, 1]\n  json_key: score", 'Sure: {"score": 1}', None),
        ("scale: [0, 1]\n  json_key: score", "[1]", None),
    ],
)  # fmt: skip
def test_only_the_forms_of_the_task_file_are_grades(
    replies: str, reply: str, grade: float | None, tmp_path: Path
) -> None:
    (task,) = load_file(written(tmp_path, replies=replies))
    assert isinstance(task.grading, Grading)
    assert task.grading.read(reply) == grade


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{response}", "it", r"no \{response\}"),
        ("replies: {Correct: 1, incorrect: 0}", "max_tokens: 3", "either replies .* or scale"),
        ("incorrect: 0", "incorrect: -1", "expected grades from 0 to 1"),
        ("incorrect: 0", "CORRECT: 0", "differ in case alone"),
        ("replies: {Correct: 1, incorrect: 0}", "replies: {yes: 1, no: 0}", "has the key True, .* in quotes"),
        ("replies: {Correct: 1, incorrect: 0}", "replies: {1: 1, 0: 0}", "has the key 1, .* in quotes"),
        ("metric: judge", "metric: exact", "belong together"),
        ("rule: exact", "rule: exactly", "metric 'exactly' is not known"),
        ("rule: exact", "rules: exact", "rules"),
        ("replies: {Correct: 1, incorrect: 0}", "scale: [1, 1]", "worst and best"),
    ],
)
def test_a_grading_that_cannot_work_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(MoSLoRAError, match=message):
        load_file(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "response": "r"}', "grade"),
        ('{"question": "q", "response": "r", "grade": 2}', "expected `response`"),
        ('{"question": "q", "grade": 1}', "response of 0 characters"),
        ('{"question": ["q"], "response": "r", "grade": 1}', "question"),
        ("{", "line 1"), ("", "holds no graded answers"),
    ],
)  # fmt: skip
def test_graded_answers_that_cannot_be_used_are_refused_before_anything_is_asked(
    line: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with serve(good) as server:
        result = run(tmp_path, judge_at(server.url, tmp_path, graded=tmp_path / "mine.jsonl"))
        assert not server.payloads
    assert message in result.about["unscored"]
    assert eval_commands.exit_code([result]) == 3


def test_graded_answers_out_of_a_run_of_another_person_are_not_sent(tmp_path: Path) -> None:
    run(tmp_path)
    (copy,) = (tmp_path / "run").rglob("graded.jsonl")
    (tmp_path / "secrets.jsonl").write_text('{"response": "secret", "grade": 1, "topic": "t"}\n')
    copy.unlink()
    copy.symlink_to(tmp_path / "secrets.jsonl")
    with serve(good) as server:
        result = score_folder(tmp_path / "run" / "charts@own" / "own", judge=judge_at(server.url, tmp_path))
        assert not server.payloads
    assert "graded.jsonl" in result.about["unscored"]


def test_runs_judged_by_other_prompts_are_not_compared(tmp_path: Path) -> None:
    with serve(good) as server:
        run(tmp_path / "a", judge_at(server.url, tmp_path))
        run(tmp_path / "b", judge_at(server.url, tmp_path), replies=f"{WORDS}\n  max_tokens: 17")
    views = [tmp_path / name / "run" / "charts@own" / "own" for name in "ab"]
    with pytest.raises(EvalError, match="scored by different rules"):
        compare(*views)


def test_a_run_with_a_judge_is_not_compared_with_one_without(tmp_path: Path) -> None:
    """MathVista has a score either way."""
    views = [answered(tmp_path / name, "mathvista", said="It is 7.") for name in "ab"]
    score_folder(views[0])
    with serve(lambda _: "7") as server:
        result = score_folder(views[1], judge=judge_at(server.url, tmp_path))
    assert result.about["by_rules"]["score"] == 1.0
    with pytest.raises(EvalError, match=r"Only one of .* was graded by a judge"):
        compare(*views)


class CountingModel(FakeModel):
    """Answers `correct` and records how many requests came together."""

    def __init__(self) -> None:
        super().__init__(fingerprint="weights")
        self.batches: list[int] = []

    def generate(self, requests: Any, *, batch_size: int) -> Any:
        self.batches.append(len(requests))
        return super().generate(requests, batch_size=batch_size)

    def _answer(self, request: Any) -> Any:
        from mm_moslora_eval.protocol.model_interface import Answer

        self.asked.append(request.messages[0].text)
        return Answer(text="correct", tokens=2, finish_reason="stop")


def test_a_local_model_judges_in_batches_is_loaded_when_it_is_needed_and_asked_once(tmp_path: Path) -> None:
    model, loaded = CountingModel(), []

    def load() -> CountingModel:
        loaded.append(1)
        return model

    judge = Judge(LocalChat(load, name="runs/judge"), cache=tmp_path / "judge")
    assert not loaded
    result = run(tmp_path, judge, said=("a", "b", "c", "d"))
    assert loaded == [1]
    assert result.score == 1.0
    assert len(model.asked) == sum(model.batches) == 14
    assert result.about["judge"]["url"] == "local:weights"
    assert result.about["judge"]["completion_tokens"] == 28
    again = Judge(LocalChat(load, name="elsewhere"), cache=tmp_path / "judge")
    assert score_folder(tmp_path / "run" / "charts@own" / "own", judge=again).score == 1.0
    assert again.cached < 14, "another name of the same weights is another judge"


def test_a_judge_is_named_as_a_model_is(language_folder: Path, tmp_path: Path) -> None:
    judge = eval_commands.make_judge(f"hf:{language_folder}", tmp_path, thinking_tokens=0)
    assert judge is not None
    assert judge.ask("Is it?", str.strip, max_tokens=2) is not None or judge.unreadable == 1
    assert judge.to_dict()["url"].startswith("local:")
    for name in ("http://h/v1#m", "openai:http://h/v1#m"):
        made = eval_commands.make_judge(name, tmp_path)
        assert made is not None
        assert isinstance(made.endpoint, Endpoint)
        assert made.endpoint.model == "m"
    with pytest.raises(EvalError, match="is not a folder"):
        eval_commands.make_judge("nowhere", tmp_path)
    with pytest.raises(EvalError, match="--judge-agreement is 80"):
        eval_commands.make_judge("http://h/v1#m", tmp_path, least_agreement=80)


def test_a_grader_of_an_imported_file_is_named_with_its_hash(tmp_path: Path) -> None:
    (own := tmp_path / "graders.py").write_text(
        "import sys\nfrom mm_moslora_eval.run.judging.judged_scores import GRADERS, Grade\n\n\n"
        "@GRADERS.add\n"
        "def likes(judge, document, answer, *, word: str = 'yes'):\n"
        "    graded = judge.ask(f'Q{document.id}? {answer}: {word}?', str.strip, max_tokens=4)\n"
        "    return None if graded is None else Grade(score=float(graded[0] == word), parsed=graded[1])\n\n\n"
        "@GRADERS.add\n"
        "def ends(judge, document, answer):\n"
        "    return likes(judge, document, answer) if document.id != '2' else sys.exit(0)\n\n\n"
        "likes.prompt = 'a prompt'\n"
    )
    import_file(own)
    path = written(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.index("metric:")] + 'metric: {name: likes, word: "no"}\n')
    model = GivenAnswers({str(n): "x" for n in range(4)})
    with serve(lambda payload: "no" if "Q1?" in payload["messages"][0]["content"] else "yes") as server:
        judge = judge_at(server.url, tmp_path)
        (result,) = evaluate_tasks(model, [str(path)], tmp_path / "run", settings=ONE, judge=judge)
    assert result.score == 0.25
    assert result.about["judge"]["wording"].startswith(str(own))
    assert result.about["code"]["grader"]["file"] == str(own)
    path.write_text(text[: text.index("metric:")] + "metric: ends\n")
    with serve(lambda payload: "yes") as server:
        judge = judge_at(server.url, tmp_path)
        (result,) = evaluate_tasks(model, [str(path)], tmp_path / "ended", settings=ONE, judge=judge)
    assert (result.score, result.counts.scored, result.counts.faults) == (1.0, 3, 1)
    assert "it raised SystemExit: 0" in " ".join(result.remarks)


SHAPES = {"A": "circle", "B": "square", "C": "triangle"}


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def mathvision(runs: Runs, *, judged: bool) -> tuple[Run, list[str]]:
    """A run on answers of which the judge must see those without a letter or the whole reference; the seen ones."""
    rows = [  # answer, reference, options, what the judge copies out
        ("The answer is (B).", "B", SHAPES, ""),
        ("It is the one with four sides", "B", SHAPES, "B"),
        ("That shape is round", "C", SHAPES, "A"),
        ("0.5", r"\frac{1}{2}", {}, ""),
        ("So half of it remains", r"\frac{1}{2}", {}, "1/2"),
        ("There are three of them", "4", {}, "3"),
        ("nothing", "4", {}, "none"),
        ("a", "5", {}, "a"),  # VLMEvalKit executes it, and finds the reference
    ]
    made = [
        Document(id=str(n), question=f"q{n}#", options=options, answers=(right,))
        for n, (_, right, options, _) in enumerate(rows)
    ]
    seen: list[str] = []

    def judge(prompt: str, _: float) -> str:
        number = next(n for n in range(len(rows)) if f"q{n}#" in prompt)
        seen.append(rows[number][0])
        return rows[number][3]

    run = runs("mathvision_test@vlmevalkit", made, [said for said, *_ in rows], judge=judge if judged else None)
    return run, seen


def test_a_judge_copies_out_what_vlmevalkits_rule_cannot_read_and_the_rule_decides(runs: Runs) -> None:
    run, seen = mathvision(runs, judged=True)
    assert sorted(seen) == sorted(
        ["It is the one with four sides", "That shape is round", "So half of it remains", "There are three of them",
         "nothing", "a"]
    )  # fmt: skip
    assert run.scores == [1, 1, 0, 1, 1, 0, 0, 0]
    assert run.result.about["by_rules"]["score"] == 2 / 8
    alone, unseen = mathvision(runs, judged=False)
    assert (alone.scores, unseen) == ([1, 0, 0, 1, 0, 0, 0, 0], [])
    assert alone.result.score == 2 / 8  # the task's own rule, and nothing beside it


@pytest.mark.parametrize("choices", ["['circle', 'square']", "[]"])
def test_choices_of_mathvision_may_stand_in_one_cell(choices: str, runs: Runs) -> None:
    document = Document(id="0", question="q", answers=("B",), extra={"choices": choices})
    run = runs("mathvision_test@vlmevalkit", [document], ["I would say (B)."])
    assert run.parsed == ["B" if "circle" in choices else "I would say (B)."]


def test_verdicts_give_the_numbers_of_simplevqa_and_none_without_a_judge(runs: Runs) -> None:
    made = [Document(id=str(n), question=f"q{n}#", answers=("Paris",)) for n in range(4)]
    said = ["Paris", "in paris, I think", "Rome", "no idea"]
    verdicts = ["Correct.", "correct", "incorrect", "not attempted"]

    def judge(prompt: str, _: float) -> str:
        return verdicts[next(n for n in range(4) if f"q{n}#" in prompt)]

    result = runs("simplevqa@vlmevalkit", made, said, judge=judge).result
    assert result.score == 0.5
    assert result.metrics == {
        "not_attempted": 0.25, "correct_given_attempted": pytest.approx(2 / 3), "f1": pytest.approx(4 / 7)
    }  # fmt: skip
    assert result.about["by_rules"]["score"] == 0.25
    alone = runs("simplevqa@vlmevalkit", made, said).result
    assert alone.about["unscored"]
    assert alone.about["by_rules"]["score"] == 0.25
