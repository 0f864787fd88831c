"""Services of three forms: what is sent, what is read, how long is waited, what it costs."""

from __future__ import annotations

import base64
import email.utils
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends import openai_endpoint
from mm_moslora_eval.backends.endpoints.chat_forms import FORMS, NoAnswerError
from mm_moslora_eval.backends.endpoints.rate_limits import Prices, RateLimit
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.openai_endpoint import EndpointModel, ServiceSettings
from mm_moslora_eval.protocol.model_interface import IMAGE, Answer, Message, OptionRequest, Request, TokenDraw
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import read_results
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora import cli
from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import picture

ONE = EvaluationSettings(batch_size=2, rank=0, world_size=1)
Reply = tuple[int, dict[str, str], Any]


class Provider:
    """Requests that came, and the scripted replies: status, headers, and JSON or bytes."""

    def __init__(self, reply: Callable[[dict[str, Any]], Reply]) -> None:
        self.reply, self.url = reply, ""
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()


@contextmanager
def provider(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[Provider]:
    own = Provider(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with own.lock:
                own.asked.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                status, headers, said = own.reply(body)
            data = said if isinstance(said, bytes) else json.dumps(said).encode()
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    own.url = f"http://127.0.0.1:{http.server_address[1]}"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield own
    finally:
        http.shutdown()
        http.server_close()


def claude(text: str = "red", *, reason: str = "end_turn", thinking: bool = False) -> dict[str, Any]:
    """A reply as Anthropic's documentation shows it."""
    content = [{"type": "thinking", "thinking": "hm", "signature": "s"}] * thinking
    content += [{"type": "text", "text": text}] * bool(text)
    usage = {"input_tokens": 12, "cache_read_input_tokens": 3, "cache_creation_input_tokens": 0, "output_tokens": 4}
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "content": content,
        "stop_reason": reason, "stop_sequence": None, "usage": usage,
    }  # fmt: skip


def gemini(text: str = "red", *, reason: str = "STOP") -> dict[str, Any]:
    """A reply as Gemini's documentation shows it."""
    parts = [{"text": "hm", "thought": True}, *([{"text": text}] if text else [])]
    usage = {"promptTokenCount": 15, "candidatesTokenCount": 3, "thoughtsTokenCount": 1, "totalTokenCount": 19}
    return {
        "candidates": [{"content": {"parts": parts, "role": "model"}, "finishReason": reason, "index": 0}],
        "usageMetadata": usage, "modelVersion": "gemini",
    }  # fmt: skip


def openai(text: str = "red", *, reason: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 15, "completion_tokens": 4}}


REPLIES: dict[str, Callable[..., dict[str, Any]]] = {"openai": openai, "anthropic": claude, "gemini": gemini}
CUT = {"openai": "length", "anthropic": "max_tokens", "gemini": "MAX_TOKENS"}
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "gemini": "GEMINI_API_KEY"}
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
TEXT = Request(id="t", messages=(Message(role="user", content=("Yes?",)),), max_new_tokens=5)


def model_of(form: str, url: str, **settings: Any) -> EndpointModel:
    endpoint = ServiceSettings(**{"attempts": 2} | settings).endpoint(f"{form}:{url}#the-model")
    object.__setattr__(endpoint, "first_wait", 0.001)
    return EndpointModel(endpoint)


def ask(model: EndpointModel, *requests: Request) -> list[Answer]:
    found = dict(model.generate(requests or (QUESTION,), batch_size=2))
    return [found[index] for index in range(len(found))]


@pytest.mark.parametrize("count", [-5, 10**12, True, "7"])
@pytest.mark.parametrize("form", FORMS)
def test_a_count_that_can_be_none_is_not_summed(form: str, count: object) -> None:
    said = REPLIES[form]()
    used = said["usageMetadata" if form == "gemini" else "usage"]
    used |= dict.fromkeys(used, count)
    with provider(lambda _: (200, {}, said)) as server:
        model = model_of(form, server.url)
        ask(model)
    assert (model.endpoint.usage.prompt_tokens, model.endpoint.usage.completion_tokens) == (0, 0)


