"""Attention for CPUs in C++, compiled once per machine where a compiler is installed. It is optional.

`mm_moslora.kernels.attention.native_cpu_attention` calls it.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import sys
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from mm_moslora.launch.child_processes import output_of
from mm_moslora.utils.errors import MoSLoRAError
from mm_moslora.utils.files import replacing
from mm_moslora.utils.hardware import CPUINFO, extensions_folder

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fPIC", "-shared")
SECONDS = 300
"""Time limit of a compilation, which takes two or three."""
_DIGEST = 32
"""Bytes of the sha256 at the end of a library; loaders ignore it."""

_POINTER, _LONG, _FLOAT, _INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_HEADS = (_POINTER, _LONG, _LONG)
_ATTENTION = (_POINTER, _LONG, _LONG, _LONG, _LONG, _FLOAT, _INT, _INT)
_ARGUMENTS = {
    "attend": (*_HEADS * 4, _POINTER, *_ATTENTION),
    "attend_backward": (*_HEADS * 5, _POINTER, *_HEADS * 3, *_ATTENTION),
}
"""Argument types of each function of the source, which exists for every dtype."""
DTYPES = ("full", "half")
"""Suffixes of the functions of float32 and of bfloat16."""


class NativeError(MoSLoRAError, RuntimeError):
    """The kernels cannot be compiled or loaded here."""


class Library:
    """The compiled kernel.

    Args:
        path: of the shared library.
        compiler: name and version of its compiler.
    """

    def __init__(self, path: Path, compiler: str) -> None:
        self.compiler, self.path = compiler, path
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeError(f"{path} does not load ({error})") from error
        self._functions: dict[str, Any] = {}
        for name, dtype in product(_ARGUMENTS, DTYPES):
            function = self._functions[f"{name}_{dtype}"] = getattr(library, f"{name}_{dtype}")
            function.argtypes, function.restype = _ARGUMENTS[name], None

    def __getitem__(self, name: str) -> Any:
        """A function by its name in the source, such as `attend_half`."""
        return self._functions[name]


def find_compiler() -> str | None:
    """The C++ compiler for the kernels: the one that CXX names, or a usual one of Unix."""
    names = (os.environ.get("CXX") or "", *COMPILERS)
    return next(filter(None, (shutil.which(name) for name in names if name)), None) if os.name == "posix" else None


@cache
def library() -> Library:
    """The kernels; they are compiled at the first call on a machine.

    Raises:
        NativeError: they cannot be compiled or loaded.
    """
    compiler = find_compiler()
    if compiler is None:
        raise NativeError(f"there is no C++ compiler here ({', '.join(COMPILERS)}, or the one that CXX names)")
    words = _run([compiler, "--version"]).splitlines()[0]
    path = extensions_folder(os.environ) / "mm_moslora" / f"kernels-{_fingerprint(words)}.so"
    if path.exists():
        if _is_whole(path):
            return Library(path, words)
        logger.warning("%s is damaged; the kernels are compiled again.", path)
    _compile(compiler, path)
    return Library(path, words)


def _is_whole(path: Path) -> bool:
    """Whether a library is undamaged: loading a truncated one ends the process."""
    content = path.read_bytes()
    return content[-_DIGEST:] == hashlib.sha256(content[:-_DIGEST]).digest()


def _fingerprint(compiler: str) -> str:
    """A digest of everything that the compiled library depends on: hosts with other processors may share the folder."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    kinds = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    sources = (path.read_text() for path in sorted((*FOLDER.glob("*.h"), *FOLDER.glob("*.cpp"))))
    parts = (*sources, compiler, *FLAGS, platform.machine(), sys.platform, *kinds)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(compiler: str, path: Path) -> None:
    """Compile to a temporary file and rename it: a rank that starts at the same time never reads half a file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as made:
            # gcc, as CXX may name it, links the C++ library only where it is named.
            command = [compiler, *FLAGS, *map(str, sorted(FOLDER.glob("*.cpp"))), "-o", str(made), "-lstdc++"]
            try:
                _run([*command, "-fopenmp"])
            except NativeError:
                _run(command)  # without threads
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
    except OSError as error:
        raise NativeError(f"nothing can be written to {path.parent} ({error.strerror})") from error


def _run(command: list[str]) -> str:
    try:
        done = output_of(command, seconds=SECONDS)
    except TimeoutError as error:
        raise NativeError(str(error)) from error
    except OSError as error:
        raise NativeError(f"{command[0]} does not start ({error.strerror})") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise NativeError(f"{command[0]} fails ({lines[0] if lines else f'exit code {done.returncode}'})")
    return done.stdout
