"""Code that comes with a model is never run, and nobody is asked whether it should be."""

from __future__ import annotations

import ast
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

CHECKOUT = Path(__file__).parents[2]
LOADERS = {"from_pretrained", "from_config"}
SAFE = {"LoraConfig", "kind", "loader", "TransformersModel", "DDPMScheduler"}
"""Receivers that load no code of a folder: configurations of PEFT, schedulers of diffusers, and the harness."""
CHECKED = {"PeftModel"}
"""PEFT's adapters load models and code that their configuration names: it is checked and given with `config`."""
WRITTEN_HERE = {"mm_moslora/models/export/export_huggingface.py"}
"""Loads an adapter that it has just written."""
NAMES = {
    "from_pretrained", "hf_hub_download", "snapshot_download", "load_dataset", "load_dataset_builder", "create_model",
    "create_model_and_transforms", "get_config_dict", "get_image_processor_dict", "load_config", "cached_file",
    "try_to_load_from_cache", "SentenceTransformer", "load_from_hub", "load_state_dict_from_hf",
    "create_model_from_pretrained", "get_tokenizer", "load_lora_weights", "from_single_file",
    "load_state_dict_from_url",
}  # fmt: skip
"""Functions that take a name of a folder or of the hub."""
DOORS = {
    "mm_moslora/models/model_paths.py": "finds what a name led to",
    # These get names of a recipe or of `resolve_model_paths`, through the recipe's `model`.
    "mm_moslora/models/language_model.py": "model.language",
    "mm_moslora/models/model_sizes.py": "its configuration",
    "mm_moslora/models/pretrained_vlm.py": "model.vlm",
    "mm_moslora/models/vision/vision_tower.py": "model.vision",
    "mm_moslora/models/vision/timm_open_clip_tower.py": "model.vision of other libraries",
    # These get what a user named in the command.
    "mm_moslora/models/load_model.py": "an export, or the base that an adapter names, which is logged",
    "mm_moslora/models/importing/import_checkpoint.py": "a base of a foreign checkpoint, which is logged",
    "eval/mm_moslora_eval/backends/transformers_model.py": "hf:",
    "eval/mm_moslora_eval/backends/open_model.py": "hands hf: on",
    "mm_moslora/data/sources/hf_tables.py": "data.train.path",
    "mm_moslora/diffusion/pipeline_families.py": "model.base of a diffusion recipe",
    "mm_moslora/diffusion/subject_scores.py": "models of this project's choice, from the cache alone",
    # These read what lies in a folder that is at hand.
    "mm_moslora/models/export/export_huggingface.py": "what it has just written",
    "mm_moslora/quickstart/asset_conversion.py": "what was built from verified packages",
    "mm_moslora/adapters/peft_methods.py": "an adapter, with a checked configuration",
    "mm_moslora/adapters/folder_format.py": "an adapter, for PEFT's own from_pretrained",
    "mm_moslora/adapters/moslora_config.py": "its configuration",
    "mm_moslora/adapters/tuner.py": "its configuration",
}
"""The modules that hand names to libraries, and whose."""
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
        given = any(word.arg == "config" for word in node.keywords) and _name(node.func.value) in CHECKED
        if not (refused or given) and _name(node.func.value) not in SAFE:
            found.append(node.lineno)
    return found


def _allowed(source: str) -> list[int]:
    """Lines that have foreign code run, or keep a loader to be called elsewhere."""
    nodes = list(ast.walk(ast.parse(source)))
    called = [node.func for node in nodes if isinstance(node, ast.Call)]
    found = []
    for node in nodes:
        match node:
            case ast.keyword(arg="trust_remote_code" | "allow_pickle" | "weights_only" as word, value=value):
                bad = not isinstance(value, ast.Constant) or value.value is not (word == "weights_only")
            case ast.Attribute(value=ast.Name(id="torch"), attr="hub"):
                bad = True
            case ast.Attribute(attr=name):
                bad = name in LOADERS and node not in called and _name(node.value) not in SAFE
            case _:
                bad = False
        if bad:
            found.append(node.lineno)
    return found


