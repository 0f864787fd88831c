"""`mm-moslora eval ...` end to end, offline: miniature documents, a tiny model, reports, comparisons, two ranks."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants
from mm_moslora_eval import sources
from mm_moslora_eval.protocol.task_registry import get_task, load_file
from mm_moslora_eval.run import run_records
from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.scored_subsets import read_samples
from preloaded import Preloaded

from mm_moslora import cli
from tests.builders.miniature_benchmarks import TASKS, make_miniature
from tests.builders.miniature_layouts import FORMS
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel
from tests.eval.eval_models import export_tiny

ROOT = Path(__file__).parents[2]
RUN = ("mmbench_en_dev", "pope", "mme", "textvqa_val", "vqav2_val", "scienceqa_img", "hallusionbench", "mmvet",
       "commonsense_boolq", "chartqa_test")  # fmt: skip
CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, language_folder: Path, vision_folder: Path) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"), language_folder, vision_folder)


@pytest.fixture(scope="module")
def miniature(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature")
    make_miniature(folder, max_new_tokens=4)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny: Path, miniature: Path) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    names = [str(miniature / f"{name}.yaml") for name in RUN]
    code = cli.run(
        ["eval", "run", *names, "--model", str(tiny), "--output", str(run), "--modes", "own,wrong,own",
         "--precision", "fp32", "--batch-size", "16", "--baselines", "majority"]
    )  # fmt: skip
    assert code == 0
    return run


def test_ten_miniature_benchmarks_run_and_score(finished: Path) -> None:
    results = {(result.task, result.mode): result for result in read_results(finished)}
    assert {name for name, _ in results} == set(RUN)
    assert all(result.n == result.counts.total > 0 and result.counts.failed == 0 for result in results.values())
    assert results["mmbench_en_dev", "own"].metrics["questions"] == 6
    assert results["mmvet", "own"].about["unscored"]
    assert results["pope", "own"].metrics.keys() >= {"f1"}
    assert results["commonsense_boolq", "majority"].score == 0.75
    texts = {row["text"] for row in read_samples(finished / "pope@llava" / "own")}
    assert len(texts) > 1
    (call,) = [json.loads(text) for text in (finished / "invocations.jsonl").read_text().splitlines()]
    assert (call["model"]["precision"], call["model"]["device"], call["settings"]["batch_size"]) == (
        "float32",
        "cpu",
        16,
    )
    assert call["environment"]["torch"]
    assert "Calls that answered" in (finished / "report.html").read_text()


def test_every_other_miniature_runs_with_a_checkpoint(tiny: Path, miniature: Path, tmp_path: Path) -> None:
    """In the layouts that the task files name: pictures and options of each reach the model, and answers are scored."""
    asked = {name for name in FORMS if name != "refcoco" and not name.startswith("omnidocbench")}  # boxes, no scores
    names = [str(miniature / f"{name}.yaml") for name in asked]
    command = ["eval", "run", *names, "--model", str(tiny), "--output", str(tmp_path), "--batch-size", "64"]
    assert cli.run([*command, "--precision", "fp32", "--no-report"]) == 0
    results = {result.task: result for result in read_results(tmp_path)}
    assert results.keys() == asked
    assert all(result.n == result.counts.total > 0 and result.counts.failed == 0 for result in results.values())
    judged = [result for name, result in results.items() if name.startswith(("charxiv", "simplevqa"))]
    assert all(result.about["unscored"] and 0 <= result.about["by_rules"]["score"] <= 1 for result in judged)
    assert all(0 <= result.score <= 1 for result in results.values() if result not in judged)
    assert results["mmvp"].metrics.keys() >= {"vanilla"}
    assert results["nlvr2_test"].metrics.keys() >= {"consistency"}
    assert results["lvbench"].metrics.keys() >= {"reasoning", "summarization"}
    assert results["naturalbench"].metrics.keys() >= {"vanilla", "question", "image"}


def test_the_data_of_a_task_are_read_once(question_file: Path, tmp_path: Path, monkeypatch) -> None:
    read: list[str] = []
    load = sources.load
    monkeypatch.setattr(sources, "load", lambda source, **given: read.append(source.path) or load(source, **given))
    tasks = [f"llava:{question_file}", f"llava:{write_questions(tmp_path / 'other', count=4)}"]
    evaluate_tasks(FakeModel(), tasks, tmp_path / "run")
    assert len(read) == len(set(read)) == 2


def test_a_recorded_call_holds_no_secret(tmp_path: Path, monkeypatch) -> None:
    address = "https://me:pa55word-canary@example.org/v1"
    command = ["mm-moslora", "eval", "run", "pope", "--model", f"{address}#m", "--api-key", "k3y-canary"]
    monkeypatch.setattr("sys.argv", command)
    run_records.record(tmp_path, FakeModel(), {"judge": address})
    text = (tmp_path / "invocations.jsonl").read_text()
    assert "canary" not in text
    assert "example.org/v1#m" in text


def test_right_miniature_answers_get_the_full_score(miniature: Path, tmp_path: Path, capsys) -> None:
    """Every shipped protocol reads the right answer of every document as right."""
    for name in TASKS:
        # A judge, boxes in a model's own form, and pages without references.
        if name in ("mmvet", "refcoco") or name.startswith("omnidocbench"):
            continue
        for task in load_file(miniature / f"{name}.yaml"):
            if task.metric == "judge":
                continue
            answers = {document.id: document.answers[0] for document in task.load().documents}
            stored = tmp_path / f"{task.id}.json"
            stored.write_text(json.dumps(answers))
            run = tmp_path / task.id
            code = cli.run(
                ["eval", "run", f"{miniature / name}.yaml@{task.protocol}", "--model", f"replay:{stored}",
                 "--output", str(run), "--no-report"]
            )  # fmt: skip
            assert code == 0, capsys.readouterr()
            (result,) = read_results(run)
            best = {"mme": 1000.0}.get(name, 1.0)
            assert result.score == pytest.approx(best, abs=0.04 if "vqa" in name else 1e-9), task.id
            assert result.counts.not_inferable == 0, task.id


def test_scoring_again_changes_nothing_and_needs_no_torch(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("samples.jsonl")}
    script = (
        "import sys\nfrom mm_moslora.cli import run\ncode = run(sys.argv[1:])\n"
        "assert 'torch' not in sys.modules\nsys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "eval", "score", str(run), "--no-report"],
        capture_output=True, text=True, cwd=ROOT, timeout=240,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {path: path.read_bytes() for path in run.rglob("samples.jsonl")} == before


@pytest.mark.parametrize("arguments", [["list", "pope"], ["list", "mmbench_en_dev@moslora", "--details"]])
def test_lists_and_descriptions(arguments: list[str], capsys) -> None:
    assert cli.run(["eval", *arguments]) == 0
    out = capsys.readouterr().out
    assert ("pope" in out) == ("--details" not in arguments)
    assert ("The data cannot be read" in out) == ("--details" in arguments)


def test_descriptions_and_plans_do_not_touch_the_network(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's clients would try again for half a minute where there is none, and fetch gigabytes where there is."""
    with socket.create_server(("127.0.0.1", 0), backlog=100) as hub:
        url = f"http://127.0.0.1:{hub.getsockname()[1]}"
        for place in (constants, datasets.config):
            monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)
        assert cli.run(["eval", "list", "mathvision_test", "--details"]) == 0
        assert "`mm-moslora eval plan TASK --check` fetches it" in capsys.readouterr().out
        assert cli.run(["eval", "plan", "mathvision_test", "blink_val", "--limit", "5"]) == 0
        assert "The prompts of mathvision_test@official and of 1 more are unknown" in capsys.readouterr().out
        hub.setblocking(False)
        with pytest.raises(BlockingIOError):
            hub.accept()
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_check_and_dry_run(miniature: Path, capsys) -> None:
    assert cli.run(["eval", "plan", *(str(miniature / f"{name}.yaml") for name in TASKS), "--check"]) == 0
    assert capsys.readouterr().out.count(" has no faults: ") == len(TASKS)
    assert cli.run(["eval", "run", str(miniature / "mme.yaml"), "--protocol", "lmms_eval", "--dry-run"]) == 0
    assert "mme@lmms_eval" in capsys.readouterr().out