@pytest.mark.parametrize("form", FORMS)
def test_a_conversation_with_a_picture_in_the_providers_form(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MM_MOSLORA_API_KEY", *KEYS.values()):
        monkeypatch.setenv(name, f"key of {name}")
    with provider(lambda _: (200, {}, REPLIES[form]())) as server:
        (answer,) = ask(model_of(form, server.url))
    assert answer == Answer(text="red", tokens=4, prompt_tokens=15, finish_reason="stop")
    ((path, headers, body),) = server.asked
    data = base64.b64encode(picture(1)).decode()
    if form == "anthropic":
        assert (path, headers["x-api-key"], headers["anthropic-version"]) == (
            "/messages", "key of ANTHROPIC_API_KEY", "2023-06-01",
        )  # fmt: skip
        assert body == {
            "model": "the-model", "max_tokens": 5, "temperature": 0, "stop_sequences": ["\n"],
            "system": [{"type": "text", "text": "Be short."}],
            "messages": [
                {"role": "user", "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}},
                    {"type": "text", "text": "What colour?"},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "Blue."}]},
                {"role": "user", "content": [{"type": "text", "text": "Really?"}]},
            ],
        }  # fmt: skip
    elif form == "gemini":
        assert (path, headers["x-goog-api-key"]) == ("/models/the-model:generateContent", "key of GEMINI_API_KEY")
        assert body == {
            "systemInstruction": {"parts": [{"text": "Be short."}]},
            "generationConfig": {"maxOutputTokens": 5, "temperature": 0, "stopSequences": ["\n"]},
            "contents": [
                {"role": "user", "parts": [
                    {"inlineData": {"mimeType": "image/png", "data": data}}, {"text": "What colour?"},
                ]},
                {"role": "model", "parts": [{"text": "Blue."}]},
                {"role": "user", "parts": [{"text": "Really?"}]},
            ],
        }  # fmt: skip
    else:
        assert (path, headers["authorization"]) == ("/chat/completions", "Bearer key of MM_MOSLORA_API_KEY")
    sent = {value for name, value in headers.items() if "key of" in value}
    assert len(sent) == 1, "a key goes to the provider of its form alone"


@pytest.mark.parametrize("form", FORMS)
def test_answers_that_are_cut_off_empty_or_refused(form: str) -> None:
    with provider(lambda _: (200, {}, REPLIES[form]("re", reason=CUT[form]))) as server:
        assert ask(model_of(form, server.url))[0].finish_reason == "length"
    if form == "anthropic":
        with provider(lambda _: (200, {}, claude("red", thinking=True))) as server:
            assert ask(model_of(form, server.url))[0].text == "red"
    refusal = {"anthropic": claude("", reason="refusal"), "gemini": gemini("", reason="SAFETY")}.get(
        form, {"choices": []}
    )
    blocked: dict[str, Any] = {"promptFeedback": {"blockReason": "SAFETY"}}
    for said in (refusal, blocked, {}, [], {"choices": [], "content": None, "candidates": []}):
        with (
            provider(lambda _, said=said: (200, {}, said)) as server,  # type: ignore[misc]
            pytest.raises(RuntimeError, match=r"refused|gave no answer|without a message"),
        ):
            ask(model_of(form, server.url))
        assert len(server.asked) == 1, "the same request would be refused again"


