"""Names of earlier versions are answered with those of today."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from mm_moslora.renamed import MODULES, NAMES

CHANGELOG = (Path(__file__).parents[2] / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("module", MODULES)
def test_an_old_module_is_answered_with_one_that_exists(module: str) -> None:
    new = MODULES[module] if MODULES[module].startswith("mm_moslora_eval.") else f"mm_moslora.{MODULES[module]}"
    with pytest.raises(ModuleNotFoundError, match=rf"{re.escape(module)} is {re.escape(new)} now"):
        importlib.import_module(module)
    importlib.import_module(new)


@pytest.mark.parametrize(("module", "old"), [(module, old) for module, names in NAMES.items() for old in names])
def test_an_old_name_is_answered_with_one_that_exists(module: str, old: str) -> None:
    with pytest.raises(ImportError, match=rf"{re.escape(module)}\.{old} is (\S+) now") as error:
        exec(f"from {module} import {old}")
    owner, _, name = re.search(r" is (\S+) now", str(error.value))[1].rpartition(".")  # type: ignore[index]
    assert hasattr(importlib.import_module(owner), name)
    assert f"`{old}`" in CHANGELOG or f".{old}`" in CHANGELOG


def test_any_other_name_is_missing_as_ever() -> None:
    module = importlib.import_module("mm_moslora.planning.run_plan")
    with pytest.raises(AttributeError, match=r"^module 'mm_moslora\.planning\.run_plan' has no attribute 'nothing'$"):
        module.nothing  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from mm_moslora.planning.run_plan import nothing")
