"""What transformers, PEFT, accelerate and torch do with an adapted model: right, or refused in one line."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from accelerate import disk_offload
from peft import optimizers
from preloaded import Preloaded
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from mm_moslora.adapters import (
    MoSLoRAConfig,
    adapted_modules,
    add_moslora,
    base_fingerprint,
    load_adapter,
    merge,
    save_adapter,
)
from mm_moslora.utils.errors import AdapterError
from tests.adapters.adapter_models import IDS, SIBLINGS, adapted, folded, llama, logits, train_a_bit


def small() -> peft.PeftModel:
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Tanh(), c=nn.Linear(8, 4)))
    model = add_moslora(net, MoSLoRAConfig(r=2), targets=["a", "c"])
    train_a_bit(model)
    return model.eval()


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}])
def test_a_training_step_compiles_into_one_graph(options: dict) -> None:
    """Every adapted layer broke the graph, an error with fullgraph."""
    model = adapted(llama(num_hidden_layers=1), **options).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("strict", [True, False])
def test_a_model_is_exported(strict: bool) -> None:
    model = small()
    program = torch.export.export(model, (X,), strict=strict)
    torch.testing.assert_close(program.module()(X), model(X))


def test_gradients_per_sample_and_forward_mode_work() -> None:
    model = small()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[None],)).square().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, X)
    for index, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(together[name][index], parameter.grad)
    _, tangent = torch.func.jvp(model, (X,), (torch.ones_like(X),))
    torch.testing.assert_close(tangent, torch.func.jacfwd(model)(X).sum((2, 3)))


def test_fsdp_trains_and_a_shard_is_named(python: Preloaded, tmp_path: Path) -> None:
    """Both kinds of FSDP, wrapped as accelerate and Trainer do it for PEFT: every module that trains for itself."""
    with Ranks(tmp_path / "ranks", python.ours) as ranks:
        ranks.run(["adapters.fsdp_ranks:both_kinds", str(tmp_path)])
    live = logits(adapted())
    for kind in ("fsdp1", "fsdp2", "fsdp2-peft"):
        assert torch.equal(logits(load_adapter(llama(), tmp_path / kind)), live)


FORMS = [
    {},
    {"mixer_init": "butterfly", "mixer_trainable": False},
]


@pytest.mark.parametrize("form", FORMS)
def test_trainer_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(form: dict, tmp_path: Path) -> None:
    """PEFT reads the folded factors, which left M at the identity and A and B with moments of others."""
    rows = [{"input_ids": row, "labels": row} for row in (torch.arange(96).reshape(12, 8) % 59).tolist()]

    def run(folder: str, resume: Path | None, *, loaded: bool = False) -> peft.PeftModel:
        set_seed(0)
        if loaded:
            model = peft.PeftModel.from_pretrained(llama(), resume, is_trainable=True)
        else:
            model = add_moslora(llama(), MoSLoRAConfig(r=4, target_modules=SIBLINGS, task_type="CAUSAL_LM", **form))
        options = {"per_device_train_batch_size": 4, "max_steps": 4, "save_steps": 2, "learning_rate": 3e-2}
        quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        arguments = TrainingArguments(str(tmp_path / folder), **options, **quiet)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume and str(resume))
        return model

    whole = run("whole", None)
    for loaded in (False, True):
        resumed = run(f"resumed-{loaded}", tmp_path / "whole" / "checkpoint-2", loaded=loaded).state_dict()
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed[name], tensor), name


@pytest.mark.parametrize("way", ["add_moslora", "get_peft_model", "add_adapter"])
def test_an_injection_that_fails_halfway_is_taken_back(way: str) -> None:
    torch.manual_seed(0)
    model = llama()
    live = logits(model)
    options = {"mixer_init": "butterfly", "rank_pattern": {"v_proj": 5}}
    config = MoSLoRAConfig(r=4, target_modules=["q_proj", "v_proj"], **options)
    if way == "add_adapter":
        model = add_moslora(model, MoSLoRAConfig(r=4), targets=["q_proj"])
    names = list(model.state_dict())
    calls = {
        "add_moslora": lambda: add_moslora(model, config),
        "get_peft_model": lambda: peft.get_peft_model(model, config),
        "add_adapter": lambda: model.add_adapter("second", config),
    }
    with pytest.raises(AdapterError, match=r"rank (is )?5"):
        calls[way]()
    assert list(model.state_dict()) == names
    assert torch.equal(logits(model), live)


def test_a_classifier_that_trains_whole_gets_no_adapter(tmp_path: Path) -> None:
    def base() -> BertForSequenceClassification:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=3, **sizes)).eval()

    model = add_moslora(base(), MoSLoRAConfig(r=4, task_type="SEQ_CLS"))
    assert "classifier" not in {row.path for row in adapted_modules(model)}
    train_a_bit(model)
    for name, parameter in model.named_parameters():
        if "classifier" in name and parameter.requires_grad:
            parameter.data.add_(0.3)
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(base(), tmp_path / "a")), live)
    assert torch.equal(logits(folded(base(), tmp_path / "a")), live)
    with pytest.raises(AdapterError, match=r"modules_to_save=\['score', 'classifier'\] leaves none"):
        add_moslora(base(), MoSLoRAConfig(r=4, task_type="SEQ_CLS"), targets=["classifier"])


def test_an_offloaded_base_takes_no_adapter_and_an_offloaded_adapter_works(tmp_path: Path) -> None:
    """Values loaded into factors beside offloaded weights were dropped, and the output was NaN."""
    model = adapted()
    live = logits(model)
    save_adapter(model, tmp_path / "a")
    offloaded = disk_offload(llama(), tmp_path / "base", execution_device="cpu")
    for call in (
        lambda: load_adapter(offloaded, tmp_path / "a"),
        lambda: add_moslora(offloaded, MoSLoRAConfig(r=4), targets=["q_proj"]),
        lambda: peft.get_peft_model(offloaded, MoSLoRAConfig(r=4, target_modules=["q_proj"])),
    ):
        with pytest.raises(AdapterError, match="accelerate has offloaded its weights"):
            call()
    assert torch.equal(logits(offloaded), logits(llama()))
    whole = disk_offload(model, tmp_path / "whole", execution_device="cpu")
    torch.testing.assert_close(logits(whole), live, atol=1e-6, rtol=0)
    for refused in (lambda: save_adapter(whole, tmp_path / "b"), lambda: merge(whole)):
        with pytest.raises(AdapterError, match=r"on the meta device .*remove_hook_from_module"):
            refused()


def test_tied_modules_that_train_whole_are_saved(tmp_path: Path) -> None:
    """safetensors refused their shared memory."""
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "task_type": "CAUSAL_LM"}
    model = add_moslora(llama(tie_word_embeddings=True), MoSLoRAConfig(r=4, **options), targets=["q_proj"])
    train_a_bit(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.5)
    live = logits(model.eval())
    save_adapter(model, tmp_path / "a")
    assert torch.equal(logits(load_adapter(llama(tie_word_embeddings=True), tmp_path / "a")), live)
    stock = folded(llama(tie_word_embeddings=True), tmp_path / "a")
    torch.testing.assert_close(logits(stock), live, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "wrap",
    [lambda layer: torch.compile(layer, backend="eager"), checkpoint_wrapper],
    ids=["compile", "checkpoint_wrapper"],
)
def test_wrapped_blocks_save_as_the_blocks_in_them(wrap: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    """A folder had the wrappers' names in it, and could not be loaded."""
    model = adapted(modules_to_save=["norm"])
    live = logits(model)
    layers = model.get_base_model().model.layers
    for index, layer in enumerate(layers):
        layers[index] = wrap(layer)
    assert base_fingerprint(model) == base_fingerprint(llama())
    save_adapter(model, tmp_path / "ours")
    save_adapter(model, tmp_path / "state", state={name: p.clone() for name, p in model.named_parameters()})
    model.save_pretrained(tmp_path / "pefts")
    for name in ("ours", "state", "pefts"):
        assert torch.equal(logits(load_adapter(llama(), tmp_path / name)), live)
    bare = llama()
    bare.model.layers[0] = wrap(bare.model.layers[0])
    for refused in (
        lambda: add_moslora(bare, MoSLoRAConfig(r=4), targets=["q_proj"]),
        lambda: load_adapter(bare, tmp_path / "ours"),
    ):
        with pytest.raises(AdapterError, match="Parts of the model are wrapped"):
            refused()


def test_lora_plus_with_8_bit_states_trains_mixers_at_the_rate_of_a(tmp_path: Path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    config = MoSLoRAConfig(r=32, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    model = add_moslora(llama(hidden_size=128), config)
    optimizer = optimizers.create_loraplus_optimizer(model, bnb.optim.AdamW8bit, lr=1e-3, loraplus_lr_ratio=16)
    rate = {id(item): group["lr"] for group in optimizer.param_groups for item in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = 1e-6 if "lora_embedding" in name else 16e-3 if "lora_B" in name else 1e-3
            assert rate.pop(id(parameter)) == own, name
    assert not rate
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    given = TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    Trainer(model=model, args=given, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert any(state["state1"].dtype == torch.uint8 for state in optimizer.state.values())
    for name, value in model.named_parameters():
        if value.requires_grad and "embed_tokens" not in name:
            moved = (value - before[name]).abs().mean()
            assert (moved > 5e-3) == ("lora_B" in name), name