BAD = [
    (["run", "pop"], "Did you mean 'pope'"),
    (["run"], "No task was given"),
    (["run", "llava:QUESTIONS", "--model", ""], "No model was given"),
    (["run", "llava:QUESTIONS", "--model", "replay:missing.jsonl"], "is missing"),
    (["run", "llava:QUESTIONS", "--batch-size", "0", "--model", "replay:x"], "batch_size is 0"),
    (["plan", "mmvet", "--check"], "was not found"),
    (["plan", "nlvr2_test@official", "--check"], "Data file 'nlvr/nlvr2/data/test1.json' was not found"),
    (["plan", "lvbench@official", "--check"], "Data file 'LVBench/video_info.meta.jsonl' was not found"),
    (["score", "nowhere"], "is not part of an evaluation run"),
    (["table", "nowhere", "elsewhere", "--paired"], "There is no 'nowhere'"),
    (["table", ".", ".", "--paired"], "no scored task in common"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message for _, message in BAD])
def test_mistakes_are_one_clear_line_and_code_1(arguments: list[str], message: str, tmp_path: Path, capsys) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    given = [argument.replace("QUESTIONS", str(questions)) for argument in arguments]
    assert cli.run(["eval", *given, *(["--output", str(tmp_path / "run")] if given[0] == "run" else [])]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_failed_samples_give_exit_code_3(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps({f"q{n}": "yes" for n in range(3)}))
    command = ["eval", "run", f"llava:{questions}", "--model", f"replay:{stored}", "--output", str(tmp_path / "run")]
    assert cli.run(command) == 3
    assert cli.run([*command, "--max-failed-share", "0.25"]) == 0


def replayed(tmp_path: Path, name: str, wrong: int) -> Path:
    """A run over 40 questions on 20 pictures in which the first `wrong` answers are wrong."""
    questions = write_questions(tmp_path / "data", count=40, pictures=20)
    rows = [json.loads(text) for text in questions.read_text().splitlines()]
    stored = tmp_path / f"{name}.json"
    said = {row["question_id"]: "purple <b>x</b>" if n < wrong else row["answer"] for n, row in enumerate(rows)}
    stored.write_text(json.dumps(said))
    run = tmp_path / name
    assert cli.run(["eval", "run", f"llava:{questions}", "--model", f"replay:{stored}", "--output", str(run)]) == 0
    return run


def test_compare_runs_seeds_and_page(tmp_path: Path, capsys) -> None:
    a, b, c = replayed(tmp_path, "a", 4), replayed(tmp_path, "b", 20), replayed(tmp_path, "c", 24)
    page = tmp_path / "page.html"
    capsys.readouterr()
    assert cli.run(["eval", "table", str(a), f"{b},{c}", "--paired", "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert "A 90.0 %, B 45.0 %. A is better than B: +45.0 points (95 % +40.2 to +49.8)" in out
    assert "A wins 20, B wins 0, equal 20 of 40; sign test p " in out
    assert "B 50.0 %, 40.0 %" in out
    assert re.search(r"20 pictures with 40 questions. A true difference of \d.\d points is detected with 80 %", out)
    html = page.read_text()
    for verb in (["eval", "table", str(a), str(b), "--paired", "--html"], ["report", str(a), "--output"]):
        assert cli.run([*verb, str(tmp_path)]) == 1
        assert f"{tmp_path} is a folder; expected the file to write" in capsys.readouterr().err
    assert "A is better than B" in html
    assert "<b>x</b>" not in html
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert cli.run(["eval", "table", str(a), str(a), "--paired"]) == 0
    out = capsys.readouterr().out
    assert "It is not shown that A and B differ: +0.0 points" in out
    assert "The interval rests on 20 pictures with 40 questions. They all differ by the same amount" in out
    assert "is detected" not in out


def test_mmbench_is_compared_by_question(miniature: Path, tmp_path: Path) -> None:
    documents = get_task(str(miniature / "mmbench_en_dev.yaml")).load().documents
    right = {document.id: document.answers[0] for document in documents}
    wrong_once = right | {"1000000": "Z"}  # one rotation of question 0
    places = []
    for name, answers in (("a", right), ("b", wrong_once)):
        stored = tmp_path / f"{name}.json"
        stored.write_text(json.dumps(answers))
        run = tmp_path / name
        arguments = ["--model", f"replay:{stored}", "--output", str(run), "--no-report"]
        assert cli.run(["eval", "run", str(miniature / "mmbench_en_dev.yaml"), *arguments]) == 0
        places.append(run / "mmbench_en_dev@llava" / "own")
    result = compare(places[0], places[1])
    score = result.score
    assert (score.a, score.b) == (1.0, pytest.approx(5 / 6))
    assert (score.questions, score.wins, score.changed) == (6, 1, ("0",))
    assert result.samples[0][1]["id"] == "1000000"
    assert result.caution == ""


def test_report_is_one_escaped_page_without_network(tmp_path: Path) -> None:
    html = (replayed(tmp_path, "a", 4) / "report.html").read_text()
    assert "&lt;b&gt;x&lt;/b&gt;" in html
    assert "<b>x</b>" not in html
    assert "data:image/jpeg;base64," in html
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", html)
    assert html.count("<article") == 40
    assert html.count('data-verdict="wrong"') == 4


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_report_in_a_browser_filters_and_fits(tmp_path: Path) -> None:
    page = replayed(tmp_path, "a", 4) / "report.html"
    (page.parent / "frame.html").write_text(
        '<iframe id="f" src="report.html" style="width:400px;height:800px;border:0"></iframe><script>onload=()=>{'
        'const d=document.getElementById("f").contentDocument;d.querySelector("[data-filter=wrong]").click();'
        'const open=[...d.querySelectorAll("article")].filter(a=>!a.hidden).length;'
        'd.querySelector("input").value="(0)";d.querySelector("input").dispatchEvent(new Event("input"));'
        'const found=[...d.querySelectorAll("article")].filter(a=>!a.hidden).length;'
        "document.title=`wide ${d.documentElement.scrollWidth} open ${open} found ${found}`}</script>"
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-background-networking", "--allow-file-access-from-files", "--enable-logging=stderr",
            "--virtual-time-budget=3000", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
            (page.parent / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found = re.search(r"<title>wide (\d+) open (\d+) found (\d+)", done.stdout)
    assert found is not None, done.stdout[:300] + done.stderr[-300:]
    assert int(found[1]) <= 400
    assert (int(found[2]), int(found[3])) == (4, 4)
    assert "CONSOLE" not in done.stderr


def test_two_ranks_under_torchrun_give_the_files_of_one(
    tiny: Path, miniature: Path, tmp_path: Path, python: Preloaded
) -> None:
    command = ["eval", "run", str(miniature / "pope.yaml"), "--model", str(tiny), "--precision", "fp32",
               "--batch-size", "4", "--no-report", "--output"]  # fmt: skip
    assert cli.run([*command, str(tmp_path / "one")]) == 0
    done = subprocess.run(
        [python.ours, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone",
         "-m", "mm_moslora", *command, str(tmp_path / "two")],
        capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'eval'}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (one,), (two,) = ((tmp_path / run).glob("pope@llava/own/*/samples.jsonl") for run in ("one", "two"))
    rows = [[json.loads(text) for text in file.read_text().splitlines()] for file in (one, two)]
    nats = [[row["reference"].pop("logprob") for row in side] for side in rows]
    assert rows[0] == rows[1]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4), "other batches round otherwise"
