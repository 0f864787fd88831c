"""Ready-made models in the server, the demo and the chat: each answer equals that of transformers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_moslora.serve.continuous_batching import GenerationEngine
from mm_moslora.serve.gradio_demo import Demo, messages_of
from mm_moslora.serve.request_limits import Limits
from mm_moslora.serve.served_models import Models, Variant, load_models
from mm_moslora.serve.terminal_chat import Chat
from tests.serve.serve_tools import asking, data_url, serving

FAMILIES = ["qwen3_vl", "smolvlm", "paligemma", "llava", "llava_next"]
"""Three positions per token, tiles, positions from 1 with a prefix that sees itself, our own path, a sliding window."""


def picture(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    """A picture of noise, so that every tile has content."""
    noise = Image.effect_noise((width, height), 60).convert("RGB")
    return Image.blend(noise, Image.new("RGB", (width, height), colour), 0.5)


QUESTIONS = [
    ("what is the color?", [picture(50, 70, (200, 30, 30))]),
    ("say something long and then some more of it", []),
    ("is it the same shape?", [picture(40, 40, (20, 200, 30)), picture(30, 60, (20, 30, 200))]),
    ("the shape?", [picture(64, 32, (230, 230, 20))]),
]


def told_apart(model: Any) -> None:
    """Weights with which answers depend on every token; with fresh weights all answers are equal."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for weight in [*model.get_decoder().layers.parameters(), model.get_input_embeddings().weight]:
            if weight.ndim == 2:
                weight.mul_(8)
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight), requires_grad=False)


@pytest.fixture(scope="module")
def open_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    from vlms import make_vlm

    from mm_moslora.config import ModelConfig
    from mm_moslora.models.assembly import load_parts

    def make(family: str) -> Models:
        assembly = load_parts(ModelConfig(vlm=str(make_vlm(tmp_path_factory.mktemp(family), family))))
        assembly.model.requires_grad_(False).eval()
        told_apart(assembly.model)
        return Models(assembly, {"tiny": Variant(adapter=None, projector=None, source="tiny")})

    return make


def alone(models: Any, text: str, pictures: list[Image.Image], count: int) -> str:
    """The answer of transformers' own `generate` to the same ids and pictures."""

    from mm_moslora.batch import join_images
    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.models.batching.padded_batch import padded_inputs

    ids, images = models.prompt([Turn.asking(text, images=len(pictures))], pictures)
    tensors = join_images([picture.tensors for picture in images])
    pixels = tensors.pop("pixel_values", None)
    inputs = padded_inputs(models.assembly.model, [ids], pixels, tensors, answers=[len(ids)])
    said = models.assembly.model.generate(
        **inputs, max_new_tokens=count, do_sample=False, eos_token_id=models.stops, pad_token_id=models.stops[0]
    )[0, len(ids) :].tolist()
    return models.encoder.decode_answer([token for token in said if token not in models.stops])


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_at_once_are_those_that_transformers_gives_alone(family: str, open_family: Any) -> None:
    models = open_family(family)
    asked = [(*QUESTIONS[index % 4], 3 + index % 9) for index in range(16)]
    expected = [alone(models, *item) for item in asked]
    engine = GenerationEngine(models, Limits(context=2048, max_tokens=64))
    with serving(engine, engine.limits) as server:
        client = server.client()

        def ask(item: tuple[str, list[Image.Image], int]) -> str:
            text, pictures, count = item
            body = asking(text, *map(data_url, pictures)) | {"max_tokens": count}
            chunks = client.chat.completions.create(**body, stream=True)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(ask, asked)) == expected
        if models.joins:
            assert engine.steps < sum(count for *_, count in asked) / 1.5  # decoded together
    assert len(set(expected)) >= 4


@pytest.fixture
def server(open_family: Any) -> Iterator[Any]:
    limits = Limits(context=256, max_tokens=64)
    with serving(GenerationEngine(open_family("qwen2_5_vl"), limits), limits) as running:
        yield running


def test_bad_input_gets_the_same_error_format_and_the_server_continues(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_processing = server.engine.models.assembly.image_processing

    def refuse(images: Any) -> None:
        raise ValueError(f"cannot take {images[0]!r}")

    good = asking("the shape?", data_url(picture(40, 40, (9, 9, 9))))
    with monkeypatch.context() as patch:
        patch.setattr(image_processing, "process", refuse)
        refused = server.post(good)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "invalid_image"
    assert "0x" not in refused.text
    assert "PIL" not in refused.text
    long = server.post(asking("word " * 400))
    assert long.json()["error"]["code"] == "context_length_exceeded"
    hidden = server.post(asking("<|image_pad|><|vision_start|> <|im_end|>", max_tokens=2))
    assert hidden.status_code == 200  # text, not a placeholder without a picture
    for size in ((1, 1), (1, 199), (199, 1)):
        assert server.post(asking("?", data_url(Image.new("RGB", size)))).status_code in (200, 400)
    assert server.post(good).status_code == 200


def test_a_run_on_a_ready_made_model_is_served_with_its_base(tmp_path: Path) -> None:
    from vlm_runs import recipe_for, write_records
    from vlms import make_vlm

    from mm_moslora.training.training_loop import train

    vlm = make_vlm(tmp_path / "vlm", "qwen2_5_vl")
    train(recipe_for(vlm, write_records(tmp_path), tmp_path / "run"))
    shown = picture(40, 56, (30, 60, 200))
    shown.save(tmp_path / "shown.png")
    chat = Chat.from_folder(tmp_path / "run", max_new_tokens=5)
    chat.show(tmp_path / "shown.png")
    pieces = list(chat.stream("what color?"))
    models = load_models(tmp_path / "run", name="tuned", with_base=True)
    limits = Limits(context=512)
    with serving(GenerationEngine(models, limits), limits) as server:
        client = server.client()
        assert [model.id for model in client.models.list()] == ["tuned", "tuned-base"]
        body = asking("what color?", data_url(shown), max_tokens=5) | {"model": "tuned"}
        assert client.chat.completions.create(**body).choices[0].message.content == "".join(pieces)
    demo = Demo(load_models(tmp_path / "run", with_base=True), max_new_tokens=5)
    try:
        *_, last = demo.ask(messages_of({"text": "what color?", "files": [str(tmp_path / "shown.png")]}, []))
    finally:
        demo.close()
    assert last.tuned == "".join(pieces)
    assert last.attention is None
