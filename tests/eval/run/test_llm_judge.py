"""Judged tasks: graded by an endpoint, cached, within a budget; without a judge unscored and exported."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends.openai_endpoint import Endpoint
from mm_moslora_eval.protocol.task import Source, Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate, evaluate_tasks
from mm_moslora_eval.run.judging.judged_scores import WORDING, prompt_of
from mm_moslora_eval.run.judging.llm_judge import THINKING_TOKENS, Judge
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import read_results, score_folder
from mm_moslora_eval.run.scored_subsets import find_view
from mm_moslora_eval.run.submissions import write_submission
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.submission_forms import submission_forms

from mm_moslora.utils.errors import ConfigError, EvalError
from mm_moslora.utils.identity import sha256_of_values
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_server import serve

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)
Writer = Callable[..., Path]


def judged_task(path: Path, kind: str) -> Task:
    return Task(
        name=kind, source=Source(kind="tsv", path=str(path)), metric=f"{kind}_judge", aggregation=kind,
        prompt=get_task("mmvet").prompt,
    )  # fmt: skip


@pytest.fixture
def mmvet(write_tsv: Writer) -> Path:
    answers = ["a<AND>b", "c<OR>d", "7"]
    return write_tsv(
        [
            {"index": n, "question": f"Q{n}?", "answer": answer, "category": ("rec", "rec,ocr", "math")[n]}
            for n, answer in enumerate(answers)
        ]
    )


def test_without_a_judge_mmvet_is_unscored_and_exported(mmvet: Path, tmp_path: Path) -> None:
    (result,) = evaluate(FakeModel(), judged_task(mmvet, "mmvet"), tmp_path / "run", modes=("own",), settings=ONE)
    assert math.isnan(result.score)
    assert "Only a judge can score this task" in result.about["unscored"]
    place = tmp_path / "run" / "mmvet@own" / "own"
    submitted = json.loads((find_view(place) / "submission.json").read_text())
    assert submitted.keys() == {"v1_0", "v1_1", "v1_2"}
    assert all(submitted.values())
    assert "unscored" in eval_commands.table([result])
    assert eval_commands.exit_code([result]) == 0
    assert math.isnan(read_results(tmp_path / "run")[0].score)
    with pytest.raises(EvalError, match="is unscored"):
        compare(place, place)


def grades(payload: dict[str, Any]) -> str:
    text = payload["messages"][0]["content"].split("Question:")[-1]
    if "Q0?" in text:
        return "0.5"
    if "Q1?" in text:  # readable at the third temperature only
        return "0.8" if payload["temperature"] == 1.0 else "I would say fairly good"
    return "0.2"


def test_input_08_mmvet_is_graded_retried_cached_and_counted(mmvet: Path, tmp_path: Path) -> None:
    task = judged_task(mmvet, "mmvet")
    evaluate(FakeModel(), task, tmp_path / "run", modes=("own",), settings=ONE)
    place = tmp_path / "run" / "mmvet@own" / "own"
    with serve(grades) as server:
        judge = Judge(Endpoint(url=server.url, model="j", first_wait=0.01), cache=tmp_path / "run" / "judge")
        result = score_folder(place, judge=judge)
        assert result.score == pytest.approx((0.5 + 0.8 + 0.2) / 3)
        assert result.counts.not_inferable == result.counts.ungraded == 0
        assert result.metrics["rec"] == pytest.approx(0.65)
        assert result.about["judge"] | {"url": ""} == {
            "model": "j", "url": "", "wording": WORDING, "thinking_tokens": THINKING_TOKENS, "cached": 0,
            "unreadable": 2, "calls": 1 + 3 + 1, "retries": 0, "prompt_tokens": 50,
            "completion_tokens": judge.endpoint.usage.completion_tokens,
            "prompt_sha256": sha256_of_values(prompt_of(task)[1]),
        }  # fmt: skip
        prompt = next(p["messages"][0]["content"] for p in server.payloads if "Q0?" in p["messages"][0]["content"])
        assert "a <AND> b" in prompt
        again = Judge(Endpoint(url=server.url, model="j"), cache=tmp_path / "run" / "judge")
        asked = len(server.payloads)
        assert score_folder(place, judge=again).score == result.score
        assert len(server.payloads) == asked
        assert again.cached == 3
        damaged = sorted((tmp_path / "run" / "judge").glob("*.json"))
        for path, text in zip(damaged, ("", "[]", '{"model": "j"}'), strict=True):
            path.write_text(text)
        assert score_folder(place, judge=again).score == result.score
        assert len(server.payloads) == 2 * asked
    replies = [json.loads(path.read_text())["reply"] for path in (tmp_path / "run" / "judge").glob("*.json")]
    assert sorted(replies) == ["0.2", "0.5", "0.8"]


def test_the_budget_ends_the_grading_and_keeps_the_replies(mmvet: Path, tmp_path: Path) -> None:
    task = judged_task(mmvet, "mmvet")
    evaluate(FakeModel(), task, tmp_path / "run", modes=("own",), settings=ONE)
    place = tmp_path / "run" / "mmvet@own" / "own"
    with serve(lambda payload: "0.5" if "Q0?" in payload["messages"][0]["content"] else "nothing readable") as server:
        judge = Judge(Endpoint(url=server.url, model="j"), cache=tmp_path / "judge", budget_tokens=35)
        result = score_folder(place, judge=judge)
        assert math.isnan(result.score)
        assert "of 35 tokens" in result.about["unscored"]
        assert len(server.payloads) < 11  # calls that were under way may still come back
    assert len(list((tmp_path / "judge").glob("*.json"))) == 1


@pytest.mark.parametrize("reply", [{"choices": [{}]}, {"choices": ["no"]}, {"choices": [{"message": None}]}, 503])
def test_input_08_a_judge_that_is_down_is_no_zero_and_does_not_stop_the_next_task(
    reply: Any, mmvet: Path, write_tsv: Writer, tmp_path: Path
) -> None:
    plain = write_tsv([{"index": 0, "question": "Q?", "answer": "yes"}], "plain.tsv")
    (tmp_path / "j.yaml").write_text(
        f"name: judged\nsource: {{kind: tsv, path: {mmvet}}}\nmetric: mmvet_judge\naggregation: mmvet\n"
    )
    names, run = [str(tmp_path / "j.yaml"), f"tsv:{plain}"], tmp_path / "run"
    with serve(lambda _: reply, faults=[503] * 99 if reply == 503 else []) as server:
        endpoint = Endpoint(url=server.url, model="j", attempts=2, first_wait=0.001)
        results = evaluate_tasks(FakeModel(), names, run, settings=ONE, judge=Judge(endpoint, cache=tmp_path / "judge"))
    assert [result.task for result in results] == ["judged", "plain"]
    assert math.isnan(results[0].score)
    assert "The judge failed" in results[0].about["unscored"]
    assert not math.isnan(results[1].score)
    assert eval_commands.exit_code(results) == 3
    assert [result.task for result in read_results(run)] == ["judged", "plain"]


def asked(judge: Judge, *, max_tokens: int = 16) -> str:
    found = judge.ask("how good?", str.strip, max_tokens=max_tokens)
    assert found is not None
    return found[1]


def test_llavabench_is_relative_to_the_reference(write_tsv: Writer, tmp_path: Path) -> None:
    path = write_tsv(
        [
            {"index": n, "question": f"Q{n}?", "answer": "ref", "gpt4_ans": "golden", "caption": "a cat",
             "category": ("conv", "detail")[n % 2]}
            for n in range(4)
        ]
    )  # fmt: skip
    evaluate(FakeModel(), judged_task(path, "llavabench"), tmp_path / "run", modes=("own",), settings=ONE)

    def reply(payload: dict[str, Any]) -> str:
        text = payload["messages"][0]["content"]
        assert "a cat" in text
        assert "golden" in text
        return "8 4\nbecause" if "Q0?" in text or "Q2?" in text else "8 8"

    with serve(reply) as server:
        judge = Judge(Endpoint(url=server.url, model="j"), cache=tmp_path / "judge")
        result = score_folder(tmp_path / "run" / "llavabench@own" / "own", judge=judge)
    assert result.score == pytest.approx(0.75)
    assert result.metrics["conv"] == pytest.approx(0.5)
    assert result.metrics["detail"] == pytest.approx(1.0)


@pytest.fixture
def answered(write_tsv: Writer, tmp_path: Path, encoded: str) -> Path:
    rows = [
        {"index": 10 + n, "image": encoded, "question": 'What "is" <it> & why?\nTell.', "A": "x", "B": "",
         "answer": "A", "category": "c", "split": "dev"}
        for n in range(3)
    ]  # fmt: skip
    task = get_task(f"tsv:{write_tsv(rows)}")
    evaluate(FakeModel(fail_on=("11",)), task, tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    return tmp_path / "run" / "bench@own" / "own"


@pytest.mark.parametrize("form", submission_forms())
def test_every_form_holds_every_document(form: str, answered: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert write_submission(answered, out, form=form) == 1
    data = out.read_bytes()
    stored = (answered / "answers.jsonl").read_text().split("\n")[:-1]
    texts = {row["id"]: row["text"] or "" for row in map(json.loads, stored)}
    if form in ("vqav2", "docvqa"):
        key = {"vqav2": "question_id", "docvqa": "questionId"}[form]
        assert json.loads(data) == [{key: int(name), "answer": text} for name, text in texts.items()]
    elif form == "mmvet":
        assert json.loads(data) == {f"v1_{name}": text for name, text in texts.items()}
    elif form == "vizwiz":
        assert [row["answer"] for row in json.loads(data)] == list(texts.values())
    elif form in ("llava", "llavabench"):
        rows = [json.loads(text) for text in data.decode().split("\n")[:-1]]
        assert [row["text"] for row in rows] == list(texts.values())
        assert rows[0].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    elif form == "vlmevalkit":
        rows = list(csv.DictReader(io.StringIO(data.decode()), delimiter="\t"))
        assert [row["prediction"] for row in rows] == list(texts.values())
        assert rows[0]["question"] == 'What "is" <it> & why?\nTell.'
        assert {"index", "question", "A", "answer", "category", "split", "prediction"} == rows[0].keys()
    elif form == "omnidocbench":  # one page in Markdown for each picture
        with zipfile.ZipFile(io.BytesIO(data)) as pages:
            assert {Path(name).stem: pages.read(name).decode() for name in pages.namelist()} == texts
            assert {Path(name).suffix for name in pages.namelist()} == {".md"}
    else:
        cells = _workbook(data)
        assert cells[0] == ["index", "question", "A", "answer", "category", "split", "prediction"]
        assert [row[-1] for row in cells[1:]] == list(texts.values())
        assert cells[1][1] == 'What "is" <it> & why?\nTell.'


def _workbook(data: bytes) -> list[list[str]]:
    with zipfile.ZipFile(io.BytesIO(data)) as book:
        assert book.testzip() is None
        for name in book.namelist():
            ElementTree.fromstring(book.read(name))
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    name = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    return [["".join(cell.itertext()) for cell in row.iter(f"{name}c")] for row in sheet.iter(f"{name}row")]


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [("mine", "vizwiz", "exists and is not replaced"), (".", "vizwiz", "is a folder"), ("out", "vizwis", "'vizwiz'")],
)
def test_a_submission_replaces_nothing_and_has_a_known_form(
    name: str, form: str, message: str, answered: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises((ConfigError, EvalError), match=message):
        write_submission(answered, tmp_path / name, form=form)
    assert (tmp_path / "mine").read_text() == "mine"
