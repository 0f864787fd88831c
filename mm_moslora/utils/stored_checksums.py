"""The manifest of a checkpoint is believed by every reader: weights are read only with the bytes that it names."""

from __future__ import annotations

from pathlib import Path

from mm_moslora.utils.errors import CheckpointError
from mm_moslora.utils.files import read_json, sha256_of
from mm_moslora.utils.run_paths import MANIFEST

_RESUME_ONLY = "trainer/"
"""Only a resumed run reads this part, and checks it itself."""


def check_stored(path: Path) -> None:
    """Refuse weights that the manifest of the checkpoint that holds them shows as missing, truncated or altered.

    Other files may be edited, such as a chat template: `check_preprocessing` compares what they do.
    """
    checkpoint = next((folder for folder in (path, path.parent) if (folder / MANIFEST).is_file()), None)
    if checkpoint is None:
        return
    try:
        stored = {str(name): entry["sha256"] for name, entry in read_json(checkpoint / MANIFEST)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint / MANIFEST} is damaged ({error}). Copy the checkpoint again, or choose another one."
        ) from error
    inside = "" if path == checkpoint else path.relative_to(checkpoint).as_posix()
    for name, expected in stored.items():
        wanted = not inside or name == inside or name.startswith(f"{inside}/")
        if not wanted or not name.endswith(".safetensors") or name.startswith(_RESUME_ONLY):
            continue
        file = checkpoint / name
        if not file.is_file() or sha256_of(file) != expected:
            what = "was altered or truncated: its sha256 differs from" if file.is_file() else "is missing, named by"
            raise CheckpointError(f"{file} {what} {MANIFEST}. Copy the checkpoint again, or choose another one.")
