"""Every verb once on a GPU, on a run of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trials import make_recipe, write

pytest.importorskip("cyclopts", reason="cyclopts, which reads the command line, is not installed")
from mm_moslora.cli import run


@pytest.fixture(scope="module")
def trained(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    recipe = make_recipe(parts, folder / "run", "none", steps=2, precision="bf16", rehearsal=True)
    assert run(["train", write(recipe)]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def questions(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    images = sorted((parts["records"].parent / "images").glob("*.png"))[:3]
    rows = [
        {"question_id": f"q{n}", "image": images[n % 3].name, "text": "what is the color?", "answer": "red"}
        for n in range(6)
    ]
    for image in images:
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def picture(parts: dict[str, Path]) -> Path:
    return next((parts["records"].parent / "images").glob("*.png"))


def recipe_of(trained: Path) -> str:
    return str(trained.with_name("run.yaml"))


@pytest.mark.parametrize(
    "words",
    [
        ["chat", "RUN", "--image", "PICTURE", "--question", "what is the color?", "--max-new-tokens", "4"],
        ["plan", "RECIPE", "--gpus", "1xH100-80G", "--samples", "40", "--tokens-per-sample", "60"],
        ["data", "check", "RECIPE"],
        ["data", "check", "--stats", "RECIPE"],
        ["data", "view", "RUN", "--count", "1"],
        ["adapters", "inspect", "RUN"],
        ["export", "RUN", "OUT", "--to", "hf"],
        ["export", "RUN", "OUT"],
        ["export", "RUN", "OUT", "--to", "lora"],
        ["report", "RUN"],
        ["config", "RECIPE"],
        ["eval", "run", "llava:QUESTIONS", "--model", "RUN", "--output", "OUT", "--batch-size", "4"],
        ["eval", "run", "llava:QUESTIONS", "--model", "RUN", "--output", "OUT", "--modes", "own", "--modes", "wrong"],
        ["compare", "RECIPE", "--arms", "lora,moslora:orthogonal", "--lr", "1e-3", "--seeds", "1", "--tasks",
         "llava:QUESTIONS", "--output", "OUT"],
    ],
    ids=lambda words: " ".join(word for word in words if word.islower() and not word.startswith("--"))[:40],
)  # fmt: skip
def test_a_verb(words, trained, questions, picture, tmp_path, capsys) -> None:
    places = {"RUN": trained, "RECIPE": recipe_of(trained), "PICTURE": picture, "OUT": tmp_path / "out"}
    told = [str(places.get(word, word)).replace("QUESTIONS", str(questions)) for word in words]
    assert run(told) == 0, capsys.readouterr().err


def test_doctor_names_the_gpu(trained, capsys) -> None:
    assert run(["doctor", recipe_of(trained)]) in (0, 1)
    told = " ".join(capsys.readouterr().out.split())  # lines are broken at the width of the terminal
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in told


def test_chat_says_what_transformers_says(trained, picture, device) -> None:
    """Greedy decoding by this project's cache against `generate` of transformers, in fp32."""
    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.models.decoding.generation import Prompt, encode_images, generate
    from mm_moslora.models.load_model import load
    from mm_moslora.serve.terminal_chat import Chat

    chat = Chat(load(trained, merge=True), max_new_tokens=6)
    chat.assembly.model.to(device)
    chat.show(picture)
    ids, seen = chat._prompt([Turn.asking("what is the color?", images=1)])
    pixels = seen[0].tensors["pixel_values"]
    model = chat.assembly.model
    prompt = Prompt(input_ids=ids, features=encode_images(model, pixels).flatten(0, 1))
    (mine,) = generate(model, [prompt], max_new_tokens=6, stop_ids=[])
    with torch.inference_mode():
        theirs = model.generate(
            input_ids=ids[None].to(device), pixel_values=pixels.to(device), max_new_tokens=6, do_sample=False,
            attention_mask=torch.ones_like(ids)[None].to(device), eos_token_id=None,
        )[0, len(ids) :]  # fmt: skip
    assert mine == theirs.tolist()


def test_the_demo_draws_attention(trained, picture, device) -> None:
    from PIL import Image

    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.serve.gradio_demo import attention_maps, overlay
    from mm_moslora.serve.served_models import load_models

    models = load_models(trained, name="tiny")
    assert next(models.assembly.model.parameters()).device.type == device.type
    ids, seen = models.prompt([Turn.asking("what is the color?", images=1)], [Image.open(picture).convert("RGB")])
    (found,) = attention_maps(models, "tiny", input_ids=ids, images=seen, answer=[5, 6]) or []
    drawn = overlay(seen[0].tensors["pixel_values"][0], found, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    assert drawn.size == (448, 448)


def test_the_server_answers(trained, picture) -> None:
    for name in ("uvicorn", "starlette", "httpx"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    from PIL import Image

    from mm_moslora.serve.continuous_batching import GenerationEngine
    from mm_moslora.serve.request_limits import Limits
    from mm_moslora.serve.served_models import load_models
    from tests.serve.serve_tools import asking, data_url, serving

    models, limits = load_models(trained, name="tiny", with_base=True), Limits(context=512, max_tokens=64)
    with serving(GenerationEngine(models, limits), limits) as running:
        body = asking("what is the color?", data_url(Image.open(picture)), temperature=0.7, seed=3)
        answers = [running.post(body | {"model": name}) for name in ("tiny", "tiny-base", "tiny")]
    assert [answer.status_code for answer in answers] == [200] * 3, answers[0].text
    first, _, again = (answer.json()["choices"][0]["message"]["content"] for answer in answers)
    assert first == again
