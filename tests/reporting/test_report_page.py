"""The report is one safe, self-contained page; it shows all parts and names missing ones."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from trials import make_recipe, write

from mm_moslora import cli
from mm_moslora.reporting import build_report
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.redaction import REDACTED

VOID = {"meta", "link", "img", "input", "br", "line"}
URL_ATTRIBUTES = {"src", "href", "data", "action", "poster", "srcset", "xlink:href"}


class _Page(HTMLParser):
    """Checks nesting while it collects elements and texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " " + data.strip() if data.strip() else ""

    def of(self, tag: str, name: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.elements if t == tag and (not name or name in (a.get("class") or "").split())]


def _page(folder: Path) -> _Page:
    out = folder / "report.html"
    assert build_report(folder, out) == out
    return _Page(out.read_text(encoding="utf-8"))


def test_every_part_is_on_the_page(run_folder: Path) -> None:
    page = _page(run_folder)
    assert "Demo run" in page.text
    assert len(page.of("figure", "chart")) == 4 + 2  # and the heat maps of moved and effective_rank
    assert len(page.of("g", "titled")) == 3
    places = [point[::2] for point in json.loads(page.of("figure", "chart")[0]["data-series"] or "")[0]["points"]]
    assert [places[0], places[-1]] == [[1.5, 52], [399.5, 425.5]], "the read-out knows the steps and where they stand"
    assert len(page.of("article", "sample")) == 2
    assert len(page.of("div", "whisker")) == 4
    assert len(page.of("figure", "mixer")) == 1
    for text in (
        "tiny-llm", "16 visual tokens per picture", "85.0 %", "1 234".replace(" ", "\N{NARROW NO-BREAK SPACE}"),
        "image missing", "mm-moslora train demo", "2 min 05 s", "1.50 GiB", "600", "layers.1.q_proj", "n = 90",
        "Resolved recipe", "10 %",
    ):  # fmt: skip
        assert text in page.text, text
    assert not page.of("section", "missing")
    assert "There is no" not in page.text


