"""The runner loses no answers, mixes none, asks no question twice; a selection is a view of the stored answers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from between import just_before
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.run import result_file
from mm_moslora_eval.run.answer_log import read_folder
from mm_moslora_eval.run.evaluate_suite import evaluate, evaluate_tasks
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import read_results, score_folder
from mm_moslora_eval.run.run_records import hold_run, open_run
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.sources.source_images import MODES
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.launch.shard import Shard
from mm_moslora.utils.errors import ConfigError, EvalError, MoSLoRAError
from mm_moslora.utils.files import replace_text
from tests.eval.eval_data import TIMES, picture, write_questions
from tests.eval.eval_fake import FakeModel

ROOT = Path(__file__).parents[3]
ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def task_of(path: Path):
    return get_task(f"llava:{path}")


def answers_of(run: Path, mode: str = "own") -> Path:
    return next(run.glob(f"*/{mode}/answers.jsonl"))


def stripped(path: Path) -> object:
    """A result file without its times."""
    drop = {"date", "time", "seconds"}

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if key not in drop}
        return [clean(item) for item in value] if isinstance(value, list) else value

    lines = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    return [clean(json.loads(text)) for text in lines if text]


@pytest.mark.parametrize("place", ["{task}", "{task}/{mode}", "{task}/{mode}/{view}", "shards", "shards/1-of-2"])
def test_nothing_is_written_through_a_linked_folder_of_a_run(place: str, tmp_path: Path) -> None:
    data, run, mine = write_questions(tmp_path / "data", count=4), tmp_path / "run", tmp_path / "mine"
    (result,) = evaluate_tasks(FakeModel(), [f"llava:{data}"], run, settings=ONE, modes=("own",), baselines=())
    (run / "shards/1-of-2").mkdir(parents=True)
    task, mode, view = Path(result.folder).parts
    linked = run / place.format(task=task, mode=mode, view=view)
    linked.rename(mine)
    linked.symlink_to(mine)
    for path in mine.rglob("*.json*"):
        path.write_text("MINE")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    shard = Shard.parse("1/2") if "shards" in place else None
    with pytest.raises(ConfigError, match=r"is a link to .* Nothing is written through it"):
        evaluate_tasks(FakeModel(), [f"llava:{data}"], run, settings=replace(ONE, shard=shard), modes=("own",))
    assert {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()} == before


def test_the_folder_of_a_run_itself_may_be_a_link(tmp_path: Path) -> None:
    data, scratch = write_questions(tmp_path / "data", count=4), tmp_path / "scratch"
    scratch.mkdir()
    (tmp_path / "run").symlink_to(scratch)
    evaluate_tasks(FakeModel(), [f"llava:{data}"], tmp_path / "run", settings=ONE, modes=("own",), baselines=())
    assert answers_of(scratch).is_file()


def test_every_document_is_asked_once_and_scored_once(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    seen: list[tuple[str, int, int]] = []
    results = evaluate(
        model,
        task_of(question_file),
        tmp_path / "run",
        settings=ONE,
        progress=lambda mode, done, total: seen.append((mode, done, total)),
    )
    assert [result.mode for result in results] == ["own", "blind", "wrong", "majority", "question_majority"]
    assert all(result.n == result.counts.total == result.counts.scored == 12 for result in results)
    assert sorted(model.asked) == sorted([f"q{n}" for n in range(12)] * 3)
    assert seen[-1] == ("wrong", 12, 12)
    assert seen[0] == ("own", 0, 12)
    own = read_samples(tmp_path / "run" / "questions@own" / "own")
    assert [row["id"] for row in own] == [f"q{n}" for n in range(12)]
    assert results[0].score == pytest.approx(sum(row["score"] for row in own) / 12)
    assert results[0].categories.keys() == {"colour", "yes/no"}
    assert results[0].stderr_kind == "clustered"
    assert [item.to_dict() for item in read_results(tmp_path / "run")] == [item.to_dict() for item in results]


def test_a_second_run_does_not_call_the_model(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    first = evaluate(model, task_of(question_file), tmp_path / "run", settings=ONE)
    before = stripped(tmp_path / "run" / "results.json")
    again = FakeModel()
    assert evaluate(again, task_of(question_file), tmp_path / "run", settings=ONE) == first
    assert again.asked == []
    assert stripped(tmp_path / "run" / "results.json") == before


def test_input_05_torn_last_line_is_dropped_and_only_its_sample_asked_again(
    question_file: Path, tmp_path: Path, model: FakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    path = answers_of(tmp_path / "run")
    before = stripped(path)
    path.write_bytes(path.read_bytes()[:-20])
    again = FakeModel()
    evaluate(again, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    assert again.asked == ["q11"]
    assert stripped(path) == before
    assert "torn" in caplog.text


def test_duplicate_answers_the_last_one_wins(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    path = answers_of(tmp_path / "run")
    row = json.loads(path.read_text().split("\n")[2])
    with path.open("a") as stream:
        stream.write(json.dumps(row | {"text": "purple"}) + "\n")
    score_folder(path.parent)
    assert read_samples(path.parent)[2]["text"] == "purple"


def test_input_06_changed_pixel_word_or_weight_is_not_answered_from_the_file(
    question_file: Path, tmp_path: Path
) -> None:
    evaluate(FakeModel(), task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    (question_file.parent / "1.png").write_bytes(picture(77))
    pixel = FakeModel()
    evaluate(pixel, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    assert sorted(pixel.asked) == ["q1", "q5", "q9"]
    question_file.write_text(question_file.read_text().replace("What colour is it? (1)", "Which colour is it? (1)", 1))
    word = FakeModel()
    evaluate(word, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    assert word.asked == ["q4"]
    with pytest.raises(EvalError, match="holds another run: its model"):
        evaluate(FakeModel(fingerprint="f2"), task_of(question_file), tmp_path / "run", settings=ONE)


def test_one_failing_sample_is_recorded_and_counted_as_wrong(question_file: Path, tmp_path: Path) -> None:
    failing = FakeModel(fail_on=("q3",))
    (result,) = evaluate(failing, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert (result.n, result.counts.scored, result.counts.failed) == (12, 11, 1)
    assert result.score == pytest.approx(result.completed["score"] * 11 / 12)
    assert eval_commands.exit_code([result]) == 3
    assert eval_commands.exit_code([result], max_failed_share=0.1) == 0
    row = read_samples(tmp_path / "run" / "questions@own" / "own")[3]
    assert row["failed"]
    assert row["score"] == 0
    assert row["error"] == "RuntimeError: cannot answer q3"
    stored = [json.loads(text) for text in answers_of(tmp_path / "run").read_text().split("\n") if text]
    assert "Traceback" in stored[3]["error"]
    # Once the cause is gone, a rerun asks the failed sample and no other.
    mended = FakeModel()
    (result,) = evaluate(mended, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert mended.asked == ["q3"]
    assert result.counts.failed == 0


def test_missing_picture_is_a_counted_failure_in_every_mode(
    question_file: Path, tmp_path: Path, model: FakeModel
) -> None:
    (question_file.parent / "2.png").unlink()
    results = evaluate(model, task_of(question_file), tmp_path / "run", baselines=(), settings=ONE)
    assert [result.counts.failed for result in results] == [3, 3, 3]
    assert all(result.n == 12 for result in results)
    assert "q2" not in model.asked


def test_corrupt_picture_fails_alone_in_blind_mode(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    (question_file.parent / "2.png").write_bytes(b"no picture")
    (result,) = evaluate(model, task_of(question_file), tmp_path / "run", modes=("blind",), baselines=(), settings=ONE)
    assert result.counts.failed == 3


def test_a_model_that_always_fails_stops_the_run(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data", count=40)
    broken = FakeModel(fail_on=[f"q{n}" for n in range(40)])
    with pytest.raises(EvalError, match="first 16 samples"):
        evaluate(broken, task_of(path), tmp_path / "run", modes=("own",), settings=ONE)


def test_samples_that_fail_again_stop_no_run_that_has_answers(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "data", count=40)
    half = FakeModel(fail_on=[f"q{n}" for n in range(40) if n // 4 % 2])
    for _ in range(2):
        (result,) = evaluate(half, task_of(path), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
        assert (result.counts.scored, result.counts.failed) == (20, 20)


def test_pictures_shown_in_each_mode(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=MODES, baselines=(), settings=ONE)
    own, blind, wrong = model.requests[:12], model.requests[12:24], model.requests[24:]
    shown = {request.id: request.images[0] for request in own}
    for request in blind:
        image = request.images[0]
        assert image.size == (8, 6)
        assert len(image.getcolors()) == 1
    assert all(request.images[0] != shown[request.id] for request in wrong)
    assert {request.images[0] for request in wrong} == set(shown.values())
    by_picture: dict[Path, set[Path]] = {}
    for request in wrong:
        by_picture.setdefault(shown[request.id], set()).add(request.images[0])
    assert all(len(others) == 1 for others in by_picture.values())


def test_questions_on_one_picture_are_asked_together(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(
        model,
        task_of(question_file),
        tmp_path / "run",
        modes=("own",),
        settings=EvaluationSettings(batch_size=1, rank=0, world_size=1),
    )
    pictures = [request.images[0] for request in model.requests]
    changes = sum(a != b for a, b in itertools.pairwise(pictures))
    assert changes == 3


def test_folder_of_another_format_is_refused(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    run = tmp_path / "run" / "run.json"
    run.write_text(run.read_text().replace('"format": 1', '"format": 0'))
    with pytest.raises(EvalError, match="its format is 0"):
        evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)


def test_unfinished_answers_are_not_scored(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), settings=ONE)
    path = answers_of(tmp_path / "run")
    lines = path.read_text().split("\n")
    path.write_text("\n".join(lines[:5]) + "\n")
    with pytest.raises(EvalError, match=r"7 of 12 documents have no answer.*--partial"):
        eval_commands.score(tmp_path / "run")


def test_a_run_that_is_answered_in_part_is_scored_in_part_until_it_goes_on(
    question_file: Path, tmp_path: Path, model: FakeModel, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", modes=("own", "wrong"), baselines=(), settings=ONE)
    path = answers_of(tmp_path / "run")
    path.write_text("\n".join(path.read_text().split("\n")[:5]) + "\n")
    (tmp_path / "run" / "results.json").unlink()
    assert cli.run(["eval", "score", str(tmp_path / "run")]) == 1
    said = capsys.readouterr()
    assert "7 of 12 documents have no answer yet" in said.err
    assert "wrong" in said.out  # its score is printed all the same
    assert cli.run(["eval", "score", str(tmp_path / "run"), "--partial"]) == 3
    own, wrong = sorted(read_results(tmp_path / "run"), key=lambda result: result.mode)
    assert (own.counts.failed, own.counts.scored, own.completed["n"], wrong.counts.failed) == (7, 5, 5, 0)
    assert any("not asked yet" in remark for remark in own.remarks)
    again = FakeModel()
    (whole,) = evaluate(again, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert (whole.counts.failed, len(again.asked)) == (0, 7)


def test_limit_can_grow_and_keeps_what_is_answered(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    few = EvaluationSettings(batch_size=4, limit=5, rank=0, world_size=1)
    (result,) = evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=few)
    assert result.n == 5
    more = FakeModel()
    (result,) = evaluate(more, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert result.n == 12
    assert len(more.asked) == 7


def test_scoring_needs_only_the_answers(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    results = evaluate(model, task_of(question_file), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    question_file.unlink()
    code = (
        "import sys; from pathlib import Path; from mm_moslora_eval import eval_commands as cli;"
        f"r = cli.score(Path({str(tmp_path / 'run')!r})); print(r[0].score, 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=_environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(results[0].score), "False"]


def test_compare_two_modes(question_file: Path, tmp_path: Path, model: FakeModel) -> None:
    evaluate(model, task_of(question_file), tmp_path / "run", settings=ONE)
    place = tmp_path / "run" / "questions@own"
    ((result, text),) = eval_commands.compare_runs(str(place / "own"), str(place / "wrong"))
    score = result.score
    assert score.wins + score.losses + score.ties == score.questions == 12
    assert len(result.samples) == score.wins + score.losses
    assert score.estimate.value == pytest.approx(score.a - score.b)
    assert "A wins" in text
    assert "The interval rests on 4 pictures with 12 questions." in text
    # A t-test with 3 degrees of freedom; a normal one has 2.8.
    assert score.estimate.detectable > 4 * score.estimate.stderr
    few = EvaluationSettings(batch_size=4, limit=5, rank=0, world_size=1)
    evaluate(model, task_of(question_file), tmp_path / "other", modes=("own",), settings=few)
    with pytest.raises(EvalError, match="different documents"):
        compare(place / "own", tmp_path / "other" / "questions@own" / "own")


def _environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "eval", ROOT))), **more}


def _start(data: Path, output: Path, log: Path, world: int, delay: float) -> list[subprocess.Popen[bytes]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.eval.eval_worker", str(data), str(output), str(log), str(delay)],
            cwd=ROOT,
            env=_environment(RANK=str(rank), WORLD_SIZE=str(world)),
            stderr=subprocess.DEVNULL,
        )
        for rank in range(world)
    ]


def _finish(processes: list[subprocess.Popen[bytes]]) -> None:
    assert [process.wait(timeout=180) for process in processes] == [0] * len(processes)


FILES = (
    "results.json",
    "questions@own/{}/answers.jsonl",
    "questions@own/{}/all-*/samples.jsonl",
    "questions@own/{}/all-*/task.json",
)


def test_input_07_two_ranks_share_the_work(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", count=13)
    log = tmp_path / "log"
    _finish(_start(data, tmp_path / "run", log, 2, 0.01))
    asked = [tuple(text.split()) for text in log.read_text().splitlines()]
    assert {rank for rank, _ in asked} == {"0", "1"}
    names = [name for _, name in asked if name != "q5"]
    assert sorted(names) == sorted([f"q{n}" for n in range(13) if n != 5] * 2)


def _answered_or_ended(log: Path, size: int, processes: list[subprocess.Popen[bytes]]) -> bool:
    return log.stat().st_size > size or all(process.poll() is not None for process in processes)


@pytest.mark.slow
@pytest.mark.usefixtures("start_at_once")
def test_kill_9_at_random_points(tmp_path: Path) -> None:
    """Two ranks, killed ten times at random points, write the files of an undisturbed run, except times."""
    data = write_questions(tmp_path / "data", count=120, pictures=24)
    _finish(_start(data, tmp_path / "quiet", tmp_path / "quiet.log", 1, 0.0))
    generator = random.Random(7)
    kills = 0
    run, log = tmp_path / "run", tmp_path / "run.log"
    for _ in range(10):
        log.touch()
        processes = _start(data, run, log, 2, 0.02)
        wait_until(functools.partial(_answered_or_ended, log, log.stat().st_size, processes))
        generator.shuffle(processes)
        for process in processes:  # one rank first, the other a moment later
            time.sleep(generator.uniform(0.0, 0.15))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait(timeout=180)
    assert kills >= 10
    _finish(_start(data, run, log, 2, 0.0))
    for name in FILES:
        for mode in ("own", "wrong"):
            (ours,), (quiet,) = (list(folder.glob(name.format(mode))) for folder in (run, tmp_path / "quiet"))
            assert TIMES.sub(b"", ours.read_bytes()) == TIMES.sub(b"", quiet.read_bytes()), name
    # At most one batch per rank and kill is asked twice; the failing sample is asked again by design.
    asked = [text.split()[1] for text in log.read_text().splitlines()]
    assert len([name for name in asked if name != "q5"]) <= 2 * 119 + kills * 4


def test_equal_process_ids_on_two_hosts_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    just_before(monkeypatch, Path, "replace", lambda: replace_text(path, "theirs"), when=lambda *_: True)
    replace_text(path, "ours")
    assert path.read_text() == "ours"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["results.json", "report.html", "invocations.jsonl"])
def test_a_folder_with_other_files_is_refused_for_an_evaluation(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"already holds {name}"), open_run(tmp_path, FakeModel()):
        pytest.fail("it would be overwritten")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    for text in ("[]", "{", "1"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(EvalError, match=r"run\.json is damaged"), open_run(tmp_path, FakeModel()):
            pytest.fail("these answers belong to no request")


def test_a_stratified_sample_has_the_shares_of_the_data_and_a_view_of_its_own(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "data", count=40)
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["category"] = "rare" if number < 8 else "often"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(f"llava:{questions}")

    def chosen(**settings: Any) -> list[Document]:
        return list(EvaluationSettings(rank=0, world_size=1, **settings).select(task.load()))

    sample = chosen(limit=10, stratify="category")
    assert [document.category for document in sample].count("rare") == 2
    assert [document.id for document in sample] != [document.id for document in chosen(limit=10)]
    assert sample == chosen(limit=10, stratify="category")
    assert {one.id for one in sample} < {one.id for one in chosen(limit=20, stratify="category")}
    assert {one.id for one in sample} != {one.id for one in chosen(limit=10, stratify="category", seed=1)}
    assert len(chosen(limit=100, stratify="category")) == 40
    settings = EvaluationSettings(rank=0, world_size=1, limit=10, stratify="category")
    results = evaluate(FakeModel(), task, tmp_path / "run", modes=("own",), settings=settings)
    assert {result.about["selection"]["name"] for result in results} == {"10 by category"}
    assert next((tmp_path / "run").rglob("samples.jsonl")).parent.name.startswith("10-by-category-")
    with pytest.raises(EvalError, match=r"stratify is 'topic', and 40 of 40 documents have nothing in this column"):
        chosen(limit=10, stratify="topic")
    with pytest.raises(EvalError, match="set both"):
        EvaluationSettings(rank=0, world_size=1, stratify="category")


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
    one, other = evaluate_tasks(FakeModel(), [f"llava:{data}"], run, modes=("own", "wrong"), settings=ONE)
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
    results = evaluate_tasks(
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
    evaluate_tasks(FakeModel(fingerprint="f2"), [f"llava:{hard}", f"llava:{easy}"], other, settings=ONE)
    assert len(eval_commands.compare_runs(str(run), str(other))) == 2
    alone = tmp_path / "alone"
    evaluate_tasks(FakeModel(), [f"llava:{hard}"], alone, settings=ONE)
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
        evaluate_tasks(load, [f"llava:{data}"], tmp_path / "run", settings=ONE)
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot be made"):
        evaluate_tasks(load, [f"llava:{data}"], tmp_path / "file", settings=ONE)


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
    evaluate_tasks(FakeModel(), [f"{bench}@strict", f"llava:{data}"], run, settings=ONE)
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
