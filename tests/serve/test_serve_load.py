"""Overload, clients that disconnect, stall or send slowly, internal errors, and a graceful shutdown."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from preloaded import Preloaded
from waiting import wait_until

from mm_moslora.serve.continuous_batching import GenerationEngine
from mm_moslora.serve.request_limits import Limits
from tests.serve.serve_tools import HEAD, asking, before_steps, data_url, pixels_of


@pytest.fixture
def slow_engine(models: Any) -> Any:
    def make(seconds: float, **limits: Any) -> Any:
        engine = GenerationEngine(models, Limits(**{"context": 512, "max_tokens": 400} | limits))
        before_steps(engine, lambda: time.sleep(seconds))
        return engine

    return make


def test_two_hundred_clients_get_answers_or_429_and_good_ones_are_right(serve_with: Any, slow_engine: Any) -> None:
    with serve_with(engine=slow_engine(0.02, queue=16, batch=4), queue=16, batch=4) as server:
        refused = threading.Event()

        def post(body: str) -> Any:
            reply = server.post(body)
            if reply.status_code == 429:
                refused.set()
            return reply

        # Twelve questions, each asked by many: whichever clients get an answer, it is compared.
        bodies = [
            json.dumps(asking(f"question {index % 12}", max_tokens=4)) if index % 5 else "{" for index in range(200)
        ]
        right = {
            body: server.post(body).json()["choices"][0]["message"]["content"] for body in set(bodies) if body != "{"
        }  # fmt: skip
        # However slowly the clients come, the queue is full before the first answer.
        before_steps(server.engine, lambda: refused.wait(60))
        with ThreadPoolExecutor(200) as pool:
            replies = list(pool.map(post, bodies))
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 400, 429}
        for body, reply in zip(bodies, replies, strict=True):
            if reply.status_code == 429:
                assert int(reply.headers["retry-after"]) >= 1
                assert reply.json()["error"]["code"] == "overloaded"
            elif reply.status_code == 200:
                assert reply.json()["choices"][0]["message"]["content"] == right[body]
        wait_until(lambda: server.engine.running == server.engine.waiting == 0)
        assert server.post(asking("hello")).status_code == 200


def test_fifty_concurrent_requests_get_answers_about_their_own_pictures(models: Any, serve_with: Any) -> None:
    """The model answers with the mean colour of its own pictures."""

    class Colours(GenerationEngine):
        def _step(self, name: str, group: Any) -> None:
            for job in group.jobs:
                colour = [
                    int(pixel.float().mean() * 1000) for one in job.images for pixel in one.tensors["pixel_values"][0]
                ]
                self._deliver(job, json.dumps(colour), "stop")
            group.keep([])

    pictures = [Image.new("RGB", (28, 28), (5 * index, 255 - 5 * index, 90 + index)) for index in range(50)]
    limits = Limits(context=512)
    with serve_with(engine=Colours(models, limits)) as server, ThreadPoolExecutor(50) as pool:
        said = list(pool.map(lambda p: server.client().chat.completions.create(**asking("?", data_url(p))), pictures))
    expected = [[int(pixel.mean() * 1000) for pixel in pixels_of(models, p)] for p in pictures]
    assert [json.loads(reply.choices[0].message.content) for reply in said] == expected


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(serve_with: Any, slow_engine: Any, stream: bool) -> None:
    body = json.dumps(asking("hello", stream=stream, max_tokens=400, temperature=2, n=2)).encode()
    with serve_with(engine=slow_engine(0.05), max_tokens=400) as server:  # left alone it takes 400 steps
        head = HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
        for _ in range(20):
            before = server.engine.steps
            with server.socket() as connection:
                connection.sendall(head + body)
                if stream:
                    assert b"200 OK" in connection.recv(100)
                else:
                    wait_until(lambda: server.engine.running)
            wait_until(lambda: server.engine.running == 0)
            assert server.engine.steps - before < 200  # in steps: a busy machine may stand still for seconds
        assert server.post(asking("hello")).status_code == 200


def test_a_body_that_trickles_is_cut(serve_with: Any) -> None:
    with serve_with(body_seconds=2) as server:  # 30 s by itself
        with server.socket() as connection:
            connection.sendall(HEAD + b"Content-Length: 500\r\n\r\n{")
            assert b" 408 " in connection.recv(200)
        assert server.get("/health").status_code == 200


def test_a_client_that_never_reads_holds_no_place(serve_with: Any, monkeypatch: Any, caplog: Any) -> None:
    import socket as sockets

    with serve_with(write_seconds=0.5) as server:
        engine = server.engine
        original = engine._deliver_token

        def flood(job: Any, token: int) -> bool:
            original_add = job.text.add
            job.text.add = lambda token: original_add(token) + "x" * 2_000_000
            return bool(original(job, token))

        monkeypatch.setattr(engine, "_deliver_token", flood)
        body = json.dumps(asking("hello", stream=True, max_tokens=20)).encode()
        with sockets.socket() as connection:
            connection.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", server.port))
            connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)  # fmt: skip
            wait_until(lambda: engine.steps)
            wait_until(lambda: engine.running == 0)
            wait_until(lambda: "stopped reading; dropped" in caplog.text)
        monkeypatch.undo()
        assert server.post(asking("hello")).status_code == 200


@pytest.mark.parametrize("where", ["_read", "_step"])
def test_a_fault_inside_is_a_500_without_its_text_and_the_next_request_works(
    models: Any, serve_with: Any, where: str, caplog: Any
) -> None:
    engine = GenerationEngine(models, Limits(context=512))
    text = "secret at /home/me 0x7f0000000000 https://me:pa55word-canary@host/"
    original, faults = getattr(engine, where), [RuntimeError(text)]

    def faulty(*arguments: Any) -> None:
        if faults:
            raise faults.pop()
        original(*arguments)

    setattr(engine, where, faulty)
    with serve_with(engine=engine) as server:
        reply = server.post(asking("hello"))
        assert reply.status_code == 500
        assert "secret" not in reply.text
        assert reply.headers["x-request-id"] in reply.json()["error"]["message"]
        assert server.post(asking("hello")).status_code == 200
        assert server.get("/health").status_code == 200
    assert "RuntimeError" in caplog.text
    assert "pa55word-canary" not in caplog.text


QUESTIONS = [f"{word} is the color of shape {word}?" for word in ("a", "bb", "red", "green", "no", "yes", "i", "ok")]


@pytest.fixture
def alone(serve_with: Any) -> dict[str, str]:
    """The answer to each question asked alone."""
    with serve_with() as server:
        return {
            question: server.post(asking(question)).json()["choices"][0]["message"]["content"]
            for question in QUESTIONS
        }  # fmt: skip


def ask_together(server: Any) -> dict[str, Any]:
    """Eight questions that are decoded together: none is admitted before all are waiting."""
    engine = server.engine
    turn = engine._turn

    def all_at_once() -> None:
        if len(engine._waiting) == len(QUESTIONS):
            del engine._turn
            turn()
        time.sleep(0.001)

    engine._turn = all_at_once
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        return dict(zip(QUESTIONS, pool.map(lambda text: server.post(asking(text)), QUESTIONS), strict=True))


def check_one_failed(replies: dict[str, Any], failed: str, alone: dict[str, str]) -> None:
    assert {question: reply.status_code for question, reply in replies.items()} == {
        question: 500 if question == failed else 200 for question in QUESTIONS
    }
    said = {q: reply.json()["choices"][0]["message"]["content"] for q, reply in replies.items() if q != failed}
    assert said == {question: text for question, text in alone.items() if question != failed}


def row_of(engine: Any, group: Any, question: str) -> int | None:
    """The row of a question in a batch; None where it is in another one."""
    texts = [engine.models.assembly.tokenizer.decode(job.input_ids) for job in group.jobs]
    return next((number for number, text in enumerate(texts) if question in text), None)


def test_a_row_of_nan_is_an_error_of_that_row_only(serve_with: Any, alone: dict[str, str]) -> None:
    with serve_with() as server:
        engine = server.engine
        step = engine._step

        def spoiled(name: str, group: Any) -> None:
            row = row_of(engine, group, QUESTIONS[3])
            if row is not None and engine.steps > 1:
                group.decoder.logits[row] = float("nan")
            step(name, group)

        engine._step = spoiled
        check_one_failed(ask_together(server), QUESTIONS[3], alone)


def test_after_a_failed_batch_step_only_the_rows_that_fail_alone_end(
    serve_with: Any, alone: dict[str, str], monkeypatch: Any
) -> None:
    """The forward pass does not name the row that fails."""
    from mm_moslora.models.decoding.prefix_cache import Decoder

    with serve_with() as server:
        engine = server.engine
        extend, read, failed = Decoder.extend, engine.models.read, []

        def broken(decoder: Decoder, embeddings: Any, valid: Any, **more: Any) -> Any:
            if not failed and embeddings.shape[0] > 4 and embeddings.shape[1] == 1:
                failed.append(True)
                raise torch.OutOfMemoryError("nothing left")
            return extend(decoder, embeddings, valid, **more)

        def unreadable(name: str, prompts: Any) -> Any:
            if failed and QUESTIONS[2] in engine.models.assembly.tokenizer.decode(prompts[0][0]):
                raise torch.OutOfMemoryError("nothing left")
            return read(name, prompts)

        monkeypatch.setattr(Decoder, "extend", broken)
        monkeypatch.setattr(engine.models, "read", unreadable)
        check_one_failed(ask_together(server), QUESTIONS[2], alone)
        assert failed


def test_a_client_that_disconnects_while_its_prompt_is_read_frees_its_place(serve_with: Any) -> None:
    """The second of two prompts is cancelled while the first one is read."""
    with serve_with() as server:
        engine = server.engine
        read, started, on = engine.models.read, threading.Event(), threading.Event()

        def slow(name: str, prompts: Any) -> Any:
            started.set()
            assert on.wait(60)
            return read(name, prompts)

        body = json.dumps(asking("hello")).encode()
        try:
            engine.models.read = slow
            with server.socket() as connection, ThreadPoolExecutor(1) as pool:
                first = pool.submit(server.post, asking("what is red?"))
                assert started.wait(60)
                connection.sendall(HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
                wait_until(lambda: engine.waiting == 1)
                connection.close()
                on.set()
                assert first.result().status_code == 200
        finally:
            del engine.models.read
        wait_until(lambda: engine.running == engine.waiting == 0)
        assert server.post(asking("hello")).status_code == 200


def test_health_fails_when_the_engine_has_ended(serve_with: Any) -> None:
    with serve_with() as server:
        server.engine.stop()
        assert server.get("/health").status_code == 503
        assert server.post(asking("hello")).status_code == 503


def test_an_answer_is_cut_when_its_time_is_over(serve_with: Any, slow_engine: Any) -> None:
    with serve_with(engine=slow_engine(0.3), request_seconds=5, max_tokens=400) as server:
        reply = server.post(asking("hello", max_tokens=300, temperature=2, seed=4)).json()
        assert reply["choices"][0]["finish_reason"] == "length"
        assert 1 <= reply["usage"]["completion_tokens"] < 40


@pytest.mark.slow
def test_a_stop_signal_lets_answers_end(tmp_path: Path, language_folder: Path, python: Preloaded) -> None:
    """SIGTERM during a stream of a real process: the stream is complete, and the process exits with 0."""
    code = (
        "import sys, time; from mm_moslora.serve.continuous_batching import GenerationEngine\n"
        "step = GenerationEngine._step\n"
        "def slow(*a): time.sleep(0.05); step(*a)\n"
        "GenerationEngine._step = slow\n"
        "from mm_moslora.cli import run; sys.exit(run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [python.ours, "-c", code, "serve", str(language_folder), "--name", "tiny", "--port", "0"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "Listening on" in line)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        import openai

        client = openai.OpenAI(base_url=line.split()[2] + "/v1", api_key="none", max_retries=0)
        stream = client.chat.completions.create(**asking("hello", stream=True, max_tokens=40, temperature=1, seed=1))
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
