"""Every web application answers to this machine's names alone, refuses large bodies, and ends in order."""

from __future__ import annotations

import ast
import asyncio
import http.client
import importlib.util
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from preloaded import Preloaded
from waiting import wait_until

from mm_moslora.serve.http_server import bound
from mm_moslora.serve.request_guard import Guard
from mm_moslora.serve.request_limits import Limits
from mm_moslora.utils.errors import ConfigError
from tests.serve.serve_tools import asking

EVIL = "http://evil.example:7861"
CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(params=["server", "demo"])
def port(request: pytest.FixtureRequest, models: Any) -> Iterator[int]:
    if request.param == "server":
        yield request.getfixturevalue("server").port
    elif importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (make test-extras)")
    else:
        from mm_moslora.serve.gradio_demo import Demo, launch

        demo = Demo(models, max_new_tokens=4)
        page, url = launch(demo, port=0, wait=False)
        yield int(url.rstrip("/").rpartition(":")[2])
        page.close()
        demo.close()


PATHS = ("/", "/v1/models", "/config", "/gradio_api/info")


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({}, False), ({"Host": "localhost"}, False), ({"Host": "127.0.0.1:9"}, False),
        ({"Origin": "http://localhost:3000"}, False), ({"Host": "evil.example"}, True), ({"Origin": EVIL}, True),
        ({"Host": "evil.example:7861", "Origin": EVIL}, True), ({"Origin": "null"}, True), ({"Origin": ""}, True),
        ({"Origin": "http://localhost.evil.example"}, True), ({"Origin": "http://[::1"}, True),
    ],
)  # fmt: skip
def test_other_names_and_pages_are_refused(port: int, headers: dict[str, str], refused: bool) -> None:
    statuses = [httpx.get(f"http://127.0.0.1:{port}{path}", headers=headers, timeout=60).status_code for path in PATHS]
    assert all(status == 403 for status in statuses) if refused else 200 in statuses and 403 not in statuses
    upload = httpx.post(
        f"http://127.0.0.1:{port}/gradio_api/upload", headers=headers, files={"files": ("a.png", b"x")}, timeout=60
    )
    assert (upload.status_code == 403) is refused


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_sends_too_much_reads_why(port: int, chunked: bool) -> None:
    """Also a client that reads nothing before it has sent all."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    block = b"x" * 2**20
    body: Any = (block for _ in range(90)) if chunked else block * 90
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers, encode_chunked=chunked)
    reply = connection.getresponse()
    assert reply.status in (404, 405, 413)  # the demo reads no body at this address
    assert json.loads(reply.read())


def test_an_error_of_an_application_is_not_shown_and_its_secrets_are_not_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def failing(*_: Any) -> None:
        raise RuntimeError("at https://me:pa55word-canary@host/")

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Guard(failing, limits=Limits()))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get("/v1/models")

    reply = asyncio.run(ask())
    assert (reply.status_code, "https://" in reply.text) == (500, False)
    assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
    assert "RuntimeError" in caplog.text
    assert "canary" not in caplog.text


def test_a_port_that_is_taken_or_impossible_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1, port {number} \(.*in use.*--port"):
            bound("127.0.0.1", number)
    for host, port in (("192.0.2.7", 0), ("nowhere.invalid", 80), ("127.0.0.1", 70000), ("127.0.0.1", -1)):
        with pytest.raises(ConfigError):
            bound(host, port)
    for one in bound("localhost", 0):
        one.close()


MAKERS = {"Router", "Starlette", "FastAPI", "launch", "mount_gradio_app"}
"""Calls that make a web application."""
SERVERS = {"HTTPServer", "ThreadingHTTPServer", "TCPServer", "start_server", "create_server", "Config"}
"""Calls that serve something."""


def calls(path: Path, names: set[str]) -> set[str]:
    """Functions of a module that call one of the names, and do not name the guard."""
    found, text = set(), path.read_text()
    for node in ast.walk(ast.parse(text)) if any(name in text for name in names) else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            called = {
                getattr(part.func, "attr", getattr(part.func, "id", ""))
                for part in ast.walk(node) if isinstance(part, ast.Call)
            }  # fmt: skip
            guarded = any(isinstance(part, ast.Name) and part.id == "Guard" for part in ast.walk(node))
            if called & names and not guarded:
                found.add(f"{path.relative_to(CHECKOUT)}:{node.name}")
    return found


def test_every_application_has_the_guard_and_one_module_serves() -> None:
    packages = (CHECKOUT / "mm_moslora", CHECKOUT / "eval" / "mm_moslora_eval")
    modules = [path for package in packages for path in package.rglob("*.py")]
    assert set().union(*(calls(path, MAKERS) for path in modules)) == {
        "mm_moslora/cli/serve_verbs.py:_web_chat",  # calls `launch` of gradio_demo.py
    }
    assert set().union(*(calls(path, SERVERS) for path in modules)) == {"mm_moslora/serve/http_server.py:__init__"}


def slow_server(python: Preloaded, folder: Path, *more: str) -> tuple[subprocess.Popen[str], str, list[str]]:
    """A server whose tokens take 0.2 s; its process, its address, and what it logs."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell may ignore it
        "from mm_moslora.serve.continuous_batching import GenerationEngine\n"
        "step = GenerationEngine._step\n"
        "def slow(*a): time.sleep(0.2); step(*a)\n"
        "GenerationEngine._step = slow\n"
        "import mm_moslora.serve.request_limits as limits\n"
        "make = limits.Limits\n"
        "limits.Limits = lambda **kinds: make(**kinds, drain_seconds=2)\n"
        "from mm_moslora.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [python.ours, "-c", code, "serve", str(folder), "--name", "tiny", "--port", "0", *more],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert process.stderr is not None
    line = next(line for line in process.stderr if "Listening on" in line)
    logged: list[str] = []
    threading.Thread(target=logged.extend, args=(process.stderr,), daemon=True).start()
    return process, line.split()[2], logged


