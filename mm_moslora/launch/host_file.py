"""Variables that DeepSpeed's launcher passes on to the hosts of a host file.

By itself it exports variables that begin with MLFLOW, PYTHON, MV2, UCX and, with GPUs, NCCL, puts the working folder on
PYTHONPATH, and reads `.deepspeed_env` in the home and in the working folder. Here the working folder has no say: its
files may be somebody else's, and variables such as LD_PRELOAD run code. `DS_ENV_FILE` names a file in any place.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from mm_moslora.utils.redaction import is_secret_name
from mm_moslora.utils.untrusted_files import read_text

logger = logging.getLogger(__name__)

DEEPSPEED_ENV_FILE = "DS_ENV_FILE"
"""DeepSpeed's variable for the name of that file; absolute paths work, too."""
PASSED_ON = (
    "DS_", "GLOO_", "HF_", "MKL_", "MM_MOSLORA_", "NCCL_", "OMP_", "PYTORCH_", "TENSORBOARD_", "TOKENIZERS_", "TORCH_",
    "TRACKIO_", "TRANSFORMERS_", "WANDB_",
)  # fmt: skip
"""Beginnings of the names that are passed on."""


def exported_lines(environment: Mapping[str, str]) -> str:
    """The content of a file for `DS_ENV_FILE`: variables to pass on, then the lines of the user's own files.

    Variables with names of secrets are left out, since DeepSpeed writes all values into command lines, which other
    users of the hosts can read. So are values with line breaks, which such a file cannot hold.
    """
    chosen = {
        name: value for name, value in environment.items() if name.startswith(PASSED_ON) and name != DEEPSPEED_ENV_FILE
    }
    exported = {name: value for name, value in chosen.items() if not is_secret_name(name) and "\n" not in value}
    if left_out := sorted(chosen.keys() - exported.keys()):
        logger.warning(
            "%s: not passed on to the hosts. Log in on each host (hf auth login, wandb login), or use a .deepspeed_env "
            "file.", ", ".join(left_out),
        )  # fmt: skip
    lines = [f"{name}={_escaped(value)}" for name, value in exported.items()]
    lines.append(f"PYTHONPATH={_escaped(environment.get('PYTHONPATH', ''))}")
    named = environment.get(DEEPSPEED_ENV_FILE)
    files = [Path.home() / ".deepspeed_env"] if named is None else [Path.home() / named, Path(named)]
    if named is None and Path(".deepspeed_env").is_file() and Path.cwd() != Path.home():
        logger.warning(".deepspeed_env of this folder is not read. Name it: DS_ENV_FILE=.deepspeed_env")
    for file in dict.fromkeys(files):
        if file.is_file():  # later lines win; DeepSpeed fails on lines without a value
            lines += [line for line in read_text(file).splitlines() if "=" in line]
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    """A value that DeepSpeed's double quotes keep as it is."""
    return re.sub(r'([\\"$`])', r"\\\1", value)
