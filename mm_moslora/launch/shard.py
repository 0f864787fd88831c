"""Shards of divisible work: `--shard I/N`, which items it takes, and which shards of a folder are done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mm_moslora.utils.errors import ConfigError

Item = TypeVar("Item")

MOST = 100_000
_NAME = re.compile(r"([1-9][0-9]{0,5})-of-([1-9][0-9]{0,5})")


@dataclass(frozen=True, order=True)
class Shard:
    """One of `of` shards, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that `I/N` names; ConfigError where it has another form, or I is not one of 1 to N."""
        match = _NAME.fullmatch(text.replace("/", "-of-", 1))
        shard = None if match is None or "/" not in text else cls(int(match[1]), int(match[2]))
        if shard is None or not shard.number <= shard.of <= MOST:
            raise ConfigError(
                f"--shard is {text[:80]!r}, expected I/N with I from 1 to N and N at most {MOST}, such as 1/4."
            )
        return shard

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    @property
    def name(self) -> str:
        """Name of its file or folder."""
        return f"{self.number}-of-{self.of}"

    def every_nth(self, items: Sequence[Item], *, offset: int = 0) -> Sequence[Item]:
        """Every N-th item; `offset` decides which shard has the first one."""
        return items[(self.number - 1 + offset) % self.of :: self.of]


def finished(folder: Path, suffix: str) -> dict[Shard, Path]:
    """The files that show that shards are done, in their order; `suffix` follows a shard's name in their paths."""
    files = _files_by_shard(folder, suffix)
    if not files:
        raise ConfigError(f"{folder} holds no finished shard. Run the command with --shard 1/N to N/N first.")
    of = max(shard.of for shard in files)
    refuse_other_divisions(folder, suffix, of=of)
    everything = [Shard(number, of) for number in range(1, of + 1)]
    if missing := [str(shard) for shard in everything if shard not in files]:
        some = ", ".join(missing[:20]) + (f" and {len(missing) - 20} more" if len(missing) > 20 else "")
        raise ConfigError(
            f"{folder}: {len(missing)} of {of} shards are missing or not finished: {some}. Run the command "
            "with --shard for each of them, then merge again."
        )
    return {shard: files[shard] for shard in everything}


def refuse_other_divisions(folder: Path, suffix: str, *, of: int) -> None:
    """Refuse a folder that holds finished shards of another division, before this command adds its own."""
    if others := sorted(shard for shard in _files_by_shard(folder, suffix) if shard.of != of):
        raise ConfigError(
            f"{folder} holds shards of a division by {others[0].of}, expected those of one by {of}. Give "
            f"--shards {others[0].of}, or move them away: {', '.join(shard.name for shard in others[:5])}."
        )


def _files_by_shard(folder: Path, suffix: str) -> dict[Shard, Path]:
    files = {}
    for path in folder.glob(f"*-of-*{suffix}"):
        name = _NAME.fullmatch(str(path.relative_to(folder)).removesuffix(suffix))
        if name is not None and int(name[1]) <= int(name[2]):
            files[Shard(int(name[1]), int(name[2]))] = path
    return files


def refuse_others(stored: Any, wanted: Any, *, what: str) -> None:
    """Refuse a shard of another command: the plain data that identify its work differ."""
    one, other = dict(_flat(stored, "")), dict(_flat(wanted, ""))
    for name in one | other:
        if one.get(name) != other.get(name):
            values = [repr(side[name])[:200] if name in side else "missing" for side in (one, other)]
            raise ConfigError(
                f"{what} belongs to other work: its {name} is {values[0]}, expected {values[1]}. Give this command the "
                "shard's options, or delete the shard and run it with this command's."
            )


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        return [pair for key, item in value.items() for pair in _flat(item, f"{name}: {key}" if name else str(key))]
    return [(name, value)]
