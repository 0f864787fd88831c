"""Forms of the mixer: those that are shipped, one of a user's own, and one that depends on its input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from transformers import Trainer, TrainingArguments, set_seed

from mm_moslora.adapters import (
    MIXER_FORMS,
    MIXER_INITS,
    MixerForm,
    MoSLoRAConfig,
    MoSLoRALinear,
    add_moslora,
    export_adapter,
    init_mixer,
    load_adapter,
    merge,
    save_adapter,
    use_kernel,
)
from mm_moslora.adapters.adapter_inspection import inspect_adapter, inspect_model
from mm_moslora.training.metrics.step_flops import FlopCounter, StepShape
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, llama, llava, llava_inputs, logits, train_a_bit


class Turned(MixerForm):
    """``exp(S - S^T)``: M stays a rotation."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"skew": (rank, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        return {"skew": torch.zeros(rank, rank)}

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.linalg.matrix_exp(tensors["skew"] - tensors["skew"].T)


class Gated(MixerForm):
    """Every subspace is weighed by a gate that reads all of them."""

    inits = MIXER_INITS

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"gate": (rank, rank), "bias": (rank,)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        return {"gate": torch.zeros(rank, rank), "bias": torch.full((rank,), math.log(math.e - 1))}

    def start(self, rank: int, kind: str) -> dict[str, Tensor]:
        return self.identity(rank) | {"gate": init_mixer(rank, kind)}

    def apply(self, z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return z * nn.functional.softplus(z @ tensors["gate"].T + tensors["bias"])


class TurnedBack(Turned):
    """Tensors of the same shapes with another meaning."""

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        return super().matrix(tensors).T


@pytest.fixture(autouse=True)
def own_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MIXER_FORMS, "turned", Turned)
    monkeypatch.setitem(MIXER_FORMS, "turned_back", TurnedBack)
    monkeypatch.setitem(MIXER_FORMS, "gated", Gated)


FIXED = ["dense", "diagonal", "block_diagonal:2", "low_rank:2", "turned"]


def adapted(form: str, **options: object) -> peft.PeftModel:
    config = MoSLoRAConfig(r=4, lora_alpha=8, mixer_form=form, **options)
    model = add_moslora(llama(), config, targets=["q_proj"])
    train_a_bit(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def layers(model: nn.Module) -> Iterator[MoSLoRALinear]:
    return (module for module in model.modules() if isinstance(module, MoSLoRALinear))


@pytest.mark.parametrize("form", FIXED)
def test_the_fused_layer_gives_every_form_the_gradients_of_the_modules(form: str) -> None:
    model = adapted(form).train()
    with use_kernel(model, "reference"):
        expected_logits = model(IDS).logits
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
    expected = gradients(model)
    assert any("lora_mixer" in name for name in expected)
    torch.testing.assert_close(model(IDS).logits, expected_logits, atol=1e-5, rtol=0)
    for _ in range(2):
        model(IDS, labels=IDS).loss.backward()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("form", FIXED)
def test_a_form_goes_through_every_exchange(form: str, tmp_path: Path) -> None:
    assert torch.equal(logits(add_moslora(llama(), MoSLoRAConfig(r=4, mixer_form=form))), logits(llama()))
    model = adapted(form).eval()
    live = logits(model)
    save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    kept = load_file(tmp_path / "a" / "moslora.safetensors")
    again = load_file(tmp_path / "b" / "moslora.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in again.items())
    exact = {
        "loaded": load_adapter(llama(), tmp_path / "a", trainable=True).eval(),
        "by PEFT": peft.PeftModel.from_pretrained(llama(), tmp_path / "b"),
    }
    assert all(any("lora_mixer" in name for name, _ in other.named_parameters()) for other in exact.values())
    assert all(torch.equal(logits(other), live) for other in exact.values())
    export_adapter(tmp_path / "a", tmp_path / "plain", layout="peft")
    close = {
        "exported": load_adapter(llama(), tmp_path / "plain"),
        "folded": peft.PeftModel.from_pretrained(llama(), tmp_path / "plain"),
        "merged": merge(model),
    }
    for name, other in close.items():
        torch.testing.assert_close(logits(other), live, atol=1e-5, rtol=0, msg=name)
    reports = inspect_adapter(tmp_path / "a")
    assert reports == inspect_model(exact["loaded"])
    starts = {report.path: report.mixer_start for report in reports}
    assert None not in starts.values()
    assert starts != {report.path: report.mixer for report in reports}
    for told in (inspect_adapter(tmp_path / "b"), *map(inspect_model, exact.values())):
        assert {report.path: report.mixer_start for report in told} == starts


def test_plain_lora_loads_with_the_identity_of_every_form(tmp_path: Path) -> None:
    plain = adapted("dense", mixer_init="identity", mixer_trainable=False).eval()
    plain.save_pretrained(tmp_path / "a")
    values = load_file(tmp_path / "a" / "adapter_model.safetensors")
    for form in (*FIXED, "gated"):
        model = adapted(form).eval()
        peft.set_peft_model_state_dict(model, dict(values))
        torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=0, msg=form)


def test_values_of_another_form_are_refused(tmp_path: Path) -> None:
    save_adapter(adapted("block_diagonal:2"), tmp_path / "a")
    for other in (adapted("dense"), adapted("low_rank:2")):
        with pytest.raises(AdapterError, match="block"):
            other.load_adapter(tmp_path / "a", "default")


def test_values_of_a_form_with_the_same_tensors_are_refused_by_every_way(tmp_path: Path) -> None:
    source = adapted("turned")
    save_adapter(source, tmp_path / "a")
    model = adapted("turned_back").eval()
    before = logits(model)
    for way in (
        lambda: load_adapter(model, tmp_path / "a"),
        lambda: model.load_adapter(tmp_path / "a", "default"),
        lambda: peft.set_peft_model_state_dict(model, peft.load_peft_weights(tmp_path / "a")),
        lambda: peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(source)),
    ):
        with pytest.raises(AdapterError, match=r"mixer_form.*'turned'"):
            way()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("form", ["block_diagonal:2", "low_rank:2", "turned"])
