"""Tools over HTTP and in the terminal: what a trained model calls comes back as OpenAI's `tool_calls`."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from trials import make_recipe

from mm_moslora.cli import serve_verbs
from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.serve.api.api_errors import ApiError
from mm_moslora.serve.api.chat_replies import Reply
from mm_moslora.serve.api.chat_request import chat_request
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.serve.inference.continuous_batching import AnswerPart, GenerationEngine
from mm_moslora.serve.inference.forced_calls import opening_of_call
from mm_moslora.serve.inference.prompt_preparation import refuse_unfit, turns_of
from mm_moslora.serve.inference.python_calls import read_python_calls
from mm_moslora.serve.inference.served_models import load_models
from mm_moslora.serve.inference.text_stream import TextStream
from mm_moslora.serve.inference.tool_replies import CallSplit, _rendered, call_form
from mm_moslora.serve.terminal_chat import Chat, interactive
from mm_moslora.training.training_loop import train
from mm_moslora.utils.errors import DataError
from tests.data.chat.test_tool_records import CALL, MESSAGES, RECORD, WEATHER, parsed, tokenizer
from tests.serve.serve_tools import serving

TOOLS = json.dumps([WEATHER])
USER = {"role": "user", "content": "Is it hot?"}
TEMPLATES = [
    "gemma4_v5", "glm4moe", "gptoss", "lfm2_2_5", "lfm2_2_5_vl", "llama3_1", "muse_glimmer", "nemotron_3_nano",
    "qwen2_5", "qwen3", "qwen3_5_nothink", "qwen3_vl",
]  # fmt: skip


@pytest.fixture(scope="module")
def forms() -> dict:
    encoders = {name: ConversationEncoder(tokenizer(name)) for name in TEMPLATES}
    return {name: (encoder, call_form(encoder)) for name, encoder in encoders.items()}


def split(form: dict, text: str, size: int = 1000) -> tuple[str, list]:
    taken, content, calls = CallSplit(form, TOOLS), "", []
    for start in range(0, len(text), size):
        _, more, found = taken.add(text[start : start + size])
        content, calls = content + more, calls + found
    _, more, found = taken.add("", last=True)
    return content + more, [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls + found]


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes_is_read_back(forms, name, size) -> None:
    """Of the tokens that are learned, without the token that ends the answer, as the engine gives them."""
    encoder, form = forms[name]
    turns = parsed(RECORD).turns
    prompt, encoded = encoder.encode_prompt(turns[:1]), encoder.encode(turns)
    behind = encoded.supervised[len(prompt) :].tolist()
    ids = encoded.input_ids[len(prompt) : len(prompt) + behind.index(False)].tolist()
    text = encoder.decode_answer(ids[:-1], calls=True)
    content, calls = split(form, text, size)
    assert (content.strip(), calls) == ("", [("weather", CALL["arguments"])])
    assert split(form, "Hot, 30 < 31 {degrees} [yes].", size) == ("Hot, 30 < 31 {degrees} [yes].", [])


@pytest.mark.parametrize("name", ["lfm2_2_5", "lfm2_2_5_vl", "qwen3"])
@pytest.mark.parametrize("value", ["O'Neil's", "a\\\\b\\n", '"', "line\nline", "é ]", "')", "", "x, y=2"])
def test_quotes_and_escapes_in_arguments_are_read_back(forms, name, value) -> None:
    encoder, form = forms[name]
    function = {"name": "weather", "arguments": {"city": value, "days": 2, "more": {"a": ["it's", None, True]}}}
    calls = [{"type": "function", "id": f"call0000{n}", "function": function} for n in range(2)]
    text = _rendered(encoder, calls)
    assert split(form, text) == ("", [("weather", function["arguments"])] * 2)


@pytest.mark.parametrize("text", [
    "[weather(city='Rome)]", "[weather(city='Rome', city='Oslo')]", "[weather('Rome')]", "[weather]", "[]", "[weather(",
    "[weather(days=2 3)]", "weather(days=2)", "[weather(days=__import__('os'))]", "[" + "f(a=" * 2000,
])  # fmt: skip
def test_what_is_no_call_of_python_stays_text(forms, text) -> None:
    text = f"<|tool_call_start|>{text}<|tool_call_end|>"
    assert split(forms["lfm2_2_5"][1], text) == (text, [])


@pytest.mark.parametrize("value", ["he said ', more='x", "f('a', sep=2), g('), h('"])
def test_a_text_ends_before_names_of_the_schema_alone(forms, value) -> None:
    text = f"<|tool_call_start|>[weather(city='{value}', days=2)]<|tool_call_end|>"
    assert split(forms["lfm2_2_5"][1], text) == ("", [("weather", {"city": value, "days": 2})])


def test_arguments_beside_the_schema_are_read_as_they_stand(forms) -> None:
    text = "<|tool_call_start|>[weather(start='a', to='b', days=2)]<|tool_call_end|>"
    assert split(forms["lfm2_2_5"][1], text) == ("", [("weather", {"start": "a", "to": "b", "days": 2})])


def test_calls_of_python_are_read_in_linear_time(forms) -> None:
    for text in (
        "[" + "1," * 20_000 + "b=1," * 20_000,
        "'" + ", b=(1" * 20_000,
        "'" + "', city=" * 15_000,
        "\\'" * 40_000,
    ):
        started = time.process_time()
        with pytest.raises(ValueError, match="character"):
            read_python_calls(f"[weather(days={text})]", {"weather": ["days"]})
        assert time.process_time() - started < 1, text[:20]
    with pytest.raises(ValueError, match="at most 200000"):
        read_python_calls("[weather(days=" + " " * 200_000)


def test_text_and_several_calls(forms) -> None:
    _, form = forms["qwen3"]
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert split(form, f"Let me look.\n{one}\n{one}", 3) == ("Let me look.", [("weather", {"city": "Rome"})] * 2)


@pytest.mark.parametrize("text", [
    "<tool_call>\nweather in Rome\n</tool_call>", '<tool_call>\n{"city": "Rome"}\n</tool_call> so',
    '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>', '<tool_call>\n{"name": "wea',
    '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>', "<tool_call>",
])  # fmt: skip
@pytest.mark.parametrize("size", [1, 1000])
def test_what_is_no_call_stays_text(forms, text, size) -> None:
    content, calls = split(forms["qwen3"][1], f"Well. {text}", size)
    assert calls == []
    assert content.split() == f"Well. {text}".split()


@given(text=st.text(alphabet='<>/_"{}tool_calname: \n', max_size=40), size=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_any_text_is_kept(forms, text, size) -> None:
    content, calls = split(forms["qwen2_5"][1], text, size)
    assert calls == []
    assert content.split() == text.split()


def body(*messages: dict, **more) -> dict:
    return {"model": "run", "messages": list(messages), "tools": [WEATHER]} | more


CALLING = MESSAGES[1]
NAMED = {"type": "function", "function": {"name": "weather"}}
STRICT = {"function": WEATHER["function"] | {"strict": True}}
OTHER = {"type": "function", "function": {"name": "look-up", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize(("value", "param", "words"), [
    (body(USER, tools={"a": 1}), "tools", "expected a list of tools"),
    (body(USER, tools="weather"), "tools", "is no JSON"),
    (body(USER, tools=[{"type": "function"}]), "tools", "no function with a name"),
    (body(USER, tools=[WEATHER, WEATHER]), "tools", "two tools with the name"),
    (body(USER, tools=[{"function": {"name": "\ud800"}}]), "tools", "surrogate"),
    (body(USER, tools=[WEATHER, OTHER], tool_choice="required"), "tool_choice", "2 tools are offered"),
    (body(USER, tools=None, tool_choice="required"), "tool_choice", "does not offer"),
    (body(USER, tool_choice=NAMED | {"function": {"name": "nope"}}), "tool_choice", "does not offer"),
    (body(USER, tool_choice={"type": "function", "name": "weather"}), "tool_choice", "expected \"none\""),
    (body(USER, tool_choice={"type": "allowed_tools"}), "tool_choice", "expected \"none\""),
    (body(USER, tool_choice=True), "tool_choice", "expected \"none\""),
    (body(USER, parallel_tool_calls="no"), "parallel_tool_calls", "true or false"),
    (body(USER, tools=[OTHER, STRICT]), "tools[1].function.strict", "leave it out"),
    (body(USER, tools=[OTHER, WEATHER | {"strict": True}]), "tools[1].strict", "leave it out"),
    (body(USER, tools=[{"type": "web_search", "name": "web_search"}]), "tools", "has the type 'web_search'"),
    (body(USER, MESSAGES[2]), "messages[1].tool_call_id", "as no open call"),
    (body(USER, CALLING | {"tool_calls": "x"}, MESSAGES[2]), "messages[1].tool_calls", "is no JSON"),
    (body(USER, CALLING | {"tool_calls": [CALL | {"arguments": "{"}]}), "messages[1].tool_calls", "is no JSON"),
    (body(USER, CALLING, MESSAGES[2], MESSAGES[2]), "messages[3].tool_call_id", "as no open call"),
    (body(USER, CALLING), "messages", "must begin"),
    (body(USER, {"role": "assistant", "content": None}, USER), "messages[1].content", "a text"),
    (body(USER, CALLING, MESSAGES[2] | {"content": None}), "messages[2].content", "a text"),
])  # fmt: skip
def test_each_bad_request_is_one_refusal(value, param, words) -> None:
    with pytest.raises(ApiError, match=words) as refused:
        chat_request(value, Limits())
    assert (refused.value.status, refused.value.param) == (400, param)


def test_requests_become_the_turns_of_records() -> None:
    request = chat_request(body(*MESSAGES[:3]), Limits())
    first, *rest = turns_of(request.messages)
    turns = [replace(first, tools=request.tools), *rest]
    encoder = ConversationEncoder(tokenizer("qwen2_5"))
    assert encoder.encode_prompt(turns).tolist() == encoder.encode_prompt(parsed(RECORD).turns[:3]).tolist()
    assert chat_request(body(USER, tool_choice="none"), Limits()).tools == ""
    forced = chat_request(body(USER, tools=[OTHER, WEATHER], tool_choice=NAMED), Limits())
    assert (json.loads(forced.tools), forced.forced, forced.one_call) == ([WEATHER], True, False)
    assert chat_request(body(USER, tool_choice="required", parallel_tool_calls=False), Limits()).one_call


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_forced_call_begins_as_the_learned_one(forms, name) -> None:
    encoder, form = forms[name]
    opening = opening_of_call(encoder, form, TOOLS)
    turns = parsed(RECORD).turns
    encoded = encoder.encode(turns[:2])
    begin = len(encoder.encode_prompt(turns[:1]))
    learned = encoded.input_ids[begin : begin + int(encoded.supervised.sum())].tolist()
    assert learned[: len(opening)] == opening
    stream = TextStream(encoder, ("weather",), calls=True, opening=opening)
    text = "".join(stream.add(token) for token in learned[len(opening) : -1]) + stream.finish()
    assert split(form, text, 3)[1] == [("weather", CALL["arguments"])]
    assert not stream.stopped, "the opening holds the text that ends an answer"


def test_an_answer_ends_with_the_one_call_that_is_wanted(forms) -> None:
    one = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    request = chat_request(body(USER, parallel_tool_calls=False, stream=True), Limits())
    reply = Reply(request=request, prompt_tokens=1, call_form=forms["qwen3"][1])
    assert not reply.ended(0)
    events = reply.add(0, AnswerPart(text=one * 2, tokens=9))
    assert reply.finished
    assert events.count(b'"name":"weather"') == 1
    assert b'"finish_reason":"tool_calls"' in events


@pytest.mark.parametrize("name", ["phi3", "deepseekv3", "lfm2"])
def test_a_model_whose_calls_are_not_known_refuses_tools(name) -> None:
    form = call_form(ConversationEncoder(tokenizer(name)))
    assert form is None
    models = SimpleNamespace(takes_pictures=False, call_form=form)
    with pytest.raises(ApiError, match="writes no calls of tools") as refused:
        refuse_unfit(chat_request(body(USER), Limits()), models, Limits())
    assert refused.value.param == "tools"


def test_the_tokenizers_own_response_template_is_used() -> None:
    made = tokenizer("qwen3")
    field = {"open": "<<", "close": ">>", "content": "json", "repeats": True, "transform": {"function": "{content}"}}
    made.response_template = {"start_anchor": "x", "fields": {"tool_calls": field, "content": {}}}
    form = call_form(ConversationEncoder(made))
    assert split(form, 'a <<{"name": "weather", "arguments": {}}>>', 2) == ("a ", [("weather", {})])


@pytest.fixture(scope="module")
def run(tmp_path_factory, language_folder, vision_folder, records) -> Path:
    """A tiny Qwen3 that learned a conversation with a call, and one that ends with it."""
    folder = tmp_path_factory.mktemp("tools")
    made = tokenizer("qwen3")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(made), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, max_position_embeddings=2048,
        eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    made.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text(f"{json.dumps(RECORD)}\n{json.dumps(RECORD | {'messages': MESSAGES[:2]})}\n")
    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    recipe = make_recipe(parts, folder / "run", "none", dropout=0.0, steps=80, micro_batch=1, rehearsal=False)
    recipe = replace(
        recipe, model=replace(recipe.model, language=str(folder / "model"), vision=None, language_mode="full"),
        data=DataConfig(train=[SourceConfig(path=str(folder / "data.jsonl"))]),
        train=replace(recipe.train, global_batch=2, save_every=80),
        optim=replace(recipe.optim, lr=5e-3, warmup=0.0, schedule="constant"),
    )  # fmt: skip
    train(recipe)
    return folder / "run"


def test_a_trained_model_calls_and_answers(run, monkeypatch) -> None:
    added, loops = CallSplit.add, []

    def noted(*args, **options):
        loops.append(asyncio._get_running_loop())
        return added(*args, **options)

    monkeypatch.setattr(CallSplit, "add", noted)
    models = load_models(run)
    limits = Limits(context=2048, max_tokens=128, default_tokens=128, drain_seconds=1)
    with serving(GenerationEngine(models, limits), limits) as server:
        client = server.client()
        reply = client.chat.completions.create(**body(USER)).choices[0]
        assert reply.finish_reason == "tool_calls"
        assert reply.message.content is None
        [call] = reply.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", CALL["arguments"])
        result = {"role": "tool", "tool_call_id": call.id, "content": MESSAGES[2]["content"]}
        answer = client.chat.completions.create(**body(USER, reply.message.model_dump(), result)).choices[0]
        assert (answer.message.content, answer.finish_reason) == ("Yes, 30 degrees.", "stop")
        assert answer.message.tool_calls is None
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**body(USER), stream=True)]
        [streamed] = [item for chunk in chunks for item in chunk.delta.tool_calls or []]
        assert (streamed.index, streamed.function.name) == (0, "weather")
        assert json.loads(streamed.function.arguments) == CALL["arguments"]
        assert "".join(chunk.delta.content or "" for chunk in chunks) == ""
        assert chunks[-1].finish_reason == "tool_calls"
        wanted = body(USER, tools=[OTHER, WEATHER], tool_choice=NAMED, parallel_tool_calls=False)
        forced = client.chat.completions.create(**wanted)
        assert [call.function.name for call in forced.choices[0].message.tool_calls] == ["weather"]
        assert (forced.choices[0].message.content, forced.choices[0].finish_reason) == (None, "tool_calls")
        free = client.chat.completions.create(**body(USER))
        assert forced.usage.prompt_tokens > free.usage.prompt_tokens, "the beginning of the call is given"
        with pytest.raises(Exception, match=r"400.*asks for thinking before it"):
            client.chat.completions.create(**wanted, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        forbidden = client.chat.completions.create(**body(USER, tool_choice="none")).choices[0]
        assert forbidden.message.tool_calls is None
    assert {*loops} == {None}, "calls are read beside the event loop"


def test_the_terminal_names_calls_and_takes_results(run, monkeypatch, capsys) -> None:
    chat = Chat.from_folder(run, tools=TOOLS)
    lines = iter(["/result 5", "Is it hot?", f"/result {MESSAGES[2]['content']}", "/retry", "/history"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, "/quit"))
    interactive(chat)
    said = capsys.readouterr().out
    assert said.count('weather({"city": "Rome", "days": 2}) is called; give its result by /result TEXT.') == 2
    assert "No call waits for a result." in said
    assert "Yes, 30 degrees." in said
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_the_verb_takes_a_file_of_tools_and_prints_calls(run, tmp_path, capsys) -> None:
    (tmp_path / "tools.json").write_text(TOOLS)
    assert serve_verbs.chat(run, question="Is it hot?", tools=tmp_path / "tools.json") == 0
    assert capsys.readouterr().out.split("\n")[-2] == 'weather({"city": "Rome", "days": 2})'
    for text in ("{", '{"name": "weather"}', "[1]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"--tools .*bad\.json: .*Give a JSON file"):
            serve_verbs.chat(run, tools=tmp_path / "bad.json")
    with pytest.raises(DataError, match="--tools"):
        serve_verbs.chat(run, tools=tmp_path / "none.json")


def test_calls_behind_one_that_cannot_be_read_are_found_and_a_deep_one_is_text(forms) -> None:
    _, form = forms["qwen3"]
    good = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    content, calls = split(form, f"<tool_call>\nnope\n</tool_call>\n{good}")
    assert calls == [("weather", {"city": "Oslo"})]
    assert "nope" in content
    deep = '<tool_call>\n{"name": "weather", "arguments": ' + '{"a":' * 3000 + "\n</tool_call>"
    content, calls = split(form, deep)
    assert calls == []
    assert content.count('{"a":') == 3000
