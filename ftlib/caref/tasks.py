r"""Few-shot tasks with explanations, in the format of the benchmark FEB.

A model reads a prompt and writes ``LABEL because EXPLANATION``. FEB (Marasović et al.
2022, code: github.com/allenai/feb) fixes the prompts, draws 48 examples to train on and
350 to evaluate with for each of 60 seeds, and counts a label as right where it is the
gold one, case aside. The seeds here draw other examples than FEB's.

What is not FEB's, because of the data at hand:

* e-SNLI: only dev and test are here, tokenised. Training examples come from dev and
  items of evaluation from test (FEB: from train and dev). A training example of dev has
  three explanations and shows one, drawn by the seed.
* ComVE: the files do not say which sentence came first. A hash of the pair decides. In
  dev, where the evaluation is, there are two right reasons (FEB: three).
* CoS-E: version 1.0, as in FEB. FEB advises against it.
* ECQA: its text is not here; :func:`ftlib.data.ecqa` says where it is.

FEB also writes ``</s>`` after the prompts of ComVE and CoS-E. T5's tokenizer ends every
text with that token, once, so the prompts here leave it out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np

from ftlib.data import ExplainedQuestion, comve, cose, ecqa, esnli

Part = Literal["train", "evaluation"]

SEPARATOR = "because"
UNKNOWN = "UNK"
"""Stands for the explanation of an output that has none, as in FEB."""
SHOTS = 48
EVALUATION = 350


class Item(NamedTuple):
    """What the model is asked, and what would be right.

    Attributes:
        prompt: the model's input.
        label: the gold label.
        explanations: gold explanations, lower-cased; a training example has one.
    """

    prompt: str
    label: str
    explanations: tuple[str, ...]

    @property
    def target(self) -> str:
        """What the model learns to write, with the first explanation."""
        return f"{self.label} {SEPARATOR} {self.explanations[0]}"


class Output(NamedTuple):
    """What a model wrote, taken apart."""

    label: str
    explanation: str


class Task(NamedTuple):
    """One data set in FEB's format.

    Attributes:
        labels: the classes that samples are balanced over; empty where items have
            choices of their own.
        items: all items of a part, with all their explanations.
    """

    labels: tuple[str, ...]
    items: Callable[[Part], list[Item]]


class FewShot(NamedTuple):
    """What one seed trains on and is evaluated with."""

    train: list[Item]
    evaluation: list[Item]


def few_shot(
    task: str, seed: int, shots: int = SHOTS, evaluation: int = EVALUATION
) -> FewShot:
    """Draw the examples of one seed, in random order.

    With classes, every one gets the same number, rounded down: 16 of each to train on
    and 116 to evaluate with for the three of e-SNLI, which makes 348.

    Args:
        task: ``esnli``, ``comve``, ``cose`` or ``ecqa``.
        seed: of the draw.
        shots: how many examples to train on.
        evaluation: how many items to evaluate with.

    Raises:
        ValueError: there is no such task, or not that many items.
        DataUnavailable: the data is nowhere to be found.
    """
    if task not in TASKS:
        raise ValueError(f"no task {task!r}: choose one of {', '.join(TASKS)}")
    labels, items = TASKS[task]
    rng = np.random.default_rng(seed)
    train = _draw(items("train"), labels, shots, rng)
    return FewShot(
        [_with_one_explanation(item, rng) for item in train],
        _draw(items("evaluation"), labels, evaluation, rng),
    )


def read(text: str) -> Output:
    """Take an output apart as FEB does.

    The label stands before the first ``because``, the explanation between that and the
    second, if there is one: a longer explanation is cut there. Without ``because`` the
    whole text is the label, and the explanation is ``UNK``.
    """
    label, *rest = text.split(SEPARATOR)
    return Output(label.strip(), rest[0].strip() if rest else UNKNOWN)


def _esnli(part: Part) -> list[Item]:
    return [
        _item(
            f"explain nli hypothesis: {row['hypothesis']} premise: {row['premise']}",
            row["label"],
            row["explanations"],
        )
        for row in esnli("dev" if part == "train" else "test")
    ]


def _comve(part: Part) -> list[Item]:
    rows = comve("train" if part == "train" else "dev")
    return [
        _nonsense(row["sense"], row["nonsense"], row["reasons"])
        for row in rows
        if row["sense"].lower() != row["nonsense"].lower()
    ]


def _nonsense(sense: str, nonsense: str, reasons: Sequence[str]) -> Item:
    """Ask which of two sentences is nonsense; a hash decides which is first."""
    second = hashlib.sha256(f"{sense}\n{nonsense}".encode()).digest()[0] % 2
    one, two = (sense, nonsense) if second else (nonsense, sense)
    return _item(
        "explain what is more nonsensical? \\n "
        f"choice1: {one.lower()} choice2: {two.lower()}",
        f"choice{second + 1}",
        reasons,
    )


def _cose(part: Part) -> list[Item]:
    return _questions(cose("train" if part == "train" else "dev"))


def _ecqa(part: Part) -> list[Item]:
    return _questions(ecqa())


def _questions(rows: Sequence[ExplainedQuestion]) -> list[Item]:
    return [
        _item(
            rf"explain {row['question'].lower()} \n {_listed(row['choices'])}",
            row["answer"].lower(),
            [row["explanation"]],
        )
        for row in rows
    ]


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "esnli": Task(("entailment", "neutral", "contradiction"), _esnli),
        "comve": Task(("choice1", "choice2"), _comve),
        "cose": Task((), _cose),
        "ecqa": Task((), _ecqa),
    }
)


def _item(prompt: str, label: str, explanations: Sequence[str]) -> Item:
    tidied = tuple(_tidy(explanation.lower()) for explanation in explanations)
    return Item(_tidy(prompt), _tidy(label), tidied)


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _listed(choices: Sequence[str]) -> str:
    pairs = zip("ABCDE", choices, strict=False)
    return " ".join(f"({letter}) {choice.lower()}" for letter, choice in pairs)


def _draw(
    items: Sequence[Item], labels: Sequence[str], n: int, rng: np.random.Generator
) -> list[Item]:
    """Draw different items, equally many of each label where there are labels."""
    groups = [[item for item in items if item.label == label] for label in labels]
    drawn = []
    for group in groups or [list(items)]:
        share = n // (len(labels) or 1)
        if share > len(group):
            raise ValueError(f"asked for {share} items of a kind, found {len(group)}")
        drawn += [group[i] for i in rng.choice(len(group), share, replace=False)]
    return [drawn[i] for i in rng.permutation(len(drawn))]


def _with_one_explanation(item: Item, rng: np.random.Generator) -> Item:
    shown = item.explanations[rng.integers(len(item.explanations))]
    return item._replace(explanations=(shown,))
