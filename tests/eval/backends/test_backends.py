"""All backends: models of mm_moslora, transformers models, OpenAI-compatible servers."""

from __future__ import annotations

import dataclasses
import json
import shutil
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.backends.openai_endpoint import KEY_NAMES, Endpoint, EndpointModel
from mm_moslora_eval.protocol.model_interface import IMAGE, Message, Model, OptionRequest, Request, TokenDraw
from mm_moslora_eval.protocol.task import Decoding, Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import picture
from tests.eval.eval_models import export_tiny
from tests.eval.eval_server import serve

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def request(name: str, text: str, *images: bytes, **options: object) -> Request:
    content = (*([IMAGE] * len(images)), "\n" * bool(images) + text)
    return Request(id=name, messages=(Message(role="user", content=content),), images=images, **options)


def run_on(model: Model, task: Task, folder: Path) -> TaskResult:
    (result,) = evaluate(model, task, folder / "run", modes=("own",), baselines=(), settings=ONE)
    return result


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, language_folder: Path, vision_folder: Path) -> Path:
    """A tiny stock LLaVA on disk."""
    return export_tiny(tmp_path_factory.mktemp("exported"), language_folder, vision_folder)


QUESTIONS = [
    request("a", "what color?", picture(1), max_new_tokens=5),
    request("b", "is it a circle or a square, red or blue?", picture(1), max_new_tokens=5),
    request("c", "yes?", picture(1), max_new_tokens=5),
    request("d", "what color?", picture(2), max_new_tokens=5),
    request("e", "say <image> no", max_new_tokens=5),
]


def test_our_model_in_batches_answers_as_in_reference_mode(exported: Path) -> None:
    fast, slow = (
        open_model(str(exported), precision="fp32"),
        open_model(str(exported), precision="fp32", reference=True),
    )
    assert isinstance(fast, Model)
    assert fast.fingerprint == slow.fingerprint
    expected = dict(slow.generate(QUESTIONS, batch_size=8))
    assert dict(fast.generate(QUESTIONS, batch_size=8)) == expected
    assert dict(fast.generate(QUESTIONS, batch_size=2)) == expected
    assert len({answer.text for answer in expected.values()}) == len(QUESTIONS)
    options = [OptionRequest(request=item, options=("yes", "no", "red", "green")) for item in QUESTIONS]
    ours, reference = dict(fast.loglikelihood(options, batch_size=8)), dict(slow.loglikelihood(options, batch_size=1))
    for index in range(len(QUESTIONS)):
        assert [s.logprob for s in ours[index]] == pytest.approx([s.logprob for s in reference[index]], abs=1e-4)
        assert [s.tokens for s in ours[index]] == [s.tokens for s in reference[index]]
    fast.close()


def test_drawn_answers_are_the_same_in_any_batch_and_of_both_readers(exported: Path) -> None:
    asked = [
        dataclasses.replace(item, draw=TokenDraw(temperature=1.5, top_p=0.95, top_k=40, seed=number), sample=number)
        for number in range(2)
        for item in QUESTIONS[:4]
    ]
    ours, theirs = open_model(str(exported), precision="fp32"), open_model(f"hf:{exported}", precision="fp32")
    texts = [
        {index: answer.text for index, answer in model.generate(asked, batch_size=size)}
        for model in (ours, theirs)
        for size in (8, 3)
    ]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    greedy = {index: answer.text for index, answer in ours.generate(QUESTIONS[:4], batch_size=8)}
    assert len({texts[0][number] for number in (0, 4)} | {greedy[0]}) == 3
    sharp = [dataclasses.replace(item, draw=TokenDraw(temperature=1.0, top_k=1)) for item in QUESTIONS[:4]]
    assert {index: answer.text for index, answer in ours.generate(sharp, batch_size=8)} == greedy


