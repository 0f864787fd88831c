"""Videos: which frames are shown, in which order, from every kind of file; what is broken or forbidden is named."""

from __future__ import annotations

import functools
import io
import itertools
import json
import os
import random
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from video_files import number_of, write_animation, write_frames, write_video

from mm_moslora.config import SourceConfig
from mm_moslora.data.chat.record_turns import Record
from mm_moslora.data.chat.records import parse_record
from mm_moslora.data.check.data_views import RecordSample, page
from mm_moslora.data.check.record_check import check
from mm_moslora.data.images import pyav_decode, video_clip
from mm_moslora.data.images.record_picture import ImageError, PictureRules
from mm_moslora.data.images.video_clip import Clip
from mm_moslora.data.record_faults import Code, RecordError, Where
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.utils.errors import ConfigError, DataError
from tests.data.sets import chatml_encoder, make_set, parsed, tiny_tower

QA = [{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "it gets brighter"}]
KINDS = {
    "h264 with frames out of order": lambda p: write_video(p / "a.mp4", options={"bf": "3", "g": "7"}),
    "h264 with one key frame": lambda p: write_video(p / "a.mkv", options={"g": "1000"}),
    "mpeg4": lambda p: write_video(p / "a.avi", codec="mpeg4"),
    "vp9": lambda p: write_video(p / "a.webm", codec="libvpx-vp9"),
    "mpeg2": lambda p: write_video(p / "a.ts", codec="mpeg2video", rate=25),
    "gif": lambda p: write_animation(p / "a.gif"),
    "webp": lambda p: write_animation(p / "a.webp"),
    "png": lambda p: write_animation(p / "a.png"),
    "folder": lambda p: write_frames(p / "a"),
    "wrong suffix": lambda p: write_video(p / "b.mp4").rename(p / "a.txt"),
}


def parse(value: object, folder: Path, *, frames: int = 4, follow_links: bool = False) -> Record:
    return parsed(value, folder.resolve(), video_frames=frames, follow_links=follow_links)


def shown(path: Path, count: int) -> list[int]:
    return [number_of(image) for image in Clip(path, str(path), count).frames()]


class FirstFrame:
    def sample(self, metadata: Any, *, frames: int | None, fps: float | None) -> list[int]:
        return [0]


