"""Models, prompts and continuous batching behind the server."""
