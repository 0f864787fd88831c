"""The HTTP server, the web demo and the terminal chat."""
