"""The circuit of chain arithmetic, found where the base can do it.

CT-SFT finds the heads of a task in a language in which the model can do the task, and
trains them in one in which it cannot. Here the task is to write the next value of a
solution. The base can do that on *no-gap* questions and often cannot on *gap*
questions: the former are its proxy language, the latter its target. The texts are the
solved no-gap questions of the homework itself. Nothing is shown that fine-tuning does
not show, and no counterfactual is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from transformers import GPT2LMHeadModel

from ftlib.cft.chains import LENGTH, MODULUS, Kind
from ftlib.cft.evaluation import VOCABULARY, ask, ask_critique
from ftlib.cft.experiment import base_model, homework
from ftlib.cft.settings import ChainSettings
from ftlib.cft.solutions import CHAIN, Solution
from ftlib.ctsft.batches import LabelledBatch
from ftlib.ctsft.decomposition import head_means, scores
from ftlib.ctsft.discovery import Circuit, Evidence
from ftlib.ctsft.evaluation import Questions

VALUES = [str(value) for value in range(MODULUS)]
_VALUE_TOKENS = [VOCABULARY.encode(value)[0] for value in VALUES]
Prompt = Callable[[str], list[int]]


def next_values(solutions: Sequence[Solution], prompt: Prompt = ask) -> Questions:
    """Ask for each value of some solutions, given the question and those before it.

    Args:
        solutions: right ones.
        prompt: what stands before a solution, from its question; of one length for
            all questions.

    Returns:
        A batch for each of the four steps. Label c is the value c, and every value is
        one token.
    """
    batches: list[LabelledBatch] = []
    for step in range(LENGTH):
        ids, labels = [], []
        for solution in solutions:
            claims = [s.claim for s in solution.steps]
            before = VOCABULARY.encode(" ".join(claims[:step]))
            ids.append([*prompt(solution.question), *before])
            labels.append(VALUES.index(claims[step]))
        batches.append(({"input_ids": torch.tensor(ids)}, torch.tensor(labels)))
    return Questions(batches, torch.tensor(_VALUE_TOKENS))


def evidence(
    world: ChainSettings, kind: Kind, seed: int, critiques: bool = False
) -> Evidence:
    """Return what a circuit is found by, and judged by: halves of a seed's homework.

    Args:
        world: of the homework.
        kind: of its questions: with gap or without.
        seed: of the homework.
        critiques: ask for the values as a critique of the question's response gives
            them, and not an answer.
    """
    work = homework(world, seed)
    gaps = round(world.questions * world.gap_share)
    rows = slice(gaps) if kind == "gap" else slice(gaps, None)
    responses = {r.question: VOCABULARY.encode(r.text(CHAIN)) for r in work.responses}

    def criticise(question: str) -> list[int]:
        return ask_critique(question, responses[question], "rederive")

    solved = work.references[rows]
    prompt = criticise if critiques else ask
    return Evidence(next_values(solved[::2], prompt), next_values(solved[1::2], prompt))


def circuit_in(model: GPT2LMHeadModel, asked: Questions, heads: int) -> Circuit:
    """Score a model's heads by contextual decomposition, and take the best.

    Args:
        model: whose heads.
        asked: texts that it is found by.
        heads: how many, a budget: nothing is chosen by faithfulness.
    """
    batches, tokens = asked
    means = head_means(model, batches, classes=len(tokens))
    return Circuit(scores(model, batches, means, tokens), means, [], heads)


@functools.lru_cache(maxsize=4)
def circuit_of(world: ChainSettings, heads: int, seed: int) -> Circuit:
    """Find the circuit of a seed's base, on no-gap questions alone."""
    model = base_model(world.base, seed)
    return circuit_in(model, evidence(world, "no-gap", seed).found, heads)
