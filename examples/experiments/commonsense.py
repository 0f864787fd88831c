#!/usr/bin/env python
"""Data of the commonsense experiment (section 4.1 of arXiv 2406.11909), in small and in full.

    python examples/experiments/commonsense.py small OUT                   real question sets, a few hundred questions
    python examples/experiments/commonsense.py full OUT COMMONSENSE_170K   LLM-Adapters' commonsense_170k.json

Both write what `mm-moslora compare` needs and print the command. The small sets are made from data that package
registries carry, with answers that are true by construction and are generated, as in LLM-Adapters.

- kind: the sentence of a Tux Paint stamp ("A snowy owl."), and which of eight kinds of thing it is;
- word: a WordNet definition (of timm's ImageNet files), and which of two words it defines.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SETS = ("kind", "word")
ARMS = "lora,moslora:kaiming,moslora:orthogonal,moslora:identity,moslora-init,tsm,dora,rslora,peft:HIRA@r=16"
KINDS = {
    "animals": "animal", "clothes": "clothing", "food": "food", "household": "household", "plants": "plant",
    "space": "space", "sports": "sport", "vehicles": "vehicle",
}  # fmt: skip
"""Folders of stamps with sentences about the kind of thing, and the answer word of each."""
RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a set."""

    set: str
    instruction: str
    answer: str


def kind_questions(stamps: Sequence[tuple[str, str]]) -> list[Question]:
    """Which of the eight kinds a thing is.

    Args:
        stamps: (sentence, folder).
    """
    return [
        Question(set="kind", instruction=f"What kind of thing is this? {sentence}", answer=KINDS[folder])
        for sentence, folder in stamps
    ]


def word_questions(words: Sequence[tuple[str, str]], rng: random.Random) -> list[Question]:
    """Which of two words a definition defines.

    Args:
        words: (word, definition).
        rng: picks the wrong word and the order.
    """
    questions = []
    for word, definition in words:
        wrong = rng.choice(words)[0]
        while wrong == word:
            wrong = rng.choice(words)[0]
        options = [word, wrong]
        rng.shuffle(options)
        text = f"Which word means {definition}: {' or '.join(options)}?"
        questions.append(Question(set="word", instruction=text, answer=word))
    return questions


def read_stamps(folder: Path) -> list[tuple[str, str]]:
    """(sentence, folder) of the stamps, every sentence once."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.txt")):
        top = file.relative_to(folder).parts[0]
        lines = file.read_text(encoding="utf-8").splitlines()
        if top in KINDS and lines:
            found.setdefault(lines[0].strip(), top)
    return sorted(found.items())


def read_words() -> list[tuple[str, str]]:
    """(word, definition) of the nouns of ImageNet's hierarchy, which timm carries; single words, short definitions."""
    from importlib import resources

    data = resources.files("timm.data") / "_info"

    def rows(name: str) -> dict[str, str]:
        text = (data / name).read_text(encoding="utf-8")
        return dict(line.split("\t", 1) for line in text.splitlines() if "\t" in line)

    lemmas, definitions = rows("imagenet_synset_to_lemma.txt"), rows("imagenet_synset_to_definition.txt")
    found: dict[str, str] = {}
    for synset, definition in definitions.items():
        word = lemmas[synset].split(",")[0].strip()
        if word.isalpha() and word.islower() and len(definition) <= 70 and word not in definition:
            found.setdefault(word, definition)
    return sorted(found.items())


def split_three(items: Sequence[Any], counts: tuple[int, int, int], rng: random.Random) -> tuple[list[Any], ...]:
    """Draw disjoint parts for training, validation and test."""
    drawn = rng.sample(list(items), sum(counts))
    first, second, _ = counts
    return drawn[:first], drawn[first : first + second], drawn[first + second :]


def build_small(
    stamps: Sequence[tuple[str, str]], words: Sequence[tuple[str, str]], out: Path, *, kinds: tuple[int, int, int],
    definitions: tuple[int, int, int], seed: int = 0,
) -> None:  # fmt: skip
    """Write `train.jsonl`, `validation.jsonl` and one test task per set.

    Args:
        stamps: (sentence, folder).
        words: (word, definition).
        out: folder.
        kinds: questions of `kind` for training, validation and test.
        definitions: likewise of `word`.
        seed: of the split.
    """
    rng = random.Random(f"commonsense {seed}")
    things, nouns = split_three(stamps, kinds, rng), split_three(words, definitions, rng)
    parts: list[list[Question]] = [
        [*kind_questions(s), *word_questions(w, rng)] for s, w in zip(things, nouns, strict=True)
    ]
    out.mkdir(parents=True, exist_ok=True)
    for name, questions in zip(("train", "validation"), parts, strict=False):
        rng.shuffle(questions)
        _write_lines(out / f"{name}.jsonl", [_record(f"{name}-{i}", q) for i, q in enumerate(questions)])
    for name in SETS:
        asked = [question for question in parts[2] if question.set == name]
        rows = [{"question_id": f"{name}-{i}", "text": q.instruction, "answer": q.answer} for i, q in enumerate(asked)]
        _write_lines(out / f"{name}.jsonl", rows)


