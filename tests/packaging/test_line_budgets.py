"""No package grows beyond its budget of lines: what comes in takes the place of something."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = {
    "mm_moslora/adapters": 5100, "mm_moslora/cli": 2700, "mm_moslora/compare": 2950, "mm_moslora/config": 2250,
    "mm_moslora/data": 9350, "mm_moslora/diffusion": 900, "mm_moslora/kernels": 2150, "mm_moslora/launch": 1750,
    "mm_moslora/models": 8350, "mm_moslora/planning": 1450, "mm_moslora/preferences": 1700,
    "mm_moslora/quickstart": 2000, "mm_moslora/reporting": 2650, "mm_moslora/serve": 2700,
    "mm_moslora/tracking": 1000, "mm_moslora/training": 7100, "mm_moslora/utils": 3050, "eval/mm_moslora_eval": 14600,
    "eval/tasks": 3500, "scripts": 5500, "tests": 58000,
}  # fmt: skip
"""Lines of Python of a folder. A budget is lowered when its folder has become smaller."""


@pytest.mark.parametrize(("folder", "budget"), BUDGETS.items())
def test_a_package_keeps_its_budget_of_lines(folder: str, budget: int) -> None:
    lines = sum(len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py"))
    assert lines <= budget, f"{folder} has {lines} lines; remove as many as were added, or say why its budget grows"


def test_every_package_has_a_budget() -> None:
    packages = {f"mm_moslora/{path.parent.name}" for path in (ROOT / "mm_moslora").glob("*/__init__.py")}
    assert packages <= set(BUDGETS)
