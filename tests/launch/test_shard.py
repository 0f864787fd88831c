"""Shards divide work completely; missing ones and those of other work are named."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_moslora.launch.shard import Shard, finished, refuse_others
from mm_moslora.utils.errors import ConfigError


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 2**32))
def test_shards_take_every_item_once(count: int, of: int, offset: int) -> None:
    items = list(range(count))
    shards = [Shard(number, of) for number in range(1, of + 1)]
    dealt = [shard.every_nth(items, offset=offset) for shard in shards]
    assert sorted(item for part in dealt for item in part) == items


@pytest.mark.parametrize(
    "text", ["0/0", "5/4", "0/4", "1/0", "1", "", "/", "a/b", "1/4/2", "-1/4", "1.0/4", "١/٤", "1/4\n", " 1/4",
             "1-of-4", "1/1000000", "01/4"],
)  # fmt: skip
def test_what_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected I/N with I from 1 to N"):
        Shard.parse(text)


def test_a_shard_is_named_as_it_is_given() -> None:
    shard = Shard.parse("3/12")
    assert (str(shard), shard.name, shard.number, shard.of) == ("3/12", "3-of-12", 3, 12)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished shard"):
        finished(tmp_path / "none", ".json")
    for name in ("1-of-11", "10-of-11", "12-of-11", "x-of-y", "0-of-11"):
        (tmp_path / f"{name}.json").touch()
    with pytest.raises(ConfigError, match=r"9 of 11 shards .*: 2/11, 3/11, 4/11, 5/11, 6/11, 7/11, 8/11, 9/11, 11/11"):
        finished(tmp_path, ".json")
    for number in range(1, 12):
        (tmp_path / f"{number}-of-11.json").touch()
    assert [str(shard) for shard in finished(tmp_path, ".json")] == [f"{number}/11" for number in range(1, 12)]
    (tmp_path / "1-of-2.json").touch()
    with pytest.raises(ConfigError, match=r"a division by 2, .* by 11\. Give --shards 2, or move them away: 1-of-2\."):
        finished(tmp_path, ".json")


def test_other_work_is_refused_with_both_values() -> None:
    one = {"tasks": ["a"], "a": {"version": 1, "prompt": {"template": "x"}}, "limit": None}
    refuse_others(one, one, what="Shard 1/2")
    with pytest.raises(ConfigError, match=r"Shard 1/2 belongs to other work: its a: version is 1, expected 2\."):
        refuse_others(one, one | {"a": {"version": 2, "prompt": {"template": "x"}}}, what="Shard 1/2")
    with pytest.raises(ConfigError, match=r"its limit is None, expected 5"):
        refuse_others(one, one | {"limit": 5}, what="Shard 1/2")
    with pytest.raises(ConfigError, match=r"its b is missing, expected 'x'"):
        refuse_others(one, one | {"b": "x"}, what="Shard 1/2")
    with pytest.raises(ConfigError):
        refuse_others("damaged", one, what="Shard 1/2")
