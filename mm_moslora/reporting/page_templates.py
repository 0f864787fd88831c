"""Self-contained pages from templates: they load nothing, and their content policy allows their own script only."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mm_moslora.utils.files import replace_text
from mm_moslora.utils.folder_marks import PAGE_SIGN, output_file
from mm_moslora.utils.identity import sha256_of_text
from mm_moslora.utils.text_format import visible

OWN = "mm_moslora.reporting"
"""Package with the templates of this project's reports."""


def asset(name: str, package: str = OWN) -> str:
    """A style sheet or script among the templates of a package."""
    return resources.files(package).joinpath("templates", name).read_text(encoding="utf-8")


def printable(value: Any, show: Callable[[str], str] = visible) -> Any:
    """What a template prints: nothing for None, texts as `show` gives them (by default without control characters)."""
    if isinstance(value, Markup):
        return value
    if value is None:
        return ""
    return show(value) if isinstance(value, str) else value


def render_page(
    template: str, context: Mapping[str, Any], *, filters: Mapping[str, Any], package: str = OWN,
    styles: Sequence[str] = ("report.css",), show: Callable[[str], str] = visible,
) -> str:  # fmt: skip
    """A page as text; what templates print is escaped."""
    environment = _environment(package, tuple(filters.items()), show)
    style, script = "".join(asset(name, package) for name in styles), asset("report.js", package)
    return environment.get_template(template).render(
        style=Markup(style), script=Markup(script),  # noqa: S704  (shipped with the package)
        script_hash=base64.b64encode(bytes.fromhex(sha256_of_text(script))).decode(), **context,
    )  # fmt: skip


@lru_cache(maxsize=16)
def _environment(package: str, filters: tuple[tuple[str, Any], ...], show: Callable[[str], str]) -> Environment:
    """It keeps the templates that it has compiled."""
    environment = Environment(
        loader=PackageLoader(package), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value, show),
    )  # fmt: skip
    environment.filters.update(filters)
    return environment


def write_page(out: Path, page: Callable[[], str]) -> Path:
    """Write a page atomically."""
    output_file(out, sign=PAGE_SIGN).parent.mkdir(parents=True, exist_ok=True)
    replace_text(out, page())
    return out
