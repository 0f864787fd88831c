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
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from mm_moslora.launch.child_processes import end_child, ended_within, python_words, start_tied
from mm_moslora.launch.topology import free_port
from mm_moslora.utils.errors import EvalError
from mm_moslora.utils.files import sha256_of
from mm_moslora.utils.redaction import is_secret_name, redact_text, redacted_command
from mm_moslora.utils.run_paths import MANIFEST
from mm_moslora.utils.text_format import whole_number
from mm_moslora.utils.untrusted_files import opened
from mm_moslora_eval.backends.endpoints.parallel_calls import ServerError
from mm_moslora_eval.backends.openai_endpoint import NOTHING_SAID, Endpoint, EndpointModel, ServiceSettings
from mm_moslora_eval.protocol.model_interface import Answer, OptionRequest, OptionScore, Request
from mm_moslora_eval.sources.document import digest

logger = logging.getLogger(__name__)

PROGRAM = "MM_MOSLORA_VLLM"
START_SECONDS = 1800.0
"""Longest time in which the server must be ready: weights are read and kernels compiled before."""
_STOP_SECONDS = 30.0
_POLL_SECONDS = 0.25
_TAIL = 2000
_LAST_BREATH = 5.0
"""Seconds in which a server whose connection broke ends, and its workers do."""
_OWN = (
    "--host", "--port", "--uds", "--headless", "--root-path", "--served-model-name", "--api-key", "--ssl-keyfile",
    "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs",
)  # fmt: skip
"""Arguments after which the server would not stand where this process asks for it."""
_Asked = TypeVar("_Asked")
_Said = TypeVar("_Said")


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
        check_arguments(self._arguments)
        program = _program()
        _check_folder(folder)
        served = f"mm-moslora-{secrets.token_hex(8)}"  # another server at this port has another name
        endpoint = service.endpoint(f"http://127.0.0.1:{free_port()}/v1#{served}")
        super().__init__(endpoint, reference=reference)
        port = endpoint.url.rpartition(":")[2].removesuffix("/v1")
        words = [program, "serve", str(folder.absolute()), *self._arguments]
        words += ["--host", "127.0.0.1", "--port", port, "--served-model-name", served]  # the last ones count
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
        arguments = {"arguments": redacted_command(self._arguments)} if self._arguments else {}
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
                logger.info("vLLM is not ready yet.%s", self._said(most=200))
                last_message = time.monotonic()
            time.sleep(_POLL_SECONDS)

    def _answer(self, request: Request) -> Answer:
        return self._asked(super()._answer, request)

    def _score(self, item: OptionRequest) -> tuple[OptionScore, ...]:
        return self._asked(super()._score, item)

    def _asked(self, ask: Callable[[_Asked], _Said], request: _Asked) -> _Said:
        """The answer to a request; where there is none because the server has ended, how it ended."""
        try:
            return ask(request)
        except (EvalError, ServerError) as error:
            if not ended_within(self._server, _LAST_BREATH):
                raise
            raise EvalError(
                f"vLLM ended while it was asked (exit code {self._server.returncode}). Its answers are kept; the same "
                f"command asks the rest.{self._said()}"
            ) from error

    def _said(self, most: int = _TAIL) -> str:
        """The end of the server's output."""
        log = self._log.fileno()  # whose offset is the server's, too
        said = os.pread(log, most, max(0, os.fstat(log).st_size - most))
        text = redact_text(said.decode("utf-8", "replace")).strip()
        return f" The end of its output:\n{text}" if text else " It printed nothing."


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse arguments of the server that this process sets itself, and secrets, which other users would see.

    Raises:
        EvalError: there is one.
    """
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if len(name) > 4 and any(own.startswith(name) for own in _OWN):  # argparse takes beginnings of names
            raise EvalError(
                f"--server-arguments has {name}, but the command chooses itself where its server listens, its model's "
                "name, and that it needs no key: leave it out."
            )
        if (word.startswith("-") and is_secret_name(name.lstrip("-"))) or redact_text(word, keep_hashes=True) != word:
            raise EvalError(
                f"--server-arguments has a secret ({redact_text(name)}), which the list of processes would show. Set "
                "it in the environment, which the server gets, such as HF_TOKEN."
            )


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


def _serves(endpoint: Endpoint) -> bool:
    """Whether the server is ready.

    Raises:
        EvalError: it refuses this process, or it is another one.
    """
    try:
        models = endpoint.ask("/models")
    except NOTHING_SAID as error:
        code = getattr(error, "code", None)
        if code in (401, 403):
            raise EvalError(
                f"vLLM's server refuses this command (HTTP {code}): it asks for a key. It serves this machine "
                "alone, for this command: unset VLLM_API_KEY, and set no api-key in a --config."
            ) from error
        return False
    rows = models.get("data") if isinstance(models, dict) else None
    named = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if named and endpoint.model not in named:
        raise EvalError(
            f"The server at {endpoint.url} serves {named[0]!r}, expected {endpoint.model!r}: another program has taken "
            "its port. Start the command again."
        )
    return endpoint.model in named