SILENT: dict[str, list[dict[str, Any]]] = {
    "openai": [
        {"content": None, "refusal": "I can't."}, {"content": "", "refusal": "I can't."}, {"content": ""}, {},
        {"content": None, "reasoning_content": "hm"}, {"content": [{"type": "image"}]}, {"content": " \n"},
    ],
    "anthropic": [claude(""), claude("", thinking=True, reason="max_tokens"), claude("", reason="refusal")],
    "gemini": [gemini(""), gemini("", reason="MAX_TOKENS"), {"candidates": [{"finishReason": "STOP"}]}],
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_reply_without_a_text_is_a_failed_sample(form: str, question_file: Path, tmp_path: Path) -> None:
    """The provider's word for a refusal, no word at all, or all tokens spent in thinking."""
    silent = SILENT[form]
    if form == "openai":
        silent = [{"choices": [{"message": one, "finish_reason": "stop"}]} for one in silent]
    for said in silent:
        with (
            provider(lambda _, said=said: (200, {}, said)) as server,  # type: ignore[misc]
            pytest.raises(NoAnswerError, match=r"refused|gave no answer"),
        ):
            ask(model_of(form, server.url), TEXT)
    with provider(lambda _: (200, {}, silent[0])) as server:
        (result,) = evaluate(
            model_of(form, server.url), get_task(f"llava:{question_file}"), tmp_path / "run", modes=("own",),
            settings=EvaluationSettings(batch_size=2, rank=0, world_size=1, limit=2), baselines=(),
        )  # fmt: skip
    assert (result.counts.total, result.counts.failed) == (2, 2)


@pytest.mark.parametrize("form", FORMS)
def test_an_answer_that_begins_with_a_stop_word_is_an_empty_answer(form: str) -> None:
    with provider(lambda _: (200, {}, REPLIES[form](""))) as server:
        assert ask(model_of(form, server.url), QUESTION)[0].text == ""


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (1.0, 0.9), (1.0, 1.0), (0, 1.0)])
def test_claude_gets_temperature_or_top_p(temperature: float, top_p: float) -> None:
    """Its newer models refuse both; 1 is the default of each."""
    with provider(lambda _: (200, {}, claude())) as server:
        ask(
            model_of("anthropic", server.url),
            replace(TEXT, draw=TokenDraw(temperature=temperature, top_p=top_p, top_k=0, seed=1)),
        )
    sent = {name: value for name, value in server.asked[0][2].items() if name in ("temperature", "top_p")}
    own = {"temperature": temperature, "top_p": top_p}
    assert sent == {name: value for name, value in own.items() if value != 1.0}


DRAWN = {"temperature": 0.7, "top_p": 0.9, "top_k": 20}
BOTH = "`temperature` and `top_p` cannot both be specified for this model. Please use only one."


@pytest.mark.parametrize(
    ("refusal", "left_out"),
    [
        (lambda body: BOTH if {"temperature", "top_p"} <= body.keys() else "", ["top_p"]),
        (
            lambda body: next((f"`{name}` is deprecated for this model." for name in DRAWN if name in body), ""),
            [*DRAWN],
        ),
    ],
    ids=["both", "each"],
)
def test_of_what_claude_refuses_one_is_sent_and_the_rest_is_named(
    refusal: Callable[[dict[str, Any]], str], left_out: list[str]
) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        said = refusal(body)
        return (400, {}, {"type": "error", "error": {"message": said}}) if said else (200, {}, claude())

    with provider(reply) as server:
        model = model_of("anthropic", server.url)
        assert ask(model, replace(TEXT, draw=TokenDraw(temperature=0.7, top_p=0.9, top_k=20, seed=1)))[0].text == "red"
    sent = {name: value for name, value in server.asked[-1][2].items() if name in DRAWN}
    assert sent == {name: value for name, value in DRAWN.items() if name not in left_out}
    assert model.endpoint.usage.to_dict()["left_out"] == sorted(left_out)


