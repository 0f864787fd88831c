"""Run an ASGI application with uvicorn and a graceful shutdown. No torch.

A proxy in front of it stops clients that send headers slowly, or bad HTTP; see docs/serving.md.
"""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import logging
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from mm_moslora.launch.child_processes import install_handler, restore_handlers
from mm_moslora.serve.request_limits import Limits
from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.hardware import keep_freed_memory
from mm_moslora.utils.text_format import LARGEST_PORT

logger = logging.getLogger(__name__)

END_SECONDS = 5.0
"""Seconds after the end of the answers in which their clients may read it."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bound(host: str, port: int) -> list[socket.socket]:
    """A bound socket (IPv4 if possible; port 0: a free port), taken before costly work; it does not listen yet."""
    try:
        if not 0 <= port <= LARGEST_PORT:  # the system would take the remainder of a division
            raise OverflowError(f"ports are 0 to {LARGEST_PORT}")
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(addresses, key=lambda item: item[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"Nothing can listen on {host}, port {port} ({getattr(error, 'strerror', None) or error}). Correct the "
            "address, end what uses the port, or choose another one with --port; 0 takes a free one."
        ) from error
    return [listener]


def run_app(app: App, sockets: list[socket.socket], *, limits: Limits, end: Callable[[], object]) -> None:
    """Run an application until a signal asks it to stop."""
    # The libraries' objects live as long as the process. Collecting garbage among them would hold every thread for
    # tenths of a second.
    gc.collect()
    gc.freeze()
    keep_freed_memory(block=2**22, total=2**26)  # pictures and bodies are large and short-lived
    try:
        Server(app, limits, end=end).run(sockets)
    finally:
        gc.unfreeze()  # libraries report frozen objects as leaks when the process ends


class Server(uvicorn.Server):
    """Logs the address once it listens; `end` ends all answers at once, after their time or after a second Ctrl-C."""

    def __init__(self, app: App, limits: Limits, *, end: Callable[[], object] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app, http="h11", limit_concurrency=limits.connections, ws="none", lifespan="on", log_config=None,
                access_log=False, server_header=False, date_header=False, proxy_headers=False, loop="asyncio",
                timeout_graceful_shutdown=math.ceil(limits.drain_seconds + END_SECONDS),
            )  # type: ignore[arg-type]
        )  # fmt: skip
        self._drain_seconds, self._end = limits.drain_seconds, end
        self.hurries = False
        """Whether answers get no more time."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        super().run(sockets)
        if self.hurries:
            raise KeyboardInterrupt

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server after its answers; Ctrl-C after it ends the answers, too."""
        self.hurries |= self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        ending = asyncio.ensure_future(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()
        if self.force_exit:  # uvicorn would leave the engine's thread behind, which the interpreter's end aborts
            await self.lifespan.shutdown()

    async def _end_answers(self) -> None:
        """End all answers in time to tell their clients, and stop waiting for clients that do not read."""
        until = time.monotonic() + self._drain_seconds
        while not self.hurries and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self._end)
        await asyncio.sleep(END_SECONDS)
        self.force_exit = self.hurries

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn raises the signal again at the end, so a clean shutdown would look like a killed process."""
        before = install_handler(self.handle_exit, unless_ignored=False)
        try:
            yield
        finally:
            restore_handlers(before)

    async def startup(self, sockets: Any = None) -> None:
        """See uvicorn."""
        await super().startup(sockets=sockets)
        for server in self.servers:
            for listener in server.sockets:
                host, port, *_ = listener.getsockname()
                shown = f"[{host}]" if ":" in host else host
                logger.info("Listening on http://%s:%d (Ctrl-C ends it).", shown, port)
