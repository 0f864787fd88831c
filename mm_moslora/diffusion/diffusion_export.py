"""Hand the adapters of a diffusion run to other programs: diffusers' and Kohya's files."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mm_moslora.adapters import export_adapter
from mm_moslora.adapters.folder_format import OWN_CONFIG
from mm_moslora.adapters.folders.export_adapter import COMPONENTS
from mm_moslora.utils.errors import AdapterError
from mm_moslora.utils.run_paths import checkpoints

LoraLayout = Literal["diffusers", "kohya"]


def adapter_parts(folder: Path) -> dict[str, Path]:
    """The adapter folders of a diffusion run by component.

    Args:
        folder: a run (its newest checkpoint), a checkpoint, or the `adapter` folder of one.

    Raises:
        AdapterError: there are none.
    """
    newest = [path for _, path in reversed(checkpoints(folder))][:1] if folder.is_dir() else []
    for parent in (folder, folder / "adapter", *(path / "adapter" for path in newest)):
        parts = {name: parent / name for name in COMPONENTS if (parent / name / OWN_CONFIG).is_file()}
        if parts:
            return parts
    raise AdapterError(
        f"{folder} holds no adapters of a diffusion pipeline ({', '.join(COMPONENTS[:4])}, ...). Name the folder of a "
        "run of `mm-moslora diffusion train`, or one of its checkpoints."
    )


def write_lora_file(folder: Path, out: Path, *, layout: LoraLayout = "diffusers") -> Path:
    """Write all components of a run into one file without mixers: B takes them in.

    Args:
        folder: see `adapter_parts`.
        out: folder for `pytorch_lora_weights.safetensors` (diffusers), or the .safetensors file (kohya).
        layout: diffusers for `load_lora_weights`; kohya for AUTOMATIC1111, ComfyUI and others.

    Returns:
        `out`.
    """
    return export_adapter(adapter_parts(folder), out, layout=layout)
