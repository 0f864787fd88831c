"""Visual instruction data from easy-VQA and Tux Paint's stamps: LLaVA training files and held-out questions.

All answers come from the data sets' own questions, sentences and folders. The same arguments give the same bytes.
Yes/no questions are balanced per question text, so a model without a picture scores one half, even if it knows all
statistics of the questions.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_moslora.utils.errors import ConfigError, DataError
from mm_moslora.utils.files import mark, read_json, replace_text
from mm_moslora.utils.folder_marks import refuse_strangers

YES_NO = ("yes", "no")
COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

DATA_SET = "data-set"
"""Kind of the mark in a folder that a builder wrote."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DatasetFiles:
    """The files of a builder."""

    images: Path
    """Root of the image paths in the files."""
    align: Path
    """LLaVA JSONL, one short answer per training picture: for the projector."""
    train: Path
    """LLaVA JSONL, several questions per training picture in one conversation."""
    test: Path
    """Held-out questions, one JSON object per line: question_id, image, text, answer, category."""
    train_pictures: int = 0
    """Pictures in `train`."""
    questions: int = 0
    """Questions in `test`."""

    @classmethod
    def below(cls, out: Path, images: Path, *, train_pictures: int = 0, questions: int = 0) -> DatasetFiles:
        """The paths of a builder's files, which need not exist."""
        return cls(
            images=images,
            align=out / "align.jsonl",
            train=out / "train.jsonl",
            test=out / "test.jsonl",
            train_pictures=train_pictures,
            questions=questions,
        )


@dataclass(frozen=True, kw_only=True)
class ImageQuestion:
    """One question about one picture."""

    image: str
    text: str
    answer: str

    @property
    def category(self) -> str:
        """yes_no or open."""
        return "yes_no" if self.answer in YES_NO else "open"


def build_easy_vqa(
    source: Path,
    out: Path,
    *,
    train_images: int = 4000,
    test_questions: int = 600,
    turns: int = 6,
    seed: int = 0,
    replace: bool = True,
) -> DatasetFiles:
    """Write files of the training half, and held-out questions, half open and half yes/no, equal for every seed."""
    if turns < 1:
        raise DataError(f"turns is {turns}, expected at least 1 question per conversation.")
    rng, held_out_rng = random.Random(f"easy-vqa {seed}"), random.Random("easy-vqa held-out")
    by_image = _easy_questions(source, "train")
    described = [image for image in sorted(by_image) if easy_caption(by_image[image])]
    wordings = yes_no_wordings(question.text for questions in by_image.values() for question in questions)
    conversations, captions = [], []
    for image in rng.sample(described, min(train_images, len(described))):
        caption = str(easy_caption(by_image[image]))
        questions = _arranged(by_image[image], caption, wordings, turns, rng)
        conversations.append(conversation(f"easy-vqa/{image}", image, [(q.text, q.answer) for q in questions]))
        captions.append(conversation(f"easy-vqa/{image}", image, [("what is in the image?", caption)]))
    held_out = _easy_test(_easy_questions(source, "test"), test_questions, held_out_rng)
    return write_files(out, source, captions, conversations, held_out, replace=replace)


def _easy_questions(source: Path, half: str) -> dict[str, list[ImageQuestion]]:
    path = source / half / "questions.json"
    try:
        rows = read_json(path, list)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as easy-VQA's questions ({error}). Delete {source} and run again."
        ) from error
    grouped: dict[str, list[ImageQuestion]] = defaultdict(list)
    for text, answer, image_id in rows:
        image = f"{half}/images/{image_id}.png"
        grouped[image].append(ImageQuestion(image=image, text=text, answer=answer))
    return dict(grouped)


