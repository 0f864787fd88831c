"""Options and settings that several verbs share."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

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
