"""What a judge replies: read strictly, counted apart where it cannot be read, never taken for the model's answer."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.backends.endpoints.parallel_calls import in_parallel
from mm_moslora_eval.backends.openai_endpoint import Endpoint, EndpointModel
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.judging.judged_scores import GRADERS, MOST_UNREADABLE
from mm_moslora_eval.run.judging.llm_judge import Judge
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult, score_folder
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.utils.errors import EvalError
from tests.eval.eval_server import serve
from tests.eval.protocol_runs import COUNT, SAID, answered, judge_at

ONE = EvaluationSettings(batch_size=8, rank=0, world_size=1)


def number(payload: dict[str, Any]) -> int:
    text = payload["messages"][0]["content"]
    return int(text.rpartition("Q")[2].partition("?")[0])


def message(content: Any, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish_reason}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}


UNREADABLE = (
    None, " \n", "<think>ok</think>\n<think>0.5", "nan", "5", "Score: 0.5",
    [{"type": "thinking", "thinking": "0.5"}, {"type": "text", "text": 5}],
)  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "content"),
    [*(("mmvet_judge", content) for content in UNREADABLE),
     *((metric, "") for metric in sorted({*GRADERS} - {"judge"})), ("llavabench_judge", "5"),
     ("llavabench_judge", "Score: 0.5")],
)  # fmt: skip
def test_a_judge_that_cannot_be_read_leaves_the_task_unscored_until_it_is_mended(
    metric: str, content: Any, tmp_path: Path
) -> None:
    view = answered(tmp_path / "run", metric)
    good = "5 5" if "llavabench" in metric else "0.5"
    said = [content]
    with serve(lambda _: message(said[0])) as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert math.isnan(result.score)
        assert eval_commands.exit_code([result]) == 3
        assert f"replies to 2 of {COUNT} answers cannot be read, so nothing more is asked" in result.about["unscored"]
        assert 2 * 5 <= result.about["judge"]["unreadable"] <= len(server.payloads) < 5 * COUNT / 2
        assert result.counts.failed == result.counts.not_inferable == 0
        assert not any(SAID in remark for remark in result.remarks)
        assert not list((tmp_path / "judge").glob("*.json"))
        said[0] = good
        mended = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert mended.score == pytest.approx(1.0 if "llavabench" in metric else 0.5)
        assert eval_commands.exit_code([mended]) == 0


@pytest.mark.parametrize(
    "content",
    [
        "0.5",
        " 0.5\n",
        "<think>ok, 0.9?</think>\n0.5",
        "It could be 0.9.</think>0.5",
        "<think>a</think><think>b</think>0.5",
        [{"type": "text", "text": "0.5"}],
        [{"type": "thinking", "thinking": "0.9"}, {"type": "text", "text": "0"}, {"type": "text", "text": ".5"}],
    ],
)
def test_a_grade_is_read_behind_thinking_and_in_parts(content: Any, tmp_path: Path) -> None:
    view = answered(tmp_path / "run", count=2)
    with serve(lambda _: message(content)) as server:
        assert score_folder(view, judge=judge_at(server.url, tmp_path)).score == 0.5


def test_a_reply_that_was_cut_off_is_no_grade(tmp_path: Path) -> None:
    """`0.` may be the beginning of `0.8`; ratings on a first line are complete when a second one was begun."""
    view = answered(tmp_path / "mmvet", count=2)
    with serve(lambda _: message("0.", "length")) as server:
        assert math.isnan(score_folder(view, judge=judge_at(server.url, tmp_path)).score)
    view = answered(tmp_path / "llavabench", "llavabench_judge", count=2)
    with serve(lambda _: message("8 4\nThe second", "length")) as server:
        assert score_folder(view, judge=judge_at(server.url, tmp_path)).score == 0.5
    with serve(lambda _: message("8 1", "length")) as server:
        assert math.isnan(score_folder(view, judge=judge_at(server.url, tmp_path)).score)


def test_a_judge_that_thinks_has_room_for_it(tmp_path: Path) -> None:
    """A judge that needs 500 tokens before its reply, and a model with less room than that."""

    def thinks(payload: dict[str, Any]) -> Any:
        enough = payload["max_tokens"] >= 500
        return message(f"<think>{'hm ' * 200}</think>0.5" if enough else "<think>hm", "stop" if enough else "length")

    view = answered(tmp_path / "run", count=2)
    with serve(thinks) as server:
        assert math.isnan(score_folder(view, judge=judge_at(server.url, tmp_path, thinking_tokens=0)).score)
        assert {payload["max_tokens"] for payload in server.payloads} == {8}
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert result.score == 0.5
        assert result.about["judge"]["thinking_tokens"] == 2048
        assert score_folder(view, judge=judge_at(server.url, tmp_path, thinking_tokens=9)).score == 0.5
        # By the room that was asked for: a thread of the first judge may still be asking.
        rooms = {payload["max_tokens"] for payload in server.payloads}
        assert rooms == {8, 8 + 2048}, "a reply stays valid with another room for thinking"
    with pytest.raises(EvalError, match="thinking_tokens of the judge is -1"):
        judge_at("http://127.0.0.1:1/v1", tmp_path, thinking_tokens=-1)


def one_unreadable(payload: dict[str, Any]) -> str:
    return "no idea" if number(payload) == 3 else f"0.{number(payload) % 2 + 4}"


def test_few_answers_without_a_grade_are_left_out_of_score_and_comparison(tmp_path: Path) -> None:
    view, other = answered(tmp_path / "a"), answered(tmp_path / "b")
    with serve(one_unreadable) as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
    assert 1 / COUNT <= MOST_UNREADABLE
    graded = [0.4 + 0.1 * (n % 2) for n in range(COUNT) if n != 3]
    assert result.score == pytest.approx(sum(graded) / len(graded))
    assert (result.counts.total, result.counts.scored, result.counts.ungraded) == (COUNT, COUNT - 1, 1)
    assert result.categories["rec"]["n"] == result.completed["n"] == COUNT - 1
    assert eval_commands.exit_code([result]) == 0
    (remark,) = [text for text in result.remarks if "no grade" in text]
    assert "1 of 24 answers have no grade" in remark
    assert remark in eval_commands.table([result])
    samples = [json.loads(line) for line in (view / "samples.jsonl").read_text().splitlines()]
    assert [sample["id"] for sample in samples if sample["score"] is None] == ["3"]
    with serve(lambda payload: "0.2" if number(payload) % 2 else "0.3") as server:
        score_folder(other, judge=judge_at(server.url, tmp_path / "b"))
    found = compare(view, other)
    assert found.score.questions == COUNT - 1
    assert found.score.estimate.value == pytest.approx(found.score.a - found.score.b)
    score_folder(view)  # without a judge the grades stay
    assert compare(view, other).score.questions == COUNT - 1


def test_an_answer_that_a_judge_finds_is_read_by_the_same_rules(tmp_path: Path) -> None:
    view = answered(tmp_path / "run", "mathvista", said="There are seven, I think.")
    with serve(lambda _: message(None)) as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert math.isnan(result.score)
        assert eval_commands.exit_code([result]) == 3
    with serve(lambda _: "<think>7?</think>None.") as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert result.score == 0.0
        assert result.counts.not_inferable == COUNT
    with serve(lambda _: "<think>6?</think> 7") as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert result.score == 1.0
    assert not any("answers are '7'" in remark for remark in result.remarks)


@pytest.mark.parametrize("fault", [500, 400, "nothing"])
def test_a_judge_that_is_down_is_not_asked_to_the_end(fault: Any, tmp_path: Path) -> None:
    view = answered(tmp_path / "run", count=200)
    faults = [fault] * 10_000 if isinstance(fault, int) else []
    with serve(lambda _: {"error": "none"}, faults=faults) as server:
        result = score_folder(view, judge=judge_at(server.url, tmp_path))
        assert "4 requests in a row failed, so nothing more is asked" in result.about["unscored"]
        assert len(server.payloads) <= 2 * 7  # two attempts each of four, and of three others that were under way
    assert eval_commands.exit_code([result]) == 3
    with serve(lambda _: "0.5") as server:
        assert score_folder(view, judge=judge_at(server.url, tmp_path)).score == 0.5


def test_of_equal_prompts_at_one_time_one_is_asked(tmp_path: Path) -> None:
    grades = iter(["0.1", "0.2", "0.3", "0.4"])
    with serve(lambda _: next(grades)) as server:
        judge = judge_at(server.url, tmp_path)
        given = [
            answer for _, answer in in_parallel(lambda _: judge.ask("Q0?", float, max_tokens=5), range(4), workers=4)
        ]
        assert given == [(0.1, "0.1")] * 4
        assert len(server.payloads) == 1
    assert judge.cached == 3


def test_a_judge_that_fails_now_and_then_is_asked_to_the_end(tmp_path: Path) -> None:
    view = answered(tmp_path / "run", count=40)
    with serve(lambda payload: {"error": "none"} if number(payload) % 4 == 3 else "0.5") as server:
        judge = Judge(Endpoint(url=server.url, model="j"), cache=tmp_path / "judge")
        result = score_folder(view, judge=judge)
    assert "The judge failed" in result.about["unscored"]
    assert len(list((tmp_path / "judge").glob("*.json"))) == 30


@pytest.fixture
def silent() -> Iterator[tuple[str, Callable[[], int]]]:
    """A server that takes requests and never answers; its address, and the number of its requests."""
    asked: list[int] = []
    ended = threading.Event()

    def wait(_: dict[str, Any]) -> str:
        asked.append(1)
        ended.wait(60)
        return "0.5"

    with serve(wait) as server:
        yield server.url, lambda: len(asked)
        ended.set()


def test_a_model_whose_server_stays_silent_ends_the_run_and_keeps_its_answers(
    silent: tuple[str, Callable[[], int]], question_file: Path, tmp_path: Path
) -> None:
    task = get_task(f"llava:{question_file}")

    def run(url: str, **options: Any) -> list[TaskResult]:
        model = EndpointModel(Endpoint(url=url, model="m", attempts=1, **options))
        return evaluate(model, task, tmp_path / "run", modes=("own",), baselines=(), settings=ONE)

    with pytest.raises(EvalError, match="4 requests in a row failed, so nothing more is asked"):
        run(silent[0], timeout=0.3)
    assert silent[1]() <= 12


def test_a_server_that_refuses_single_questions_does_not_end_a_run(question_file: Path, tmp_path: Path) -> None:
    """A refused request (HTTP 400) may be the fault of its question; the longest ones are asked first."""
    left = [9]
    lock = threading.Lock()

    def reply(_: dict[str, Any]) -> Any:
        with lock:
            left[0] -= 1
            return {"error": "too long"} if left[0] >= 0 else "yes"

    with serve(reply) as server:
        model = EndpointModel(Endpoint(url=server.url, model="m", first_wait=0.001))
        task = get_task(f"llava:{question_file}")
        (result,) = evaluate(model, task, tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert result.counts.total == 12
    assert result.counts.failed == 0  # the nine are asked once more, one by one


def slowly(first: bytes, pause: float, stopped: threading.Event) -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n" + first
    while not stopped.wait(pause):
        yield b" "


@pytest.fixture(params=[b"X: ", b"\r\n{"], ids=["headers", "body"])
def dripping(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that sends one byte after the other and never ends its reply."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                connection.recv(2**16)
                for data in slowly(request.param, 0.05, stopped):
                    connection.sendall(data)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listening.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        stopped.set()


def test_the_timeout_is_that_of_the_whole_reply(dripping: str) -> None:
    with pytest.raises(RuntimeError, match="no whole reply within"):  # the drops would go on for ever
        Endpoint(url=dripping, model="j", timeout=2, attempts=1).chat({})


def test_an_endless_reply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_moslora_eval.backends.openai_endpoint._MOST_REPLY_BYTES", 1000)
    with serve(lambda _: message("0.5" * 1000)) as server, pytest.raises(RuntimeError, match="more than 1000 bytes"):
        Endpoint(url=server.url, model="j").chat({})
    assert len(server.payloads) == 1
