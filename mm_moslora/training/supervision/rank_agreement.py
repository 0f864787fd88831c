"""Ranks that train together agree about software, recipe and data, or fail together before a step."""

# Hosts may have other copies of a recipe or of the data: gradients of two recipes would be added up without a word.

from __future__ import annotations

import platform
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mm_moslora.config import YamlRecipe
from mm_moslora.config.recipe_keys import leaves
from mm_moslora.config.recipe_paths import may_differ_by_host
from mm_moslora.launch.imported_code import import_marks
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import DistributedError
from mm_moslora.utils.files import read_json
from mm_moslora.utils.identity import sha256_of_bytes, sha256_of_text
from mm_moslora.utils.package_requirements import installed_version

SAME = ("mm-moslora", "torch", "transformers", "peft", "deepspeed", "safetensors")
"""Packages whose versions must agree."""
_MOST_NAMED = 6
_MOST_SHOWN = 80
"""Characters of a value in the message."""


def software() -> dict[str, str]:
    """Versions, and a short hash over this package's Python files: checkouts of one version may differ."""
    import mm_moslora

    folder = Path(mm_moslora.__file__).parent
    files = sorted(folder.rglob("*.py"))
    code = sha256_of_bytes(more=(str(path.relative_to(folder)).encode() + path.read_bytes() for path in files))
    versions = {name: installed_version(name) or "not installed" for name in SAME}
    return versions | {"Python": platform.python_version(), "code": code[:12]}


def settings_of(recipe: YamlRecipe) -> dict[str, Any]:
    """The values of a recipe by key, without paths, which may differ by host, and with an engine's file's content."""
    every, kind = leaves(recipe.to_dict()), type(recipe)
    facts = {key: value for key, value in every.items() if not may_differ_by_host(kind, key, value)}
    if str(zero := facts.get("train.zero", "")).endswith(".json"):
        try:
            facts |= leaves(read_json(Path(zero).expanduser(), linked=True), "train.zero.") | {"train.zero": "a file"}
        except (OSError, ValueError) as error:
            facts["train.zero"] = f"a file that cannot be read ({error})"
    return facts


def agree_on_recipe(recipe: YamlRecipe, **more: object) -> None:
    """Compare software, recipe and further arguments of all ranks; see `agree`."""
    facts = {"WORLD_SIZE": distributed.world_size()} | software() | import_marks() | more | settings_of(recipe)
    agree(facts, "Give all hosts the same recipe, and the same environment by a shared file system or one image.")


def agree_on_data(identity: Mapping[str, object]) -> None:
    """Compare the data of all ranks; see `agree`."""
    agree(identity, "Give all hosts the same data, by a shared file system or by copies of one state.")


def agree(facts: Mapping[str, object], remedy: str) -> None:
    """Compare what every rank has; DistributedError on every rank, which names what differs and the ranks."""
    own = {name: repr(value) for name, value in facts.items()}
    if len({*distributed.gather_objects(sha256_of_text(repr(sorted(own.items()))))}) == 1:
        return
    everywhere = distributed.gather_objects((socket.gethostname(), own))
    hosts = dict(enumerate(host for host, _ in everywhere))
    names = {name: None for _, items in everywhere for name in items}
    values = {name: {rank: items.get(name, "missing") for rank, (_, items) in enumerate(everywhere)} for name in names}
    odd = [name for name in names if len({*values[name].values()}) > 1]
    differences = [f"{name} is {_grouped(values[name], hosts)}" for name in odd[:_MOST_NAMED]]
    more = f", and {len(odd) - _MOST_NAMED} more differ" if len(odd) > _MOST_NAMED else ""
    raise DistributedError(f"The ranks do not agree: {'. '.join(differences)}{more}. {remedy} Nothing was trained.")


def _grouped(values: Mapping[int, str], hosts: Mapping[int, str]) -> str:
    """`2.13.0 on ranks 0-3 (host-a); 2.11.0 on rank 4 (host-b)`, from values and hosts by rank."""
    ranks = defaultdict(list)
    for rank, value in values.items():
        ranks[value].append(rank)
    return "; ".join(f"{value[:_MOST_SHOWN]} on {_named(members, hosts)}" for value, members in ranks.items())


def _named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """`rank 4 (host-b)`, `ranks 0-3 (host-a, host-b)`."""
    ranks = list(ranks)
    names = dict.fromkeys(host for rank, host in hosts.items() if rank in ranks)
    return f"rank{'s' if len(ranks) > 1 else ''} {_spans(ranks)} ({', '.join(names)})"


def _spans(ranks: Iterable[int]) -> str:
    """`0-3, 6`."""
    ends: list[list[int]] = []
    for rank in sorted(ranks):
        if ends and rank == ends[-1][1] + 1:
            ends[-1][1] = rank
        else:
            ends.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ends)
