"""Identity: the values that stand in folders which were saved before."""

from __future__ import annotations

import json
from io import BufferedReader, BytesIO

import pytest
import torch
from safetensors.torch import save_file

from mm_moslora.models.vision.feature_store import bytes_of
from mm_moslora.utils import identity

VALUE = {"b": [1, 2.5, None], "a": "ü\ud800"}


@pytest.mark.parametrize(
    ("found", "stored"),
    [
        pytest.param(
            lambda: identity.sha256_of_text("ü\ud800"),
            "fa2dba89328b6fcee4f8a2379fcfa644721187e59b666a5051729d3df06902a0",
            id="text",
        ),
        pytest.param(
            lambda: identity.sha256_of_bytes(b"a", b"b", more=[b"c"]),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            id="parts",
        ),
        pytest.param(
            lambda: identity.sha256_of(BufferedReader(BytesIO(b"abc"))),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            id="stream",
        ),
        pytest.param(
            lambda: identity.sha256_of_values(VALUE),
            "bec527631fa5506814f331763cdf7402baab5caa118952445c74a1179bc3e293",
            id="results",
        ),
        pytest.param(
            lambda: identity.sha256_of_values(VALUE, ascii_only=True),
            "6affe5cc39351e3a2867b6d098bfc79beca1e603895f7013a722a8adb0406e9a",
            id="runs",
        ),
        pytest.param(lambda: str(identity.number_of("a/1")), "33550715442508863", id="seed"),
        pytest.param(lambda: identity.quick_hash_of([b"a", b"bc"]), "06b05ab6733a618578af5f94892f3950", id="cache"),
        pytest.param(
            lambda: identity.quick_hash_of([bytes_of(torch.tensor([[1.0, 2.0]]).T)]),
            "4533ce61c4655ba3c3e077b25dd1d769",
            id="tensor",
        ),
    ],
)
def test_a_value_stays_as_it_was_stored(found, stored):
    assert found() == stored


def test_a_models_fingerprint_stays_as_it_was_stored(tmp_path):
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(5000)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert identity.fingerprint(tmp_path).split(".") == [
        "2-cbf4dc36d1e5079e74bedb1a176d32b02aad2716cb6b6972e326f85d6c6295fb",
        "de27b45ab4490af73e32a379f22c0a43c3dc3d54d47d38f78c6cd86e202d3d1e",
    ]
    (tmp_path / "other").write_bytes(bytes(range(256)) * 100)
    assert (
        identity.fingerprint(tmp_path / "other") == "2-bd47d70c3ca613803526e850eb2ab893454f508df2d3a40bf49b1b5fe81f8299"
    )
