"""Notices of libraries that would stand between the lines of a verb."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Switch off the libraries' own progress bars and notices."""
    import warnings

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings(
        "ignore", module=r"(torch|transformers|peft|deepspeed|timm|open_clip|diffusers|accelerate)(\.|$)"
    )
