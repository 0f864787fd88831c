"""Secrets are found by name, by look and by the environment; what only sounds like one stays."""

from __future__ import annotations

import html
import io
import json
import logging
import shlex
import sys
from urllib.parse import quote, urlencode

import pytest

from mm_moslora.utils.redaction import (
    REDACTED,
    RedactingFormatter,
    redact,
    redact_text,
    redacted_argv,
    redacted_command,
    redacted_traceback,
)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 10,
        "sk-" + "abcDEF123" * 3,
        "wandb_v1_" + "Zz9_" * 10,
        "ghp_" + "a1B2" * 9,
        "AKIA" + "ABCDEFGH12345678",
        "0123456789abcdef0123456789abcdef01234567",
        "AIza" + "Sy-a1B2c3_" * 3 + "D4e5F",
        "xoxb-" + "123456789012-" * 2 + "aBcDeF",
        "glpat-" + "aB3_xY-9" * 3,
        "nvapi-" + "aB3_xY-9" * 4,
        "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0In0" + ".aB-3_x9",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE"
        + "aB3+/x9=" * 8
        + "\n"
        + "aB3+" * 4
        + "\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIE" + "aB3+/x9=" * 8,
    ],
)
def test_values_that_look_like_secrets_go_wherever_they_stand(secret: str) -> None:
    cleaned = redact({"notes": [f"use {secret} please"], "nested": {"deep": (secret,)}})
    assert secret not in str(cleaned)
    assert cleaned["notes"] == [f"use {REDACTED} please"]
    assert secret not in redact_text(f"failed with {secret}")
    if len(secret) != 40:  # a commit may be a name
        assert secret not in str(redact({secret: 1}))


@pytest.mark.parametrize(
    "name", ["api_key", "HF_TOKEN", "wandb-api-key", "password", "client_secret", "token", "MY_TOKEN", "clientSecret"]
)
def test_names_that_sound_like_secrets_hide_their_value(name: str) -> None:
    assert redact({name: "anything at all"}) == {name: REDACTED}
    assert redact({name: 12345678, "lr": 12345678}) == {name: REDACTED, "lr": 12345678}


def test_recipe_words_are_no_secrets() -> None:
    recipe = {
        "tokens_per_image": 64, "image_token": "<image>", "max_tokens": 5, "tokenizer": "x", "authors": "me",
        "eos_token": "</s>", "revision": "0123456789abcdef0123456789abcdef01234567", "lr": 1e-4, "mode": None,
        "url": "https://example.org/a",
    }  # fmt: skip
    assert redact(recipe) == recipe


