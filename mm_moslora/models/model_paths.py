"""Whose weights: what each name of a recipe's `model` led to when training began, and where that is now.

A checkpoint's manifest keeps a fingerprint of every part, and the commit of a part from the hub. What was a path stays
a path, and what was a name on the hub stays one: no folder is taken for it because it is called the same. A place is
taken only where its fingerprint agrees.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from huggingface_hub import is_offline_mode, snapshot_download

from mm_moslora.config import ModelConfig
from mm_moslora.utils.errors import ModelError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.run_paths import MANIFEST, MODELS, projector_file
from mm_moslora.utils.untrusted_data import parse_json

logger = logging.getLogger(__name__)

CONTENTS, COMMITS = "contents", "commits"
"""Of a manifest's `base`: recipe key to `fingerprint`, and recipe key to commit of what came from the hub."""
PROJECTOR_WEIGHTS = "model.projector.weights"
_PATHS = ("/", "./", "../")
"""Beginnings of names that can only be paths."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_BY_TENSOR = "2-"
"""Begins fingerprints with samples of every tensor; earlier ones have 16 samples of a file."""
_FINGERPRINT, _COMMIT = re.compile(r"(2-)?[0-9a-f]{64}(\.[0-9a-f]{64})?"), re.compile(r"[0-9a-f]{40}")
_SAMPLES, _MORE_SAMPLES, _SAMPLE_BYTES, _TENSOR_BYTES = 16, 256, 4096, 1024
_MOST_HEADER = 2**27
_PICTURE_FILES = ("preprocessor_config.json", "processor_config.json")
_LANGUAGE_FILES = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "generation_config.json",
)  # fmt: skip
_VOCABULARIES = ("tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
"""Read where there is no `tokenizer.json`."""
_ALL_FILES = (*_LANGUAGE_FILES, *_PICTURE_FILES, "video_preprocessor_config.json", "chat_template.json")


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
        pictures = dict.fromkeys(("model.vision.name", "model.vision.fuse_with"), _PICTURE_FILES)
        return ({"model.language": _LANGUAGE_FILES, "model.vlm": _ALL_FILES} | pictures).get(self.key, ())

    def agrees(self, expected: str, path: Path, library: str = "") -> bool:
        """Whether a place has what a fingerprint was made of; those of earlier versions say less."""
        by_tensor, texts = expected.startswith(_BY_TENSOR), self.texts if "." in expected else ()
        return expected == fingerprint(path, library=library, by_tensor=by_tensor, texts=texts)

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
        return folder if folder is not None and _weights(folder, self.library) else None


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


def trained_on(
    config: ModelConfig, data: Mapping[str, str] = MappingProxyType({}), *, before: Path | None = None
) -> dict[str, dict[str, str]]:
    """What a manifest keeps of the parts of a model: `CONTENTS` and `COMMITS`.

    Args:
        config: the recipe's `model`, loaded by now.
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
    return {CONTENTS: contents | base.get(CONTENTS, {}), COMMITS: commits | base.get(COMMITS, {})}


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
    """What a checkpoint's manifest keeps of the parts; runs of earlier versions lack `COMMITS`, or both."""
    try:
        return marks_of(read_json(checkpoint / MANIFEST)["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def marks_of(base: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """`CONTENTS` and `COMMITS` of a manifest's `base`, those that are there, as far as they can be read."""
    marks = {key: dict(base[key]) for key in (CONTENTS, COMMITS) if isinstance(base.get(key), Mapping)}
    forms = {CONTENTS: _FINGERPRINT, COMMITS: _COMMIT}  # the folder may be a stranger's
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

    Args:
        config: of the checkpoint's recipe.
        checkpoint: its folder.

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
    earlier = CONTENTS not in base or (COMMITS not in base and bool(part.library))  # which kept none of these
    if (expected is not None and commit is None) or earlier or part.is_path:
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
            "%s keeps no fingerprint of %s, %s: an earlier version saved it. Whether the weights of commit %s are "
            "those that it was trained on is not known.", checkpoint, part.key, part.name, snapshot.name,
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


def difference(own: str, expected: str) -> tuple[str, str, str]:
    """What two fingerprints differ in, and each, for people."""
    (own, own_texts), (old, old_texts) = (mark.split(".") if "." in mark else (mark, "") for mark in (own, expected))
    if own == old:
        return "files of its tokenizer, chat template, pictures or shards", own_texts[:8], old_texts[:8]
    return "weights", own[:10], old[:10]


def is_comparable(one: str, other: str) -> bool:
    """Whether two fingerprints are of one kind; runs of earlier versions have another."""
    return one.startswith(_BY_TENSOR) == other.startswith(_BY_TENSOR)


def is_same(one: str, other: str) -> bool:
    """Whether two fingerprints agree in what both were made of."""
    whole = "." in one and "." in other
    return one == other if whole else one.partition(".")[0] == other.partition(".")[0]


def fingerprint(path: Path, *, library: str = "", by_tensor: bool = True, texts: Collection[str] = _ALL_FILES) -> str:
    """A hash of what a model's files are called, how large they are, and of samples all over them.

    A folder's has a second one, behind a point: of all that its tokenizer, chat template, settings for pictures and
    index of shards contain.

    Args:
        path: a folder with a configuration and weights, or one file, regardless of its name.
        library: whose weights are read, where a folder has those of several.
        by_tensor: samples of every tensor, of the weights that are read; False: of 16 places in every file of weights,
            as in checkpoints of earlier versions.
        texts: patterns for the files of the second hash; none: it is left out.
    """
    digest = hashlib.sha256()
    inside = sorted(path.iterdir()) if path.is_dir() else []
    chosen = [file for file in inside if file.suffix in _WEIGHTS or file.name == "config.json"]
    if by_tensor and inside:
        chosen = sorted({*_weights(path, library), *(file for file in inside if file.name == "config.json")})
    for file in chosen or [path]:
        if not file.is_file():
            continue
        size = file.stat().st_size
        digest.update(os.fsencode(f"{'' if file == path else file.name} {size}\n"))
        with file.open("rb") as stream:
            for start, count in _samples(stream, size) if by_tensor else _even(size, _SAMPLES):
                stream.seek(start)
                digest.update(stream.read(count))
    if not by_tensor:
        return digest.hexdigest()
    return f"{_BY_TENSOR}{digest.hexdigest()}" + (f".{_of_texts(path, texts)}" if inside and texts else "")


def _of_texts(folder: Path, texts: Collection[str]) -> str:
    digest, first = hashlib.sha256(), _first_read(folder)
    slow = _VOCABULARIES if "tokenizer*.json" in texts and not (folder / "tokenizer.json").is_file() else ()
    chosen = {file for pattern in (*texts, *slow) for file in folder.glob(pattern) if file.is_file()}
    for file in sorted(chosen | ({first} if first is not None and first.suffix == ".json" else set())):
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(os.fsencode(f"{file.relative_to(folder).as_posix()} {content}\n"))
    return digest.hexdigest()


def _first_read(folder: Path, library: str = "") -> Path | None:
    """The file that loaders look for first: all weights, or the index of the files that have them."""
    names = (f"{library}_model.safetensors", "model.safetensors", "pytorch_model.bin")
    files = (folder / f"{name}{ending}" for name in names for ending in ("", ".index.json"))
    return next((file for file in files if file.is_file()), None)


def _weights(folder: Path, library: str = "") -> list[Path]:
    """The files of weights that are read from a folder; none where some are missing."""
    first = _first_read(folder, library)
    if first is None:
        return sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)
    if first.suffix != ".json":
        return [first]
    try:
        names = sorted({str(item) for item in read_json(first, linked=True)["weight_map"].values()})
        shards = [folder / name for name in names]  # as loaders do, wherever that leads
        return shards if all(shard.is_file() for shard in shards) else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _even(size: int, count: int) -> Iterator[tuple[int, int]]:
    for index in range(count):
        yield max(0, size - _SAMPLE_BYTES) * index // (count - 1), _SAMPLE_BYTES


def _samples(stream: BufferedReader, size: int) -> Iterator[tuple[int, int]]:
    """Start and length of the samples of a file: the header of safetensors and four places in every tensor."""
    header = int.from_bytes(stream.read(8), "little")
    try:
        if not 0 < header <= min(size, _MOST_HEADER):
            raise ValueError("no safetensors")
        tensors = parse_json(stream.read(header))
        spans = sorted(item["data_offsets"] for name, item in tensors.items() if name != "__metadata__")
        ends = [[min(max(0, 8 + header + int(end)), size) for end in span] for span in spans]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        yield from _even(size, _MORE_SAMPLES)
        return
    yield 0, 8 + header
    for start, end in ends:
        if end - start <= 4 * _TENSOR_BYTES:
            yield start, max(0, end - start)
        else:
            yield from ((start + (end - start - _TENSOR_BYTES) * part // 3, _TENSOR_BYTES) for part in range(4))
