"""Whose weights: what each name of a recipe's `model` led to when training began, and where that is now.

A checkpoint's manifest keeps a fingerprint of every part, and the commit of a part from the hub. What was a path stays
a path, and what was a name on the hub stays one: no folder is taken for it because it is called the same. A place is
taken only where its fingerprint agrees.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import is_offline_mode, snapshot_download

from mm_moslora.config import ModelConfig
from mm_moslora.launch.imported_code import import_marks
from mm_moslora.utils.errors import CheckpointError, ModelError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import (
    ALL_FILES,
    LANGUAGE_FILES,
    PICTURE_FILES,
    difference,
    fingerprint,
    weight_files,
)
from mm_moslora.utils.run_paths import MANIFEST, MODELS, projector_file

logger = logging.getLogger(__name__)

CONTENTS, COMMITS, IMPORTS = "contents", "commits", "imports"
"""Of a manifest's `base`: recipe key to `fingerprint`, and recipe key to commit of what came from the hub."""
PROJECTOR_WEIGHTS = "model.projector.weights"
_PATHS = ("/", "./", "../")
"""Beginnings of names that can only be paths."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FINGERPRINT, _COMMIT = re.compile(r"2-[0-9a-f]{64}(\.[0-9a-f]{64})?"), re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, kw_only=True)
class Part:
    """A name in a recipe's `model`."""

    key: str
    name: str
    revision: str | None = None
    pretrained: str | None = None

    @property
    def library(self) -> str:
        """`open_clip` or `timm`; empty for transformers."""
        library, separator, _ = self.name.partition(":")
        return library if separator and library in ("open_clip", "timm") else ""

    @property
    def place(self) -> Path:
        """The path that the name may be."""
        path = Path(self.name.partition(":")[2] if self.library else self.name)
        return projector_file(path) if self.key == PROJECTOR_WEIGHTS else path

    @property
    def texts(self) -> tuple[str, ...]:
        """The files besides weights and configuration that loaders read: others come and go in the hub's cache."""
        if self.library:
            return ("open_clip_config.json",) if self.library == "open_clip" and self.place.is_dir() else ()
        pictures = dict.fromkeys(("model.vision.name", "model.vision.fuse_with"), PICTURE_FILES)
        return ({"model.language": LANGUAGE_FILES, "model.vlm": ALL_FILES} | pictures).get(self.key, ())

    def agrees(self, expected: str, path: Path, library: str = "") -> bool:
        """Whether a place has what a fingerprint was made of."""
        return expected == fingerprint(path, library=library, texts=self.texts if "." in expected else ())

    @property
    def is_path(self) -> bool:
        """Whether the name can only be a path."""
        return self.key == PROJECTOR_WEIGHTS or self.name.removeprefix(f"{self.library}:").startswith(_PATHS)

    def at(self, path: Path) -> str:
        """The name for another place."""
        return f"{self.library}:{path}" if self.library else str(path)

    def snapshot(self, revision: str | None) -> Path | None:
        """Its folder in the hub's cache, if all weights are there."""
        repository = _repository(self)
        folder = cached_snapshot(repository, revision) if repository is not None else None
        return folder if folder is not None and weight_files(folder, self.library) else None


def cached_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a model in the hub's cache, if it is there; it is called as the commit."""
    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not there, or no name of the hub
        return None


def _repository(part: Part) -> str | None:
    """Name on the hub; None for what comes from elsewhere."""
    name = part.name.partition(":")[2] if part.library else part.name
    if part.key in (PROJECTOR_WEIGHTS, "model.vision.pretrained"):
        return None
    if not part.library or "/" in name:
        return name.removeprefix("hf-hub:")
    settings: Mapping[str, Any] = {}
    if part.library == "timm" and part.pretrained:
        import timm

        timm_settings = timm.get_pretrained_cfg(name)
        settings = timm_settings.to_dict() if timm_settings else {}
    elif part.pretrained:
        import open_clip

        settings = open_clip.get_pretrained_cfg(name, part.pretrained) or {}
    repository = str(settings.get("hf_hub_id") or settings.get("hf_hub") or "")  # open_clip adds a file to some
    return "/".join(repository.split("/")[:2]).rstrip("/") or None


def parts_of(config: ModelConfig) -> Iterator[Part]:
    """The names in a recipe's `model`."""
    vision = config.vision
    parts = [
        Part(key="model.language", name=config.language or "", revision=config.language_revision),
        Part(key="model.vlm", name=config.vlm or "", revision=config.vlm_revision),
        Part(key=PROJECTOR_WEIGHTS, name=config.projector.weights or ""),
    ]
    if vision is not None:
        parts += [
            Part(key="model.vision.name", name=vision.name, revision=vision.revision, pretrained=vision.pretrained),
            Part(key="model.vision.pretrained", name=vision.pretrained or ""),
            Part(key="model.vision.fuse_with", name=vision.fuse_with or "", pretrained=vision.pretrained),
        ]
    return (part for part in parts if part.name)


