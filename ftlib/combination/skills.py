"""What a base can do before and after: answer questions, and write critiques."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from ftlib.cft import chains
from ftlib.cft.chains import Kind
from ftlib.cft.critiques import Form, write_critique
from ftlib.cft.data import Features, PaddingCollator
from ftlib.cft.evaluation import (
    LONGEST_ANSWER,
    LONGEST_CRITIQUE,
    VOCABULARY,
    ask,
    ask_critique,
    complete,
    read_answer,
)
from ftlib.cft.experiment import criticism, exams_of
from ftlib.cft.objective import masked_loss
from ftlib.cft.solutions import CHAIN, Solution
from ftlib.combination.settings import Settings
from ftlib.outcomes import Booleans
from ftlib.splits import Split
from ftlib.streams import stream

UNTRAINED: tuple[Form, ...] = ("verdict", "locate", "fix")
"""The forms of critiques that the base has learnt and no arm is trained on."""


class Skill(NamedTuple):
    """Prompts, and what should be written after each.

    Attributes:
        prompts: as tokens.
        expected: what should be read in the continuations.
        read: reads a continuation, given as tokens.
        longest: tokens after which a continuation is cut off.
    """

    prompts: list[list[int]]
    expected: list[str]
    read: Callable[[Sequence[int]], str | None]
    longest: int

    def right(self, model: nn.Module) -> Booleans:
        """Say which continuations of a model, written greedily, are right, [n]."""
        written = complete(model, self.prompts, self.longest)
        pairs = zip(written, self.expected, strict=True)
        return np.array([self.read(tokens) == wanted for tokens, wanted in pairs])


def answers(settings: Settings, split: Split, seed: int) -> dict[str, Skill]:
    """Draw a seed's exams, as CFT's chapter does: ``gap`` and ``no-gap`` questions."""
    return {
        kind: Skill(
            [ask(question) for question in exam.questions],
            exam.answers,
            read_answer,
            LONGEST_ANSWER,
        )
        for kind, exam in exams_of(settings.world, split, seed).items()
    }


def rederivations(settings: Settings, split: Split, seed: int) -> Skill:
    """Draw critiques as trained, of answers to gap questions that nobody trained on.

    Their solver is as mistaken as that of the homework.
    """
    world = settings.world
    asked, own = _asked(settings, split, "gap", seed)
    values = chains.attempt(asked, world.mistaken, own, world.base.misconceptions)
    given = chains.solutions(asked, values)
    right = chains.solutions(asked, chains.solve(asked))
    pairs = list(zip(given, right, strict=True))
    return Skill(
        [ask_critique(one.question, _tokens(one), "rederive") for one in given],
        [write_critique("rederive", *pair, CHAIN) for pair in pairs],
        VOCABULARY.decode,
        LONGEST_CRITIQUE,
    )


def other_critiques(settings: Settings, split: Split, seed: int) -> list[Features]:
    """Draw critiques in the untrained forms, as the base was pre-trained on them.

    They are of answers to no-gap questions, half of them with a slip.
    """
    asked, own = _asked(settings, split, "no-gap", seed)
    right = chains.solutions(asked, chains.solve(asked))
    slipped = chains.solutions(asked, chains.slip(asked, own))
    texts = []
    for index, reference in enumerate(right):
        form = UNTRAINED[index % len(UNTRAINED)]
        given = slipped[index] if index % 2 else reference
        critique = write_critique(form, given, reference, CHAIN)
        texts.append(criticism(given.question, _tokens(given), form, critique))
    return texts


@torch.no_grad()
def surprise(model: nn.Module, texts: list[Features]) -> float:
    """Return the cross-entropy of texts, in nats a token, the mean over texts."""
    device = next(model.parameters()).device
    batch = PaddingCollator()(texts)
    ids, labels = (batch[name].to(device) for name in ("input_ids", "labels"))
    return masked_loss(model, ids, labels).loss.item()


def _tokens(solution: Solution) -> list[int]:
    return VOCABULARY.encode(solution.text(CHAIN))


def _asked(
    settings: Settings, split: Split, kind: Kind, seed: int
) -> tuple[chains.Chains, int]:
    """Draw questions whose answers are to be criticised, and a seed for the answers."""
    own = stream(seed, f"{split} {kind} critiques")
    misconceptions = settings.world.base.misconceptions
    return chains.sample(settings.critiques, split, kind, own, misconceptions), own
