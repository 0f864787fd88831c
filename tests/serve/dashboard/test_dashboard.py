"""The dashboard in a real browser: it finds runs, follows one that trains, filters, compares, and shows pictures."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from between import just_before
from browser import CHROMIUM, MISSING, browsing
from PIL import Image
from waiting import wait_until

from mm_moslora.reporting.run_status import read_state
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.dashboard import dashboard_runs
from mm_moslora.serve.dashboard.dashboard_app import create_board
from mm_moslora.serve.dashboard.dashboard_runs import Folder
from mm_moslora.utils.errors import ConfigError
from tests.serve.serve_tools import listening

HOSTILE = "<img src=x onerror=\"document.title='owned'\">"


def make_run(folder: Path, *, steps: int, total: int, rank: int, mean: float | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: {folder.name}\nadapter: {{rank: {rank}}}\nkey: hf_{'Ab1' * 10}\n")
    with (folder / "metrics.jsonl").open("w") as stream:
        for step in range(1, steps + 1):
            stream.write(json.dumps({"step": step, "time": 0, "loss": rank / step, "lr/mixer": 1e-4}) + "\n")
        stream.write(json.dumps({"step": steps, "validation_loss": 0.5}) + "\n")
    if mean is None:
        return folder
    (folder / "summary.json").write_text(
        json.dumps({"format": 1, "name": "demo", "steps": steps, "total_steps": total})
    )
    score = {
        "name": "tuned",
        "label": "tuned",
        "task": "shapes",
        "n": 90,
        "mean": mean,
        "low": mean - 0.1,
        "high": mean + 0.1,
    }
    (folder / "evaluation.json").write_text(json.dumps([score]))
    Image.new("RGB", (40, 30), "teal").save(folder / "0.png")
    sample = {"image": "0.png", "question": HOSTILE, "answer": "teal", "before": "red", "after": "teal",
              "before_correct": False, "after_correct": True}  # fmt: skip
    (folder / "samples.json").write_text(json.dumps([sample, sample | {"image": "../../secret.png"}]))
    mixer = {
        "path": "layers.0.q_proj",
        "rank": 2,
        "before": [[1, 0], [0, 1]],
        "after": [[1, 0.5], [-0.5, 1]],
        "moved": 0.5,
    }
    (folder / "mixers.json").write_text(json.dumps([mixer]))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_run(tmp_path / "runs" / "sweep" / "rank4", steps=30, total=30, rank=4, mean=0.8)
    make_run(tmp_path / "runs" / "sweep" / "rank8", steps=30, total=30, rank=8, mean=0.6)
    old = make_run(tmp_path / "runs" / "abandoned", steps=5, total=30, rank=8, mean=None)
    for path in old.iterdir():
        os.utime(path, (time.time() - 9000, time.time() - 9000))
    failed = tmp_path / "runs" / "failed"
    failed.mkdir()
    told = {"state": "failed", "reason": "no such file: train.jsonl", "host": socket.gethostname()}
    (failed / "state.json").write_text(json.dumps(told))
    with subprocess.Popen(["true"]) as gone:
        pass
    killed = make_run(tmp_path / "runs" / "killed", steps=5, total=30, rank=8, mean=None)
    (killed / "state.json").write_text(json.dumps(told | {"state": "running", "process": gone.pid}))
    (killed / "alerts.jsonl").write_text(json.dumps({"title": "Not a number", "text": f"{HOSTILE} not finite"}) + "\n")
    newer = tmp_path / "runs" / "newer"
    newer.mkdir()
    (newer / "summary.json").write_text('{"format": 99}')
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    return tmp_path / "runs"


@pytest.fixture
def port(runs: Path) -> Iterator[int]:
    with listening(create_board(runs), Limits(drain_seconds=1)) as number:
        yield number


def test_runs_are_found_with_their_state_and_secrets_stay_out(runs: Path) -> None:
    rows = {row["id"]: row for row in Folder(runs).rows()}
    assert set(rows) == {"sweep/rank4", "sweep/rank8", "abandoned", "failed", "killed", "newer"}
    assert (rows["failed"]["state"], rows["failed"]["reason"]) == ("failed", "no such file: train.jsonl")
    assert rows["killed"]["state"] == "killed"
    assert rows["newer"]["state"] == "unreadable"
    assert rows["sweep/rank4"]["state"] == "finished"
    assert rows["abandoned"]["state"] == "stopped"
    assert rows["sweep/rank4"]["scores"] == {"shapes": 0.8}
    assert rows["sweep/rank4"]["shown"] == {"shapes": "80.0 %"}
    assert rows["sweep/rank8"]["recipe"]["adapter.rank"] == "8"
    assert "run format 99" in rows["newer"]["fault"]
    assert "hf_Ab1" not in json.dumps(rows)


def test_a_recipe_that_links_out_of_the_run_is_not_shown(runs: Path) -> None:
    (runs.parent / "private.yaml").write_text("secret: canary\n")
    own = runs / "sweep" / "rank4" / "config.yaml"
    own.unlink(missing_ok=True)
    own.symlink_to(runs.parent / "private.yaml")
    folder = Folder(runs)
    assert "canary" not in json.dumps([folder.rows(), folder.detail("sweep/rank4")])


def test_a_heartbeat_that_is_a_pipe_does_not_block_the_board(runs: Path) -> None:
    run = runs / "sweep" / "rank4"
    (run / "state.json").write_text('{"state": "running", "host": "elsewhere", "process": 1}')
    (run / "heartbeat").mkdir(exist_ok=True)
    os.mkfifo(run / "heartbeat" / "rank-00000.json")
    rows: list[dict[str, Any]] = []
    reading = threading.Thread(target=lambda: rows.extend(Folder(runs).rows()), daemon=True)
    reading.start()
    reading.join(120)  # opened as a file it would wait for a writer, for ever
    (row,) = [row for row in rows if row["id"] == "sweep/rank4"]
    assert row["state"] in ("running", "stopped", "killed")


def test_runs_with_the_name_of_a_stage_are_separate_runs(tmp_path: Path) -> None:
    for name in ("align", "tune", "mine", "mine/inner"):
        make_run(tmp_path / name, steps=5, total=30, rank=4, mean=None)
    (tmp_path / "mine" / "state.json").write_text('{"state": "stopped"}')
    assert {row["id"] for row in Folder(tmp_path).rows()} == {"align", "tune", "mine", "mine/inner"}
    (tmp_path / "mine" / "state.json").write_text('{"state": "stopped", "stages": ["inner"]}')
    assert {row["id"] for row in Folder(tmp_path).rows()} == {"align", "tune", "mine"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("config.yaml", "when: 2026-99-99\n"), ("config.yaml", "x: .nan\n"), ("config.yaml", "[" * 3000),
     ("metrics.jsonl", '{"step": 1, "loss": NaN, "tokens_per_second": 1e999}\n'),
     ("metrics.jsonl", '{"step": 1, "loss": 1' + 400 * "0" + "}\n"),
     ("summary.json", '{"steps": NaN, "total_steps": Infinity, "counters": 3}'),
     ("summary.json", '{"base": 5, "title": NaN}'),
     ("mixers.json", '[{"path": "m", "after": [[1.0]], "condition": Infinity}]'),
     ("evaluation.json", '[{"categories": 3}]'),
     ("state.json", '{"stages": [["x"]], "reason": 3, "state": "failed", "ranks": 4}'),
     ("state.json", '{"state": "failed", "reason": "x", "ranks": [0], "since": 1' + 400 * "0" + "}"),
     ("state.json", '{"state": "failed", "reason": "x", "ranks": [0], "since": NaN}'),
     ("state.json", '{"state": "running", "process": 1' + 299 * "0" + f', "host": "{socket.gethostname()}"' + "}"),
     ("config.yaml", "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 30)))],
)  # fmt: skip
def test_a_bad_file_of_one_run_does_not_hide_the_others(name: str, content: str, runs: Path) -> None:
    from starlette.testclient import TestClient

    (runs / "sweep" / "rank8" / name).write_text(content)
    client = TestClient(create_board(runs), base_url="http://127.0.0.1")
    rows = {row["id"]: row for row in client.get("/api/runs").json()["runs"]}
    assert len(rows) == 6
    assert rows["sweep/rank4"]["state"] == "finished"
    assert client.get("/api/run", params={"id": "sweep/rank8"}).status_code == 200


def test_several_clients_read_while_runs_appear_and_disappear(runs: Path) -> None:
    folder = Folder(runs)
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            for number in range(20):
                make_run(runs / f"new{number}", steps=1, total=1, rank=1, mean=None)
            for number in range(20):
                shutil.rmtree(runs / f"new{number}")

    worker = threading.Thread(target=come_and_go)
    worker.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            looks = list(pool.map(lambda _: len(folder.rows()), range(80)))
    finally:
        stop.set()
        worker.join()
    assert min(looks) >= 6


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_run_that_is_deleted_while_it_is_read_is_no_fault(name: str, runs: Path, monkeypatch) -> None:
    gone = runs / "sweep" / "rank4"
    just_before(
        monkeypatch, os, "open", lambda: shutil.rmtree(gone),
        when=lambda path, *_, **__: str(path) == str(gone.resolve() / name),
    )  # fmt: skip
    folder = Folder(runs)
    assert "sweep/rank8" in {row["id"] for row in folder.rows()}
    assert not gone.exists()
    assert {row["id"] for row in folder.rows()} == {"sweep/rank8", "abandoned", "failed", "killed", "newer"}


def test_a_run_that_is_deleted_while_it_is_listed_is_no_fault(runs: Path, monkeypatch) -> None:
    gone = runs / "abandoned"  # without `state.json`: its files are looked through for its last word
    for name in ("scandir", "listdir"):
        just_before(
            monkeypatch, os, name, lambda: shutil.rmtree(gone, ignore_errors=True), when=lambda path: path == gone
        )
    assert read_state(gone).name == "stopped"
    assert not gone.exists()


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        create_board(tmp_path / "nowhere")


def test_paths_out_of_the_folder_and_other_hosts_are_refused(port: int) -> None:
    import httpx

    url = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{url}/api/picture?id=sweep/rank4&number=0").headers["content-type"].startswith("image/")
    for query in ("id=sweep/rank4&number=1", "id=..&number=0", "id=sweep/rank4&number=-1", "id=sweep/rank4&number=²",
                  "id=/etc&number=0", "id=sweep/rank4&number=99", ""):  # fmt: skip
        assert httpx.get(f"{url}/api/picture?{query}").status_code == 404
    for name in ("../runs/sweep/rank4", "/etc", "", "sweep"):
        assert httpx.get(f"{url}/api/run", params={"id": name}).status_code == 404
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 403
    assert "default-src 'none'" in httpx.get(url).headers["content-security-policy"]


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_in_a_browser_it_follows_compares_filters_and_shows(port: int, runs: Path, tmp_path: Path) -> None:
    with browsing(tmp_path / "profile") as page:
        page.open(f"http://127.0.0.1:{port}/")
        page.wait("document.querySelectorAll('#runs li').length === 6")
        page.wait("document.getElementById('live').dataset.state === 'live'")
        page.run("document.querySelector('#runs input[value=failed]').click()")
        page.run("document.querySelector('#runs input[value=killed]').click()")
        page.wait("document.querySelectorAll('.note').length === 3")
        notes = page.run("[...document.querySelectorAll('.note')].map(e => e.textContent).join()")
        assert "newer release wrote it" in notes  # the newest is chosen at first
        assert "failed: no such file: train.jsonl" in notes
        assert f"killed: Not a number: {HOSTILE}" in notes
        wrong = "[...document.querySelectorAll('#runs input')].filter(i => i.checked !== i.value.startsWith('sweep'))"
        while page.run(f"{wrong}.length"):  # the list is drawn anew at every click
            page.run(f"{wrong}[0].click()")
        page.wait("document.querySelectorAll('figure.chart').length === 3")
        page.wait("document.querySelector('figure.chart').querySelectorAll('polyline').length === 2")

        # Live: a run that goes on moves the read-out without a reload.
        with (runs / "sweep" / "rank4" / "metrics.jsonl").open("a") as stream:
            stream.write(json.dumps({"step": 31, "loss": 123.0}) + "\n")
        page.wait("[...document.querySelectorAll('#runs small')].some(e => e.textContent.includes('loss 123'))")
        # As in the list, and where the smoothed line ends.
        page.wait("document.querySelector('.readout').textContent.includes('rank4 123 (smoothed ')")

        def show(tab: str) -> None:
            page.run(f"document.querySelector('[data-tab={tab}]').click()")
            page.wait(f"document.getElementById('panel').dataset.tab === '{tab}'")

        show("scores")
        assert page.run("document.querySelectorAll('.whisker').length") == 2
        show("gallery")
        page.wait("[...document.querySelectorAll('.sample img')].filter(i => i.complete && i.naturalWidth).length >= 1")
        assert page.run("document.querySelector('.sample b').textContent") == HOSTILE
        show("mixers")
        assert page.run("document.querySelectorAll('canvas').length") == 6
        assert page.run("document.querySelector('.lens li').textContent") == "q_proj"
        show("recipes")
        assert "adapter.rank" in page.run("document.querySelector('#panel table').textContent")
        page.run("const f = document.getElementById('filter'); f.value = 'rank=4'; f.dispatchEvent(new Event('input'))")
        assert page.run("document.querySelectorAll('#runs li').length") == 1
        assert page.run("document.title") == "mm_moslora board"
        missing_picture = [error for error in page.errors if "404" not in error]
        assert missing_picture == []
        page.open(f"http://127.0.0.1:{port}/", width=400)
        page.wait("document.querySelectorAll('#runs li').length === 6")
        assert page.run("document.documentElement.scrollWidth") <= 400


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
def test_ctrl_c_ends_it_without_errors_while_a_client_is_connected(runs: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mm_moslora", "board", str(runs), "--port", "0"]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process,
        browsing(tmp_path / "profile") as page,
    ):
        assert process.stderr is not None
        url = next(word for word in process.stderr.readline().split() if word.startswith("http"))
        page.open(url)
        page.wait("document.querySelectorAll('#runs li').length === 6")
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert process.stderr.read().strip() == ""
        page.wait("document.getElementById('live').dataset.state === 'lost'")


def test_runs_that_grow_do_not_keep_a_core_busy(tmp_path: Path, monkeypatch) -> None:
    """Long runs take half a second to read, and a page looks every second."""
    names = [make_run(tmp_path / name, steps=3, total=9, rank=4, mean=None).name for name in ("a", "b", "c")]
    folder, read = Folder(tmp_path), []
    folder.rows()
    really = dashboard_runs._read

    def slowly(name, *given):
        read.append(name)
        time.sleep(0.2)
        return really(name, *given)

    monkeypatch.setattr(dashboard_runs, "_read", slowly)
    for name in names:
        with (tmp_path / name / "metrics.jsonl").open("a") as stream:
            stream.write('{"step": 4, "loss": 0.25}\n')
    began = time.monotonic()
    wait_until(lambda: {row["step"] for row in folder.rows()} == {4})
    assert sorted(read) == names, "each is read once, in turn"
    assert time.monotonic() - began > 0.9, "half as long would do for three readings"