def hub_names(config: ModelConfig) -> Iterator[Path]:
    """Where the parts would lie that the hub may have."""
    return (part.place for part in parts_of(config) if part.key != PROJECTOR_WEIGHTS)


def trained_on(
    config: ModelConfig, data: Mapping[str, str] = MappingProxyType({}), *, before: Path | None = None
) -> dict[str, dict[str, str]]:
    """What a manifest keeps of the parts of a model: `CONTENTS` and `COMMITS`.

    Args:
        data: commits of data sets, by recipe key.
        before: a checkpoint of the same run, whose entries stay.
    """
    contents, commits = {}, dict(data)
    for part in parts_of(config):
        path = part.place
        if path.exists():
            contents[part.key] = fingerprint(path, texts=part.texts)
            if path.parent.name == "snapshots":  # of the hub's cache, see `_on_hub`
                commits[part.key] = path.name
        elif snapshot := part.snapshot(part.revision):
            contents[part.key] = fingerprint(snapshot, library=part.library, texts=part.texts)
            commits[part.key] = snapshot.name
    base = _base(before) if before is not None else {}
    marks = {CONTENTS: contents | base.get(CONTENTS, {}), COMMITS: commits | base.get(COMMITS, {})}
    imports = import_marks() | base.get(IMPORTS, {})
    return marks | ({IMPORTS: imports} if imports else {})


def same_parts(config: ModelConfig, expected: Mapping[str, str]) -> dict[str, str]:
    """The entries of a manifest's `CONTENTS` that the parts on this disk agree with."""
    return {
        part.key: expected[part.key]
        for part in parts_of(config)
        if part.key in expected
        and (
            part.agrees(expected[part.key], part.place)
            if part.place.exists()
            else (snapshot := part.snapshot(part.revision)) and part.agrees(expected[part.key], snapshot, part.library)
        )
    }


def stored_fingerprints(checkpoint: Path) -> Mapping[str, str]:
    """Fingerprints of the parts that a checkpoint was trained on, by recipe key; none where it names none."""
    return _base(checkpoint).get(CONTENTS, {})


def stored_commits(checkpoint: Path) -> Mapping[str, str]:
    """Commits of models and data sets of the hub, by recipe key."""
    return _base(checkpoint).get(COMMITS, {})


