"""Commands that install what is missing work: every package in them is declared, and the project itself is in none."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mm_moslora.config import (
    ModelConfig,
    Recipe,
    SourceConfig,
    TrackConfig,
    VisionConfig,
    load_recipe,
    needs,
    refuse_lacking,
)
from mm_moslora.utils import package_requirements
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.package_requirements import declared, install_command, install_extra

CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def from_metadata(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in an installed wheel: no pyproject.toml beside the package."""
    lines = [line.replace("open_clip_torch", "open-clip-torch") for line in PROJECT["dependencies"]]
    for extra, listed in PROJECT["optional-dependencies"].items():
        for line in listed:
            text, _, marker = line.partition(";")
            condition = f"({marker.strip()}) and extra == '{extra}'" if marker else f"extra == '{extra}'"
            lines.append(f"{text.strip()}; {condition}")
    monkeypatch.setattr(package_requirements, "_PYPROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(package_requirements, "requires", lambda _: lines)
    package_requirements._all.cache_clear()
    yield
    package_requirements._all.cache_clear()


def words(extra: str | None = None) -> set[str]:
    return {str(item) for item in declared(extra)}


def test_a_wheel_knows_what_the_checkout_says(from_metadata: None, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {extra: words(extra) for extra in (None, *PROJECT["optional-dependencies"])}
    monkeypatch.undo()
    package_requirements._all.cache_clear()
    assert installed == {extra: words(extra) for extra in installed}
    assert {"onnx", "gguf", "torch"} <= {item.name for item in declared()}
    assert not [extra for extra, listed in installed.items() if not listed], "an extra that brings nothing"


def test_commands_name_packages_within_their_ranges_and_never_the_project() -> None:
    assert install_command("onnx") == "pip install 'onnx>=1.17'"
    assert install_command("liger-kernel") == "pip install 'liger-kernel>=0.8.5,<0.9'"
    assert install_command("unheard-of") == "pip install unheard-of"
    for extra in PROJECT["optional-dependencies"]:
        command = install_extra(extra)
        assert "mm-moslora" not in command
        assert all(Requirement(word.strip("'")).specifier for word in re.findall(r"'[^']+'", command))
    assert {item.name for item in declared("serve")} < {item.name for item in declared("all")}


def test_without_metadata_the_package_is_named(from_metadata: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(package_requirements, "requires", absent)
    assert install_command("onnx") == "pip install onnx"
    assert install_extra("serve") == "pip install '.[serve]' in the checkout"
    assert declared() == ()


def test_nothing_says_to_install_the_project_from_an_index() -> None:
    folders = ("mm_moslora", "eval", "docs", "examples", "scripts")
    places = [path for name in folders for path in (CHECKOUT / name).rglob("*")]
    kinds = {".py", ".md", ".sh", ".yaml", ".ipynb"}
    texts = [path for path in (*places, CHECKOUT / "README.md") if path.suffix in kinds]
    asked = re.compile(r"pip install[^\n`]*\bmm[-_]moslora\b(?!/)")
    assert not [str(path) for path in texts if asked.search(path.read_text())]


def recipe() -> Recipe:
    return load_recipe("quickstart_tune")


def test_needs_follow_the_settings() -> None:
    base = recipe()
    plain = replace(base, train=replace(base.train, zero="none"), track=TrackConfig(trackers=[]))
    assert needs(plain) == []
    assert [need.package for need in needs(base)] == ["deepspeed", "tensorboard", "wandb"]
    more = replace(
        plain,
        model=ModelConfig(
            language="x", quantisation="nf4", vision=VisionConfig(name="open_clip:ViT-B-32", fuse_with="timm:vit")
        ),
        data=replace(base.data, train=[SourceConfig(path="hf:a/b"), SourceConfig(path="a.json")]),
    )
    assert [need.package for need in needs(more)] == ["bitsandbytes", "open-clip-torch", "timm", "datasets"]


def test_a_setting_whose_package_is_missing_is_refused_with_what_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_moslora.config.needed_packages.is_installed", lambda module: module != "tensorboard")
    with pytest.raises(ConfigError, match=r"tensorboard.*pip install 'tensorboard>=.*track\.trackers: \[\]"):
        refuse_lacking(recipe())
