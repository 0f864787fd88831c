"""Mixers: how they start, what is refused, and what two-subspaces mixing is."""

from __future__ import annotations

import pytest
import torch

from mm_moslora.adapters import MoSLoRAConfig, butterfly, delta_weight, fold, init_mixer
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import two_subspaces


def test_orthogonal_keeps_lengths() -> None:
    mixer = init_mixer(16, "orthogonal", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixer @ mixer.T, torch.eye(16), atol=1e-5, rtol=0)


def test_kaiming_is_uniform_within_one_over_root_rank() -> None:
    mixer = init_mixer(64, "kaiming", generator=torch.Generator().manual_seed(0))
    assert mixer.abs().max() <= 1 / 8
    assert mixer.abs().max() > 0.95 / 8
    assert float(torch.linalg.svdvals(mixer).square().mean().sqrt()) == pytest.approx(3**-0.5, rel=0.05)


def test_butterfly_is_two_subspaces_mixing() -> None:
    torch.manual_seed(0)
    A, B = torch.randn(6, 10), torch.randn(12, 6)
    torch.testing.assert_close(delta_weight(A, butterfly(6), B, 1.0), two_subspaces(A, B))
    assert int(torch.linalg.matrix_rank(butterfly(6))) == 3


def test_fold_has_the_same_update() -> None:
    torch.manual_seed(0)
    A, M, B = torch.randn(4, 10), torch.randn(4, 4), torch.randn(12, 4)
    torch.testing.assert_close(delta_weight(fold(A, M), None, B, 0.5), 0.5 * B @ M @ A)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_init": "zeros"}, "gradients of A, M and B are all exactly zero"),
        ({"mixer_init": "orthogonl"}, "Did you mean 'orthogonal'"),
        ({"mixer_pattern": {"q_proj": "zeros"}}, "mixer_pattern"),
        ({"r": 0}, "r is 0"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "destroys"),
        ({"init_lora_weights": "lora_ga"}, "destroys"),
        ({"init_lora_weights": "mica", "mixer_init": "identity"}, "destroys"),
        ({"init_lora_weights": "pissa", "mixer_init": "identity", "mixer_pattern": {"q": "kaiming"}}, "destroys"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_contradictions_are_refused_with_the_reason(options: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig(**options)


@pytest.mark.filterwarnings("ignore")
def test_loftq_is_refused() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    with pytest.raises(AdapterError, match="destroys"):
        MoSLoRAConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_meaningful_inits_are_fine_with_an_identity_mixer(init: str) -> None:
    assert MoSLoRAConfig(init_lora_weights=init, mixer_init="identity").init_lora_weights == init


def test_butterfly_needs_an_even_rank() -> None:
    with pytest.raises(AdapterError, match="even"):
        butterfly(5)