def _named(source: str) -> list[int]:
    """Lines of calls and references that hand a name to a library."""
    nodes = list(ast.walk(ast.parse(source)))
    imported = [alias for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    known = {alias.asname or alias.name for alias in imported if alias.name in NAMES}
    return [
        node.lineno
        for node in nodes
        if (isinstance(node, ast.Attribute) and node.attr in NAMES) or (isinstance(node, ast.Name) and node.id in known)
    ]


def test_a_users_python_is_executed_at_one_door() -> None:
    found = set()
    for folder in ("mm_moslora", "eval/mm_moslora_eval"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
            if any(
                _name(call.func) in ("exec_module", "run_path") or _bare(call) in ("exec", "eval") for call in calls
            ):
                found.add(path.relative_to(CHECKOUT).as_posix())
    assert found == {"mm_moslora/launch/imported_code.py"}


def _bare(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def test_every_call_that_could_run_code_of_a_model_says_that_it_must_not() -> None:
    """`datasets`, from the floor in pyproject.toml on, runs no scripts at all."""
    folders = ("mm_moslora", "eval/mm_moslora_eval", "scripts", "examples")
    files = [path for folder in folders for path in (CHECKOUT / folder).rglob("*.py")]
    assert len(files) > 100
    names = {path: str(path.relative_to(CHECKOUT)) for path in files}
    places = [f"{names[path]}:{line}" for path in files for line in _untold(path.read_text("utf-8"))]
    assert [place for place in places if place.partition(":")[0] not in WRITTEN_HERE] == []
    assert [f"{names[path]}:{line}" for path in files for line in _allowed(path.read_text("utf-8"))] == []


def test_names_of_models_go_through_the_modules_that_know_whose_they_are() -> None:
    files = [path for folder in ("mm_moslora", "eval/mm_moslora_eval") for path in (CHECKOUT / folder).rglob("*.py")]
    found = {str(path.relative_to(CHECKOUT)) for path in files if _named(path.read_text("utf-8"))}
    assert found == set(DOORS)


WEIGHTLESS = {
    "AutoConfig", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor", "reader", "LoraConfig", "PeftModel",
    "TransformersModel",
}  # fmt: skip
"""What `from_pretrained` of these reads holds no weights of a base, or what it reads is checked by PEFT."""
CHECKS_ITSELF = {
    "mm_moslora/models/model_sizes.py": "the way in",
    "mm_moslora/quickstart/asset_conversion.py": "what it has just converted, by the keys that transformers names",
    "mm_moslora/diffusion/pipeline_families.py": "diffusers refuses missing weights",
    "mm_moslora/adapters/tuner.py": "configurations of adapters",
}


def test_weights_of_a_base_come_through_the_way_that_refuses_missing_ones() -> None:
    """transformers makes up what a file lacks, and says so in a report that a command line does not show."""
    files = [path for folder in ("mm_moslora", "eval/mm_moslora_eval") for path in (CHECKOUT / folder).rglob("*.py")]
    found = {
        str(path.relative_to(CHECKOUT))
        for path in files
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "from_pretrained" and _name(node.value) not in WEIGHTLESS
    }
    assert found == set(CHECKS_ITSELF)


def test_the_search_finds_what_it_looks_for() -> None:
    lines = (
        "A.from_pretrained(x)", "A.from_config(x, trust_remote_code=True)", "a.B.from_pretrained(x, **more)",
        "B.from_pretrained(x, trust_remote_code=False)", "LoraConfig.from_pretrained(x)",
        "PeftModel.from_pretrained(m, x, config=c)", "PeftModel.from_pretrained(m, x)",
        "B.from_pretrained(x, config=c)",
    )  # fmt: skip
    assert _untold("\n".join(lines)) == [1, 2, 3, 7, 8]
    lines = (
        "transformers.pipeline(model=x, trust_remote_code=True)", "load = AutoModel.from_pretrained", "np.load(x)",
        "torch.load(x, weights_only=False)", "torch.load(x, weights_only=True)", "np.load(x, allow_pickle=True)",
        "torch.hub.load(a, b)", "A.from_config(x, trust_remote_code=trusted)",
    )  # fmt: skip
    assert sorted(_allowed("\n".join(lines))) == [1, 2, 4, 6, 7, 8]
    lines = (
        "A.from_pretrained(x)", "map(AutoModel.from_pretrained, x)", "timm.create_model(x)",
        "from huggingface_hub import hf_hub_download as h", "h(x)", "load = hub.snapshot_download",
        "model.save_pretrained(x)", "datasets.load_from_disk(x)", "open_clip.get_tokenizer(x)",
        "pipe.load_lora_weights(x)", "DiffusionPipeline.from_single_file(x)",
    )  # fmt: skip
    assert sorted(_named("\n".join(lines))) == [1, 2, 3, 5, 6, 9, 10, 11]


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