def test_password_of_a_url_goes_and_the_url_stays() -> None:
    assert redact_text("https://me:pa55@example.org/x") == f"https://{REDACTED}@example.org/x"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("GET http://host/v1?model=m&api_key=canary-1&n=2 failed", "model=m&api_key=[redacted]&n=2 failed"),
        ("redis://:canary-1@host/0", "redis://[redacted]@host/0"),
        ("authorization: bearer canary-1-canary-1", "bearer [redacted]"),
        ("Authorization: Basic canary1canary1==", "Basic [redacted]"),
        ("run with WANDB_API_KEY=canary-1 and HF_HOME=/data", "WANDB_API_KEY=[redacted] and HF_HOME=/data"),
        ("cannot clone https://canary-1@host/x.git", "clone https://[redacted]@host/x.git"),
        ("at https://me:can@ary-canary@host/x", "https://[redacted]@host/x"),
        ('400: {"api_key": "canary-1", "n": 2}', '{"api_key": "[redacted]", "n": 2}'),
        ('{"api_key": "can\\"canary", "n": 2}', '{"api_key": "[redacted]", "n": 2}'),
        ('{"body": "{\\"accessToken\\": \\"canary 1\\", \\"n\\": 2}"}', '\\": \\"[redacted]\\", \\"n\\": 2}"}'),
        ('cut off: {"n": 2, "password": "canary', '"n": 2, "password": "[redacted]'),
        ("{'token': 'canary', 'n': 2}", "{'token': '[redacted]', 'n': 2}"),
        ("{'token': b'canary', 'n': 2}", "{'token': b'[redacted]', 'n': 2}"),
        (
            '{"password": 1234567, "auth": ["me", "canary"], "n": 2}',
            '"password": [redacted], "auth": [[redacted]], "n": 2',
        ),
        ('{"token": "hf_aB3aB3aB3aB3aB3aB3 canary"}', '{"token": "[redacted]"}'),
        ("Client(api_key='canary', n=2)", "Client(api_key='[redacted]', n=2)"),
        ("curl -H 'x-api-key: canary' http://host", "x-api-key: [redacted]' http://host"),
        ("track:\n  password: canary canary\n  n: 2", "  password: [redacted]\n  n: 2"),
        ("mm-moslora eval run t --hf-token canary --limit 2", "--hf-token [redacted] --limit 2"),
        ('{"headers": {"Authorization": "Bearer canary"}, "n": 2}', '"Bearer [redacted]"}, "n": 2'),
        ("https://a.blob.core.windows.net/c?sv=1&sig=canary%2Bcanary%3D&se=2", "?sv=1&sig=[redacted]&se=2"),
        ("https://b/k?X-Amz-Date=1&X-Amz-Signature=canary99&n=2", "X-Amz-Date=1&X-Amz-Signature=[redacted]&n=2"),
        ("https://b/k?X-Amz-Security-Token=canary&n=2", "X-Amz-Security-Token=[redacted]&n=2"),
        ("https://b/k?X-Goog-Signature=canary99&n=2", "X-Goog-Signature=[redacted]&n=2"),
        ("https://b/k?AWSAccessKeyId=1&Signature=canary99%3D&Expires=2", "&Signature=[redacted]&Expires=2"),
        ("see https://b/k?to=https%3A%2F%2Fc%3Fn%3D1%26sig%3Dcanary99%26n%3D2", "%26sig%3D[redacted]%26n%3D2"),
        ('"https://b/k?sv=1\\u0026sig=canary99\\u0026n=2"', "u0026sig=[redacted]"),
        ('{"signature": "canary99==", "n": 2}', '{"signature": "[redacted]", "n": 2}'),
        ("AWS4-HMAC-SHA256 SignedHeaders=host, Signature=canary99, n=2", "Signature=[redacted], n=2"),
        ("https://maps/api?key=canary99&n=2", "?key=[redacted]&n=2"),
        ("https://maps/api?n=1&key=canary99 failed", "?n=1&key=[redacted] failed"),
        ("PGPASSWORD=canary psql -h host", "PGPASSWORD=[redacted] psql -h host"),
        ("MYSQL_PWD=canary mysql", "MYSQL_PWD=[redacted] mysql"),
        ("Server=s;Uid=me;Pwd=canary;", "Uid=me;Pwd=[redacted]"),
        ("connect(user='me', pwd='canary')", "pwd='[redacted]')"),
        ("AccountName=me;AccountKey=canary99==;EndpointSuffix=x", "AccountName=me;AccountKey=[redacted]"),
        ("OPENAI_KEY=canary99 run", "OPENAI_KEY=[redacted] run"),
        ("STRIPE_KEY=canary99 run", "STRIPE_KEY=[redacted] run"),
        ("id_token=canary&n=2", "id_token=[redacted]&n=2"),
        ('{"idToken": "canary", "n": 2}', '{"idToken": "[redacted]", "n": 2}'),
        ('{"text": "see\\nghp_canarycanarycanarycanary"}', '"see\\n[redacted]"}'),
    ],
)
def test_secrets_of_addresses_and_headers_go_and_what_stands_around_them_stays(text: str, kept: str) -> None:
    cleaned = redact_text(text)
    assert "canary" not in cleaned
    assert kept in cleaned


def test_what_only_looks_like_an_assignment_stays() -> None:
    for text in (
        "https://h/p?max_tokens=5&tokenizer=x and MAX_TOKENS=7, TOKENIZERS_PARALLELISM=false",
        "Basic understanding of bearer responsibilities",
        '{"token": null, "api_key": "", "max_tokens": 5, "eos_token": "</s>", "tokenizer": "x"}',
        "invalid token: '<image>', and 'api_key' is no key of track: did you mean 'project'?",
        "sorted(rows, key=lambda row: row.id), min(x, key=operator.itemgetter(1)), key=some_function and ?key=id&n=2",
        "signature=None, signature=f(x), sig=2, signature=inspect.signature(function), SORT_KEY=id, a_key=table_id",
        '{"signature": "(self, x: int) -> str", "key": "some-long-name", "sig": 3}',
        "PWD=/home/me/work OLDPWD=/home/me/else, the password is wrong, signature: mismatch",
        "-----BEGIN CERTIFICATE----- and glad-to-see-you-here-again, xoxo, eyJust.a.word",
        "http://host:80/x?to=me@example.org ssh://git@host/x https://host/@me hf://datasets/a/b@main",
    ):
        assert redact_text(text) == text