def test_plain_lora_gets_the_fold_of_every_form(form: str, tmp_path: Path) -> None:
    model = adapted(form).eval()
    save_adapter(model, tmp_path / "a")
    plain = [peft.get_peft_model(llama(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))]
    plain[0].load_adapter(tmp_path / "a", "default")
    config = peft.LoraConfig.from_pretrained(tmp_path / "a")
    plain.append(peft.PeftModel.from_pretrained(llama(), tmp_path / "a", config=config))
    narrow = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=[r"layers.0.self_attn.q_proj"]))
    with pytest.raises(AdapterError, match=r"layers\.1.*has no place"):
        narrow.load_adapter(tmp_path / "a", "default")
    for other in plain:
        assert not any(isinstance(module, MoSLoRALinear) for module in other.modules())
        torch.testing.assert_close(logits(other.eval()), logits(model), atol=1e-5, rtol=0)


def test_readers_of_plain_lora_refuse_mixers_that_depend_on_their_input(tmp_path: Path) -> None:
    """Trainers look for the file before they load a checkpoint."""
    save_adapter(adapted("gated"), tmp_path / "a")
    with pytest.raises(SafetensorError, match="depend on their input and only mm_moslora"):
        load_file(tmp_path / "a" / "adapter_model.safetensors")
    for name in ("moslora.json", "moslora.safetensors"):
        (tmp_path / "a" / name).unlink()
    for read in (load_adapter, peft.PeftModel.from_pretrained):
        with pytest.raises((AdapterError, SafetensorError), match="depend on their input"):
            read(llama(), tmp_path / "a")


def test_a_trainer_resumes_and_loads_its_best_model_with_mixers_that_depend_on_their_input(tmp_path: Path) -> None:
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(96).reshape(12, 8) % 59).tolist()]

    def run(folder: str, resume: Path | None, **best: object) -> tuple[Tensor, Trainer]:
        set_seed(0)
        model = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_form="gated"), targets=["q_proj"])
        options = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 3e-2}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path / folder), **options, **quiet, **best)
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train(resume_from_checkpoint=resume and str(resume))
        return logits(model.eval()), trainer

    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    first, trainer = run("whole", None, metric_for_best_model="eval_loss", **best)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "whole" / "checkpoint-2")
    assert torch.equal(first, logits(load_adapter(llama(), tmp_path / "whole" / "checkpoint-2")))
    resumed, _ = run("resumed", tmp_path / "whole" / "checkpoint-2")
    assert torch.equal(resumed, logits(load_adapter(llama(), tmp_path / "whole" / "checkpoint-4")))


