#!/usr/bin/env python
"""What a GPU machine lacks for `scripts/gpu.sh`, as a list; the exit code is 1 where something is missing.

    python scripts/gpu_preflight.py --device cuda --wheels build/gpu_wheels

It needs Python alone. The wheels count as installed, and what they require must be there, too. On a GPU, Triton needs a
C compiler and Python's headers, and PyTorch must see the GPU: without it every test would be skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NEEDED = (
    "torch", "torchvision", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "huggingface-hub",
    "fsspec", "pillow", "numpy", "pyyaml", "xxhash", "packaging", "tqdm", "jinja2", "markupsafe", "cyclopts", "rich",
    "lazy-loader", "psutil", "pytest", "pytest-xdist",
)  # fmt: skip
"""Without these neither tests/gpu nor the benchmark start; tests and contenders that need more are left out."""


def requirements() -> Any:
    """The module `packaging.requirements`, also as pip carries it; None: neither is there."""
    for name in ("packaging", "pip._vendor.packaging"):
        try:
            return importlib.import_module(f"{name}.requirements")
        except ImportError:
            continue
    return None


def canonical(name: str) -> str:
    """A package's name as indexes write it."""
    return name.lower().replace("_", "-").replace(".", "-")


def fields_of(wheel: Path) -> Message:
    """Metadata of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


class Packages:
    """The installed packages, with the wheels of a folder in the place of those of the same name."""

    def __init__(self, wheels: Path) -> None:
        self.carried: dict[str, tuple[str, list[str]]] = {}
        for path in sorted(wheels.glob("*.whl")):
            fields = fields_of(path)
            self.carried[canonical(fields["Name"])] = fields["Version"], fields.get_all("Requires-Dist") or []

    def version(self, name: str) -> str | None:
        """The version of a package; None: it is not there."""
        if canonical(name) in self.carried:
            return self.carried[canonical(name)][0]
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    def lacking(self, wanted: Any, *, why: str) -> str | None:
        """A requirement that is not fulfilled, in words; None: it is."""
        version = self.version(wanted.name)
        if version is not None and wanted.specifier.contains(version, prereleases=True):
            return None
        state = "not installed" if version is None else f"{version} is installed"
        return f"{wanted.name}{wanted.specifier} ({why}): {state}"


def lacking_packages(packages: Packages) -> tuple[list[str], list[str]]:
    """What is not installed, or not in a version that the project or a carried wheel asks for: needed, and the rest."""
    module = requirements()
    if module is None:
        missing = [f"{name}: not installed" for name in NEEDED if packages.version(name) is None]
        return ["pip, or the package packaging, which reads versions", *missing], []
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = map(module.Requirement, [*project["dependencies"], *project["optional-dependencies"]["test"]])
    required = [(wanted, "the project") for wanted in own if canonical(wanted.name) in NEEDED]
    required += [(module.Requirement(line), name) for name, (_, lines) in packages.carried.items() for line in lines]
    required = [
        (wanted, why) for wanted, why in required if wanted.marker is None or wanted.marker.evaluate({"extra": ""})
    ]
    needed = {"the project"}
    lacking: tuple[list[str], list[str]] = [], []
    while more := {canonical(wanted.name) for wanted, why in required if why in needed} - needed:
        needed |= more
    for wanted, why in required:
        if (words := packages.lacking(wanted, why=why)) is not None:
            lacking[why not in needed].append(words)
    return lacking


def lacking_for_triton() -> Iterator[str]:
    """What Triton compiles its launchers with."""
    compiler = os.environ.get("CC", "")
    if not any(map(shutil.which, filter(None, (compiler, "gcc", "clang")))):
        yield "a C compiler for Triton: CC names none, and neither gcc nor clang is on the PATH"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        yield f"{header} for Triton: not there (Debian: apt-get install python3-dev)"


def lacking_gpu() -> Iterator[str]:
    """Whether PyTorch sees a GPU."""
    code = "import torch; torch.zeros(1, device='cuda').add_(1).item()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        yield f"a GPU that PyTorch runs on: {last}"


def main() -> int:
    """Print the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu_wheels", help="folder of carried wheels")
    parser.add_argument("--pip", default="", help="command of pip, where it is not this Python's")
    options = parser.parse_args()
    if sys.version_info < (3, 11):  # noqa: UP036  (it is another machine's Python)
        lacking = [f"Python 3.11 or later: this is {sys.version.split()[0]}"]
    else:
        packages = Packages(options.wheels)
        lacking, rest = lacking_packages(packages)
        if rest:
            print("Tests and contenders that need one of these may fail:", *rest, sep="\n  ", file=sys.stderr)
        if packages.carried and not (options.pip or importlib.util.find_spec("pip")):
            lacking.append("pip, which installs the wheels: this Python has none (PIP names another)")
        if options.device == "cuda":
            lacking += lacking_for_triton()
            # Without PyTorch the list says so; from a wheel it cannot be asked yet.
            if importlib.util.find_spec("torch") is not None:
                lacking += lacking_gpu()
    if lacking:
        print("This machine lacks:", *dict.fromkeys(lacking), sep="\n  ", file=sys.stderr)
        print(
            "Nothing was run or recorded. scripts/gpu_wheels.py --have FILE carries it; `pip freeze` writes FILE here.",
            file=sys.stderr,
        )
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
