"""The hub, or what is cached of it where it does not answer.

The hub's client tries for half a minute to minutes per file where nothing answers, and asks some questions without any
limit: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants, get_session

from mm_moslora.utils.errors import reason_of

logger = logging.getLogger(__name__)

SECONDS = 5
"""For the hub's first word."""


@contextmanager
def hub_or_cache(*names: str | Path | None) -> Iterator[None]:
    """Inside, the hub's client reads its cache alone if the hub, asked once, does not answer.

    Args:
        names: of models or data sets; nothing is asked where all are paths that exist.
    """
    offline = constants.HF_HUB_OFFLINE
    if not offline and any(name and not Path(name).exists() for name in names):
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
        except Exception as error:  # of requests or httpx, as the hub's client has it
            logger.warning(
                "%s does not answer (%s); what is cached of it is used.", constants.ENDPOINT, reason_of(error)
            )
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
