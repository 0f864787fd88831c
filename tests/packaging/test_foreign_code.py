"""Code that comes with a model is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import ast
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from preloaded import Preloaded
from tiny import make_tokenizer

CHECKOUT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config"}
SAFE = {"PeftModel", "LoraConfig", "kind", "TransformersModel", "DDPMScheduler"}
"""Receivers that load no code of a folder: PEFT's adapters, diffusers' schedulers, and the class of the harness."""
EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
class EvilConfig(PretrainedConfig):
    model_type = "evil"
class EvilModel(PreTrainedModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _untold(source: str) -> list[int]:
    """Lines of calls that leave it to a library whether foreign code is run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOADERS):
            continue
        told = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
        refused = len(told) == 1 and isinstance(told[0], ast.Constant) and told[0].value is False
        if not refused and _name(node.func.value) not in SAFE:
            found.append(node.lineno)
    return found


def test_every_call_that_could_run_code_of_a_model_says_that_it_must_not() -> None:
    """`datasets`, from the floor in pyproject.toml on, runs no scripts at all."""
    folders = ("mm_moslora", "eval/mm_moslora_eval", "scripts", "examples")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")]
    assert len(files) > 100
    places = [f"{path.relative_to(CHECKOUT)}:{line}" for path in files for line in _untold(path.read_text("utf-8"))]
    assert places == []


def test_the_search_finds_what_it_looks_for() -> None:
    lines = (
        "A.from_pretrained(x)", "A.from_config(x, trust_remote_code=True)", "a.B.from_pretrained(x, **more)",
        "B.from_pretrained(x, trust_remote_code=False)", "PeftModel.from_pretrained(m, x)",
    )  # fmt: skip
    assert _untold("\n".join(lines)) == [1, 2, 3]


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder of a model that exists in its own code only."""
    folder = tmp_path / "evil"
    make_tokenizer().save_pretrained(folder)
    names = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoProcessor")
    classes = {name: "evil.EvilConfig" if name == "AutoConfig" else "evil.EvilModel" for name in names}
    config = {"model_type": "evil", "architectures": ["EvilModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": [None, "evil.EvilTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.EvilModel"}}))
    (folder / "evil.py").write_text(EVIL)
    return folder


def _in_a_terminal(command: list[str | Path]) -> tuple[int, str]:
    """Run a command in a terminal where somebody says yes to everything."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, b"y\n" * 20)
        process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
        os.close(theirs)
        said = b""
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
            if not chunk:
                break
            said += chunk
        return process.wait(120), said.decode(errors="replace").replace("\r", "")
    finally:
        os.close(ours)


WAYS = {
    "model.language": "from mm_moslora.models.assembly import load_parts; from mm_moslora.config import ModelConfig\n"
    "load_parts(ModelConfig(language=folder))",
    "model.vlm": "from mm_moslora.models.assembly import load_parts; from mm_moslora.config import ModelConfig\n"
    "load_parts(ModelConfig(vlm=folder))",
    "model.vision.name": "from mm_moslora.models.vision.vision_tower import load_vision\n"
    "from mm_moslora.config import VisionConfig\n"
    "load_vision(VisionConfig(name=folder))",
    "folder": "from mm_moslora.models.load_model import load; load(folder)",
    "hf:": "from mm_moslora_eval.backends.transformers_model import TransformersModel as T; T.from_pretrained(folder)",
}


def test_in_a_terminal_nobody_is_asked_and_the_refusal_is_one_line(python: Preloaded, evil: Path) -> None:
    code = ["import sys; folder = sys.argv[1]", "from mm_moslora.utils.errors import MoSLoRAError"]
    for name, way in WAYS.items():
        body = "\n".join(f"    {line}" for line in way.splitlines())
        code.append(f"try:\n{body}\nexcept MoSLoRAError as error:\n    print('REFUSED', {name!r}, error)")
    status, said = _in_a_terminal([python.ours, "-c", "\n".join(code), str(evil)])
    assert "[y/N]" not in said
    assert not (evil / "ran").exists()
    refused = [line for line in said.splitlines() if line.startswith("REFUSED")]
    assert [line.split()[1] for line in refused] == list(WAYS), said
    assert all("Python code of its own, which is never run" in line for line in refused), said
    assert "trust_remote_code=True" not in said
    assert status == 0


def test_a_verb_refuses_in_one_line(python: Preloaded, evil: Path) -> None:
    status, said = _in_a_terminal([python.ours, "-m", "mm_moslora", "chat", str(evil), "--question", "hello"])
    assert status == 1
    assert "[y/N]" not in said
    assert not (evil / "ran").exists()
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "never run" in told[0]
    assert "Traceback" not in said
