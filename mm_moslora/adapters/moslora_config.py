"""`MoSLoRAConfig`: PEFT's `LoraConfig` with a mixer."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mm_moslora.adapters.folder_format import (
    OWN_CONFIG,
    OWN_TYPE,
    STOCK_CONFIG,
    USE_MIXER,
    declares_mixers,
    downloaded,
    read_json,
    read_manifest,
)
from mm_moslora.adapters.folders.authors_format import check_options, mixer_settings, peft_tensors, with_known_names
from mm_moslora.adapters.folders.permitted_options import permitted_options
from mm_moslora.adapters.folders.save_folder import complete_folder
from mm_moslora.adapters.layers.expert_parameters import check_expert_options
from mm_moslora.adapters.mixer import MIXER_INITS, NO_MIXER, MixerInit, check_mixer_init, form_named
from mm_moslora.utils.errors import AdapterError, suggestion

# These give the product B A a meaning at the start (a part of the base weight, or zero by construction).
_MEANINGFUL_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica", "orthogonal")
# These take their start out of the base weight: A and B mean nothing without the same start.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Other changes of the LoRA branch. Each would need its own combination with the mixer.
_OTHER_VARIANTS = ("use_qalora", "arrow_config", "alora_invocation_tokens")
# These have other tensors than A and B, or put them elsewhere; an adapter folder has no place for that.
_OTHER_LAYOUTS = (
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
    "megatron_config",
    "layer_replication",
)

_PATTERNS = ("rank_pattern", "alpha_pattern", "mixer_pattern")

FactorForm = Literal["free", "mixed", "svd", "stella", "orthonormal"]


@dataclass
class MoSLoRAConfig(LoraConfig):
    """LoRA with a mixer between A and B: ``y = W0 x + s * B M A dropout(x)`` (arXiv 2406.11909).

    Every field of `peft.LoraConfig` keeps its meaning; `peft.get_peft_model` takes it as it is.

    Raises:
        AdapterError: an unknown mixer, a rank below 1, or an option that contradicts the mixer.
    """

    # `is_lora_variant` makes PEFT's own layers refuse this configuration instead of ignoring the mixer.
    mixer_init: MixerInit = field(
        default="orthogonal",
        metadata={
            "help": "How M starts: orthogonal, kaiming, identity or butterfly (two-subspaces mixing).",
            "is_lora_variant": True,
        },
    )
    mixer_trainable: bool = field(
        default=True,
        metadata={"help": "False freezes M. Identity and frozen is plain LoRA, bit for bit."},
    )
    mixer_pattern: dict[str, str] = field(
        default_factory=dict,
        metadata={
            "help": "Module name, or regular expression on its end, to mixer_init, or to none (no mixer); "
            "like rank_pattern."
        },
    )
    mixer_form: str = field(
        default="dense",
        metadata={
            "help": "What M is made of: dense (R x R weights), diagonal (R weights, one per rank-1 subspace, starting "
            "at 1), block_diagonal:4 (4 blocks), low_rank:4 (the identity and a product of rank 4), or a name of your "
            "own in MIXER_FORMS."
        },
    )
    factor_form: FactorForm = field(
        default="free",
        metadata={
            "help": "free: A and B train. mixed: A starts as M A, without a mixer from there (plain LoRA). svd: A and "
            "B are frozen at the base weight's leading singular vectors, M trains (LoRA-XS, arXiv 2405.17604). stella: "
            "A and B stay orthonormal, M starts as the identity (StelLA, arXiv 2510.01938). orthonormal: A and B stay "
            "orthonormal, M starts at zero. For the last two call keep_orthonormal on the optimiser."
        },
    )

    # What makes the adapted layer around a base layer, by the type of that; `tuner` fills it in.
    layer_classes: ClassVar[dict[type[nn.Module], Callable[..., nn.Module]]] = {}
    # Where the layer sits; `create_layer` sets it on its own copy. Without annotation: not an option, and not saved.
    module_path = ""

    def __post_init__(self) -> None:
        """Check the options, and route every adapted layer to this package's layers."""
        self._check_kinds()
        super().__post_init__()
        check_mixer_init(self.mixer_init, "mixer_init")
        for key, kind in self.mixer_pattern.items():
            check_mixer_init(kind, f"mixer_pattern[{key!r}]", known=(*MIXER_INITS, NO_MIXER))
        self._check_ranks()
        self._check_forms()
        for name in _OTHER_LAYOUTS:
            if getattr(self, name):
                raise AdapterError(
                    f"{name} is set, and adapters with it are more than A and B of modules, which is all that a mixer "
                    "goes with and that is saved and loaded here. Unset it, or use peft.LoraConfig."
                )
        if self.has_mixer or self.factor_form == "mixed":
            self._check_other_options()
        if self.target_parameters:
            check_expert_options(self, form_named(self.mixer_form))
        self._register_custom_module(dict(self.layer_classes))  # type: ignore[arg-type]

    @property
    def has_mixer(self) -> bool:
        """Whether any module can get a mixer that is not the frozen identity."""
        kinds = {self.mixer_init, *self.mixer_pattern.values()} - {NO_MIXER}
        return self.factor_form != "mixed" and (self.mixer_trainable or kinds != {"identity"})

    @property
    def changes_base(self) -> bool:
        """Whether the start of A and B is taken out of the base weight (PiSSA and its like)."""
        init = self.init_lora_weights
        return isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS)

    def mixer_for(self, module_path: str) -> str:
        """The initialisation of one module's mixer, or `none`; `mixer_pattern` goes before `mixer_init`."""
        return str(self.mixer_pattern.get(get_pattern_key(list(self.mixer_pattern), module_path), self.mixer_init))

    def rank_for(self, module_path: str) -> int:
        """The rank of one module; `rank_pattern` goes before `r`."""
        patterns = self.rank_pattern or {}
        return int(patterns.get(get_pattern_key(list(patterns), module_path), self.r))

    def alpha_for(self, module_path: str) -> float:
        """alpha of one module; `alpha_pattern` goes before `lora_alpha`."""
        patterns = self.alpha_pattern or {}
        return float(patterns.get(get_pattern_key(list(patterns), module_path), self.lora_alpha))

    def scaling_for(self, module_path: str) -> float:
        """s of one module: ``alpha / R``, or ``alpha / sqrt(R)`` with `use_rslora`."""
        rank = self.rank_for(module_path)
        return self.alpha_for(module_path) / (math.sqrt(rank) if self.use_rslora else rank)

    def is_plain(self, module_path: str) -> bool:
        """Whether one module is plain LoRA: it has no mixer, or the frozen identity."""
        kind = self.mixer_for(module_path)
        return self.factor_form == "mixed" or kind == NO_MIXER or (not self.mixer_trainable and kind == "identity")

    def to_lora_config(self, **changes: Any) -> LoraConfig:
        """The same options without the mixer, as stock PEFT's `LoraConfig`.

        Args:
            **changes: fields of `LoraConfig` to replace.
        """
        names = {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config"}
        values = {name: getattr(self, name) for name in names} | changes
        values.pop("peft_type", None)
        return LoraConfig(**values)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json` for stock PEFT; called by `PeftModel.save_pretrained` after the weights.

        When the weights with mixers lie in the folder already, the folder becomes the double folder of `save_adapter`:
        stock PEFT would otherwise load them, drop the mixers and compute wrong results silently.
        """
        complete_folder(Path(save_directory), self, auto_mapping=kwargs.get("auto_mapping_dict"))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> MoSLoRAConfig:
        """Read the configuration of an adapter folder.

        Args:
            pretrained_model_name_or_path: a folder of `save_adapter`, of the authors' fork of PEFT, or of stock PEFT
                (then: frozen identity mixer).
            subfolder: folder inside it.
            **kwargs: as for `peft.LoraConfig.from_pretrained`, for folders of other libraries.

        Raises:
            AdapterError: a damaged file, an adapter of another method, or mixers whose configuration is lost.
        """
        folder = downloaded(pretrained_model_name_or_path, (OWN_CONFIG,), subfolder=subfolder, **kwargs)
        if folder is not None and (folder / OWN_CONFIG).is_file():
            return config_from_dict(read_manifest(folder)["config"])
        told = Path(pretrained_model_name_or_path, subfolder or "") if folder is None else folder
        data = read_json(told / STOCK_CONFIG) if (told / STOCK_CONFIG).is_file() else None
        if folder is not None:
            if data is not None and declares_mixers(data):
                return read_authors(folder, data)[0]
            raise AdapterError(
                f"{folder} holds mixers and no configuration of them ({OWN_CONFIG}, or {USE_MIXER} in {STOCK_CONFIG}). "
                "Copy the whole folder, or save the adapter again."
            )
        kind = "LORA" if data is None else data.get("peft_type")
        if data is not None and kind == OWN_TYPE:
            return config_from_dict(data)
        if kind != "LORA":
            raise AdapterError(
                f"{told} holds an adapter of peft_type {kind!r}, expected LORA. Load it with PEFT itself."
            )
        stock = LoraConfig.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if not isinstance(stock, LoraConfig):  # from the hub
            raise AdapterError(
                f"{told} holds a {type(stock).__name__}, expected a LoraConfig. Load it with PEFT itself."
            )
        return from_lora_config(stock)

    def _check_forms(self) -> None:
        known = get_args(FactorForm)
        if self.factor_form not in known:
            raise AdapterError(
                f"factor_form is {self.factor_form!r}, expected one of {', '.join(known)}."
                f"{suggestion(str(self.factor_form), known)}"
            )
        form = form_named(self.mixer_form)
        for rank in {self.r, *(self.rank_pattern or {}).values()}:
            form.check(rank)
        placed = self.factor_form in ("svd", "stella", "orthonormal")
        if self.mixer_form == "dense" and self.factor_form == "free":
            return
        where = f"mixer_form={self.mixer_form!r}, factor_form={self.factor_form!r}"
        if not self.mixer_trainable and self.factor_form != "mixed":
            raise AdapterError(f"{where} needs a mixer that trains. Set mixer_trainable=True.")
        asked = {self.mixer_init, *self.mixer_pattern.values()} - {NO_MIXER}
        if (placed or not form.inits) and asked != {"orthogonal"}:
            raise AdapterError(
                f"{where} brings its own start of the mixer. Leave mixer_init at its default, and let mixer_pattern "
                "say none at most."
            )
        if unknown := sorted(asked - set(form.inits)) if form.inits else []:
            raise AdapterError(f"{where} has no start {unknown[0]!r}, expected one of {', '.join(form.inits)}.")
        if placed and self.mixer_pattern:
            raise AdapterError(f"{where} needs a mixer in every module. Leave mixer_pattern out.")
        if self.factor_form in ("svd", "orthonormal") and self.mixer_form != "dense":
            raise AdapterError(f"{where}: fixed subspaces need a dense mixer. Use one of the two.")
        if self.factor_form == "stella" and self.mixer_form not in ("dense", "diagonal"):
            raise AdapterError(
                f"{where}: StelLA's middle factor is dense or diagonal. Set mixer_form to one of the two."
            )
        if placed and self.use_dora:
            raise AdapterError(f"{where} together with use_dora is not defined. Unset one of them.")
        if self.factor_form == "mixed" and not form.fixed:
            raise AdapterError(f"{where}: a mixer that depends on its input cannot be folded into A.")

    def _check_kinds(self) -> None:
        if not isinstance(self.mixer_trainable, bool):
            raise AdapterError(f"mixer_trainable is {self.mixer_trainable!r}, expected True or False.")
        for name in _PATTERNS:
            patterns = getattr(self, name)
            if patterns is None:
                setattr(self, name, {})
            elif not isinstance(patterns, dict):
                raise AdapterError(
                    f"{name} is {patterns!r}, expected a dictionary from module names (or regular expressions for the "
                    "end of a module path) to values."
                )
        expressions = {f"{name}[{key!r}]": key for name in _PATTERNS for key in getattr(self, name)}
        for name in ("target_modules", "exclude_modules"):
            if isinstance(value := getattr(self, name), str):
                expressions[name] = value
        for where, expression in expressions.items():
            check_expression(expression, where)

    def _check_ranks(self) -> None:
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in (self.rank_pattern or {}).items()}
        for where, rank in ranks.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise AdapterError(f"{where} is {rank!r}, expected a whole number of at least 1.")
        alphas = {f"alpha_pattern[{key!r}]": alpha for key, alpha in (self.alpha_pattern or {}).items()}
        for where, alpha in ({"lora_alpha": self.lora_alpha} | alphas).items():
            if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha == 0:
                raise AdapterError(f"{where} is {alpha!r}, expected a number other than 0, which would adapt nothing.")
        dropout: Any = self.lora_dropout
        if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0.0 <= dropout < 1.0:
            raise AdapterError(f"lora_dropout is {dropout!r}, expected 0 <= lora_dropout < 1.")

    def _check_other_options(self) -> None:
        init = self.init_lora_weights
        plain_start = self.mixer_init == "identity" and set(self.mixer_pattern.values()) <= {"identity", NO_MIXER}
        meaningful = isinstance(init, str) and init.lower().startswith(_MEANINGFUL_INITS)
        if meaningful and (not plain_start or init == "mica"):
            raise AdapterError(
                f"init_lora_weights is {init!r}, which gives the product B A a meaning that a mixer between them "
                "destroys. Use init_lora_weights=True or 'gaussian', or mixer_init='identity'."
            )
        for name in _OTHER_VARIANTS:
            if getattr(self, name):
                raise AdapterError(
                    f"{name} is set together with a mixer; this combination is not defined. Unset it, or use plain "
                    "LoRA (mixer_init='identity', mixer_trainable=False)."
                )


def config_from_dict(data: Mapping[str, Any]) -> MoSLoRAConfig:
    """The configuration of `config_to_dict`.

    Raises:
        AdapterError: a key this version does not know, or a value that is not permitted (`permitted_options`).
    """
    known = {item.name for item in dataclasses.fields(MoSLoRAConfig)}
    unknown = sorted(set(data) - known)
    if unknown:
        raise AdapterError(
            f"The adapter's configuration has unknown keys {unknown}.{suggestion(unknown[0], known)} It was written by "
            "another version; update mm-moslora or peft."
        )
    values = {key: value for key, value in data.items() if key not in ("peft_type", "runtime_config")}
    config = MoSLoRAConfig(**values)
    permitted_options(MoSLoRAConfig, values, "The adapter's configuration")
    return config


def from_lora_config(
    config: LoraConfig,
    *,
    mixer_init: MixerInit = "identity",
    mixer_trainable: bool = False,
    mixer_pattern: Mapping[str, str] | None = None,
) -> MoSLoRAConfig:
    """MoSLoRA with the options of plain LoRA.

    Args:
        config: stock PEFT's configuration.
        mixer_init: how M starts.
        mixer_trainable: identity and False is the same plain LoRA; True starts MoSLoRA from it.
        mixer_pattern: exceptions by module.

    Raises:
        AdapterError: a value that is not permitted (`permitted_options`).
    """
    values = {name: getattr(config, name) for name in lora_fields()}
    permitted_options(LoraConfig, values, "The adapter's configuration")
    values["mixer_pattern"] = dict(mixer_pattern or {})
    return MoSLoRAConfig(**values, mixer_init=mixer_init, mixer_trainable=mixer_trainable)


def lora_fields() -> set[str]:
    """The options of stock PEFT's `LoraConfig` that a folder may hold."""
    return {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config", "peft_type"}


def read_authors(folder: Path, data: Mapping[str, Any]) -> tuple[MoSLoRAConfig, dict[str, Tensor]]:
    """An adapter of the authors' fork of PEFT, under this package's names.

    Args:
        folder: the folder.
        data: its `adapter_config.json`.

    Raises:
        AdapterError: a damaged file, mixers that are missing, an option that is not understood.
    """
    check_options(data, lora_fields(), str(folder))
    tensors = with_known_names(peft_tensors(folder, pickled=True))
    stock = LoraConfig(**{key: value for key, value in data.items() if key in lora_fields()})
    return from_lora_config(stock, **mixer_settings(data, tensors, str(folder))), tensors


def check_expression(expression: object, where: str) -> None:
    """Refuse what is no regular expression.

    Args:
        expression: to check.
        where: the option that holds it, for the message.

    Raises:
        AdapterError: it is none.
    """
    if not isinstance(expression, str):
        raise AdapterError(
            f"{where} is a {type(expression).__name__}, expected text: a module name or a regular expression."
        )
    try:
        re.compile(expression)
    except re.error as error:
        raise AdapterError(f"{where} is {expression!r}, which is no regular expression ({error}).") from error


def unmatched_patterns(config: MoSLoRAConfig, module_paths: Iterable[str]) -> list[str]:
    """Keys of rank_pattern, alpha_pattern and mixer_pattern that match none of the modules, as `field['key']`."""
    paths = list(module_paths)
    return [
        f"{name}[{key!r}]"
        for name in _PATTERNS
        for key in getattr(config, name) or {}
        if not any(get_pattern_key([key], path) == key for path in paths)
    ]
