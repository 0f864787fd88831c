"""Doors: which files may use what starts processes, opens files, fetches, parses, or runs code.

A name that stands in no list is refused, so a new library or function needs a decision. Names are followed through
imports and aliases; a module that is passed on as a value counts as a whole.
"""

from __future__ import annotations

import ast
import builtins
import re
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]
FOLDERS = {
    "mm_moslora": "", "eval/mm_moslora_eval": "", "eval/tasks": "tasks", "scripts": "scripts", "examples": "examples",
}  # fmt: skip
"""Folders of code, with the word that stands for all of their files in a list; others are named by their stem."""


def _words(text: str) -> set[str]:
    return set(text.split())


ANYWHERE = _words(
    """
    __future__ abc argparse array atexit base64 binascii bisect builtins codecs collections contextlib copy csv
    dataclasses datetime difflib email enum errno faulthandler fcntl fnmatch functools gc glob graphlib heapq hmac html
    inspect ipaddress itertools logging math operator pathlib platform posixpath queue random re readline
    resource secrets select shlex signal stat statistics string struct sys sysconfig textwrap threading time traceback
    types typing unicodedata uuid warnings zlib PIL accelerate bitsandbytes cyclopts deepspeed diffusers h11 jinja2
    liger_kernel markupsafe matplotlib math_verify mm_moslora mm_moslora_eval numpy onnx open_clip packaging peft psutil
    rich safetensors scipy starlette timm tokenizers torch tqdm transformers triton trl
    concurrent.futures.Executor concurrent.futures.Future concurrent.futures.ThreadPoolExecutor concurrent.futures.wait
    importlib.metadata importlib.resources importlib.util.find_spec io.BufferedReader io.BytesIO io.StringIO
    io.TextIOWrapper
    faulthandler.cancel_dump_traceback_later faulthandler.dump_traceback faulthandler.dump_traceback_later
    json.JSONDecodeError json.dumps os.O_APPEND os.O_CREAT os.O_NOCTTY os.O_NOFOLLOW os.O_NONBLOCK os.O_RDONLY os.O_RDWR
    os.O_WRONLY os.SEEK_END os.W_OK os._exit os.access os.close os.cpu_count os.devnull os.dup os.dup2 os.environ
    os.fsencode os.fstat os.fsync os.getcwd os.getpid os.getppid os.lstat os.name os.path os.pathsep os.pread os.pwrite
    os.read os.readlink os.sep os.stat os.strerror os.urandom os.walk os.write peft.utils.save_and_load
    safetensors.torch.load_file shutil.disk_usage shutil.which socket.gethostname sys.stdout.write
    torch.autograd.graph.save_on_cpu torch.autograd.graph.saved_tensors_hooks triton.language.load urllib.parse
    yaml.YAMLError yaml.safe_dump
    """
)
"""Modules and names for any file, but for their parts in the lists below."""
NOWHERE = _words(
    """
    .chmod .extract .extractall .from_file .from_single_file .hardlink_to .load_checkpoint .load_lora_weights
    .load_module .save_checkpoint .save_file .save_html .save_svg .save_text .save_vocabulary .subprocess_exec
    .subprocess_shell .to_csv .to_excel .to_json_file .to_parquet .to_pickle .to_sql .tofile PIL.ImageShow
    accelerate.commands accelerate.launchers deepspeed.utils.zero_to_fp32 torch.utils.data.dataloader types.CodeType
    accelerate.notebook_launcher allow_pickle= builtins.__builtins__ builtins.__import__ builtins.eval
    deepspeed.launcher diffusers.utils.dynamic_modules_utils logging.FileHandler logging.config logging.handlers
    num_proc= numpy.ctypeslib numpy.f2py numpy.fromfile numpy.genfromtxt numpy.lib numpy.load numpy.loadtxt
    numpy.memmap numpy.save numpy.savetxt numpy.savez numpy.savez_compressed open_clip.create_model_and_transforms
    open_clip.get_tokenizer psutil.Popen
    scipy.io shell= sys.meta_path sys.path_hooks torch._export torch._inductor torch.classes
    torch.distributed.checkpoint torch.distributed.elastic torch.distributed.launch torch.distributed.rpc
    torch.distributed.run torch.export torch.hub torch.jit torch.multiprocessing torch.ops.load_library torch.package
    torch.serialization torch.utils.cpp_extension torch.utils.model_zoo tqdm.contrib transformers.dynamic_module_utils
    transformers.integrations.hub_kernels transformers.pipeline transformers.utils.cached_file transformers.utils.hub
    trust_remote_code= weights_only=
    """
)
DOORS = dict.fromkeys(NOWHERE, "") | {
    # Processes and native code
    "asyncio": "api_routes http_server request_guard request_intake",
    "concurrent.futures": "child_processes worker_processes",
    "ctypes": "hardware scripts",
    "multiprocessing": "child_processes",
    "multiprocessing_context=": "batch_loader",
    "num_workers=": "batch_loader",
    "os": "hardware",
    "os.kill": "child_processes scripts watchdog",
    "os.killpg": "launcher",
    "os.register_at_fork": "file_locks",
    "ray": "ray_engine",
    "subprocess": "child_processes scripts",
    "torch.utils.data.DataLoader": "batch_loader examples",
    # Code of others
    "builtins.compile": "imported_code",
    "builtins.exec": "imported_code",
    "importlib": "doctor scripts seeded_dropout task_rules timed_process triton_availability",
    "lazy_loader": "__init__",
    "os.chdir": "examples scripts",
    "runpy": "examples",
    "sys.modules": "cli_app diffusers_saving imported_code lens_maps run_environment uncalled_layers",
    "sys.path": "examples scripts",
    "diffusers as a value": "pipeline_families",
    "peft as a value": "peft_patches",
    "sys as a value": "distributed",
    "torch as a value": "meta_model",
    "transformers as a value": "vision_tower",
    "transformers.TrainerState.load_from_json": "preference_training",
    "unittest.mock": "meta_model scripts",
    ".set_attn_implementation": "attention_choice",
    # Pickles
    "pandas": "trackio_tracker",
    "onnx.load": "asset_conversion",
    "peft.utils.save_and_load.load_peft_weights": "peft_methods peft_patches",
    "pickle": "import_checkpoint",
    "torch.load": "asset_conversion diffusion_training examples import_checkpoint",
    # Names of models and data sets
    ".from_config": "assembly examples language_model load_model pipeline_families pretrained_vlm scripts vision_tower",
    ".from_config without trust_remote_code": "examples pipeline_families",
    ".from_pretrained": "asset_conversion examples export_huggingface import_checkpoint language_model load_model"
    " model_sizes moslora_config peft_methods pipeline_families pretrained_vlm scripts"
    " transformers_model tuner vision_tower",
    ".from_pretrained without trust_remote_code": "examples export_huggingface moslora_config peft_methods tuner",
    ".get_config_dict": "load_model model_sizes",
    ".load_config": "pipeline_families",
    "diffusers.DiffusionPipeline.load_config": "pipeline_families",
    "datasets": "examples hf_tables preference_setup scripts source_tables",
    "huggingface_hub": "folder_format hf_tables hub_access model_paths remote_files shared_results source_tables",
    "lm_eval": "lm_eval_adapter",
    "lmms_eval": "lmms_eval_adapter lmms_eval_entry",
    "open_clip.create_model": "timm_open_clip_tower",
    "timm.create_model": "asset_conversion timm_open_clip_tower",
    "vllm": "scripts",
    # The network
    "gradio": "gradio_demo",
    "http": "http_fetch openai_endpoint",
    "mlflow": "mlflow_tracker",
    "netrc": "wandb_tracker",
    "socket": "http_fetch http_server openai_endpoint ray_engine topology",
    "ssl": "http_fetch",
    "trackio": "trackio_tracker",
    "urllib": "http_fetch openai_endpoint",
    "uvicorn": "http_server",
    "wandb": "wandb_tracker",
    # Texts to be parsed
    ".json": "scripts",
    ".raw_decode": "record_file",
    "ast": "scripts untrusted_data",
    "json": "checkpoint_folder examples record_file scripts untrusted_data",
    "tomllib": "package_requirements scripts",
    "xml": "replay_model",
    "yaml": "examples scripts untrusted_data",
    # Files to be read: of the system and the package, downloads with a checksum, streams, caches of this project
    ".open": "answer_log asset_cache cli_app examples files http_fetch identity inline_images openai_endpoint"
    " pyav_decode prompt_preparation record_picture remote_files scripts untrusted_files user_recipe"
    " video_clip webdataset_tars",
    ".read_bytes": "examples instruction_data rank_agreement scripts",
    ".read_text": "distributed doctor examples hardware heartbeat package_requirements page_templates precision scripts"
    " watchdog",
    "av": "pyav_decode",
    "gguf": "gguf_model",
    "jieba": "lexicons",
    "nltk": "lexicons",
    "os.fdopen": "scripts untrusted_files",
    "os.open": "cli_app files untrusted_files",
    "pyarrow": "hf_tables source_tables token_cache",
    "tarfile": "webdataset_tars",
    "zipfile": "asset_cache replay_model scripts submission_forms",
    # Files to be written: temporary ones, those in a folder just made, streams; and those to be taken away
    ".rename": "files",
    ".replace": "files",
    ".rmdir": "files",
    ".save_model": "examples",
    ".save_to_json": "trl_trainers",
    ".save": "data_views diffusion_training evaluation_page examples inline_images openai_endpoint scripts"
    " source_videos",
    ".save_pretrained": "asset_conversion examples export_huggingface import_checkpoint llava_processor peft_methods"
    " scripts snapshot",
    ".save_to_disk": "hf_tables",
    ".savefig": "comparison_charts lens_maps svg_charts",
    ".symlink_to": "files",
    ".touch": "in_training",
    ".unlink": "files",
    ".write_bytes": "remote_files run_evidence sample_thumbnails scripts submissions",
    ".write_text": "asset_conversion diffusion_training examples export_adapter export_huggingface import_checkpoint"
    " model_card preprocessing_print scripts snapshot token_cache watchdog",
    "builtins.open": "files",
    "os.ftruncate": "files",
    "safetensors.torch.save_file": "asset_conversion base_tensors examples export_adapter export_huggingface"
    " feature_store import_checkpoint peft_methods save_folder snapshot",
    "shutil": "asset_cache examples files scripts",
    "tempfile": "doctor examples files folder_marks launcher lexicons scripts",
    "torch.save": "diffusion_training examples",
    # Hashes, so that each stands for the same bytes everywhere
    "hashlib": "identity",
    "xxhash": "identity",
    # Processes and pickles beneath (joblib)
    "sklearn": "linear_probe",
    # For developers
    "grimp": "scripts",
    "mkdocs": "scripts",
    "pytest": "scripts",
    "ranks": "scripts",
    "trials": "scripts",
}
"""Names with the files that may use them, and their parts. A new file here needs a reason that a reviewer accepts."""
OWN = {"lmms_eval"}
"""Functions of this project with the name of a library."""
SAFE = {"trust_remote_code=False", "allow_pickle=False", "weights_only=True"}
SWITCHES = {name.rstrip("=") for name in DOORS if name.endswith("=")}
LOADERS = {"from_pretrained", "from_config"}
MODULES = {name.split(".")[0] for name in DOORS if re.fullmatch(r"\w+(\.\w+)*", name)}
"""Libraries that a list names, or parts of them."""
STORES = re.compile(r"(\w+_)?(dump|load|save|serialize|write)(_\w+)?")
"""Functions of libraries that read or write files have such names; each needs its own entry."""


