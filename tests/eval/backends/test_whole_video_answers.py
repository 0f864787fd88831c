"""Videos of documents as the model's own video tokens: what its own processor makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mm_moslora_eval.backends.open_model import open_model
from mm_moslora_eval.protocol.task import Decoding, Task
from mm_moslora_eval.protocol.task_prompt import TaskPrompt
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.scored_subsets import read_samples
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources import Source
from mm_moslora_eval.sources.source_videos import with_whole_videos
from PIL import Image
from transformers.video_utils import load_video
from video_files import number_of, write_frames, write_video
from vlms import make_video_vlm

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
from mm_moslora.training.training_loop import train
from tests.eval.eval_fake import FakeModel

BATCH = EvaluationSettings(batch_size=4, rank=0, world_size=1)
VIDEOS = ("a.mp4", "b.mp4", "a.mp4", "empty.mp4", "clip")
SHOWN = {"video_frames": 6}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "smolvlm"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video_vlm(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("videos")
    write_video(made / "a.mp4", 20, size=(96, 64))
    write_video(made / "b.mp4", 23, rate=5)
    write_frames(made / "clip", 6)
    (made / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(made / "red.png")
    asked = [{"video": name, "text": f"<video>\nwhat happens {n}?"} for n, name in enumerate(VIDEOS)]
    asked += [{"image": "red.png", "text": "is it red?"}, {"text": "yes or no?"}]
    rows = [{"question_id": str(number), "answer": "yes", **row} for number, row in enumerate(asked)]
    (made / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def task(data: Path) -> Task:
    source = Source(kind="llava", path=str(data / "questions.jsonl"), **SHOWN)
    return Task(
        name="videos", source=source, prompt=TaskPrompt(template="{question}"), decoding=Decoding(max_new_tokens=6)
    )


def stock_answer(model, path: Path, question: str) -> str:
    """What transformers itself makes of the file."""
    frames, metadata = load_video(str(path), backend="pyav")
    parts = [{"type": "video"}, {"type": "text", "text": question}]
    text = model.processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
    )
    inputs = model.processor(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=True, return_tensors="pt",
        num_frames=6, fps=None, add_special_tokens=False,
    )  # fmt: skip
    with torch.inference_mode():
        output = model.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    return str(model.processor.tokenizer.decode(new, skip_special_tokens=True))


def test_answers_are_those_of_the_models_own_processor(folder: Path, data: Path, tmp_path: Path) -> None:
    model = open_model(f"hf:{folder}", precision="fp32")
    (result,) = evaluate(model, task(data), tmp_path / "run", modes=("own",), baselines=(), settings=BATCH)
    samples = read_samples(tmp_path / "run" / result.folder)
    for number in (0, 1, 2):
        assert samples[number]["text"] == stock_answer(model, data / VIDEOS[number], f"what happens {number}?")
    assert (result.about["video"], result.counts.failed, result.clusters) == ("native", 1, 6)
    assert "video" in samples[3]["error"]
    assert len(samples[0]["images"]) == 1
    assert samples[0]["images"] == samples[2]["images"]

    alone = EvaluationSettings(batch_size=1, rank=0, world_size=1)
    (same,) = evaluate(model, task(data), tmp_path / "one", modes=("own",), baselines=(), settings=alone)
    assert [row["text"] for row in read_samples(tmp_path / "one" / same.folder)] == [row["text"] for row in samples]


def test_a_clip_is_what_a_file_with_its_frames_alone_would_be(folder: Path, data: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", 20, size=(96, 64))
    write_frames(tmp_path / "clip", 6)
    rows = [
        {"video": "a.mp4", "video_start": 0.5, "video_end": 1.5},
        {"video": "clip", "video_start": 0.25, "video_end": 1.5},
    ]
    asked = [
        {"question_id": str(n), "text": "<video>\nwhat happens?", "answer": "yes", **row} for n, row in enumerate(rows)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    source = Source(kind="llava", path=str(tmp_path / "questions.jsonl"), video_folder_fps=4.0, **SHOWN)
    (model, seen) = open_model(f"hf:{folder}", precision="fp32"), []
    for document in Task(name="clips", source=source).load().documents:
        (image,) = with_whole_videos(document, model.videos).images
        video = image.video()  # type: ignore[union-attr]
        assert image.shape == (len(video.frames), *video.frames[0].size)  # type: ignore[union-attr]
        seen.append(([number_of(frame) for frame in video.frames], video.metadata))
    for (frames, about), start, total, rate in zip(seen, (5, 1), (11, 5), (10, 4), strict=True):
        assert (about.total_num_frames, about.fps) == (total, rate)
        assert about.frames_indices == [number - start for number in frames]
        assert start <= min(frames) <= max(frames) < start + total


def test_frames_and_videos_are_other_answers_to_the_same_questions(folder: Path, data: Path, tmp_path: Path) -> None:
    model = open_model(f"hf:{folder}", precision="fp32")
    native = evaluate(model, task(data), tmp_path / "run", modes=("own",), baselines=(), settings=BATCH)[0]
    model._whole_videos = False  # as of a run that was trained on frames
    frames = evaluate(model, task(data), tmp_path / "run", modes=("own",), baselines=(), settings=BATCH)[0]
    assert (frames.about["video"], frames.about["video_frames"]) == ("frames", [6, 6])
    assert frames.subject == native.subject
    keys = [
        {json.loads(line)["key"] for line in path.read_text().splitlines()}
        for path in sorted((tmp_path / "run").rglob("answers*.jsonl"))
    ]
    assert len(set().union(*keys)) == 7 + 4  # the four videos that can be read are asked again


def test_a_trained_run_gets_videos_as_its_training_did(folder: Path, data: Path, tmp_path: Path) -> None:
    rows = [{"id": "a", "video": "a.mp4", "question": "<video>\nwhat happens?", "answer": "no"}]
    (data / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    recipe = Recipe(
        model=ModelConfig(vlm=str(folder)), adapter=AdapterConfig(rank=4, alpha=8),
        data=DataConfig(train=[SourceConfig(path=str(data / "rows.jsonl"), **SHOWN)]),
        optim=OptimConfig(lr=1e-2), track=TrackConfig(trackers=[]),
        train=TrainConfig(output=str(tmp_path / "run"), steps=1, global_batch=1, micro_batch=1, zero="none",
                          precision="fp32"),
    )  # fmt: skip
    assert train(recipe).finished
    model = open_model(str(tmp_path / "run"), precision="fp32")
    (result,) = evaluate(model, task(data), tmp_path / "eval", modes=("own",), baselines=(), settings=BATCH)
    samples = read_samples(tmp_path / "eval" / result.folder)
    assert result.about["video"] == "native"
    assert samples[1]["text"] == stock_answer(model, data / VIDEOS[1], "what happens 1?")


def test_controls_show_other_and_grey_videos(folder: Path, data: Path, tmp_path: Path) -> None:
    model = open_model(f"hf:{folder}", precision="fp32")
    results = evaluate(model, task(data), tmp_path / "run", modes=("blind", "wrong"), baselines=(), settings=BATCH)
    assert [result.counts.failed for result in results] == [1, 1]


def test_models_without_videos_get_frames(data: Path, tmp_path: Path) -> None:
    fake = FakeModel()
    (result,) = evaluate(fake, task(data), tmp_path / "run", modes=("own",), baselines=(), settings=BATCH)
    assert result.about["video"] == "frames"
    assert max(len(request.images) for request in fake.requests) == 6
