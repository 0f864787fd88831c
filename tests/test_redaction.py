"""Secrets are found by name, by look and by the environment; what only sounds like one stays."""

from __future__ import annotations

import pytest

from mm_moslora.redaction import REDACTED, redact, redact_text


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "aB3" * 10,
        "sk-" + "abcDEF123" * 3,
        "wandb_v1_" + "Zz9_" * 10,
        "ghp_" + "a1B2" * 9,
        "AKIA" + "ABCDEFGH12345678",
        "0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_values_that_look_like_secrets_go_wherever_they_stand(secret: str) -> None:
    cleaned = redact({"notes": [f"use {secret} please"], "nested": {"deep": (secret,)}})
    assert secret not in str(cleaned)
    assert cleaned["notes"] == [f"use {REDACTED} please"]
    assert secret not in redact_text(f"failed with {secret}")


@pytest.mark.parametrize(
    "name", ["api_key", "HF_TOKEN", "wandb-api-key", "password", "client_secret", "token", "MY_TOKEN"]
)
def test_names_that_sound_like_secrets_hide_their_value(name: str) -> None:
    assert redact({name: "anything at all"}) == {name: REDACTED}


def test_recipe_words_are_no_secrets() -> None:
    recipe = {
        "tokens_per_image": 64, "image_token": "<image>", "max_tokens": 5, "tokenizer": "x", "authors": "me",
        "eos_token": "</s>", "revision": "0123456789abcdef0123456789abcdef01234567", "lr": 1e-4, "mode": None,
        "url": "https://example.org/a",
    }  # fmt: skip
    assert redact(recipe) == recipe


def test_password_of_a_url_goes_and_the_url_stays() -> None:
    assert redact_text("https://me:pa55@example.org/x") == f"https://{REDACTED}@example.org/x"


def test_values_of_secret_environment_variables_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SERVICE_API_KEY", "plain-looking canary")
    assert redact_text("sent plain-looking canary over") == f"sent {REDACTED} over"