def uses(source: str) -> set[str]:
    """Names that a module uses.

    Dotted ones come from imports and builtins, `.name` is an attribute of any value, `name=value` an argument, and
    `module.` an import of a module whose parts are named where they are used.
    """
    nodes = list(ast.walk(ast.parse(source)))
    known, found, inner = {name: f"builtins.{name}" for name in (*dir(builtins), "__builtins__")}, set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {f"{item.name}." for item in node.names}
            tops = {item.name.split(".")[0] for item in node.names if not item.asname}
            known |= {name: name for name in tops} | {item.asname: item.name for item in node.names if item.asname}
        elif isinstance(node, ast.ImportFrom):
            module = f"mm_moslora.{node.module}" if node.level else node.module  # beside it, so this project's own
            found |= {f"{module}.{item.name}" for item in node.names}
            known |= {item.asname or item.name: f"{module}.{item.name}" for item in node.names}
    calls = {id(node.func): node for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.keyword) and node.arg in SWITCHES:
            found.add(f"{node.arg}={ast.unparse(node.value)}")
        if not isinstance(node, ast.Attribute | ast.Name) or id(node) in inner:
            continue
        parts: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            parts, root = [root.attr, *parts], root.value
            inner.add(id(root))
        loaded = isinstance(root, ast.Name) and isinstance(root.ctx, ast.Load)
        name = known.get(root.id, "") if loaded else ""
        found |= {".".join((name, *parts))} if name else set()
        if not name.startswith("mm_moslora"):
            found |= {f".{part}" for part in parts if part != "replace"} | _of_call(calls.get(id(node)), name, parts)
    return found