def balanced_yes_no(questions: Sequence[ImageQuestion], rng: random.Random) -> dict[str, list[ImageQuestion]]:
    """Keep every open question, and per yes/no text as many yes as no answers; return them by picture."""
    balanced: dict[str, list[ImageQuestion]] = defaultdict(list)
    pools: dict[str, dict[str, list[ImageQuestion]]] = defaultdict(lambda: {answer: [] for answer in YES_NO})
    for question in questions:
        if question.category == "open":
            balanced[question.image].append(question)
        else:
            pools[question.text][question.answer].append(question)
    for text in sorted(pools):
        yes, no = pools[text]["yes"], pools[text]["no"]
        count = min(len(yes), len(no))
        for question in rng.sample(yes, count) + rng.sample(no, count):
            balanced[question.image].append(question)
    return dict(balanced)


@dataclass(frozen=True)
class Wording:
    """A yes/no question with a placeholder for a color or a shape, such as `is there not a {} shape?`."""

    text: str
    is_color: bool
    negated: bool


def yes_no_wordings(texts: Iterable[str]) -> list[Wording]:
    """The package's wordings of yes/no questions, without duplicates, sorted by text."""
    wordings = set()
    for text in texts:
        words = text.rstrip("?").split()
        if words[0] in ("what", "which"):
            continue
        for word in (*COLORS, *SHAPES):
            if word in words:
                wordings.add(Wording(text.replace(word, "{}"), word in COLORS, bool({"no", "not"} & set(words))))
    return sorted(wordings, key=lambda wording: wording.text)


def asked_yes_no(
    image: str, caption: str, wordings: Sequence[Wording], count: int, rng: random.Random
) -> list[ImageQuestion]:
    """Ask yes/no questions about a picture of known content, with equal numbers of yes and no, or one more."""
    # The package has few yes/no questions per picture, and their answers are unbalanced. This function draws the answer
    # first, so that over many pictures every text has as many yes as no answers.
    _, color, shape = caption.split()
    by_kind = [[wording for wording in wordings if wording.is_color == kind] for kind in (True, False)]
    kinds = [members for members in by_kind if members]
    first = rng.randrange(2)
    answers = [YES_NO[(first + index) % 2] for index in range(count)]
    rng.shuffle(answers)
    questions = []
    for answer in answers:
        wording = rng.choice(rng.choice(kinds))
        own, all_words = (color, COLORS) if wording.is_color else (shape, SHAPES)
        present = (answer == "yes") != wording.negated
        word = own if present else rng.choice([other for other in all_words if other != own])
        questions.append(ImageQuestion(image=image, text=wording.text.format(word), answer=answer))
    return questions


OPEN_TURNS = 2
"""Open questions per conversation; the rest are yes/no. After an open question, the conversation itself answers most
yes/no questions, from which the model first learns to compare in text."""


def _arranged(
    questions: Sequence[ImageQuestion], caption: str, wordings: Sequence[Wording], turns: int, rng: random.Random
) -> list[ImageQuestion]:
    """Choose the turns, in random order: a conversation never answers its first question, so each kind comes first."""
    open_questions = [question for question in questions if question.category == "open"]
    chosen = rng.sample(open_questions, min(OPEN_TURNS, len(open_questions)))[:turns]
    chosen += asked_yes_no(questions[0].image, caption, wordings, turns - len(chosen), rng)
    return rng.sample(chosen, len(chosen))


def easy_caption(questions: Iterable[ImageQuestion]) -> str | None:
    """Return ``a red circle`` from the questions and answers, or None where they leave color or shape open."""
    color = shape = None
    for question in questions:
        words = question.text.rstrip("?").split()
        # A color or shape in a question is present, unless a yes/no answer denies it.
        stated = question.category == "open" or (question.answer == "yes") != bool({"no", "not"} & set(words))
        for word in (question.answer, *(words if stated else ())):
            color = word if word in COLORS else color
            shape = word if word in SHAPES else shape
    return f"a {color} {shape}" if color and shape else None


