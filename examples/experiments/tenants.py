#!/usr/bin/env python
"""A tenant's tuning over shared factors: M alone against LoRA of equal size and of rank 16 (docs/results/tenants.md).

    python examples/experiments/tenants.py OUT                                  the first block: `sort`, 400 records
    python examples/experiments/tenants.py OUT --held sort,odd,word --records 4000
    python examples/experiments/tenants.py --table                              the result so far, from the archive

Eight question sets are made from timm's WordNet files. A, B and M are trained on seven of them and merged; each arm
then tunes the merged model on the eighth. Every finished run is one line of the archive, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from mm_moslora_eval.scoring.error_bars import t_quantile
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.compare.seed_statistics import TaskScores, arm_mean, differences

SETS = ("word", "meaning", "true", "gap", "sort", "odd", "same", "name")
SORTS = {"animal": (1314000, 2666000), "object": (2667000, 4620000), "food": (7555800, 7940000),
         "place": (8489000, 9475000), "person": (9605000, 10795000), "plant": (11535000, 13170000)}  # fmt: skip
"""Offsets in WordNet 3.0, which lists nouns by sort."""
ARCHIVE = Path(__file__).resolve().parents[2] / "docs/results/data/tenants.jsonl"
ARMS = ("mixer-shared", "mixer-svd", "lora-1", "lora-16")
LINEAR = r"(q|k|v|o|gate|up|down)_proj"
FEW = rf"model\.layers\.((2|8|14|20|26)\..*{LINEAR}|29\..*(q|k|v)_proj)"
"""Rank 1 here has 53,568 numbers; M in all 210 linear layers has 53,760."""
TEST, VALIDATION, BATCH = 800, 160, 16
SHARED_RECORDS, SHARED_RATE = 800, 2e-3
RATES, FACTOR, GROW = (1e-3, 3.2e-3, 1e-2), 10**0.5, 4
Pair = tuple[str, str]


def synsets() -> list[tuple[list[str], str, str]]:
    """(names, definition, sort or "") of every noun of ImageNet's hierarchy, shuffled once for all."""
    data = resources.files("timm.data") / "_info"
    lines = {name: (data / f"imagenet_synset_to_{name}.txt").read_text("utf-8") for name in ("lemma", "definition")}
    names, definitions = (
        dict(row.split("\t", 1) for row in text.splitlines() if "\t" in row) for text in lines.values()
    )
    found = []
    for key in sorted(definitions):
        sort = next((sort for sort, (low, high) in SORTS.items() if low <= int(key[1:]) < high), "")
        found.append(([name.strip() for name in names[key].split(",")], definitions[key], sort))
    random.Random("synsets").shuffle(found)
    return found


def questions(name: str, part: Sequence[tuple[list[str], str, str]], count: int, rng: random.Random) -> list[Pair]:
    """Questions of a set with their answers, which are true by construction.

    Args:
        part: synsets to ask about; sets of questions from disjoint parts share no noun.
        count: how many.
    """
    defined = [(n[0], d) for n, d, _ in part if n[0].isalpha() and n[0].islower() and len(d) <= 70 and n[0] not in d]
    sorted_ = {sort: [n[0] for n, _, of in part if of == sort and len(n[0]) <= 24] for sort in SORTS}
    named = [
        n
        for n, _, _ in part
        if len(n) > 1 and not {w[:4] for w in n[0].lower().split()} & {w[:4] for w in n[1].lower().split()}
    ]
    made: dict[str, str] = {}
    while len(made) < count:
        (word, meaning), (other, wrong) = rng.sample(defined, 2)
        flip, (one, two) = rng.random() < 0.5, rng.sample(list(SORTS), 2)
        if name == "word":
            question, answer = f"Which word means {meaning}: {_either(word, other, flip)}?", word
        elif name == "meaning":
            first, second = (wrong, meaning) if flip else (meaning, wrong)
            question, answer = f"What is {word}? 1: {first}. 2: {second}.", "2" if flip else "1"
        elif name == "true":
            question, answer = f"True or false: {word} means {wrong if flip else meaning}.", "false" if flip else "true"
        elif name == "gap":
            long, others = ([w for w in text.split() if w.isalpha() and len(w) > 4] for text in (meaning, wrong))
            if not long or not others or (hidden := rng.choice(long)) == (false := rng.choice(others)):
                continue
            gap = " ".join("___" if w == hidden else w for w in meaning.split())
            question, answer = f"{word}: {gap}. Which word is missing: {_either(hidden, false, flip)}?", hidden
        elif name == "sort":
            question, answer = f"What sort of thing is this: {rng.choice(sorted_[one])}?", one
        elif name == "odd":
            answer = rng.choice(sorted_[two])
            items = [*rng.sample(sorted_[one], 3), answer]
            rng.shuffle(items)
            question = f"Which one does not belong: {', '.join(items)}?"
        elif name == "same":
            pair = (rng.choice(sorted_[one]), rng.choice(sorted_[two])) if flip else tuple(rng.sample(sorted_[one], 2))
            question, answer = f"Are {pair[0]} and {pair[1]} of one sort?", "no" if flip else "yes"
        else:
            (first, answer, *_), (_, false, *_) = rng.sample(named, 2)
            question = f"What is another name of {first}: {_either(answer, false, flip)}?"
        made.setdefault(question, answer)
    return list(made.items())


