"""Resolve a path to a run, a checkpoint, an export or an adapter by its files; imports nothing heavy."""

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
"""Words that `--resume` accepts besides a folder."""
RUN_LOCK = "run.lock"
"""File that a run creates first in its folder; it identifies a run folder."""
RUN_FILES = (
    RUN_LOCK, "config.yaml", "summary.json", "state.json", "latest", "best.json", "best", "metrics.jsonl",
    "tracked_samples.jsonl", "alerts.jsonl", "evaluations.jsonl", "environment.json", "mixers.json", "quarantine.jsonl",
    "validation_quarantine.jsonl", "heartbeat", "stacks", "validation", "tensorboard", "evaluation.json",
    "samples.json", "pictures", "STOPPED",
)  # fmt: skip
"""Files that a run writes into its folder, besides checkpoints and files of tracking services."""
MANIFEST = "manifest.json"
RUN_SIGNS = (RUN_LOCK, f"checkpoint-*/{MANIFEST}")
"""Files that identify a run folder."""
MODELS = "MM_MOSLORA_MODELS"
"""Environment variable with folders, separated as in PATH, where moved models are searched for."""
ADAPTER_CONFIG = "adapter_config.json"
BASE = "base"
"""File in a shared adapter folder: its base model, where that is not a published model."""
PROJECTOR = "projector.safetensors"
PREPROCESSING = "preprocessing.json"
"""File in checkpoints and exports: what becomes of a fixed conversation and picture."""
_PACKAGE = Path(__file__).parents[1]
SHIPPED = ("scripts", "deepspeed_configs", "recipes", "tutorials")
"""Folders that are shipped with the package: launch scripts, DeepSpeed presets, recipes, tutorials."""
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})$")


def shipped_folder(name: str) -> Path:
    """Path of a shipped folder: within the package, or in the checkout beside it."""
    for folder in (
        _PACKAGE / name,
        _PACKAGE / "config" / name,
        _PACKAGE.parent / name,
        _PACKAGE.parent / "docs" / name,
    ):
        if name in SHIPPED and folder.is_dir():
            return folder
    raise ConfigError(f"No folder {name!r} is shipped, expected {', '.join(SHIPPED)}.{suggestion(name, SHIPPED)}")


def cache_folder(kind: str) -> Path:
    """Cache folder for what can be downloaded or computed again: in `MM_MOSLORA_CACHE`, or `~/.cache/mm_moslora`."""
    return Path(os.environ.get("MM_MOSLORA_CACHE") or "~/.cache/mm_moslora").expanduser() / kind


def file_and_folder(text: str, *, start: Path | None = None) -> tuple[str, str]:
    """Split FILE@FOLDER. Both parts may contain an `@`; existing files decide.

    Args:
        text: FILE or FILE@FOLDER.
        start: base of relative paths; None: the working directory.

    Returns:
        The file, and the folder or an empty string. The first reading that applies is taken: file and folder exist, the
        file exists, the file has a suffix, the last `@` divides them.
    """

    def path(name: str) -> Path:
        return (start or Path()) / Path(name).expanduser()

    whole = (text, "")
    splits = [(text[:at], text[at + 1 :]) for at in range(len(text) - 1, 0, -1) if text[at] == "@"]
    for file, folder in (whole, *splits):
        if path(file).is_file() and (not folder or path(folder).is_dir()):
            return file, folder
    for accepts in (lambda file: path(file).is_file(), lambda file: Path(file).suffix[1:].isalnum()):
        for file, folder in (*splits, whole):
            if accepts(file):
                return file, folder
    return splits[0] if splits else whole


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Committed checkpoints of a run as (step, folder), oldest first, without those put aside; none is verified."""
    numbered = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _CHECKPOINT.match(path.name))]
    return sorted(numbered)


def find_checkpoint(path: Path) -> Path:
    """The model folder for a path: the folder itself, the checkpoint around an `adapter/`, or a run's newest one."""
    if (path / MANIFEST).is_file() or (path / "config.json").is_file():
        return path
    if (path / ADAPTER_CONFIG).is_file():
        _mention_others(path)
        around = path.resolve().parent  # the path may be `.` or a link
        return around if (around / MANIFEST).is_file() else path
    committed = [item for _, item in checkpoints(path) if (item / MANIFEST).is_file()]
    if committed:
        return committed[-1]
    if not path.is_dir():
        what = "is a file, expected a folder" if path.exists() else "does not exist"
        raise ModelError(f"{path} {what}. Give the folder of a run, a checkpoint, an export or an adapter.")
    if inside := adapters_inside(path):
        raise ModelError(inside)
    raise ModelError(
        f"{path} is not a checkpoint (no {MANIFEST}), a run with checkpoints, an exported model (no config.json) or an "
        f"adapter (no {ADAPTER_CONFIG}). Give the folder of a run, a checkpoint, an export or an adapter."
    )