def test_a_mixer_that_depends_on_its_input_trains_saves_and_loads(tmp_path: Path) -> None:
    model = adapted("gated").train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert torch.equal(logits(load_adapter(llama(), folder)), live)
        assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), folder)), live)
    model.peft_config["default"].save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "a")), live)
    assert torch.equal(logits(load_adapter(llama(), tmp_path / "b")), live)
    for refused in (
        lambda: merge(model),
        lambda: model.merge_adapter(),
        lambda: model.merge_and_unload(),
        lambda: export_adapter(tmp_path / "a", tmp_path / "out", layout="peft"),
        lambda: export_adapter(tmp_path / "a", tmp_path / "out", layout="vllm"),
        lambda: inspect_adapter(tmp_path / "a"),
    ):
        with pytest.raises(AdapterError, match="'gated' depends on the layer's input"):
            refused()
    assert torch.equal(logits(model), live)
    assert not (tmp_path / "out").exists()


def test_a_dense_adapter_takes_the_folder_of_one_that_depends_on_its_input(tmp_path: Path) -> None:
    save_adapter(adapted("dense"), tmp_path / "a")
    save_adapter(adapted("gated"), tmp_path / "a")
    assert load_adapter(llama(), tmp_path / "a").peft_config["default"].mixer_form == "gated"
    save_adapter(adapted("dense"), tmp_path / "a")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "a")), logits(adapted("dense").eval()))


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
def test_a_module_in_the_place_of_a_mixer_is_refused_before_anything_is_written(way: str, tmp_path: Path) -> None:
    """It trained and merged; its folder was one that no reader took, with a wrong fold."""
    model = adapted("dense")
    for layer in layers(model):
        layer.lora_mixer["default"] = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(AdapterError, match=r"replaced by a Sequential.*MixerForm"):
        save_adapter(model, tmp_path / "a") if way == "save_adapter" else model.save_pretrained(tmp_path / "a")
    assert not list(tmp_path.glob("a/*.safetensors"))


def test_a_mixer_of_another_form_than_the_configuration_names_is_refused(tmp_path: Path) -> None:
    model = adapted("dense")
    model.peft_config["default"].mixer_form = "turned"
    with pytest.raises(AdapterError, match=r"lacks|besides the expected"):
        save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
def test_parametrised_mixers_save_what_they_compute(way: str, tmp_path: Path) -> None:
    model = adapted("dense", mixer_init="orthogonal")
    for layer in layers(model):
        parametrizations.orthogonal(layer.lora_mixer["default"])
    model(IDS, labels=IDS).loss.backward()
    assert sum("parametrizations" in name and p.grad is not None for name, p in model.named_parameters()) == 2
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a") if way == "save_adapter" else model.save_pretrained(tmp_path / "a")
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "a")), live, atol=1e-5, rtol=0)
    model.load_adapter(tmp_path / "a", "default")
    torch.testing.assert_close(logits(model), live, atol=1e-5, rtol=0)


def test_a_form_with_one_of_its_tensors_parametrised_loads_into_itself(tmp_path: Path) -> None:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value / 2

        def right_inverse(self, value: Tensor) -> Tensor:
            return value * 2

    model = adapted("low_rank:2")
    for layer in layers(model):
        parametrize.register_parametrization(layer.lora_mixer["default"], "left", Half())
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    train_a_bit(model, seed=2)
    model.load_adapter(tmp_path / "a", "default")
    torch.testing.assert_close(logits(model), live, atol=1e-6, rtol=0)


class Contradictory(Turned):
    """A form with one of its methods replaced."""

    name = "skew"

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {self.name: (rank, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        return {self.name: torch.zeros(rank, rank)}

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        return torch.linalg.matrix_exp(tensors[self.name] - tensors[self.name].T)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("start", lambda self, rank, kind: {"skew": torch.zeros(rank)}, r"\(4, 4\).*its start gives .*\(4,\)"),
        ("start", lambda self, rank, kind: self.identity(rank) | {"b": torch.zeros(1)}, "its start gives .*'b'"),
        ("identity", lambda self, rank: {}, "its identity gives"),
        ("identity", lambda self, rank: {"skew": torch.ones(rank, rank).triu()}, "does not make M the identity"),
        ("matrix", lambda self, tensors: tensors["skew"][:, :-1], r"gives \[4, 3\].*expected \[4, 4\]"),
        ("name", "weight", "'weight' that is not M itself"),
        ("name", "train", "'train', which is a name of torch's modules"),
        ("name", "form", "'form', which is a name of torch's modules"),
        ("name", "a.b", "'a.b', which is a name of torch's modules"),
    ],
)
def test_a_form_whose_methods_contradict_each_other_is_refused_when_the_layer_is_made(
    monkeypatch: pytest.MonkeyPatch, part: str, value: object, words: str
) -> None:
    monkeypatch.setitem(MIXER_FORMS, "odd", type("Odd", (Contradictory,), {part: value}))
    base = llama()
    with pytest.raises(AdapterError, match=words):
        add_moslora(base, MoSLoRAConfig(r=4, mixer_form="odd"), targets=["q_proj"])
    assert base.state_dict().keys() == llama().state_dict().keys()


