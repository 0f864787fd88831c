"""The whole recipe: reading from YAML and writing back, presets by name, overrides."""

from __future__ import annotations

import copy
import logging
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml

from mm_moslora.config.data_config import DataConfig
from mm_moslora.config.inherited_settings import with_inherited
from mm_moslora.config.model_config import AdapterConfig, ModelConfig
from mm_moslora.config.optimizer_traits import OPTIMIZERS
from mm_moslora.config.preference_config import GrpoConfig, KtoConfig, Objective, PreferenceConfig, refuse_unfit
from mm_moslora.config.recipe_paths import from_working_folder
from mm_moslora.config.run_config import OptimConfig, TrackConfig, TrainConfig, ValidateConfig
from mm_moslora.config.strict_reading import kind_at, parse_scalar, parse_text, plain, set_dotted, takes_text
from mm_moslora.config.usual_names import OF_OTHER_TRAINERS
from mm_moslora.config.value_checks import require
from mm_moslora.utils.errors import ConfigError, suggestion
from mm_moslora.utils.run_paths import checkpoints
from mm_moslora.utils.untrusted_data import build_strictly, parse_yaml
from mm_moslora.utils.untrusted_files import opened, read_text

logger = logging.getLogger(__name__)

RECIPES_FOLDER = Path(__file__).with_name("recipes")
R = TypeVar("R", bound="YamlRecipe")


@dataclass(frozen=True, kw_only=True)
class YamlRecipe:
    """Base of recipe dataclasses: reading from YAML and plain data, and writing back."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in."""
        return typing.cast(dict[str, Any], plain(self))

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `from_yaml` reads it back equal."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "recipe") -> Self:
        """Build a recipe from plain data.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        for path in leaves(data):
            here = OF_OTHER_TRAINERS.get(path.rpartition(".")[2])
            if here and kind_at(cls, path.split(".")) is None and kind_at(cls, here.split(".")) is not None:
                raise ConfigError(f"{source}: unknown key {path!r}. Did you mean {here!r}?")
        return build_strictly(cls, _at_home(data), source=source)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe") -> Self:
        """Build a recipe from YAML text; see `from_dict`."""
        return cls.from_dict(parse_yaml(text, source=source), source=source)


@dataclass(frozen=True, kw_only=True)
class Recipe(YamlRecipe):
    """The complete configuration of a run."""

    name: str = "run"
    """Display name."""
    objective: Objective = "sft"
    """sft: learn the answers of records. With TRL: dpo from pairs of a chosen and a rejected answer (see `preference`),
    kto from good and bad answers (see `kto`), grpo from rewards of generated answers (see `grpo`)."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    """objective dpo only."""
    kto: KtoConfig = field(default_factory=KtoConfig)
    """objective kto only."""
    grpo: GrpoConfig = field(default_factory=GrpoConfig)
    """objective grpo only."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def __post_init__(self) -> None:
        for objective, section in (("dpo", "preference"), ("kto", "kto"), ("grpo", "grpo")):
            value = getattr(self, section)
            require(
                self.objective == objective or value == type(value)(),
                f"{section} is set, which only objective: {objective} reads. Set the objective, or leave it out.",
            )
        if self.objective != "sft":
            refuse_unfit(
                self.objective,
                model=self.model,
                adapter=self.adapter,
                data=self.data,
                optim=self.optim,
                train=self.train,
                validate=self.validate,
                track=self.track,
                kto=self.kto,
                grpo=self.grpo,
            )
        require(
            self.train.compile is None or self.model.kernels not in ("triton", "liger"),
            f"model.kernels is {self.model.kernels!r} and train.compile is {self.train.compile!r}: both would run "
            "between the matrix products of lean layers. Leave train.compile out, or set model.kernels to auto.",
        )
        require(
            self.data.train_on == "answers" or (self.model.vision is None and self.model.vlm is None),
            f"data.train_on is {self.data.train_on!r} and {'model.vlm' if self.model.vlm else 'model.vision'} is set: "
            "no loss can be on pictures. Leave data.train_on out.",
        )
        require(
            not self.data.endless or self.train.steps is not None,
            "a source of data.train has streaming without limit, so it has no end: set train.steps.",
        )
        budget, longest = self.train.micro_tokens, self.data.longest
        require(
            budget is None or budget >= longest,
            f"train.micro_tokens is {budget}, expected at least {self.data.longest_key} ({longest}): an example, or a "
            "packed row, is never cut. Raise it, lower the other, or leave it out.",
        )

    def for_ranks(self, world: int, *, before: str | None = None) -> Recipe:
        """The recipe with the preset that `train.zero: auto` chooses.

        Args:
            before: the preset of the checkpoint that the run continues; None: it starts. Plain torch, which runs one
                process, is not continued on several.
        """
        train = self.train
        if train.zero != "auto":
            return self
        takers = world // train.sequence_parallel
        several = train.micro_tokens is not None or train.global_batch > train.micro_batch * takers
        small = self.model.language_mode in ("adapter", "frozen")  # ZeRO-1 keeps all gradients on every rank
        earlier = None if before == "none" and world > 1 else before
        whole = bool(OPTIMIZERS[self.optim.optimizer].whole_because)
        chosen = earlier or ("zero0" if whole else "zero1" if several and small else "zero2")
        return replace(self, train=replace(train, zero=chosen))


