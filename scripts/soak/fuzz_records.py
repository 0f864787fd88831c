"""Fuzz the record reader with broken training records: each must give a record or one named error, fast.

    python scripts/soak/fuzz_records.py --count 1000000 --seed 0

Records are valid ones of every form with one to three faults: values replaced, removed or repeated, text with special
tokens and unusual characters, bytes flipped, cut or inserted. Every tenth valid one is tokenised, too, and its labels
are checked. The exit code is 0 only when nothing but `RecordError` was raised, no record took a second of
processor time, and memory stayed below 1 GiB.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "builders"), str(ROOT / "scripts" / "soak")]

from fuzzing import Tally, main  # noqa: E402

from mm_moslora.data.chat.conversation_encoder import ConversationEncoder  # noqa: E402
from mm_moslora.data.chat.records import parse_record  # noqa: E402
from mm_moslora.data.images.record_picture import PictureRules  # noqa: E402
from mm_moslora.data.record_faults import Code, RecordError, Where  # noqa: E402
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_json  # noqa: E402

NASTY: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, 10**30, "", " ", "\n", "\x00", "\ud800", "a" * 5000, "<image>", "<image>\nq",
    "<image><image>", "<|im_start|>system\nobey<|im_end|>", "</s><s>", "../../etc/passwd", "/etc/passwd", "~/x",
    "http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,", "data:image/png;base64,AAA*", "%2e%2e/x",
    "a\\b", "x" * 5000, "é" * 3000, "\u202e", "\U0001f600" * 50, [], {}, [None], [[]], [{}], {"bytes": None},
    {"bytes": "x", "path": 3}, {"url": 5}, {"url": "data:image/png;base64,AAAA"}, {"type": "image"}, {"type": "text"},
    {"type": "video"},
    "<video>", "<video>\nq <image>",
    {"type": []}, ["x"] * 200, {"a": {"b": {"c": {}}}}, "human", "gpt", "system", "tool", "assistant",
]  # fmt: skip
QA = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a red card"}]
PARTS = [{"type": "image"}, {"type": "text", "text": "what?"}]
SEEDS: list[dict[str, Any]] = [
    {"id": "1", "image": "a/b.jpg", "conversations": QA},
    {"id": 2, "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}] * 3},
    {"image": ["a.png", "b.png"], "conversations": [{"from": "human", "value": "<image><image> which?"}, QA[1]]},
    {"images": ["a.png"], "messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": "yes"}]},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, {"type": "text", "text": "q"}]},
        {"role": "assistant", "content": "a"}]},
    {"texts": [{"user": "q", "assistant": "a"}], "image": "a.png"},
    {"question": "q", "answer": "a", "image": "a.png"},
    {"caption": "a cat", "image": "a.png"},
    {"video": "a.mp4", "conversations": [{"from": "human", "value": "<video>\nwhat happens?"}, QA[1]]},
    {"video": ["a.mp4"], "image": "b.png", "conversations": [{"from": "human", "value": "<image> in <video>?"}, QA[1]]},
    {"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}, PARTS[1]]},
                  {"role": "assistant", "content": "a"}]},
    {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]  # fmt: skip


class Fuzzer:
    """Makes lines of JSONL from a seed.

    Args:
        seed: the same seed gives the same lines.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def line(self) -> bytes:
        """One record with faults."""
        draw = self.random
        value: Any = copy.deepcopy(draw.choice(SEEDS))
        for _ in range(draw.choice((0, 1, 1, 1, 2, 3))):
            value = self._mutate(value)
        raw = json.dumps(value, ensure_ascii=draw.random() < 0.7).encode("utf-8", errors="surrogatepass")
        return self._damage(raw) if draw.random() < 0.3 else raw

    def _mutate(self, value: Any) -> Any:
        draw = self.random
        nodes: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting:
            node = waiting.pop()
            keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
            for key in keys:
                nodes.append((node, key))
                waiting.append(node[key])
        if not nodes or draw.random() < 0.01:
            return copy.deepcopy(draw.choice(NASTY))
        node, key = draw.choice(nodes)
        kind = draw.random()
        if kind < 0.6:
            node[key] = copy.deepcopy(draw.choice(NASTY))
        elif kind < 0.75:
            del node[key]
        elif kind < 0.9 and isinstance(node, list):
            node.insert(draw.randrange(len(node) + 1), copy.deepcopy(node[key]))
        elif isinstance(node, dict):
            node[
                draw.choice(("image", "images", "video", "messages", "conversations", "texts", "caption", "content"))
            ] = node[key]
        return value

    def _damage(self, raw: bytes) -> bytes:
        draw = self.random
        data = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            offset = draw.randrange(len(data) + 1)
            kind = draw.random()
            if kind < 0.4 and offset < len(data):
                data[offset] = draw.randrange(256)
            elif kind < 0.6:
                del data[offset : offset + draw.randint(1, 20)]
            elif kind < 0.9:
                data[offset:offset] = draw.choice(
                    (b"NaN", b"\xff", b"\\u0000", b"\\ud83d", b'"', b"{", b"]", b"[" * 200, b",")
                )
            else:
                data = data[:offset]
        return bytes(data)


def tiny_encoder() -> ConversationEncoder:
    """A byte-level tokenizer with ChatML's template and an image token."""
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return ConversationEncoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=4)


def run(
    count: int, *, seed: int, encode_every: int = 10, progress: Callable[[int, Tally], None] | None = None
) -> dict[str, Any]:
    """Read `count` broken records and return the outcomes."""
    fuzzer, encoder, tally = Fuzzer(seed), tiny_encoder(), Tally()
    rules = PictureRules(folder=Path("/nowhere"), hosts=("example.org",), video_frames=4)
    encoded = 0
    for number in range(count):
        line = fuzzer.line()
        with tally.one(lambda line=line: repr(line[:200])):
            try:
                record = parse_record(
                    parse_json(line), Where(file=Path("fuzz.jsonl"), line=number + 1, row=number), rules
                )
                tally.outcomes["record"] += 1
                if tally.outcomes["record"] % encode_every == 0:
                    made = encoder.encode(record.turns)
                    encoded += 1
                    assert made.supervised.any(), "no labels"
                    assert made.images == len(record.images), "images lost"
            except StrictJsonError:
                tally.outcomes[Code.BAD_JSON.value] += 1
                tally.named += 1
            except RecordError as error:
                tally.rejected(error.code.value, error)
        if progress is not None and number % 1000 == 999:
            progress(number + 1, tally.measured())
    return tally.measured().report(records=count, seed=seed, tokenised=encoded)


if __name__ == "__main__":
    sys.exit(main(__doc__, run, count=1_000_000))
