#!/usr/bin/env python
"""The subject-driven experiment (section 4.3 of arXiv 2406.11909) in small: real pictures, a diffusion model made here.

    python examples/experiments/subject.py OUT [--arms ARMS] [--lr RATES] [--seeds N] [--limit-minutes M]

A UNet from a config learns 16 x 16 pictures of Tux Paint's stamps, conditioned on their category. Then each arm
teaches it one subject (a picture under small shifts and mirrored) with prior preservation, for several subjects;
adapters are in the linear layers of attention and feed-forward blocks, which every arm can adapt. Scored by the cosine
between features of generated and of real pictures of the subject, from the frozen EfficientNet-Lite0 of the quickstart;
what the model scores before tuning is printed first. Rates are tuned and seeds kept apart as in `mm-moslora compare`;
its analysis and its page are used. The paper's own setting is `mm-moslora config sdxl_subject`. Again
continues.

Shapes: pictures ``[N, 3, S, S]`` from -1 to 1, text ``[N, 1, D]``, features ``[N, F]``.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import random
import resource
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moslora.adapters import add_method, add_moslora
from mm_moslora.compare.arms import parse_arms
from mm_moslora.compare.comparison_cell import read_outcome, write_outcome
from mm_moslora.compare.comparison_plan import (
    Cell,
    ComparisonSettings,
    Outcome,
    choose_rates,
    reported_cells,
    run_count,
    tuning_cells,
)
from mm_moslora.config import AdapterConfig, ModelConfig, OptimConfig
from mm_moslora.config import Recipe as TrainingRecipe
from mm_moslora.models.trainable_parts import method_config, moslora_config
from mm_moslora.training.parameter_groups import parameter_groups
from mm_moslora.utils.progress_bar import Progress, format_seconds

SIDE, WIDTH = 16, 32
CHANNELS = (32, 64)
TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj",
)  # fmt: skip
MEASURE = "similarity"
Batch = tuple[Tensor, Tensor]
"""Pictures and their text."""


def adapt(denoiser: nn.Module, adapter: AdapterConfig) -> nn.Module:
    """Put the adapter of an arm into the UNet."""
    if adapter.peft:
        method = method_config(adapter)
        method.task_type = None
        return add_method(denoiser, method, targets=list(TARGETS)).train()
    config = moslora_config(adapter, task_type=None, init_lora_weights="gaussian")  # as diffusers' scripts start A
    return add_moslora(denoiser, config, targets=list(TARGETS)).train()


def noise_loss(denoiser: nn.Module, scheduler: Any, batch: Batch, generator: torch.Generator) -> Tensor:
    """Squared error of the predicted noise."""
    pictures, text = batch
    noise = torch.randn(pictures.shape, generator=generator)
    steps = torch.randint(scheduler.config.num_train_timesteps, (len(pictures),), generator=generator)
    noisy = scheduler.add_noise(pictures, noise, steps)
    return F.mse_loss(denoiser(noisy, steps, encoder_hidden_states=text).sample, noise)


def train(
    denoiser: nn.Module, scheduler: Any, batches: Iterator[Batch], *, recipe: TrainingRecipe, steps: int
) -> list[float]:
    """Learn the subject, and the class with the same weight (prior preservation); returns the losses."""
    generator = torch.Generator().manual_seed(recipe.train.seed)
    groups = parameter_groups(denoiser, recipe.optim)
    trained = [parameter for group in groups for parameter in group.parameters]
    optimizer = torch.optim.AdamW(
        [{"params": group.parameters, "lr": group.peak_lr, "weight_decay": group.weight_decay} for group in groups],
        fused=True,
    )
    losses = []
    for _ in range(steps):
        loss = noise_loss(denoiser, scheduler, next(batches), generator)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the experiment is."""

    arms: str = "lora,moslora:kaiming,moslora:orthogonal,moslora:identity,moslora-init,tsm,dora,rslora,peft:HIRA@r=4"
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    grow: int = 3
    """Rates by which an arm's grid may grow where its best is at an edge."""
    seeds: int = 3
    subjects: int = 8
    base_steps: int = 2500
    steps: int = 60
    batch: int = 8
    pictures: int = 6
    """Generated per subject and run."""
    sampling_steps: int = 25
    rank: int = 4


