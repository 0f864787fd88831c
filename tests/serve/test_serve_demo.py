"""The demo: both models get the same question, attention is drawn, and the page works in a real browser."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, MISSING, browsing
from PIL import Image

from mm_moslora.serve.gradio_demo import Demo, attention_maps, launch, messages_of
from mm_moslora.serve.served_models import Models, Variant
from mm_moslora.serve.terminal_chat import Chat


@pytest.fixture
def pair(assembly: Any) -> Iterator[Any]:
    """Two variants that see the same picture differently."""
    projector = assembly.model.model.multi_modal_projector
    other = copy.deepcopy(projector)
    with torch.no_grad():
        for weight in other.parameters():
            weight.neg_()
    variants = {
        name: Variant(adapter=None, projector=part, source="t")
        for name, part in (("tiny", projector), ("tiny-base", other))
    }
    yield Models(assembly, variants)
    assembly.model.model.multi_modal_projector = projector


@pytest.fixture
def demo(pair: Any) -> Iterator[Demo]:
    made = Demo(pair, max_new_tokens=6)
    yield made
    made.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 40), (220, 40, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_both_answers_equal_those_of_chat_and_attention_covers_the_picture(
    demo: Demo, pair: Any, picture: Path
) -> None:
    expected = []
    for name in ("tiny", "tiny-base"):
        chat = Chat(pair.assembly, max_new_tokens=6)
        chat.show(picture)
        with pair.use(name):
            expected.append(chat.ask("what is the color?"))
    assert expected[0] != expected[1]
    said = list(demo.ask(messages_of({"text": "what is the color?", "files": [str(picture)]}, [])))
    assert [said[-1].tuned, said[-1].base] == expected
    assert said[-1].attention is not None
    assert said[-1].attention.size == (448, 448)
    assert all(one.attention is None for one in said[:-1])


def test_attention_is_that_of_the_model(pair: Any, picture: Path) -> None:
    """Against weights computed by hand from one more forward pass."""
    from mm_moslora.data.chat.record_turns import Turn
    from mm_moslora.models.decoding.generation import Prompt, embed_prompt
    from mm_moslora.models.transformers_patches import attention_within

    ids, images = pair.prompt([Turn.asking("what is the color?", images=1)], [Image.open(picture).convert("RGB")])
    (found,) = attention_maps(pair, "tiny", input_ids=ids, images=images, answer=[5, 6]) or []
    model = pair.assembly.model
    with torch.no_grad():
        whole = torch.cat([ids, torch.tensor([5, 6])])
        row = embed_prompt(model, Prompt(input_ids=whole, features=pair.image_tokens("tiny", images)))
        with attention_within(model, "eager"):
            layers = model.get_decoder()(inputs_embeds=row[None], output_attentions=True).attentions
    start = len(ids) - 1
    mean = sum(layer[0, :, start : start + 2].mean(dim=(0, 1)) for layer in layers)[
        whole == model.config.image_token_id
    ]
    assert found.flatten().tolist() == pytest.approx((mean / mean.max()).tolist(), abs=1e-5)
    assert attention_maps(pair, "tiny", input_ids=ids, images=[], answer=[5]) is None


@pytest.mark.skipif(CHROMIUM is None, reason=MISSING)
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="gradio is not installed (make test-extras)")
def test_in_a_browser(demo: Demo, picture: Path, tmp_path: Path) -> None:
    expected = list(demo.ask(messages_of({"text": "what is the color?", "files": [str(picture)]}, [])))[-1]
    page, url = launch(demo, port=0, wait=False)
    try:
        with browsing(tmp_path / "profile") as browser:
            browser.open(url)
            browser.wait("document.querySelector('textarea') && document.querySelector('input[type=file]')")
            browser.choose_files("input[type=file]", picture)
            browser.wait(
                "document.querySelector('.thumbnails img, .thumbnail-item img, [data-testid=multimodal-textbox] img')"
            )
            browser.run(
                "const box = document.querySelector('textarea:not([disabled])'); box.focus();"
                "const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;"
                "set.call(box, 'what is the color?');"
                "box.dispatchEvent(new Event('input', {bubbles: true}))"
            )
            browser.run("document.querySelector('[data-testid=submit-button]').click()")
            browser.wait("document.querySelector('#attention img')", 120)
            assert expected.tuned.strip() in browser.run("document.querySelector('#tuned').innerText")
            assert browser.run("document.querySelector('#base textarea').value") == expected.base
            browser.screenshot(tmp_path / "demo.png")
            ours = [error for error in browser.errors if "favicon" not in error and "manifest" not in error]
            assert ours == []
    finally:
        page.close()
