"""Speed of evaluation: this project's batched, prefix-sharing decoding against `model.generate` per question.

The peer is the method of lmms-eval's LLaVA adapter and VLMEvalKit: for every question (or option), the whole prompt
with its picture goes through the model at batch size 1. Both sides get the same weights, token ids and preprocessed
pixels, so preprocessing, which the peers repeat too, is left out. Answers must be identical.

Times are process CPU times of one thread; both sides are interleaved with rotating order, and figures are medians of
the ratios of single rounds.

    python scripts/bench/eval.py            a table
    python scripts/bench/eval.py --json     one JSON object on stdout
    python scripts/bench/eval.py --rows F   keep finished rows in F; a stopped run continues
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from json_output import results_alone
from measuring import Rows, head, interleaved, ratios, settings_of
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mm_moslora.models.decoding.generation import Prompt, encode_images, generate, score_options
from mm_moslora.utils.progress_bar import Progress

IMAGE_TOKEN = 3
VISUAL_TOKENS = 256
VOCABULARY, NEW_TOKENS = 32_000, 8
HEAD, QUESTION, OPTION = 8, 24, 6
"""Tokens before the picture, of a question, and of an option."""


@dataclass(frozen=True)
class Question:
    """A prompt with its picture."""

    ids: Tensor
    pixels: Tensor
    picture: int


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    """The yardstick: CLIP 6 x 256 at 224 px (256 visual tokens), Llama 512 x 6, fp32, random weights."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=224,
        patch_size=14,
    )  # fmt: skip
    language = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, vocab_size=vocabulary,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_id=IMAGE_TOKEN, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=VISUAL_TOKENS,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


def make_questions(count: int, *, pictures: int, vocabulary: int, seed: int) -> list[Question]:
    """Questions of nearly equal length, assigned to the pictures in consecutive blocks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pictures, 1, 3, 224, 224, generator=generator)
    head = torch.randint(10, vocabulary, (HEAD,), generator=generator)
    made = []
    for index in range(count):
        picture = index * pictures // count
        text = torch.randint(10, vocabulary, (QUESTION - index % 4,), generator=generator)
        ids = torch.cat([head, torch.full((VISUAL_TOKENS,), IMAGE_TOKEN), text])
        made.append(Question(ids, images[picture], picture))
    return made


def peer_answers(model: LlavaForConditionalGeneration, questions: Sequence[Question], *, new: int) -> list[list[int]]:
    """`model.generate` for one question at a time."""
    answers = []
    for question in questions:
        output = model.generate(
            input_ids=question.ids[None], attention_mask=torch.ones_like(question.ids)[None],
            pixel_values=question.pixels, do_sample=False, max_new_tokens=new, use_cache=True,
        )  # fmt: skip
        answers.append(output[0, len(question.ids) :].tolist())
    return answers


def _prompts(model: LlavaForConditionalGeneration, questions: Sequence[Question]) -> list[Prompt]:
    first = {question.picture: question.pixels for question in questions}
    features = dict(zip(first, encode_images(model, torch.cat(list(first.values()))), strict=True))
    return [Prompt(input_ids=q.ids, features=features[q.picture], group=q.picture) for q in questions]


def our_answers(model: LlavaForConditionalGeneration, questions: Sequence[Question], *, new: int) -> list[list[int]]:
    """One batch; pictures and shared prefixes run once."""
    return generate(model, _prompts(model, questions), max_new_tokens=new, stop_ids=[])


Options = Sequence[Sequence[int]]


@torch.inference_mode()
def peer_options(model: LlavaForConditionalGeneration, questions: Sequence[Question], options: Options) -> list[int]:
    """A forward pass with labels per option, as in the adapters' `loglikelihood`; returns the best option."""
    best = []
    for question in questions:
        scores = []
        for option in options:
            ids = torch.cat([question.ids, torch.tensor(option)])
            labels = ids.clone()
            labels[: len(question.ids)] = -100
            output = model(input_ids=ids[None], pixel_values=question.pixels, labels=labels[None])
            scores.append(-float(output.loss) * len(option))
        best.append(scores.index(max(scores)))
    return best


def our_options(model: LlavaForConditionalGeneration, questions: Sequence[Question], options: Options) -> list[int]:
    """Every prompt once, followed by all its options."""
    scored = score_options(model, _prompts(model, questions), [options] * len(questions))
    return [max(range(len(scores)), key=lambda index: scores[index].logprob) for scores in scored]


@dataclass(frozen=True)
class Case:
    """One comparison."""

    key: str
    title: str
    peer: Callable[[], Any]
    ours: Callable[[], Any]


