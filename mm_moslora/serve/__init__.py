"""The HTTP server, the web demo, the terminal chat and the dashboard."""
