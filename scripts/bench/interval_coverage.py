#!/usr/bin/env python
"""How often the 95 % intervals of the evaluation hold, by simulated answers.

    python scripts/bench/interval_coverage.py               print the table; some minutes of one core, needs no GPU
    python scripts/bench/interval_coverage.py --runs 50     fewer draws per row
    python scripts/bench/interval_coverage.py --json        one object on stdout

Each picture has a share of right answers, drawn from a beta distribution; the answers to its questions are right with
that share. The intervals are those of `mm_moslora_eval.scoring.measured_scores`, which writes every result.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean

import numpy as np
from harness import Benchmark, Case, Row
from mm_moslora_eval.scoring.measured_scores import aggregate, by_category
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import Document

SUB_TASKS = ("existence", "count", "OCR", "scene")
UNEVEN = (*[2] * 11, 60)


@dataclass(frozen=True, kw_only=True)
class World:
    """Pictures with questions, and the true score."""

    name: str
    sizes: Sequence[int]
    """Questions on each picture."""
    right: float = 0.95
    """True share of right answers."""
    correlation: float = 0.3
    """Of two answers about one picture."""
    aggregation: str = "mean"
    categories: int = 1
    """Pictures are dealt to so many categories in turn."""
    first: int = 0
    """Pictures of the first category; 0: as many as of the others."""
    category: str = ""
    """The category whose interval is tested; empty: that of the whole score."""
    graded: bool = False
    """Whether an answer has one of four grades instead of right or wrong."""
    other: float = 0.0
    """The share of a second system, whose difference from this one is tested; 0: none."""

    def draw(self, generator: np.random.Generator, right: float = 0.0) -> list[Scored]:
        """Scored answers."""
        share, strength = right or self.right, 1 / self.correlation - 1
        skills = generator.beta(share * strength, (1 - share) * strength, len(self.sizes))
        return [
            self._answer(generator, picture, question, float(skill))
            for picture, (size, skill) in enumerate(zip(self.sizes, skills, strict=True))
            for question in range(size)
        ]

    def _answer(self, generator: np.random.Generator, picture: int, question: int, skill: float) -> Scored:
        score = float(generator.binomial(3, skill)) / 3 if self.graded else float(generator.random() < skill)
        reference = ("yes", "no")[question % 2]
        index = 0 if picture < self.first else picture % self.categories
        index += self.first > 0 and picture >= self.first
        category = SUB_TASKS[index % len(SUB_TASKS)] if self.categories > 1 or self.first else None
        document = Document(
            id=f"{picture}-{question}", question="?", answers=(reference,), category=category,
            extra={"image_path": str(picture)},
        )  # fmt: skip
        answer = reference if score else {"yes": "no", "no": "yes"}[reference]
        return Scored(document=document, text=answer, parsed=answer, score=score, cluster=picture)

    def interval(self, samples: Sequence[Scored], others: Sequence[Scored]) -> tuple[float, float]:
        """The interval under test."""
        if self.other:
            difference = difference_of_scores(self.aggregation, [samples], [others]).estimate
            return difference.low, difference.high
        if self.category:
            part = by_category(self.aggregation, samples)[self.category]
            return part.low, part.high
        whole = aggregate(self.aggregation, samples)
        return whole.low, whole.high

    def truth(self) -> float:
        """The score of very many pictures."""
        if self.other:
            return _true_score(replace(self, other=0.0)) - _true_score(replace(self, right=self.other, other=0.0))
        return _true_score(self)


def _true_score(world: World) -> float:
    """F1 is that share, too, where half of the references are yes and wrong answers are as frequent on both."""
    if world.aggregation != "mme":
        return world.right
    both = world.right**2 + world.correlation * world.right * (1 - world.right)  # of a picture's two questions
    return 100 * world.categories * (world.right + both)


def worlds() -> Iterator[World]:
    """The rows of the table."""
    for right in (0.95, 0.8, 0.5):
        yield World(name=f"12 x 10, {right:.0%}", sizes=[10] * 12, right=right)
    yield World(name="30 x 10, 95%", sizes=[10] * 30)
    yield World(name="30 x 4, 95%", sizes=[4] * 30)
    yield World(name="100 x 5, 95%", sizes=[5] * 100)
    yield World(name="400 x 5, 95%", sizes=[5] * 400)
    yield World(name="11 x 2 and 1 x 60, 90%", sizes=UNEVEN, right=0.9)
    yield World(name="29 x 2 and 1 x 30, 90%", sizes=[*[2] * 29, 30], right=0.9)
    yield World(name="60 x 1, 95%", sizes=[1] * 60)
    yield World(name="30 x 4, 80%, four grades", sizes=[4] * 30, right=0.8, graded=True)
    yield World(name="macro average, 4 x 10 pictures x 3, 90%", sizes=[3] * 40, right=0.9, aggregation="mmstar_macro",
                categories=4)  # fmt: skip
    yield World(name="macro average, 5 and 75 pictures x 3, 80%", sizes=[3] * 80, right=0.8, aggregation="mmstar_macro",
                first=5)  # fmt: skip
    yield World(name="one category of 12 x 3, 90%", sizes=[3] * 48, right=0.9, categories=4, category=SUB_TASKS[0])
    yield World(name="POPE F1, 50 x 6, 85%", sizes=[6] * 50, right=0.85, aggregation="pope")
    yield World(name="POPE F1, 500 x 6, 85%", sizes=[6] * 500, right=0.85, aggregation="pope")
    yield World(name="MME, 4 x 20 pictures x 2, 85%", sizes=[2] * 80, right=0.85, aggregation="mme", categories=4)
    yield World(name="difference, 12 x 10, 95% and 80%", sizes=[10] * 12, other=0.8)
    yield World(name="difference, 30 x 4, 90% and 80%", sizes=[4] * 30, right=0.9, other=0.8)
    yield World(name="difference of macro averages, 4 x 10 x 3", sizes=[3] * 40, right=0.9, other=0.8,
                aggregation="mmstar_macro", categories=4)  # fmt: skip


def row(world: World, *, runs: int, seed: int = 0) -> Row:
    """Coverage and mean width of one row's intervals."""
    generator, truth = np.random.default_rng(seed), world.truth()
    covered, widths, points = [], [], 0
    for _ in range(runs):
        samples = world.draw(generator)
        others = world.draw(generator, world.other) if world.other else []
        low, high = world.interval(samples, others)
        covered.append(low <= truth <= high)
        widths.append(high - low)
        points += high - low <= 0
    return {"held": fmean(covered), "width": fmean(widths), "no_width": points}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """A row for each world."""
    for world in worlds():
        yield Case(names={"row": world.name}, measure=partial(row, world, runs=options.runs))


BENCHMARK = Benchmark(
    name="interval_coverage", about=__doc__, cases=cases, rounds=None,
    lines=lambda row: [{"": row["row"], "held": f"{row['held']:.1%}", "mean width": f"{row['width']:.3g}"}],
    summarise=lambda rows: {
        "least": min(row["held"] for row in rows), "no_width": sum(row["no_width"] for row in rows)
    },
    add_options=lambda parser: parser.add_argument("--runs", type=int, default=1500, help="draws per row"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(BENCHMARK.main())
