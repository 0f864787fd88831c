"""The notebook runs from top to bottom on a CPU, and the site has every page."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import docs_site
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


def test_the_site_has_every_page_and_every_module_of_the_reference():
    nav = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    pages = {page.replace("README.md", "index.md") if page == "README.md" else page for page in pages}
    assert sorted(nav) == sorted(pages | set(docs_site.OUTSIDE.values()) | {f"api/{name}.md" for name in docs_site.API})
    for module in (module for modules in docs_site.API.values() for module in modules):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize(
    ("text", "source", "page", "expected"),
    [
        ("[a](docs/models.md#import)", "README.md", "index.md", "[a](models.md#import)"),
        ("[a](../eval/README.md)", "docs/data.md", "data.md", "[a](evaluation.md)"),
        ("[a](../../README.md)", "docs/tutorials/x.md", "tutorials/x.md", "[a](../index.md)"),
        ("[a](../docs/x.png)", "eval/README.md", "evaluation.md", "[a](x.png)"),
        ("[`a`](../mm_moslora/batch.py)", "docs/data.md", "data.md", "`a`"),
        ("[a](https://x.org/y.md) [b](#c)", "README.md", "index.md", "[a](https://x.org/y.md) [b](#c)"),
    ],
)
def test_links_of_a_checkout_lead_to_pages_of_the_site(text, source, page, expected):
    assert docs_site.linked(text, source, page) == expected
