"""LLaVA-Bench: a judge's two ratings, and their ratio."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable

from mm_moslora_eval.scoring.estimates import Ratio
from mm_moslora_eval.scoring.rule_forms import AggregationFacts, Grade, JudgeRule
from mm_moslora_eval.scoring.scored_sample import Samples, Summed
from mm_moslora_eval.scoring.submission_forms import Submission, llava_lines
from mm_moslora_eval.sources.document import Document

UNPARSED = (-1.0, -1.0)
"""LLaVA-Bench's mark of a reply without two scores."""


def llavabench_scores(reply: str) -> tuple[float, float]:
    """LLaVA's rule: the first line holds exactly two numbers (reference, model), else `UNPARSED`."""
    parts = reply.split("\n")[0].replace(",", " ").split(" ")
    if len(parts) != 2:
        return UNPARSED
    try:
        reference, model = float(parts[0]), float(parts[1])
    except ValueError:
        return UNPARSED
    return (reference, model) if math.isfinite(reference + model) else UNPARSED


def llavabench_scores_lmms_eval(reply: str) -> tuple[float, float]:
    """lmms-eval's rule: the first two numbers of the first line, with any text between them."""
    line = reply.strip().split("\n")[0]
    numbers = re.findall(r"-?\d+(?:\.\d+)?", line)
    return (float(numbers[0]), float(numbers[1])) if len(numbers) >= 2 else UNPARSED


def ratings_within(reply: str, *, read: Callable[[str], tuple[float, float]]) -> tuple[float, float] | None:
    """The two ratings of a reply if both are from 1 to 10, as the prompt asks for, or None."""
    ratings = read(reply)
    return ratings if all(1 <= rating <= 10 for rating in ratings) else None


def llavabench_summary(scores: Iterable[tuple[str, float, float]]) -> dict[str, tuple[float, float, float]]:
    """Per category and for `all`: (relative score in percent, reference mean x 10, model mean x 10), rounded to 0.1.

    Args:
        scores: (category, score of the reference answer, score of the model's answer).
    """
    groups: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for category, reference, model in scores:
        groups[category].append((reference, model))
        groups["all"].append((reference, model))
    summary = {}
    for name, pairs in sorted(groups.items()):
        reference_mean, model_mean = (round(sum(column) / len(pairs), 3) for column in zip(*pairs, strict=True))
        relative = round(model_mean / reference_mean * 100, 1) if reference_mean else float("nan")
        summary[name] = (relative, round(reference_mean * 10, 1), round(model_mean * 10, 1))
    return summary


_LLAVABENCH = """\
A person asked a question about a picture. The picture is described to you in words, because you cannot see it. Two \
assistants answered. Rate how helpful, relevant, accurate and detailed each answer is on a scale from 1 to 10. On the \
first line write two numbers separated by a space: the rating of assistant 1, then that of assistant 2. Explain below.

[Picture]
{caption}

[Question]
{question}

[Assistant 1]
{reference}

[Assistant 2]
{answer}
"""


_MOST_RELATIVE = 10.0
"""A rating of 10 over one of 1."""


def llavabench(samples: Samples) -> Summed:
    """LLaVA-Bench: mean rating of the answers over that of the references (1 is equality), and both means (0 to 1).

    The same for every category. The score has all digits, the further numbers have those of the source.
    """
    references, answers = zip(*(sample.numbers or UNPARSED for sample in samples), strict=True)
    rated = zip((sample.document.category or "" for sample in samples), references, answers, strict=True)
    kinds = ("", "reference_", "answer_")
    metrics = {
        f"{kind}{name}": value / 100
        for name, values in llavabench_summary(rated).items()
        for kind, value in zip(kinds, values, strict=True)
    }
    return Summed(ratios=[Ratio(top=answers, bottom=references, high=_MOST_RELATIVE)], metrics=metrics)


def _prompt(document: Document, answer: str) -> str:
    return _LLAVABENCH.format(
        caption=document.extra.get("caption", "(no description)"), question=document.question,
        reference=document.extra.get("gpt4_ans") or " <OR> ".join(document.answers), answer=answer,
    )  # fmt: skip


def _grader(read: Callable[[str], tuple[float, float] | None]) -> JudgeRule[tuple[float, float]]:
    """The score is the rating of the answer divided by ten."""
    return JudgeRule(
        wording=_LLAVABENCH, prompt=_prompt, read=read, max_tokens=1024,
        grade=lambda value, reply: Grade(score=value[1] / 10, parsed=reply, numbers=value),
    )  # fmt: skip


def _ratings(reply: str) -> tuple[float, float] | None:
    """LLaVA-Bench's ratings: the first line of the reply has exactly two numbers from 1 to 10."""
    return ratings_within(reply, read=llavabench_scores)


def _ratings_lmms_eval(reply: str) -> tuple[float, float] | None:
    """The same: the first two numbers of the first line."""
    return ratings_within(reply, read=llavabench_scores_lmms_eval)


GRADERS = {"llavabench_judge": _grader(_ratings), "llavabench_judge_lmms_eval": _grader(_ratings_lmms_eval)}
AGGREGATIONS: dict[str, Callable[..., Summed]] = {"llavabench": llavabench}
FACTS = {"llavabench": AggregationFacts(beyond_1=True, score="relative rating")}
SUBMISSIONS = {"llavabench": Submission(write=llava_lines, suffix="jsonl")}
"""LLaVA's answer JSONL, which its script judges."""
