"""Where the parts of a model lie: folders as a recipe names them, which may be seen from another place now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mm_moslora.config import ModelConfig
from mm_moslora.errors import ModelError

Name = TypeVar("Name", str, str | None)


def seen_from(config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """The configuration of a checkpoint, to be loaded from any working directory.

    Relative paths start where the run was started, which is mostly a folder above its checkpoints: what is not found
    from here is looked up from there, also when the whole tree was moved.

    Args:
        config: of the checkpoint's recipe.
        checkpoint: its folder.
    """
    above = [*checkpoint.absolute().parents, *checkpoint.resolve().parents]
    projector = replace(config.projector, weights=_found(config.projector.weights, above))
    vision = config.vision and replace(
        config.vision,
        name=_found(config.vision.name, above),
        pretrained=_found(config.vision.pretrained, above),
        fuse_with=_found(config.vision.fuse_with, above),
    )
    language, vlm = _found(config.language, above), _found(config.vlm, above)
    return replace(config, language=language, vlm=vlm, vision=vision, projector=projector)


def _found(name: Name, above: Sequence[Path]) -> Name:
    if not name or Path(name).exists():
        return name
    return next((str(folder / name) for folder in above if (folder / name).exists()), name)


def require_there(key: str, name: str | None) -> None:
    """Refuse a path that leads nowhere; the hub's answer to one explains nothing.

    Raises:
        ModelError: the name can only be a path, and nothing is there.
    """
    if name and name.startswith(("/", "./", "../")) and not Path(name).exists():
        raise ModelError(f"{key} is {name!r}, and nothing is there. If it was moved, put it or a link to it back.")