def require_sft(recipe: Recipe, verb: str) -> None:
    """Refuse a recipe that learns from preferences, for a verb that is about tuning."""
    require(
        recipe.objective == "sft",
        f"`{verb}` takes recipes with objective: sft, and objective is {recipe.objective}. What it would say holds for "
        "tuning alone.",
    )


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by the name of a shipped preset, and apply dotted overrides.

    Args:
        name_or_path: a YAML file, one of `recipe_names()`, or the folder of a run or checkpoint.
        overrides: `optim.lr=1e-4` items. Relative paths start at the working directory (in a recipe file: at that
            file). Values are read as YAML unless the key takes only text. List items are addressed by number; the
            number after the last item appends one.

    Raises:
        ConfigError: no such recipe, an unknown key or an impossible value; names the override that causes the error.
    """
    return read_recipe(Recipe, name_or_path, overrides, presets=RECIPES_FOLDER)


def read_recipe(kind: type[R], name_or_path: str | Path, overrides: Sequence[str] = (), *, presets: Path) -> R:
    """Read a recipe of any kind; see `load_recipe`."""
    path = Path(name_or_path)
    resolved = path.is_dir()  # a run's: it names every key
    if resolved:
        path = _recipe_of_run(path)
    is_file = path.is_file()
    if not is_file:
        preset = presets / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml") or not preset.is_file():
            raise ConfigError(
                f"No recipe {str(name_or_path)!r}: neither a file nor a preset."
                f"{suggestion(str(name_or_path), recipe_names(presets))} Presets: {', '.join(recipe_names(presets))}."
            )
        path = preset
    elif _holds_records(path):
        names = ", ".join(recipe_names(presets))
        raise ConfigError(
            f"{path} holds data, expected a recipe. Name the data in one: RECIPE --data.train '[{{path: {path}, "
            f"image_folder: FOLDER}}]', where RECIPE is a YAML file, a run or a preset ({names})."
        )
    data = parse_yaml(read_text(path), source=str(path))
    if is_file and path.resolve().parent != presets.resolve():
        typed = [item.partition("=")[0].strip().lstrip("-") for item in overrides]
        data = from_working_folder(data, path.parent, source=str(path), typed=typed)
    inherits = kind is Recipe and not resolved

    def build(items: Sequence[str]) -> tuple[R, list[str]]:
        changed = _overridden(kind, data, items)
        changed, remarks = with_inherited(changed) if inherits else (changed, [])
        return kind.from_dict(changed, source=str(path)), remarks

    try:
        recipe, remarks = build(overrides)
    except ConfigError as error:
        if not (guilty := _guilty(build, overrides, str(error))):
            raise
        word = "Override" if len(guilty) == 1 else "Overrides"
        what = str(error).removeprefix(f"{path}: ")
        raise ConfigError(f"{word} {', '.join(map(repr, guilty))}: {what}") from error
    for remark in remarks:
        logger.warning("%s: %s", path, remark)
    return recipe


def _overridden(kind: type[YamlRecipe], data: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The plain data of a recipe with the overrides applied."""
    changed: dict[str, Any] = copy.deepcopy(dict(data))
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"Override {item!r} is not of the form key=value, such as optim.lr=1e-4.")
        keys = key.strip().lstrip("-").split(".")
        set_dotted(kind, changed, keys, parse_text(value) if takes_text(kind, keys) else parse_scalar(value), item)
    return changed