def test_page_names_nothing_outside_itself(run_folder: Path) -> None:
    page = _page(run_folder)
    for tag, attributes in page.elements:
        for name in URL_ATTRIBUTES & attributes.keys():
            assert (attributes[name] or "").startswith(("data:", "#")), (tag, attributes[name])
    text = (run_folder / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    (policy,) = [a["content"] for a in page.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in (policy or "")


def test_model_output_is_text_never_markup(run_folder: Path) -> None:
    page = _page(run_folder)
    assert len(page.of("script")) == 1
    assert not [a for _, a in page.elements if any(name.startswith("on") for name in a)]
    assert {a["src"] for a in page.of("img")} == {a["src"] for a in page.of("img") if (a["src"] or "")[:5] == "data:"}
    assert '<img src="x" onerror=' in page.text
    assert "{{ 7*7 }}" in page.text


@pytest.mark.parametrize(
    "name",
    [
        "../../outside.png",
        "/etc/hostname",
        "missing.png",
        "summary.json",
        "a\0b",
        "x" * 5000,
        "/dev/zero",
        "link.png",
        "~/x",
    ],
)
def test_pictures_outside_the_run_or_damaged_are_left_out(run_folder: Path, name: str) -> None:
    Image.new("RGB", (8, 8)).save(run_folder.parent.parent / "outside.png")
    (run_folder / "link.png").symlink_to(run_folder.parent.parent / "outside.png")
    samples = json.loads((run_folder / "samples.json").read_text())
    samples[0]["image"] = name
    (run_folder / "samples.json").write_text(json.dumps(samples))
    page = _page(run_folder)
    assert "picture not in the run folder" in page.text
    assert len([a for a in page.of("img") if (a.get("alt") or "").startswith("Picture")]) == 1


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "samples.json", "summary.json", "alerts.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_links_out_of_the_run_and_special_files_are_not_read(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "private").write_text('{"step": 1, "title": "canary", "text": "canary"}')
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to(tmp_path / "private" if kind == "link" else "/dev/zero")
    (run / "mixers.json").write_text("[]")
    (run / "evaluation.json").write_text('[{"name": "tuned", "mean": 0.5, "n": 4}]')
    page = _page(run)
    assert "canary" not in page.text
    assert {"link": "links out of", "device": "links out of", "pipe": "a pipe"}[
        kind
    ] in page.text or name == "metrics.jsonl"


def test_missing_parts_are_named_as_missing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    page = _page(tmp_path)
    assert len(page.of("figure", "chart")) == 1
    for text in (
        "there is no verdict",
        "evaluation.json",
        "samples.json",
        "mixers.json",
        "no data statistics",
    ):
        assert text in page.text


def page_of_state(folder: Path, state: str, **more: object) -> _Page:
    (folder / "state.json").write_text(json.dumps({"state": state, "host": socket.gethostname()} | more))
    return _page(folder)


def test_the_report_begins_with_the_status_of_the_run(run_folder: Path) -> None:
    assert "This run" not in page_of_state(run_folder, "finished").text
    failed = page_of_state(run_folder, "failed", reason=f"no room for hf_{'Ab1' * 10} <b>").text
    assert "This run failed at step 400." in failed
    assert "no room for" in failed
    assert "hf_Ab1" not in failed
    assert "The same command continues it" in page_of_state(run_folder, "stopped").text
    assert "under way, at step 400" in page_of_state(run_folder, "running", process=os.getpid()).text
    with subprocess.Popen(["true"]) as gone:
        pass
    assert "ended at step 400 without recording an end" in page_of_state(run_folder, "running", process=gone.pid).text


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    page = page_of_state(tmp_path, "failed", reason="train.jsonl does not exist")
    assert "This run failed before its first step." in page.text
    assert "train.jsonl does not exist" in page.text


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Give the run folder"):
        build_report(tmp_path, tmp_path / "report.html")
    with pytest.raises(ConfigError, match="not a folder"):
        build_report(tmp_path / "nowhere", tmp_path / "report.html")


CANARIES = [
    "hf_" + "Ab1" * 10,
    "https://canary-token@host/v1",
    "GET http://host/v1?api_key=canary-query",
    '400 {"api_key": "canary-json"}',
    "sent {'token': 'canary-dict'}",
    "mm-moslora eval run t --judge.api-key canary-option",
    "environment-canary",
]


def _leaks(text: str) -> list[str]:
    return re.findall(r".{0,40}(?:canary|Ab1Ab1).{0,20}", text)


def _everywhere(value: Any, secret: str) -> Any:
    """The same JSON with a secret at the end of every text, except paths, names and numbers."""
    if isinstance(value, dict):
        kept = ("image", "name", "path", "task", "what", "state")
        return {key: item if key in kept else _everywhere(item, secret) for key, item in value.items()}
    if isinstance(value, list):
        return [_everywhere(item, secret) for item in value]
    return f"{value} {secret}" if isinstance(value, str) else value


@pytest.mark.parametrize("secret", CANARIES)
def test_a_secret_anywhere_in_a_run_is_not_on_its_page(
    secret: str, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "environment-canary")
    for name in ("summary.json", "evaluation.json", "samples.json"):
        path = run_folder / name
        path.write_text(json.dumps(_everywhere(json.loads(path.read_text()), secret)))
    summary = json.loads((run_folder / "summary.json").read_text())
    summary["environment"] |= {
        "client_secret": "canary-fact",
        "flags": [{"api_key": "canary-nested"}],
        "pin": {"token": 1},
    }
    (run_folder / "summary.json").write_text(json.dumps(summary | {"title": secret, "description": secret}))
    recipe = {"name": "demo", "notes": secret, "model": {"hub": {"token": "canary-recipe"}, "tags": [secret]}}
    (run_folder / "config.yaml").write_text(f"# {json.dumps(secret)}\n{yaml.safe_dump(recipe)}")
    (run_folder / "alerts.jsonl").write_text(json.dumps({"title": "Run failed", "text": secret}) + "\n")
    (run_folder / "quarantine.jsonl").write_text(json.dumps({"reason": secret}) + "\n")
    (run_folder / "metrics.jsonl").open("a").write(json.dumps({"step": 401, "loss": secret, secret: 1}) + "\n")
    page_of_state = {"state": "failed", "reason": secret}
    (run_folder / "state.json").write_text(json.dumps(page_of_state))
    page = _page(run_folder)
    assert page.text.count(REDACTED) > 10
    assert _leaks((run_folder / "report.html").read_text()) == []


def test_secrets_of_a_real_runs_command_recipe_and_environment_stay_out(
    language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    recipe = make_recipe(parts, tmp_path / "run", "none", steps=2)
    tags = ["https://canary-tag@host", '{"api_key": "canary-json"}']
    recipe = replace(recipe, track=replace(recipe.track, trackers=["tensorboard"], tags=tags))
    monkeypatch.setenv("MY_SERVICE_API_KEY", "environment-canary")
    monkeypatch.setenv("SLURM_JOB_NAME", "of environment-canary")
    words = ["train", write(recipe), "--name", "password=canary-name", "--track.notes", "environment-canary"]
    monkeypatch.setattr(sys, "argv", ["mm-moslora", *words])
    assert cli.run(words) == 0
    run = tmp_path / "run"
    page = _page(run)
    assert f"password={REDACTED}" in page.text
    assert _leaks((run / "report.html").read_text()) == []


def test_report_needs_no_torch() -> None:
    code = "import sys, mm_moslora.reporting; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_command_writes_a_file_and_replaces_no_folder(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run(["report", str(run_folder), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").is_file()
    before = sorted(tmp_path.iterdir())
    assert cli.run(["report", str(run_folder), "--output", str(tmp_path)]) == 1
    assert f"{tmp_path} is a folder; expected the file to write" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
    assert cli.run(["report"]) == 2


@pytest.mark.parametrize("version", [2, None, "1"])
def test_a_run_of_another_format_is_refused(run_folder: Path, tmp_path: Path, version: object) -> None:
    summary = json.loads((run_folder / "summary.json").read_text())
    (run_folder / "summary.json").write_text(json.dumps(summary | {"format": version}))
    with pytest.raises(ConfigError, match=f"run format {version!r}, this release reads up to 1"):
        build_report(run_folder, tmp_path / "new.html")


def test_a_report_replaces_only_reports(run_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    for _ in range(2):
        build_report(run_folder, page)
    page.write_text("<h1>mine</h1>")
    with pytest.raises(ConfigError, match=r"page\.html exists and is not replaced"):
        build_report(run_folder, page)
    assert page.read_text() == "<h1>mine</h1>"


def test_answers_are_compared_with_those_before_tuning_only_where_there_are_any(tmp_path: Path) -> None:
    def page(*before: tuple[str | None, bool | None]) -> str:
        rows = [
            {"image": None, "question": f"question {number}", "answer": "a", "after": "a", "after_correct": right,
             "before": text, "before_correct": was}
            for number, ((text, was), right) in enumerate(zip(before, (True, False), strict=True))
        ]  # fmt: skip
        (tmp_path / "samples.json").write_text(json.dumps(rows))
        return _Page(build_report(tmp_path, tmp_path / "report.html").read_text()).text

    alone = page((None, None), (None, None))
    assert "stayed right" not in alone
    assert "still wrong" not in alone
    assert "before" not in alone.partition("Held-out pictures")[2]
    mixed = page((None, None), ("b", False))
    assert mixed.index("question 1") < mixed.index("question 0")
    assert "before and after" in mixed
    assert "still wrong 1" in " ".join(mixed.split())