def listens(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(("signals", "code"), [([signal.SIGTERM], 0), ([signal.SIGINT, signal.SIGINT], 130)])
def test_answers_that_outlast_the_stop_end_in_the_form_of_the_api(
    signals: list[int], code: int, language_folder: Path, python: Preloaded
) -> None:
    process, url, logged = slow_server(python, language_folder)
    try:
        long = {"max_tokens": 400, "temperature": 1, "seed": 6}  # 150 tokens, 30 s
        plain: list[httpx.Response] = []
        asking_whole = threading.Thread(
            target=lambda: plain.append(
                httpx.post(f"{url}/v1/chat/completions", json=asking("hello", **long), timeout=120)
            )
        )
        asking_whole.start()
        body = asking("hello", stream=True, **long)
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as stream:
            lines = stream.iter_lines()
            events = [next(lines)]
            for number in signals:
                process.send_signal(number)
                wait_until(lambda: not listens(url))  # the first one is heard
            events += [line for line in lines if line]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "stopping"
        asking_whole.join(60)
        assert plain[0].status_code == 503
        assert plain[0].json()["error"]["code"] == "stopping"
        assert process.wait(60) == code
        assert "Traceback" not in "".join(logged)
        assert "terminate called" not in "".join(logged)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("more", "what"),
    [
        (["--host", "0.0.0.0"], "no key is set"), (["--max-batch", "0"], "batch is 0"), (["--port", "99999"], "99999"),
        (["--adapter", "x"], "NAME=FOLDER"), (["--host", "nowhere.invalid"], "nowhere.invalid"),
    ],
)  # fmt: skip
def test_options_are_checked_before_a_model_is_loaded(
    more: list[str], what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mm_moslora.cli import run

    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("MM_MOSLORA_SERVE_KEY", "")  # an empty one is none
    monkeypatch.setattr("mm_moslora.cli.serve_verbs.find_checkpoint", lambda path: path)
    monkeypatch.setattr("mm_moslora.serve.served_models.load_models", pytest.fail)
    assert run(["serve", str(tmp_path), *more]) == 1
    assert what in capsys.readouterr().err
