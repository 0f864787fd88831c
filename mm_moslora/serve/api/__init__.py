"""The HTTP server and OpenAI's chat completions."""
