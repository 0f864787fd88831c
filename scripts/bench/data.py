"""Speed of the input pipeline: opening a large file, samples per second, and the fill of packed rows.

The peer is LLaVA's lazy dataset, reimplemented here: the whole file through `json.load`, and per sample PIL, padding to
a square with the mean colour, CLIP's image processor, the prompt of the `v1` template, and labels by tokenising every
turn again. Both sides get the same JPEG files, tokenizer and 336 px CLIP processor and give the same token ids.

Times are process CPU times of one thread; both sides are interleaved with rotating order, and figures are medians of
the ratios of single rounds. Files are opened in separate processes, so that peak memory is measured for each.

    python scripts/bench/data.py            a table
    python scripts/bench/data.py --json     one JSON object on stdout
"""

from __future__ import annotations

import argparse
import functools
import importlib.resources
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Benchmark, Case, Row, interleaved, ratio
from PIL import Image

from mm_moslora.config import DataConfig, SourceConfig
from mm_moslora.config.llava_chat_templates import CHAT_TEMPLATES, set_chat_template
from mm_moslora.data.chat.conversation_encoder import ConversationEncoder
from mm_moslora.data.epoch_order import fill_rate, pack
from mm_moslora.data.sources.open_sources import open_source
from mm_moslora.data.training_set import TrainingSet
from mm_moslora.models.processing.image_processing import SquareImageProcessing

ROWS = 665_298
"""Records of LLaVA-1.5's instruction mixture."""
ROW_TOKENS = 4096
VISUAL_TOKENS = 576
SIDE = 336
SENTENCE = "the of a in red blue woman man dog standing next to table large white street sign with two people what is"
WORDS = SENTENCE.split()


