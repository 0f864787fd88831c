"""How much one request, and all of them together, may ask of the server."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mm_moslora.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Every bound of the server; the defaults suit one machine on a private network.

    Raises:
        ConfigError: a bound that is not positive.
    """

    body_bytes: int = 20 * 2**20
    """Bytes of one request body; enforced while it arrives."""
    bodies_bytes: int = 256 * 2**20
    """Bytes of all request bodies, and of what was made of them, in memory together; counted until the answers end."""
    pictures_bytes: int = 2**30
    """Bytes of memory for pictures that are being opened, together: a file of 200 kB may hold 40 million pixels."""
    json_items: int = 100_000
    """Commas and opening brackets of a body; counted while it arrives, so that nothing is parsed that is refused."""
    json_escapes: int = 1_000_000
    """Backslashes of a body; counted alike."""
    json_depth: int = 32
    """Nesting of a body; a request needs 6."""
    characters_per_token: int = 16
    """A conversation of more characters than this for every token of the context is refused untokenised."""
    body_seconds: float = 30.0
    """Seconds in which a body must have arrived."""
    header_seconds: float = 10.0
    """Seconds in which the header of a request must have arrived."""
    write_seconds: float = 30.0
    """Seconds for which a client may refuse to read before it is dropped."""
    prepare_seconds: float = 20.0
    """Seconds in which the pictures and the text of a request must be ready."""
    request_seconds: float = 120.0
    """Seconds from arrival to the last token; a longer answer is cut there."""
    drain_seconds: float = 30.0
    """Seconds in which running answers may end after a stop signal."""
    connections: int = 1024
    """Open connections; more are closed at once."""
    queue: int = 128
    """Answers that may wait for a place; more get 429."""
    batch: int = 32
    """Answers that are decoded together."""
    cached_tokens: int = 262_144
    """Tokens of prompts and answers whose keys and values are in memory together."""
    context: int = 8192
    """Tokens of one prompt and its answer; the model's own limit counts too."""
    max_tokens: int = 4096
    """Longest answer that may be asked for, tokens."""
    default_tokens: int = 256
    """Longest answer where the request says nothing, tokens."""
    choices: int = 8
    """Answers to one request (`n`)."""
    messages: int = 200
    """Messages of one conversation."""
    parts: int = 64
    """Content parts of one message."""
    images: int = 16
    """Pictures of one request."""
    image_pixels: int = 40_000_000
    """Pixels of one picture; it is refused before it is decoded."""
    images_pixels: int = 100_000_000
    """Pixels of all pictures of one request together."""
    stops: int = 4
    """Stop strings."""
    stop_characters: int = 256
    """Characters of one stop string."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"The limit {field.name} is {value}, expected a positive number.")
