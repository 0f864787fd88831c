"""Where the parts of a model lie: folders as a recipe names them, which may be seen from another place now."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from mm_moslora.config import ModelConfig
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import MANIFEST, MODELS, projector_file

logger = logging.getLogger(__name__)

Name = TypeVar("Name", str, str | None)
CONTENTS = "contents"
"""Of a manifest's `base`: recipe key to `fingerprint`."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def resolve_model_paths(config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """The configuration of a checkpoint, to be loaded from any working directory.

    Relative paths start where the run was started, which is mostly a folder above its checkpoints: what is not found
    from here is looked up from there, also when the whole tree was moved. An absolute path that leads nowhere is looked
    up by its last parts, and counts where its contents are those that the checkpoint was trained on.
    `MM_MOSLORA_MODELS` names further folders to look into.

    Args:
        config: of the checkpoint's recipe.
        checkpoint: its folder.
    """
    expected = stored_fingerprints(checkpoint)
    above = [*checkpoint.absolute().parents, *checkpoint.resolve().parents]

    def found(key: str, name: Name) -> Name:
        if not name or Path(name).exists():
            return name
        for place in _candidates(name, above, known=key in expected):
            if place.exists() and expected.get(key) in (None, fingerprint(place)):
                if Path(name).is_absolute():
                    logger.info("%s: %s is not there any more, taking %s.", key, name, place)
                return str(place)
        return name

    projector = replace(config.projector, weights=found("model.projector.weights", config.projector.weights))
    vision = config.vision and replace(
        config.vision,
        name=found("model.vision.name", config.vision.name),
        pretrained=found("model.vision.pretrained", config.vision.pretrained),
        fuse_with=found("model.vision.fuse_with", config.vision.fuse_with),
    )
    language, vlm = found("model.language", config.language), found("model.vlm", config.vlm)
    return replace(config, language=language, vlm=vlm, vision=vision, projector=projector)


def _candidates(name: str, above: list[Path], *, known: bool) -> Iterator[Path]:
    """Places where a model that is not at `name` may lie; by parts of its path only where its contents are known."""
    given = [Path(folder) for folder in os.environ.get(MODELS, "").split(os.pathsep) if folder]
    if not Path(name).is_absolute():
        yield from (folder / name for folder in (*given, *above))
        return
    parts = Path(name).parts[1:]
    for start in range(len(parts)):
        yield from (folder.joinpath(*parts[start:]) for folder in (*given, *(above if known else ())))


def stored_fingerprints(checkpoint: Path) -> Mapping[str, str]:
    """Fingerprints of the parts that a checkpoint was trained on, by recipe key; none where it names none."""
    try:
        base = read_json(checkpoint / MANIFEST)["base"]
    except (OSError, ValueError, KeyError):
        return {}
    return dict(base.get(CONTENTS, {}))


def base_fingerprints(config: ModelConfig) -> dict[str, str]:
    """Fingerprints of the parts that lie on this disk, by recipe key."""
    vision = config.vision
    names = {"language": config.language, "vlm": config.vlm}
    if config.projector.weights:
        names["projector.weights"] = str(projector_file(config.projector.weights))
    if vision is not None:
        names |= {f"vision.{key}": getattr(vision, key) for key in ("name", "pretrained", "fuse_with")}
    return {f"model.{key}": fingerprint(Path(name)) for key, name in names.items() if name and Path(name).exists()}


def fingerprint(path: Path) -> str:
    """A hash of what a model's files are called, how large they are, and of samples all over them.

    Args:
        path: a folder with a configuration and weights, or one file, regardless of its name.
    """
    digest = hashlib.sha256()
    inside = sorted(path.iterdir()) if path.is_dir() else []
    for file in [file for file in inside if file.suffix in _WEIGHTS or file.name == "config.json"] or [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(f"{'' if file == path else file.name} {size}\n".encode())
        with file.open("rb") as stream:
            for index in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
