"""The hub, or what is cached of it where it does not answer.

The hub's client tries for half a minute to minutes per file where nothing answers, and asks some questions without any
limit: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants, get_session, get_token
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from mm_moslora.utils.errors import ConfigError, reason_of

logger = logging.getLogger(__name__)


class _Hub:
    """What the blocks of all threads know of the hub while any of them is open."""

    def __init__(self) -> None:
        self._lock, self._open, self._was_offline, self._asked = threading.Lock(), 0, False, False

    def enter(self) -> None:
        with self._lock:
            if not self._open:
                self._was_offline, self._asked = constants.HF_HUB_OFFLINE, False
            self._open += 1

    def ask(self) -> None:
        with self._lock:
            if self._asked or constants.HF_HUB_OFFLINE:
                return
            self._asked = True
            try:
                get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            except Exception as error:  # of requests or httpx, as the hub's client has it
                why = reason_of(error)
                logger.warning("%s does not answer (%s); what is cached of it is used.", constants.ENDPOINT, why)
                constants.HF_HUB_OFFLINE = True

    def leave(self) -> None:
        with self._lock:
            self._open -= 1
            if not self._open:
                constants.HF_HUB_OFFLINE = self._was_offline


_hub = _Hub()


@contextmanager
def hub_or_cache(*names: str | Path | None) -> Iterator[None]:
    """Inside, the hub's client reads its cache alone if the hub, asked once, does not answer in HF_HUB_ETAG_TIMEOUT.

    Args:
        names: of models or data sets; nothing is asked where all are paths that exist.
    """
    _hub.enter()
    try:  # Ctrl-C while it is asked leaves the block, too
        if any(name and not os.path.exists(name) for name in names):
            _hub.ask()
        yield
    finally:
        _hub.leave()


def check_login(repository: str) -> None:
    """Whether the hub answers and knows this user, before anything is made for it.

    Raises:
        ConfigError: the name is none, the hub is switched off or does not answer, or there is no login.
    """
    try:
        validate_repo_id(repository)
        if constants.HF_HUB_OFFLINE:
            raise ConnectionError("HF_HUB_OFFLINE is set")
        if get_token() is None:
            raise PermissionError("there is no login: run `hf auth login`, or set HF_TOKEN")
        HfApi().whoami()
    except Exception as error:  # of the hub's client and its transport
        raise ConfigError(
            f"--push {repository}: {constants.ENDPOINT} takes no upload ({reason_of(error)}). Export without --push, "
            "and upload the folder later."
        ) from error


def upload(path: Path, repository: str) -> str:
    """Upload a folder, or a file, and return its address; a repository that does not exist is made, private."""
    api = HfApi()
    name = api.create_repo(repository, private=True, exist_ok=True).repo_id
    if path.is_file():
        return str(api.upload_file(path_or_fileobj=path, path_in_repo=path.name, repo_id=name))
    return str(api.upload_folder(repo_id=name, folder_path=path, commit_message=f"Add {path.name}"))
