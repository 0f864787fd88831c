"""Code that comes with a model is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest
from preloaded import Preloaded
from tiny import make_tokenizer

from mm_moslora.utils.errors import MoSLoRAError

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


@pytest.mark.parametrize("kind", ["SHADOW", "XLORA"])
def test_an_adapter_folder_brings_no_code(
    python: Preloaded, evil: Path, language_folder: Path, tmp_path: Path, kind: str
) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    config = {"peft_type": kind, "task_type": "CAUSAL_LM", "base_model_name_or_path": str(language_folder)}
    config |= {"shadow_model": str(evil), "hidden_size": 8, "adapters": {"0": str(evil)}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    status, said = _in_a_terminal([python.ours, "-m", "mm_moslora", "export", adapter, out, "--to", "hf"])
    assert status == 1
    assert "[y/N]" not in said
    assert not (evil / "ran").exists()
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert f"has peft_type '{kind}', which is not loaded" in told[0]
    assert not out.exists()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "folder"])  # which is an adapter by its file
def test_an_adapter_beside_a_model_is_not_put_into_it(tmp_path: Path, language_folder: Path, way: str) -> None:
    """transformers puts it in without a word, of any kind, and takes from the hub the base that it names."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in language_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {"peft_type": "SHADOW", "task_type": "CAUSAL_LM", "base_model_name_or_path": "x/y", "shadow_model": "x/z"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MoSLoRAError, match=r"has an adapter_config.json where a model is expected"):
        exec(WAYS[way], {"folder": str(folder)})


FOREIGN = "kernels-community/flash-attn@0123456789012345678901234567890123456789"


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": FOREIGN},
        {"_attn_implementation": FOREIGN},
        {"attn_implementation": {"": "sdpa", "text_config": FOREIGN}},
        {"text_config": {"attn_implementation": FOREIGN}},
        {"experts_implementation": FOREIGN},
        {"towers": [{"model_type": "clip_vision_model"}, {"_attn_implementation": FOREIGN}]},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_configuration_chooses_no_native_code(tmp_path: Path, language_folder: Path, values: dict) -> None:
    from mm_moslora_eval.backends.transformers_model import TransformersModel

    from mm_moslora.config import ModelConfig
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.load_model import load, load_unweighted

    folder = tmp_path / "model"
    shutil.copytree(language_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    readers = (
        load, load_unweighted, lambda path: load_parts(ModelConfig(language=str(path))),
        lambda path: load_parts(ModelConfig(language=str(path)), weights="none"),
        lambda path: TransformersModel.from_pretrained(str(path)),
    )  # fmt: skip
    for read in readers:
        with pytest.raises(MoSLoRAError, match="fetch native code"):
            read(folder)
    with pytest.raises(MoSLoRAError, match="native code of the hub"):
        ModelConfig(language=str(folder), attention=FOREIGN)