def _either(right: str, wrong: str, flip: bool) -> str:
    return f"{wrong} or {right}" if flip else f"{right} or {wrong}"


def parts_of(held: str, records: int, seed: int) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """A tenant's records, which each seed draws anew, and the questions to choose rates and to measure with."""
    nouns = synsets()
    cuts = [0, 6000, 8000, len(nouns)]
    test, validation, learning = (nouns[low:high] for low, high in pairwise(cuts))
    return (
        questions(held, learning, records, random.Random(f"{held} {records} {seed}")),
        questions(held, validation, VALIDATION, random.Random(f"{held} validation")),
        questions(held, test, TEST, random.Random(f"{held} test")),
    )


class Coder:
    """Questions and answers as padded batches of token ids, with the positions of the answers."""

    def __init__(self, folder: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def batch(self, pairs: Sequence[Pair]) -> dict[str, torch.Tensor]:
        """Ids and labels ``[G, T]``; labels are -100 but for the answer and its end."""
        ids, labels = [], []
        for question, answer in pairs:
            start = self.tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
            end = self.tokenizer(f"{answer}<|im_end|>").input_ids
            ids.append(start + end)
            labels.append([-100] * len(start) + end)
        longest = max(map(len, ids))
        return {
            "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids]),
            "labels": torch.tensor([row + [-100] * (longest - len(row)) for row in labels]),
        }


def answer_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, rows and hits ``[K]`` of the answers' tokens; only these positions go through the head."""
    labels = batch.pop("labels")[:, 1:]
    decoder = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = decoder.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    asked = labels != -100
    logits = decoder.lm_head(hidden[asked]).float()
    return (
        cross_entropy(logits, labels[asked], reduction="none"),
        asked.nonzero()[:, 0],
        logits.argmax(-1) == labels[asked],
    )


@torch.no_grad()
def measure(model: Any, coder: Coder, pairs: Sequence[Pair]) -> tuple[list[int], list[float]]:
    """Whether greedy decoding gives exactly the answer, and the answer's log-likelihood, by question."""
    model.eval()
    right, nats = [0] * len(pairs), [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))
    for start in range(0, len(order), 32):
        chosen = order[start : start + 32]
        losses, rows, hits = answer_losses(model, coder.batch([pairs[index] for index in chosen]))
        for row, index in enumerate(chosen):
            right[index], nats[index] = int(hits[rows == row].all()), round(-losses[rows == row].sum().item(), 3)
    return right, nats


def fit(model: Any, coder: Coder, pairs: Sequence[Pair], rate: float, seed: int) -> int:
    """AdamW over the records in batches of 16, two passes up to 1,000 records and one above; returns the steps."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    rng, batches = random.Random(seed), list[Sequence[Pair]]()
    for _ in range(2 if len(pairs) <= 1000 else 1):
        drawn = rng.sample(list(pairs), len(pairs))
        batches += [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]
    warm, cool = max(1, len(batches) // 10), torch.pi / len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm) * (1 + torch.cos(torch.tensor(cool * step)).item()) / 2
    )
    model.train()
    for batch in batches:
        answer_losses(model, coder.batch(batch))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return len(batches)


def load(folder: str | Path) -> PreTrainedModel:
    """A language model in bf16; the factors of adapters are fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, dtype=torch.bfloat16)


