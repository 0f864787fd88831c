"""A CUDA device without a GPU: fake tensors have shapes, dtypes and devices but no values.

In `fake_cuda_device.fake_cuda`, an operator that gets tensors of two devices raises, as on a GPU. What makes the host
wait for the device is noted with its place in the code. Tensors that were copied from the host, and what is computed
from these alone (positions, masks, pictures), have their values beside them, so that code that reads them goes on. Not
seen: other values, the random generator's state, memory, and time.

`load` must be called before torch is imported, so this runs in processes of its own (`fake_cuda_worker`).
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from pathlib import Path

SOURCE = Path(__file__).with_suffix(".cpp")


def torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    return Path(next(iter(found.submodule_search_locations or ())))


def build(folder: Path) -> Path:
    """Compile the device; takes a few seconds."""
    torch, library = torch_folder(), folder / "fake_cuda.so"
    command = [
        "c++",
        "-std=c++20",
        "-O0",
        "-shared",
        "-fPIC",
        f"-I{torch / 'include'}",
        str(SOURCE),
        "-o",
        str(library),
    ]
    links = [f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"]
    subprocess.run(command + links, check=True)
    return library


def load(library: Path) -> None:
    """Register the device. PyTorch looks for one once, when it is imported."""
    assert "torch" not in sys.modules
    ctypes.CDLL(str(torch_folder() / "lib" / "libtorch_global_deps.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library))
