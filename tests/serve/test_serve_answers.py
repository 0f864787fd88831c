"""Answers of the server equal those of the model alone: whole and streamed, single and concurrent."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from PIL import Image

from tests.serve.serve_tools import asking, data_url, pixels_of

pytest.importorskip("openai", reason="the official client is not installed (pip install openai)")


def alone(models: Any, text: str, pictures: list[Image.Image], count: int) -> str:
    """The answer of `models.decoding.generation` to one prompt alone."""
    import torch

    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.models.decoding.generation import Prompt, encode_images, generate

    ids = models.encoder.encode_prompt([Turn.asking(text, images=len(pictures))])
    features = None
    if pictures:
        pixels = torch.stack([pixels_of(models, picture) for picture in pictures])
        features = encode_images(models.assembly.model, pixels).flatten(0, 1)
    prompt = Prompt(input_ids=ids, features=features)
    (tokens,) = generate(models.assembly.model, [prompt], max_new_tokens=count, stop_ids=models.stops)
    return models.encoder.decode_answer(tokens)


def questions(count: int) -> list[tuple[str, list[Image.Image], int]]:
    """Questions of different lengths with 0 to 2 pictures, and the longest answer of each."""
    made = []
    for index in range(count):
        pictures = [
            Image.new("RGB", (30 + index, 25), (index * 37 % 256, index * 91 % 256, index * 53 % 256))
            for _ in range(index % 3)
        ]
        made.append((f"what is the color {'of the shape ' * (index % 7)}number {index}?", pictures, 3 + index % 11))
    return made


def test_sixty_four_concurrent_streams_equal_single_answers(server: Any, models: Any) -> None:
    asked = questions(64)
    client = server.client()

    def ask(item: tuple[str, list[Image.Image], int]) -> str:
        text, pictures, count = item
        body = asking(text, *map(data_url, pictures)) | {"max_tokens": count}
        return "".join(
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**body, stream=True)
        )

    before = server.engine.steps
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(ask, asked))
    steps = server.engine.steps - before
    expected = [alone(models, *item) for item in asked]
    assert answers == expected
    assert len(set(expected)) > 20  # the questions do differ
    assert steps < sum(count for *_, count in asked) / 3  # decoded together, not one after the other


def test_whole_reply_has_openai_shape_and_counts(server: Any, models: Any) -> None:
    client = server.client()
    reply = client.chat.completions.create(**asking("what is the color?"))
    assert reply.choices[0].message.content == alone(models, "what is the color?", [], 6)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens > 0
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.model == "tiny"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"


def test_stream_ends_with_usage_when_asked(server: Any) -> None:
    body = asking("what is the color?", stream=True, stream_options={"include_usage": True})
    chunks = list(server.client().chat.completions.create(**body))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert [c.choices[0].finish_reason for c in chunks[:-1]].count(None) == len(chunks) - 2


def test_several_choices_differ_and_a_seed_repeats_them(server: Any) -> None:
    body = asking("what is the color?", n=4, temperature=1.5, seed=7, max_tokens=12)
    first, again = (server.client().chat.completions.create(**body) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in again.choices]


def test_stop_strings_end_the_answer_before_them(server: Any, models: Any) -> None:
    full = alone(models, "what is the color?", [], 12)
    stop = full[len(full) // 2 :][:3]
    reply = server.client().chat.completions.create(**asking("what is the color?", stop=[stop], max_tokens=12))
    assert reply.choices[0].message.content == full[: full.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_conversation_with_history_and_system_message(server: Any, models: Any) -> None:
    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.models.decoding.generation import Prompt, generate

    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "is it red?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "text", "text": "the shape?"}]},
    ]
    reply = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=6)
    turns = [
        Turn(role="system", text="be short"), Turn(role="user", text="is it red?"), Turn(role="assistant", text="yes"),
        Turn(role="user", text="what is\nthe shape?"),
    ]  # fmt: skip
    prompt = Prompt(input_ids=models.encoder.encode_prompt(turns))
    (tokens,) = generate(models.assembly.model, [prompt], max_new_tokens=6, stop_ids=models.stops)
    assert reply.choices[0].message.content == models.encoder.decode_answer(tokens)
