"""Limits on one request and on all requests together."""

from __future__ import annotations

from dataclasses import dataclass, fields

from mm_moslora.utils.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All limits of the server; the defaults suit one machine on a private network."""

    body_bytes: int = 20 * 2**20
    """Bytes of one request body; checked while it arrives."""
    bodies_bytes: int = 256 * 2**20
    """Bytes of all request bodies and their parsed contents in memory; counted until the answers end."""
    pictures_bytes: int = 2**30
    """Bytes of memory for decoding the pictures of one request: a file of 200 kB may hold 40 million pixels."""
    json_items: int = 100_000
    """Commas and opening brackets of a body; counted before anything is parsed."""
    json_escapes: int = 1_000_000
    """Backslashes of a body; counted before anything is parsed."""
    json_depth: int = 32
    """Nesting depth of a body; a request needs 6."""
    characters_per_token: int = 16
    """Characters per token of the context; a longer conversation is refused before it is tokenised."""
    body_seconds: float = 30.0
    """Seconds for a body to arrive."""
    write_seconds: float = 30.0
    """Seconds without reading after which a client is dropped."""
    prepare_seconds: float = 20.0
    """Seconds for preparing the pictures and the text of a request."""
    request_seconds: float = 120.0
    """Seconds from arrival to the last token; a longer answer is cut off."""
    drain_seconds: float = 30.0
    """Seconds for running answers to end after a stop signal."""
    connections: int = 1024
    """Open connections; further ones get 503."""
    queue: int = 128
    """Answers in the queue; further ones get 429."""
    batch: int = 32
    """Answers that are decoded in one batch."""
    cached_tokens: int = 262_144
    """Tokens in the key-value cache, of all prompts and answers together."""
    context: int = 8192
    """Tokens of one prompt and its answer; the model's own limit applies, too."""
    max_tokens: int = 4096
    """Longest answer that a client may ask for, tokens."""
    default_tokens: int = 256
    """Longest answer where the request sets no limit, tokens."""
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
