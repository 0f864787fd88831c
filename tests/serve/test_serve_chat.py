"""The terminal chat: commands, pictures by path, mistakes, and answers that use the conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from trials import make_recipe
from video_files import number_of, write_frames, write_video

from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.images.record_picture import PictureRules
from mm_moslora.data.record_faults import Where
from mm_moslora.serve import terminal_chat
from mm_moslora.serve.terminal_chat import Chat, interactive
from mm_moslora.utils import distributed


@pytest.fixture
def chat(assembly: Any) -> Chat:
    return Chat(assembly, max_new_tokens=6)


def talk(chat: Chat, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    rest: Iterator[str] = iter(lines)

    def read(_: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    interactive(chat)
    return capsys.readouterr().out


def test_commands_do_what_help_says(chat: Chat, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "my picture.png")
    dropped = str(tmp_path / "my picture.png").replace(" ", "\\ ")
    lines = [
        "/images", "/retry", f"/image '{tmp_path}/my picture.png'", dropped, "what is the color?", "/images",
        "/history", "/nonsense", "/image missing.png", "/help",
    ]  # fmt: skip
    said = talk(chat, lines, monkeypatch, capsys)
    for text in (
        "No pictures yet", "There is no question yet", "Picture 1 goes", "Picture 2 goes", "2  ", "user: what is the",
        "assistant: ", "Unknown command /nonsense", "missing.png", "/reset        forget",
    ):  # fmt: skip
        assert text in said, text
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]
    assert chat.turns[0].images == 2


def test_what_a_model_says_cannot_command_the_terminal(chat: Chat, monkeypatch: Any, capsys: Any) -> None:
    said = "\x1b]52;c;aGk=\x07red\x9b2J\x00\x7f\rblue\tand\ngreen ä 青"
    monkeypatch.setattr(chat, "stream", lambda _: (piece for piece in said))
    out = talk(chat, ["what is the color?"], monkeypatch, capsys)
    assert not {"\x1b", "\x07", "\x9b", "\x00", "\x7f", "\r"} & set(out)
    assert "red" in out
    assert "blue\tand\ngreen ä 青" in out


def test_retry_asks_the_same_with_the_same_pictures(chat: Chat) -> None:
    chat.look(Image.new("RGB", (20, 20), "blue"))
    first = chat.ask("what is <image> here?")
    question = chat.take_back()
    assert question == "what is <image> here?"
    assert chat.turns == []
    assert chat.ask(question) == first


def test_a_video_is_shown_as_frames_the_way_it_is_trained_on(
    chat: Chat, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    write_frames(tmp_path / "clip", 20)
    film = write_video(tmp_path / "film.mp4", frames=4)
    said = talk(chat, [f"/video {tmp_path / 'clip'}", "what happens?", str(film), "/video gone"], monkeypatch, capsys)
    assert said.count("8 frames of the video go") == 2
    assert "cannot be opened" in said
    asked = {"video": "clip", "question": "what happens?", "answer": "a"}
    rules = PictureRules(folder=tmp_path, video_frames=8)
    record = parse_record(asked, Where(file=tmp_path, line=None, row=0), rules)
    assert chat.turns[0] == record.turns[0]
    assert [number_of(image) for image in chat.images[:8]] == [number_of(p.rgb()) for p in record.images]
    assert len(chat.images) == 16
    question = chat.take_back()
    assert (question, chat.pending) == ("what happens?", [8, 8])


def test_reset_forgets_everything(chat: Chat, monkeypatch: Any, capsys: Any) -> None:
    fresh = chat.ask("is it red?")
    talk(chat, ["what is the shape?", "/reset"], monkeypatch, capsys)
    assert chat.turns == chat.images == chat.names == []
    assert chat.ask("is it red?") == fresh


def test_ctrl_c_stops_the_answer_and_keeps_its_text(chat: Chat, monkeypatch: Any, capsys: Any) -> None:
    real = terminal_chat.stream

    def interrupted(*arguments: Any, **more: Any) -> Iterator[Any]:
        yield next(real(*arguments, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal_chat, "stream", interrupted)
    said = talk(chat, ["is it red?"], monkeypatch, capsys)
    assert "[stopped]" in said
    assert [turn.role for turn in chat.turns] == ["user", "assistant"]


def test_a_too_long_conversation_is_an_error_and_continues_after_a_reset(
    chat: Chat, monkeypatch: Any, capsys: Any
) -> None:
    said = talk(chat, ["red " * 900, "/reset", "is it red?"], monkeypatch, capsys)
    assert "this model holds 512. Type /reset" in said
    assert len(chat.turns) == 2


def test_chat_and_server_run_on_the_accelerator(language_folder, vision_folder, records, tmp_path, monkeypatch):
    from mm_moslora.serve.served_models import load_models
    from mm_moslora.serve.terminal_chat import Chat
    from mm_moslora.training.training_loop import train

    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    run = train(make_recipe(parts, tmp_path / "run", "none", steps=1)).checkpoint
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    models = (Chat.from_folder(run).assembly.model, load_models(run).assembly.model)
    assert {parameter.device.type for model in models for parameter in model.parameters()} == {"meta"}
