"""Chat services: what is sent, what is read, how long is waited, what it costs."""

from __future__ import annotations

import base64
import email.utils
import json
import time
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.backends.endpoints.parallel_calls import RateLimit
from mm_moslora_eval.backends.openai_endpoint import EndpointModel, ServiceSettings
from mm_moslora_eval.protocol.model_interface import IMAGE, Answer, Message, Request
from mm_moslora_eval.run.result_file import read_results

from mm_moslora import cli
from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import picture
from tests.eval.eval_server import serve


def openai(text: str = "red", *, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 15, "completion_tokens": 4}}


QUESTION = Request(
    id="q",
    messages=(
        Message(role="system", content=("Be short.",)),
        Message(role="user", content=(IMAGE, "\nWhat colour?")),
        Message(role="assistant", content=("Blue.",)),
        Message(role="user", content=("Really?",)),
    ),
    images=(picture(1),), max_new_tokens=5, stop=("\n",),
)  # fmt: skip


def model_of(url: str, **settings: Any) -> EndpointModel:
    endpoint = ServiceSettings(**{"attempts": 2} | settings).endpoint(f"openai:{url}#the-model")
    object.__setattr__(endpoint, "first_wait", 0.001)
    return EndpointModel(endpoint)


def ask(model: EndpointModel, *requests: Request) -> list[Answer]:
    found = dict(model.generate(requests or (QUESTION,), batch_size=2))
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("names", [("MM_MOSLORA_API_KEY", "OPENAI_API_KEY"), ("OPENAI_API_KEY",)])
def test_a_conversation_with_a_picture(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setenv(name, f"key of {name}")
    with serve(lambda _: openai()) as server:
        (answer,) = ask(model_of(server.url))
    assert answer == Answer(text="red", tokens=4, prompt_tokens=15, finish_reason="stop")
    (body,), (headers,) = server.payloads, server.headers
    data = base64.b64encode(picture(1)).decode()
    assert (headers["path"], headers["authorization"]) == ("/v1/chat/completions", f"Bearer key of {names[0]}")
    assert [message["role"] for message in body["messages"]] == ["system", "user", "assistant", "user"]
    assert data in json.dumps(body["messages"][1])
    assert (body["max_tokens"], body["temperature"], body["stop"]) == (5, 0, ["\n"])


def test_answers_that_are_cut_off_empty_or_refused() -> None:
    with serve(lambda _: openai("re", reason="length")) as server:
        assert ask(model_of(server.url))[0].finish_reason == "length"
    for said in ({"choices": []}, {}, [], {"choices": [], "content": None}):
        with (
            serve(lambda _, said=said: said) as server,  # type: ignore[misc]
            pytest.raises(RuntimeError, match=r"refused|gave no answer|without a message"),
        ):
            ask(model_of(server.url))
        assert len(server.payloads) == 1, "the same request would be refused again"


def test_an_answer_that_begins_with_a_stop_word_is_an_empty_answer() -> None:
    with serve(lambda _: openai("")) as server:
        assert ask(model_of(server.url), QUESTION)[0].text == ""


def test_faults_of_a_provider_are_tried_again_and_counted() -> None:
    faults = iter([
        (429, {"Retry-After": "0"}, {"error": "slow down"}), (500, {}, b"<html>oops</html>"), (529, {}, {}),
        (200, {}, b"<!doctype html><title>Sign in</title>"), (200, {}, b'{"half'),
    ])  # fmt: skip
    with serve(lambda _: next(faults, openai())) as server:
        model = model_of(server.url, attempts=6)
        assert ask(model)[0].text == "red"
    assert model.endpoint.usage.retries == 5
    with serve(lambda _: (401, {}, {"error": "no key"})) as server:
        with pytest.raises(EvalError, match="OPENAI_API_KEY"):
            ask(model_of(server.url))
        assert len(server.payloads) == 1


@pytest.mark.parametrize("named", ["seconds", "date"])
def test_retry_after_is_waited_for_and_holds_back_all_requests(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    wait = "120" if named == "seconds" else email.utils.formatdate(time.time() + 120, usegmt=True)
    faults = iter([(429, {"Retry-After": wait}, {})])
    with serve(lambda _: next(faults, openai())) as server:
        model = model_of(server.url)
        ask(model)
        ask(model)
    assert [wait for wait in waits if wait > 100] == pytest.approx([120, 120, 120], abs=15)


def test_parameters_that_a_model_refuses_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def reply(body: dict[str, Any]) -> Any:
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        elif "temperature" in body:
            said = "Unsupported value: 'temperature' does not support 0 with this model."
        elif "stop" in body:
            said = "Unsupported parameter: 'stop' is not supported with this model."
        else:
            return openai("red\nand blue")
        return 400, {}, {"error": {"message": said, "type": "invalid_request_error"}}

    with serve(reply) as server:
        model = model_of(server.url)
        assert ask(model, QUESTION, QUESTION)[1].text == "red", "the answer still ends before the stop text"
        assert ask(model)[0].text == "red"
    assert server.payloads[-1]["max_completion_tokens"] == 5
    assert model.endpoint.usage.to_dict()["left_out"] == ["max_tokens", "stop", "temperature"]
    assert model.details == {"refuses": "max_tokens, stop, temperature"}
    assert caplog.text.count("refuses temperature") == 1


class Clock:
    """Time that passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_requests_and_tokens_stay_within_a_minute() -> None:
    clock = Clock()
    limit = RateLimit(requests=30, tokens=600, clock=clock, sleep=clock.sleep)
    starts = []
    for _ in range(4):
        limit.wait(10)
        starts.append(clock.now - 100)
    assert starts == [0, 2, 4, 6]  # 30 in a minute; 10 tokens take a second of it
    limit.settle(expected=10, used=100)  # nine seconds more
    limit.wait(10)
    assert clock.now - 100 == 17
    limit.pause(60)
    limit.wait(10)
    assert clock.now - 100 == 77
    clock.now += 1000
    before = clock.now
    limit.wait(10)
    assert clock.now == before, "nothing is waited for after a pause of one's own"


def test_a_run_names_tokens_and_cost_and_keeps_no_key(
    question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-ant-0123456789abcdef0123")
    lines = iter([(400, {}, {"error": "sk-ant-0123456789abcdef0123 is odd"})] * 2)
    with serve(lambda _: next(lines, openai("yes"))) as server:
        command = ["eval", "run", f"llava:{question_file}", "--model", f"openai:{server.url}#m", "--output"]
        command += [str(tmp_path / "run"), "--price", "3/15", "--requests-per-minute", "6000", "--batch-size", "4"]
        assert cli.run(command) == 0
        assert cli.run(command) == 0  # nothing is asked, and the cost of the answers stays
    (result,) = read_results(tmp_path / "run")
    tokens = result.about["tokens"]
    assert (tokens["prompt"], tokens["completion"]) == (12 * 15, 12 * 4)
    assert tokens["cost"] == pytest.approx((180 * 3 + 48 * 15) / 1e6)
    assert "180 tokens in, 48 out; 0.00126 at the given prices." in capsys.readouterr().out
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"sk-ant-0123" not in path.read_bytes(), path
    assert cli.run(["eval", "score", str(tmp_path / "run")]) == 0
    assert read_results(tmp_path / "run")[0].about["tokens"] == tokens


@pytest.mark.parametrize(
    "settings",
    [
        *({"requests_per_minute": value} for value in (0, -1, float("nan"), float("inf"))),
        *({"price": text} for text in ("3", "3/x", "-1/2", "1/2/3", "inf/1", "")),
        *({"timeout": value} for value in (0, float("inf"), float("nan"))), {"attempts": 0},
    ],
)  # fmt: skip
def test_impossible_limits_prices_and_patience_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(EvalError, match=r"requests-per-minute|IN/OUT|expected seconds above 0"):
        ServiceSettings(**settings).endpoint("openai:http://h/v1#m")
