"""What a path means: a run, a checkpoint, an export or an adapter, told apart by its files; imports nothing heavy."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mm_moslora.utils.errors import AdapterError, CheckpointError, ConfigError, ModelError, suggestion

logger = logging.getLogger(__name__)

RESUME_WORDS = ("auto", "required", "never")
"""What `--resume` may be besides a folder."""
RUN_LOCK = "run.lock"
"""File that every run folder holds from its first moment on, which shows that a run made it."""
RUN_FILES = (
    RUN_LOCK, "config.yaml", "summary.json", "state.json", "latest", "best.json", "metrics.jsonl",
    "tracked_samples.jsonl", "alerts.jsonl", "evaluations.jsonl", "environment.json", "mixers.json", "quarantine.jsonl",
    "validation_quarantine.jsonl", "heartbeat", "stacks", "validation", "tensorboard", "evaluation.json",
    "samples.json", "pictures", "STOPPED",
)  # fmt: skip
"""What a run writes into its folder, besides checkpoints and what services keep there."""
MANIFEST = "manifest.json"
RUN_SIGNS = (RUN_LOCK, f"checkpoint-*/{MANIFEST}")
"""Files by which a run folder is known."""
MODELS = "MM_MOSLORA_MODELS"
"""Environment variable: folders, separated like those of PATH, in which models that are gone are looked for."""
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"
"""In an adapter folder that is handed on: the model it belongs to, where no published one is that."""
PROJECTOR = "projector.safetensors"
_PACKAGE = Path(__file__).parents[1]
SHIPPED = ("scripts", "deepspeed_configs", "recipes")
"""Folders that come along with the package, for people: launch scripts, DeepSpeed presets, recipes."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})$")


def shipped_folder(name: str) -> Path:
    """Where a folder that comes along lies: within the package, or in the checkout beside it.

    Args:
        name: one of `SHIPPED`.

    Raises:
        ConfigError: there is no such folder.
    """
    for folder in (_PACKAGE / name, _PACKAGE / "config" / name, _PACKAGE.parent / name):
        if name in SHIPPED and folder.is_dir():
            return folder
    raise ConfigError(f"No folder {name!r} comes along, expected {', '.join(SHIPPED)}.{suggestion(name, SHIPPED)}")


def cache_folder(kind: str) -> Path:
    """Where what can be fetched or computed again is kept: in `MM_MOSLORA_CACHE`, or in `~/.cache/mm_moslora`.

    Args:
        kind: name of the folder in it.
    """
    return Path(os.environ.get("MM_MOSLORA_CACHE") or "~/.cache/mm_moslora").expanduser() / kind


def file_and_folder(text: str, *, start: Path | None = None) -> tuple[str, str]:
    """Split what a person typed as FILE@FOLDER, where both may hold an `@`: what is there decides.

    Args:
        text: FILE or FILE@FOLDER.
        start: where relative paths begin; None: the working directory.

    Returns:
        The file, and the folder or nothing. Of several readings, the first of: file and folder are there, the file is
        there, the file has a suffix, the last `@` divides them.
    """

    def path(name: str) -> Path:
        return (start or Path()) / Path(name).expanduser()

    whole = (text, "")
    splits = [(text[:at], text[at + 1 :]) for at in range(len(text) - 1, 0, -1) if text[at] == "@"]
    for file, folder in (whole, *splits):
        if path(file).is_file() and (not folder or path(folder).is_dir()):
            return file, folder
    for wanted in (lambda file: path(file).is_file(), lambda file: Path(file).suffix[1:].isalnum()):
        for file, folder in (*splits, whole):
            if wanted(file):
                return file, folder
    return splits[0] if splits else whole


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints of a run as (step, folder), oldest first; none that was put aside. Nothing is verified."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))]
    return sorted(found)


def find_checkpoint(path: Path) -> Path:
    """The folder that a path means: itself, the checkpoint around an `adapter/`, or the newest one of a run folder.

    Raises:
        ModelError: nothing loadable there.
    """
    if (path / MANIFEST).is_file() or (path / "config.json").is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        _mention_others(path)
        around = path.resolve().parent  # the folder may be named by `.` or by a link
        return around if (around / MANIFEST).is_file() else path
    found = [item for _, item in checkpoints(path) if (item / MANIFEST).is_file()]
    if found:
        return found[-1]
    if not path.is_dir():
        what = "is a file, expected a folder" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}. Give the folder of a run, a checkpoint, an export or an adapter.")
    if inside := adapters_inside(path):
        raise ModelError(inside)
    raise ModelError(
        f"{path} is no checkpoint (no {MANIFEST}), no run with checkpoints, no exported model (no config.json) and "
        f"no adapter (no {ADAPTER_CONFIG}). Give the folder of a run, a checkpoint, an export or an adapter."
    )