def _of_call(call: ast.Call | None, name: str, parts: list[str]) -> set[str]:
    last = parts[-1] if parts else ""
    if last == "replace":  # that of a text takes two arguments, that of a dataclass or a date takes keywords
        of_path = name == "pathlib.Path" or (call and not name and len(call.args) == 1 and not call.keywords)
        return {".replace"} if of_path else set()
    told = call is not None and any(word.arg == "trust_remote_code" for word in call.keywords)
    return {f".{last} without trust_remote_code"} if last in LOADERS and not told else set()


def door_of(use: str) -> str | None:
    """The key of `DOORS` that says who may use a name; "" where anybody may, None where nobody may."""
    if use.startswith("."):
        return use if use in DOORS else ""
    if "=" in use:
        return "" if use in SAFE else f"{use.partition('=')[0]}="
    if use.endswith(".") and any(name.startswith(use) for name in ANYWHERE):
        return ""
    if use in MODULES - DOORS.keys():  # as in getattr(module, name)
        return f"{use} as a value" if f"{use} as a value" in DOORS else None
    parts = use.rstrip(".").split(".")
    for at, part in enumerate(parts):  # a library that another module has imported
        if at and part.lstrip("_") in MODULES - OWN:
            through = _listed([part.lstrip("_"), *parts[at + 1 :]])
            if through != "":
                return through
    found = _listed(parts)
    reads_or_writes = STORES.fullmatch(parts[-1]) and use not in ANYWHERE and not parts[0].startswith("mm_moslora")
    return None if found == "" and reads_or_writes else found


