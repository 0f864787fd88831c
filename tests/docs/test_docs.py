"""Every code block and command of the documents is run on tiny stand-ins, or checked where it cannot be run."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from unittest import mock

import pytest
import yaml
from mm_moslora_eval.protocol.task_registry import load_file

from mm_moslora import cli
from mm_moslora.config import Recipe, load_recipe
from mm_moslora.diffusion.diffusion_recipe import DiffusionRecipe
from mm_moslora.models.projectors.projector import PROJECTORS
from tests.docs.blocks import DOCUMENTS, PARSED_ONLY, PLAIN, ROOT, Block, blocks, check_command, commands, parse

PROGRAM = "mm-moslora"
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def run_shell(block: Block) -> None:
    """Run the mm-moslora commands of a shell block, check the others."""
    found = commands(block.text)
    assert found, f"{block}: holds no command"
    for words in found:
        if words[0] != PROGRAM:
            check_command(words)
        elif words[1] in PARSED_ONLY or "..." in words:
            parse(words[1:])
        else:
            assert cli.run(words[1:]) == 0, f"{block}: {' '.join(words)} failed"


def run_yaml(block: Block) -> None:
    """A recipe or a task; one that begins with `# NAME.yaml` is written, for the commands below it."""
    data = yaml.safe_load(block.text)
    if "base" in data.get("model", {}):
        DiffusionRecipe.from_yaml(block.text, source=str(block))
    elif "model" in data:
        Path(".document.yaml").write_text(block.text)
        load_recipe(".document.yaml")
    elif "source" in data:
        task = Path(".document.yaml")
        task.write_text(block.text)
        assert load_file(task)
    else:
        Recipe.from_dict({"model": {"language": "none"}, **data}, source=str(block))
    name = re.match(r"# (\S+\.yaml)\b", block.text)
    if name:
        Path(name[1]).write_text(block.text)


def namespace(document: Path) -> dict:
    """Names in a document's Python: `model`, a tiny vision-language model, and others of its kind."""
    if document.parent.name == "eval":
        from mm_moslora_eval.backends.open_model import open_model

        return {"model": open_model("RUN")}
    from mm_moslora.models.assembly import load_parts

    recipe = load_recipe("RECIPE.yaml")
    return {name: load_parts(recipe.model).model for name in ("model", "fresh_model", "base")}


def run_document(document: Path) -> None:
    """All blocks of a document in order, in one namespace."""
    names: dict | None = None
    for block in blocks(document):
        if block.skip is not None or block.kind in PLAIN:
            continue
        if block.kind in ("bash", "sh", "shell"):
            run_shell(block)
        elif block.kind == "yaml":
            run_yaml(block)
        elif block.kind == "python":
            if name := re.match(r"# (\S+\.py)\b", block.text):
                Path(name[1]).write_text(block.text)
            names = names or {"__name__": "document", **namespace(document)}
            exec(compile(block.text, str(block), "exec"), names)
        elif block.kind == "toml":
            assert tomllib.loads(block.text)
        else:
            raise AssertionError(f"{block}: there is no test for a block of {block.kind!r}; add one")


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_code_blocks_work(document: Path, trained: Path, monkeypatch):
    monkeypatch.chdir(trained)
    with mock.patch.dict(PROJECTORS):  # a document adds its own
        run_document(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(document: Path):
    targets = _LINK.findall(document.read_text(encoding="utf-8"))
    missing = [
        t for t in targets if "://" not in t and not t.startswith("mailto:") and not (document.parent / t).exists()
    ]
    assert not missing


def test_the_readme_of_the_tests_names_files_that_exist() -> None:
    named = re.findall(r"`(\w+/[\w/.]*)`", (ROOT / "tests" / "README.md").read_text())
    assert [name for name in named if not (ROOT / "tests" / name).exists()] == []