def rates_of(text: str) -> tuple[float, ...]:
    """Learning rates above 0, separated by commas."""
    rates = tuple(map(float, text.split(",")))
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: expected numbers above 0, such as 1e-3,3e-3")
    return rates


def main() -> int:
    """Run or continue; write results.json and report.html."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--arms", default=Plan.arms, help="as for mm-moslora compare; more may be added later")
    parser.add_argument("--lr", type=rates_of, default=Plan.rates, help="rates to choose from, with commas")
    parser.add_argument("--seeds", type=int, default=Plan.seeds, help="reported runs of an arm")
    parser.add_argument("--limit-minutes", type=float, help="stop after so long; the same command goes on")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from stamps import fetch_stamps

    from mm_moslora.quickstart import model_assets

    stamps, encoder = fetch_stamps(print), model_assets.efficientnet_timm(print)
    plan = Plan(arms=options.arms, rates=options.lr, seeds=options.seeds)
    return run(plan, stamps, encoder, options.out, limit_minutes=options.limit_minutes)


def run(plan: Plan, stamps: Path, encoder: Path, out: Path, *, limit_minutes: float | None = None) -> int:
    """The experiment; what is over already is not done again.

    Args:
        plan: its size.
        stamps: folder of pictures, by category.
        encoder: folder of the frozen vision encoder.
        out: folder of the experiment.
        limit_minutes: stop after so long.

    Returns:
        0, or 75 when time was up.
    """
    started = time.monotonic()
    shared = TrainingRecipe(
        name="subject-small", model=ModelConfig(language="none"),
        adapter=AdapterConfig(rank=plan.rank, alpha=float(plan.rank)),
        optim=OptimConfig(weight_decay=0.0, mixer_weight_decay=0.0),
    )  # fmt: skip
    settings = ComparisonSettings(
        arms=parse_arms(plan.arms, shared), rates=plan.rates, seeds=plan.seeds, grow=plan.grow, tasks=[MEASURE],
        validation=[MEASURE],
    )  # fmt: skip
    world = World.build(plan, shared, stamps, encoder, out)
    print(world.controls(), flush=True)
    outcomes: dict[str, Outcome] = {}
    finished, measured = True, 0
    started_cells = time.monotonic()
    while (waiting := _waiting(settings, outcomes)) and finished:
        for cell in waiting:
            place = out / "runs" / cell.name
            outcome = read_outcome(place)
            if outcome is None:
                if limit_minutes is not None and time.monotonic() - started > 60 * limit_minutes:
                    finished = False
                    break
                outcome = world.measure(cell, place)
                write_outcome(place, outcome)
                measured, planned = measured + 1, run_count(settings, outcomes | {cell.name: outcome})
                left = (time.monotonic() - started_cells) / measured * (planned - len(outcomes) - 1)
                print(
                    f"[{len(outcomes) + 1}/{planned}] {cell.name}: {outcome.validation or outcome.test}, about "
                    f"{format_seconds(left)} left",
                    flush=True,
                )
            outcomes[cell.name] = outcome
    from mm_moslora.compare.comparison_analysis import analyse
    from mm_moslora.compare.comparison_text import table
    from mm_moslora.reporting.comparison.comparison_page import write_page

    about = SimpleNamespace(name=shared.name, to_yaml=lambda: yaml.safe_dump(_plain(plan), sort_keys=False))
    state: Any = SimpleNamespace(settings=settings, outcomes=outcomes, folder=out, recipe=about)
    rates = ",".join(map(str, plan.rates))
    command = ["python", "examples/experiments/subject.py", str(out), "--arms", plan.arms, "--lr", rates]
    command += ["--seeds", str(plan.seeds)]
    print(table(analyse(state, command=shlex.join(command))))
    print(f"Page: {write_page(out / 'results.json', out / 'report.html')}")
    return 0 if finished else 75


def _plain(plan: Plan) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(plan).items()}


def _waiting(settings: ComparisonSettings, outcomes: Mapping[str, Outcome]) -> list[Cell]:
    every = [*tuning_cells(settings, outcomes), *reported_cells(settings, choose_rates(settings, outcomes))]
    return [cell for cell in every if cell.name not in outcomes]


@dataclass(kw_only=True)
class World:
    """Everything that the runs share."""

    plan: Plan
    shared: TrainingRecipe
    base: nn.Module
    scheduler: Any
    subjects: list[Tensor]
    """Views of each subject, ``[V, 3, S, S]``."""
    classes: list[Tensor]
    """Pictures of each subject's category."""
    encoder: nn.Module
    references: list[Tensor]
    """Features of each subject's views, ``[V, F]``, of length 1."""

    @classmethod
    def build(cls, plan: Plan, shared: TrainingRecipe, stamps: Path, encoder: Path, out: Path) -> World:
        """Read the pictures, teach the base model (kept in `out`), choose the subjects."""
        from diffusers import DDPMScheduler
        from transformers import AutoModel

        pictures = read_pictures(stamps)
        names = sorted(pictures)
        base, file = unet(), out / "base.pt"
        scheduler = DDPMScheduler(num_train_timesteps=1000)
        if file.is_file():
            base.load_state_dict(torch.load(file, weights_only=True))
        else:
            teach_base(base, scheduler, [pictures[name] for name in names], plan)
            out.mkdir(parents=True, exist_ok=True)
            torch.save(base.state_dict(), file)
        rng = random.Random(0)
        chosen = [names[index % len(names)] for index in range(plan.subjects)]
        subjects = [views(pictures[name][rng.randrange(len(pictures[name]))]) for name in chosen]
        tower = AutoModel.from_pretrained(encoder, trust_remote_code=False).eval().requires_grad_(False)
        world = cls(
            plan=plan, shared=shared, base=base, scheduler=scheduler, subjects=subjects,
            classes=[pictures[name] for name in chosen], encoder=tower, references=[],
        )  # fmt: skip
        world.references = [world.features(subject) for subject in subjects]
        return world

    def controls(self) -> str:
        """What the scores have to be read against."""
        count = range(len(self.subjects))
        before = [s for index in count for s in self._score(self.base.eval(), index, noise_seed=0)]
        others = [(self.features(self.classes[i]) @ self.references[i].T).amax(1).mean().item() for i in count]
        views = [(ref @ ref.T).mean().item() for ref in self.references]
        return (
            f"Before tuning: {100 * mean(before):.1f}. Real pictures of the category: {100 * mean(others):.1f}. Views "
            f"of the subject among themselves: {100 * mean(views):.1f}."
        )

    def features(self, pictures: Tensor) -> Tensor:
        """Features of length 1, ``[N, F]``."""
        large = F.interpolate(pictures, size=(96, 96), mode="bilinear")
        maps = self.encoder(large).last_hidden_state
        return F.normalize(maps.flatten(2).mean(2), dim=-1)

    def measure(self, cell: Cell, place: Path) -> Outcome:
        """Teach every subject with one arm, rate and seed; score the pictures that it makes then."""
        started = time.monotonic()
        recipe = cell.recipe(self.shared, place.parent.parent)
        rows, losses, trainable, seconds = [], [], 0, 0.0
        for index in range(len(self.subjects)):
            torch.manual_seed(recipe.train.seed)
            denoiser = adapt(copy.deepcopy(self.base), recipe.adapter)
            trainable = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
            begun = time.monotonic()
            batches = self._batches(index, recipe.train.seed)
            losses += train(denoiser, self.scheduler, batches, recipe=recipe, steps=self.plan.steps)
            seconds += time.monotonic() - begun
            # The noise of tuning runs is another one than that of reported runs; arms and seeds share it.
            scores = self._score(denoiser.eval(), index, noise_seed=1 if cell.tuning else 0)
            rows += [{"id": f"{index}-{i}", "cluster": f"{index}", "score": s} for i, s in enumerate(scores)]
        if any(loss != loss for loss in losses):
            return Outcome(status="diverged", reason="the loss is not a number")
        folder = place / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        score = mean(row["score"] for row in rows)
        return Outcome(
            status="ok",
            validation={MEASURE: score} if cell.tuning else {},
            test={} if cell.tuning else {MEASURE: score},
            places={} if cell.tuning else {MEASURE: {"own": f"runs/{cell.name}/samples"}}, trainable=trainable,
            steps=self.plan.steps, step_seconds=seconds / (self.plan.steps * len(self.subjects)), train_seconds=seconds,
            total_seconds=time.monotonic() - started,
            memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        )  # fmt: skip

    def _batches(self, index: int, seed: int) -> Iterator[Batch]:
        """Batches that are half of the subject, half of its class."""
        generator, half = torch.Generator().manual_seed(seed), self.plan.batch // 2
        sides = (self.subjects[index], self.classes[index])
        while True:
            drawn = [pictures[torch.randint(len(pictures), (half,), generator=generator)] for pictures in sides]
            yield torch.cat(drawn), torch.cat([embedding(SUBJECT, half), embedding(index, half)])

    @torch.no_grad()
    def _score(self, denoiser: nn.Module, index: int, *, noise_seed: int) -> list[float]:
        made = sample(denoiser, embedding(SUBJECT, self.plan.pictures), seed=noise_seed, steps=self.plan.sampling_steps)
        return (self.features(made) @ self.references[index].T).amax(1).tolist()


