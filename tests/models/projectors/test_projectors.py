"""Every projector: tokens known beforehand, every weight used, saved and loaded back with the same output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mm_moslora.config import ProjectorConfig
from mm_moslora.models.projectors.projector import build_projector, projector_tokens
from mm_moslora.models.projectors.projector_layers import ProjectorShape
from mm_moslora.models.projectors.projector_start import (
    TOKENS_TO_FIT,
    fit_to_words,
    fold_into,
    inputs_of,
    last_layer,
    linear_layers,
)
from mm_moslora.utils.errors import ConfigError, ModelError

KINDS = {
    "linear": 36, "mlp1x_gelu": 36, "mlp2x_gelu": 36, "mlp3x_gelu": 36, "fused_mlp": 36, "avg_pool": 9,
    "pixel_shuffle": 9, "c_abstractor": 4, "perceiver": 4, "qformer": 4,
}  # fmt: skip
SHAPE = ProjectorShape(vision_width=24, language_width=40, grid=6, queries=4)


@pytest.mark.parametrize(("kind", "tokens"), KINDS.items())
def test_a_projector_gives_as_many_tokens_as_it_says_and_uses_every_weight(kind, tokens, tmp_path):
    torch.manual_seed(0)
    projector = build_projector(kind, SHAPE)
    features = torch.randn(3, 36, 24, generator=torch.Generator().manual_seed(0))
    with last_layer(projector) as last:
        output = projector(features)
    assert last() is linear_layers(projector)[-1]
    assert output.shape == (3, tokens, 40)
    assert projector_tokens(kind, SHAPE) == tokens
    output.pow(2).sum().backward()
    # A frozen tower gives features without a graph; what still trains must all be reached.
    assert [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not list(projector.buffers())  # a model that is made empty and then filled would miss them
    save_file({k: v.contiguous() for k, v in projector.state_dict().items()}, tmp_path / "p.safetensors")
    torch.manual_seed(1)
    twin = build_projector(kind, SHAPE)
    twin.load_state_dict(load_file(tmp_path / "p.safetensors"))
    torch.testing.assert_close(twin(features), output, rtol=0, atol=0)


class Reversed(nn.Module):
    """Its layers are registered from the last to the first, and one that is called later gives no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.inner, self.unused = nn.Linear(8, 16), nn.Linear(4, 8), nn.Linear(16, 2)

    def forward(self, x):
        tokens = self.out(self.inner(x))
        self.unused(tokens)
        return tokens.transpose(1, 2).transpose(1, 2)


class Convolution(nn.Module):
    """`[N, P, V] -> [N, P, D]`, without a linear layer; it copies what its last layer gives, which it names."""

    last = property(lambda self: self.out)

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv2d(4, 16, 1)

    def forward(self, x):
        return self.out(x.transpose(1, 2)[..., None]).flatten(2).transpose(1, 2).clone()


@pytest.mark.parametrize("kind", [Reversed, Convolution])
@torch.no_grad()
def test_the_last_layer_is_the_one_that_puts_out_the_tokens(kind):
    projector, features = kind(), torch.randn(2, 9, 4)
    with last_layer(projector) as last:
        tokens = projector(features)
    assert last() is projector.out
    for parameter in last().parameters():
        parameter.mul_(3)
    torch.testing.assert_close(projector(features), 3 * tokens)


def test_a_projector_without_a_layer_to_scale_is_refused():
    projector = nn.Sequential(nn.LayerNorm(4))
    with last_layer(projector) as last:
        projector(torch.randn(2, 9, 4))
    with pytest.raises(ModelError, match="property `last`"):
        last()


