"""The `serve` verb: API key, address and adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_moslora.serve.api.http_server import bound, is_loopback, run_app
from mm_moslora.serve.api.request_limits import Limits
from mm_moslora.utils.errors import ConfigError

if TYPE_CHECKING:
    from mm_moslora.serve.inference.served_models import Models

KEY_NAME = "MM_MOSLORA_SERVE_KEY"
"""Environment variable with the key. No option holds the key, since command lines are logged and listed."""
_SHORTEST_KEY = 16


def serve(
    load: Callable[[], Models], *, host: str = "127.0.0.1", port: int = 8000, limits: Limits,
    allowed_hosts: Sequence[str] = (),
) -> None:  # fmt: skip
    """Serve until a stop signal; running answers get time to end.

    Args:
        load: loads the models, once the key and the address are found to be usable.
        host: address to listen on.
        port: 0 chooses a free one.
        limits: the server's.
        allowed_hosts: hosts that pictures may be fetched from.

    Raises:
        ConfigError: the key is too short, the address cannot be taken, or it is reachable from other machines and no
            key is set.
        KeyboardInterrupt: a second Ctrl-C ended answers.
    """
    key = read_key()
    local = is_loopback(host)
    if not local and key is None:
        raise ConfigError(
            f"{host} can be reached from other machines, and no key is set. Put one of at least {_SHORTEST_KEY} "
            f"characters into {KEY_NAME}, or listen on 127.0.0.1."
        )
    sockets = bound(host, port)
    from mm_moslora.serve.api.api_routes import create_app  # torch takes seconds to import
    from mm_moslora.serve.inference.continuous_batching import Engine
    from mm_moslora.serve.inference.pinned_fetch import RemotePictures

    fetch = RemotePictures(allowed_hosts) if allowed_hosts else None
    engine = Engine(load(), limits)
    app = create_app(engine, limits, key=key, local=local, fetch=fetch)
    run_app(app, sockets, limits=limits, end=engine.stop)


def read_key() -> str | None:
    """The key from the environment.

    Raises:
        ConfigError: the key is too short or not plain ASCII.
    """
    key = os.environ.get(KEY_NAME) or None
    if key is not None and (len(key) < _SHORTEST_KEY or not key.isascii() or key != key.strip()):
        raise ConfigError(f"{KEY_NAME} must hold at least {_SHORTEST_KEY} ASCII characters without spaces around them.")
    return key


def parse_adapters(items: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` entries.

    Raises:
        ConfigError: an entry has another form, or a name is given twice.
    """
    found: dict[str, Path] = {}
    for item in items:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder or name in found:
            raise ConfigError(f"{item!r} is not an adapter entry; expected NAME=FOLDER with a unique name.")
        found[name] = Path(folder)
    return found
