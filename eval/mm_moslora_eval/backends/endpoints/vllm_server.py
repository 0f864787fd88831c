"""A model behind vLLM, whose server this process starts and stops.

vLLM needs an environment of its own. `MM_MOSLORA_VLLM` names its program, such as `/opt/vllm/bin/vllm`; default: the
`vllm` that the shell finds. The server listens on this machine alone, and ends with this process however that ends.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from mm_moslora.launch.child_processes import end_child, python_words, start_tied
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.redaction import redact_text
from mm_moslora.utils.run_paths import MANIFEST
from mm_moslora.utils.text_format import whole_number
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.backends.openai_endpoint import Endpoint, EndpointModel, ServiceSettings
from mm_moslora_eval.sources.document import digest

logger = logging.getLogger(__name__)

PROGRAM = "MM_MOSLORA_VLLM"
START_SECONDS = 1800.0
"""Longest time in which the server must be ready: weights are read and kernels compiled before."""
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.25
_TAIL = 2000


class VllmModel(EndpointModel):
    """A model whose server runs as long as this object is open.

    Args:
        folder: an export in transformers' format, such as that of `mm-moslora merge`.
        service: patience, limits, and further arguments of `vllm serve`.
        reference: one request at a time.
        start_seconds: longest time until the server is ready.

    Raises:
        EvalError: vLLM is not installed, the folder is none that it reads, or the server does not start.
    """

    def __init__(
        self, folder: Path, *, service: ServiceSettings, reference: bool = False, start_seconds: float = START_SECONDS
    ) -> None:
        self.folder, self._arguments = folder, service.server_arguments
        program = _program()
        _check_folder(folder)
        served = f"mm-moslora-{secrets.token_hex(8)}"  # another server at this port has another name
        endpoint = service.endpoint(f"http://127.0.0.1:{_free_port()}/v1#{served}")
        super().__init__(endpoint, reference=reference)
        port = endpoint.url.rpartition(":")[2].removesuffix("/v1")
        words = [program, "serve", str(folder.absolute()), "--host", "127.0.0.1", "--port", port]
        words += ["--served-model-name", served, *self._arguments]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the server)
        self._server = start_tied(
            python_words("-m", "mm_moslora.launch.tied_command", *words), {}, stdout=self._log, stderr=self._log
        )
        atexit.register(self.close)
        try:
            self._wait(start_seconds)
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """The folder."""
        return f"vllm:{self.folder}"

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Hash over the files of the folder and the arguments of the server."""
        files = {}
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            with opened(path, most=None) as stream:
                files[path.relative_to(self.folder).as_posix()] = sha256_of(stream)
        return digest(["vllm", files, list(self._arguments)])

    @property
    def details(self) -> dict[str, str]:
        """Details for the run's records."""
        arguments = {"arguments": " ".join(self._arguments)} if self._arguments else {}
        return {"server": f"vLLM {self._version}".strip(), **arguments, **super().details}

    @cached_property
    def _version(self) -> str:
        address = replace(self.endpoint, url=self.endpoint.url.removesuffix("/v1"))
        reply = address.get("/version")
        return str(reply.get("version", ""))[:40] if isinstance(reply, dict) else ""

    def close(self) -> None:
        """Stop the server."""
        atexit.unregister(self.close)
        end_child(self._server, seconds=_STOP_SECONDS)
        self._log.close()

    def _wait(self, seconds: float) -> None:
        """Wait until the server is ready."""
        ends, last_message = time.monotonic() + seconds, time.monotonic()
        while not _serves(self.endpoint):
            if self._server.poll() is not None:
                raise EvalError(f"vLLM ended before it was ready (exit code {self._server.returncode}).{self._said()}")
            if time.monotonic() > ends:
                raise EvalError(f"vLLM is not ready after {seconds:g} seconds.{self._said()}")
            if time.monotonic() - last_message > 60:
                logger.info("vLLM is not ready yet.")
                last_message = time.monotonic()
            time.sleep(_POLL_SECONDS)

    def _said(self) -> str:
        """The end of the server's output."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _TAIL))
        text = redact_text(self._log.read().decode("utf-8", "replace")).strip()
        return f" The end of its output:\n{text}" if text else " It printed nothing."


def _program() -> str:
    named = os.environ.get(PROGRAM) or "vllm"
    program = shutil.which(named)
    if program is None:
        raise EvalError(
            f"There is no program {named!r}. Install vLLM into an environment of its own, and name its program in "
            f"{PROGRAM}, such as /opt/vllm/bin/vllm."
        )
    if whole_number(os.environ, "WORLD_SIZE", 1, least=1) > 1:
        raise EvalError(
            "vllm:FOLDER is for one process, not for torchrun. vLLM divides the work itself: "
            "--server-arguments='--tensor-parallel-size N' or '--data-parallel-size N'."
        )
    return program


def _check_folder(folder: Path) -> None:
    if (folder / MANIFEST).is_file() or not (folder / "config.json").is_file():
        raise EvalError(
            f"{folder} is no model that vLLM reads. Of a run or a checkpoint it reads the merged model: "
            f"mm-moslora merge {folder} FOLDER --dtype bf16, then --model vllm:FOLDER."
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _serves(endpoint: Endpoint) -> bool:
    """Whether the server is ready, and no other one."""
    models = endpoint.get("/models")
    rows = models.get("data") if isinstance(models, dict) else None
    named = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return endpoint.model in named
