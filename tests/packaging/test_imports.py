"""Imports: no circle among the modules; a program that imports the package meets nothing heavy and no change."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def check_imports() -> ModuleType:
    return pytest.importorskip("check_imports", reason="grimp is not installed")


def test_the_tree_has_no_circle_no_full_folder_and_no_name_twice(check_imports: ModuleType) -> None:
    assert check_imports.faults() == []


def test_the_picture_of_packages_is_that_of_the_imports(check_imports: ModuleType) -> None:
    """If not: `python scripts/check_imports.py --draw`."""
    text = check_imports.PICTURE.read_text()
    assert check_imports.drawn(text) == text


def test_no_test_imports_from_another() -> None:
    """What several need stands beside them, in `builders` or in `support`."""
    imported = re.compile(r"\b(?:from|import)\s+(?:[\w.]+\.)?test_\w+")
    files = [path for path in (CHECKOUT / "tests").rglob("*.py") if path != Path(__file__)]
    assert not {str(path): found for path in files if (found := imported.findall(path.read_text("utf-8")))}


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
