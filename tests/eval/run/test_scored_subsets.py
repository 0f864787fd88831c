"""A selection is a view of the stored answers: nothing is deleted, and less never replaces more."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from between import just_before
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.run import result_file
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.evaluate_suite import compare, evaluate, read_samples
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.run_lock import hold_run
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.utils.errors import EvalError, MoSLoRAError
from tests.eval.eval_data import picture, write_questions
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def asked(run: Path, data: Path, *, model: FakeModel | None = None, modes: Any = ("own",), **changes: Any) -> Any:
    """Evaluate; returns the model and the results."""
    model = model or FakeModel()
    settings = dataclasses.replace(ONE, **changes)
    return model, evaluate(model, get_task(f"llava:{data}"), run, modes=modes, baselines=(), settings=settings)


@pytest.mark.parametrize("selection", [{"limit": 1}, {"samples": ("q3",)}, {"samples": ("q3", "q1"), "limit": 1}])
@pytest.mark.parametrize("mode", ["own", "wrong"])
def test_a_selection_of_a_finished_run_deletes_and_asks_nothing(
    selection: dict[str, Any], mode: str, tmp_path: Path
) -> None:
    data, run = write_questions(tmp_path / "data", count=40), tmp_path / "run"
    _, (whole,) = asked(run, data, modes=(mode,))
    stored = read_folder(run / "questions@own" / mode)
    again, (part,) = asked(run, data, modes=(mode,), **selection)
    assert again.asked == []
    assert part.n == 1
    assert read_folder(run / "questions@own" / mode) == stored
    assert [result.n for result in read_results(run)] == [40, 1]
    assert len(read_samples(run / "questions@own" / mode)) == 40
    again, (result,) = asked(run, data, modes=(mode,))
    assert again.asked == []
    assert result == whole
    assert sorted(result.n for result in eval_commands.score(run)) == [1, 40]


def test_answers_of_a_selection_are_reused_by_other_selections(tmp_path: Path) -> None:
    data, run = write_questions(tmp_path / "data", count=20), tmp_path / "run"
    asked(run, data, limit=5, modes=("wrong",))
    first, _ = asked(run, data, samples=("q2", "q7"), modes=("wrong",))
    assert first.asked == ["q7"]
    rest, _ = asked(run, data, modes=("wrong",))
    assert len(rest.asked) == 14


def test_two_processes_that_score_one_run_keep_both_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = write_questions(tmp_path / "data", count=4), tmp_path / "run"
    one, other = eval_commands.run(FakeModel(), [f"llava:{data}"], run, modes=("own", "wrong"), settings=ONE)
    (run / "results.json").unlink()
    later = threading.Thread(target=result_file.write_results, args=(run, [other]))

    def meanwhile() -> None:
        later.start()
        later.join(0.5)  # it waits for the lock; without one it has written by now

    just_before(monkeypatch, result_file, "replace_text", meanwhile, when=lambda *_: True)
    result_file.write_results(run, [one])
    later.join()
    assert {result.key for result in read_results(run)} == {one.key, other.key}


def test_data_sets_of_one_file_name_stand_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    easy, hard = write_questions(tmp_path / "easy", count=12), write_questions(tmp_path / "hard", count=12)
    hard.write_text(hard.read_text().replace("colour", "shade"))
    run = tmp_path / "run"
    results = eval_commands.run(
        FakeModel(), [f"llava:{easy}", f"llava:{hard}"], run, settings=ONE, baselines=("majority",)
    )
    assert [item.to_dict() for item in read_results(run)] == [item.to_dict() for item in results]
    assert len({result.key for result in results}) == 4
    table = eval_commands.table(results)
    assert "questions (easy/questions.jsonl)" in table
    assert "questions (hard/questions.jsonl)" in table
    html = write_report(run).read_text()
    assert html.count("<section id=") == 2
    other = tmp_path / "other"
    eval_commands.run(FakeModel(fingerprint="f2"), [f"llava:{hard}", f"llava:{easy}"], other, settings=ONE)
    assert len(eval_commands.compare_runs(str(run), str(other))) == 2
    alone = tmp_path / "alone"
    eval_commands.run(FakeModel(), [f"llava:{hard}"], alone, settings=ONE)
    assert len(eval_commands.compare_runs(str(run), str(alone))) == 1


def test_runs_on_other_documents_are_not_compared(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", count=12)
    asked(tmp_path / "a", data)
    asked(tmp_path / "b", data, limit=5)
    with pytest.raises(EvalError, match="on different documents"):
        eval_commands.compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    asked(tmp_path / "a", data, limit=5)
    ((result, text),) = eval_commands.compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    assert result.score.estimate.n == 5
    assert text.startswith("questions@own, first 5 of 12: ")


def test_scores_by_unlike_rules_are_neither_compared_nor_put_under_one_heading(tmp_path: Path) -> None:
    """An edited task file keeps its name and protocol."""
    task = get_task(f"llava:{write_questions(tmp_path / 'data', count=12)}")
    edited = dataclasses.replace(task, metric="anls")
    for run, rules in (("a", task), ("b", edited)):
        evaluate(FakeModel(), rules, tmp_path / run, modes=("own", "wrong"), baselines=(), settings=ONE)
    with pytest.raises(EvalError, match="scored by different rules: metric 'letter_or_exact' and 'anls'"):
        eval_commands.compare_runs(str(tmp_path / "a"), str(tmp_path / "b"))
    evaluate(FakeModel(), edited, tmp_path / "a", modes=("own",), baselines=(), settings=ONE)
    own, wrong = sorted(read_results(tmp_path / "a"), key=lambda result: result.mode)
    assert (own.about["metric"], wrong.about["metric"]) == ("anls", "letter_or_exact")
    assert own.subject != wrong.subject
    assert write_report(tmp_path / "a").read_text().count("<section id=") == 2
    table = eval_commands.table([own, wrong])
    assert "by letter_or_text, anls, mean, version 1" in table
    assert "by letter_or_text, letter_or_exact, mean, version 1" in table
    with pytest.raises(EvalError, match="different rules"):
        eval_commands.compare_runs(*(str(tmp_path / "a" / "questions@own" / mode) for mode in ("own", "wrong")))


def test_a_changed_picture_is_another_view_and_the_old_one_stays(tmp_path: Path) -> None:
    data, run = write_questions(tmp_path / "data", count=12), tmp_path / "run"
    _, (before,) = asked(run, data)
    (data.parent / "1.png").unlink()
    _, (after,) = asked(run, data)
    assert (before.counts.failed, after.counts.failed) == (0, 3)
    assert [result.counts.failed for result in read_results(run)] == [0, 3]
    (data.parent / "1.png").write_bytes(picture(1))
    again, (restored,) = asked(run, data)
    assert again.asked == []
    assert restored == before


def test_a_model_is_identified_by_its_weights_and_not_by_its_path(tmp_path: Path) -> None:
    data, run = write_questions(tmp_path / "data", count=4), tmp_path / "run"
    asked(run, data)
    renamed = FakeModel()
    renamed.name = "./elsewhere/fake"
    asked(run, data, model=renamed)
    assert renamed.asked == []
    with pytest.raises(EvalError, match="holds another run: its model"):
        asked(run, data, model=FakeModel(fingerprint="f2"))


def test_a_folder_in_use_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", count=4)

    def load() -> FakeModel:
        raise AssertionError("loaded")

    with hold_run(tmp_path / "run"), pytest.raises(EvalError, match="is in use"):
        eval_commands.run(load, [f"llava:{data}"], tmp_path / "run", settings=ONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot be made"):
        eval_commands.run(load, [f"llava:{data}"], tmp_path / "file", settings=ONE)


def two_protocols(folder: Path, data: Path) -> Path:
    path = folder / "bench.yaml"
    path.write_text(
        f"name: bench\nsource: {{kind: llava, path: {data}}}\n"
        "prompt: {template: '{question}'}\nprotocols:\n"
        "  strict: {metric: exact, decoding: {max_new_tokens: 7}}\n"
        "  loose: {extraction: first_line, metric: vqa, prompt: {template: 'Say {question}'}}\n"
    )
    return path


def test_another_protocol_scores_the_answers_to_its_own_task_beside_the_first(tmp_path: Path) -> None:
    data, run = write_questions(tmp_path / "data", count=12), tmp_path / "run"
    bench = two_protocols(tmp_path, data)
    eval_commands.run(FakeModel(), [f"{bench}@strict", f"llava:{data}"], run, settings=ONE)
    before = {result.key: result for result in read_results(run)}
    (result,) = eval_commands.score(run, protocol=f"{bench}@loose")
    assert (result.task, result.protocol, result.about["asked_as"]) == ("bench", "loose", "strict")
    assert result.about["prompt"]["template"] == "{question}"
    assert result.about["decoding"]["max_new_tokens"] == 7
    assert (result.about["metric"], result.about["extraction"]) == ("vqa", "first_line")
    after = {result.key: result for result in read_results(run)}
    assert before.items() <= after.items()
    assert len(after) == 3
    assert "bench@loose, asked as strict" in eval_commands.table([result])
    assert [row["score"] for row in read_samples(run / result.folder)]
    assert len(eval_commands.score(run)) == 3
    with pytest.raises(EvalError, match=r"holds no answers to mme, but to bench, questions"):
        eval_commands.score(run, protocol="mme")


def test_scoring_keeps_the_untuned_models_results_apart(tmp_path: Path) -> None:
    data, run = write_questions(tmp_path / "data", count=8), tmp_path / "run"
    asked(run, data)
    asked(run / "untuned", data, model=FakeModel(fingerprint="before"))
    before = [(folder / "results.json").read_text() for folder in (run, run / "untuned")]
    eval_commands.score(run)
    after = [(folder / "results.json").read_text() for folder in (run, run / "untuned")]
    assert [json.loads(text)["results"] for text in before] == [json.loads(text)["results"] for text in after]


@pytest.mark.parametrize("name", ["../secret/v", "{view}/../../../../secret/v", "far", "questions@own/far", "", 7])
def test_a_report_shows_nothing_from_outside_the_run(name: object, tmp_path: Path) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret"
    _, (result,) = asked(run, write_questions(tmp_path / "data", count=4))
    shutil.copytree(run / "questions@own" / "own", secret)
    shutil.copytree(run / result.folder, secret / "v")
    for path in secret.rglob("samples.jsonl"):
        path.write_text(path.read_text().replace("What", "TOPSECRET"))
    assert "TOPSECRET" in (secret / "v" / "samples.jsonl").read_text()
    for link in ("far", "questions@own/far"):
        (run / link).symlink_to(secret / "v")
    stored = json.loads((run / "results.json").read_text())
    stored["results"][0]["folder"] = name.format(view=result.folder) if isinstance(name, str) else name
    (run / "results.json").write_text(json.dumps(stored))
    try:
        assert "TOPSECRET" not in write_report(run).read_text()
    except MoSLoRAError as error:
        assert re.search(r"leaves|links out of|is no text|is missing|holds no results", str(error))  # noqa: PT017


@pytest.mark.parametrize("file", ["samples.jsonl", "task.json", "documents.jsonl"])
def test_links_in_a_view_are_not_followed(file: str, tmp_path: Path) -> None:
    run, data = tmp_path / "run", write_questions(tmp_path / "data", count=4)
    _, (result,) = asked(run, data)
    _, (other,) = asked(tmp_path / "other", data)
    path = run / result.folder / file
    path.rename(tmp_path / file)
    path.symlink_to(tmp_path / file)
    assert "left out, since they are damaged" in write_report(run).read_text()
    with pytest.raises(MoSLoRAError, match="links out of"):
        compare(run / result.folder, tmp_path / "other" / other.folder)
    if file == "samples.jsonl":  # a user's path may be a link
        assert len(read_samples(path)) == 4


def test_an_endpoint_that_hangs_does_not_outlive_an_interrupt() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        code = (
            "from mm_moslora_eval.backends.openai_endpoint import Endpoint, in_parallel\n"
            f"endpoint = Endpoint(url={url!r}, model='m', timeout=120)\n"
            "list(in_parallel(endpoint.chat, [{}] * 3, workers=2))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code], stderr=subprocess.PIPE, text=True,
            # What a shell starts with `&`, this test perhaps, has Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        try:
            server.settimeout(60)
            held = [server.accept()[0] for _ in range(2)]  # both requests are under way, and nobody answers
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=90)
        finally:
            process.kill()
    assert "KeyboardInterrupt" in error
    for connection in held:
        connection.close()
