"""The options of an adapter with mixers: PEFT's `LoraConfig` with a mixer, and which of them go together."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import nn

from mm_moslora.adapters.mixer import MIXER_INITS, NO_MIXER, MixerInit, check_mixer_init
from mm_moslora.utils.errors import AdapterError, suggestion

# These give the product B A a meaning at the start (a part of the base weight, or zero by construction).
_MEANINGFUL_INITS = ("pissa", "olora", "corda", "loftq", "eva", "lora_ga", "mica", "orthogonal")
# These take their start out of the base weight: A and B mean nothing without the same start.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Other changes of the LoRA branch. Each would need its own combination with the mixer.
_OTHER_VARIANTS = ("use_dora", "use_qalora", "arrow_config", "alora_invocation_tokens")
# These have other tensors than A and B, or put them elsewhere; an adapter folder has no place for that.
_OTHER_LAYOUTS = (
    "target_parameters", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "megatron_config",
    "layer_replication",
)  # fmt: skip

_PATTERNS = ("rank_pattern", "alpha_pattern", "mixer_pattern")

FactorForm = Literal["free", "mixed"]


@dataclass
class AdapterOptions(LoraConfig):
    """`LoraConfig` with a mixer. Layers and folders need no more of `MoSLoRAConfig`, which reads and writes folders."""

    # `is_lora_variant` makes PEFT's own layers refuse this configuration instead of ignoring the mixer.
    mixer_init: MixerInit = field(default="orthogonal", metadata={"is_lora_variant": True})
    """How M starts: orthogonal, kaiming, identity or butterfly (two-subspaces mixing)."""
    mixer_trainable: bool = True
    """False freezes M. Identity and frozen is plain LoRA, bit for bit."""
    mixer_pattern: dict[str, str] = field(default_factory=dict)
    """Module name, or regular expression on its end, to mixer_init, or to none (no mixer); like rank_pattern."""
    factor_form: FactorForm = "free"
    """free: A and B train. mixed: A starts as M A, without a mixer from there (plain LoRA)."""

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
            check_mixer_init(kind, f"mixer_pattern[{key!r}]", choices=(*MIXER_INITS, NO_MIXER))
        self._check_ranks()
        self._check_factor_form()
        for name in _OTHER_LAYOUTS:
            if getattr(self, name):
                raise AdapterError(
                    f"{name} is set, and adapters with it are more than A and B of modules, which is all that a mixer "
                    "goes with and that is saved and loaded here. Unset it, or use peft.LoraConfig."
                )
        if self.has_mixer or self.factor_form == "mixed":
            self._check_other_options()
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
        """The same options without the mixer, as stock PEFT's `LoraConfig`."""
        names = {item.name for item in dataclasses.fields(LoraConfig)} - {"runtime_config"}
        values = {name: getattr(self, name) for name in names} | changes
        values.pop("peft_type", None)
        return LoraConfig(**values)

    def _check_factor_form(self) -> None:
        choices = get_args(FactorForm)
        if self.factor_form not in choices:
            raise AdapterError(
                f"factor_form is {self.factor_form!r}, expected one of {', '.join(choices)}."
                f"{suggestion(str(self.factor_form), choices)}"
            )

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


def check_expression(expression: object, where: str) -> None:
    """Refuse what is no regular expression."""
    if not isinstance(expression, str):
        raise AdapterError(
            f"{where} is a {type(expression).__name__}, expected text: a module name or a regular expression."
        )
    try:
        re.compile(expression)
    except re.error as error:
        raise AdapterError(f"{where} is {expression!r}, which is no regular expression ({error}).") from error


def unmatched_patterns(config: AdapterOptions, module_paths: Iterable[str]) -> list[str]:
    """Keys of rank_pattern, alpha_pattern and mixer_pattern that match none of the modules, as `field['key']`."""
    paths = list(module_paths)
    return [
        f"{name}[{key!r}]"
        for name in _PATTERNS
        for key in getattr(config, name) or {}
        if not any(get_pattern_key([key], path) == key for path in paths)
    ]
