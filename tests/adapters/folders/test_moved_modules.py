"""An adapter that was saved under other module paths loads where exactly one way fits, and is refused elsewhere."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import nn

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, save_adapter
from mm_moslora.utils.errors import AdapterError

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, width), nn.Linear(width, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Nested(nn.Module):
    """Two layers below a path such as `model.language`; `beside` holds a part with layers of the same names."""

    def __init__(self, path: str, width: int = 12, beside: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.path = path
        part: nn.Module = self
        for name in filter(None, path.split(".")):
            part.add_module(name, nn.Module())
            part = part.get_submodule(name)
        part.layers = nn.ModuleList(Layer(width) for _ in range(2))
        if beside:
            self.vision = nn.Module()
            self.vision.layers = nn.ModuleList(Layer(beside) for _ in range(2))

    def forward(self, x):
        for layer in self.get_submodule(self.path).layers:
            x = layer(x)
        return x


def saved(folder, own: bool, path: str = "model", **options) -> torch.Tensor:
    """Save an adapter with random factors; its outputs."""
    targets = options.pop("target_modules", ["up", "down"])
    if own:
        config = MoSLoRAConfig(r=4, lora_alpha=8, target_modules=targets, mixer_init="orthogonal", **options)
        model = add_moslora(Nested(path), config)
    else:
        model = peft.get_peft_model(Nested(path), peft.LoraConfig(r=4, target_modules=targets, **options))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight)
    if own:
        save_adapter(model, folder)
    else:
        model.save_pretrained(folder)
    return model.eval()(X)


@pytest.mark.parametrize("own", [True, False], ids=["own", "peft"])
@pytest.mark.parametrize("path", ["model.language", "", "base.model", "text"])
@pytest.mark.parametrize(
    "options", [{}, {"rank_pattern": {"model.layers.0.up": 2}}, {"alpha_pattern": {"down": 32}}], ids=str
)
def test_a_moved_adapter_gives_its_outputs_and_is_saved_under_the_new_paths(own, path, options, tmp_path, caplog):
    expected = saved(tmp_path / "old", own, **options)
    model = load_adapter(Nested(path, beside=20 if path else 0), tmp_path / "old")
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert "4 modules fit" in caplog.text
    save_adapter(model, tmp_path / "new")
    caplog.clear()
    torch.testing.assert_close(
        load_adapter(Nested(path, beside=20 if path else 0), tmp_path / "new")(X), expected, rtol=0, atol=0
    )
    assert not caplog.text


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (lambda: Nested("text", beside=12), r"two ways: .*text.* or .*vision"),
        (lambda: Nested("text", width=10), "lacks|sizes differ"),
        (lambda: nn.Sequential(nn.Linear(8, 12)), "lacks|sizes differ"),
    ],
    ids=["twice", "other-sizes", "other-model"],
)
@pytest.mark.parametrize("own", [True, False], ids=["own", "peft"])
def test_an_adapter_that_fits_twice_or_never_is_refused(own, model, named, tmp_path):
    saved(tmp_path, own)
    base = model()
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterError, match=named):
        load_adapter(base, tmp_path)
    assert [name for name, _ in base.named_modules()] == names
