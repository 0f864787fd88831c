#!/usr/bin/env python
"""Collect wheels of what an image with PyTorch, transformers and PEFT lacks, for a GPU machine without a network.

    python scripts/gpu_wheels.py                       into build/gpu_wheels, for Python 3.12 on Linux x86-64
    python scripts/gpu_wheels.py av                    more packages
    python scripts/gpu_wheels.py --without datasets    fewer
    python scripts/gpu_wheels.py --have there.txt      and whatever else is required; `pip freeze` there wrote the list
    python scripts/gpu_wheels.py --have /dev/null --limit 5000    everything, with PyTorch and its CUDA libraries

Versions are those that `pyproject.toml` and the collected wheels allow. DeepSpeed, which has no wheel, is built without
operators, in the environment of this Python, which needs torch and setuptools. `scripts/gpu.sh` installs the folder.
What the wheels require beyond each other is printed: the machine must have it (`scripts/gpu_preflight.py` checks it).
Gigabytes are installed once there, not in every call: python3 -m venv env; env/bin/pip install --no-index --no-deps
build/gpu_wheels/*.whl; PYTHON=env/bin/python WHEELS=none scripts/gpu.sh
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
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from gpu_preflight import NEEDED, ROOT, fields_of
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name, parse_wheel_filename

PACKAGES = (
    "transformers", "huggingface-hub", "hf-xet", "tokenizers", "safetensors", "fsspec", "peft", "liger-kernel",  # newer
    "deepspeed", "hjson", "pydantic", "pydantic-core", "annotated-types", "typing-inspection",  # train.zero
    "cyclopts", "docstring-parser", "rich-rst", "lazy-loader",               # the command line, imports of the package
    "httpx2", "httpcore2", "truststore", "anyio", "idna", "h11", "click", "attrs", "typing-extensions",  # of the above
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
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]


def declared() -> dict[str, SpecifierSet]:
    """Versions that `pyproject.toml` allows, by canonical name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, lines):
        found.setdefault(canonicalize_name(requirement.name), requirement.specifier)
    return found


@cache
def metadata(wheel: Path) -> list[Requirement]:
    """What a wheel requires, on any platform and with any extras."""
    return [Requirement(line) for line in fields_of(wheel).get_all("Requires-Dist") or []]


def required(wheels: Sequence[Path], python: str) -> list[tuple[Path, Requirement]]:
    """What wheels require on Linux under a version of Python, with the extras that others ask of them."""
    environment = {
        "python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux",
        "platform_system": "Linux", "platform_machine": "x86_64", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "os_name": "posix",
    }  # fmt: skip
    extras: dict[str, set[str]] = {}
    while True:
        found = [
            (wheel, one)
            for wheel in wheels
            for one in metadata(wheel)
            for asked in [{"", *extras.get(parse_wheel_filename(wheel.name)[0], ())}]
            if one.marker is None or any(one.marker.evaluate(environment | {"extra": extra}) for extra in asked)
        ]
        before, extras = extras, {}
        for _, one in found:
            extras.setdefault(canonicalize_name(one.name), set()).update(one.extras)
        if extras == before:
            return found


def slim(wheel: Path, cuda: str) -> None:
    """Take libraries for other platforms than this version of CUDA, without its dot, out of a wheel, in place."""
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
    """Download or build one wheel."""
    wanted = f"{name}{versions}"
    before = set(folder.iterdir())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    if name in BUILT:
        command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), wanted]
    else:
        platforms = [part for tag in PLATFORMS for part in ("--platform", tag)]
        command = [
            *pip, "download", "--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp",
            *platforms, "--dest", str(folder), wanted,
        ]  # fmt: skip
    settings = os.environ | {"DS_BUILD_OPS": "0", "DS_BUILD_STRING": "", "DS_ACCELERATOR": "cpu"}
    if subprocess.run(command, env=settings).returncode:
        raise SystemExit(f"pip gives no wheel of {wanted} for Python {python}. Leave it out with --without {name}.")
    (made,) = set(folder.iterdir()) - before
    if name in BUILT and not made.name.endswith("-none-any.whl"):
        raise SystemExit(f"{made.name} was built for this machine alone, expected a wheel for any.")
    return made


def installed(file: Path) -> dict[str, str]:
    """Names and versions of the packages in a list; an empty version is not known and fits."""
    words = [line.strip().partition("==") for line in file.read_text(encoding="utf-8").splitlines()]
    named = [(name.partition(" @ ")[0], version) for name, _, version in words]
    return {canonicalize_name(name): version for name, version in named if name and name[0] not in "#-"}


def lacks(have: Mapping[str, str], name: str, versions: SpecifierSet) -> bool:
    """Whether a machine lacks a package, or a version that will do."""
    version = have.get(canonicalize_name(name))
    return version is None or bool(version and not versions.contains(version, prereleases=True))


def collect(
    names: Iterable[str], folder: Path, python: str, cuda: str, *, have: Mapping[str, str] | None = None
) -> list[str]:
    """Collect wheels into a folder; returns what they require beyond each other, sorted.

    `have` are the packages of the machine: whatever else is required is collected, too. None: they are not known.
    """
    wanted: list[str] = [canonicalize_name(name) for name in names]
    wheels: list[Path] = []
    while wanted:
        for name in dict.fromkeys(wanted):
            versions = declared().get(name, SpecifierSet())
            for _, one in required(wheels, python):
                versions &= one.specifier if canonicalize_name(one.name) == name else SpecifierSet()
            wheels.append(fetch(name, versions, folder, python))
            slim(wheels[-1], cuda)
        beyond = _beyond(wheels, python)
        wanted = [name for name, asked in beyond.items() if have is not None and lacks(have, name, asked)]
    return sorted(f"{name}{specifier}" for name, specifier in beyond.items())


def _beyond(wheels: Sequence[Path], python: str) -> dict[str, SpecifierSet]:
    """What wheels require beyond each other."""
    collected = {name: version for name, version, *_ in (parse_wheel_filename(wheel.name) for wheel in wheels)}
    beyond: dict[str, SpecifierSet] = {}
    for wheel, requirement in required(wheels, python):
        other = canonicalize_name(requirement.name)
        if other not in collected:
            beyond[other] = beyond.get(other, SpecifierSet()) & requirement.specifier
        elif not requirement.specifier.contains(collected[other], prereleases=True):
            raise SystemExit(f"{wheel.name} requires {requirement}, and {collected[other]} was collected.")
    return beyond


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the wheels and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("more", nargs="*", metavar="PACKAGE", help="further packages")
    parser.add_argument("--without", nargs="+", default=[], metavar="PACKAGE", help="packages to leave out")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_wheels", help="replaced as a whole")
    parser.add_argument("--python", default="3.12", help="version of the machine's Python")
    parser.add_argument("--cuda", default="130", help="version of the machine's CUDA without its dot")
    parser.add_argument("--limit", type=float, default=40.0, metavar="MIB", help="of all wheels together")
    parser.add_argument(
        "--have", type=Path, metavar="FILE", help="packages of the machine, NAME or NAME==VERSION a line"
    )
    options = parser.parse_args(arguments)
    have = None if options.have is None else installed(options.have)
    left_out = {canonicalize_name(name) for name in options.without}
    asked = [] if have is None else [name for name in NEEDED if lacks(have, name, declared().get(name, SpecifierSet()))]
    names = [name for name in (*PACKAGES, *options.more, *asked) if canonicalize_name(name) not in left_out]
    with tempfile.TemporaryDirectory() as folder:
        beyond = collect(names, Path(folder), options.python, options.cuda, have=have)
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