def text(rng: random.Random, low: int, high: int) -> str:
    """Some words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))


def record(rng: random.Random, number: int, image: str | None) -> dict[str, Any]:
    """One record of one to six questions, as LLaVA writes them."""
    turns = []
    for turn in range(rng.randint(1, 6)):
        mark = "<image>\n" if image is not None and turn == 0 else ""
        turns.append({"from": "human", "value": mark + text(rng, 5, 25)})
        turns.append({"from": "gpt", "value": text(rng, 1, 60)})
    fields: dict[str, Any] = {"id": f"{number:012d}", "conversations": turns}
    return fields if image is None else {**fields, "image": image}


def write_large(path: Path) -> None:
    """A file like LLaVA-665k's in rows and size."""
    rng = random.Random(0)
    pool = [json.dumps(record(rng, number, f"coco/train2017/{number:012d}.jpg")) for number in range(2000)]
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[" + ", ".join(rng.choices(pool, k=1000)))
        for _ in range(ROWS // 1000 - 1):
            stream.write(", " + ", ".join(rng.choices(pool, k=1000)))
        stream.write(", " + ", ".join(rng.choices(pool, k=ROWS % 1000)) + "]")


OPEN_OURS = """
import sys, time
from pathlib import Path
from mm_moslora.data.sources.record_file import RecordFile
imported = time.process_time()
file = RecordFile(Path(sys.argv[1]))
file[0], file[len(file) - 1]
"""
OPEN_PEER = """
import json, sys, time
imported = time.process_time()
with open(sys.argv[1]) as stream:
    file = json.load(stream)
"""
OPEN_END = """
seconds = time.process_time() - imported
# The peak of this process alone; ru_maxrss would count the process that started it.
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(file), seconds, peak / 1024)
"""


def open_file(code: str, path: Path) -> tuple[int, float, float]:
    """Records, CPU seconds and peak resident MiB of opening a file in a separate process."""
    done = subprocess.run(
        [sys.executable, "-c", code + OPEN_END, str(path)], check=True, capture_output=True, text=True
    ).stdout.split()
    return int(done[0]), float(done[1]), float(done[2])


def measure_opening(rounds: int) -> Row:
    """This project's reader and `json.load` on one file, interleaved."""
    runs: dict[str, list[tuple[int, float, float]]] = {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.json"
        write_large(path)
        size = path.stat().st_size / 2**20
        for _ in range(rounds):
            runs["ours"].append(open_file(OPEN_OURS, path))
            runs["peer"].append(open_file(OPEN_PEER, path))
    assert {count for run in runs.values() for count, *_ in run} == {ROWS}
    seconds = {who: statistics.median(run[1] for run in opened) for who, opened in runs.items()}
    peaks = {who: max(run[2] for run in opened) for who, opened in runs.items()}
    what = f"open {ROWS} records ({size:.0f} MiB)"
    return {
        "table": [{"what": f"{what}, {who}", "seconds": seconds[who], "peak_mib": peaks[who]} for who in runs],
        "summary": {
            "open_665k_seconds": seconds["ours"], "open_665k_peak_mib": peaks["ours"],
            "open_665k_seconds_peer": seconds["peer"], "open_665k_peak_mib_peer": peaks["peer"],
        },
    }  # fmt: skip


def make_photos(folder: Path, count: int) -> None:
    """JPEG files of COCO's sizes, with enough detail for realistic decoding times."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = ((640, 480), (480, 640), (640, 427), (500, 375))[number % 4]
        coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
        image = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number}.jpg", quality=90)


@functools.cache
def tokenizer() -> Any:
    """The 32k Llama-style SentencePiece model of the mistral-common package, with BOS."""
    from transformers import LlamaTokenizer

    folder = Path(tempfile.mkdtemp())
    source = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
    (folder / "tokenizer.model").write_bytes(source.read_bytes())
    made = LlamaTokenizer.from_pretrained(
        folder, legacy=True, add_bos_token=True, padding_side="right", trust_remote_code=False
    )
    made.pad_token = made.unk_token
    return made


class LazyPeer:
    """LLaVA's `LazySupervisedDataset` for the `v1` template; all work is done when a sample is requested."""

    def __init__(self, path: Path, folder: Path, processor: Any) -> None:
        self.records = json.loads(path.read_text(encoding="utf-8"))
        self.folder, self.processor, self.tokenizer = folder, processor, tokenizer()
        self.background = tuple(int(value * 255) for value in processor.image_mean)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        turns = record["conversations"]
        if "image" not in record:
            return self._tokens(turns, has_image=False)
        image = Image.open(self.folder / record["image"]).convert("RGB")
        side = max(image.size)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        pixels = self.processor(square, return_tensors="pt")["pixel_values"][0]
        turns = [dict(turn) for turn in turns]
        for turn in turns:
            if "<image>" in turn["value"]:
                turn["value"] = "<image>\n" + turn["value"].replace("<image>", "").strip()
        return self._tokens(turns, has_image=True) | {"image": pixels}

    def _tokens(self, turns: list[dict[str, str]], *, has_image: bool) -> dict[str, Any]:
        prompt = CHAT_TEMPLATES["v1"].system + " "
        for turn in turns:
            human = turn["from"] == "human"
            prompt += f"{'USER' if human else 'ASSISTANT'}: {turn['value']}{' ' if human else '</s>'}"
        ids = torch.tensor(self._ids(prompt, has_image=has_image))
        labels = ids.clone()
        position = 1
        labels[:position] = -100
        for part in prompt.split("</s>"):
            if not part:
                break
            head, _, answer = part.partition(" ASSISTANT: ")
            if not answer:
                break
            length = len(self._ids(part, has_image=has_image))
            masked = len(self._ids(f"{head} ASSISTANT: ", has_image=has_image)) - 2
            labels[position : position + masked] = -100
            position += length
        labels[position:] = -100
        if position != len(ids):
            labels[:] = -100
        return {"input_ids": ids, "labels": labels}

    def _ids(self, text: str, *, has_image: bool) -> list[int]:
        if not has_image:
            return self.tokenizer(text).input_ids
        chunks = [self.tokenizer(chunk).input_ids for chunk in text.split("<image>")]
        ids = list(chunks[0])
        for chunk in chunks[1:]:
            ids += [-200, *chunk[1:]]
        return ids


def measure_samples(count: int, rounds: int) -> Row:
    """Samples per CPU second of this project and of the peer, on the same files."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photos(folder, count)
        rng = random.Random(1)
        rows = [record(rng, number, f"{number}.jpg" if number % 16 else None) for number in range(count)]
        path = folder / "small.json"
        path.write_text(json.dumps(rows), encoding="utf-8")
        own = tokenizer().__class__.from_pretrained(
            tokenizer().name_or_path, legacy=True, add_bos_token=True, trust_remote_code=False
        )
        own.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
        set_chat_template(own, "v1", faithful=True)
        token = own.convert_tokens_to_ids("<image>")
        image_processing = SquareImageProcessing(
            LlavaImageProcessorPil(do_pad=True, **size), image_token_id=token, tokens=VISUAL_TOKENS
        )
        encoder = ConversationEncoder(own, image_token_id=token, tokens_per_image=VISUAL_TOKENS)
        source = SourceConfig(path=str(path), image_folder=name)
        lazy = LazyPeer(path, folder, CLIPImageProcessorPil(**size))
        sets: dict[str, Callable[[int], Any]] = {
            "ours": TrainingSet([source], encoder, image_processing, config=DataConfig(max_length=4096)).load,
            "ours, token cache": TrainingSet(
                [source], encoder, image_processing, config=DataConfig(max_length=4096, cache=str(folder / "cache"))
            ).load,
            "peer": lazy.__getitem__,
        }
        check_equal(sets["ours"], sets["peer"], count, token)
        file, records = open_source(source), range(count)
        texts: dict[str, Callable[[int], Any]] = {
            "ours": lambda number: encoder.encode(file[number].turns),
            "peer": lambda number: lazy._tokens(rows[number]["conversations"], has_image="image" in rows[number]),
        }
        times, text_times = (
            interleaved({who: partial(_each, load, records) for who, load in work.items()}, rounds)
            for work in (sets, texts)
        )
    table = [
        {"what": f"{what}, {who}", "seconds": statistics.median(spent) / count}
        for what, timed in (("a sample", times), ("text of a sample", text_times))
        for who, spent in timed.items()
    ]
    return {
        "table": table,
        "summary": {
            "samples_per_second": count / statistics.median(times["ours"]),
            "samples_per_second_peer": count / statistics.median(times["peer"]),
            "sample_speedup_vs_llava": ratio(times, "peer", "ours"),
            "sample_speedup_vs_llava_cached": ratio(times, "peer", "ours, token cache"),
            "text_speedup_vs_llava": ratio(text_times, "peer", "ours"),
        },
    }


def _each(load: Callable[[int], Any], numbers: range) -> None:
    for number in numbers:
        load(number)


def check_equal(ours: Callable[[int], Any], peer: Callable[[int], Any], count: int, token: int) -> None:
    """Check that both give the same ids, labels and pixels."""
    for number in range(min(count, 32)):
        one, other = ours(number), peer(number)
        ids = one.input_ids.tolist()
        if one.pictures:
            first = ids.index(token)
            ids[first : first + VISUAL_TOKENS] = [-200]
            difference = (
                (one.pictures[0].tensors["pixel_values"][0] - torch.as_tensor(other["image"])).abs().max().item()
            )
            assert difference < 0.02, f"pixels differ by {difference}"
        assert ids == other["input_ids"].tolist(), f"ids of record {number} differ"
        supervised = one.input_ids[one.supervised].tolist()
        assert supervised == other["labels"][other["labels"] != -100].tolist(), f"labels of record {number} differ"


def measure_packing() -> Row:
    """Fill of packed rows for lengths distributed like LLaVA-665k's, against padding within LLaVA's grouped batches.

    94 % of the records have a picture of 576 tokens. Texts are log-normal (median 148 tokens, sigma 0.75) plus the 40
    of the template, truncated to 2,048.
    """
    rng = random.Random(0)
    image = [rng.random() < 0.94 for _ in range(ROWS)]
    lengths = [min(2048, int(rng.lognormvariate(5, 0.75)) + 40 + VISUAL_TOKENS * has_image) for has_image in image]
    rows, summary = [], {}
    for tokens in (2048, ROW_TOKENS, 8192):
        began = time.process_time()
        packed = pack(range(ROWS), lengths, tokens=tokens)
        seconds = time.process_time() - began
        rate = fill_rate(packed, lengths, tokens=tokens)
        rows.append({"what": f"rows of {tokens} tokens, share filled", "share": rate, "seconds": seconds})
        if tokens == ROW_TOKENS:
            summary["packing_fill_rate"] = rate
            summary["packing_seconds"] = seconds
    few = lengths[:20_000]
    filled = fill_rate(pack(range(len(few)), few, tokens=2048), few, tokens=2048)
    rows.append({"what": "20,000 of them in rows of 2048", "share": filled})
    rows.append({"what": "the same, a bound that no packing exceeds", "share": fill_bound(few, tokens=2048)})
    summary |= {"packing_fill_rate_2048": rows[-2]["share"], "packing_fill_bound_2048": rows[-1]["share"]}
    return {"table": rows, "summary": summary}


def fill_bound(lengths: list[int], *, tokens: int, grain: int = 4) -> float:
    """An upper bound of the fill over all packings of these examples: a linear program over all ways to fill a row.

    Columns are generated after Gilmore and Gomory (1961). Lengths are rounded down to multiples of `grain`, which can
    only loosen the bound.
    """
    from scipy.optimize import linprog

    room = tokens // grain
    sizes, counts = np.unique(np.maximum(1, np.array(lengths) // grain), return_counts=True)
    ways = [np.diag(room // sizes).astype(float)]
    while True:
        solved = linprog(np.ones(sum(map(len, ways))), A_ub=-np.concatenate(ways).T, b_ub=-counts, method="highs")
        worth = -solved.ineqlin.marginals
        best, last = _fullest_row(sizes, worth, room)
        if best[room] < 1 + 1e-4:
            return sum(lengths) / tokens / float(solved.fun / best[room])
        way, left = np.zeros((1, len(sizes))), room
        while left:
            way[0, last[left]] += last[left] >= 0
            left -= int(sizes[last[left]]) if last[left] >= 0 else 1
        ways.append(way)


def _fullest_row(sizes: np.ndarray, worth: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest value of a row of each length, and the item size that it ends with; -1: no item."""
    best, last = np.zeros(room + 1), np.full(room + 1, -1)
    for length in range(1, room + 1):
        fits = int(np.searchsorted(sizes, length, side="right"))
        values = best[length - sizes[:fits]] + worth[:fits]
        best[length] = best[length - 1]
        if fits and values.max() > best[length] + 1e-12:
            best[length], last[length] = values.max(), values.argmax()
    return best, last


def cases(options: argparse.Namespace) -> list[Case]:
    """The three parts."""
    parts: dict[str, Callable[[], Row]] = {
        "opening": partial(measure_opening, options.rounds),
        "samples": partial(measure_samples, options.samples, options.rounds),
        "packing": measure_packing,
    }
    return [Case(names={"part": name}, measure=measure) for name, measure in parts.items()]


def lines(row: Row) -> Iterator[dict[str, str]]:
    """Figures of a part."""
    for one in row["table"]:
        yield {
            "": one["what"], "CPU s": f"{one['seconds']:.4f}" if "seconds" in one else "",
            "peak MiB": f"{one['peak_mib']:.0f}" if "peak_mib" in one else "",
            "share": f"{one['share']:.1%}" if "share" in one else "",
        }  # fmt: skip


BENCHMARK = Benchmark(
    name="data", about=__doc__, cases=cases, lines=lines, packages=("transformers", "pillow", "numpy"),
    summarise=lambda rows: {name: figure for row in rows for name, figure in row["summary"].items()},
    add_options=lambda parser: parser.add_argument("--samples", type=int, default=96),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
