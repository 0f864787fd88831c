"""The verb `init`: writes a recipe for a folder of pictures or a file of questions."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

from mm_moslora.cli.shared_options import quiet_libraries

logger = logging.getLogger("mm_moslora.cli")


def init(
    source: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    follow_links: bool = False,
    parts: Literal["quickstart", "hub", "gguf"] = "quickstart",
    vlm: str | None = None,
    gpu: str | None = None,
    max_left_out: float = 0.2,
) -> int:
    """Write questions and a commented recipe for your own pictures; prints the next commands.

    Parameters
    ----------
    source
        A folder with a sub-folder of pictures per class, or a LLaVA JSON or JSONL file.
    output
        New folder for recipe.yaml, train.jsonl and test.jsonl; a fifth of the pictures is held out.
    image_folder
        Folder of the file's pictures; default: the file's own.
    follow_links
        Accept links that lead out of the folder of the pictures.
    parts
        quickstart: small models for CPUs, fetched once from package registries; hub: Hugging Face ids; gguf: Hugging
        Face ids that llama.cpp can hold (mm-moslora export --to gguf).
    vlm
        Start from a ready-made vision-language model instead: a folder, or a Hugging Face id.
    gpu
        With --vlm: the card that the recipe must fit, such as RTX4090 or A100-80G; default: this machine's. The model
        is loaded in 4 bits only where it does not fit otherwise.
    max_left_out
        Largest share of pictures or records that cannot be used; left_out.jsonl names what is left out.
    """
    quiet_libraries()
    from mm_moslora.quickstart.user_recipe import initialise

    print(
        initialise(
            source, output, images=image_folder, follow_links=follow_links, parts=parts, vlm=vlm, gpu=gpu,
            most_left_out=max_left_out, say=logger.info,
        )
    )  # fmt: skip
    return 0
