"""What files and services hold is read by one module: small texts cost little, and numbers are numbers."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import (
    StrictJsonError,
    build_known,
    build_strictly,
    parse_json,
    parse_lines,
    parse_object,
    parse_yaml,
    parse_yaml_value,
    without_constants,
)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"a": 1, "a": 2}', "written twice"), ('{"b": [{"a": 1, "a": 2}]}', "written twice"),
        ("[" * 65 + "]" * 65, "nested more than 64"), ("[" * 10**5, "nested more than 64"),
        ('{"a":' * 10**5, "nested more than 64"), ("1" + "0" * 400, "400|401"), ("-1" + "0" * 5000, "digits"),
        ('{"since": 1' + "0" * 400 + "}", "digits"), ("1e400", "too large"), ("-1E+999", "too large"),
        ("1" + "0" * 250 + "e99", "too large"), ("-" + "9" * 299 + ".5E99", "too large"), ("1e+0400", "too large"),
        (r'{"\ud800": 1, "\udfff": 1}', "written twice"),
        ("NaN", "NaN"), ("[Infinity]", "Infinity"), ("-Infinity", "Infinity"), ("{", "column 2"), ("", "column 1"),
        (b"\xff", "UTF-8"), ("[1,]", "valid JSON"), ("[" + "0," * (2 * 10**7 + 2) + "0]", "more than 20000000 values"),
    ],
)  # fmt: skip
def test_json_that_costs_too_much_or_means_two_things_is_refused(text: str | bytes, what: str) -> None:
    with pytest.raises(StrictJsonError, match=what):
        parse_json(text)


def test_half_surrogate_pairs_become_characters_that_utf_8_can_hold() -> None:
    text = r'{"a\ud800": ["\uDFFFb", "\ud83d\ude00", "\\ud800", 1], "\ud800": {"c": "\udc00\ud800"}}'
    expected = {"a\ufffd": ["\ufffdb", "\U0001f600", r"\ud800", 1], "\ufffd": {"c": "\ufffd\ufffd"}}
    assert parse_json(text) == parse_object(text.encode()) == expected
    assert parse_lines(f"{text}\n{text}") == [expected] * 2
    assert parse_json(r'"\ud800"', surrogates=True) == "\ud800"
    assert parse_json('"\ud800"') == "\ufffd"
    assert parse_yaml_value(r'"a\uD800": ["\uDFFF", "\uD83D\uDE00"]') == {"a\ufffd": ["\ufffd", "\U0001f600"]}
    assert without_constants({"\ud800": ("\udfff", float("inf"))}) == {"\ufffd": ["\ufffd", None]}


def test_numbers_that_a_log_may_hold_are_read_where_they_are_expected() -> None:
    found = parse_json('[NaN, -Infinity, 1e999, 1e-400, 12345678901234567890123, "1' + "0" * 400 + '"]', constants=True)
    assert str(found[:3]) == "[nan, -inf, inf]"
    assert found[3:5] == [0.0, 12345678901234567890123]
    with pytest.raises(StrictJsonError, match="digits"):
        parse_json("1" + "0" * 400, constants=True)


def test_deep_and_wide_are_told_apart() -> None:
    assert len(parse_json("[" + "[0]," * 1000 + "[0]]")) == 1001
    assert parse_json('"' + "[{" * 1000 + '"') == "[{" * 1000


def test_lines_are_objects_and_damaged_ones_are_named_or_left_out() -> None:
    text = '{"a": 1}\n\n[1]\n{"b": NaN}\n{"c": 1' + "0" * 400 + '}\n{"d"'
    assert [set(row) for row in parse_lines(text, skip_damaged=True)] == [{"a"}, {"b"}]
    with pytest.raises(StrictJsonError, match="line 3 holds a list, expected an object"):
        parse_lines(text)
    with pytest.raises(StrictJsonError, match="expected an object"):
        parse_object("[]")


def _bomb(levels: int, width: int = 9) -> str:
    lines = ["a0: &a0 [x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * width)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        _bomb(9), _bomb(40), "a: &a [*a]", "a: &a {<<: *a}", "b: &b {x: 1}\na: &a {<<: [*b, *b], c: [*b, *a]}",
        "\n".join(["a0: &a0 {k: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))]),
        "s: &s " + "x" * 10**5 + "\nl: [" + ", ".join(["*s"] * 5000) + "]",
    ],
    ids=["9 levels", "40 levels", "itself", "merged with itself", "alias of its parent", "merges", "a long text"],
)  # fmt: skip
def test_yaml_aliases_cannot_make_a_small_text_large(text: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="values, those that aliases"):
        parse_yaml(text, source="recipe.yaml")
    assert time.process_time() - began < 5


def test_plain_aliases_and_merges_are_read() -> None:
    text = "base: &base {a: 1, b: 2}\nown: {<<: *base, b: 3}\nsame: *base"
    assert parse_yaml(text, source="") == {"base": {"a": 1, "b": 2}, "own": {"a": 1, "b": 3}, "same": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "a: 1\na: 2", "{[]: 1}", "a: 1" + "0" * 400, "a: 0x" + "f" * 400, "a: 2020-13-40",
     "a: !!python/name:os.system", "a: " + "x" * 2**20, "a: 1e1\n\tb", "- " * 3000 + "a", "a: 0x" + "f" * 298,
     r'{"\uD800": 1, "\uDFFF": 1}',
     "a: !!bool x", 'a: !!int ""', 'a: !!float "_"', "a: !!timestamp x", "a: !!binary ä", "!!set [a]"],
)  # fmt: skip
def test_other_yaml_is_an_error_and_nothing_else(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_yaml_value(text)


TAGS = ("bool", "int", "float", "timestamp", "binary", "set", "omap", "pairs", "seq", "map", "merge", "null", "x")
TEXTS = (
    "x",
    '""',
    '"_"',
    "[1, [2]]",
    "{b: {c: 1}}",
    "[{b: 1, c: 2}]",
    "2020-13-40",
    "1:9e9:+",
    "0b",
    "0x",
    "-.inf",
    "~",
)


@pytest.mark.parametrize("tag", TAGS)
def test_a_tag_that_does_not_fit_its_value_raises_no_other_error(tag: str) -> None:
    for text in (*TEXTS, "1:" * 200 + "1.5", "9" * 200 + "e999"):
        with contextlib.suppress(ConfigError):
            parse_yaml_value(f"a: !!{tag} {text}")


@dataclass(frozen=True)
class _Row:
    name: str
    score: float
    count: int = 0
    parts: tuple[str, ...] = ()
    grades: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    "data",
    [{"score": "x"}, {"score": float("nan")}, {"score": "inf"}, {"score": True}, {"name": ["a"]}, {"count": 0.5},
     {"score": 16**298}, {"score": 1e308}, {"count": 1e308}, {"count": 10**5000}, {"score": -(10**400)},
     {"count": True}, {"parts": "xy"}, {"parts": [1]}, {"score": None},
     {"grades": {True: 1}}, {"grades": {0: 1}}, {"grades": {None: 1}}, {"grades": ["a"]}],
)  # fmt: skip
def test_a_value_of_another_type_is_no_value(data: dict[str, Any]) -> None:
    for build in (build_strictly, build_known):
        with pytest.raises(ConfigError, match="file: "):
            build(_Row, {"name": "a", "score": 1} | data, source="file")


def test_known_keys_are_taken_from_more() -> None:
    assert build_known(_Row, {"name": "a", "score": 1, "new": {}, "count": None}, source="") == _Row("a", 1.0)
    with pytest.raises(ConfigError, match="unknown key 'new'"):
        build_strictly(_Row, {"name": "a", "score": 1, "new": {}}, source="")


def test_what_python_writes_is_read_back() -> None:
    data = {"a": [1, -2.5e-300, None, True, "ä\u2028\n"], "b": {"c": {}}, "n": 10**299}
    assert parse_json(json.dumps(data)) == data
    assert parse_json(json.dumps(data, ensure_ascii=False).encode()) == data
