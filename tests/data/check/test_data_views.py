"""`data check` counts what a run would meet; `data view` shows what is supervised."""

from __future__ import annotations

from pathlib import Path

from tiny import make_records

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.data.chat.record_turns import Turn
from mm_moslora.data.check.data_views import IMAGE, SPECIAL, SUPERVISED, view_tokens
from mm_moslora.data.check.record_check import CheckReport, check
from tests.data.sets import chatml_encoder, damage, tiny_tower, turns


def run_check(path: Path, **options: object) -> CheckReport:
    sources = [SourceConfig(path=str(path), image_folder=str(path.parent / "images"))]
    return check(sources, chatml_encoder(), config=DataConfig(), image_processing=tiny_tower(), **options)


class TestCheck:
    def test_without_decoding_only_headers_are_read(self, tmp_path: Path) -> None:
        path = make_records(tmp_path, 4)
        damage(tmp_path / "images" / "0.png")
        seen: list[tuple[int, int]] = []
        report = run_check(path, on_progress=lambda done, total: seen.append((done, total)))
        assert dict(report.bad) == {"IMAGE_DAMAGED": 1}
        assert not report.ok
        assert seen[-1] == (4, 4)
        assert run_check(path, decode=False).ok

    def test_the_histogram_counts_every_length_once(self, tmp_path: Path) -> None:
        report = run_check(make_records(tmp_path))
        histogram = report.histogram()
        assert sum(count for _, count in histogram) == report.usable == 24
        assert histogram[-1][0] == report.max_length
        small = sum(length <= 32 for length in report.lengths)
        assert dict(histogram)[32] + dict(histogram)[16] == small


class TestView:
    def test_supervised_text_is_marked_and_images_are_counted(self) -> None:
        encoder = chatml_encoder()
        encoded = encoder.encode(turns("<image>\nwhat?", "a [red] cat", "more?", "no"))
        text = view_tokens(encoded, encoder.tokenizer, image_token_id=encoder.image_token_id)
        styled = lambda part: "".join(text.plain[s.start : s.end] for s in text.spans if part in str(s.style))  # noqa: E731
        assert styled(SUPERVISED) == "a [red] cat<|im_end|>no<|im_end|>"
        assert styled(IMAGE) == "[image: 4 tokens]"
        assert styled(SPECIAL) == "<|im_start|><|im_end|>" * 4
        assert text.plain.startswith("<|im_start|>user\n[image: 4 tokens]\nwhat?<|im_end|>")

    def test_characters_of_several_tokens_stay_whole(self) -> None:
        encoded = chatml_encoder().encode(turns("你好", "🙂é"))
        assert "🙂é<|im_end|>" in view_tokens(encoded, chatml_encoder().tokenizer).plain

    def test_typed_special_tokens_do_not_look_like_special_ones(self) -> None:
        encoder = chatml_encoder()
        encoded = encoder.encode([Turn(role="user", text="a <|im_end|> <image> b", offsets=()), *turns("", "c")[1:]])
        text = view_tokens(encoded, encoder.tokenizer, image_token_id=encoder.image_token_id)
        special = "".join(text.plain[s.start : s.end] for s in text.spans if SPECIAL in str(s.style))
        assert special == "<|im_start|><|im_end|>" * 2
        assert "[image" not in text.plain
