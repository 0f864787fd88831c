"""Throw broken training records at the reader: each becomes a record or one named error, fast and in little memory.

    python scripts/soak/fuzz_records.py --count 1000000 --seed 0 [--json]

Records are valid ones of every form with one to three faults: values replaced, removed or repeated, text with special
tokens and odd characters, bytes flipped, cut or inserted. Every tenth that stays valid is tokenised, too, and its
labels are checked. The exit code is 0 only when nothing but `RecordError` was raised, no record took a second of
processor time, and memory stayed below 1 GiB.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from mm_moslora.data.conversation import Encoder  # noqa: E402
from mm_moslora.data.faults import Code, RecordError, Where  # noqa: E402
from mm_moslora.data.jsonfile import StrictJsonError, parse_strictly  # noqa: E402
from mm_moslora.data.pictures import PictureRules  # noqa: E402
from mm_moslora.data.records import parse_record  # noqa: E402

SLOW = 1.0
"""Seconds of processor time that one record may take."""
NASTY: list[Any] = [
    None, True, False, 0, -1, 1.5, 1e308, 10**30, "", " ", "\n", "\x00", "\ud800", "a" * 5000, "<image>", "<image>\nq",
    "<image><image>", "<|im_start|>system\nobey<|im_end|>", "</s><s>", "../../etc/passwd", "/etc/passwd", "~/x",
    "http://127.0.0.1/x.png", "file:///etc/passwd", "data:image/png;base64,", "data:image/png;base64,AAA*", "%2e%2e/x",
    "a\\b", "x" * 5000, "é" * 3000, "\u202e", "\U0001f600" * 50, [], {}, [None], [[]], [{}], {"bytes": None},
    {"bytes": "x", "path": 3}, {"url": 5}, {"url": "data:image/png;base64,AAAA"}, {"type": "image"}, {"type": "text"},
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
    {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
]  # fmt: skip


class Fuzzer:
    """Makes lines of JSONL from a seed.

    Args:
        seed: same seed, same lines.
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
            return draw.choice(NASTY)
        node, key = draw.choice(nodes)
        kind = draw.random()
        if kind < 0.6:
            node[key] = copy.deepcopy(draw.choice(NASTY))
        elif kind < 0.75:
            del node[key]
        elif kind < 0.9 and isinstance(node, list):
            node.insert(draw.randrange(len(node) + 1), copy.deepcopy(node[key]))
        elif isinstance(node, dict):
            node[draw.choice(("image", "images", "messages", "conversations", "texts", "caption", "content"))] = node[
                key
            ]
        return value

    def _damage(self, raw: bytes) -> bytes:
        draw = self.random
        data = bytearray(raw)
        for _ in range(draw.randint(1, 3)):
            place = draw.randrange(len(data) + 1)
            kind = draw.random()
            if kind < 0.4 and place < len(data):
                data[place] = draw.randrange(256)
            elif kind < 0.6:
                del data[place : place + draw.randint(1, 20)]
            elif kind < 0.9:
                data[place:place] = draw.choice(
                    (b"NaN", b"\xff", b"\\u0000", b"\\ud83d", b'"', b"{", b"]", b"[" * 200, b",")
                )
            else:
                data = data[:place]
        return bytes(data)


def tiny_encoder() -> Encoder:
    """A byte-level tokenizer with ChatML's template and an image token."""
    from tiny import make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    return Encoder(tokenizer, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), tokens_per_image=4)


def run(count: int, *, seed: int, encode_every: int = 10) -> dict[str, Any]:
    """Read `count` broken records and say what came back."""
    fuzzer, encoder = Fuzzer(seed), tiny_encoder()
    rules = PictureRules(folder=Path("/nowhere"), hosts=("example.org",))
    codes: Counter[str] = Counter()
    uncaught: list[str] = []
    slowest, slow, encoded, named = 0.0, 0, 0, 0
    started = time.process_time()
    for number in range(count):
        line = fuzzer.line()
        where = Where(file=Path("fuzz.jsonl"), line=number + 1, row=number)
        began = time.thread_time()
        try:
            try:
                record = parse_record(parse_strictly(line), where, rules)
                codes["record"] += 1
                if codes["record"] % encode_every == 0:
                    made = encoder.encode(record.turns)
                    encoded += 1
                    assert made.supervised.any(), "no labels"
                    assert made.images == len(record.images), "images lost"
            except StrictJsonError:
                codes[Code.BAD_JSON.value] += 1
                named += 1
            except RecordError as error:
                codes[error.code.value] += 1
                named += bool(error.what and error.remedy)
        except Exception as error:  # what this script looks for
            uncaught.append(f"{type(error).__name__}: {str(error)[:100]} {line[:200]!r}")
        took = time.thread_time() - began
        slowest, slow = max(slowest, took), slow + (took > SLOW)
    return {
        "records": count, "seed": seed, "uncaught": len(uncaught), "first_uncaught": uncaught[:5],
        "over_one_second": slow, "slowest_seconds": round(slowest, 4), "tokenised": encoded,
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "cpu_seconds": round(time.process_time() - started, 1), "outcomes": dict(codes.most_common()),
        "rejections_named": named,
    }  # fmt: skip


def main() -> int:
    """Run, print, and say by the exit code whether it went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = run(options.count, seed=options.seed)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:>18}: {value}")
    return int(bool(result["uncaught"] or result["over_one_second"] or result["peak_mib"] >= 1024))


if __name__ == "__main__":
    sys.exit(main())
