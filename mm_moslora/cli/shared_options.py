"""Options and settings that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, Token, convert

from mm_moslora.utils.text_format import split_commas


def by_commas(kind: Any, words: Sequence[Token]) -> tuple[Any, ...]:
    """The values of an option that takes several with commas, or is given again; a path that exists stays whole."""

    def values(text: str) -> list[str]:
        path = text.partition(":")[2] or text  # llava:FILE
        return [text] if Path(path).exists() else split_commas(text) or [text]

    return convert(kind, [word.evolve(value=each) for word in words for each in values(word.value)])


def once(kind: Any, words: Sequence[Token]) -> tuple[Any, ...]:
    """As `by_commas`; what is named twice counts once."""
    return tuple(dict.fromkeys(by_commas(kind, words)))


LIST, SET = Parameter(converter=by_commas), Parameter(converter=once)
Several = Annotated[tuple[str, ...], LIST]
StopAt = Annotated[int | None, Parameter(show=False)]
"""The optimiser step after which a run saves and stops; for tests and for `compare`."""

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, help="Dotted recipe keys: --optim.lr 1e-4")]
OtherPreprocessing = Annotated[
    bool,
    Parameter(
        negative="",
        help="Accept that pictures or prompts are prepared otherwise than in training; the differences are logged.",
    ),
]


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and notices."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|peft|deepspeed|timm|open_clip|diffusers|accelerate)(\.|$)"
    )