def test_answers_after_solved_questions_are_those_of_reference_mode_and_of_transformers(exported: Path) -> None:
    solved = [
        Message(role="user", content=(IMAGE, "\nwhat color?")), Message(role="assistant", content=("red",)),
    ]  # fmt: skip
    asked = [
        dataclasses.replace(item, messages=(*solved, *item.messages), images=(picture(7), *item.images))
        for item in QUESTIONS[:4]
    ]
    models = [open_model(str(exported), precision="fp32", reference=slow) for slow in (False, True)]
    models.append(open_model(f"hf:{exported}", precision="fp32"))
    ours, slow, theirs = ({i: a.text for i, a in model.generate(asked, batch_size=4)} for model in models)
    assert ours == slow
    plain = {index: answer.text for index, answer in models[0].generate(QUESTIONS[:4], batch_size=4)}
    assert ours == theirs != plain


def test_the_log_likelihood_of_the_reference_is_that_of_transformers(exported: Path) -> None:
    """Teacher forcing over prompt and reference at once gives the same nats; answers do not change."""
    from mm_moslora_eval.sources.source_images import open_image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    texts = ("red", "a blue square", "yes", "red", "")
    asked = [dataclasses.replace(item, reference=text) for item, text in zip(QUESTIONS, texts, strict=True)]
    model, hf = open_model(str(exported), precision="fp32"), open_model(f"hf:{exported}", precision="fp32")
    found = dict(model.generate(asked, batch_size=8))
    plain = dict(model.generate(QUESTIONS, batch_size=8))
    assert {index: dataclasses.replace(answer, reference=None) for index, answer in found.items()} == plain
    assert found[4].reference is None, "a question without a reference"
    batched = dict(hf.generate(asked[:4], batch_size=4))
    network, processor = AutoModelForImageTextToText.from_pretrained(exported), AutoProcessor.from_pretrained(exported)
    for index in range(4):
        text, shown = hf._text(asked[index]), open_image(picture(1 + index // 3))  # type: ignore[attr-defined]
        given = processor(text=[text], images=[[shown]], return_tensors="pt")
        ids = torch.tensor([processor.tokenizer.encode(texts[index], add_special_tokens=False)])
        row = torch.cat([given["input_ids"], ids], dim=1)
        (seen,) = model.assembly.image_processing.process([shown])  # type: ignore[attr-defined]
        pixels = {"ours": seen.tensors["pixel_values"], "theirs": given["pixel_values"]}
        for answer, values in ((found[index], pixels["ours"]), (batched[index], pixels["theirs"])):
            with torch.inference_mode():
                logits = network(input_ids=row, pixel_values=values).logits[0, -ids.shape[1] - 1 : -1]
            nats = -torch.nn.functional.cross_entropy(logits, ids[0], reduction="sum")
            assert answer.reference.tokens == ids.shape[1]
            assert answer.reference.logprob == pytest.approx(float(nats), abs=1e-4)
    assert len({round(found[index].reference.logprob, 3) for index in range(4)}) == 4


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _brighter(content: dict[str, Any]) -> None:
    content["image_processor"]["image_mean"] = [0.9, 0.9, 0.9]


def _repeating_less(content: dict[str, Any]) -> None:
    content["repetition_penalty"] = 1.5


def _with_another_word(content: dict[str, Any]) -> None:
    content["pre_tokenizer"] = {"type": "Whitespace"}
    content["normalizer"] = {"type": "Lowercase"}


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("processor_config.json", _brighter),
        ("generation_config.json", _repeating_less),
        ("tokenizer.json", _with_another_word),
    ],
)
@pytest.mark.parametrize("kind", ["", "hf:"])
def test_other_processing_of_pictures_or_text_changes_the_fingerprint(
    exported: Path, tmp_path: Path, kind: str, file: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Stored answers of one must not count for the other."""
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    before = open_model(f"{kind}{folder}", precision="fp32").fingerprint
    assert open_model(f"{kind}{folder}", precision="fp32").fingerprint == before
    _edit(folder / file, change)
    assert open_model(f"{kind}{folder}", precision="fp32").fingerprint != before


def test_a_model_keeps_its_fingerprint_while_it_answers(exported: Path) -> None:
    fresh, used = (open_model(f"hf:{exported}", precision="fp32") for _ in range(2))
    list(used.generate(QUESTIONS[:2], batch_size=2))
    assert used.fingerprint == fresh.fingerprint


def test_transformers_backend_agrees_with_ours_on_the_same_weights(exported: Path) -> None:
    ours, theirs = open_model(str(exported), precision="fp32"), open_model(f"hf:{exported}", precision="fp32")
    pictures = QUESTIONS[:4]
    expected = dict(ours.generate(pictures, batch_size=1))
    found = dict(theirs.generate([*pictures, request("f", "say no", max_new_tokens=5)], batch_size=4))
    assert [found[i].text.strip() for i in range(4)] == [expected[i].text.strip() for i in range(4)]
    assert [found[i].finish_reason for i in range(4)] == [expected[i].finish_reason for i in range(4)]
    options = [OptionRequest(request=item, options=("yes", "no")) for item in pictures]
    a, b = dict(ours.loglikelihood(options, batch_size=4)), dict(theirs.loglikelihood(options, batch_size=4))
    for index in range(4):
        assert [s.logprob for s in a[index]] == pytest.approx([s.logprob for s in b[index]], abs=5e-3)


def test_a_language_model_answers_text_tasks_and_refuses_pictures(language_folder: Path) -> None:
    model = open_model(f"hf:{language_folder}", precision="fp32")
    (found,) = dict(model.generate([request("f", "say no", max_new_tokens=5)], batch_size=1)).values()
    assert found.finish_reason in ("stop", "length")
    with pytest.raises(EvalError, match="is a language model"):
        list(model.generate([QUESTIONS[0]], batch_size=1))


def test_endpoint_failure_costs_only_its_own_sample(question_file: Path, tmp_path: Path) -> None:
    def reply(payload: dict) -> str | dict:
        text = payload["messages"][-1]["content"][-1]["text"]
        return {"nothing": 1} if "colour is it? (1)" in text else "yes"

    with serve(reply) as server:
        model = EndpointModel(Endpoint(url=server.url, model="m", attempts=2, first_wait=0.01))
        result = run_on(model, get_task(f"llava:{question_file}"), tmp_path)
    assert (result.counts.total, result.counts.failed) == (12, 2)


@pytest.mark.parametrize("data", [b"", b"no picture", picture(1)[:8] + bytes(40), picture(1)[:60]])
def test_a_damaged_picture_is_not_sent_to_an_endpoint(data: bytes, question_file: Path, tmp_path: Path) -> None:
    (question_file.parent / "2.png").write_bytes(data)
    with serve(lambda _: "yes") as server:
        model = EndpointModel(Endpoint(url=server.url, model="m"))
        result = run_on(model, get_task(f"llava:{question_file}"), tmp_path)
    assert (result.counts.total, result.counts.failed, len(server.payloads)) == (12, 3, 9)


@pytest.mark.parametrize(
    ("code", "error", "said", "asked", "calls"),
    [(401, EvalError, "HTTP 401.*Check the address", 4, 1), (404, EvalError, "HTTP 404.*Check the address", 4, 1),
     (503, RuntimeError, "HTTP 503.*after 3 attempts", 1, 3)],
)  # fmt: skip
def test_endpoint_that_refuses_everything_ends_the_run(
    code: int, error: type[Exception], said: str, asked: int, calls: int
) -> None:
    with serve(lambda _: "never", faults=[code] * 50) as server:
        model = EndpointModel(Endpoint(url=server.url, model="m", attempts=3, first_wait=0.001))
        with pytest.raises(error, match=said):
            list(model.generate(QUESTIONS[:asked], batch_size=1))
    assert len(server.payloads) == calls


@pytest.mark.parametrize("host", ["127.0.0.1:1", "nowhere.invalid"])
def test_endpoint_that_is_not_there_ends_the_run_at_once(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    if host == "nowhere.invalid":
        monkeypatch.setattr(socket, "getaddrinfo", unknown)
    waits: list[float] = []
    monkeypatch.setattr("mm_moslora_eval.backends.openai_endpoint.time.sleep", waits.append)
    endpoint = Endpoint(url=f"http://{host}/v1", model="m")
    with pytest.raises(EvalError, match=f"^No server answers at http://{host}/v1 .*check the address"):
        list(EndpointModel(endpoint).generate(QUESTIONS[:4], batch_size=1))
    assert waits == []


def test_endpoint_scores_options_from_the_first_tokens_and_never_guesses() -> None:
    def reply(_: dict) -> dict:
        top = [{"token": " B", "logprob": -0.1}, {"token": "A", "logprob": -3.0}, {"token": "B", "logprob": -5.0}]
        choice = {
            "message": {"content": "B"},
            "finish_reason": "length",
            "logprobs": {"content": [{"top_logprobs": top}]},
        }
        return {"choices": [choice]}

    with serve(reply) as server:
        model = EndpointModel(Endpoint(url=server.url, model="m"))
        ((_, scores),) = model.loglikelihood([OptionRequest(request=QUESTIONS[0], options=("A", "B"))], batch_size=1)
        assert [score.logprob for score in scores] == [-3.0, -0.1]
        assert [score.greedy for score in scores] == [False, True]
        with pytest.raises(RuntimeError, match="no probability for option 'C'"):
            list(model.loglikelihood([OptionRequest(request=QUESTIONS[0], options=("A", "C"))], batch_size=1))


@pytest.mark.parametrize(
    "name", ["openai:no-url", "openai:http://127.0.0.1/v1", "openai:http://me:pw@host/v1#m", "nowhere"]
)
def test_an_unknown_model_name_is_an_error_with_the_forms(name: str) -> None:
    with pytest.raises(EvalError) as error:
        open_model(name)
    assert "pw" not in str(error.value)


def choosing(folder: Path) -> Task:
    """Two questions with the options A and B, chosen by log-likelihood."""
    rows = [
        {"question_id": f"q{n}", "text": f"Which? ({n})", "answer": "B", "options": {"A": "red", "B": "blue"}}
        for n in range(2)
    ]
    path = folder / "choices.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = get_task(f"llava:{path}")
    return dataclasses.replace(chosen, decoding=Decoding(kind="loglikelihood"), extraction="letter", metric="equal")


@pytest.mark.parametrize("beams", [1, 3])
def test_logits_that_are_not_numbers_are_failed_samples_of_a_transformers_model(
    beams: int, exported: Path, question_file: Path, tmp_path: Path
) -> None:
    model = open_model(f"hf:{exported}", precision="fp32")
    task = get_task(f"llava:{question_file}")
    task = dataclasses.replace(task, decoding=dataclasses.replace(task.decoding, beams=beams, max_new_tokens=3))
    some = EvaluationSettings(batch_size=4, limit=4, rank=0, world_size=1)
    (before,) = evaluate(model, task, tmp_path / "a", modes=("own",), baselines=(), settings=some)
    assert before.counts.failed == 0
    head = model.model.lm_head
    head.register_forward_hook(lambda _, inputs, logits: logits.index_fill(-1, torch.tensor([5]), torch.nan))
    with pytest.raises(RuntimeError, match="logits for 'a' are not finite"):
        list(model.generate([dataclasses.replace(QUESTIONS[0], beams=beams)], batch_size=4))
    (result,) = evaluate(model, task, tmp_path / "b", modes=("own",), baselines=(), settings=some)
    assert (result.counts.total, result.counts.failed) == (4, 4)
    (result,) = evaluate(model, choosing(tmp_path), tmp_path / "c", modes=("own",), baselines=(), settings=ONE)
    assert result.counts.failed == 2


def test_an_option_without_tokens_has_no_log_likelihood(exported: Path) -> None:
    model = open_model(f"hf:{exported}", precision="fp32")
    for options in (("", "red"), ("", "")):
        with pytest.raises(RuntimeError, match="option '' has no tokens"):
            list(model.loglikelihood([OptionRequest(request=QUESTIONS[0], options=options)], batch_size=1))


def test_the_key_follows_no_redirect_to_another_host(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str | None] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers.get("Authorization"))
            self.send_error(404)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_address[1]}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv(KEY_NAMES[0], "a-key-that-stays")
    with ThreadingHTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = Endpoint(url=f"http://127.0.0.1:{server.server_address[1]}/v1", model="m", attempts=1)
        try:
            with pytest.raises((EvalError, RuntimeError), match="302"):
                endpoint.chat({"messages": []})
        finally:
            server.shutdown()
    assert heard == []
