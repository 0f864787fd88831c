"""Importing it keeps libraries from saying on stderr, when they are imported, what nobody can act on.

peft and transformers import bitsandbytes and torchao where they are installed, and these say that optional kernels are
missing and that torch will refuse an enum one day. diffusers looks for classes that torchao no longer has. Nothing else
of theirs is silenced. One module of transformers prints on stdout that WANDB_MODE is offline, which would be the first
line of what a `--json` gives; that is dropped, too.
"""

import contextlib
import importlib.abc
import importlib.util
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

_NOISE = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao`",
}


def _is_no_noise(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE[record.name])


for _name in _NOISE:
    logging.getLogger(_name).addFilter(_is_no_noise)


class _WithoutPrints(importlib.abc.MetaPathFinder):
    """Drops what a module prints while it is imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find that module as all others do."""
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def quietly(module: ModuleType) -> None:
                with contextlib.redirect_stdout(io.StringIO()):
                    execute(module)

            spec.loader.exec_module = quietly  # type: ignore[method-assign]
        return spec


if os.environ.get("WANDB_MODE") == "offline":
    sys.meta_path.insert(0, _WithoutPrints("transformers.integrations.integration_utils"))
