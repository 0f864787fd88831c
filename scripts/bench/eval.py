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
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from harness import Benchmark, Case, Row, interleaved, peak_mib, ratios
from llava_models import base, small, without_end
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.models.decoding.generation import Prompt, encode_images, generate, score_options

VOCABULARY, NEW_TOKENS = 32_000, 8
HEAD, QUESTION, OPTION = 8, 24, 6
"""Tokens before the image, of a question, and of an option."""


@dataclass(frozen=True)
class Question:
    """A prompt with its image."""

    ids: Tensor
    pixels: Tensor
    picture: int


def make_questions(model: PreTrainedModel, count: int, *, pictures: int, seed: int) -> list[Question]:
    """Questions of nearly equal length, assigned to the images in consecutive blocks."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pictures, 1, 3, 224, 224, generator=generator)
    head = torch.randint(10, VOCABULARY - 1, (HEAD,), generator=generator)
    visual = torch.full((model.config.image_seq_length,), model.config.image_token_id)
    made = []
    for index in range(count):
        picture = index * pictures // count
        text = torch.randint(10, VOCABULARY - 1, (QUESTION - index % 4,), generator=generator)
        made.append(Question(torch.cat([head, visual, text]), images[picture], picture))
    return made


def peer_answers(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[int]]:
    """`model.generate` for one question at a time."""
    answers = []
    for question in questions:
        output = model.generate(
            input_ids=question.ids[None], attention_mask=torch.ones_like(question.ids)[None],
            pixel_values=question.pixels, do_sample=False, max_new_tokens=NEW_TOKENS, use_cache=True,
        )  # fmt: skip
        answers.append(output[0, len(question.ids) :].tolist())
    return answers


def _prompts(model: PreTrainedModel, questions: Sequence[Question]) -> list[Prompt]:
    first = {question.picture: question.pixels for question in questions}
    features = dict(zip(first, encode_images(model, torch.cat(list(first.values()))), strict=True))
    return [Prompt(input_ids=q.ids, features=features[q.picture], group=q.picture) for q in questions]


def our_answers(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[int]]:
    """One batch; pictures and shared prefixes run once."""
    return generate(model, _prompts(model, questions), max_new_tokens=NEW_TOKENS, stop_ids=[])


Options = Sequence[Sequence[int]]


@torch.inference_mode()
def peer_options(model: PreTrainedModel, questions: Sequence[Question], options: Options) -> list[int]:
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


def our_options(model: PreTrainedModel, questions: Sequence[Question], options: Options) -> list[int]:
    """Every prompt once, followed by all its options."""
    scored = score_options(model, _prompts(model, questions), [options] * len(questions))
    return [max(range(len(scores)), key=lambda index: scores[index].logprob) for scores in scored]


def measure(steps: Mapping[str, Callable[[], Any]], rounds: int) -> Row:
    """One row; `identical` is the share of answers that equal the peer's."""
    answers: dict[str, list[list[Any]]] = {}
    times = interleaved(steps, rounds, results=answers)
    pairs = [pair for one, other in zip(*answers.values(), strict=True) for pair in zip(one, other, strict=True)]
    speedups = ratios(times, "peer", "ours")
    return {
        "speedup": statistics.median(speedups), "lowest": min(speedups), "highest": max(speedups),
        "peer_seconds": statistics.median(times["peer"]), "our_seconds": statistics.median(times["ours"]),
        "peer_peak_mib": peak_mib(steps["peer"]), "our_peak_mib": peak_mib(steps["ours"]),
        "answers": len(pairs), "identical": sum(one == other for one, other in pairs) / len(pairs),
    }  # fmt: skip


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The comparisons of the summary."""
    model = without_end(base(small(vocabulary=VOCABULARY)))
    shared = make_questions(model, 8, pictures=1, seed=1)
    single = make_questions(model, 8, pictures=8, seed=2)
    choice = make_questions(model, 4, pictures=4, seed=3)
    choices = torch.randint(10, VOCABULARY - 1, (4, OPTION), generator=torch.Generator().manual_seed(9)).tolist()
    asked, scored = (peer_answers, our_answers), (peer_options, our_options)
    for key, title, ways, given in (
        ("speedup_shared_image", f"8 questions on one image, {NEW_TOKENS} new tokens", asked, (shared,)),
        ("speedup_option_scoring", f"4 options of {OPTION} tokens, 4 images", scored, (choice, choices)),
        ("speedup_single_question", f"8 images with a question each, {NEW_TOKENS} new tokens", asked, (single,)),
    ):
        steps = {name: partial(way, model, *given) for name, way in zip(("peer", "ours"), ways, strict=True)}
        yield Case(names={"name": key, "what": title}, measure=partial(measure, steps, options.rounds))


def summarise(rows: Sequence[Row]) -> dict[str, float]:
    """The speed-ups, and the share of equal answers."""
    same = sum(row["identical"] * row["answers"] for row in rows) / sum(row["answers"] for row in rows)
    return {row["name"]: row["speedup"] for row in rows} | {"identical_answers": same}


def lines(row: Row) -> Iterator[dict[str, str]]:
    """A comparison."""
    yield {
        "": row["what"], "speed-up": f"{row['speedup']:.2f}", "range": f"{row['lowest']:.2f} to {row['highest']:.2f}",
        "peer s": f"{row['peer_seconds']:.3f}", "ours s": f"{row['our_seconds']:.3f}",
        "peer MiB": _mib(row["peer_peak_mib"]), "ours MiB": _mib(row["our_peak_mib"]),
    }  # fmt: skip


def _mib(peak: float | None) -> str:
    return "?" if peak is None else f"{peak:.0f}"


BENCHMARK = Benchmark(
    name="eval", about=__doc__, cases=cases, lines=lines, summarise=summarise, targets={"identical_answers": "1"},
    packages=("transformers",), facts={"vocabulary": VOCABULARY, "new_tokens": NEW_TOKENS},
    passed=lambda summary: summary["identical_answers"] == 1.0,
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