def shared(held: str, base: str, out: Path, archive: Path) -> Path:
    """A, B and M trained on the seven other sets (`factors`), and the model with them merged (`merged`)."""
    folder, part = out / held, out / f"{held}.part"
    if not folder.exists():
        shutil.rmtree(part, ignore_errors=True)
        coder, sets = Coder(base), {n: parts_of(n, SHARED_RECORDS, 0)[:2] for n in SETS if n != held}
        torch.manual_seed(0)
        model = add_moslora(load(base), MoSLoRAConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
        fit(model, coder, [pair for learnt, _ in sets.values() for pair in learnt], SHARED_RATE, 0)
        save_adapter(model, part / "factors")
        merged = merge(model)
        cast(Any, merged).save_pretrained(part / "merged")
        scores = {n: sum(measure(merged, coder, asked)[0]) / len(asked) for n, (_, asked) in sets.items()}
        append(archive, {"held": held, "arm": "shared", "scores": scores})
        part.rename(folder)
    return folder


def tenant(arm: str, folder: Path, seed: int) -> Any:
    """The merged shared model with an arm's adapter, which changes nothing yet."""
    base = load(folder / "merged")
    torch.manual_seed(seed)
    if arm.startswith("lora"):
        rank, targets = (16, "all-linear") if arm == "lora-16" else (1, FEW)
        plain = MoSLoRAConfig(
            r=rank, lora_alpha=2 * rank, mixer_init="identity", mixer_trainable=False, task_type="CAUSAL_LM"
        )
        return add_moslora(base, plain, targets=targets)
    model = load_adapter(base, folder / "factors", trainable=True)
    for _, layer in named_adapter_layers(model):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if arm == "mixer-svd":  # LoRA-XS, arXiv 2405.17604: the leading directions of W, singular values in A
            left, values, right = torch.svd_lowrank(layer.get_base_layer().weight.float(), q=32, niter=4)
            a.data, b.data = values[:16, None] * right.T[:16], left[:, :16].contiguous()
        a.requires_grad_(False), b.requires_grad_(False)
        layer.lora_mixer["default"].weight.data.zero_()  # the shared M is in the merged weights: this is M less it
    return model


def rows_of(archive: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in archive.read_text("utf-8").splitlines()] if archive.exists() else []


def append(archive: Path, row: dict[str, Any]) -> None:
    """Add a finished run."""
    with archive.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({name: row[name] for name in row if name not in ("right", "nats")}, flush=True)


def run(options: argparse.Namespace, base: str, held: str, arm: str, rate: float, seed: int, *, report: bool) -> float:
    """One run, unless the archive has it; returns the mean loss of the answers."""
    key = {"held": held, "records": options.records, "arm": arm, "rate": round(rate, 6), "seed": seed, "report": report}
    done = next((row for row in rows_of(options.archive) if key.items() <= row.items()), None)
    if done is None:
        folder, coder, began = shared(held, base, options.out, options.archive), Coder(base), time.time()
        learnt, validation, test = parts_of(held, options.records, seed)
        model = load(folder / "merged") if arm == "none" else tenant(arm, folder, seed)
        steps = 0 if arm == "none" else fit(model, coder, learnt, rate, seed)
        trained = time.time() - began
        right, nats = measure(model, coder, test if report else validation)
        done = key | {
            "numbers": sum(p.numel() for p in model.parameters() if p.requires_grad) if steps else 0,
            "steps": steps, "seconds": [round(trained), round(time.time() - began)],
            "loss": -sum(nats) / len(nats), "score": sum(right) / len(right),
        } | ({"right": "".join(map(str, right)), "nats": nats} if report else {})  # fmt: skip
        append(options.archive, done)
    return done["loss"] if done["loss"] == done["loss"] else float("inf")


def tuned_rate(options: argparse.Namespace, base: str, held: str, arm: str) -> float:
    """The rate with the lowest held-out loss of one run each; a best rate at an edge adds the next one, `GROW` times."""
    losses = {rate: run(options, base, held, arm, rate, 1000, report=False) for rate in RATES}
    for _ in range(GROW):
        best = min(losses, key=losses.__getitem__)
        if min(losses) < best < max(losses):
            break
        rate = best / FACTOR if best == min(losses) else best * FACTOR
        losses[rate] = run(options, base, held, arm, rate, 1000, report=False)
    return min(losses, key=losses.__getitem__)


def table(rows: Sequence[dict[str, Any]]) -> str:
    return ""


def main() -> None:
    """Run what the archive lacks, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/tenants"), help="shared factors and models")
    parser.add_argument("--held", default="sort", help="held-out sets, separated by commas (default: sort)")
    parser.add_argument("--records", type=int, default=400, help="of a tenant (default: 400)")
    parser.add_argument("--seeds", type=int, default=5, help="reported runs of an arm (default: 5)")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help=f"finished runs (default: {ARCHIVE})")
    parser.add_argument(
        "--table", action="store_true", help="print the result of the archive's runs, and train nothing"
    )
    options = parser.parse_args()
    if options.table:
        print(table(rows_of(options.archive)))
        return
    from mm_moslora.quickstart import model_assets

    base = str(model_assets.language_model(print))
    for held in options.held.split(","):
        run(options, base, held, "none", 0.0, 0, report=True)
        rates = {arm: tuned_rate(options, base, held, arm) for arm in ARMS}
        for seed in range(options.seeds):
            for arm, rate in rates.items():
                run(options, base, held, arm, rate, seed, report=True)


if __name__ == "__main__":
    main()