SUBJECT = 99
"""Number of the subject's word."""


def embedding(word: int, count: int) -> Tensor:
    """A made-up text embedding, the same for a word each time, ``[N, 1, D]``."""
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(word))
    return vector.expand(count, 1, WIDTH)


def unet() -> nn.Module:
    """A UNet with cross attention in two heads, about a million parameters, random weights."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIDE, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=CHANNELS,
        norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=WIDTH, attention_head_dim=2,
        use_linear_projection=True,
    )  # fmt: skip


def read_pictures(stamps: Path, *, least: int = 30) -> dict[str, Tensor]:
    """Pictures by category on white, of the categories with at least so many."""
    found: dict[str, list[Tensor]] = {}
    for file in sorted(stamps.rglob("*.png")):
        category = file.relative_to(stamps).parts[0]
        if category == "symbols":
            continue
        with Image.open(file) as opened:
            picture = opened.convert("RGBA")
        side = max(picture.size)
        square = Image.new("RGBA", (side, side), (255, 255, 255, 255))
        square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        small = square.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        values = torch.frombuffer(bytearray(small.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)
        found.setdefault(category, []).append(values.permute(2, 0, 1).float() / 127.5 - 1)
    return {name: torch.stack(items) for name, items in found.items() if len(items) >= least}


def views(picture: Tensor) -> Tensor:
    """A picture shifted by one pixel on white and mirrored, ``[V, 3, S, S]``."""
    padded = F.pad(picture, (1, 1, 1, 1), value=1.0)
    shifted = [padded[:, y : y + SIDE, x : x + SIDE] for y in range(3) for x in range(3)]
    return torch.stack([*shifted, *(view.flip(-1) for view in shifted)])


def teach_base(model: nn.Module, scheduler: Any, classes: Sequence[Tensor], plan: Plan) -> None:
    """Teach the whole model pictures of every category."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, fused=True)
    progress = Progress("teach the base model", plan.base_steps)
    for step in range(plan.base_steps):
        index = int(torch.randint(len(classes), (1,), generator=generator))
        drawn = torch.randint(len(classes[index]), (plan.batch,), generator=generator)
        noise_loss(model, scheduler, (classes[index][drawn], embedding(index, plan.batch)), generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.update(step + 1)


@torch.no_grad()
def sample(denoiser: nn.Module, text: Tensor, *, seed: int, steps: int) -> Tensor:
    """Pictures from noise, by DDIM without added noise."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(steps)
    x = torch.randn(len(text), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    for step in scheduler.timesteps:
        x = scheduler.step(denoiser(x, step, encoder_hidden_states=text).sample, step, x).prev_sample
    return x.clamp(-1, 1)


if __name__ == "__main__":
    sys.exit(main())