def _record(name: str, question: Question) -> dict[str, Any]:
    turns = [{"from": "human", "value": question.instruction}, {"from": "gpt", "value": question.answer}]
    return {"id": name, "conversations": turns}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def convert_full(source: Path, out: Path) -> int:
    """LLM-Adapters' `commonsense_170k.json` as LLaVA JSONL; the chat template alpaca writes the prompt.

    Returns:
        How many records were written.
    """
    records = json.loads(source.read_text(encoding="utf-8"))
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, record in enumerate(records):
        question = "\n".join(filter(None, (record["instruction"], record.get("input"))))
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": record["output"]}]
        rows.append({"id": str(number), "conversations": turns})
    _write_lines(out, rows)
    return len(rows)


def write_recipe(name: str, out: Path, changes: dict[str, Any]) -> Path:
    """A recipe of this folder with paths filled in.

    Args:
        name: of the file in `recipes/`.
        out: where to write it.
        changes: dotted keys.
    """
    from mm_moslora.config import Recipe
    from mm_moslora.config.recipe_reading import set_dotted

    data = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        set_dotted(Recipe, data, key.split("."), value, key)
    out.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return out


def main() -> int:
    """Write the data and the recipe; print the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=("small", "full"))
    parser.add_argument("out", type=Path)
    parser.add_argument("source", type=Path, nargs="?", help="full: commonsense_170k.json")
    parser.add_argument(
        "--words", type=int, default=400,
        help="small: test questions of `word`, 5,000 at most (default: 400)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="small: another one draws all sets anew (default: 0)")
    options = parser.parse_args()
    if not 1 <= options.words <= 5000:
        parser.error(f"--words {options.words}: expected 1 to 5000")
    out = options.out.resolve()
    if options.size == "full":
        if options.source is None:
            parser.error("full needs the path of commonsense_170k.json (github.com/AGI-Edgerunners/LLM-Adapters)")
        count = convert_full(options.source, out / "commonsense_170k.jsonl")
        recipe = write_recipe(
            "commonsense_full", out / "recipe.yaml", {"data.train": [{"path": str(out / "commonsense_170k.jsonl")}]}
        )
        tasks = ",".join(f"commonsense_{name}@paper" for name in FULL_TASKS)
        print(f"{count} records. Now, with the test sets of LLM-Adapters in commonsense/:")
        print(
            f"mm-moslora compare {recipe} --arms lora,moslora:kaiming,moslora:orthogonal,dora --lr 5e-5,1e-4,3e-4 "
            f"--seeds 3 --tasks {tasks} --output {out / 'compare'}"
        )
        return 0
    from stamps import fetch_stamps

    from mm_moslora.quickstart import model_assets

    language, stamps = model_assets.language_model(print), fetch_stamps(print)
    build_small(
        read_stamps(stamps),
        read_words(),
        out,
        kinds=(100, 24, 300),
        definitions=(240, 76, options.words),
        seed=options.seed,
    )
    recipe = write_recipe(
        "commonsense_small", out / "recipe.yaml",
        {
            "model.language": str(language),
            "data.train": [{"path": str(out / "train.jsonl")}],
            "data.validation": [{"path": str(out / "validation.jsonl")}],
        },
    )  # fmt: skip
    tasks = ",".join(f"llava:{out / name}.jsonl" for name in SETS)
    print(
        f"mm-moslora compare {recipe} --arms {ARMS} --lr 2e-3,4e-3,8e-3 --seeds 6 --tasks {tasks} "
        f"--max-new-tokens 6 --batch-size 64 --output {out / 'compare'}"
    )
    return 0


FULL_TASKS = (
    "arc_easy", "openbookqa", "social_i_qa", "arc_challenge", "winogrande", "piqa", "boolq", "hellaswag",
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
