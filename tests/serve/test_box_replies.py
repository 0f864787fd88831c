"""Boxes of answers: beside the content in replies, and printed by the terminal chat, in pixels of the picture sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.serve.terminal_chat import Chat, interactive
from mm_moslora.serve.text_stream import TextStream
from tests.serve.serve_tools import asking, data_url

SAID = '<think>[1, 2, 3, 4]</think>[{"bbox_2d": [100, 375, 500, 625], "label": "a dog"}]'
FOUND = [{"numbers": [8.0, 10.0, 40.0, 30.0], "label": "a dog"}]
PICTURE = Image.new("RGB", (80, 40))  # padded to a square of 80


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model says `SAID`, whatever it decodes."""
    monkeypatch.setattr(TextStream, "add", lambda *_: "")
    monkeypatch.setattr(TextStream, "finish", lambda *_: SAID)
    monkeypatch.setattr(ConversationEncoder, "decode_answer", lambda *_: SAID)


@pytest.mark.usefixtures("says")
def test_a_reply_has_the_boxes_of_its_picture(server: Any) -> None:
    shown = server.post(asking("where?", data_url(PICTURE))).json()["choices"][0]["message"]
    assert shown["boxes"] == FOUND
    assert shown["content"] == SAID.partition("</think>")[2]
    assert "boxes" not in server.post(asking("where?")).json()["choices"][0]["message"]


@pytest.mark.usefixtures("says")
def test_the_chat_prints_the_boxes_of_the_last_picture(
    assembly: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    PICTURE.save(tmp_path / "dog.png")
    lines = iter([f"/image {tmp_path / 'dog.png'}", "where?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    interactive(Chat(assembly, max_new_tokens=2))
    assert f"  box 8, 10, 40, 30 a dog (pixels of {tmp_path / 'dog.png'})\n" in capsys.readouterr().out
