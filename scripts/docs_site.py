"""Hook of mkdocs: pages outside `docs/` become part of the site, and the API reference is one page per subject.

Used by `mkdocs.yml` (`make docs`). Files in the repository stay as a reader of a checkout needs them: a link to a page
leads to it in the site, too, and a link to another file of the checkout becomes its name.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "eval/README.md": "evaluation.md",
    "deepspeed_configs/README.md": "deepspeed_presets.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "AGENTS.md": "agents.md",
}
"""Page of the checkout -> page of the site."""
API = {
    "adapters": ("mm_moslora.adapters",),
    "recipe": ("mm_moslora.config",),
    "models": (
        "mm_moslora.batch",
        "mm_moslora.models.assembly",
        "mm_moslora.models.load_model",
        "mm_moslora.models.trainable_parts",
        "mm_moslora.models.vlm",
    ),
    "data": (
        "mm_moslora.data.training_set",
        "mm_moslora.models.batching.padded_batch",
        "mm_moslora.data.chat.record_turns",
        "mm_moslora.data.chat.records",
        "mm_moslora.data.chat.conversation_encoder",
    ),
    "training": (
        "mm_moslora.training.training_loop",
        "mm_moslora.training.engine",
        "mm_moslora.training.parameter_groups",
        "mm_moslora.tracking",
    ),
    "evaluation": (
        "mm_moslora_eval.protocol.task",
        "mm_moslora_eval.run.evaluate_suite",
        "mm_moslora_eval.run.task_runner",
        "mm_moslora_eval.backends.local_model",
    ),
    "diffusion": ("mm_moslora.diffusion",),
}
"""Page below `api/` -> modules that users import."""
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside `docs/` and those of the API."""
    from mkdocs.structure.files import File

    for source, page in OUTSIDE.items():
        text = linked((ROOT / source).read_text(encoding="utf-8"), source, page)
        files.append(File.generated(config, page, content=text))
    for name, modules in API.items():
        parts = "\n\n".join(f"::: {module}" for module in modules)
        files.append(File.generated(config, f"api/{name}.md", content=f"# API: {name}\n\n{parts}\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turn the links of a page of `docs/` into links of the site."""
    path = page.file.src_uri
    if path in OUTSIDE.values() or path.startswith("api/"):
        return markdown
    return linked(markdown, f"docs/{path}", path)


def linked(markdown: str, source: str, page: str) -> str:
    """The text of a file of the checkout as a page of the site.

    Args:
        markdown: its text.
        source: its path in the checkout.
        page: its path in the site.
    """

    def link(match: re.Match[str]) -> str:
        words, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match.group()
        path, mark, anchor = target.partition("#")
        page_path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if page_path in OUTSIDE:
            page_path = OUTSIDE[page_path]
        elif page_path.startswith("docs/"):
            page_path = page_path.removeprefix("docs/")
        else:
            return words
        return f"[{words}]({posixpath.relpath(page_path, posixpath.dirname(page) or '.')}{mark}{anchor})"

    return _LINK.sub(link, markdown)
