"""The verb `plan`. Parsing and printing only; the arithmetic is in `mm_moslora.planning.run_plan`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from cyclopts import Parameter

from mm_moslora.cli.launch_verbs import refuse_early
from mm_moslora.cli.shared_options import Overrides, quiet_libraries
from mm_moslora.config import load_recipe, override_items, require_sft
from mm_moslora.utils.errors import ConfigError, DataError, ModelError

if TYPE_CHECKING:
    from mm_moslora.config import Recipe
    from mm_moslora.planning.run_plan import DataSize, Option, RunPlan
    from mm_moslora.training.metrics.gpu_memory import Memory

SHOWN = 12


@Parameter(name="*", group="Data")
@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data, where they are not at hand."""

    samples: int | None = None
    """Records of an epoch; known for LLaVA's and the commonsense data sets, else counted in the recipe's data."""
    tokens_per_sample: float | None = None
    """Mean tokens of a record, visual tokens included."""
    supervised: float = 0.15
    """Share of the tokens that is supervised, with --samples."""
    image_size: str | None = None
    """Typical width and height of an image in pixels, for models that cut images into tiles or take them in any size;
    default: 640x480."""

    def check(self) -> None:
        """Refuse numbers that describe no data."""
        if self.samples is not None and self.samples < 1:
            raise ConfigError(f"--samples is {self.samples}, expected 1 or more.")
        if self.tokens_per_sample is not None and not 1 <= self.tokens_per_sample < math.inf:
            raise ConfigError(f"--tokens-per-sample is {self.tokens_per_sample:g}, expected 1 or more.")
        if not 0 < self.supervised <= 1:
            raise ConfigError(f"--supervised is {self.supervised:g}, expected a share above 0 and up to 1.")
        if (self.samples is None) != (self.tokens_per_sample is None):
            raise ConfigError("--samples and --tokens-per-sample belong together; one of them is missing.")

    def size(self, recipe: Recipe) -> tuple[DataSize | None, str]:
        """The size of a recipe's data, None where `run_plan` knows it, and a line about where it comes from."""
        from mm_moslora.planning.recipe_data import size_of
        from mm_moslora.planning.run_plan import LLAVA_VISUAL, DataSize, known_data

        if self.samples is not None and self.tokens_per_sample is not None:
            pictures = 0.0 if recipe.model.vision is None and recipe.model.vlm is None else 1.0
            return DataSize(
                samples=self.samples, tokens=self.tokens_per_sample, supervised=self.supervised, pictures=pictures
            ), ""
        if known_data(recipe.data.train, LLAVA_VISUAL) is not None:
            return None, ""
        try:
            return size_of(recipe)
        except (DataError, ModelError) as error:
            raise ConfigError(
                f"The size of the data is not known: {error} Give --samples and --tokens-per-sample."
            ) from error


AT_HAND = DataOptions()


def plan(
    recipe: str,
    *overrides: Overrides,
    gpus: str,
    price: float | None = None,
    network: float | None = None,
    described: DataOptions = AT_HAND,
) -> int:
    """Memory per GPU, tokens per second, hours and cost of a recipe, before anything is loaded.

    Parameters
    ----------
    recipe
        YAML file, or the name of a shipped recipe.
    gpus
        Count, card and memory: 8xA100-80G, 1xRTX4090.
    price
        Price per GPU and hour, in any currency.
    network
        Bandwidth between hosts of eight GPUs in GB/s, all network adapters of a host together; default: 200 for A100
        and later, 12.5 (100 Gb/s) for cards with slower links.
    """
    resolved = load_recipe(recipe, override_items(overrides))
    refuse_early(resolved)
    require_sft(resolved, "plan")
    from mm_moslora.training.metrics.gpu_specs import parse_gpus

    cards = parse_gpus(gpus)
    described.check()
    if price is not None and not 0 <= price < math.inf:
        raise ConfigError(f"--price is {price:g}, expected 0 or more.")
    if network is not None:
        if not 0 < network < math.inf:
            raise ConfigError(f"--network is {network:g}, expected GB/s above 0.")
        cards = replace(cards, network=network * 1e9)
    image = _size(described.image_size) if described.image_size is not None else None
    quiet_libraries()
    from rich.console import Console

    from mm_moslora.planning.run_plan import plan as compute

    data, found_by = described.size(resolved)
    computed = compute(resolved, cards, data, picture=image)
    console = Console()
    if found_by:
        console.print(found_by)
    console.print(_parts(computed))
    console.print(_memory(computed.best or min(computed.options, key=lambda option: option.memory.total)))
    console.print(_options(computed))
    _verdict(console, computed, price)
    return 0 if computed.best is not None else 1


def _size(text: str) -> tuple[int, int]:
    """Width and height of `640x480`."""
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if match is None:
        raise ConfigError(f"--image-size is {text!r}, expected width and height in pixels: 640x480.")
    return int(match[1]), int(match[2])


def _pictures(plan: RunPlan) -> str:
    """Print the assumed picture size, for models with a cost per picture that depends on it."""
    from rich.markup import escape

    size = plan.cost
    assert plan.picture is not None
    tiles = "" if size.picture.tiles == 1 else f"{size.picture.tiles} tiles, "
    width, height = plan.picture
    line = f"Pictures: of {width} x {height} pixels (--image-size), {tiles}{size.tokens_per_image:,} tokens each."
    if size.unseen:
        line += f" [yellow]Computed from the configuration, not by the model's processor[/]: {escape(size.unseen)}"
    return line


