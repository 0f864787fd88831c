#!/usr/bin/env python
"""A tenant's tuning over shared factors: M alone against LoRA of equal size and of rank 16 (docs/results/tenants.md).

Eight question sets are made from timm's WordNet files. A, B and M are trained on seven of them and merged; each arm
then tunes the merged model on the eighth. Every finished run is one line of the archive, and is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import re
import time
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from mm_moslora.adapters import MoSLoRAConfig, add_moslora, load_adapter, merge, save_adapter
from mm_moslora.adapters.tree import named_adapter_layers
from mm_moslora.compare.seed_statistics import TaskScores, arm_mean, differences
from mm_moslora.quickstart import model_assets
from mm_moslora.utils.files import rename, writing_in_place

SETS = ("word", "gap", "name", "first", "thing", "alive", "use", "latin")
SORTS = {"animal": (1314000, 2666000, "watch"), "object": (2667000, 4620000, "use"), "food": (7555800, 7940000, "eat"),
         "place": (8489000, 9475000, "visit"), "person": (9605000, 10795000, "meet"),
         "plant": (11535000, 13170000, "grow")}  # WordNet 3.0's offsets by sort, and the answers of `use`  # fmt: skip
PARTS = {"test": (0, 6000, 800), "validation": (6000, 8000, 160), "learnt": (8000, None, 0)}  # nouns, questions
ARCHIVE = Path(__file__).resolve().parents[2] / "docs/results/data/tenants.jsonl"
ARMS = ("mixer-shared", "mixer-svd", "lora-1", "lora-16")
FEW = r"model\.layers\.((2|8|14|20|26)\..*(q|k|v|o|gate|up|down)_proj|29\..*(q|k|v)_proj)"
SHARED_RECORDS, SHARED_RATE, BATCH = 800, 2e-3, 16
RATES, FACTOR, GROW, TUNING_SEED = (1e-3, 3.2e-3, 1e-2), 10**0.5, 4, 1000


def questions(name: str, part: str, records: int = 0, seed: int = 0) -> list[tuple[str, str]]:
    """Questions of a set with answers that are true by construction; a tenant's records are drawn anew by each seed."""
    data = resources.files("timm.data") / "_info"
    texts = [(data / f"imagenet_synset_to_{of}.txt").read_text("utf-8") for of in ("lemma", "definition")]
    names, meanings = (dict(row.split("\t", 1) for row in text.splitlines() if "\t" in row) for text in texts)
    keys, (low, high, count) = sorted(meanings), PARTS[part]
    random.Random("synsets").shuffle(keys)
    once = Counter(one.strip() for of in names.values() for one in set(of.split(",")))  # no other part asks about it
    lists = {key: [one.strip() for one in names[key].split(",") if once[one.strip()] == 1] for key in keys[low:high]}
    nouns = [(of, meanings[key], int(key[1:])) for key, of in lists.items() if of]
    short = [(n[0], d) for n, d, _ in nouns if n[0].isalpha() and n[0].islower() and len(d) <= 70 and n[0] not in d]
    of_sort = {sort: [(n, d) for n, d, at in nouns if lo <= at < hi] for sort, (lo, hi, _) in SORTS.items()}
    pairs = [n for n, _, _ in nouns if len(n) > 1 and n[0][:4].lower() != n[1][:4].lower()]
    rng = random.Random(f"{name} {part}" if count else f"{name} {records} {seed}")
    made: dict[str, str] = {}
    while len(made) < (count or records):
        ((word, meaning), (other, wrong)), sort = rng.sample(short, 2), rng.choice(list(SORTS))
        choice, (thing, text) = None, rng.choice(of_sort[sort])
        if name == "word":
            asked, choice = f"Which word means {meaning}", (word, other)
        elif name == "gap":
            hidden, false = (max(re.findall("[a-z]+", of), key=len) for of in (meaning, wrong))
            asked, choice = f"{word}: {meaning.replace(hidden, '___')}. Which word is missing", (hidden, false)
        elif name == "name":
            (known, right, *_), (_, false, *_) = rng.sample(pairs, 2)
            asked, choice = f"What is another name of {known}", (right, false)
        elif name == "first":
            asked, choice = "Which word comes first in the alphabet", tuple(sorted((word, other)))
        elif name == "thing":
            asked, answer = f"What sort of thing is this: {thing[0]}?", sort
        elif name == "alive":
            asked, answer = f"Is this alive: {thing[0]}?", "yes" if sort in ("animal", "person", "plant") else "no"
        elif name == "use":
            asked, answer = f"What does one do with {text}?", SORTS[sort][2]
        else:
            known = rng.choice(rng.choice(of_sort[rng.choice(("animal", "plant"))])[0])
            latin = re.fullmatch(r"[A-Z][a-z]+ [a-z]+(us|a|um|is|ii|i|ae|ens|es|os)", known)
            if not (latin or known.islower()):
                continue
            asked, answer = f"Is this name scientific or common: {known.lower()}?", "scientific" if latin else "common"
        if choice:
            asked, answer = f"{asked}: {' or '.join(rng.sample(choice, 2))}?", choice[0]
        made.setdefault(asked, answer)
    return list(made.items())


