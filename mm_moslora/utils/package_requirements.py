"""Declared requirements of this project, and the commands that install them.

`mm-moslora` may be on no index, so a hint never names it: it lists the packages of an extra.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

NAME = "mm-moslora"
_PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
_EXTRA = re.compile(r"\bextra\s*==\s*['\"]([\w.-]+)['\"]")


def declared(extra: str | None = None) -> tuple[Requirement, ...]:
    """The dependencies, or those of an extra alone, that apply to this system.

    Args:
        extra: name of the extra; None: the requirements of a plain installation.

    Returns:
        Requirements without markers, under canonical names; empty where neither the checkout nor the metadata of an
        installation is available.
    """
    return tuple(_expand(extra or "", set()))


def declared_anywhere() -> tuple[Requirement, ...]:
    """The dependencies, and those of every extra."""
    return tuple(item for extra in _all() for item in declared(extra or None))


def _expand(extra: str, visited: set[str]) -> Iterator[Requirement]:
    visited.add(extra)
    for requirement in _all().get(extra, ()):
        if canonicalize_name(requirement.name) == NAME:  # an extra that includes other extras
            for further in sorted(requirement.extras - visited):
                yield from _expand(further, visited)
        elif requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            yield Requirement(f"{canonicalize_name(requirement.name)}{requirement.specifier}")


def range_of(requirement: Requirement) -> str:
    """`>=0.21,<0.22`, the lower bound first."""
    return ",".join(sorted((str(part) for part in requirement.specifier), key=lambda part: (part[0] != ">", part)))


@cache
def _all() -> dict[str, list[Requirement]]:
    """Requirements by extra; the dependencies have the empty name.

    A checkout's `pyproject.toml` takes precedence, since the metadata of an editable installation may be outdated.
    """
    project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8")).get("project", {}) if _PYPROJECT.is_file() else {}
    if project.get("name") == NAME:
        lines = {"": project["dependencies"], **project["optional-dependencies"]}
        return {extra: [Requirement(line) for line in listed] for extra, listed in lines.items()}
    try:
        installed = requires(NAME) or []
    except PackageNotFoundError:
        return {}
    by_extra: dict[str, list[Requirement]] = {}
    for requirement in map(Requirement, installed):
        match = _EXTRA.search(str(requirement.marker or ""))
        by_extra.setdefault(match[1] if match else "", []).append(requirement)
    return by_extra


def install_command(*packages: str) -> str:
    """`pip install 'onnx>=1.17'`: packages within their declared range, of any extra."""
    requirements = {item.name: item for item in declared_anywhere()}
    return _pip(requirements.get(canonicalize_name(name)) or Requirement(name) for name in packages)


def install_extra(extra: str) -> str:
    """The command that installs the packages of an extra; installed packages within their range are kept."""
    return _pip(declared(extra)) if declared(extra) else f"pip install '.[{extra}]' in the checkout"


def _pip(requirements: Iterable[Requirement]) -> str:
    return shlex.join(["pip", "install", *(f"{item.name}{range_of(item)}" for item in requirements)])


def is_installed(module: str) -> bool:
    """Whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package is missing, or `sys.modules` holds None for it
        return False


@cache
def installed_version(package: str) -> str | None:
    """Version of an installed distribution, read once; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