def _base(checkpoint: Path) -> dict[str, dict[str, str]]:
    """What a checkpoint's manifest keeps of the parts."""
    try:
        return marks_of(read_json(checkpoint / MANIFEST)["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def require_imports(checkpoint: Path) -> None:
    """Refuse to go on without the files of `--import` that a run had, or with others."""
    now = import_marks()
    for option, sha256 in _base(checkpoint).get(IMPORTS, {}).items():
        if option not in now:
            raise CheckpointError(f"{checkpoint} is of a run with {option}, which this command lacks. Give it again.")
        if now[option] != sha256:
            raise CheckpointError(
                f"The file of {option} was changed since {checkpoint} was written, so its code would be another. "
                "Restore it, or start another run from the checkpoint's weights (adapter.weights)."
            )


def marks_of(base: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`CONTENTS`, `COMMITS` and `IMPORTS` of a manifest's `base`, those that are there, as far as they can be read."""
    marks = {key: dict(base[key]) for key in (CONTENTS, COMMITS, IMPORTS) if isinstance(base.get(key), Mapping)}
    forms = {CONTENTS: _FINGERPRINT, COMMITS: _COMMIT, IMPORTS: _SHA256}  # the folder may be a stranger's
    return {
        key: {name: value for name, value in items.items() if isinstance(value, str) and forms[key].fullmatch(value)}
        for key, items in marks.items()
    }


class _Located(NamedTuple):
    """A part for the loaders."""

    name: str | None
    revision: str | None
    where: str
    """For people."""


def resolve_model_paths(config: ModelConfig, checkpoint: Path) -> ModelConfig:
    """The configuration of a checkpoint, to be loaded from any working directory with the weights of the training.

    Paths are looked for where the recipe names them, then in the folders of `MM_MOSLORA_MODELS`, then in the folders
    above the checkpoint, also by the last parts of an absolute path. Models of the hub get the commit of the training.
    A projector with other weights than those at the start is left out, with a warning.

    Raises:
        ModelError: a part is not there, or has other weights.
    """
    base = _base(checkpoint)
    located = {part.key: _find(part, base, checkpoint) for part in parts_of(config)}
    logger.info("%s: %s.", checkpoint, "; ".join(f"{key} is {item.where}" for key, item in located.items()))
    none = _Located(None, None, "")
    language, vlm = located.get("model.language", none), located.get("model.vlm", none)
    vision, tower = config.vision, located.get("model.vision.name")
    if vision is not None and tower is not None:
        pretrained, fused = (located.get(f"model.vision.{key}", none).name for key in ("pretrained", "fuse_with"))
        vision = replace(vision, name=str(tower.name), revision=tower.revision, pretrained=pretrained, fuse_with=fused)
    return replace(
        config, language=language.name, language_revision=language.revision, vlm=vlm.name, vlm_revision=vlm.revision,
        vision=vision, projector=replace(config.projector, weights=located.get(PROJECTOR_WEIGHTS, none).name),
    )  # fmt: skip


def _find(part: Part, base: Mapping[str, Mapping[str, str]], checkpoint: Path) -> _Located:
    expected = base.get(CONTENTS, {}).get(part.key)
    commit = base.get(COMMITS, {}).get(part.key)
    if (expected is not None and commit is None) or not base or part.is_path:
        return _on_disk(part, expected, checkpoint)
    return _on_hub(part, expected, commit, checkpoint)


def _on_disk(part: Part, expected: str | None, checkpoint: Path) -> _Located:
    """A part that was a path when training began, for all that is known."""
    exists = part.place.exists()
    for name in (part.name, *(part.at(path) for path in _candidates(part, checkpoint, known=expected is not None))):
        path = replace(part, name=name).place
        if path.exists() and (expected is None or part.agrees(expected, path)):
            return _Located(name, part.revision, str(path))
    if part.key == PROJECTOR_WEIGHTS:
        if exists:
            logger.warning(
                "%s is %s, which has other weights now than %s began with. It is left out.", part.key, part.name,
                checkpoint,
            )  # fmt: skip
        return _Located(None if exists else part.name, None, "nowhere")
    if not part.is_path and expected is None:
        return _on_hub(part, None, None, checkpoint)
    if exists:
        what, own, old = difference(fingerprint(part.place, texts=part.texts), str(expected))
        raise ModelError(
            f"{part.key} is {part.name!r}, which has other {what} (fingerprint {own}) than "
            f"the model that {checkpoint} was trained on ({old}). Put the old files there, or name a "
            f"folder above them in the environment variable {MODELS}."
        )
    raise ModelError(
        f"{part.key} is {part.name!r}, and nothing is there with the weights that {checkpoint} was trained on. If it "
        f"was moved, add its new parent folder to the environment variable {MODELS}."
    )


def _on_hub(part: Part, expected: str | None, commit: str | None, checkpoint: Path) -> _Located:
    """A part that was a name on the hub when training began."""
    folders = [folder / part.name for folder in _given_folders() if expected and not part.library]
    for path in (path for path in folders if path.is_dir() and part.agrees(str(expected), path)):
        return _Located(str(path), None, str(path))
    snapshot = (part.snapshot(commit) if commit else None) or part.snapshot(part.revision)
    if expected is None and snapshot is not None:
        logger.warning(
            "%s keeps no fingerprint of %s, %s. Whether the weights of commit %s are those that it was trained on is "
            "not known.", checkpoint, part.key, part.name, snapshot.name,
        )  # fmt: skip
    elif snapshot is not None and not part.agrees(str(expected), snapshot, part.library):
        if snapshot.name == commit or is_offline_mode() or part.library:
            what, own, old = difference(fingerprint(snapshot, library=part.library, texts=part.texts), str(expected))
            raise ModelError(
                f"{part.key} is {part.name!r}, of which the hub's cache has other {what} (commit "
                f"{snapshot.name[:10]}, fingerprint {own}) than the model "
                f"that {checkpoint} was trained on (commit {str(commit)[:10]}, fingerprint {old}). "
                f"Delete {snapshot} and go online, or put a folder {part.name} with the right files below one that "
                f"{MODELS} names."
            )
        snapshot = None  # of another commit; the right one is fetched
    revision = part.revision if part.library else commit if snapshot is None else snapshot.name
    where = f"{part.name} of the hub (commit {revision or 'unknown'})" if _repository(part) else part.name
    if snapshot is not None and not part.library and (part.place.exists() or part.key == "model.vision.fuse_with"):
        return _Located(str(snapshot), None, where)  # loaders would take the folder of that name, or the newest commit
    if part.place.exists():
        raise ModelError(
            f"{part.key} is {part.name!r}, a model of the hub that {checkpoint} was trained on. The folder of that "
            f"name in {Path.cwd()} would be taken for it. Work in another folder; if that one is meant, write "
            f"./{part.name}."
        )
    return _Located(part.name, revision or part.revision, where)


def _given_folders() -> list[Path]:
    return [Path(folder) for folder in os.environ.get(MODELS, "").split(os.pathsep) if folder]


def _candidates(part: Part, checkpoint: Path, *, known: bool) -> Iterator[Path]:
    """Places where a model that was moved may lie; above the checkpoint only where its contents are known."""
    name = Path(part.name.removeprefix(f"{part.library}:"))
    above = [*checkpoint.absolute().parents, *checkpoint.resolve().parents] if known else []
    ends = [name] if not name.is_absolute() else [Path(*name.parts[start:]) for start in range(1, len(name.parts))]
    yield from (folder / end for end in ends for folder in (*_given_folders(), *above))
