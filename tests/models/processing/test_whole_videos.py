"""Videos of ready-made models: what their own processors make of the same frames, known before they are decoded."""

from __future__ import annotations

import json
from html import escape

import pytest
import torch
from PIL import Image
from tiny import supervised_logits
from transformers.video_utils import load_video
from video_files import write_frames, write_video
from vlms import make_video_vlm, make_vlm

from mm_moslora.batch import Batch
from mm_moslora.config import (
    AdapterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    TrainConfig,
)
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.check.data_views import RecordSample, page, view_tokens
from mm_moslora.data.preprocessing_print import trained_videos
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.assembly import load_parts
from mm_moslora.planning.model_probes import diagnose_model
from mm_moslora.serve.terminal_chat import Chat
from mm_moslora.training.training_loop import train

FAMILIES = ("qwen2_5_vl", "qwen3_vl", "smolvlm", "internvl")
ASK = "what happens?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Each family, made once."""
    return {name: make_video_vlm(tmp_path_factory.mktemp(name), name) for name in FAMILIES}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 20, size=(96, 64), options={"bf": "3", "g": "7"})
    write_video(folder / "b.mkv", 5, rate=25)
    return folder


def data_of(parts, folder, rows, **settings):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    source = SourceConfig(path=str(path), **settings)
    config = DataConfig(train=[source], max_length=4096, order="sequential", max_bad_share=0.5)
    return TrainingSet([source], ConversationEncoder.of(parts), parts.image_processing, config=config)


def asked(name, question=f"<video>\n{ASK}"):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "it gets brighter"}]
    return {"id": name, "video": name, "conversations": turns}


def stock_inputs(processor, path, **sampling):
    frames, metadata = load_video(str(path), backend="pyav")
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": ASK}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it gets brighter"}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=True, return_tensors="pt",
        add_special_tokens=False, **sampling,
    )  # fmt: skip


@pytest.mark.parametrize("sampling", [{"video_frames": 6}, {"video_fps": 2.0}], ids=["frames", "rate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_video_is_what_the_models_processor_makes_of_it(family, sampling, folders, clips):
    assembly = load_parts(ModelConfig(vlm=str(folders[family])))
    data = data_of(assembly, clips, [asked("a.mp4"), asked("b.mkv")], **sampling)
    example, other = data[0], data[1]
    own = {"num_frames": sampling.get("video_frames"), "fps": sampling.get("video_fps")}
    stock = stock_inputs(assembly.processor, clips / "a.mp4", **own)
    assert stock["input_ids"][0, : example.length].tolist() == example.input_ids.tolist()
    assert list(data.lengths) == [example.length, other.length]
    (shown,) = example.pictures
    for name, value in shown.tensors.items():
        torch.testing.assert_close(value, torch.as_tensor(stock[name]).reshape(value.shape), rtol=0, atol=0)
    text = data_of(assembly, clips, [{"question": "is it red?", "answer": "no"}])[0]
    with torch.no_grad():
        expected = assembly.model(**stock).logits[0, : example.length - 1][example.supervised[1:]]
        alone = [supervised_logits(assembly.model, Batch.from_examples([item])) for item in (other, text)]
        together = supervised_logits(assembly.model, Batch.from_examples([other, text, example]))
    torch.testing.assert_close(together, torch.cat([*alone, expected]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_a_run_learns_from_videos_beside_pictures_and_chat_shows_them_alike(family, folders, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", 6)
    write_frames(tmp_path / "clip", 3)
    write_video(tmp_path / "one.mp4", 1)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    write_frames(tmp_path / "sizes", 2)
    Image.new("RGB", (32, 32)).save(tmp_path / "sizes" / "frame_9.png")
    write_frames(tmp_path / "pictures", 1)
    rows = [asked(name) for name in ("a.mp4", "clip", "one.mp4", "bad.mp4", "sizes")]
    both = {"id": "both", "image": ["pictures/frame_0.png"], "video": ["a.mp4"]}
    both["conversations"] = [{"from": "human", "value": "<video> like <image>?"}, {"from": "gpt", "value": "no"}]
    rows += [both, {"id": "text", "question": "is it red?", "answer": "no"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = Recipe(
        model=ModelConfig(vlm=str(folders[family])), adapter=AdapterConfig(rank=4, alpha=8),
        data=DataConfig(train=[SourceConfig(path=str(tmp_path / "rows.jsonl"), video_frames=3)], max_bad_share=0.5,
                        cache=str(tmp_path / "cache"), pack_tokens=2048),
        optim=OptimConfig(lr=1e-2), track=TrackConfig(trackers=[]),
        train=TrainConfig(output=str(tmp_path / "run"), steps=3, global_batch=3, micro_batch=3, zero="none",
                          precision="fp32"),
    )  # fmt: skip
    assert train(recipe).finished
    left_out = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {row["id"]: row["code"] for row in left_out} == {"bad.mp4": "VIDEO_FORMAT", "sizes": "VIDEO_FORMAT"}
    assert trained_videos(tmp_path / "run") == (3, None, True)
    chat = Chat.from_folder(tmp_path / "run", max_new_tokens=2)
    assert chat.watch(tmp_path / "a.mp4") == len(chat.images[0].frames)
    seen = []
    monkeypatch.setattr(
        chat, "_tokens", lambda ids, images: seen.append(ids) or chat.__class__._tokens(chat, ids, images)
    )
    chat.ask(ASK)
    learned = data_of(chat.assembly, tmp_path, rows[:1], video_frames=3)[0]
    assert learned.input_ids[: len(seen[0])].tolist() == seen[0].tolist()


def test_a_video_that_the_processor_refuses_costs_one_record(folders, tmp_path):
    parts = load_parts(ModelConfig(vlm=str(folders["qwen3_vl"])), weights="none")
    write_video(tmp_path / "one.mp4", 1)
    data = data_of(parts, tmp_path, [asked("one.mp4"), {"question": "is it red?", "answer": "no"}], video_fps=2.0)
    assert data.usable == [1]
    assert "the model's video processor refuses it (t:1 must be larger" in str(data.quarantine.first)


def test_the_tokens_of_a_video_are_shown_as_one(folders, clips):
    parts = load_parts(ModelConfig(vlm=str(folders["qwen2_5_vl"])), weights="none")
    data = data_of(parts, clips, [asked("a.mp4")], video_frames=4)
    record, encoded = data.record(0), data.encode(data.record(0))
    count = encoded.input_ids.tolist().count(parts.processor.video_token_id)
    shown = f"<|video_pad|> x {count}"
    assert escape(shown) in page([RecordSample(record, encoded)], data.encoder, title="t")
    assert shown in view_tokens(encoded, parts.tokenizer).plain


def test_the_doctor_says_how_a_model_takes_videos(folders, tmp_path):
    for folder, expected in (
        (folders["smolvlm"], "stays a video"),
        (make_vlm(tmp_path, "qwen2_vl"), "becomes pictures"),
    ):
        found = next(item for item in diagnose_model(str(folder)) if item.name == "class and parts")
        assert f"; a video {expected}" in found.detail
