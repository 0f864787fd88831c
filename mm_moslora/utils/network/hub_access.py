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

from huggingface_hub import constants, get_session

from mm_moslora.utils.errors import reason_of

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
