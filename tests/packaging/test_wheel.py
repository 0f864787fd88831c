"""The wheel as somebody has it who has no checkout: built, installed into an environment of its own, used elsewhere."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
SCRIPT = """
import mm_moslora, sys
assert "torch" not in sys.modules
for name in mm_moslora.__all__:
    assert getattr(mm_moslora, name) is not None
from mm_moslora.cli import run
from mm_moslora.planning.doctor import diagnose
assert "site-packages" in mm_moslora.__file__, mm_moslora.__file__
assert {"torch", "onnx", "open-clip-torch"} <= {finding.name for finding in diagnose()}
gpus = ["--gpus", "8xA100-80G", "--samples", "1000", "--tokens-per-sample", "400"]
for name in ("llava15_7b_moslora", "qwen3_vl_8b_moslora", "quickstart_tune"):
    assert run(["plan", name, *gpus]) == 0
assert run(["eval", "list"]) == 0
assert run(["eval", "list", "ocrbench_v2_en", "--details"]) == 0      # rules of several files
assert run(["train", *sys.argv[1:]]) == 0
assert run(["launch", sys.argv[1], "--train.output", "elsewhere", "--nproc", "2", "--dry-run"]) == 0
assert run(["config", "--files"]) == 0
"""


def run(words: list[str], folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A process that knows neither the checkout nor a cache."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHON", "HF_HOME")}
    environment |= {"HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(CHECKOUT)]
    built = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which finds the other packages in that of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    own = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(folder), "platbase": str(folder)}))
    (own / "below.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    words = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*words, str(wheel)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.network
@pytest.mark.slow
def test_an_installed_wheel_plans_trains_and_launches_away_from_the_checkout(
    environment: Path, language_folder: Path, vision_folder: Path, records: Path, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}
adapter: {{rank: 4, alpha: 8}}
data: {{train: [{{path: {records}, image_folder: {records.parent / "images"}}}], max_length: 256}}
train: {{output: run, steps: 2, global_batch: 8, micro_batch: 4, zero: zero2, precision: fp32}}
"""
    )
    done = run([str(environment / "bin" / "python"), "-c", SCRIPT, "recipe.yaml"], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 2 of 2" in done.stdout
    assert re.search(r"-P -m torch.distributed.run .*--nproc_per_node 2", done.stderr)
    scripts = environment / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / "mm_moslora" / "scripts"
    assert f"scripts            {scripts}" in done.stdout
    assert sorted(path.name for path in scripts.iterdir() if path.suffix != ".sh") == ["train_slurm.sbatch"]
    assert os.access(scripts / "train.sh", os.X_OK)


@pytest.mark.network
@pytest.mark.slow
def test_a_wheel_has_the_benchmarks_with_their_rules(wheel: Path) -> None:
    tasks = CHECKOUT / "eval" / "tasks"
    shipped = {str(path.relative_to(tasks)) for path in tasks.rglob("*") if path.suffix in (".yaml", ".py")}
    with zipfile.ZipFile(wheel) as archive:
        below = {name.removeprefix("mm_moslora_eval/task_files/") for name in archive.namelist()}
    assert shipped - below == set()
    assert len([name for name in shipped if name.endswith("rules.py")]) > 30


def test_messages_name_no_document_of_the_checkout() -> None:
    named = []
    for path in [*(CHECKOUT / "mm_moslora").rglob("*.py"), *(CHECKOUT / "eval" / "mm_moslora_eval").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                named += [(path.name, name) for name in re.findall(r"docs/[\w/]+\.md|eval/README\.md", node.value)]
    assert named == []


def test_the_page_of_an_index_links_to_nothing_that_is_not_there() -> None:
    page = (CHECKOUT / "README.md").read_text()
    labels = re.findall(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)[^)]*\)", page)
    assert labels
    for change in PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        page = re.sub(change["pattern"], change["replacement"], page)
    assert not [link for link in re.findall(r"\]\(([^)]*)\)", page) if not link.startswith(("https://", "#"))]
    assert [label for label in labels if label not in page or f"[{label}]" in page] == []


def test_the_citation_names_the_release_of_the_changelog() -> None:
    citation = yaml.safe_load((CHECKOUT / "CITATION.cff").read_text())
    assert citation["version"] == re.findall(r"^## (\S+)", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["preferred-citation"]["title"] in (CHECKOUT / "README.md").read_text()