def adapters_inside(path: Path) -> str | None:
    """Message about a folder that contains adapters but is none: a `Trainer`'s, or one of several named adapters."""
    names = _names_inside(path)
    if not names:
        return None
    return f"{path} is not an adapter itself, but holds {', '.join(names[:5])}. Give the folder of one of them."


def _names_inside(path: Path) -> list[str]:
    return sorted(item.parent.name for item in path.glob(f"*/{ADAPTER_CONFIG}"))


def _mention_others(path: Path) -> None:
    """Log which adapter is used where PEFT saved several: the default one is in the folder, the others are below it."""
    if names := _names_inside(path):
        logger.info(
            "%s holds an adapter, which is used, and further ones below it: %s. For one of those give its folder: %s.",
            path, ", ".join(names[:5]), path / names[0],
        )  # fmt: skip


def why_no_adapter_folder(path: Path) -> str:
    """Message about a path that is not a folder, where an adapter folder was expected."""
    if path.exists():
        return f"{path} is a file, expected an adapter folder. Give the folder around it."
    text = f"There is no adapter folder {str(path)!r}."
    if len(path.parts) == 2 and not path.is_absolute():  # the form of a name on the hub
        text += f" If it is on the hub, download it first: huggingface_hub.snapshot_download({str(path)!r})."
    return text


def adapter_folder(path: str | Path) -> Path:
    """The adapter folder for a path: the folder itself, or `adapter/` of a checkpoint or of a run's newest one.

    A folder that holds neither is returned unchanged; its reader reports what is wrong with it.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise AdapterError(why_no_adapter_folder(folder))
    if _holds_adapter(folder):
        _mention_others(folder)
        return folder
    inside = [item / "adapter" for item in (folder, *(item for _, item in reversed(checkpoints(folder))))]
    adapter = next((item for item in inside if item.is_dir()), None)
    if adapter is None and (several := adapters_inside(folder)):
        raise AdapterError(several)
    return adapter or folder


def is_adapter(path: str | Path) -> bool:
    """Whether `adapter_folder` finds an adapter for a path."""
    try:
        return _holds_adapter(adapter_folder(path))
    except AdapterError:
        return False


def _holds_adapter(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ADAPTER_CONFIG, "moslora.json", "lora_config.json"))


def projector_file(path: str | Path) -> Path:
    """The projector file for a path: the file itself, or that of a checkpoint or of a run's newest one.

    A path without a projector is returned unchanged; its reader reports what is wrong with it.
    """
    folder = Path(path)
    inside = [item / PROJECTOR for item in (folder, *(item for _, item in reversed(checkpoints(folder))))]
    return next((item for item in inside if item.is_file()), folder) if folder.is_dir() else folder


def require_projector(path: str | Path) -> Path:
    """The projector file of `model.projector.weights`, see `projector_file`."""
    file = projector_file(path)
    if not file.is_file():
        what = "is a folder without checkpoints and projector.safetensors" if file.is_dir() else "does not exist"
        raise ModelError(
            f"model.projector.weights: {file} {what}. Give a run folder, a checkpoint, or a projector.safetensors."
        )
    return file


def require_model(key: str, name: str | None) -> None:
    """Refuse a path without a model or its configuration, for which the hub's error message would be misleading."""
    if not name:
        return
    if name.startswith(("/", "./", "../")) and not Path(name).exists():
        raise ModelError(
            f"{key} is {name!r}, and nothing is there. If it was moved, add its new parent folder to the "
            f"environment variable {MODELS}."
        )
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ModelError(f"{key} is {name!r}, a folder without config.json. Give the folder that holds the model's.")


def resume_folder(resume: str) -> Path | None:
    """The checkpoint of `--resume`; None where it is one of the accepted words."""
    if resume in RESUME_WORDS:
        return None
    if not Path(resume).is_dir():
        raise CheckpointError(
            f"resume is {resume!r}, which is not a folder; expected auto, required, never or a checkpoint's folder."
            f"{suggestion(resume, RESUME_WORDS)}"
        )
    return Path(resume)


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make errors of writing a file or folder name its path.

    safetensors reports a full disk by its own exception, and neither it nor Python names the file of a failed write.
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
        if error.errno is None:  # not raised by the system
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