@pytest.mark.parametrize("form", ["anthropic", "gemini"])
def test_parameters_of_drawn_answers_reach_the_provider(form: str) -> None:
    drawn = {"max_tokens": 5, "temperature": 1.5, "top_p": 0.9, "top_k": 20, "seed": 7}
    with provider(lambda _: (200, {}, REPLIES[form]())) as server:
        model_of(form, server.url).endpoint.chat({"messages": [{"role": "user", "content": "?"}], **drawn})
    body = server.asked[0][2]
    if form == "anthropic":
        assert {name: body[name] for name in drawn if name in body} == {
            "max_tokens": 5, "top_p": 0.9, "top_k": 20,
        }  # fmt: skip
    else:
        assert body["generationConfig"] == {
            "maxOutputTokens": 5, "temperature": 1.5, "topP": 0.9, "topK": 20, "seed": 7,
        }  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_faults_of_a_provider_are_tried_again_and_counted(form: str) -> None:
    faults: list[Reply] = [
        (429, {"Retry-After": "0"}, {"error": "slow down"}), (500, {}, b"<html>oops</html>"), (529, {}, {}),
        (200, {}, b"<!doctype html><title>Sign in</title>"), (200, {}, b'{"half'),
    ]  # fmt: skip
    with provider(lambda _: faults.pop(0) if faults else (200, {}, REPLIES[form]())) as server:
        model = model_of(form, server.url, attempts=6)
        assert ask(model)[0].text == "red"
    assert model.endpoint.usage.retries == 5
    with provider(lambda _: (401, {}, {"error": "no key"})) as server:
        with pytest.raises(EvalError, match=KEYS[form]):
            ask(model_of(form, server.url))
        assert len(server.asked) == 1