def _listed(parts: list[str]) -> str | None:
    for name in (".".join(parts[:count]) for count in range(len(parts), 0, -1)):
        if name in DOORS or name in ANYWHERE:
            return name if name in DOORS else ""
    return None


def test_what_starts_opens_fetches_or_runs_is_used_where_it_may_be() -> None:
    used, refused, count = set(), set(), 0
    for folder, word in FOLDERS.items():
        paths = list((CHECKOUT / folder).rglob("*.py"))
        beside = {path.stem for path in paths if word}  # modules that scripts import from their own folder
        count += len(paths)
        for path in paths:
            for use in uses(path.read_text("utf-8")):
                door, user = door_of(use), word or path.stem
                if door and user in DOORS[door].split():
                    used.add((door, user))
                elif door != "" and use.split(".")[0] not in beside:
                    refused.add(f"{path.relative_to(CHECKOUT)}: {use}")
    assert count > 400
    assert sorted(refused) == [], "go through the module that has the door, or give leave in DOORS"
    listed = {(door, user) for door, users in DOORS.items() for user in users.split()}
    assert sorted(listed - used) == [], "these do not use it any more: take them off the list"


@pytest.mark.parametrize(
    "line",
    [
        # Processes
        "import subprocess as s", "from mm_moslora.launch.child_processes import subprocess",
        "from mm_moslora.utils import files; files.os.fork()", "from subprocess import run",
        "import multiprocessing.pool", "import billiard", "import torch.multiprocessing",
        "from torch import multiprocessing", "from multiprocess import Pool", "import pty",
        "from concurrent.futures import ProcessPoolExecutor", "from concurrent import futures",
        "import joblib, pexpect", "from torch.distributed.elastic.multiprocessing import start_processes",
        "import webbrowser", "import torch; torch.distributed.run.main(x)",
        "import deepspeed; deepspeed.launcher.runner.main(x)", "loop.subprocess_shell(x)",
        "import asyncio; asyncio.create_subprocess_exec(x)", "import posix as p; p.system(x)",
        "import os; os.execvp(a, b)", "import os as o; o.posix_spawn(a, b, c)", "from os import fork",
        "import os; run(os)", "import ctypes; ctypes.CDLL(None).system(x)", "from ctypes.util import find_library",
        "import ray; ray.init()", "import psutil; psutil.Popen(a)", "from tqdm.contrib.concurrent import process_map",
        "data.map(f, num_proc=4)", "from torch.utils.data import DataLoader as D", "f(num_workers=2)",
        "f(x, shell=True)", "import torch; torch.utils.cpp_extension.load(a, b)",
        "from torchdata.stateful_dataloader import StatefulDataLoader", "import logging; logging.os.system(x)",
        "import threading; threading._os.system(x)", "import transformers; transformers.utils.subprocess",
        "import inspect; inspect.builtins.exec(x)", "import typing; typing.sys.modules",
        # Pickles
        "import pickle as p; p.loads(x)", "from pickle import *", "import torch; torch.serialization.load(f)",
        "import torch as t; t.jit.load(f)", "import torch; torch.export.load(f)", "map(torch.load, f); import torch",
        "from torch.distributed import checkpoint", "import pandas as pd; pd.read_pickle(f)", "import cloudpickle",
        "import shelve", "import marshal", "import dill", "import torch; torch.load(f, weights_only=False)",
        "import torch; getattr(torch, 'load')(f)", "from accelerate.utils import load", "engine.load_checkpoint(f)",
        "from peft.utils.save_and_load import torch_load", "import timm; timm.models.load_checkpoint(m, f)",
        "import numpy as np; np.load(f)", "f(allow_pickle=True)", "from torch import load",
        # Code of others
        "import transformers; transformers.pipeline(model=x)", "from transformers import pipeline", "import evaluate",
        "from transformers.dynamic_module_utils import get_class_from_dynamic_module", "import kernels",
        "model.set_attn_implementation('a/b')", "from torch import hub; hub.load(a)", "import torch; torch.hub.load(a)",
        "import runpy", "from importlib.machinery import SourceFileLoader", "loader.load_module()",
        "import importlib; importlib.import_module('subprocess').run(x)", "import builtins; builtins.exec(x)",
        "exec(x)", "eval(x)", "__import__('os')", "import sys; sys.modules['os']", "import code",
        "f(trust_remote_code=trusted)", "from transformers import AutoModel as A; A.from_pretrained(x)",
        "A.from_config(x)", "kind.from_pretrained(x, **y)",
        # The network
        "from urllib.request import urlretrieve", "import requests", "import httpx", "import socket; socket.socket()",
        "from huggingface_hub import hf_hub_download", "import timm; timm.create_model(x)", "import datasets",
        "import fsspec", "import open_clip; open_clip.get_tokenizer(x)", "pipe.load_lora_weights(x)",
        "Pipe.from_single_file(x)",
        # Texts
        "import json; json.loads(t)", "from json import load", "import yaml; yaml.load(t, Loader=L)", "import tomllib",
        "decoder.raw_decode(t)", "reply.json()",
        # Files
        "import tarfile; tarfile.open(p, 'w:gz')", "import zipfile; zipfile.ZipFile(p, 'w')",
        "import numpy; numpy.memmap(p)", "tar.extractall(p)", "import shutil; shutil.unpack_archive(p)",
        "table.to_parquet(p)", "data.save_to_disk(p)", "import io; io.FileIO(p, 'w')", "import os; os.symlink(a, b)",
        "import os; os.link(a, b)", "open(p)", "p.open('w')", "p.read_text()", "p.write_bytes(x)", "p.unlink()",
        "q.replace(p)", "from pathlib import Path; map(Path.replace, a, b)", "p.hardlink_to(q)",
        "from shutil import rmtree", "import os; map(os.unlink, a)", "import tempfile",
        "from PIL import Image; Image.open(p)", "import torch; torch.save(x, p)", "picture.save(p)", "import sqlite3",
        "import numpy as np; np.savez(p, x)", "array.tofile(p)", "figure.savefig(p)", "model.save_pretrained(p)",
        "import onnx; onnx.save_model(m, p)", "from safetensors.numpy import save_file", "frame.to_csv(p)",
        "import pyarrow.parquet", "import logging; logging.FileHandler(p)", "from safetensors.torch import save_file",
    ],
)  # fmt: skip
def test_a_file_without_leave_is_refused(line: str) -> None:
    assert any(door_of(use) != "" for use in uses(line))


@pytest.mark.parametrize(
    "line",
    [
        "import os; os.environ['A'], os.path.join(a, b)", "import json; json.dumps(x)",
        "from importlib import metadata", "text.replace('a', 'b'), date.replace(hour=1)",
        "from dataclasses import replace; replace(x, y=1)", "from mm_moslora.utils import files; files.rename(a, b)",
        "import torch; torch.nn.Linear(1, 1)", "from mm_moslora.utils.untrusted_files import read_text; read_text(p)",
        "import shutil; shutil.which('git')", "f(trust_remote_code=False, weights_only=True)",
        "class A:\n    compile: bool = False",
    ],
)  # fmt: skip
def test_what_is_harmless_needs_no_leave(line: str) -> None:
    assert {door_of(use) for use in uses(line)} <= {""}
