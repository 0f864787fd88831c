"""Tables, cards and plans: results for others, answers that nobody could read, and what an evaluation will take."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mm_moslora_eval.backends.local_model import LocalModel, turn_of
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.eval_commands import table
from mm_moslora_eval.protocol.model_interface import Answer
from mm_moslora_eval.protocol.task_registry import get_task, with_changes
from mm_moslora_eval.report import evaluation_plan
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.report.run_evidence import NamedResult, row_of
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.request_preparation import Preparation
from mm_moslora_eval.run.result_file import TaskResult, read_results
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.source_images import Hasher

from mm_moslora import cli
from mm_moslora.cli.evaluation.eval_app import eval_plan, eval_table
from mm_moslora.cli.evaluation.eval_options import QuestionOptions
from mm_moslora.reporting.run_data import evaluation_row
from mm_moslora.reporting.summary_text import verdict
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def measured(folder: Path, question_file: Path, *, name: str = "fake", **options: object) -> list[TaskResult]:
    model = FakeModel(fingerprint=name, **options)  # type: ignore[arg-type]
    model.name = name
    return evaluate(model, get_task(f"llava:{question_file}"), folder, settings=ONE, modes=("own", "blind"))


def test_a_model_card_takes_the_results(question_file: Path, tmp_path: Path) -> None:
    result = measured(tmp_path / "run", question_file, name="runs/my-model")[0]
    assert cli.run(["eval", "export", str(tmp_path / "run"), str(tmp_path / "card.yaml"), "--to", "model-index"]) == 0
    card = ModelCard(f"---\n{(tmp_path / 'card.yaml').read_text()}---\n# text\n")
    assert card.data.model_name == "my-model"
    (found,) = card.data.eval_results
    assert found.metric_value == result.score
    assert found.task_type == "image-text-to-text"
    assert found.dataset_name == "questions of questions.jsonl"
    assert found.metric_type == "letter_or_exact"
    assert found.metric_args["documents"] == 12
    assert found.metric_args["low"] == result.low
    card.data.to_yaml()


def test_protocols_and_selections_of_one_set_stay_apart(question_file: Path, tmp_path: Path) -> None:
    from mm_moslora_eval.run.result_file import write_results

    (tmp_path / "t.yaml").write_text(
        f"name: t\nsource: {{kind: llava, path: {question_file}}}\nprotocols: {{a: {{}}, b: {{metric: equal}}}}\n"
    )
    for protocol in "ab":
        evaluate(FakeModel(), get_task(f"{tmp_path / 't.yaml'}@{protocol}"), tmp_path / "run", settings=ONE,
                 modes=("own",), baselines=())  # fmt: skip
    few = EvaluationSettings(batch_size=4, rank=0, world_size=1, limit=4)
    evaluate(FakeModel(), get_task(f"{tmp_path / 't.yaml'}@a"), tmp_path / "run", settings=few, modes=("own",))
    unscored = next(result for result in read_results(tmp_path / "run") if result.scored)
    write_results(tmp_path / "run", [type(unscored)(**{**vars(unscored), "task": "other", "score": math.nan})])
    assert cli.run(["eval", "export", str(tmp_path / "run"), str(tmp_path / "model-index"), "--to", "model-index"]) == 0
    found = ModelCard(f"---\n{(tmp_path / 'model-index').read_text()}---\n").data.eval_results
    assert {(row.dataset_config, row.metric_args["protocol"]) for row in found} == {
        (None, "a"), (None, "b"), ("first 4 of 12", "a"),
    }  # fmt: skip


def exported(run: Path, folder: Path) -> Any:
    """The only row of the model card."""
    assert cli.run(["eval", "export", str(run), str(folder / "model-index"), "--to", "model-index"]) == 0
    (row,) = ModelCard(f"---\n{(folder / 'model-index').read_text()}---\n").data.eval_results
    return row


def other(value: Any) -> Any:
    """A value of the same kind that no task has."""
    if isinstance(value, bool):
        return not value
    return value + 0.5 if isinstance(value, float) else value + 3 if isinstance(value, int) else "changed"


def test_an_export_replaces_no_file_and_needs_scores(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path / "run", question_file)
    (tmp_path / "kept.yaml").write_text("mine")
    line = ["eval", "export", str(tmp_path / "run")]
    assert cli.run([*line, str(tmp_path / "kept.yaml"), "--to", "model-index"]) == 1
    assert (tmp_path / "kept.yaml").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert cli.run(["eval", "export", str(tmp_path / "empty"), str(tmp_path / "x"), "--to", "model-index"]) == 1
    assert "no scored results" in capsys.readouterr().err


def test_one_table_holds_several_models(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = measured(tmp_path / "a", question_file, name="a|b")[0]
    measured(tmp_path / "b", question_file, name="second", fail_on=["q1", "q2"])
    few = EvaluationSettings(batch_size=4, rank=0, world_size=1, limit=4)
    model = FakeModel()
    model.name = "second"
    evaluate(model, get_task(f"llava:{question_file}"), tmp_path / "c", settings=few, modes=("own",))
    runs = [str(tmp_path / name) for name in "abc"]
    assert cli.run(["eval", "table", *runs, "--html", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    head, _, whole, part, *notes = text.splitlines()
    assert f"second ({runs[1]})" in head
    assert f"{first.score * 100:.1f} % (" in whole
    assert whole.rstrip().endswith("-")
    assert part.startswith("questions, first 4 of 12  4")
    assert part.split("4   ", 1)[1].lstrip().startswith("-")
    assert "* questions, second" in notes[0]
    assert "2 of 12 answers failed and count as wrong" in notes[0]
    page = (tmp_path / "page.html").read_text()
    assert "2 of 12 answers failed" in page
    assert cli.run(["eval", "table", *runs, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| task | n | a\\|b | second (")
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert cli.run(["eval", "table", runs[0], str(tmp_path)]) == 1
    assert cli.run(["eval", "table"]) == 1
    assert cli.run(["eval", "table", runs[2], "--mode", "blind"]) == 1


class Rambling(FakeModel):
    """Names no letter in its first answers."""

    def __init__(self, unread: int) -> None:
        super().__init__(fingerprint=f"f{unread}")
        self.unread = unread

    def _answer(self, request: Any) -> Answer:
        text = "It has four legs and a long tail" if int(request.id) < self.unread else "B"
        return Answer(text=text, tokens=1, finish_reason="stop")


@pytest.mark.parametrize(("unread", "said"), [(2, False), (3, True), (20, True)])
def test_every_place_of_a_score_says_that_many_answers_were_not_read(
    unread: int, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(n), "question": f"q{n}", "options": ["x", "y"], "answer": "AB"[n % 2]} for n in range(20)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(
        "name: t\nsource: {kind: llava, path: q.jsonl}\nextraction: letter\nmetric: equal\n"
    )
    task = get_task(str(tmp_path / "t.yaml"))
    settings = EvaluationSettings(rank=0, world_size=1)
    found = {}
    for name, model in (("good", Rambling(0)), ("bad", Rambling(unread))):
        (found[name],) = evaluate(model, task, tmp_path / name, modes=("own",), baselines=(), settings=settings)
    good, bad = tmp_path / "good", tmp_path / "bad"
    eval_table(str(good), str(bad), html=tmp_path / "table.html")
    both = capsys.readouterr().out
    eval_table(str(good), str(bad), paired=True, html=tmp_path / "pair.html")
    places = {
        "table": table([found["bad"]]), "results": (bad / "results.json").read_text(),
        "page": write_report(bad).read_text(), "models": both, "models page": (tmp_path / "table.html").read_text(),
        "comparison": capsys.readouterr().out, "comparison page": (tmp_path / "pair.html").read_text(),
    }  # fmt: skip
    for name, label in (("tuned", "After tuning"), ("untuned", "Before tuning")):
        other = {"tuned": "untuned", "untuned": "tuned"}[name]
        written = [
            evaluation_row(row_of(NamedResult(name=one, label=label, result=result, less=None)))
            for one, result in ((name, found["bad"]), (other, found["good"]))
        ]
        conclusion = verdict("t", written)
        assert conclusion is not None
        places[name] = " ".join(conclusion.sentences)
    words = ("could not be read and count as wrong", f"None of {unread} answers could be read")
    assert {name: any(word in text for word in words) for name, text in places.items()} == dict.fromkeys(places, said)


def test_a_plan_counts_answers_tokens_hours_and_cost(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"llava:{question_file}"
    settings = EvaluationSettings(rank=0, world_size=1, limit=6)
    evaluate(FakeModel(delay=0.01), get_task(name), tmp_path / "run", modes=("own",), baselines=(), settings=settings)
    changes = ("decoding.temperature=1", "decoding.samples=4", "decoding.max_new_tokens=100")
    asked = QuestionOptions(change=changes, limit=5)
    eval_plan(name, asked=asked, measured=tmp_path / "run", price="1/10", image_tokens=100)
    table, text = capsys.readouterr().out.split("\n\n")
    task = with_changes(get_task(name), changes)
    assert table.splitlines()[-1].split()[:4] == [task.id, "5", "20", "20"]
    assert table.split()[-1] == "2,000"
    prompt = int(table.split()[-2].replace(",", "")) + 20 * 100
    assert f"about {prompt:,} tokens" in text
    assert f"Cost: about {(prompt + 10 * 2000) / 1e6:,.2f} with the longest answers, " in text
    seconds = evaluation_plan.measured(tmp_path / "run").seconds
    assert seconds >= 0.01
    assert f"Hours: {20 * seconds / 3600:.2f}" in text


def test_a_folder_of_a_model_counts_its_own_tokens_without_its_weights(
    question_file: Path, tmp_path: Path, language_folder: Path, vision_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, name = export_tiny(tmp_path / "tiny", language_folder, vision_folder), f"llava:{question_file}"
    model = open_model(str(folder))
    assert isinstance(model, LocalModel)
    work = Preparation(
        task := get_task(name), task.load().documents, mode="own", seed=0, fingerprint="", hasher=Hasher()
    )
    requests = [work.request(item) for item in work.items]
    asked = sum(len(model.encoder.encode_prompt([turn_of(one) for one in item.messages])) for item in requests)
    (folder / "model.safetensors").unlink()
    eval_plan(name, model=str(folder), price="1/0", image_tokens=100_000)
    said = capsys.readouterr().out
    assert f"Prompts: {asked:,} tokens, counted by the model's tokenizer and processor, pictures included." in said
    assert f"Cost: at most {asked / 1e6:,.2f}" in said
    eval_plan(name, model="openai:http://127.0.0.1:1/v1#m")
    assert "bytes of text for one. --model with a folder counts them." in capsys.readouterr().out


def test_data_that_are_not_at_hand_are_named_once_with_their_address(capsys: pytest.CaptureFixture[str]) -> None:
    eval_plan("mmstar", "mme@llava", "pixmo_count", asked=QuestionOptions(limit=100))
    (tsv, hub) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The prompts of ")]
    assert tsv.startswith("The prompts of mmstar@llava and of 1 more are unknown: Data file 'MMStar.tsv' was not found")
    assert "VLMEvalKit's files are at https://opencompass.openxlab.space/utils/VLMEval/MMStar.tsv." in tsv
    assert hub.startswith("The prompts of pixmo_count@lmms_eval are unknown: ")
