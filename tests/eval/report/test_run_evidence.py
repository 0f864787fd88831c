"""`mm-moslora eval run --model RUN` stores rows and samples in the run for its report, and sends scores to trackers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from between import just_before
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.report import run_evidence
from mm_moslora_eval.run.result_file import read_results
from trials import write_questions
from wandb_files import read_finished

from mm_moslora import cli
from mm_moslora.tracking.tracker import adapter_digest

RECIPE = """
name: tiny
model: {{language: {language}, vision: {{name: {vision}}}}}
adapter: {{rank: 4, alpha: 8, mixer_init: kaiming}}
data: {{train: [{{path: {records}, image_folder: {images}}}], max_length: 256}}
optim: {{lr: 1.0e-2}}
train: {{output: {output}, steps: 4, save_every: 2, global_batch: 8, micro_batch: 8, zero: none, precision: fp32}}
track: {{trackers: [tensorboard, wandb], project: tests}}
"""


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, language_folder: Path, vision_folder: Path, records: Path
) -> Path:
    """A run with trackers, measured before and after, and once more at its middle."""
    folder = tmp_path_factory.mktemp("measured")
    write_questions(records, folder / "test.jsonl")
    (folder / "recipe.yaml").write_text(
        RECIPE.format(
            language=language_folder, vision=vision_folder, records=records, images=records.parent / "images",
            output=folder / "run",
        )
    )  # fmt: skip
    task = f"llava:{folder / 'test.jsonl'}@{records.parent / 'images'}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_MODE", "offline")
        assert cli.run(["train", str(folder / "recipe.yaml")]) == 0
        (folder / "metrics").write_text((folder / "run" / "metrics.jsonl").read_text())
        line = ["eval", "run", task, "--model", str(folder / "run"), "--output", str(folder / "eval"), "--untuned"]
        assert cli.run([*line, "--modes", "own", "--modes", "wrong", "--baselines", "majority"]) == 0
        middle = [*line[:4], str(folder / "run" / "checkpoint-000002"), "--output", str(folder / "middle")]
        assert cli.run(middle) == 0
    return folder


def test_the_untuned_model_is_the_same_in_every_call(measured: Path) -> None:
    models = [open_model(str(measured / "run"), precision="fp32", untuned=True) for _ in range(2)]
    assert models[0].fingerprint == models[1].fingerprint


def test_the_run_folder_holds_the_scores_and_samples_of_its_report(measured: Path) -> None:
    rows = json.loads((measured / "run" / "evaluation.json").read_text())
    assert [row["name"] for row in rows] == ["tuned", "untuned", "untuned_lenient", "wrong_image", "majority"]
    by_name = {row["name"]: row for row in rows}
    assert all(by_name[name]["less"]["groups"] == 18 for name in by_name if name != "tuned")
    for name, row in by_name.items():
        assert name == "tuned" or row["less"]["value"] == pytest.approx(by_name["tuned"]["mean"] - row["mean"])
    assert by_name["untuned_lenient"]["mean"] >= by_name["untuned"]["mean"]
    assert by_name["majority"]["learned_from"] == "the evaluated set"
    assert {row["step"] for row in rows} == {4}
    samples = json.loads((measured / "run" / "samples.json").read_text())
    assert len(samples) == 18
    assert all((measured / "run" / sample["image"]).is_file() for sample in samples)
    assert all(sample["before"] is not None and sample["after"] is not None for sample in samples)
    assert cli.run(["report", str(measured / "run")]) == 0
    page = (measured / "run" / "report.html").read_text()
    assert "After tuning" in page
    assert "before tuning it was" in page
    assert "learned from the evaluated set itself" in page
    assert (measured / "run" / "metrics.jsonl").read_text() == (measured / "metrics").read_text()


def test_every_tracker_links_the_score_to_the_adapter(measured: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = measured / "run"
    last, middle = (adapter_digest(run / f"checkpoint-{step:06d}" / "adapter") for step in (4, 2))
    assert last != middle
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["adapter"]) for line in lines] == [(4, last), (2, middle)]
    reader = EventAccumulator(str(run / "tensorboard"))
    reader.Reload()
    assert {event.step for event in reader.Scalars("eval/test")} == {2, 4}
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3, 4]
    texts = [event.tensor_proto.string_val[0] for event in reader.Tensors("evaluation/text_summary")]
    assert all(any(digest.encode() in text for text in texts) for digest in (last, middle) if digest)
    parts = [read_finished(path) for path in run.rglob("*.wandb")]
    assert len({part["id"] for part in parts}) == 1  # one run for wandb, however often it was opened
    adapters = {
        alias for part in parts for kind, _, aliases in part["artifacts"] if kind == "adapter" for alias in aliases
    }
    assert f"sha256-{str(last)[:12]}" in adapters
    named = {part["summary"]["eval/adapter"]: part["history"] for part in parts if "eval/adapter" in part["summary"]}
    assert named.keys() == {last, middle}
    assert any(row.get("train/step") == 4 and "eval/test" in row for row in named[last])
    kept, rows = json.loads((run / "samples.json").read_text()), "eval/samples/test/nrows"
    assert [row[rows] for row in named[last] if rows in row] == [len(kept)]
    assert not any(rows in row for row in named[middle]), "only the newest checkpoint's samples are kept"


def test_the_folder_of_a_model_without_a_run_gets_no_scores(measured: Path, tmp_path: Path, records: Path) -> None:
    task = f"llava:{measured / 'test.jsonl'}@{records.parent / 'images'}"
    export = tmp_path / "export"
    assert cli.run(["export", str(measured / "run"), str(export), "--to", "hf"]) == 0
    before = sorted(path.name for path in export.iterdir())
    assert cli.run(["eval", "run", task, "--model", str(export), "--output", str(tmp_path / "eval")]) == 0
    assert sorted(path.name for path in export.iterdir()) == before
    kept = (measured / "run" / "evaluations.jsonl").read_text()
    line = ["eval", "run", task, "--model", str(measured / "run"), "--output", str(tmp_path / "quiet"), "--no-track"]
    assert cli.run(line) == 0
    assert (measured / "run" / "evaluations.jsonl").read_text() == kept


def test_an_export_has_no_model_before_tuning(measured: Path, tmp_path: Path, records: Path, capsys: Any) -> None:
    assert cli.run(["export", str(measured / "run"), str(tmp_path / "export"), "--to", "hf"]) == 0
    task = f"llava:{measured / 'test.jsonl'}@{records.parent / 'images'}"
    line = ["eval", "run", task, "--model", str(tmp_path / "export"), "--output", str(tmp_path / "eval"), "--untuned"]
    assert cli.run(line) == 1
    assert "has no model before tuning" in capsys.readouterr().err


def test_two_evaluations_that_end_together_both_store_their_scores(measured: Path, monkeypatch: Any) -> None:
    """The second one writes after the first has read the stored scores and before it writes its own."""
    monkeypatch.setattr(run_evidence, "_tell_trackers", lambda *_, **__: None)
    results = {result.mode: result for result in read_results(measured / "eval")}
    scores = measured / "run" / "evaluation.json"
    scores.unlink()
    keep = [threading.Thread(target=run_evidence.keep, args=(measured / "run", [results[mode]], measured / "eval"))
            for mode in ("own", "wrong")]  # fmt: skip

    def second() -> None:
        keep[1].start()
        keep[1].join(1)

    just_before(monkeypatch, Path, "replace", second, when=lambda path, target: target == scores)
    keep[0].start()
    for thread in keep:
        thread.join(60)
    assert {row["name"] for row in json.loads(scores.read_text())} == {"tuned", "wrong_image"}


def _tracked(run: Path) -> list[tuple[str, str, int, float]]:
    rows = json.loads((run / "evaluation.json").read_text())
    return [(row["task"], row["name"], row["n"], row["mean"]) for row in rows]


def test_a_smaller_or_failed_run_never_replaces_a_complete_one(
    measured: Path, tmp_path: Path, records: Path, monkeypatch: Any, capsys: Any
) -> None:
    """The same file with a limit, another file of the same name, and runs with failed samples."""
    monkeypatch.setattr(run_evidence, "_tell_trackers", lambda *_, **__: None)
    run, images = measured / "run", records.parent / "images"
    line = ["eval", "run", f"llava:{measured / 'test.jsonl'}@{images}", "--model", str(run), "--no-report"]
    assert cli.run([*line, "--output", str(measured / "eval")]) == 0
    before, samples = _tracked(run), json.loads((run / "samples.json").read_text())
    (whole,) = [row for row in before if row[:2] == ("test", "tuned")]
    assert cli.run([*line, "--output", str(tmp_path / "few"), "--limit", "3"]) == 0
    assert set(before) < set(_tracked(run))
    assert [row[2] for row in _tracked(run) if row[1] == "tuned"] == [whole[2], 3]
    shown = json.loads((run / "samples.json").read_text())
    assert shown[: len(samples)] == samples

    other = tmp_path / "other" / "test.jsonl"
    other.parent.mkdir()
    other.write_text((measured / "test.jsonl").read_text().replace("what is", "tell me"))
    other_line = ["eval", "run", f"llava:{other}@{images}", "--model", str(run), "--no-report"]
    assert cli.run([*other_line, "--output", str(tmp_path / "other-run")]) == 0
    with_other = _tracked(run)
    assert whole in with_other
    assert len([row for row in with_other if row[1] == "tuned"]) == 3

    results = read_results(measured / "eval")
    (own,) = [result for result in results if result.mode == "own"]
    failed = replace(own, score=0.0, counts=replace(own.counts, failed=2))
    run_evidence.keep(run, [failed], measured / "eval")
    lost = replace(own, counts=replace(own.counts, scored=0, failed=own.n), about=own.about | {"selection": {}})
    run_evidence.keep(run, [lost], measured / "eval")
    assert _tracked(run) == with_other

    assert cli.run(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "test, first 3 questions" in page
    metrics = {row["metric"] for row in json.loads((run / "evaluation.json").read_text()) if row["name"] == "tuned"}
    assert {"test", "test/first-3"} < metrics
    assert len(metrics) == 3


def test_a_run_of_another_person_shows_no_file_of_this_machine(
    measured: Path, tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths in samples.jsonl and task.json of somebody else's evaluation, and links in its folder, open nothing."""
    foreign = tmp_path / "foreign"
    shutil.copytree(measured / "eval", foreign)
    private = next(iter((records.parent / "images").iterdir()))
    (tmp_path / "id_rsa").write_text("private")
    for path in (foreign / "pictures").iterdir():
        path.unlink()
    view = next(iter(foreign.glob("test@own/own/*/samples.jsonl")))
    rows = [json.loads(line) for line in view.read_text().splitlines()]
    odd = [str(private), str(tmp_path / "id_rsa"), "/dev/zero", "../id_rsa", "a\0b"]
    for row, name in zip(rows, odd, strict=False):
        row |= {"paths": [name], "images": [name]}
    (foreign / "pictures" / f"{rows[-1]['images'][0]}.png").symlink_to(private)
    view.write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened: list[str] = []
    monkeypatch.setattr("mm_moslora_eval.report.evaluation_page.open_image", lambda data: opened.append(data))
    assert cli.run(["report", str(foreign), "--output", str(tmp_path / "page.html")]) == 0
    assert opened == []
    assert "data:image" not in (tmp_path / "page.html").read_text()
    shutil.copytree(measured / "run", tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run" / "pictures")
    results = [result for result in read_results(foreign) if result.mode == "own"]
    run_evidence._keep_samples(tmp_path / "run", results, foreign)
    assert not (tmp_path / "run" / "pictures").exists()


def test_a_task_that_cannot_be_scored_is_named_with_its_reason(
    measured: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tmp_path / "free.yaml"
    source = f"{{kind: llava, path: {measured / 'test.jsonl'}, image_folder: {records.parent / 'images'}}}"
    task.write_text(f"name: free\nsource: {source}\nmetric: mmvet_judge\n")
    line = ["eval", "run", str(task), "--model", str(measured / "run"), "--output", str(tmp_path / "eval")]
    cli.run([*line, "--limit", "2"])
    (said,) = [text for text in capsys.readouterr().err.splitlines() if "gets no scores of free@own" in text]
    assert "judge" in said


def test_stored_answers_are_scored_without_loading_what_models_need(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(json.dumps({"id": "1", "question": "q", "answer": "yes"}))
    (tmp_path / "a.json").write_text(json.dumps({"1": "yes"}))
    script = (
        "import sys\nfrom mm_moslora import cli\n"
        "code = cli.run(['eval', 'run', 'llava:q.jsonl', '--model', 'replay:a.json', '--output', 'run'])\n"
        "sys.exit(code or 'mm_moslora.models' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)
