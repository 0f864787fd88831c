"""Recipes: frozen dataclasses, and their strict way from YAML and back.

A recipe is the only configuration of a run. Unknown keys are errors with a suggestion, every value is checked when the
object is made, and the resolved recipe is written into the run folder.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mm_moslora.errors import ConfigError, suggestion
from mm_moslora.strict import build_strictly, parse_scalar, parse_yaml, plain, set_dotted

Mode = Literal["frozen", "adapter", "last_n", "full"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

RECIPES_FOLDER = Path(__file__).parent / "recipes"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _at_least(name: str, value: float, minimum: float) -> None:
    _require(value >= minimum, f"{name} is {value}, expected at least {minimum}.")


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder."""

    name: str = ""
    """Folder or hub id of a transformers vision model, a timm wrapper folder, or `open_clip:MODEL` by name. Empty with
    `model.vlm`, which brings its own."""
    revision: str | None = None
    """Hub revision (commit, tag or branch)."""
    pretrained: str | None = None
    """open_clip only: pretrained tag or weights file. None gives random weights."""
    feature_layer: int | list[int] = -2
    """Which hidden state feeds the projector (LLaVA: -2); several are laid side by side."""
    fuse_with: str | None = None
    """A second encoder, named as the first; their features are laid side by side (prismatic: DINOv2 and SigLIP)."""
    select: Literal["patch", "cls_patch"] = "patch"
    """`patch` drops the tokens before the first patch (CLS, registers), `cls_patch` keeps CLS."""
    image_size: int | None = None
    """Side in pixels; None keeps the encoder's own."""
    mode: Mode = "frozen"
    """frozen, adapter (MoSLoRA in its linear layers), last_n (train the last blocks) or full."""
    last_n: int = 0
    """Blocks to train when mode is `last_n`."""

    def __post_init__(self) -> None:
        _require(
            (self.mode == "last_n") == (self.last_n > 0),
            f"model.vision: mode is {self.mode!r} and last_n is {self.last_n}; "
            "set last_n >= 1 exactly for mode last_n.",
        )


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector from vision features to the language model's embedding space."""

    kind: str = "mlp2x_gelu"
    """linear, mlp2x_gelu (or mlp3x_gelu and so on), fused_mlp, avg_pool, pixel_shuffle, c_abstractor, perceiver or
    qformer."""
    shuffle: int = 2
    """pixel_shuffle and avg_pool: side of the square of patches that becomes one visual token."""
    queries: int = 64
    """perceiver, qformer and c_abstractor: visual tokens per image (c_abstractor: a square number)."""
    depth: int = 2
    """perceiver, qformer and c_abstractor: blocks (c_abstractor: in either of its two stages)."""
    scale_to_embeddings: bool = False
    """Scale the last layer at initialisation so that visual tokens have the size of word embeddings."""
    weights: str | None = None
    """A `projector.safetensors` to start from (the result of an align stage)."""
    mode: Literal["auto", "frozen", "full"] = "auto"
    """Train it or not; auto trains a projector of our own and leaves that of a ready-made model alone."""

    def __post_init__(self) -> None:
        for name in ("shuffle", "queries", "depth"):
            _at_least(f"model.projector.{name}", getattr(self, name), 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the model is assembled from."""

    language: str | None = None
    """Folder or hub id of any causal language model, to be assembled with `vision` and `projector`."""
    vlm: str | None = None
    """Folder or hub id of a ready-made vision-language model instead, tuned through its own processor."""
    vlm_revision: str | None = None
    """Hub revision of the ready-made model."""
    language_revision: str | None = None
    """Hub revision of the language model."""
    language_mode: Mode = "adapter"
    """frozen, adapter (MoSLoRA), last_n or full."""
    language_last_n: int = 0
    """Decoder layers to train when language_mode is `last_n`."""
    vision: VisionConfig | None = None
    """None tunes the language model alone."""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """Ignored when there is no vision encoder."""
    image_aspect: Literal["pad", "resize", "crop", "anyres"] = "pad"
    """pad to a square with the mean colour (LLaVA-1.5), resize regardless of aspect, resize and centre-crop, or anyres:
    the whole picture and tiles of it, a newline embedding behind every row (LLaVA-NeXT)."""
    anyres_tiles: list[tuple[int, int]] = field(default_factory=lambda: [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
    """anyres only: grids of tiles to choose from by the shape of the picture, rows and columns."""
    chat_template: str | None = None
    """LLaVA's plain, v1, llama_2, llama_3, chatml, mistral, gemma or phi3; None: the tokenizer's own."""
    faithful: bool = False
    """With chat_template: the token ids of LLaVA's own code where that is sound, instead of the tokenizer's."""
    system_prompt: str | None = None
    """Replaces the chat template's default system prompt, in training and in every export; "" leaves it empty."""
    attention: str = "auto"
    """auto picks the fastest exact one for padding-free batches; or a transformers attention name."""
    quantisation: Literal["none", "nf4", "int8"] = "none"
    """Load the assembled language model's linear layers in 4 bits (nf4, double quantised) or 8; needs bitsandbytes."""
    lean_layers: bool = True
    """Let decoder layers of known families keep less for the backward pass; the numbers stay the same."""

    def __post_init__(self) -> None:
        _require(
            (self.language is None) != (self.vlm is None),
            f"model: language is {self.language!r} and vlm is {self.vlm!r}; name exactly one of them: a language model "
            "to assemble, or a ready-made vision-language model.",
        )
        _require(
            self.vision is None or bool(self.vision.name) == (self.vlm is None),
            "model.vision.name names an encoder to assemble: it is needed with model.language, and a ready-made model "
            "(model.vlm) brings its own, so leave it out there.",
        )
        _require(
            (self.language_mode == "last_n") == (self.language_last_n > 0),
            f"model: language_mode is {self.language_mode!r} and language_last_n is {self.language_last_n}; "
            "set language_last_n >= 1 exactly for language_mode last_n.",
        )
        _require(
            self.chat_template is None or self.vlm is None,
            f"model.chat_template is {self.chat_template!r}, but a ready-made model (model.vlm) keeps its own.",
        )
        _require(
            not self.faithful or self.chat_template is not None,
            "model.faithful is set; it means LLaVA's token ids, so set model.chat_template to one of LLaVA's.",
        )
        tiles = self.anyres_tiles
        _require(
            bool(tiles) and all(rows >= 1 and columns >= 1 for rows, columns in tiles),
            f"model.anyres_tiles is {tiles}, expected at least one pair of rows and columns, each 1 or more.",
        )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """MoSLoRA: y = W0 x + s * B M A dropout(x)."""

    rank: int = 64
    """r, the size of the mixer."""
    alpha: float = 128.0
    """s = alpha / rank (or alpha / sqrt(rank) with use_rslora)."""
    dropout: float = 0.0
    """Dropout on the adapter's input."""
    mixer_init: Literal["orthogonal", "kaiming", "identity", "butterfly"] = "orthogonal"
    """orthogonal keeps LoRA's scale; kaiming is the paper's best; identity + frozen mixer is plain LoRA."""
    mixer_trainable: bool = True
    """False freezes the mixer (identity: LoRA; butterfly: two-subspaces-mixing)."""
    mixer_pattern: dict[str, str] = field(default_factory=dict)
    """Per-module override of mixer_init, by regular expression on the module path."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Per-module override of rank."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Per-module override of alpha."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(rank)."""
    use_dora: bool = False
    """Train the length of every row of the adapted weight apart from its direction (DoRA, 2402.09353)."""
    targets: str | list[str] = "all-linear"
    """all-linear (every linear layer but the head) or names of linear layers, within the adapted component."""
    weights: str | None = None
    """Adapter folder to start from (ours, a `Trainer`'s, plain LoRA of PEFT): its factors and modules instead of fresh
    ones. rank and alpha must be those of the folder."""

    def __post_init__(self) -> None:
        _at_least("adapter.rank", self.rank, 1)
        _require(0.0 <= self.dropout < 1.0, f"adapter.dropout is {self.dropout}, expected 0 <= dropout < 1.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training records."""

    path: str
    """LLaVA JSON or JSONL, .parquet, .arrow, webdataset .tar (`*` and {000..012} allowed), a folder, or hf:NAME."""
    format: Literal["auto", "json", "table", "webdataset"] = "auto"
    """auto tells it by the path; table is a Hugging Face dataset."""
    image_folder: str | None = None
    """Images are looked up below this folder and may not leave it. None: the folder of `path`."""
    image_hosts: list[str] = field(default_factory=list)
    """Hosts from which pictures named by URL are fetched, once; none is allowed unless it is named here."""
    weight: float = 1.0
    """How often each record is seen per epoch (0.5: every other one, 2: twice), or its part (data.mixing: parts)."""
    limit: int | None = None
    """Use at most this many records."""
    limit_by: Literal["random", "first"] = "random"
    """Which records a limit takes: a fixed random choice, or the first ones."""
    follow_links: bool = False
    """Accept symbolic links that lead out of the image folder (download caches that link to a store need it)."""
    subset: str | None = None
    """Hugging Face datasets: the configuration's name."""
    split: str = "train"
    """Hugging Face datasets: the split."""
    revision: str | None = None
    """Hugging Face datasets: commit, tag or branch."""
    columns: dict[str, str] = field(default_factory=dict)
    """Hugging Face datasets: our name and theirs, such as question: query, answer: label, image: picture."""
    streaming: bool = False
    """Hugging Face datasets: read the first `limit` rows of a stream once, instead of fetching the whole."""

    def __post_init__(self) -> None:
        here = f"data source {self.path!r}"
        _require(0 < self.weight <= 1e6, f"{here}: weight is {self.weight}, expected more than 0, finite.")
        _require(self.limit is None or self.limit >= 1, f"{here}: limit is {self.limit}, expected 1 or more.")
        _require(
            not self.streaming or (self.limit is not None and self.limit_by == "first"),
            f"{here}: streaming is set, so set limit too, and limit_by: first; a stream is read as far as that.",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on, and in which order."""

    train: list[SourceConfig] = field(default_factory=list)
    """Sources that are mixed."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Held-out sources for the validation loss; may be empty."""
    mixing: Literal["repeats", "parts"] = "repeats"
    """What weights mean: repeats per record, or parts of the epoch (weight 3 and 1: three quarters and one)."""
    epoch_records: int | None = None
    """mixing parts only: records per epoch; None: as many as there are."""
    max_length: int = 2048
    """Tokens per example, visual tokens included. Longer ones lose whole turns at the end; an image is never cut."""
    order: Literal["grouped", "llava", "random", "sequential"] = "grouped"
    """grouped: by modality and length, so that ranks finish together; llava: the same records per step as LLaVA's
    own grouping; random; or sequential, as in the files."""
    on_bad: Literal["error", "quarantine"] = "quarantine"
    """What to do with a record that cannot be used: stop, or write it to quarantine.jsonl and go on."""
    max_bad_share: float = 0.01
    """Above this share of bad records the run stops."""
    workers: int = 0
    """Processes that prepare examples ahead of the step; 0 prepares them in a thread."""
    cache: str | None = None
    """Folder that keeps tokenised records, so that each is tokenised once for all runs; None: no cache."""
    pack_tokens: int = 0
    """Pack examples into rows of up to this many tokens; train.global_batch and micro_batch then count rows. 0: off."""

    def __post_init__(self) -> None:
        _at_least("data.max_length", self.max_length, 8)
        _at_least("data.workers", self.workers, 0)
        _require(
            self.pack_tokens == 0 or self.pack_tokens >= self.max_length,
            f"data.pack_tokens is {self.pack_tokens}, expected 0 or at least data.max_length ({self.max_length}).",
        )
        _require(
            self.epoch_records is None or (self.mixing == "parts" and self.epoch_records >= 1),
            f"data.epoch_records is {self.epoch_records}; it needs data.mixing: parts and 1 or more.",
        )
        _require(0 <= self.max_bad_share <= 1, f"data.max_bad_share is {self.max_bad_share}, expected 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, one learning rate per kind of parameter, linear warm-up."""

    lr: float = 2e-4
    """Peak learning rate of adapter factors A and B (and of fully trained language layers)."""
    mixer_lr: float | None = None
    """Peak learning rate of the mixers; None: lr."""
    projector_lr: float | None = None
    """Peak learning rate of the projector; None: lr."""
    vision_lr: float | None = None
    """Peak learning rate of trained vision layers and of adapters in the encoder; None: lr."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B divided by that of A (LoRA+, 2402.12354)."""
    weight_decay: float = 0.0
    """Decoupled; never applied to mixers, biases and norms."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moving averages."""
    eps: float = 1e-8
    """Adam's epsilon."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warm-up, down to min_lr_ratio."""
    warmup: float = 0.03
    """Below 1: share of all steps; from 1 on: number of steps."""
    min_lr_ratio: float = 0.0
    """Last learning rate divided by the peak."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm; 0 switches clipping off."""

    def __post_init__(self) -> None:
        for name in ("lr", "mixer_lr", "projector_lr", "vision_lr"):
            value = getattr(self, name)
            _require(value is None or value >= 0, f"optim.{name} is {value}, expected 0 or more.")
        _at_least("optim.warmup", self.warmup, 0)
        _at_least("optim.max_grad_norm", self.max_grad_norm, 0)
        _require(self.lora_plus_ratio > 0, f"optim.lora_plus_ratio is {self.lora_plus_ratio}, expected more than 0.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run."""

    output: str = "runs/run"
    """Run folder."""
    epochs: float = 1.0
    """Passes over the data; ignored when steps is set."""
    steps: int | None = None
    """Optimiser steps."""
    global_batch: int = 16
    """Examples per optimiser step, over all ranks and accumulation."""
    micro_batch: int = 4
    """Examples per forward pass and rank."""
    zero: str = "zero2"
    """DeepSpeed preset (zero0, zero1, zero2, zero3, ...), path of a DeepSpeed JSON file, or `none` for plain torch."""
    precision: Precision = "auto"
    """auto: bf16 where the hardware computes it fast, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the language model's backward pass."""
    vision_gradient_checkpointing: bool = False
    """Recompute activations in the vision encoder's backward pass; pays only when the encoder trains."""
    seed: int = 0
    """Seeds initialisation, data order and dropout."""
    save_every: int = 0
    """Optimiser steps between checkpoints; 0: only the last."""
    keep_last: int = 2
    """Checkpoints to keep; older ones go once a newer one is verified. 0 keeps all."""
    keep_every: int = 0
    """Also keep the checkpoints whose step is a multiple of this; 0: none."""
    background_save: bool = True
    """Write checkpoints while training goes on, from a copy in main memory."""
    rehearsal: bool = True
    """Before the first step: a self-test of the engine, the largest micro-batch, and a checkpoint on trial."""
    validate_every: int = 0
    """Optimiser steps between validations; 0: only at the end."""
    log_every: int = 1
    """Optimiser steps between metric records."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row with a loss or gradient that is not finite."""
    timeout_minutes: float = 30.0
    """Limit of a collective operation between ranks, of the first step, and of a save or a validation."""
    step_timeout_minutes: float = 10.0
    """Limit of one optimiser step after the first; a rank that hangs is named, with its stacks, and the run ends."""

    def __post_init__(self) -> None:
        _at_least("train.global_batch", self.global_batch, 1)
        _at_least("train.micro_batch", self.micro_batch, 1)
        _require(
            self.global_batch % self.micro_batch == 0,
            f"train.global_batch is {self.global_batch}, expected a multiple of train.micro_batch "
            f"({self.micro_batch}).",
        )
        _require(self.steps is None or self.steps >= 1, f"train.steps is {self.steps}, expected 1 or more.")
        _require(self.epochs > 0, f"train.epochs is {self.epochs}, expected more than 0.")
        for name in ("timeout_minutes", "step_timeout_minutes"):
            _require(getattr(self, name) > 0, f"train.{name} is {getattr(self, name)}, expected more than 0.")
        for name in ("keep_last", "keep_every", "save_every", "validate_every"):
            _at_least(f"train.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class ValidateConfig:
    """What is measured during the run, every `train.validate_every` steps, besides the held-out loss."""

    samples: int = 0
    """Held-out records (data.validation) whose answers are written out, with their pictures."""
    sample_tokens: int = 64
    """Longest written-out answer, tokens."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of the evaluation harness; each gives metrics named `eval/TASK/METRIC`."""
    task_limit: int = 64
    """Documents per task; 0: all."""
    best: str | None = None
    """Metric that names the best checkpoint, which is kept: validation_loss, or eval/TASK/METRIC."""
    best_is: Literal["auto", "lowest", "highest"] = "auto"
    """auto: lowest for losses and perplexities, highest for all others."""
    patience: int = 0
    """Stop after this many validations in a row without a better `best`; 0: never."""

    def __post_init__(self) -> None:
        for name in ("samples", "task_limit", "patience"):
            _at_least(f"validate.{name}", getattr(self, name), 0)
        _at_least("validate.sample_tokens", self.sample_tokens, 1)
        _require(
            self.patience == 0 or self.best is not None,
            f"validate.patience is {self.patience}, but validate.best names no metric. Set it: validation_loss.",
        )


@dataclass(frozen=True, kw_only=True)
class TrackConfig:
    """Where metrics go besides metrics.jsonl, which is always written."""

    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Any of tensorboard, wandb, trackio, mlflow."""
    project: str = "mm_moslora"
    """wandb project."""
    entity: str | None = None
    """wandb entity; None: the account's own."""
    name: str | None = None
    """Run name; None: the name of the run folder."""
    mixers_every: int = 0
    """Log what the mixers learned every this many steps (`mixer/...`: distances, rank, condition); 0: never."""

    def __post_init__(self) -> None:
        _at_least("track.mixers_every", self.mixers_every, 0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a run."""

    name: str = "run"
    """For people."""
    model: ModelConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)
    track: TrackConfig = field(default_factory=TrackConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every default filled in."""
        return typing.cast(dict[str, Any], plain(self))

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `Recipe.from_yaml` reads it back equal."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
        """Build a recipe from plain data.

        Args:
            data: nested mappings with the field names of the dataclasses.
            source: where the data came from, for messages.

        Raises:
            ConfigError: an unknown key, a wrong type or an impossible value.
        """
        return build_strictly(cls, data, source=source)

    @classmethod
    def from_yaml(cls, text: str, *, source: str = "recipe") -> Recipe:
        """Build a recipe from YAML text; see `from_dict`."""
        return cls.from_dict(parse_yaml(text, source=source), source=source)


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by path or by the name of a shipped preset, and apply dotted overrides.

    Args:
        name_or_path: a YAML file, one of `recipe_names()`, or the folder of a run or checkpoint.
        overrides: `optim.lr=1e-4` items; values are read as YAML, list items are addressed by number.

    Raises:
        ConfigError: no such recipe, an unknown key or an impossible value.
    """
    path = Path(name_or_path)
    if path.is_dir():
        path = _recipe_of_run(path)
    if not path.is_file():
        preset = RECIPES_FOLDER / f"{name_or_path}.yaml"
        if path.suffix in (".yaml", ".yml") or not preset.is_file():
            raise ConfigError(
                f"No recipe {str(name_or_path)!r}: neither a file nor a preset."
                f"{suggestion(str(name_or_path), recipe_names())} Presets: {', '.join(recipe_names())}."
            )
        path = preset
    data = parse_yaml(path.read_text(encoding="utf-8"), source=str(path))
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"Override {item!r} is not of the form key=value, such as optim.lr=1e-4.")
        set_dotted(data, key.strip().lstrip("-").split("."), parse_scalar(value), item)
    return Recipe.from_dict(data, source=str(path))


def _recipe_of_run(folder: Path) -> Path:
    """The resolved recipe that a run left in its newest checkpoint."""
    found = [folder / "config.yaml", *sorted(folder.glob("checkpoint-*/config.yaml"), reverse=True)]
    for path in found:
        if path.is_file():
            return path
    raise ConfigError(f"{folder} is a folder without config.yaml, neither a checkpoint nor a run with checkpoints.")


def recipe_names() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


def override_items(tokens: Sequence[str]) -> list[str]:
    """Turn `--optim.lr 1e-4`, `--optim.lr=1e-4` and `optim.lr=1e-4` into `optim.lr=1e-4`.

    Raises:
        ConfigError: a key without a value.
    """
    items, waiting = [], None
    for token in tokens:
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