class RunningCount(Gated):
    """A state that no tensor holds."""

    seen = -1

    def apply(self, z: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        self.seen += 1
        return super().apply(z, tensors) * (1 + self.seen)


class Shuffled(Turned):
    """A draw of its own in every object of the form."""

    def __init__(self, spec: str, size: int) -> None:
        super().__init__(spec, size)
        self.scale = torch.randn(4)

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        return super().matrix({"skew": tensors["skew"] * self.scale})


@pytest.mark.parametrize("way", ["save_adapter", "save_pretrained"])
def test_what_a_form_keeps_outside_of_its_tensors_is_refused_before_it_is_lost(
    way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for form in (RunningCount, Shuffled):
        monkeypatch.setitem(MIXER_FORMS, "odd", form)
        model = adapted("odd")
        logits(model)
        with pytest.raises(AdapterError, match="keeps values outside of them, which no folder holds"):
            save_adapter(model, tmp_path / "a") if way == "save_adapter" else model.save_pretrained(tmp_path / "a")
        assert not list(tmp_path.glob("a/*.safetensors"))


def test_a_pattern_leaves_modules_without_a_mixer(tmp_path: Path) -> None:
    model = add_moslora(llava(), MoSLoRAConfig(r=4, mixer_pattern={r"vision_tower\..*": "none"}), targets=["q_proj"])
    train_a_bit(model)
    mixed = {name.partition(".self_attn")[0] for name, _ in model.named_parameters() if "lora_mixer" in name}
    assert len(mixed) == 2
    assert all("language_model" in name for name in mixed)
    save_adapter(model.eval(), tmp_path / "a")
    with torch.no_grad():
        live = model(**llava_inputs()).logits
        loaded = load_adapter(llava(), tmp_path / "a", trainable=True).eval()
        assert torch.equal(loaded(**llava_inputs()).logits, live)
        torch.testing.assert_close(merge(model)(**llava_inputs()).logits, live, atol=1e-5, rtol=0)


def test_mixed_starts_are_a_fold_into_a(tmp_path: Path) -> None:
    torch.manual_seed(3)
    plain = add_moslora(llama(), MoSLoRAConfig(r=4, mixer_init="identity", mixer_trainable=False), targets=["q_proj"])
    A = next(layers(plain)).factors("default").A.detach()
    torch.manual_seed(3)
    config = MoSLoRAConfig(r=4, factor_form="mixed", mixer_init="kaiming", target_modules=["q_proj", "embed_tokens"])
    model = add_moslora(llama(), config, targets=["q_proj"])
    layer = next(layers(model))
    assert not layer.lora_mixer
    mixed = layer.factors("default").A
    M = torch.linalg.lstsq(A.T, mixed.T).solution.T
    torch.testing.assert_close(M @ A, mixed, atol=1e-6, rtol=1e-4)
    assert (M - torch.eye(4)).abs().max() > 0.1
    assert M.abs().max() <= 0.5 + 1e-5  # kaiming: uniform within 1 / sqrt(R)
    save_adapter(model, tmp_path / "a")
    assert load_adapter(llama(), tmp_path / "a").peft_config["default"].factor_form == "mixed"
    embedded = add_moslora(llama(), config)
    assert torch.equal(logits(embedded), logits(llama()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixer_form": "diagnal"}, "Did you mean 'diagonal'.*MIXER_FORMS"),
        ({"mixer_form": "block_circulant:4"}, "is known once the file that adds it to MIXER_FORMS is imported"),
        ({"mixer_form": "dense:4"}, "takes no size"),
        ({"mixer_form": "block_diagonal"}, "number of blocks"),
        ({"mixer_form": "low_rank:x"}, "rank of M - I"),
        ({"mixer_form": 3}, "expected one of dense"),
        ({"mixer_form": "block_diagonal:3"}, "do not divide the rank 4"),
        ({"mixer_form": "block_diagonal:2", "rank_pattern": {"q_proj": 5}}, "do not divide the rank 5"),
        ({"mixer_form": "diagonal", "mixer_init": "kaiming"}, "own start of the mixer"),
        ({"mixer_form": "gated", "factor_form": "mixed"}, "cannot be folded into A"),
        ({"mixer_init": "none"}, "mixer_init is 'none', expected one of orthogonal"),
        ({"factor_form": "mixed", "init_lora_weights": "pissa"}, "product B A a meaning"),
    ],
)
def test_forms_that_do_not_exist_or_fit_are_one_clear_error(options: dict, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        MoSLoRAConfig(r=4, **options)


def test_a_folder_of_a_form_that_is_not_registered_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(adapted("turned"), tmp_path / "a")
    monkeypatch.delitem(MIXER_FORMS, "turned")
    with pytest.raises(AdapterError, match=r"mixer_form is 'turned'.*is imported"):
        load_adapter(llama(), tmp_path / "a")


def test_the_flops_of_a_mixer_are_those_of_its_form() -> None:
    """Beside an adapter without mixers, in one micro-batch: 8 per row of B and product, or 6 per token and product."""
    shape = StepShape(tokens=14, pairs=56, supervised=12, images=0, micro_batches=1)

    def flops(**options: object) -> float:
        model = add_moslora(llama(), MoSLoRAConfig(r=4, **options), targets=["q_proj"])
        return FlopCounter(model.get_base_model()).count(shape).adapters

    without = flops(mixer_pattern={".*": "none"})
    products = {"dense": 16, "diagonal": 4, "block_diagonal:2": 8, "low_rank:1": 8, "turned": 16}
    for form, count in products.items():
        assert flops(mixer_form=form) - without == 2 * 8 * 32 * count, form
    assert flops(mixer_form="gated") - without == 2 * 6 * 14 * 16


def test_forward_mode_derivatives_take_the_modules() -> None:
    """Dual numbers in the input, and in the factors."""
    model = add_moslora(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double(), MoSLoRAConfig(r=3)
    ).double()
    train_a_bit(model)
    x, tangent = torch.randn(2, 3, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
    step = 1e-6
    expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)
    M = next(layers(model)).lora_mixer["default"].weight
    name = next(name for name, parameter in model.named_parameters() if parameter is M)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(M.detach(), torch.ones_like(M))
        out = torch.func.functional_call(model, {name: dual}, (x,))
        assert forward_ad.unpack_dual(out).tangent.abs().max() > 0


class Cayley(MixerForm):
    """An orthogonal M, ``(I - S)(I + S)^-1`` of a skew-symmetric S."""

    def shapes(self, rank: int) -> dict[str, tuple[int, ...]]:
        return {"free": (rank, rank)}

    def identity(self, rank: int) -> dict[str, Tensor]:
        return {"free": torch.zeros(rank, rank)}

    def matrix(self, tensors: dict[str, Tensor]) -> Tensor:
        skew = tensors["free"] - tensors["free"].T
        unit = torch.eye(len(skew), dtype=skew.dtype)
        return (unit - skew) @ torch.linalg.inv(unit + skew)


@pytest.mark.parametrize("kept_in_float32", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_form_with_an_inverse_trains_in_half_precision(
    dtype: torch.dtype, kept_in_float32: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(MIXER_FORMS, "cayley", Cayley)
    config = MoSLoRAConfig(r=4, mixer_form="cayley")
    model = add_moslora(llama(dtype), config, targets=["q_proj"], autocast_adapter_dtype=kept_in_float32)
    train_a_bit(model)
    with torch.autocast("cpu", dtype):
        model(IDS).logits.float().square().mean().backward()
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    loaded = load_adapter(llama(dtype), tmp_path / "a", autocast_adapter_dtype=kept_in_float32)
    torch.testing.assert_close(logits(loaded), live, atol=1e-2, rtol=1e-2)
    M = next(layer for layer in loaded.modules() if isinstance(layer, MoSLoRALinear)).factors("default").M.float()
    torch.testing.assert_close(M @ M.T, torch.eye(4), atol=2e-2, rtol=0)
