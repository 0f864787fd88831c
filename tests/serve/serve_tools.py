"""A server around a tiny model in a thread, and pictures as data URLs."""

from __future__ import annotations

import asyncio
import base64
import copy
import faulthandler
import io
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

KEY = "test-key-of-some-length"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
"""The beginning of a request that a test writes by hand."""


def data_url(image: Image.Image, kind: str = "PNG") -> str:
    stream = io.BytesIO()
    image.save(stream, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"


def asking(text: str, *pictures: str, **more: Any) -> dict[str, Any]:
    """A request body."""
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
    content = [{"type": "text", "text": text}, *parts] if parts else text
    return {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 6, **more}


def pixels_of(models: Any, picture: Image.Image) -> Any:
    """A picture as the tower's input, ``[3, H, W]``."""
    return models.assembly.image_processing.process([picture])[0].tensors["pixel_values"][0]


def before_steps(engine: Any, act: Callable[[], object]) -> None:
    """Do something before each step of a batch that an engine reads from now on: wait, or take a while."""
    models = copy.copy(engine.models)  # other engines have them, too

    def read(*arguments: Any) -> Any:
        decoder = type(models).read(models, *arguments)
        extend = decoder.extend
        decoder.extend = lambda *given: (act(), extend(*given))[1]
        return decoder

    models.read = read
    engine.models = models


class Running:
    """A running server."""

    def __init__(self, engine: Any, app: Any, port: int) -> None:
        self.engine, self.app, self.port = engine, app, port
        self.url = f"http://127.0.0.1:{port}"
        self.intake = app._app.routes[0].app._intake
        """Counts the memory that requests hold."""

    def client(self, **options: Any) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, **{"max_retries": 0, "timeout": 60} | options)

    def post(self, body: Any, **options: Any) -> Any:
        import httpx

        content = {"json": body} if isinstance(body, dict) else {"content": body}
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return httpx.post(f"{self.url}/v1/chat/completions", headers=headers, timeout=60, **content, **options)

    def get(self, path: str, **options: Any) -> Any:
        import httpx

        return httpx.get(self.url + path, timeout=60, **options)

    def socket(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)


@contextmanager
def listening(app: Any, limits: Any, *, end: Any = lambda: None) -> Iterator[int]:
    """Run an application on a free port; at the end its answers are ended at once, as after a second Ctrl-C."""
    from mm_moslora.serve.http_server import Server, bound

    sockets = bound("127.0.0.1", 0)
    server = Server(app, limits, end=end)
    server.capture_signals = _nothing  # type: ignore[method-assign]  (signals belong to the main thread)
    port = sockets[0].getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)), name=f"server-{port}", daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive(), "the server did not start"
    try:
        yield port
    finally:
        server.should_exit = server.hurries = True
        thread.join(120)  # a busy machine takes long for one step of a model
        if thread.is_alive():
            faulthandler.dump_traceback()
            raise AssertionError("the server did not stop")


@contextmanager
def serving(engine: Any, limits: Any, **options: Any) -> Iterator[Running]:
    from mm_moslora.serve.api_routes import create_app

    app = create_app(engine, limits, **options)
    with listening(app, limits, end=engine.stop) as port:
        yield Running(engine, app, port)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
