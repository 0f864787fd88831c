"""What the packages import is declared, and what is declared as lowest is what `make test-versions` installs."""

from __future__ import annotations

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
PACKAGES = ("mm_moslora", "eval/mm_moslora_eval")
OUTSIDE = ("tests", "scripts", "examples")
EXTRA_ONLY = ("serve",)
"""Packages of `mm_moslora` that are imported only where the extra `serve` is installed."""
OPTIONAL = {
    "triton": "PyTorch's CUDA builds bring it, and liger-kernel",
    "compression": "Python's own from 3.14 on",
    "vllm": "only a benchmark for GPUs compares with it, where it is installed",
    "lmms_eval": "its pin of wandb contradicts the project's; eval/README.md has the command",
}
UNMEASURED = {
    "mlflow", "trackio", "pandas", "gradio", "liger-kernel", "lm-eval", "ray",
    "mkdocs", "mkdocs-material", "mkdocstrings", "nltk", "jieba",
}  # fmt: skip
"""Extras that the lowest environment leaves out: they contradict others there, or are as large as the rest."""


def requirements(*extras: str) -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return [Requirement(line) for line in lines]


def everything() -> list[Requirement]:
    found = requirements(*PROJECT["optional-dependencies"])
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def imports(tree: ast.AST, *, top: bool = False) -> Iterator[str]:
    """Top-level names of what a file imports; with `top`, what it imports whenever it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif top and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _for_types(node)):
            continue
        else:
            yield from imports(node, top=top)


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def undeclared(files: list[Path], declared: list[Requirement], own: set[str], *, top: bool = False) -> dict[str, str]:
    """Names that no declared distribution provides, with a file that imports each."""
    names = {canonicalize_name(requirement.name) for requirement in declared}
    providers = packages_distributions()
    found = {}
    for path in files:
        for name in imports(ast.parse(path.read_text()), top=top):
            if name in sys.stdlib_module_names or name in own or name in OPTIONAL:
                continue
            if not names & {canonicalize_name(provider) for provider in [*providers.get(name, []), name]}:
                found[name] = str(path.relative_to(CHECKOUT))
    return found


def python_files(folders: tuple[str, ...]) -> list[Path]:
    return [path for folder in folders for path in sorted((CHECKOUT / folder).rglob("*.py"))]


OWN = {"mm_moslora", "mm_moslora_eval"}


def test_all_that_the_packages_import_is_declared():
    declared = [r for r in everything() if r not in requirements("dev", "test") or r in requirements()]
    assert not undeclared(python_files(PACKAGES), declared, OWN)


def test_what_is_imported_without_an_extra_is_a_dependency_of_its_own():
    def needs_extra(path: Path) -> bool:
        return path.relative_to(CHECKOUT).parts[1] in EXTRA_ONLY or path.stem in {
            "liger_ops",
            "triton_dropout",
            "triton_ops",
            "lm_eval_adapter",
            "lmms_eval_adapter",
            "trl_trainers",
            "reward_trainer",
        }

    files = [path for path in python_files(PACKAGES) if not needs_extra(path)]
    assert not undeclared(files, requirements(), OWN, top=True)


def test_all_that_tests_scripts_and_examples_import_is_declared():
    files = python_files(OUTSIDE)
    local = {path.stem for path in files} | {path.parent.name for path in files} | set(OUTSIDE)
    assert not undeclared(files, everything(), OWN | local)


def test_floors_that_no_environment_installs_say_so():
    lines = [line for line in (CHECKOUT / "pyproject.toml").read_text().splitlines() if "[untested floor]" in line]
    named = {name for line in lines[1:] for name in UNMEASURED if re.search(rf'"{name}(\[\w+\])?>=', line)}
    assert named == UNMEASURED
    assert len(lines[1:]) == len([line for line in lines if ">=" in line])


def test_every_dependency_has_a_floor():
    assert not [str(r) for r in everything() if not any(part.operator == ">=" for part in r.specifier)]


def installed() -> dict[str, str]:
    found = {}
    for requirement in everything():
        try:
            found[canonicalize_name(requirement.name)] = version(requirement.name)
        except PackageNotFoundError:
            continue
    return found


def same_release(floor: str, found: str) -> bool:
    """Whether a version is the first one of a floor: 1.2.0 of 1.2, and 1.2.0.post1 of it."""
    wanted, release = Version(floor).release, Version(found).release
    return release == wanted + (0,) * (len(release) - len(wanted))


@pytest.mark.skipif(os.environ.get("VERSIONS") != "lowest", reason="only `make test-versions` installs lowest versions")
def test_floors_are_what_is_tested():
    there, wrong = installed(), []
    for requirement in everything():
        name = canonicalize_name(requirement.name)
        floor = next(part.version for part in requirement.specifier if part.operator == ">=")
        applies = requirement.marker is None or requirement.marker.evaluate()
        in_dev = requirement in requirements("dev") and requirement not in requirements()
        if not applies or name in UNMEASURED or (in_dev and name not in there):
            continue
        if name not in there or not same_release(floor, there[name]):
            wrong.append(f"{requirement} is tested with {there.get(name)}")
    assert not wrong


@pytest.mark.skipif(
    os.environ.get("VERSIONS") != "gpu-image", reason="only `make test-versions` installs an image's versions"
)
def test_a_gpu_image_is_what_is_tested():
    (floor,) = (
        p.version for r in requirements() if r.name == "transformers" for p in r.specifier if p.operator == ">="
    )
    assert sys.version_info[:2] == (3, 12)
    assert Version(version("torch")).release[:2] == (2, 11)
    assert same_release(floor, version("transformers"))