def adapters_inside(path: Path) -> str | None:
    """What to say of a folder that is no adapter but holds some: a `Trainer`'s, or one of several named adapters."""
    names = _names_inside(path)
    if not names:
        return None
    return f"{path} is no adapter itself, but holds {', '.join(names[:5])}. Give the folder of one of them."


def _names_inside(path: Path) -> list[str]:
    return sorted(item.parent.name for item in path.glob(f"*/{ADAPTER_CONFIG}"))


def _mention_others(path: Path) -> None:
    """Say which adapter counts where PEFT saved several: the default one lies in the folder, the others below it."""
    if names := _names_inside(path):
        logger.info(
            "%s holds an adapter itself, which is used, and below it %s. For one of those give its folder: %s.",
            path, ", ".join(names[:5]), path / names[0],
        )  # fmt: skip


def why_no_adapter_folder(path: Path) -> str:
    """What to say of a path that is no folder, where an adapter's was expected."""
    if path.exists():
        return f"{path} is a file, expected an adapter folder. Give the folder around it."
    text = f"There is no adapter folder {str(path)!r}."
    if len(path.parts) == 2 and not path.is_absolute():  # what a name on the hub looks like
        text += f" If it is on the hub, download it first: huggingface_hub.snapshot_download({str(path)!r})."
    return text


def adapter_folder(path: str | Path) -> Path:
    """The adapter that a path means: the folder itself, or `adapter/` of a checkpoint or of a run's newest one.

    A folder that holds neither is given back as it is; whoever reads it says what is wrong with it.

    Raises:
        AdapterError: no folder.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(why_no_adapter_folder(folder))
    if _holds_adapter(folder):
        _mention_others(folder)
        return folder
    inside = [item / "adapter" for item in (folder, *(item for _, item in reversed(checkpoints(folder))))]
    found = next((item for item in inside if item.is_dir()), None)
    if found is None and (several := adapters_inside(folder)):
        raise AdapterError(several)
    return found or folder


def is_adapter(path: str | Path) -> bool:
    """Whether a path means an adapter, as `adapter_folder` takes it."""
    try:
        return _holds_adapter(adapter_folder(path))
    except AdapterError:
        return False


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "moslora.json", "lora_config.json"))


def projector_file(path: str | Path) -> Path:
    """The projector that a path means: the file itself, or that of a checkpoint or of a run's newest one.

    A path that leads to none is given back as it is; whoever reads it says what is wrong with it.
    """
    place = Path(path)
    inside = [item / PROJECTOR for item in (place, *(item for _, item in reversed(checkpoints(place))))]
    return next((item for item in inside if item.is_file()), place) if place.is_dir() else place


def require_projector(path: str | Path) -> Path:
    """The projector that `model.projector.weights` means, see `projector_file`.

    Raises:
        ModelError: there is none.
    """
    file = projector_file(path)
    if not file.is_file():
        what = "is a folder without checkpoints and projector.safetensors" if file.is_dir() else "does not exist"
        raise ModelError(
            f"model.projector.weights: {file} {what}. Give a run folder, a checkpoint, or a projector.safetensors."
        )
    return file


def require_model(key: str, name: str | None) -> None:
    """Refuse a path at which no model is; the hub's answer to one explains nothing.

    Args:
        key: of the recipe.
        name: a folder, or a name on the hub.

    Raises:
        ModelError: the name can only be a path, and nothing is there; or it is a folder without a configuration.
    """
    if not name:
        return
    if name.startswith(("/", "./", "../")) and not Path(name).exists():
        raise ModelError(
            f"{key} is {name!r}, and nothing is there. If it was moved, name the folder that it lies in now in the "
            f"environment variable {MODELS}."
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{key} is {name!r}, a folder without config.json. Give the folder that holds the model's.")


def resume_folder(resume: str) -> Path | None:
    """The checkpoint that `--resume` names, None for one of its words.

    Raises:
        CheckpointError: neither.
    """
    if resume in RESUME_WORDS:
        return None
    if not Path(resume).is_dir():
        raise CheckpointError(
            f"resume is {resume!r}, which is no folder; expected auto, required, never or a checkpoint's folder."
            f"{suggestion(resume, RESUME_WORDS)}"
        )
    return Path(resume)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Around what writes a file or folder: whatever the system refuses names that path.

    safetensors tells a full disk by an exception of its own, and neither it nor Python says where a write failed.

    Args:
        path: as the user knows it, not a temporary beside it.

    Raises:
        OSError: with `path` for its filename.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except OSError as error:
        if error.errno is None:  # not the system's
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