@pytest.mark.parametrize("named", ["seconds", "date"])
def test_retry_after_is_waited_for_and_holds_back_all_requests(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    wait = "120" if named == "seconds" else email.utils.formatdate(time.time() + 120, usegmt=True)
    faults: list[Reply] = [(429, {"Retry-After": wait}, {})]
    with provider(lambda _: faults.pop(0) if faults else (200, {}, claude())) as server:
        model = model_of("anthropic", server.url)
        ask(model)
        ask(model)
    assert [wait for wait in waits if wait > 100] == pytest.approx([120, 120, 120], abs=15)


def test_a_server_that_wants_hours_ends_the_request() -> None:
    with (
        provider(lambda _: (429, {"Retry-After": "86400"}, {})) as server,
        pytest.raises(RuntimeError, match="HTTP 429"),
    ):
        ask(model_of("openai", server.url, attempts=5))
    assert len(server.asked) == 1


def test_a_refused_parameter_is_named_once_by_requests_at_one_time(caplog: pytest.LogCaptureFixture) -> None:
    together = threading.Barrier(2)

    def reply(body: dict[str, Any]) -> Reply:
        if "temperature" in body:
            return 400, {}, {"error": "temperature is not supported here"}
        return 200, {}, openai("red")

    def wait_for_another(record: logging.LogRecord) -> bool:
        with suppress(threading.BrokenBarrierError):
            together.wait(1)  # a second message would be on its way before the first is written
        return True

    logger = logging.getLogger(openai_endpoint.__name__)
    logger.addFilter(wait_for_another)
    try:
        with provider(reply) as server:
            ask(model_of("openai", server.url), QUESTION, QUESTION)
    finally:
        logger.removeFilter(wait_for_another)
    assert caplog.text.count("refuses temperature") == 1


def test_parameters_that_a_model_refuses_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    def reply(body: dict[str, Any]) -> Reply:
        if "max_tokens" in body:
            said = "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead."
        elif "temperature" in body:
            said = "Unsupported value: 'temperature' does not support 0 with this model."
        elif "stop" in body:
            said = "Unsupported parameter: 'stop' is not supported with this model."
        else:
            return 200, {}, openai("red\nand blue")
        return 400, {}, {"error": {"message": said, "type": "invalid_request_error"}}

    with provider(reply) as server:
        model = model_of("openai", server.url)
        assert ask(model, QUESTION, QUESTION)[1].text == "red", "the answer still ends before the stop text"
        assert ask(model)[0].text == "red"
    assert server.asked[-1][2]["max_completion_tokens"] == 5
    assert model.endpoint.usage.to_dict()["left_out"] == ["max_tokens", "stop", "temperature"]
    assert model.details == {"refuses": "max_tokens, stop, temperature"}
    assert caplog.text.count("refuses temperature") == 1
    with (
        provider(lambda _: (400, {}, {"error": "temperature is not supported here"})) as server,
        pytest.raises(RuntimeError, match="HTTP 400"),
    ):
        ask(model_of("gemini", server.url))  # its request has another name for it


@pytest.mark.parametrize("form", ["anthropic", "gemini"])
def test_options_by_likelihood_are_refused_where_there_are_no_probabilities(form: str) -> None:
    with provider(lambda _: (200, {}, REPLIES[form]())) as server:
        model = model_of(form, server.url)
        with pytest.raises(EvalError, match="no probabilities"):
            list(model.loglikelihood([OptionRequest(request=TEXT, options=("A", "B"))], batch_size=1))
        assert not server.asked


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


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_an_impossible_limit_is_refused(value: float) -> None:
    with pytest.raises(EvalError, match="requests-per-minute"):
        ServiceSettings(requests_per_minute=value).endpoint("anthropic:m")


@pytest.mark.parametrize("text", ["3", "3/x", "-1/2", "1/2/3", "inf/1", ""])
def test_an_impossible_price_is_refused(text: str) -> None:
    with pytest.raises(EvalError, match="IN/OUT"):
        Prices.parse(text)


def test_a_run_names_tokens_and_cost_and_keeps_no_key(
    question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-0123456789abcdef0123")
    lines: list[Reply] = [(400, {}, {"error": "sk-ant-0123456789abcdef0123 is odd"})] * 2
    with provider(lambda _: lines.pop() if lines else (200, {}, claude("yes"))) as server:
        command = ["eval", "run", f"llava:{question_file}", "--model", f"anthropic:{server.url}#m", "--output"]
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


def test_an_answer_of_a_million_characters_is_an_answer(question_file: Path, tmp_path: Path) -> None:
    with provider(lambda _: (200, {}, gemini("yes " * 250_000))) as server:
        (result,) = evaluate(
            model_of("gemini", server.url), get_task(f"llava:{question_file}"), tmp_path / "run", modes=("own",),
            settings=EvaluationSettings(batch_size=2, rank=0, world_size=1, limit=2), baselines=(),
        )  # fmt: skip
    assert result.counts.failed == 0
    assert result.counts.total == 2


@pytest.mark.parametrize("name", ["anthropic:", "gemini:", "anthropic:http://h", "gemini:https://a:b@h/v1#m"])
def test_a_name_without_a_model_or_with_a_password_is_refused(name: str) -> None:
    with pytest.raises(EvalError, match=r"names no endpoint|holds no password"):
        open_model(name)


def test_names_of_providers_have_their_address() -> None:
    assert open_model("anthropic:claude-x").name == "claude-x at https://api.anthropic.com/v1"
    found = open_model("gemini:gemini-x")
    assert found.name == "gemini-x at https://generativelanguage.googleapis.com/v1beta"
    assert (
        found.fingerprint != open_model("openai:https://generativelanguage.googleapis.com/v1beta#gemini-x").fingerprint
    )


def test_a_judge_that_refuses_one_answer_leaves_that_one_without_a_grade(tmp_path: Path) -> None:
    with provider(lambda _: (200, {}, claude("", reason="refusal"))) as server:
        judge = eval_commands.make_judge(f"anthropic:{server.url}#j", tmp_path)
        assert judge is not None
        assert judge.ask("how good?", str.strip, max_tokens=8) is None
    assert judge.unreadable == 5
    assert not [*(tmp_path / "judge").glob("*.json")]


@pytest.mark.parametrize("form", ["anthropic", "gemini"])
def test_every_form_can_judge(form: str, tmp_path: Path) -> None:
    with provider(lambda _: (200, {}, REPLIES[form]("0.5"))) as server:
        judge = eval_commands.make_judge(f"{form}:{server.url}#j", tmp_path)
        assert judge is not None
        assert judge.ask("how good?", str.strip, max_tokens=8) == ("0.5", "0.5")
        limit = server.asked[0][2].get("max_tokens") or server.asked[0][2]["generationConfig"]["maxOutputTokens"]
    assert limit == 8 + 2048
    assert judge.to_dict()["prompt_tokens"] == 15
