"""`--model vllm:FOLDER` against a stand-in for vLLM's program, which speaks its protocol. vLLM itself was not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from mm_moslora_eval.backends.endpoints import vllm_server
from mm_moslora_eval.backends.endpoints.vllm_server import VllmModel
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.openai_endpoint import ServiceSettings
from mm_moslora_eval.run.result_file import read_results
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.launch.child_processes import kill_tree
from mm_moslora.utils.errors import EvalError

PROGRAM = """#!{python}
import json, os, signal, subprocess, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

words = sys.argv[1:]
open({log!r}, "a").write(json.dumps([os.getpid(), words]) + "\\n")
if "--broken" in words:
    sys.exit("ValueError: no kernel for this device, token hf_0123456789abcdefghij")
if "--silent" in words:
    signal.pause()
left = int(words[words.index("--killed-after") + 1]) if "--killed-after" in words else 0
if left:  # a worker that does not watch its parent
    worker = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    open({log!r}, "a").write(json.dumps([worker.pid, []]) + "\\n")
options = dict(zip(words[2::2], words[3::2]))
name, folder = options["--served-model-name"], words[1]


class Handler(BaseHTTPRequestHandler):
    def answer(self, said):
        data = json.dumps(said).encode()
        self.send_response(401 if os.environ.get("VLLM_API_KEY") else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/version":
            self.answer({{"version": "0.99"}})
        else:
            self.answer({{"object": "list", "data": [{{"id": name, "object": "model", "root": folder}}]}})

    def do_POST(self):
        global left
        if (left := left - 1) == 0:
            print("CUDA out of memory", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["model"] == name
        message = {{"role": "assistant", "content": "yes", "reasoning_content": None, "tool_calls": []}}
        choice = {{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}}
        usage = {{"prompt_tokens": 7, "total_tokens": 9, "completion_tokens": 2}}
        said = {{"id": "chatcmpl-1", "object": "chat.completion", "model": name}}
        self.answer(said | {{"choices": [choice], "usage": usage}})

    def log_message(self, *_):
        pass


ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with the process id and the words of every start of the stand-in."""
    program, log = tmp_path / "bin" / "vllm", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, log=str(log)))
    program.chmod(0o755)
    monkeypatch.setenv(vllm_server.PROGRAM, str(program))
    return log


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "merged"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def ended(log: Path) -> bool:
    number = json.loads(log.read_text().splitlines()[-1])[0]
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def test_a_run_starts_the_server_asks_it_and_stops_it(
    started: Path, export: Path, question_file: Path, tmp_path: Path
) -> None:
    command = ["eval", "run", f"llava:{question_file}", "--model", f"vllm:{export}", "--output", str(tmp_path / "run")]
    assert cli.run([*command, "--server-arguments=--tensor-parallel-size 2", "--batch-size", "4"]) == 0
    _, words = json.loads(started.read_text())
    assert words[:6] == ["serve", str(export), "--tensor-parallel-size", "2", "--host", "127.0.0.1"]
    assert ended(started)
    (result,) = read_results(tmp_path / "run")
    assert result.counts.failed == 0
    assert result.about["model"]["name"] == f"vllm:{export}"
    assert result.about["tokens"] == {"prompt": 84, "completion": 24}
    (by,) = result.about["computed_by"]
    assert by["model"] == {"server": "vLLM 0.99", "arguments": "--tensor-parallel-size 2"}


def test_the_fingerprint_is_that_of_the_files_and_arguments(started: Path, export: Path, tmp_path: Path) -> None:
    def fingerprint(*arguments: str) -> str:
        model = VllmModel(export, service=ServiceSettings(server_arguments=arguments))
        try:
            return model.fingerprint
        finally:
            model.close()

    first = fingerprint()
    assert fingerprint() == first
    assert fingerprint("--dtype", "float16") != first
    (export / "model.safetensors").write_bytes(b"others!")
    assert fingerprint() != first


def test_a_server_that_does_not_start_says_why_and_nothing_stays(started: Path, export: Path) -> None:
    with pytest.raises(EvalError, match=r"ended before it was ready \(exit code 1\)[\s\S]*no kernel") as error:
        VllmModel(export, service=ServiceSettings(server_arguments=("--broken", "1")))
    assert "hf_0123456789" not in str(error.value)
    with pytest.raises(EvalError, match="not ready after 1 seconds"):
        VllmModel(export, service=ServiceSettings(server_arguments=("--silent", "1")), start_seconds=1)
    wait_until(lambda: ended(started), what="the silent server ends")


@pytest.mark.parametrize(
    "arguments",
    ["--port 1", "--ssl_certfile=a.pem", "--api-key sk-1", "--hf-token x", "--note hf_0123456789abcdefghij"],
)
def test_arguments_that_hide_the_server_and_secrets_are_refused_before_they_are_written(
    arguments: str, started: Path, export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ["mmvp", "--model", f"vllm:{export}", "--output", str(tmp_path / "run"), "--shards", "2", "--slurm"]
    with pytest.raises(EvalError, match=r"leave it out|such as HF_TOKEN") as error:
        cli.app(["eval", "run", *words, f"--server-arguments={arguments}"])
    assert "hf_0123" not in str(error.value)
    assert not started.exists()
    assert not (tmp_path / "run").exists()


def test_a_server_that_is_another_or_asks_for_a_key_is_an_error_at_once(
    started: Path, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server.Endpoint, "ask", lambda *_: {"data": [{"id": "theirs"}]})
    with pytest.raises(EvalError, match="serves 'theirs', expected 'mm-moslora-"):
        VllmModel(export, service=ServiceSettings())
    monkeypatch.undo()
    monkeypatch.setenv(vllm_server.PROGRAM, str(started.with_name("bin") / "vllm"))
    monkeypatch.setenv("VLLM_API_KEY", "one of their own")
    with pytest.raises(EvalError, match=r"refuses this command \(HTTP 401\).*unset VLLM_API_KEY"):
        VllmModel(export, service=ServiceSettings())


def test_a_server_that_ends_during_the_run_says_how_and_leaves_no_workers(
    started: Path, export: Path, question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["eval", "run", f"llava:{question_file}", "--model", f"vllm:{export}", "--output", str(tmp_path / "run")]
    command += ["--batch-size", "1", "--attempts", "1"]
    assert cli.run([*command, "--server-arguments=--killed-after 5"]) == 1
    said = capsys.readouterr().err
    assert "vLLM ended while it was asked (exit code 137)" in said
    assert "CUDA out of memory" in said
    wait_until(lambda: ended(started), what="the worker ends")
    (answers,) = (tmp_path / "run").rglob("answers*.jsonl")
    assert len(answers.read_text().splitlines()) == 4


def test_a_killed_command_leaves_no_server(started: Path, export: Path) -> None:
    code = (
        "import signal\n"
        "from pathlib import Path\n"
        "from mm_moslora_eval.backends.open_model import open_model\n"
        f"model = open_model('vllm:{export}')\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert not ended(started)
        process.kill()
        process.wait()
        wait_until(lambda: ended(started), what="the server ends with its parent")
    finally:
        process.kill()
        kill_tree(json.loads(started.read_text())[0])


def test_what_vllm_cannot_read_is_refused_before_anything_starts(
    started: Path, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    for folder in ("run", "bin"):
        with pytest.raises(EvalError, match=r"mm-moslora merge .* FOLDER"):
            open_model(f"vllm:{tmp_path / folder}")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(EvalError, match="not for torchrun"):
            open_model(f"vllm:{export}")
    monkeypatch.setenv(vllm_server.PROGRAM, str(tmp_path / "nowhere"))
    with pytest.raises(EvalError, match=vllm_server.PROGRAM):
        open_model(f"vllm:{export}")
    assert not started.exists()


def test_another_server_at_the_port_is_not_taken_for_it(started: Path, export: Path, monkeypatch: Any) -> None:
    from tests.eval.eval_server import serve

    with serve(lambda _: "no") as other:
        port = int(other.url.rpartition(":")[2].removesuffix("/v1"))
        monkeypatch.setattr(vllm_server, "free_port", lambda: port)
        with pytest.raises(EvalError, match=r"ended before it was ready[\s\S]*in use"):
            VllmModel(export, service=ServiceSettings())