def _links(plan: RunPlan) -> str:
    """The assumed bandwidths."""
    from mm_moslora.training.metrics.gpu_specs import PER_HOST

    gpus = plan.gpus
    line = f"Assumed bandwidth: {gpus.bandwidth / 1e9:g} GB/s between the GPUs of a host"
    if gpus.count > PER_HOST:
        line += f", {gpus.network / 1e9:g} GB/s between hosts of {PER_HOST} GPUs (--network)"
    return line + "."


def _parts(plan: RunPlan) -> Any:
    from rich.table import Table

    table = Table("part", "parameters", "trainable", box=None)
    for name, (total, trainable) in plan.cost.parts.items():
        table.add_row(name, f"{total:,}", f"{trainable:,}")
    return table


def _options(plan: RunPlan) -> Any:
    from rich.table import Table

    table = Table("setting", "GiB", "tokens/s", "time", "fits", box=None)
    fastest = sorted(plan.options, key=lambda option: -option.tokens_per_second)
    chosen = [option for option in fastest if option is plan.best]
    others = [option for option in fastest if option is not plan.best]
    fitting = [option for option in others if option.fits][: SHOWN // 2]
    for option in [*chosen, *fitting, *[option for option in others if not option.fits][: SHOWN // 2]]:
        table.add_row(
            ("[bold]" if option is plan.best else "") + option.label,
            f"{option.peak / 2**30:.1f}", f"{option.tokens_per_second:,.0f}", _hours(plan.hours(option)),
            "[green]yes[/]" if option.fits else f"[red]no[/]: {_reason(option)}",
        )  # fmt: skip
    return table


def _hours(hours: float) -> str:
    """`3.4 h`, or minutes below one hour."""
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min" if hours >= 1 / 60 else "under 1 min"


def _memory(option: Option) -> Any:
    from rich.table import Table

    table = Table("GiB per GPU", "", box=None)
    for item in fields(option.memory):
        table.add_row(item.name, f"{getattr(option.memory, item.name) / 2**30:.2f}")
    return table


def _reason(option: Option) -> str:
    """The largest part of the memory of a setting that does not fit."""
    if option.generating == option.peak:
        return f"validation, with the whole model, takes {option.peak / 2**30:.0f} GiB"
    needed: Memory = option.memory
    name = max((item.name for item in fields(needed)), key=lambda name: getattr(needed, name))
    return f"{name} take {getattr(needed, name) / 2**30:.0f} GiB"


def expected(plan: RunPlan, option: Option) -> str:
    """`60 of 75 GiB per GPU, 3.9 h (3.2 h to 4.9 h)`."""
    hours = plan.hours(option)
    return (
        f"{option.peak / 2**30:.0f} of {plan.gpus.memory / 2**30:.0f} GiB per GPU, {_hours(hours)} "
        f"({_hours(hours / 1.2)} to {_hours(hours / 0.8)})"
    )


def as_it_stands(plan: RunPlan, own: Option) -> str:
    """The estimate for the recipe's own setting; the shipped recipes repeat this sentence in their heads."""
    outcome = expected(plan, own) if own.fits else f"does not fit, {_reason(own)}"
    return f"As it stands ({own.label}): {outcome}."


def _verdict(console: Any, plan: RunPlan, price: float | None) -> None:
    from mm_moslora.planning.run_plan import utilisation

    gpus, best = plan.gpus, plan.best
    epochs = "1 epoch" if plan.epochs == 1 else f"{plan.epochs:g} epochs"
    rows = plan.data.per_row
    packed = "" if rows == 1 else f"{rows:.1f} to a packed row (batch sizes count rows), "
    console.print(
        f"Data: {plan.data.samples:,} samples of {plan.data.tokens:,.0f} tokens, {packed}{epochs}. "
        f"FLOPs per sample: {plan.flops.total / 1e12:.1f} T "
        f"(base {plan.flops.base / plan.flops.total:.0%}, adapters {plan.flops.adapters / plan.flops.total:.0%}, "
        f"attention {plan.flops.attention / plan.flops.total:.0%}, head {plan.flops.head / plan.flops.total:.0%}, "
        f"vision {plan.flops.vision / plan.flops.total:.0%})."
    )
    if plan.picture is not None:
        console.print(_pictures(plan))
    if plan.idle:
        console.print(
            f"[yellow]{plan.idle} of {gpus.count} GPUs are idle[/]: the {'records' if rows == 1 else 'rows'} "
            f"of a step keep {gpus.count - plan.idle} busy. Take fewer GPUs, or raise train.global_batch."
        )
    if gpus.count > 1:
        console.print(_links(plan))
    console.print(f"{as_it_stands(plan, plan.own)} {plan.remedy}".rstrip())
    if plan.own.main_memory:
        console.print(
            f"Main memory of the first host: about {plan.own.main_memory / 2**30:.0f} GiB, for the weights that rank "
            "0 reads under ZeRO-3, or for what is offloaded."
        )
    if best is None:
        remedy = "" if plan.own.generating == plan.own.peak else " Take more or larger GPUs, or nf4."
        console.print(f"[red]Nothing fits on {gpus.count} x {gpus.name}[/] without offloading.{remedy}")
        return
    share = utilisation(gpus, plan.cost)
    console.print(
        f"[bold]{best.label}[/]: {expected(plan, best)}, {best.tokens_per_second:,.0f} tokens/s at {share:.0%} "
        "of the peak."
    )
    if price is not None:
        console.print(f"Cost: {plan.hours(best) * gpus.count * price:,.2f} at {price:g} per GPU and hour.")
    console.print(
        f"--train.zero {best.zero} --train.micro_batch {best.micro_batch} "
        f"--train.gradient_checkpointing {str(best.checkpointing).lower()}"
    )
