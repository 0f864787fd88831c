"""Videos of documents: their frames as pictures, by number and by rate, and videos that have none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.report.evaluation_plan import plan_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.sources import Source
from mm_moslora_eval.sources.document import StoredImage
from mm_moslora_eval.sources.source_images import open_image
from video_files import number_of, write_frames, write_video

from mm_moslora.data.images.video_clip import Clip
from mm_moslora.utils.errors import EvalError
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def rows(folder: Path) -> list[dict[str, str]]:
    folder.mkdir(exist_ok=True)
    write_video(folder / "a.mp4", frames=12)
    write_video(folder / "b.mp4", frames=6)
    (folder / "empty.mp4").write_bytes(b"")
    names = ("a.mp4", "b.mp4", "a.mp4", "empty.mp4", "absent.mp4", "../a.mp4")
    return [
        {"question_id": str(number), "video": name, "text": f"What is it? {number}", "answer": "yes"}
        for number, name in enumerate(names)
    ]


def task(folder: Path, **source: object) -> Task:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
    return Task(name="videos", source=Source(kind="llava", path=str(path), **source))  # type: ignore[arg-type]


def test_frames_are_those_of_training_and_a_video_without_any_is_a_counted_failure(tmp_path: Path) -> None:
    model = FakeModel()
    asked = task(tmp_path / "data", video_frames=4)
    (result,) = evaluate(model, asked, tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert sorted(request.id for request in model.requests) == ["0", "1", "2"]
    assert (result.n, result.counts.failed, result.clusters) == (6, 3, 5)  # two questions on one video are one cluster
    images = next(request.images for request in model.requests if request.id == "0")
    expected = Clip(tmp_path / "data" / "a.mp4", "", 4).frames()
    assert [open_image(image).tobytes() for image in images] == [frame.tobytes() for frame in expected]
    samples = [json.loads(line) for line in next((tmp_path / "run").rglob("samples.jsonl")).read_text().splitlines()]
    assert all("video" in samples[number]["error"] for number in (3, 4, 5))


def test_a_rate_shows_more_frames_of_a_longer_video_and_tags_say_where(tmp_path: Path) -> None:
    documents = task(tmp_path / "data", video_fps=5.0).load().documents
    counts = [len(document.images) for document in documents[:2]]
    assert counts[0] == 2 * counts[1] > 2
    path = tmp_path / "data" / "tagged.json"
    turns = [{"from": "human", "value": "Before <video> after"}, {"from": "gpt", "value": "yes"}]
    path.write_text(json.dumps([{"id": "1", "video": "a.mp4", "conversations": turns}]))
    tagged = Task(name="tagged", source=Source(kind="llava", path=str(path), video_frames=2))
    (document,) = tagged.load().documents
    (message,) = tagged.prompt.messages(document)
    assert message.text == "Before <image><image> after"
    with pytest.raises(EvalError, match="video_frames is 0"):
        Source(kind="llava", path="x", video_frames=0)


def test_a_frame_is_identified_by_its_file_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = task(tmp_path / "data", video_frames=3).load().documents
    monkeypatch.setattr(Clip, "frames", lambda self: pytest.fail("decoded"))
    frames = [image for image in documents[0].images if isinstance(image, StoredImage)]
    assert len({frame.identity for frame in frames}) == 3
    same = [image for image in documents[2].images if isinstance(image, StoredImage)]
    assert [frame.identity for frame in frames] == [frame.identity for frame in same]


CLIPS = [  # a.mp4 has 20 frames, 10 a second
    ("a.mp4", 0.5, 1.2, [5, 9, 12]),
    ("a.mp4", "0:01", "0:01.5", [10, 13, 15]),
    ("a.mp4", 1.5, None, [15, 17, 19]),
    ("a.mp4", None, 0.4, [0, 2, 4]),
    ("a.mp4", -1, 99, [0, 10, 19]),  # as far as the video has it
    ("a.mp4", 1, 1, [10, 10, 10]),
    ("a.mp4", "", "nan", [0, 10, 19]),
    ("folder", 1, 3, [2, 4, 6]),
    ("a.mp4", 2, 3, "has no clip from 2 to 3 seconds"),
    ("a.mp4", 1.5, 0.5, "has no clip from 1.5 to 0.5 seconds"),
    ("a.mp4", -3, -1, "has no clip from -3 to -1 seconds"),
    ("a.mp4", "soon", 1, "video_start is 'soon', expected seconds"),
    ("a.mp4", 0, "inf", "video_end is 'inf', expected seconds"),
    ("a.mp4", 1e300, None, "has no clip from 1e+300 to its end"),
    ("none", 0, 1, "is a folder without pictures"),
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", 20)
    write_frames(folder / "folder", 8)
    write_frames(folder / "broken", 8)
    (folder / "broken" / "frame_3.png").write_bytes(b"no picture")
    (folder / "none").mkdir()
    rows = [
        {"question_id": str(n), "video": name, "text": "q", "answer": "yes", "video_start": start, "video_end": end}
        for n, (name, start, end, _) in enumerate([*CLIPS, ("broken", 1, 3, ""), ("broken", 1.5, 2, "")])
    ]
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def clips_task(folder: Path, **source: object) -> Task:
    shown = {"video_frames": 3, "video_folder_fps": 2.0} | source
    return Task(name="clips", source=Source(kind="llava", path=str(folder / "clips.jsonl"), **shown))  # type: ignore[arg-type]


def numbers(images: tuple[object, ...]) -> list[int]:
    return [number_of(open_image(image)) for image in images]  # type: ignore[arg-type]


def test_clips_show_the_frames_between_their_seconds_and_others_are_counted_failures(
    clips: Path, tmp_path: Path
) -> None:
    documents = clips_task(clips).load().documents
    for (_, _, _, expected), document in zip(CLIPS, documents, strict=False):
        if isinstance(expected, str):
            assert expected in (document.problem or "")
        else:
            assert (document.problem, numbers(document.images)) == (None, expected)
    wrong = sum(isinstance(expected, str) for *_, expected in CLIPS)
    (result,) = evaluate(
        FakeModel(), clips_task(clips), tmp_path, modes=("own",), baselines=(), settings=ONE
    )  # a broken frame beside the clip does not matter, one within it does
    assert (result.n, result.counts.failed) == (len(CLIPS) + 2, wrong + 1)


def test_a_folder_of_frames_needs_its_rate_for_a_clip(clips: Path) -> None:
    unknown = clips_task(clips, video_folder_fps=None).load().documents[7]
    assert "has no frame rate, which a clip needs" in (unknown.problem or "")
    with pytest.raises(EvalError, match="video_folder_fps 0"):
        Source(kind="llava", path="x", video_folder_fps=0)


@pytest.mark.parametrize(
    ("trained", "asked", "shown"),
    [
        ({"trained_frames": 4, "trained_fps": None}, {}, 4),
        ({"trained_frames": None, "trained_fps": 2.5}, {}, 3),
        ({}, {}, 8),
        ({"trained_frames": 4, "trained_fps": None}, {"video_frames": 6}, 6),
    ],
)
def test_a_model_is_shown_as_many_frames_as_in_training_unless_the_task_says_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trained: dict, asked: dict, shown: int
) -> None:
    model = FakeModel()
    vars(model).update(trained)
    evaluate(model, task(tmp_path / "data", **asked), tmp_path / "run", modes=("own",), baselines=(), settings=ONE)
    assert {len(request.images) for request in model.requests if request.id in ("0", "2")} == {shown}
    remarks = [text for text in caplog.messages if "was trained with 4 frames" in text]
    assert len(remarks) == bool(trained and asked)
    counter: Any = SimpleNamespace(
        **{"trained_frames": None, "trained_fps": None, **trained}, name="m", videos=None, thinking_tokens=0,
        of_prompt=lambda *_: 0,
    )  # fmt: skip
    planned = plan_task(task(tmp_path / "data", **asked), ONE, counter=counter)
    assert planned.pictures == sum(len(request.images) for request in model.requests)
