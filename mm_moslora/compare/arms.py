"""Arms of a comparison: a name and the recipe keys that it sets.

`lora`, `moslora:kaiming` and others are known. A suffix `@key=value` changes keys of the adapter (or any recipe key by
its dotted name), so `moslora:orthogonal@rank=16` is an arm of a rank ablation. Several values,
`moslora@optim.mixer_factor=1,6,24`, are alternatives between which the tuning runs choose, as they choose a rate.
`peft:NAME` is a method of PEFT, and its suffixes may be options of the method: `peft:LORA@init_lora_weights=pissa`.
`size_lines` counts what trains in each arm before anything runs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any, get_args

from mm_moslora.config import AdapterConfig, Recipe
from mm_moslora.config.model_config import MixerInit
from mm_moslora.config.recipe_reading import parse_scalar, set_dotted
from mm_moslora.utils.errors import AdapterError, ConfigError, MoSLoRAError, reason_of, suggestion
from mm_moslora.utils.identity import sha256_of_text
from mm_moslora.utils.text_format import split_commas

_LORA = {"adapter.mixer_init": "identity", "adapter.mixer_trainable": False}
PEFT = "peft:"
"""Before the name of a method of PEFT."""
_KEYS = tuple(item.name for item in fields(AdapterConfig))
KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("plain LoRA: the mixer is the frozen identity", _LORA),
    "tsm": (
        "two-subspaces mixing, the paper's first step: a fixed butterfly mixer",
        {"adapter.mixer_init": "butterfly", "adapter.mixer_trainable": False},
    ),
    **{
        f"moslora:{init}": (f"MoSLoRA, mixer started {init}", {"adapter.mixer_init": init})
        for init in get_args(MixerInit)
    },
    "moslora-rslora": (
        "MoSLoRA scaled by alpha / sqrt(rank)",
        {"adapter.mixer_init": "orthogonal", "adapter.use_rslora": True},
    ),
    "moslora-lora+": (
        "MoSLoRA with LoRA+: the learning rate of B is 16 times that of A and M",
        {"adapter.mixer_init": "orthogonal", "optim.lora_plus_ratio": 16.0},
    ),
    "moslora-init": (
        "MoSLoRA's start alone: A starts as M A, and plain LoRA trains from there",
        {"adapter.mixer_init": "kaiming", "adapter.factor_form": "mixed"},
    ),
    "dora": ("DoRA: LoRA and a trained length of every row", _LORA | {"adapter.use_dora": True}),
    "rslora": ("LoRA scaled by alpha / sqrt(rank)", _LORA | {"adapter.use_rslora": True}),
    "lora+": ("LoRA+: the learning rate of B is 16 times that of A", _LORA | {"optim.lora_plus_ratio": 16.0}),
    "full": ("every weight of the language model trains, no adapter", {"model.language_mode": "full"}),
}
"""Known arms: a description, and the recipe keys that they set."""

_RESET = {
    "adapter.peft": {},
    "adapter.mixer_trainable": True,
    "adapter.mixer_pattern": {},
    "adapter.factor_form": "free",
    "adapter.use_dora": False,
    "adapter.use_rslora": False,
    "optim.lora_plus_ratio": 1.0,
    "optim.mixer_factor": 1.0,
    "model.language_mode": "adapter",
}
"""Defaults that every arm resets, whatever the recipe holds, so that two arms differ only in what their names set."""

RUN_KEYS = ("optim.lr", "train.seed", "train.output", "track.name")
"""What the comparison sets in every run's recipe, whatever the arm."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to tune."""

    name: str
    """The name from the command line."""
    about: str
    """For people."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted recipe keys and their values; with alternatives those of the first."""
    alternatives: tuple[Arm, ...] = ()
    """Values between which the tuning runs choose, each an arm; empty: there is nothing to choose."""
    group: str = ""
    """Name under which it is reported: its own, or that of the arm whose alternative it is."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "group", self.group or self.name)

    @property
    def ways(self) -> tuple[Arm, ...]:
        """What may run: the alternatives, or the arm itself."""
        return self.alternatives or (self,)

    @property
    def slug(self) -> str:
        """The name as a part of a folder name."""
        whole = re.sub(r"[^A-Za-z0-9_.+=-]+", "-", self.name).strip("-")
        return whole if len(whole) <= 120 else f"{whole[:100]}-{sha256_of_text(self.name)[:12]}"

    def apply(self, recipe: Recipe, **further: Any) -> Recipe:
        """The recipe of this arm, with further dotted keys (`__` for the dot, such as `optim__lr`)."""
        data = recipe.to_dict()
        for key, value in {**self.changes, **{key.replace("__", "."): value for key, value in further.items()}}.items():
            set_dotted(Recipe, data, key.split("."), value, f"{key}={value}")
        return Recipe.from_dict(data, source=f"arm {self.name!r}")


def named_arms(words: Sequence[str]) -> list[Arm]:
    """The arms of `parse_arms`, not yet tried on a recipe; needs torch only for methods of PEFT."""
    names = _joined([name for item in words for name in split_commas(item)])
    if len(names) < 2:
        raise ConfigError(f"{len(names)} arm given, expected at least two: --arms lora,moslora:orthogonal.")
    return [_parse(name) for name in names]


def parse_arms(text: str | Sequence[str], recipe: Recipe) -> list[Arm]:
    """Read `lora,moslora:kaiming@rank=16`, or a list of such texts; each is applied to the recipe once, as a check."""
    # Commas within brackets do not separate, and what begins with a digit is a further value of the suffix before it.
    arms = named_arms([text] if isinstance(text, str) else text)
    from mm_moslora.models.trainable_parts import adapter_config

    ways = [way for arm in arms for way in arm.ways]
    for number, way in enumerate(ways):
        if same := next((o for o in ways[:number] if o.slug == way.slug or o.changes == way.changes), None):
            also = "" if same.name == way.name else f", once as {same.name!r}"
            raise ConfigError(f"Arm {way.name!r} is given twice{also}. Name every arm once.")
        same = next((other for other in ways[:number] if _beside_adapter(other) == _beside_adapter(way)), None)
        if recipe.adapter.weights is not None and same is not None:
            raise ConfigError(
                f"Arms {same.name!r} and {way.name!r} would be the same: both start from adapter.weights "
                f"{recipe.adapter.weights!r}, whose rank, mixer and targets are those of its folder. Leave it out, or "
                "compare other keys, such as ARM@optim.mixer_factor=6."
            )
        try:
            applied = way.apply(recipe)
            if applied.model.language_mode == "adapter":
                adapter_config(applied.adapter)
        except MoSLoRAError as error:
            raise type(error)(f"Arm {way.name!r}: {error}") from error
    return arms


def _beside_adapter(arm: Arm) -> dict[str, Any]:
    return {key: value for key, value in arm.changes.items() if not key.startswith("adapter.")}


def reset_line(recipe: Recipe) -> list[str]:
    """A line that names what the recipe sets and every arm resets; none where there is nothing."""
    lost = []
    for key, default in _RESET.items():
        section, _, name = key.partition(".")
        if (value := getattr(getattr(recipe, section), name)) != default:
            lost.append(f"{key}={value} (to {default})")
    if not lost:
        return []
    return [
        f"every arm resets what the recipe says of {', '.join(lost)}; to keep it, name it in the arm: ARM@key=value"
    ]


def _joined(names: Sequence[str]) -> list[str]:
    """Names with the further values of a suffix joined to it: `a@k=1`, `6` -> `a@k=1,6`."""
    joined: list[str] = []
    for name in names:
        if joined and "@" in joined[-1] and name[0] in "0123456789.-":
            joined[-1] += f",{name}"
        else:
            joined.append(name)
    return joined


def _parse(text: str) -> Arm:
    """One arm; where a suffix has several values, with its alternatives."""
    whole, *changes = text.split("@")
    values = [(item.partition("=")[:2], split_commas(item.partition("=")[2])) for item in changes]
    if all(len(several) < 2 for _, several in values):
        return _parse_way(text)
    combined = product(*([f"{key}{sign}{value}" for value in several] for (key, sign), several in values))
    ways = [_parse_way("@".join([whole, *way])) for way in combined]
    name = "@".join([ways[0].name.partition("@")[0], *changes])
    about = f"{ways[0].about.rpartition(' (')[0]} ({'; '.join(changes)}: chosen by the tuning runs)"
    ways = [replace(way, group=name) for way in ways]
    return Arm(name=name, about=about, changes=ways[0].changes, alternatives=tuple(ways))


def _parse_way(text: str) -> Arm:
    name, *changes = text.split("@")
    if name == "moslora":
        name = "moslora:orthogonal"
    if name.startswith(PEFT):
        about, own, options = _method(name.removeprefix(PEFT))
        name = f"{PEFT}{own['adapter.peft']['type']}"  # PEFT's spelling: one method is one arm
    elif name in KNOWN:
        (about, own), options = KNOWN[name], ()
    else:
        names = ["moslora", *KNOWN, f"{PEFT}HIRA"]
        raise ConfigError(
            f"Arm {name!r} is not known.{suggestion(name, names)} Known: moslora, {', '.join(KNOWN)}, and {PEFT}NAME "
            "for the methods of PEFT."
        )
    method: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    for item in changes:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"Arm {text!r}: {item!r} is not of the form key=value, such as rank=16.")
        if key in options:
            method[key] = parse_scalar(value)
            continue
        full = f"adapter.{key}" if "." not in key else key
        if full in RUN_KEYS:
            raise ConfigError(
                f"Arm {text!r}: {full} is set by the comparison for every run, so it cannot be an arm's (--lr and "
                "--seeds are its rates and seeds). Leave it out."
            )
        if full in keys:
            raise ConfigError(f"Arm {text!r}: {full} is given twice. Give every key once.")
        if full.startswith("adapter.") and own.get("model.language_mode") == "full":
            raise ConfigError(f"Arm {text!r}: {name} trains every weight and has no adapter. Leave {full} out.")
        if "." not in key and key not in _KEYS:
            names = [*options, *_KEYS]
            raise ConfigError(f"Arm {text!r}: the adapter has no key {key!r}.{suggestion(key, names)}")
        keys[full] = parse_scalar(value)
    if method:
        own = {**own, "adapter.peft": {**own["adapter.peft"], **method}}
    if "adapter.rank" in keys and "adapter.alpha" not in keys:
        about += ", alpha as in the recipe"
    shown = "; ".join(changes)
    return Arm(
        name="@".join([name, *changes]), about=f"{about} ({shown})" if shown else about,
        changes={**_RESET, **own, **keys},
    )  # fmt: skip


def _method(name: str) -> tuple[str, dict[str, Any], Collection[str]]:
    """Description, recipe keys and options of a method of PEFT."""
    from mm_moslora.adapters.peft_methods import method_named

    method = method_named(name)
    own = {"adapter.peft": {"type": method.name}, "adapter.mixer_init": AdapterConfig.mixer_init}
    shared = method.shared
    lacking = [key for key in ("rank", "alpha", "dropout") if key not in shared]
    about = f"PEFT's {method.name}; from the recipe: " + ", ".join(
        [*(f"{key} as {o}" for key, o in shared.items()), "targets"]
    )
    return about + (f"; has no {', '.join(lacking)}" if lacking else ""), own, method.options


def size_lines(arms: Sequence[Arm], recipe: Recipe, reference: str) -> list[str]:
    """A line per arm: what it is, its trainable parameters beside those of the reference, and what it cannot do."""
    sizes = {}
    for arm in arms:
        sizes[arm.name], *_ = [_size(way, way.apply(recipe)) for way in arm.ways]
    own, _ = sizes[reference]
    lines = []
    for arm in arms:
        trained, limits = sizes[arm.name]
        if trained is None:
            said = [f"trainable parameters not counted ({limits[0]})", *limits[1:]]
        else:
            count = f"{trained:,} trainable parameters"
            if arm.alternatives:
                count += f" ({arm.ways[0].name})"
            if own and arm.name != reference:
                count += f", {trained / own:.3g} times those of {reference}"
            said = [count, *limits]
        lines.append(f"  {arm.name}: {'; '.join([arm.about, *said])}")
    return lines


def _size(arm: Arm, recipe: Recipe) -> tuple[int | None, list[str]]:
    """Trainable parameters, None where they cannot be counted; and what an arm cannot do, the reason for None first."""
    from mm_moslora.models.meta_model import build_meta_model

    trained, limits = None, []
    try:
        meta = build_meta_model(recipe.model, recipe.adapter)
    except (MoSLoRAError, OSError, ValueError) as error:
        # Some of PEFT's methods cannot be built without weights.
        if isinstance(error, AdapterError) and not recipe.adapter.peft:
            raise AdapterError(f"Arm {arm.name!r}: {error}") from error
        limits.append(reason_of(error))
    else:
        trained = sum(mine for _, mine in meta.parameters().values())
    return trained, limits
