"""The command line: `mm-moslora <verb>`. Parsing and printing only; heavy imports happen inside the verbs."""

from mm_moslora.cli.cli_app import app, main, run

__all__ = ["app", "main", "run"]