def _easy_test(by_image: dict[str, list[ImageQuestion]], count: int, rng: random.Random) -> list[Record]:
    """Half open questions, half yes/no in pairs of the same text, one with the answer yes and one with no."""
    everything = [question for image in sorted(by_image) for question in by_image[image]]
    balanced = [
        question for image, questions in sorted(balanced_yes_no(everything, rng).items()) for question in questions
    ]
    open_questions = [question for question in balanced if question.category == "open"]
    pairs = _pairs([question for question in balanced if question.category == "yes_no"], rng)
    chosen = rng.sample(open_questions, min(count // 2, len(open_questions)))
    for yes, no in rng.sample(pairs, min(count // 4, len(pairs))):
        chosen += [yes, no]
    return [question_record(f"easy-vqa-{index}", item, item.category) for index, item in enumerate(chosen)]


def _pairs(questions: Sequence[ImageQuestion], rng: random.Random) -> list[tuple[ImageQuestion, ImageQuestion]]:
    by_text: dict[str, dict[str, list[ImageQuestion]]] = defaultdict(lambda: {answer: [] for answer in YES_NO})
    for question in questions:
        by_text[question.text][question.answer].append(question)
    pairs = []
    for text in sorted(by_text):
        yes, no = (rng.sample(by_text[text][answer], len(by_text[text][answer])) for answer in YES_NO)
        pairs += list(zip(yes, no, strict=False))
    return pairs


def yes_no_questions(
    text: str, inside: Sequence[str], outside: Sequence[str], rng: random.Random
) -> list[ImageQuestion]:
    """As many pictures with the answer yes as with the answer no, so that the question does not reveal the answer."""
    count = min(len(inside), len(outside))
    return [
        ImageQuestion(image=image, text=text, answer=answer)
        for answer, images in zip(YES_NO, (inside, outside), strict=True)
        for image in rng.sample(images, count)
    ]


def conversation(record_id: str, image: str, turns: Sequence[tuple[str, str]]) -> Record:
    """Return a LLaVA training record; the image comes first, in the first question."""
    messages = []
    for index, (question, answer) in enumerate(turns):
        messages.append({"from": "human", "value": f"<image>\n{question}" if index == 0 else question})
        messages.append({"from": "gpt", "value": answer})
    return {"id": record_id, "image": image, "conversations": messages}


def question_record(question_id: str, question: ImageQuestion, category: str) -> Record:
    """Return a held-out question in LLaVA's layout, with its answer."""
    return {
        "question_id": question_id,
        "image": question.image,
        "text": question.text,
        "answer": question.answer,
        "category": category,
    }


def claim(out: Path, names: Sequence[str]) -> None:
    """Create a folder for data sets, or reuse an existing one."""
    refuse_strangers(out, names, kind=DATA_SET)
    out.mkdir(parents=True, exist_ok=True)
    mark(out, DATA_SET)


def write_files(
    out: Path,
    images: Path,
    align: Sequence[Record],
    train: Sequence[Record],
    test: Sequence[Record],
    *,
    replace: bool = True,
) -> DatasetFiles:
    """Write the three files; without `replace` existing ones must be the same, since a model was trained on them."""
    files = {"align": align, "train": train, "test": test}
    if empty := [name for name, records in files.items() if not records]:
        raise DataError(f"No records for {', '.join(empty)} from {images}; is the folder complete?")
    training_images = {record["image"] for record in (*align, *train)}
    assert not training_images & {record["image"] for record in test}, "a picture is on both sides of the split"
    texts = {
        out / f"{name}.jsonl": "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        for name, records in files.items()
    }
    claim(out, [path.name for path in texts])
    if not replace and (changed := [path.name for path, text in texts.items() if _differs(path, text)]):
        raise ConfigError(
            f"{out} holds other data than requested, in {', '.join(changed)}, and a model was trained on them. "
            "They are left as they are. Restore them, choose another --output, or delete the folder of the run."
        )
    for path, text in texts.items():
        replace_text(path, text)
    return DatasetFiles.below(
        out, images, train_pictures=len({record["image"] for record in train}), questions=len(test)
    )


def _differs(path: Path, text: str) -> bool:
    try:
        return path.read_bytes() != text.encode()
    except FileNotFoundError:
        return False
