"""The notebook runs from top to bottom on a CPU, and the API reference covers every public module."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_and_its_model_learns(notebook: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "notebook"}
    cells = json.loads(notebook.read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells), "outputs are not kept in the repository"
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
    assert names["results"]["own"].score > names["results"]["majority"].score
    assert names["difference"] < 1e-4


def test_the_reference_has_a_page_with_every_public_name(tmp_path: Path):
    spec = importlib.util.spec_from_file_location("api_reference", ROOT / "scripts" / "api_reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    written = {path.stem: path.read_text() for path in reference.write(tmp_path / "api")}
    index = (tmp_path / "api" / "README.md").read_text()
    assert {
        "mm_moslora.config",
        "mm_moslora.adapters.moslora_config",
        "mm_moslora_eval.run.evaluate_suite",
    } <= written.keys()
    assert all(f"({name}.md)" in index for name in written)
    assert "- `rank: int = 64` r, the size of the mixer." in written["mm_moslora.config.model_config"]
    assert "**Raises**" in written["mm_moslora.config.recipe"]
    assert "## `PROJECTORS`" not in written["mm_moslora.models.projectors.projector"], "it has no docstring"
    assert "_build" not in written["mm_moslora.config.strict_reading"]