def test_values_of_secret_environment_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain-looking canary")
    monkeypatch.setenv("STRIPE_KEY", "another-looking canary")  # a name that code uses for other things, too
    assert redact_text("sent plain-looking canary over") == f"sent {REDACTED} over"
    assert redact_text("sent another-looking canary over") == f"sent {REDACTED} over"
    monkeypatch.setenv("MY_LONGER_API_KEY", "plain-looking canary-12345")
    assert redact_text("sent plain-looking canary-12345 over") == f"sent {REDACTED} over"


@pytest.mark.parametrize("secret", ['can"ary-12345', "can\\ary-12345", "can'ary-\"12345", "can ary/é&<1>+%2345"])
def test_values_of_secret_environment_variables_go_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", secret)
    said = {"text": f"sent {secret} over"}
    for written in (
        secret, json.dumps(said), json.dumps(said, ensure_ascii=False), json.dumps({"body": json.dumps(said)}),
        repr(said),
        repr([f"it's {secret}"]), ascii(said), json.dumps(repr(said)), html.escape(secret), shlex.join(["run", secret]),
        f"https://host/?q={quote(secret, safe='')}", f"https://host/?{urlencode({'q': secret})}",
        f"https://host/{quote(secret)}", f"https://host/?q={quote(secret, safe='').lower()}",
    ):  # fmt: skip
        cleaned = redact_text(written)
        assert REDACTED in cleaned
        assert "12345" not in cleaned
        assert "2345" not in cleaned


SECRET_URL = "https://me:pa55word-canary@example.org/v1"


@pytest.mark.parametrize(
    ("words", "hidden", "kept"),
    [
        (["eval", "run", "t", "--model", SECRET_URL], "pa55word-canary", "example.org"),
        (["--judge.api-key", "plain-canary"], "plain-canary", "--judge.api-key"),
        (["--api_key=plain-canary"], "plain-canary", "--api_key="),
        (["--hf-token", "plain-canary", "--optim.lr", "1e-4"], "plain-canary", "1e-4"),
        (["hf_" + "Ab1" * 10], "Ab1Ab1", "mm-moslora"),
    ],
)
def test_command_lines_are_recorded_without_their_secrets(words: list[str], hidden: str, kept: str) -> None:
    told = redacted_command(["mm-moslora", *words])
    assert hidden not in told
    assert kept in told
    assert redacted_command(["train", "--optim.lr", "1e-4", "--data.max_tokens=5"]) == (
        "train --optim.lr 1e-4 --data.max_tokens=5"
    )


def test_log_lines_and_their_tracebacks_hold_no_secret() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(RedactingFormatter("%(message)s"))
    record = logging.LogRecord("x", logging.ERROR, __file__, 1, "at %s", (SECRET_URL,), None)
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError(f"{SECRET_URL} said no")
    assert "pa55word-canary" not in redacted_traceback(caught.value)
    assert "RuntimeError" in redacted_traceback(caught.value)
    record.exc_info = (caught.type, caught.value, caught.tb)
    handler.emit(record)
    assert "pa55word-canary" not in stream.getvalue()
    assert "RuntimeError" in stream.getvalue()


def test_the_command_line_of_this_process_is_put_back() -> None:
    before = list(sys.argv)
    sys.argv.append(f"--url={SECRET_URL}")
    try:
        with redacted_argv():
            assert "pa55word-canary" not in " ".join(sys.argv)
        assert sys.argv[-1].endswith(SECRET_URL)
    finally:
        sys.argv[:] = before


@pytest.mark.parametrize(
    "said",
    ["https://canary@host refused", '{"api_key": "canary"}', "sent {'token': 'canary'}", "Client(token='canary')"],
)
def test_exceptions_are_shown_without_their_secrets(said: str) -> None:
    error = RuntimeError({"message": said})
    error.__cause__ = ValueError(said)
    shown = redacted_traceback(error)
    assert "canary" not in shown
    assert shown.count(REDACTED) == 2
    assert "RuntimeError" in shown
