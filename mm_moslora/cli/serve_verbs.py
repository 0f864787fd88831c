"""The verbs `chat` and `serve`. Parsing and printing only; heavy imports happen inside the verbs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from mm_moslora.cli.shared_options import OtherPreprocessing, Several, quiet_libraries
from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.package_requirements import install_extra, is_installed
from mm_moslora.utils.run_paths import find_checkpoint

if TYPE_CHECKING:
    from mm_moslora.serve.request_limits import Limits

Adapters = Annotated[Several, Parameter(name="--adapter", help="NAME=FOLDER of a further adapter for the same base.")]


def chat(
    model: Path,
    *,
    image: Path | None = None,
    question: str | None = None,
    max_new_tokens: int = 128,
    show_thinking: bool = False,
    web: Annotated[bool, Parameter(negative="")] = False,
    port: int = 7860,
    other_preprocessing: OtherPreprocessing = False,
) -> int:
    """Chat with a model in the terminal, or on a web page.

    Parameters
    ----------
    model
        A run, a checkpoint or an export.
    image
        Picture to start with; /image PATH changes it later.
    question
        Ask this one question and exit.
    max_new_tokens
        Longest answer, tokens.
    show_thinking
        Show the thinking before an answer, which is folded otherwise; /thinking changes it.
    web
        Open a web page with the model and the model before tuning, with attention drawn over the image. An export, and
        a run that trained weights of the base, have no model before tuning.
    port
        With --web: port on this machine only; 0 chooses a free port.
    """
    find_checkpoint(model)
    if web:
        return _web_chat(model, port=port, max_new_tokens=max_new_tokens, other_preprocessing=other_preprocessing)
    if image is not None and not image.is_file():
        raise DataError(f"There is no picture {str(image)!r}; --image takes the path of a file.")
    quiet_libraries()
    from mm_moslora.serve.terminal_chat import Chat, interactive
    from mm_moslora.serve.text_stream import ThinkingSplit

    talk = Chat.from_folder(model, max_new_tokens=max_new_tokens, other_preprocessing=other_preprocessing)
    talk.shows_thinking = show_thinking
    if image is not None:
        talk.show(image)
    if question is not None:
        answer = talk.ask(question)
        print(answer if show_thinking else ThinkingSplit().add(answer, last=True)[1])
        return 0
    interactive(talk)
    return 0


@Parameter(name="*", group="Limits")
@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """Limits of the server."""

    max_batch: int = 32
    """Answers decoded together."""
    max_queue: int = 128
    """Requests that may wait; further requests get 429 and Retry-After."""
    max_tokens: int = 4096
    """Largest max_tokens that a request may ask for."""
    max_body_mib: int = 20
    """Largest request body, MiB."""
    max_image_megapixels: int = 40
    """Largest image, million pixels."""
    request_seconds: float = 120.0
    """Time limit of one request."""

    def limits(self) -> Limits:
        """The limits in the server's units."""
        from mm_moslora.serve.request_limits import Limits

        return Limits(
            batch=self.max_batch, queue=self.max_queue, max_tokens=self.max_tokens,
            body_bytes=self.max_body_mib * 2**20, image_pixels=self.max_image_megapixels * 1_000_000,
            request_seconds=self.request_seconds,
        )  # fmt: skip


USUAL_LIMITS = LimitOptions()


def serve(
    model: Path,
    *,
    name: str | None = None,
    adapter: Adapters = (),
    with_base: bool = False,
    host: str = "127.0.0.1",
    port: int = 8000,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    other_preprocessing: OtherPreprocessing = False,
    limited: LimitOptions = USUAL_LIMITS,
) -> int:
    """Serve a model to OpenAI clients: /v1/chat/completions, /v1/models, /health.

    A key for clients is read from the environment variable MM_MOSLORA_SERVE_KEY.

    Parameters
    ----------
    model
        A run, a checkpoint or an export.
    name
        Model name for clients; default: the folder's name.
    with_base
        Also serve the model before tuning, as NAME-base.
    host
        Address to listen on; an address other than this machine's own needs a key.
    port
        0 chooses a free port.
    precision
        Dtype of the base weights.
    """
    find_checkpoint(model)
    quiet_libraries()
    needs("starlette", "uvicorn", extra="serve")
    from mm_moslora.serve.http_server import bound, is_loopback, run_app
    from mm_moslora.serve.request_guard import KEY_NAME, SHORTEST_KEY, read_key

    limits = limited.limits()
    further, key, local = parse_adapters(adapter), read_key(), is_loopback(host)
    if not local and key is None:
        raise ConfigError(
            f"{host} can be reached from other machines, and no key is set. Put one of at least {SHORTEST_KEY} "
            f"characters into {KEY_NAME}, or listen on 127.0.0.1."
        )
    sockets = bound(host, port)
    from mm_moslora.models.precision import dtype_of  # torch takes seconds to import
    from mm_moslora.serve.api_routes import create_app
    from mm_moslora.serve.continuous_batching import GenerationEngine
    from mm_moslora.serve.served_models import load_models

    models = load_models(
        model, name=name, further=further, with_base=with_base, dtype=dtype_of(precision),
        other_preprocessing=other_preprocessing,
    )  # fmt: skip
    engine = GenerationEngine(models, limits)
    run_app(create_app(engine, limits, key=key, local=local), sockets, limits=limits, end=engine.stop)
    return 0


def _web_chat(model: Path, *, port: int, max_new_tokens: int, other_preprocessing: bool) -> int:
    quiet_libraries()
    needs("gradio", extra="demo")
    from mm_moslora.serve.http_server import bound

    for free in bound("127.0.0.1", port):  # before the model is loaded
        free.close()
    from mm_moslora.serve.gradio_demo import Demo, launch
    from mm_moslora.serve.served_models import load_models, why_no_base

    reason = why_no_base(model)
    models = load_models(model, with_base=reason is None, other_preprocessing=other_preprocessing)
    talk = Demo(models, max_new_tokens=max_new_tokens, why_no_base=reason)
    print(f"http://127.0.0.1:{port}" if port else "The address follows.")
    try:
        launch(talk, port=port)
    finally:
        talk.close()
    return 0


def needs(*modules: str, extra: str) -> None:
    """Check that the packages of an extra are installed.

    Raises:
        ConfigError: one is missing; names the command that installs it.
    """
    for module in modules:
        if not is_installed(module):
            raise ConfigError(f"This needs {module}, which is not installed. Run: {install_extra(extra)}")


def parse_adapters(items: Sequence[str]) -> dict[str, Path]:
    """`NAME=FOLDER` entries.

    Raises:
        ConfigError: an entry has another form, or a name is given twice.
    """
    adapters: dict[str, Path] = {}
    for item in items:
        name, _, folder = item.partition("=")
        if not name or not folder or name in adapters:
            raise ConfigError(f"{item!r} is not an adapter entry; expected NAME=FOLDER with a unique name.")
        adapters[name] = Path(folder)
    return adapters