def attention(q, k, v, heads):
    """softmax(q k^T / sqrt(d)) v, written out."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_perceiver_queries_attend_to_patches_and_queries():
    projector, features = build_projector("perceiver", SHAPE), torch.randn(2, 36, 24)
    x = projector.queries.expand(2, -1, -1)
    for block in projector.blocks:
        layer = block.attention
        queries = layer.norm_queries(x)
        rows = torch.cat([layer.norm_patches(features + projector.places), queries], 1)
        x = x + layer.out(attention(layer.q(queries), *layer.kv(rows).chunk(2, -1), layer.heads))
        x = x + block.feed_forward(x)
    torch.testing.assert_close(projector(features), projector.linear(projector.norm(x)))


@torch.no_grad()
def test_the_c_abstractor_averages_the_places_of_a_cell():
    projector, features = build_projector("c_abstractor", SHAPE), torch.randn(2, 36, 24)
    patches = (features + projector.places).unflatten(1, (6, 6)).permute(0, 3, 1, 2)
    cells = projector.before(patches).unflatten(3, (2, 3)).unflatten(2, (2, 3)).mean((3, 5))
    tokens = projector.after(cells).flatten(2).transpose(1, 2)
    expected = projector.linear_2(nn.functional.silu(projector.linear_1(tokens)))
    torch.testing.assert_close(projector(features), expected)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "fused_mlp", "avg_pool"])
@torch.no_grad()
def test_a_fresh_projector_computes_of_features_what_it_did_of_standardised_ones(kind):
    torch.manual_seed(0)
    projector, features = build_projector(kind, SHAPE), 5 + 0.1 * torch.randn(3, 36, 24)
    features[..., 3] = 7.0  # a dimension that never changes
    spread, mean = torch.std_mean(features.flatten(0, 1), dim=0)
    expected = projector((features - mean) / spread.clamp_min(0.1 * float(spread.mean())))
    fold_into(projector, mean, spread)
    torch.testing.assert_close(projector(features), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "fused_mlp", "avg_pool", "pixel_shuffle"])
@torch.no_grad()
def test_a_fitted_projector_gives_unseen_pictures_the_words_of_their_class(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, SHAPE)
    classes, words, common = torch.randn(5, 24), 0.1 * torch.randn(5, 40), 0.1 * torch.randn(40)
    labels = torch.arange(60) % 5

    def features(labels):
        return 3 + classes[labels][:, None] + 0.3 * torch.randn(len(labels), 36, 24)

    def pairs():
        with inputs_of(linear_layers(projector)[0]) as taken:
            for some in labels.split(7):
                projector(features(some))
                yield taken(), (words + common)[some]

    share = fit_to_words(projector, pairs(), size=0.14)
    assert 0.8 < share <= 1
    tokens = projector(features(labels)).mean(1)
    differing = words - words.mean(0)
    nearest = torch.nn.functional.cosine_similarity(tokens[:, None], differing[None], dim=-1).argmax(1)
    assert torch.equal(nearest, labels)
    assert float(tokens.pow(2).mean().sqrt()) == pytest.approx(0.14, rel=0.15)
    assert float(tokens.mean(0).pow(2).mean().sqrt()) < 0.02, "what all words have in common is left out"


@torch.no_grad()
def test_the_fit_is_that_of_numpys_least_squares():
    torch.manual_seed(0)
    projector = build_projector("linear", SHAPE)
    hidden, words = torch.randn(50, TOKENS_TO_FIT, 24), torch.randn(50, 40)
    share = fit_to_words(projector, [(hidden[:20], words[:20]), (hidden[20:], words[20:])], size=1.0)
    x, y = hidden.flatten(0, 1).double().numpy(), words.double().numpy().repeat(TOKENS_TO_FIT, 0)
    x, y = x - x.mean(0), y - y.mean(0)
    ridge = np.diag((24 / 50 * x.var(0) * len(x)) ** 0.5)
    weight = np.linalg.lstsq(np.vstack([x, ridge]), np.vstack([y, np.zeros((24, 40))]), rcond=None)[0].T
    fitted = x @ weight.T
    np.testing.assert_allclose(
        linear_layers(projector)[-1].weight, weight / np.sqrt((fitted**2).mean()), rtol=1e-4, atol=1e-5
    )
    assert share == pytest.approx((fitted**2).sum() / (y**2).sum(), rel=1e-6)


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "mlp3x_gelu", "fused_mlp", "avg_pool", "pixel_shuffle"])
@torch.no_grad()
def test_layers_with_gelu_begin_as_the_linear_fit(kind):
    """Of up to half as many directions as the narrowest layer has units."""
    torch.manual_seed(0)
    projector = build_projector(kind, SHAPE)
    layers = linear_layers(projector)
    directions, mixed = torch.randn(3, layers[0].in_features), torch.randn(40, 3)
    for layer in layers:
        layer.to(torch.double)
    features = torch.randn(60, TOKENS_TO_FIT, layers[0].in_features).double()
    words = features.mean(1) @ directions.T.double() @ mixed.T.double()
    fitted = nn.Linear(layers[0].in_features, 40).double()
    fit_to_words(nn.Sequential(fitted), [(features, words)], size=1.0)
    fit_to_words(projector, [(features, words)], size=1.0)
    hidden = layers[0](features)
    for layer in layers[1:]:
        hidden = layer(nn.functional.gelu(hidden))
    torch.testing.assert_close(hidden, fitted(features), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_layers_too_narrow_for_all_directions_keep_those_that_differ_most():
    torch.manual_seed(0)
    projector = build_projector("mlp2x_gelu", SHAPE)
    features = torch.randn(80, TOKENS_TO_FIT, 24)
    words = features.mean(1) @ torch.randn(24, 40)
    share = fit_to_words(projector, [(features, words)], size=1.0)
    assert share is not None
    assert projector(features).isfinite().all()
    assert float(projector(features).pow(2).mean().sqrt()) == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("same", ["words", "pictures", "nothing"])
@torch.no_grad()
def test_what_does_not_differ_is_not_fitted(same):
    projector = build_projector("linear", SHAPE)
    before = linear_layers(projector)[-1].weight.clone()
    hidden, words = torch.randn(9, 36, 24), torch.randn(9, 40)
    hidden = hidden[:1, :1].expand(9, 36, 24) if same == "pictures" else hidden
    words = words[:1].expand(9, 40) if same == "words" else words
    assert fit_to_words(projector, [] if same == "nothing" else [(hidden, words)], size=1.0) is None
    torch.testing.assert_close(linear_layers(projector)[-1].weight, before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["avg_pool", "c_abstractor", "perceiver", "qformer"])
def test_pictures_do_not_look_at_each_other(kind):
    torch.manual_seed(0)
    projector = build_projector(kind, SHAPE).eval()
    features = torch.randn(2, 36, 24)
    torch.testing.assert_close(projector(features)[1:], projector(features[1:]), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_named():
    with pytest.raises(ModelError, match=r"expected a square for the c_abstractor: 49 or 64"):
        projector_tokens("c_abstractor", ProjectorShape(vision_width=8, language_width=8, grid=8, queries=50))
    with pytest.raises(ModelError, match="Did you mean 'perceiver'"):
        build_projector("perciever", SHAPE)
    with pytest.raises(ConfigError, match="queries is 0"):
        ProjectorConfig(queries=0)
    with pytest.raises(ConfigError, match="perceiver does not begin with a linear layer"):
        ProjectorConfig(kind="perceiver", fit_to_answers=True)
