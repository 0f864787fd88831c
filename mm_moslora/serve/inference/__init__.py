"""Models, prompts and continuous batching for the server."""
