"""What a program meets that imports the package: nothing heavy, nothing on stderr, nothing changed behind its back."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]


def test_every_module_stands_in_a_layer_of_the_import_contract() -> None:
    contracts = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(item["layers"] for item in contracts if item["type"] == "layers")
    placed = [name.strip() for layer in layers for name in layer.split("|")]
    folder = CHECKOUT / "mm_moslora"
    modules = [*folder.glob("*.py"), *(path.parent for path in folder.glob("*/__init__.py"))]
    found = {f"mm_moslora.{path.stem}" for path in modules if path.stem != "__init__"}
    assert sorted(placed) == sorted(found | {"mm_moslora_eval"})


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