def answer_losses(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[torch.Tensor, ...]:
    """Losses, rows and hits ``[K]`` of the tokens of answers; only their positions go through the head."""
    starts = [tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n").input_ids for q, _ in pairs]
    ends = [tokenizer(f"{answer}<|im_end|>").input_ids for _, answer in pairs]
    rows = [(torch.tensor(s + e), torch.tensor([-100] * len(s) + e)) for s, e in zip(starts, ends, strict=True)]
    ids, labels = (pad_sequence(list(part), batch_first=True, padding_value=-100) for part in zip(*rows, strict=True))
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask, labels = (ids != -100).long(), labels[:, 1:]
    hidden = base.model(input_ids=ids * mask, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
    logits, targets = base.lm_head(hidden[labels != -100]).float(), labels[labels != -100]
    losses, hits = torch.nn.functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets
    return losses, (labels != -100).nonzero()[:, 0], hits


@torch.no_grad()
def measure(model: Any, tokenizer: Any, pairs: list[tuple[str, str]]) -> tuple[list[int], list[float]]:
    """Whether greedy decoding gives exactly the answer, and the answer's log-likelihood, by question."""
    right, nats = [0] * len(pairs), [0.0] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]))
    for chosen in (order[start : start + 32] for start in range(0, len(order), 32)):
        losses, rows, hits = answer_losses(model, tokenizer, [pairs[index] for index in chosen])
        for row, index in enumerate(chosen):
            right[index], nats[index] = int(hits[rows == row].all()), round(-losses[rows == row].sum().item(), 3)
    return right, nats


def fit(model: Any, tokenizer: Any, pairs: list[tuple[str, str]], rate: float, seed: int) -> None:
    """AdamW over the records in batches of 16: two passes up to 1,000 records, one above."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, rng = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0), random.Random(seed)
    orders = [rng.sample(pairs, len(pairs)) for _ in range(2 if len(pairs) <= 1000 else 1)]
    batches = [order[start : start + BATCH] for order in orders for start in range(0, len(order), BATCH)]
    for step, batch in enumerate(batches):
        warm, cool = (step + 1) / max(1, len(batches) // 10), (1 + math.cos(math.pi * step / len(batches))) / 2
        optimizer.param_groups[0]["lr"] = rate * min(1.0, warm) * cool
        answer_losses(model, tokenizer, batch)[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def shared(held: str, base: str, options: argparse.Namespace) -> Path:
    """A, B and M trained on the seven other sets (`factors`), and the model with them merged (`merged`)."""
    folder, part = options.out / held, options.out / f"{held}.part"
    if not folder.exists():
        tokenizer, sets = AutoTokenizer.from_pretrained(base, trust_remote_code=False), [n for n in SETS if n != held]
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False, dtype=torch.bfloat16)
        model = add_moslora(plain, MoSLoRAConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"))
        fit(model, tokenizer, [p for n in sets for p in questions(n, "learnt", SHARED_RECORDS)], SHARED_RATE, 0)
        save_adapter(model, part / "factors")
        merged: Any = merge(model)
        merged.save_pretrained(part / "merged")
        right = {name: measure(merged, tokenizer, questions(name, "validation"))[0] for name in sets}
        (part / "scores.json").write_text(json.dumps({name: sum(hits) / len(hits) for name, hits in right.items()}))
        rename(part, folder)
    return folder


def tenant(arm: str, folder: Path, seed: int) -> Any:
    """The merged shared model with an arm's adapter, which changes nothing yet."""
    base = AutoModelForCausalLM.from_pretrained(folder / "merged", trust_remote_code=False, dtype=torch.bfloat16)
    torch.manual_seed(seed)
    if arm.startswith("lora"):
        rank, targets = (16, "all-linear") if arm == "lora-16" else (1, FEW)
        config = MoSLoRAConfig(r=rank, lora_alpha=2 * rank, mixer_init="identity", mixer_trainable=False)
        return add_moslora(base, config, targets=targets)
    model = base if arm == "none" else load_adapter(base, folder / "factors", trainable=True)
    for _, layer in named_adapter_layers(model):
        a, b = (factors["default"].weight for factors in (layer.lora_A, layer.lora_B))
        if arm == "mixer-svd":  # LoRA-XS, arXiv 2405.17604: the leading directions of W, singular values in A
            left, values, right = torch.svd_lowrank(layer.get_base_layer().weight.float(), q=32, niter=4)
            a.data, b.data = values[:16, None] * right.T[:16], left[:, :16].contiguous()
        a.requires_grad_(False), b.requires_grad_(False)
        layer.lora_mixer["default"].weight.data.zero_()  # the shared M is merged: this is the tenant's M less it
    return model