def make_cases(model: LlavaForConditionalGeneration, *, vocabulary: int, new: int) -> list[Case]:
    """The comparisons of the summary."""
    generator = torch.Generator().manual_seed(9)
    options = torch.randint(10, vocabulary, (4, OPTION), generator=generator).tolist()
    shared = make_questions(8, pictures=1, vocabulary=vocabulary, seed=1)
    single = make_questions(8, pictures=8, vocabulary=vocabulary, seed=2)
    choice = make_questions(4, pictures=4, vocabulary=vocabulary, seed=3)
    return [
        Case(
            "speedup_shared_image", f"8 questions on one picture, {new} new tokens",
            lambda: peer_answers(model, shared, new=new), lambda: our_answers(model, shared, new=new),
        ),
        Case(
            "speedup_option_scoring", f"4 options of {OPTION} tokens, 4 pictures",
            lambda: peer_options(model, choice, options), lambda: our_options(model, choice, options),
        ),
        Case(
            "speedup_single_question", f"8 pictures with a question each, {new} new tokens",
            lambda: peer_answers(model, single, new=new), lambda: our_answers(model, single, new=new),
        ),
    ]  # fmt: skip


def peak_mib(call: Callable[[], Any]) -> float | None:
    """Increase of the resident size during a call, where Linux reports it."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")  # resets the high-water mark
        before = _kib(status, "VmRSS")
        call()
        return (_kib(status, "VmHWM") - before) / 1024
    except (OSError, ValueError):
        return None


def _kib(status: Path, name: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(name + ":"))


def measure(case: Case, rounds: int, after_round: Callable[[], None]) -> dict[str, Any]:
    """One row; `identical` is the share of answers that equal the peer's."""
    answers: dict[str, list[list[Any]]] = {}
    times = interleaved(
        {"peer": case.peer, "ours": case.ours}, rounds, after_round=after_round, results=answers
    )  # fmt: skip
    pairs = [pair for one, other in zip(*answers.values(), strict=True) for pair in zip(one, other, strict=True)]
    speedups = ratios(times, "peer", "ours")
    return {
        "name": case.key, "what": case.title,
        "speedup": statistics.median(speedups), "lowest": min(speedups), "highest": max(speedups),
        "peer_seconds": statistics.median(times["peer"]), "our_seconds": statistics.median(times["ours"]),
        "peer_peak_mib": peak_mib(case.peer), "our_peak_mib": peak_mib(case.ours),
        "answers": len(pairs), "identical": sum(one == other for one, other in pairs) / len(pairs),
    }  # fmt: skip


def measure_all(cases: Sequence[Case], rounds: int, rows: Rows) -> None:
    """Add the missing rows."""
    missing = [case for case in cases if rows.find(name=case.key) is None]
    total = len(cases) * (rounds + 1)
    done = total - len(missing) * (rounds + 1)
    with Progress("eval benchmark", total, unit="round", initial=done) as progress:
        for case in missing:

            def after_round(note: str = case.title) -> None:
                progress.update(progress.done + 1, note)

            rows.add(measure(case, rounds, after_round))


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The summary under stable keys."""
    same = sum(row["identical"] * row["answers"] for row in rows) / sum(row["answers"] for row in rows)
    return {row["name"]: row["speedup"] for row in rows} | {"identical_answers": same}


def show(rows: Sequence[dict[str, Any]], summary: dict[str, float]) -> None:
    """Print the table."""
    print(f"{'':52} {'speed-up':>9} {'range':>13} {'peer s':>8} {'ours s':>8} {'peer MiB':>9} {'ours MiB':>9}")
    for row in rows:
        peaks = [f"{row[name]:9.0f}" if row[name] is not None else f"{'?':>9}" for name in _PEAKS]
        print(
            f"{row['what']:52} {row['speedup']:8.2f}x {row['lowest']:6.2f}-{row['highest']:.2f} "
            f"{row['peer_seconds']:8.3f} {row['our_seconds']:8.3f} {' '.join(peaks)}"
        )
    print(f"identical answers: {summary['identical_answers']:.0%}")


def main() -> int:
    """Run the benchmark; exit code 1 when any answer differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per case (default 5)")
    parser.add_argument("--rows", type=Path, help="JSON Lines file of finished rows; only missing rows are measured")
    options = parser.parse_args()
    output = results_alone() if options.json else sys.stdout
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    opening = head("eval", "transformers")
    settings = {"rounds": options.rounds, "vocabulary": VOCABULARY, "new_tokens": NEW_TOKENS}
    rows = Rows(options.rows, settings_of(opening, **settings))
    model = build_model(VOCABULARY)
    measure_all(make_cases(model, vocabulary=VOCABULARY, new=NEW_TOKENS), options.rounds, rows)
    summary = summarise(rows.rows)
    if options.json:
        print(json.dumps(opening | {"rows": rows.rows, "summary": summary}), file=output)
    else:
        show(rows.rows, summary)
    return 0 if summary["identical_answers"] == 1.0 else 1


_PEAKS = ("peer_peak_mib", "our_peak_mib")

if __name__ == "__main__":
    sys.exit(main())