def leaves(data: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a recipe's dictionary by dotted key; empty lists and dictionaries are values."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    below = {key: leaf for name, item in items for key, leaf in leaves(item, f"{prefix}{name}.").items()}
    return below or {prefix.rstrip("."): data}


def _guilty(build: Callable[[Sequence[str]], object], overrides: Sequence[str], message: str) -> list[str]:
    """The overrides that cause an error: removing one of them removes the error, or else changes it."""
    cured, changed = [], []
    for number, item in enumerate(overrides):
        try:
            build([*overrides[:number], *overrides[number + 1 :]])
            cured.append(item)
        except ConfigError as error:
            changed += [item] if str(error) != message else []
    return cured or changed


def _holds_records(path: Path) -> bool:
    """Whether a file is training data by its name, or is a JSON list."""
    if path.suffix == ".json":
        with opened(path, most=None) as stream:
            return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    return path.name.lower().endswith((".jsonl", ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tsv"))


def _at_home(data: Any) -> Any:
    """Plain data with a leading `~` expanded to the home folder."""
    if isinstance(data, str) and data.startswith("~/"):
        return str(Path(data).expanduser())
    if isinstance(data, Mapping):
        return {key: _at_home(item) for key, item in data.items()}
    return [_at_home(item) for item in data] if isinstance(data, list) else data


def _recipe_of_run(folder: Path) -> Path:
    """The resolved recipe in the newest checkpoint of a run."""
    files = [item / "config.yaml" for item in (folder, *(item for _, item in reversed(checkpoints(folder))))]
    for path in files:
        if path.is_file():
            return path
    raise ConfigError(f"{folder} is a folder without config.yaml, neither a checkpoint nor a run with checkpoints.")


def recipe_names(presets: Path = RECIPES_FOLDER) -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def override_items(tokens: Sequence[str]) -> list[str]:
    """Turn `--optim.lr 1e-4`, `--optim.lr=1e-4` and `optim.lr=1e-4` into `optim.lr=1e-4`.

    Raises:
        ConfigError: a key without a value, or an option that is neither the command's nor a key.
    """
    items, waiting = [], None
    for token in tokens:
        if waiting is None and token.startswith("--"):
            _refuse_option(token[2:].partition("=")[0])
        if waiting is not None:
            items.append(f"{waiting}={token}")
            waiting = None
        elif "=" in token:
            items.append(token.lstrip("-"))
        elif token.startswith("--"):
            waiting = token.lstrip("-")
        else:
            raise ConfigError(f"{token!r} is no override. Write --key value or key=value, such as --optim.lr 1e-4.")
    if waiting is not None:
        raise ConfigError(f"--{waiting} has no value. Write --{waiting} VALUE.")
    return items


def _refuse_option(key: str) -> None:
    """Refuse a key without a section, which is most likely a misspelt option of the command."""
    if "." not in key and key not in {item.name for item in fields(Recipe)}:
        here = OF_OTHER_TRAINERS.get(key)
        hint = f" Did you mean --{here}?" if here else ""
        raise ConfigError(
            f"No option --{key}.{hint} Keys of the recipe carry their section, such as --optim.lr 1e-4; the command's "
            "own options are in its --help."
        )
