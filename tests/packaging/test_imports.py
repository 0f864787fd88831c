"""Imports: no circle among the modules; a program that imports the package meets nothing heavy and no change."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]
SHARED_WITH_DIFFUSION = {"checkpointing", "supervision", "deepspeed_start", "metrics.mixer_metrics"}
"""Of `mm_moslora.training`, what docs/architecture.md allows diffusion to import."""


@pytest.fixture
def check_imports() -> ModuleType:
    pytest.importorskip("grimp", reason="grimp is not installed")
    spec = importlib.util.spec_from_file_location("check_imports", CHECKOUT / "scripts" / "check_imports.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_has_no_circle_no_full_folder_and_no_name_twice(check_imports: ModuleType) -> None:
    assert check_imports.faults() == []


def test_the_picture_of_packages_is_that_of_the_imports(check_imports: ModuleType) -> None:
    """If not: `python scripts/check_imports.py --draw`."""
    text = check_imports.PICTURE.read_text()
    assert check_imports.drawn(text) == text


def test_a_circle_of_scripts_is_found(check_imports: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "one.py").write_text("def call():\n    from two import name\n")
    (tmp_path / "two.py").write_text("import one, json\n")
    (found,) = check_imports.faults(scripts=tmp_path)
    assert "one -> two -> one" in found or "two -> one -> two" in found


@pytest.mark.parametrize(
    ("closing", "fault"),
    [
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {name}.low import high\n", "Circle"),
        ("def call():\n    from {name}.low import high\n", "Circle"),
        ("import json\n", None),
    ],
    ids=["type checking", "in a function", "none"],
)
def test_a_circle_is_found_wherever_the_import_stands(
    check_imports: ModuleType, closing: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"made_up_{tmp_path.name}"  # importlib remembers packages by name
    for path, text in (
        ("low/__init__", ""),
        ("__init__", ""),
        ("low/high", f"import {name}.below\n"),
        ("below", closing),
    ):
        file = tmp_path / name / f"{path}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text.format(name=name))
    monkeypatch.syspath_prepend(tmp_path)
    found = check_imports.faults({name: tmp_path / name})
    assert len(found) == (fault is not None)
    if fault is not None:
        assert found[0].startswith(f"{fault} of imports: {name}.")
        assert {f"{name}.below", f"{name}.low.high"} <= set(found[0].replace(". Move", " ").split())


def test_full_folders_and_names_that_occur_twice_are_found(check_imports: ModuleType, tmp_path: Path) -> None:
    for index in range(check_imports.LIMIT + 1):
        (tmp_path / f"module_{index}.py").touch()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "module_0.py").touch()
    (full,) = check_imports.full_folders([tmp_path])
    assert f"holds {check_imports.LIMIT + 1} modules" in full
    (twice,) = check_imports.names_used_twice([tmp_path])
    assert twice.startswith("module_0.py occurs 2 times")


def test_two_public_classes_of_one_name_are_refused_with_both_files(check_imports: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for file, text in (
        (first / "one.py", "class Report: ...\nclass _Row: ...\nclass Page:\n    class Row: ...\n"),
        (first / "deep" / "two.py", "class _Row: ...\nclass Row: ...\n"),
        (second / "three.py", "import one\nclass Report(one.Report): ...\n"),
    ):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (twice,) = check_imports.names_used_twice([first, second])
    assert twice.startswith("class Report occurs 2 times (first/one.py, second/three.py)")
    (first / "one.py").write_text("class Report: ...\nclass Report: ...\n")
    (second / "three.py").unlink()
    (twice,) = check_imports.names_used_twice([first, second])
    assert "(first/one.py, first/one.py)" in twice


def modules_of(folder: Path) -> set[str]:
    """Names of the modules and packages of a folder."""
    return {path.stem for path in folder.iterdir() if not path.name.startswith("__")}


def test_the_contract_of_diffusion_forbids_every_other_module_of_training() -> None:
    """A new module of training is forbidden too."""
    settings = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (one for one in settings["contracts"] if one.get("source_modules") == ["mm_moslora.diffusion"])
    training = CHECKOUT / "mm_moslora" / "training"
    modules = modules_of(training) - {"metrics"} | {f"metrics.{name}" for name in modules_of(training / "metrics")}
    assert modules >= SHARED_WITH_DIFFUSION
    assert set(contract["forbidden_modules"]) == {
        f"mm_moslora.training.{name}" for name in modules - SHARED_WITH_DIFFUSION
    }


IMPORTED_BY_NAME = {
    "kernels/lora/seeded_dropout.py: mm_moslora.kernels.lora.triton_dropout": "Triton may be missing",
    "kernels/triton_availability.py: mm_moslora.kernels.triton_trial": "Triton may be missing",
}
"""Imports that no contract sees, with the reason."""


def imported_by_name(source: str) -> set[str]:
    """Modules of the project that calls of `import_module` and `__import__` name."""
    return {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and node.args and ast.unparse(node.func).endswith(("import_module", "__import__"))
        if isinstance(node.args[0], ast.Constant) and str(node.args[0].value).startswith("mm_moslora")
    }


def test_imports_by_name_are_listed_since_no_contract_sees_them() -> None:
    found = {
        f"{path.relative_to(folder).as_posix()}: {name}"
        for folder in (CHECKOUT / "mm_moslora", CHECKOUT / "eval" / "mm_moslora_eval")
        for path in folder.rglob("*.py")
        for name in imported_by_name(path.read_text())
    }
    assert found == {*IMPORTED_BY_NAME}, "use an import statement, which import-linter reads"
    assert imported_by_name("importlib.import_module('mm_moslora.cli')\nimport_module('torch')") == {"mm_moslora.cli"}


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'eval'}"}
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env=environment)


def test_the_package_itself_imports_nothing_heavy_and_without_a_warning() -> None:
    code = "import sys, mm_moslora, mm_moslora.config, mm_moslora_eval; sys.exit('torch' in sys.modules)"
    done = python(code, "-W", "error")
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_said_no_logging_or_threads_are_set_up_and_trainer_is_not_imported() -> None:
    code = """
import logging, sys, threading
import mm_moslora.models.load_model, mm_moslora.training.training_loop, mm_moslora_eval.backends.transformers_model
ours = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith("mm_moslora")]
print(logging.root.handlers, [logger for logger in ours if logger.handlers], threading.active_count())
# datasets is slow to import, and the other prints a line about wandb: the first one before the JSON of a command.
print([name in sys.modules for name in ("datasets", "transformers.integrations.integration_utils")])"""
    done = python(code)
    assert (done.stdout.splitlines()[-2:], done.stderr) == (["[] [] 1", "[False, False]"], "")