class TestFrames:
    @pytest.mark.parametrize("kind", KINDS)
    def test_frames_at_even_distances_from_the_first_to_the_last(self, kind: str, tmp_path: Path) -> None:
        path = KINDS[kind](tmp_path)
        assert shown(path, 5) == [0, 5, 10, 14, 19]
        assert shown(path, 1) == [0]
        assert shown(path, 20) == list(range(20))
        assert Clip(path, "", 3).size() == (64, 48)

    def test_a_short_video_shows_frames_several_times(self, tmp_path: Path) -> None:
        assert shown(write_video(tmp_path / "a.mp4", frames=3), 6) == [0, 0, 1, 1, 2, 2]
        assert shown(write_video(tmp_path / "b.mp4", frames=1), 3) == [0, 0, 0]

    def test_the_rule_of_places_holds_for_any_numbers(self) -> None:
        for frames in range(1, 40):
            for count in range(1, 20):
                found = pyav_decode.frame_indices(frames, count)
                assert found == sorted(found)
                assert (len(found), found[0]) == (count, 0)
                assert count == 1 or found[-1] == frames - 1
                gaps = {b - a for a, b in itertools.pairwise(found)}
                assert not gaps or max(gaps) - min(gaps) <= 1

    def test_frames_are_the_same_every_time(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.mp4", options={"bf": "3", "g": "7"})
        first, second = (Clip(path, "", 6).frames() for _ in range(2))
        assert [image.tobytes() for image in first] == [image.tobytes() for image in second]

    def test_a_video_filmed_upright_is_shown_upright(self, tmp_path: Path) -> None:
        (image,) = Clip(write_video(tmp_path / "a.mp4", rotation=90), "", 1).frames()
        assert image.size == (48, 64) == Clip(tmp_path / "a.mp4", "", 2).size()
        dark = image.convert("L").resize((1, 3)).tobytes()
        assert dark[2] < dark[0]  # what was left is at the bottom after a quarter turn against the clock

    def test_what_comes_last_in_a_cut_file_is_left_out_or_named(self, tmp_path: Path) -> None:
        path = write_video(tmp_path / "a.ts", frames=20, codec="mpeg2video", rate=25)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        found = shown(path, 4)
        assert found[0] == 0
        assert found == sorted(found)
        assert 5 < found[-1] < 15


class TestBroken:
    def fault(self, path: Path, count: int = 4) -> ImageError:
        with pytest.raises(ImageError) as caught:
            Clip(path, str(path), count).frames()
        assert caught.value.what
        assert caught.value.remedy
        return caught.value

    def test_what_is_no_video_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "a.mp4"
        for data, code in ((b"", Code.IMAGE_EMPTY), (b"<html>", Code.VIDEO_FORMAT), (b"\0" * 5000, Code.VIDEO_FORMAT)):
            path.write_bytes(data)
            assert self.fault(path).code == code
        assert self.fault(tmp_path / "missing.mp4").code == Code.IMAGE_MISSING
        (tmp_path / "empty").mkdir()
        assert self.fault(tmp_path / "empty").code == Code.VIDEO_FORMAT
        os.mkfifo(tmp_path / "pipe.mp4")
        assert self.fault(tmp_path / "pipe.mp4").code == Code.IMAGE_NOT_A_FILE

    def test_a_file_without_pictures_in_it_is_named(self, tmp_path: Path) -> None:
        import av
        import numpy as np

        with av.open(tmp_path / "a.mp4", "w") as container:
            track = container.add_stream("aac", rate=8000)
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 4096), dtype=np.float32), format="fltp", layout="mono")
            sound.sample_rate = 8000
            container.mux([*track.encode(sound), *track.encode()])
        assert "no video stream" in self.fault(tmp_path / "a.mp4").what

    def test_cut_and_flipped_files_are_frames_or_one_named_error(self, tmp_path: Path) -> None:
        draw = random.Random(0)
        originals = [write_video(tmp_path / "o.mp4", frames=8).read_bytes(),
                     write_video(tmp_path / "o.mkv").read_bytes(),
                     write_video(tmp_path / "o.avi", codec="mpeg4").read_bytes()]  # fmt: skip
        named = 0
        for number in range(150):
            data = bytearray(originals[number % 3])
            for _ in range(draw.randint(1, 8)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            began = time.thread_time()
            cut = bytes(data[: draw.choice((len(data), len(data) // 2))])
            try:
                frames = Clip(lambda cut=cut: cut, "x", 3).frames()
                assert len(frames) == 3
            except ImageError as error:
                named += bool(error.what and error.remedy)
            assert time.thread_time() - began < 1
        assert named > 20

    @pytest.mark.parametrize("suffix", ["mp4", "mkv"])
    @pytest.mark.parametrize("left", [0.5, 0.9])
    def test_a_file_that_declares_more_than_it_holds_is_refused_whatever_frames_are_chosen(
        self, suffix: str, left: float, tmp_path: Path
    ) -> None:
        front = {"movflags": "faststart"} if suffix == "mp4" else {}
        path = tmp_path / f"a.{suffix}"
        write_video(path, 24, codec="mpeg4", size=(640, 480), options={"g": "1"}, container=front, sound=5)
        assert [number_of(frame) for frame in Clip(path, "a", 2).frames()] == [0, 23]  # longer sound is no fault
        data = path.read_bytes()
        path.write_bytes(data[: int(left * len(data))])
        clips = Clip(path, "a", 1), Clip(path, "a", 2, middles=True), Clip(path, "a", 1, sampling=FirstFrame())
        for clip in clips:
            for look in (clip.frames, clip.metadata):
                with pytest.raises(ImageError, match=r"is cut short: it declares .* seconds and holds") as caught:
                    look()
                assert caught.value.code == Code.VIDEO_DAMAGED

    def test_too_long_and_too_large_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, moving = write_video(tmp_path / "a.mp4"), write_animation(tmp_path / "a.gif")
        monkeypatch.setattr(pyav_decode, "MAX_SECONDS", 1)
        assert self.fault(path).code == Code.VIDEO_TOO_LONG
        monkeypatch.setattr(pyav_decode, "MAX_SECONDS", 100)
        monkeypatch.setattr(pyav_decode, "MAX_PIXELS", 3 * 64 * 48)
        assert shown(path, 3) == [0, 10, 19]
        assert self.fault(path).code == self.fault(moving).code == Code.VIDEO_TOO_LARGE
        assert "video_frames" in self.fault(path).remedy
        monkeypatch.setattr(video_clip, "MAX_BYTES", 100)
        assert self.fault(path, 1).code == Code.VIDEO_TOO_LARGE

    def test_pixels_that_a_few_bytes_make_are_limited_in_every_container(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        frame = b"!\xf9\x04\x04\x01\x00\x00\x00" + b",\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\x00"
        side = (5600).to_bytes(2, "little")
        bomb = tmp_path / "bomb.gif"
        bomb.write_bytes(b"GIF89a" + side + side + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + 200 * frame + b";")
        began = time.thread_time()
        assert self.fault(bomb).code == Code.VIDEO_TOO_LARGE
        assert time.thread_time() - began < 3
        one_key = write_video(tmp_path / "a.mp4", options={"g": "1000"})
        frames = write_frames(tmp_path / "frames")
        monkeypatch.setattr(
            pyav_decode, "check_decoded", functools.partial(pyav_decode.check_decoded, most=10 * 64 * 48)
        )
        assert self.fault(one_key).code == Code.VIDEO_TOO_LARGE
        monkeypatch.setattr(pyav_decode, "MAX_PIXELS", 3 * 64 * 48)
        assert self.fault(frames).code == Code.VIDEO_TOO_LARGE
        assert len(Clip(frames, "f", 3).frames()) == 3

    @pytest.mark.parametrize(("side", "frames", "shown"), [(8000, 5, 6), (13000, 1, 2), (3000, 300, 2)])
    def test_a_gif_that_grows_at_a_later_frame_is_refused_before_it_is_composed(
        self, tmp_path: Path, side: int, frames: int, shown: int
    ) -> None:
        heads, bodies = [], []
        for edge in (10, side):
            whole = io.BytesIO()
            Image.new("P", (edge, edge), 1).save(whole, "GIF")
            content = whole.getvalue()
            start = 13 + (3 * 2 ** ((content[10] & 7) + 1) if content[10] & 128 else 0)
            heads.append(content[:start])
            bodies.append(content[start:-1])
        bomb = tmp_path / "bomb.gif"
        bomb.write_bytes(heads[0] + bodies[0] + bodies[1] * frames + b";")
        began = time.thread_time()
        assert self.fault(bomb, shown).code in (Code.VIDEO_TOO_LARGE, Code.IMAGE_TOO_LARGE)
        assert time.thread_time() - began < 3

    def test_a_playlist_is_no_video_and_nothing_behind_it_is_opened(self, tmp_path: Path) -> None:
        inner = write_video(tmp_path / "inner.mp4")
        lists = {
            "a.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{inner}\n#EXT-X-ENDLIST\n",
            "b.mp4": f"ffconcat version 1.0\nfile {inner}\n",
            "c.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        }
        for name, text in lists.items():
            (tmp_path / name).write_text(text)
            assert self.fault(tmp_path / name).code == Code.VIDEO_FORMAT

    def test_without_pyav_the_run_stops_and_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, moving = write_video(tmp_path / "a.mp4"), write_animation(tmp_path / "a.gif")
        monkeypatch.setitem(sys.modules, "av", None)
        assert shown(moving, 2) == [0, 19]
        with pytest.raises(DataError, match=r"pip install '?av>=") as caught:
            Clip(path, "x", 2).frames()
        assert not isinstance(caught.value, ImageError)  # not a fault of one record


class TestRecords:
    def test_a_video_is_so_many_pictures_in_its_place(self, tmp_path: Path) -> None:
        write_video(tmp_path / "a.mp4")
        record = parse({"id": "v", "video": "a.mp4", "conversations": QA}, tmp_path)
        assert record.turns[0].parts() == ["", "", "", "", "\nwhat happens?"]
        assert [number_of(picture.rgb()) for picture in record.images] == [0, 6, 13, 19]
        assert record.image_names[1] == f"{tmp_path / 'a.mp4'}#frame=2of4"

    def test_a_rate_shows_more_frames_of_a_longer_video(self, tmp_path: Path) -> None:
        rules = PictureRules(folder=tmp_path.resolve(), video_fps=2.0)
        where = Where(file=tmp_path, line=None, row=0)
        for frames, expected in ((20, [0, 6, 13, 19]), (10, [0, 9]), (2, [0])):
            write_video(tmp_path / "a.mp4", frames=frames)
            record = parse_record({"video": "a.mp4", "conversations": QA}, where, rules)
            assert [number_of(picture.rgb()) for picture in record.images] == expected
        write_animation(tmp_path / "a.gif")
        assert len(parse_record({"video": "a.gif", "conversations": QA}, where, rules).images) == 4
        write_frames(tmp_path / "clip", 3)
        for name, what in (("clip", "no frame rate; set video_frames"), ("gone.mp4", "gone.mp4")):
            with pytest.raises(RecordError, match=what):
                parse_record({"video": name, "conversations": QA}, where, rules)

    def test_every_form_names_videos(self, tmp_path: Path) -> None:
        answer = {"role": "assistant", "content": "a"}
        ask = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what is <video>?"}]
        forms = {
            "LLaVA-Video": {"video": "a.mp4", "conversations": [{"from": "human", "value": "<image>\nq"}, QA[1]]},
            "ShareGPT": {"videos": ["a.mp4"], "conversations": [{"from": "human", "value": "q <video>"}, QA[1]]},
            "parts": {"messages": [{"role": "user", "content": ask}, answer]},
            "url part": {"messages": [{"role": "user", "content": [
                {"type": "video_url", "video_url": {"url": "a.mp4"}}]}, answer]},
            "named beside": {"videos": ["a.mp4"], "messages": [
                {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "q"}]}, answer]},
            "question": {"video": "a.mp4", "question": "q <video>", "answer": "a"},
            "caption": {"video": "a.mp4", "caption": "a"},
        }  # fmt: skip
        for name, form in forms.items():
            record = parse(form, tmp_path, frames=3)
            assert len(record.images) == 3, name
            assert record.turns[0].parts()[:3] == ["", "", ""], name
        assert parse(forms["parts"], tmp_path).turns[0].parts()[-1] == "\nwhat is <video>?"  # a typed one is text
        assert parse(forms["question"], tmp_path).turns[0].parts()[-1] == "\nq <video>"

    def test_pictures_and_videos_keep_their_places(self, tmp_path: Path) -> None:
        value = {
            "image": ["a.png", "b.png"], "video": ["x.mp4", "y.mp4"],
            "conversations": [{"from": "human", "value": "<video> like <image>?"}, QA[1],
                              {"from": "human", "value": "<image> or <video>"}, QA[1]],
        }  # fmt: skip
        record = parse(value, tmp_path, frames=2)
        names = [Path(name).name for name in record.image_names]
        assert names == ["x.mp4#frame=1of2", "x.mp4#frame=2of2", "a.png", "b.png", "y.mp4#frame=1of2",
                         "y.mp4#frame=2of2"]  # fmt: skip
        assert record.turns[0].parts() == ["", "", " like ", "?"]
        assert record.turns[2].parts() == ["", " or ", "", ""]

    def test_without_a_named_video_the_word_is_text(self, tmp_path: Path) -> None:
        record = parse({"conversations": [{"from": "human", "value": "the <video> tag?"}, QA[1]]}, tmp_path)
        assert not record.images
        assert record.turns[0].text == "the <video> tag?"

    def test_null_names_no_video(self, tmp_path: Path) -> None:
        assert not parse({"id": "x", "conversations": QA, "video": None}, tmp_path).images

    @pytest.mark.parametrize(
        ("change", "code", "text"),
        [
            ({"video": "../a.mp4"}, Code.PATH_ESCAPES, "leaves /"),
            ({"video": "/etc/a.mp4"}, Code.PATH_ESCAPES, "leaves /"),
            ({"video": "out/a.mp4"}, Code.PATH_ESCAPES, "links out"),
            ({"video": "http://host/a.mp4"}, Code.BAD_IMAGE_NAME, "nothing is downloaded"),
            ({"video": 5}, Code.BAD_IMAGE_NAME, "field video[0]: is a number"),
            ({"video": "a.mp4", "videos": ["a.mp4"]}, Code.IMAGE_COUNT, "both"),
            ({"video": ["a.mp4", "b.mp4"]}, Code.IMAGE_COUNT, "1 <video> in the questions, 2 videos"),
            ({"video": "a.mp4", "image": "a.png"}, Code.IMAGE_COUNT, "0 <image> in the questions, 1 images"),
        ],
    )
    def test_bad_names_and_counts_are_refused(self, change: dict, code: Code, text: str, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        folder.mkdir()
        (folder / "out").symlink_to(tmp_path)
        with pytest.raises(RecordError) as caught:
            parse({"id": "x", "conversations": QA, **change}, folder)
        assert caught.value.code == code
        assert text in str(caught.value)

    def test_a_folder_of_frames_may_not_link_out_of_the_image_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "images"
        write_frames(folder / "clip", 3)
        secret = write_frames(tmp_path / "elsewhere", 1) / "frame_0.png"
        (folder / "clip" / "frame_9.png").symlink_to(secret)
        value = {"video": "clip", "conversations": QA}
        with pytest.raises(ImageError, match="PATH_ESCAPES"):
            parse(value, folder).images[0].rgb()
        record = parse(value, folder, follow_links=True)
        assert [number_of(picture.rgb()) for picture in record.images] == [0, 1, 2, 0]

    def test_a_tar_file_and_a_table_hold_videos(self, tmp_path: Path) -> None:
        import datasets

        path = write_video(tmp_path / "a.mp4")
        with tarfile.open(tmp_path / "s.tar", "w") as tar:
            tar.add(path, "k.mp4")
            (tmp_path / "k.txt").write_text("it gets brighter")
            tar.add(tmp_path / "k.txt", "k.txt")
        rows = [{"video": {"bytes": path.read_bytes(), "path": None}, "question": "q", "answer": "a"}]
        features = datasets.Features(
            {"video": datasets.Video(decode=False), "question": datasets.Value("string"),
             "answer": datasets.Value("string")}
        )  # fmt: skip
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "d.parquet")
        for name in ("s.tar", "d.parquet"):
            source = open_source(SourceConfig(path=str(tmp_path / name), video_frames=3))
            assert [number_of(picture.rgb()) for picture in source[0].images] == [0, 10, 19], name

    def test_no_frames_at_all_is_refused_by_the_recipe(self) -> None:
        for key in ("video_frames", "video_fps"):
            with pytest.raises(ConfigError, match=key):
                SourceConfig(path="a.jsonl", **{key: 0})


class TestInTraining:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        folder = tmp_path / "images"
        folder.mkdir()
        write_video(folder / "good.mp4", frames=9)
        (folder / "bad.mp4").write_bytes(b"no video")
        rows = [{"id": name, "video": f"{name}.mp4", "conversations": QA} for name in ("good", "bad")]
        rows.append({"id": "text", "conversations": [{"from": "human", "value": "q"}, QA[1]]})
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / "d.jsonl"

    def test_frames_are_pictures_of_the_example_and_a_broken_file_costs_one_record(self, path: Path) -> None:
        data = make_set(path, max_bad_share=0.5, quarantine_path=path.parent / "q.jsonl")
        assert data.usable == [0, 2]
        assert dict(data.quarantine.codes) == {Code.VIDEO_FORMAT: 1}
        row = json.loads((path.parent / "q.jsonl").read_text())
        assert (row["field"], Path(row["path"]).name) == ("video", "bad.mp4")
        example = data[0]
        frames = [picture.tensors["pixel_values"] for picture in example.pictures]
        assert [frame.shape for frame in frames] == [(1, 3, 4, 4)] * 8
        assert data.lengths[0] == example.length
        brightness = [frame.mean().item() for frame in frames]
        assert brightness == sorted(brightness)

    def test_a_token_cache_follows_the_number_of_frames(self, path: Path) -> None:
        import dataclasses

        from mm_moslora.config import DataConfig
        from mm_moslora.data.training_set import TrainingSet

        source = SourceConfig(path=str(path), image_folder=str(path.parent / "images"))
        config = DataConfig(cache=str(path.parent / "cache"), max_bad_share=0.5)
        for frames in (8, 2, 8):
            sources = [dataclasses.replace(source, video_frames=frames)]
            data = TrainingSet(sources, chatml_encoder(), tiny_tower(), config=config)
            assert len(data[0].pictures) == frames
            assert data[0].length == data.lengths[0]

    def test_check_counts_videos_and_the_page_shows_their_frames(self, path: Path) -> None:
        sources = [SourceConfig(path=str(path), image_folder=str(path.parent / "images"), video_frames=3)]
        from mm_moslora.config import DataConfig

        report = check(sources, chatml_encoder(), config=DataConfig(), image_processing=tiny_tower())
        assert (report.usable, report.videos, report.several_images) == (2, 1, 1)
        assert dict(report.bad) == {Code.VIDEO_FORMAT: 1}
        assert report.sizes == {(64, 48): 3}
        record = open_source(sources[0])[0]
        html = page([RecordSample(record, chatml_encoder().encode(record.turns))], chatml_encoder(), title="t")
        assert html.count("<figure>") == html.count("image: 4 tokens") == 3
        assert "good.mp4#frame=3of3, 64 x 48" in html