def run(options: argparse.Namespace, base: str, held: str, arm: str, rate: float, seed: int) -> float:
    """One run, unless the archive has it; returns the mean loss of the answers."""
    key = {"held": held, "records": options.records, "arm": arm, "rate": round(rate, 6), "seed": seed}
    rows = [json.loads(line) for line in options.archive.read_text("utf-8").splitlines()]
    done = next((row for row in rows if key.items() <= row.items()), None)
    if done is None:
        began, folder = time.time(), shared(held, base, options)
        model, tokenizer = tenant(arm, folder, seed), AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad and arm != "none")
        if numbers:
            fit(model, tokenizer, questions(held, "learnt", options.records, seed), rate, seed)
        right, nats = measure(model, tokenizer, questions(held, "validation" if seed == TUNING_SEED else "test"))
        done = key | {"numbers": numbers, "seconds": round(time.time() - began), "loss": -sum(nats) / len(nats)}
        done |= {"shared": json.loads((folder / "scores.json").read_text()), "right": "".join(map(str, right))}
        with writing_in_place(options.archive, append=True) as file:
            file.write(json.dumps(done | {"nats": nats}) + "\n")
    return done["loss"] if math.isfinite(done["loss"]) else math.inf


def scores(rows: list[dict[str, Any]], of: str) -> dict[str, TaskScores]:
    """What questions scored (`right`), or their log-likelihoods (`nats`), by held-out set."""
    runs = {held: [row for row in rows if row["held"] == held] for held in dict.fromkeys(row["held"] for row in rows)}
    return {held: TaskScores(scores=[[float(x) for x in row[of]] for row in own], seeds=[row["seed"] for row in own],
                             clusters=[(held, x) for x in range(800)]) for held, own in runs.items()}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; differences in points and nats have their 95 % intervals and, in brackets, what would be detected."""
    rows = [row for row in rows if row.get("seed", TUNING_SEED) != TUNING_SEED]
    lines = [
        "| set, records | arm | score | less `lora-16` | less `lora-1` | nats less `lora-16` |",
        "| --- " * 6 + "|",
    ]
    blocks = dict.fromkeys(((row["held"],), row["records"]) for row in rows if row["arm"] == ARMS[-1])
    sets_of = {size: tuple(of[0] for of, n in blocks if n == size and of[0] in SETS) for _, size in blocks}
    for sets, size in [*blocks, *((sets, size) for size, sets in sets_of.items() if len(sets) > 1)]:
        block = [row for row in rows if row["records"] == size and row["held"] in sets]
        runs = {arm: [row for row in block if row["arm"] == arm] for arm in ("none", *ARMS)}
        means = {arm: arm_mean(scores(own, "right")) for arm, own in runs.items()}
        cells = {arm: [f"`{arm}`", f"{100 * e.value:.1f} ± {100 * e.stderr:.1f}"] for arm, e in means.items()}
        for reference, of, unit in (("lora-16", "right", 100), ("lora-1", "right", 100), ("lora-16", "nats", 1)):
            arms = {arm: scores(own, of) for arm, own in runs.items() if arm not in ("none", reference)}
            for arm, e in differences(arms, scores(runs[reference], of), bounded=unit > 1).items():
                numbers = (unit * x for x in (e.value, e.low, e.high, e.detectable()))
                cells[arm].append("{:+.2f} [{:+.2f}, {:+.2f}] ({:.2f})".format(*numbers))
            cells[reference].append("")
            cells["none"].append("")
        lines += [f"| {', '.join(sets)}, {size} | {' | '.join(line)} |" for line in cells.values()]
    return "\n".join(lines)


def main() -> None:
    """Run what the archive lacks, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", default=Path("runs/tenants"), help="shared factors and models")
    parser.add_argument("--held", default="thing,use,latin", help="held-out sets, separated by commas")
    parser.add_argument("--records", type=int, default=400, help="of a tenant (default: 400)")
    parser.add_argument("--seeds", type=int, default=5, help="reported runs of an arm (default: 5)")
    parser.add_argument("--archive", type=Path, default=ARCHIVE, help="file of the finished runs")
    parser.add_argument("--table", action="store_true", help="print the result so far, and train nothing")
    options = parser.parse_args()
    writing_in_place(options.archive, append=True).close()
    if options.table:
        print(table([json.loads(line) for line in options.archive.read_text("utf-8").splitlines()]))
        return
    base = str(model_assets.language_model(print))
    for held in options.held.split(","):
        run(options, base, held, "none", 0.0, 0)
        rates = {}
        for arm in ARMS:
            losses = {rate: run(options, base, held, arm, rate, TUNING_SEED) for rate in RATES}
            for _ in range(GROW):
                best = min(losses, key=losses.__getitem__)
                if best in (min(losses), max(losses)):
                    rate = best / FACTOR if best == min(losses) else best * FACTOR
                    losses[rate] = run(options, base, held, arm, rate, TUNING_SEED)
            rates[arm] = min(losses, key=losses.__getitem__)
        for seed in range(options.seeds):
            for arm, rate in rates.items():
                run(options, base, held, arm, rate, seed)


if __name__ == "__main__":
    main()
