#!/usr/bin/env python
"""Collect wheels of what an image with PyTorch, transformers and PEFT lacks, for a GPU machine without a network.

    python scripts/gpu_wheels.py                       into build/gpu_wheels, for Python 3.12 on Linux x86-64
    python scripts/gpu_wheels.py torchao av            more packages
    python scripts/gpu_wheels.py --without datasets    fewer

Versions are those that `pyproject.toml` and the collected wheels allow. DeepSpeed, which has no wheel, is built without
operators, in the environment of this Python, which needs torch and setuptools. `scripts/gpu.sh` installs the folder.
What the wheels require beyond each other is printed: the machine must have it (`scripts/gpu_preflight.py` checks it).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterable, Sequence
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "transformers", "huggingface-hub", "hf-xet", "tokenizers", "safetensors", "fsspec", "peft", "liger-kernel",  # newer
    "deepspeed", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",  # train.zero
    "cyclopts", "docstring-parser", "rich-rst",                              # the command line
    "datasets", "dill", "multiprocess", "open-clip-torch", "ftfy", "wcwidth", "gguf",
    "starlette", "uvicorn",                                                  # mm-moslora serve
    "bitsandbytes",                                                          # 4- and 8-bit bases
    "pytest", "pluggy", "iniconfig", "pytest-xdist", "execnet",              # tests/gpu
)  # fmt: skip
"""In an order in which those that require others exactly come first."""
BUILT = ("deepspeed",)
"""Packages without wheels; they are built without compiled parts."""
LIBRARIES = re.compile(r"lib\w+_(cuda\d+|rocm\d+|xpu\d+)\.so")
"""Libraries of which a wheel holds one for each platform (bitsandbytes); only that of the machine's CUDA is kept."""
PLATFORMS = ("2_28", "2_34", "2_31", "2_27", "2_24", "2_17", "2_5")


def declared() -> dict[str, SpecifierSet]:
    """Versions that `pyproject.toml` allows, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(canonicalize_name(requirement.name), requirement.specifier)
    return found


def required(wheel: Path, python: str) -> list[Requirement]:
    """What a wheel requires on Linux without extras.

    Args:
        wheel: the file.
        python: version, such as 3.12.
    """
    environment = {
        "extra": "", "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "os_name": "posix",
    }  # fmt: skip
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        lines = Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []
    found = map(Requirement, lines)
    return [one for one in found if one.marker is None or one.marker.evaluate(environment)]


def slim(wheel: Path, cuda: str) -> None:
    """Take libraries for other platforms out of a wheel, in place.

    Args:
        wheel: the file.
        cuda: version of the machine's CUDA without its dot.
    """
    with zipfile.ZipFile(wheel) as archive:
        others = {
            name for name in archive.namelist() if (match := LIBRARIES.search(name)) and match[1] != f"cuda{cuda}"
        }
        if not others:
            return
        kept = [(item, archive.read(item)) for item in archive.infolist() if item.filename not in others]
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for item, content in kept:
            if item.filename.endswith(".dist-info/RECORD"):
                lines = content.decode().splitlines(keepends=True)
                content = "".join(line for line in lines if line.split(",")[0] not in others).encode()
            archive.writestr(item, content)


def fetch(name: str, versions: SpecifierSet, folder: Path, python: str) -> Path:
    """Download or build one wheel.

    Raises:
        SystemExit: pip fails.
    """
    wanted = f"{name}{versions}"
    before = set(folder.iterdir())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if name in BUILT:
        command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), wanted]
    else:
        platforms = [part for tag in PLATFORMS for part in ("--platform", f"manylinux_{tag}_x86_64")]
        command = [
            *pip, "download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
            *platforms, "--platform", "manylinux2014_x86_64", "--dest", str(folder), wanted,
        ]  # fmt: skip
    settings = os.environ | {"DS_BUILD_OPS": "0", "DS_BUILD_STRING": "", "DS_ACCELERATOR": "cpu"}
    if subprocess.run(command, env=settings).returncode:
        raise SystemExit(f"pip gives no wheel of {wanted} for Python {python}. Leave it out with --without {name}.")
    (made,) = set(folder.iterdir()) - before
    if name in BUILT and not made.name.endswith("-none-any.whl"):
        raise SystemExit(f"{made.name} was built for this machine alone, expected a wheel for any.")
    return made


def collect(names: Iterable[str], folder: Path, python: str, cuda: str) -> list[str]:
    """Collect wheels into a folder; returns what they require beyond each other, sorted.

    Raises:
        SystemExit: a wheel cannot be had, or collected versions do not go together.
    """
    wanted = [canonicalize_name(name) for name in names]
    versions, wheels = declared(), []
    for name in dict.fromkeys(wanted):
        wheels.append(fetch(name, versions.get(name, SpecifierSet()), folder, python))
        slim(wheels[-1], cuda)
        for requirement in required(wheels[-1], python):
            other = canonicalize_name(requirement.name)
            versions[other] = versions.get(other, SpecifierSet()) & requirement.specifier
    collected = {name: version for name, version, *_ in (parse_wheel_filename(wheel.name) for wheel in wheels)}
    beyond: dict[str, SpecifierSet] = {}
    for wheel in wheels:
        for requirement in required(wheel, python):
            other = canonicalize_name(requirement.name)
            if other not in collected:
                beyond[other] = beyond.get(other, SpecifierSet()) & requirement.specifier
            elif not requirement.specifier.contains(collected[other], prereleases=True):
                raise SystemExit(f"{wheel.name} requires {requirement}, and {collected[other]} was collected.")
    return sorted(f"{name}{specifier}" for name, specifier in beyond.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the wheels and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("more", nargs="*", metavar="PACKAGE", help="further packages")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="packages to leave out")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_wheels", help="replaced as a whole")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--cuda", default="130", help="version of the machine's CUDA without its dot")
    parser.add_argument("--limit", type=float, default=40.0, metavar="MIB", help="of all wheels together")
    options = parser.parse_args(arguments)
    left_out = {canonicalize_name(name) for name in options.without}
    names = [name for name in (*PACKAGES, *options.more) if canonicalize_name(name) not in left_out]
    with tempfile.TemporaryDirectory() as folder:
        beyond = collect(names, Path(folder), options.python, options.cuda)
        wheels = sorted(Path(folder).iterdir(), key=lambda wheel: -wheel.stat().st_size)
        sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in wheels}
        for name, size in sizes.items():
            print(f"{size:7.2f} MiB  {name}")
        whole = sum(sizes.values())
        print(f"{whole:7.2f} MiB  in {len(sizes)} wheels, at most {options.limit:g}")
        if whole > options.limit:
            raise SystemExit("The wheels are above the limit. Leave packages out (--without), or raise --limit.")
        shutil.rmtree(options.out, ignore_errors=True)
        shutil.copytree(folder, options.out)
    print(f"{options.out} holds them. The machine must have: {', '.join(beyond)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
