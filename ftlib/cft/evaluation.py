"""Ask the tiny model, let it answer and criticise, and score what it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from ftlib.cft import chains
from ftlib.cft.chains import Booleans, Kind, Vocabulary
from ftlib.cft.critiques import Form, read_verdict
from ftlib.cft.solutions import CHAIN
from ftlib.outcomes import outcome_metrics
from ftlib.results import Metric
from ftlib.sequences import left_padded

Answer = TypeVar("Answer")

KINDS: tuple[Kind, ...] = ("gap", "no-gap")
# A question is asked by `=`, and a critique by its form's name.
VOCABULARY = Vocabulary(["=", *get_args(Form)])
CONTEXT = 48
LONGEST_ANSWER = 12  # twice what an answer takes, for those that ramble
LONGEST_CRITIQUE = 20
ROUNDS = 8  # of self-critique, the most that the paper allows


def ask(question: str) -> list[int]:
    """The prompt after which a model answers: the same for all arms."""
    return VOCABULARY.encode(f"{question} =")


def ask_critique(question: str, response: Sequence[int], form: Form) -> list[int]:
    """The prompt after which a model criticises a response, given as tokens."""
    return [*ask(question), *response, *VOCABULARY.encode(form)]


@torch.no_grad()
def complete(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    end: int = VOCABULARY.end,
) -> list[list[int]]:
    """Continue every prompt, greedily or by sampling from the whole vocabulary.

    Args:
        model: a causal language model of transformers.
        prompts: token ids, at least one prompt; they may differ in length.
        max_new_tokens: where a continuation is cut off.
        temperature: 0 takes the most probable token; otherwise samples are drawn from
            torch's global generator.
        end: the token that ends a continuation, also used for padding; by default that
            of ``VOCABULARY``.

    Returns:
        The tokens written for each prompt, the end token included where it was reached.
    """
    generator: Any = model
    device = next(model.parameters()).device
    padded, real = left_padded(prompts, end)
    sampling = {"temperature": temperature, "top_k": 0} if temperature else {}
    was_training = model.training
    model.eval()
    tokens = generator.generate(
        padded.to(device),
        attention_mask=real.to(device),
        generation_config=GenerationConfig(
            do_sample=bool(temperature),
            max_new_tokens=max_new_tokens,
            eos_token_id=end,
            pad_token_id=end,
            **sampling,
        ),
    )
    model.train(was_training)
    return [_up_to(row, end) for row in tokens[:, padded.shape[1] :].tolist()]


def _up_to(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


# -- exams -----------------------------------------------------------------------------


class Exam(NamedTuple):
    """Questions of one kind, of a split that nothing was trained on.

    Attributes:
        questions: their texts.
        answers: the right ones.
    """

    questions: list[str]
    answers: list[str]


Exams = dict[Kind, Exam]


def read_answer(written: Sequence[int]) -> str | None:
    """Take the number after the last answer mark, wherever it stands; None without.

    This is lenient, as the paper's reading of the last box is: what else was written
    is a matter of the format, see :func:`is_well_formed`.
    """
    _, mark, after = VOCABULARY.decode(written).rpartition(CHAIN.answer_mark)
    number = after.split()[:1]
    return number[0] if mark and number and number[0].isdecimal() else None


def is_well_formed(question: str, written: Sequence[int]) -> bool:
    """Whether a solution and nothing else was written, and brought to its end."""
    solution = chains.read(question, VOCABULARY.decode(written))
    return VOCABULARY.end in written and bool(solution.answer)


def answer(model: nn.Module, exam: Exam, temperature: float = 0.0) -> list[list[int]]:
    """Let a model answer an exam directly; the tokens it writes."""
    prompts = [ask(question) for question in exam.questions]
    return complete(model, prompts, LONGEST_ANSWER, temperature)


def grade(exam: Exam, answers: Sequence[str | None]) -> Booleans:
    """Which answers are right, [n]."""
    pairs = zip(answers, exam.answers, strict=True)
    return np.array([given == expected for given, expected in pairs])


def scores(model: nn.Module, exams: Exams) -> dict[str, Metric]:
    """Shares of right and of well-formed greedy answers.

    Returns:
        ``gap`` and ``no-gap``, how many are right; ``accuracy``, their mean; and
        ``gap valid`` and ``no-gap valid``, how many are well formed.
    """
    return _scores(exams, _greedy(model, exams))


def scores_and_outcomes(model: nn.Module, exams: Exams) -> dict[str, Metric]:
    """:func:`scores`, and the outcome of every problem: see :mod:`ftlib.outcomes`."""
    written = _greedy(model, exams)
    metrics = _scores(exams, written)
    for kind, exam in exams.items():
        right = grade(exam, [read_answer(tokens) for tokens in written[kind]])
        metrics |= outcome_metrics(kind, right)
    return metrics


def _greedy(model: nn.Module, exams: Exams) -> dict[Kind, list[list[int]]]:
    return {kind: answer(model, exam) for kind, exam in exams.items()}


def _scores(
    exams: Exams, written: Mapping[Kind, Sequence[Sequence[int]]]
) -> dict[str, Metric]:
    metrics: dict[str, Metric] = {}
    accuracies = []
    for kind, exam in exams.items():
        n = len(exam.answers)
        right = grade(exam, [read_answer(tokens) for tokens in written[kind]])
        pairs = zip(exam.questions, written[kind], strict=True)
        valid = [is_well_formed(question, tokens) for question, tokens in pairs]
        accuracies.append(float(right.mean()))
        metrics[kind] = Metric(accuracies[-1], n)
        metrics[f"{kind} valid"] = Metric(float(np.mean(valid)), n)
    asked = sum(len(exam.answers) for exam in exams.values())
    return {"accuracy": Metric(float(np.mean(accuracies)), asked), **metrics}


# -- self-critique at inference --------------------------------------------------------


def compare(model: nn.Module, exam: Exam, temperature: float) -> dict[str, Metric]:
    """Direct, self-critique and majority at one temperature, with the tokens written.

    The vote has whole rounds of direct answers, as many as the tokens that
    self-critique wrote pay for; prompts are not counted.
    """
    direct = answer(model, exam, temperature)
    revised, budget = self_critique(model, exam, direct, temperature)
    rounds, spent = [direct], [_tokens(direct)]
    while sum(spent) < budget:
        rounds.append(answer(model, exam, temperature))
        spent.append(_tokens(rounds[-1]))
    votes = votes_within(budget, spent)
    ballots = [[read_answer(tokens) for tokens in given] for given in rounds[:votes]]
    voted = [majority(ballot) for ballot in zip(*ballots, strict=True)]
    n = len(exam.answers)
    answers = {
        "direct": ballots[0],
        "self-critique": [read_answer(tokens) for tokens in revised],
        "majority": voted,
    }
    shares = {
        name: Metric(float(grade(exam, given).mean()), n)
        for name, given in answers.items()
    }
    costs = {
        "direct": spent[0],
        "self-critique": budget,
        "majority": sum(spent[:votes]),
    }
    return shares | {f"{name} tokens": Metric(c / n, n) for name, c in costs.items()}


def self_critique(
    model: nn.Module,
    exam: Exam,
    written: Sequence[Sequence[int]],
    temperature: float,
) -> tuple[list[list[int]], int]:
    """Let a model criticise its answers, and answer again what it calls wrong.

    Every answer is judged until it is called right, or has been replaced
    ``ROUNDS`` times. A critique without a verdict lets it stand.

    Args:
        model: the model.
        exam: n questions.
        written: its first answers, as tokens.
        temperature: of critiques and new answers.

    Returns:
        The last answers, and how many tokens were written, first answers included.
    """
    current = [list(tokens) for tokens in written]
    total = _tokens(current)
    open_ = list(range(len(current)))
    for _ in range(ROUNDS):
        prompts = [
            ask_critique(exam.questions[i], _without_end(current[i]), "rederive")
            for i in open_
        ]
        critiques = complete(model, prompts, LONGEST_CRITIQUE, temperature)
        total += _tokens(critiques)
        open_ = [
            i
            for i, critique in zip(open_, critiques, strict=True)
            if read_verdict(VOCABULARY.decode(critique)) == "wrong"
        ]
        if not open_:
            break
        asked = Exam(
            [exam.questions[i] for i in open_], [exam.answers[i] for i in open_]
        )
        again = answer(model, asked, temperature)
        total += _tokens(again)
        for i, tokens in zip(open_, again, strict=True):
            current[i] = tokens
    return current, total


def _tokens(written: Iterable[Sequence[int]]) -> int:
    return sum(map(len, written))


def _without_end(tokens: list[int]) -> list[int]:
    return tokens[:-1] if tokens[-1:] == [VOCABULARY.end] else tokens


def majority(answers: Sequence[Answer | None]) -> Answer | None:
    """The most frequent answer; the first given among equals; None if there is none.

    Args:
        answers: a problem's, None where one could not be read; those do not vote.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def votes_within(budget: int, spent: Sequence[int]) -> int:
    """How many whole rounds of votes a budget of generated tokens pays for.

    Args:
        budget: tokens that may be generated for all problems together.
        spent: tokens of each round, one answer to every problem, in order.

    Returns:
        The rounds that fit, at least one, since a vote needs an answer.
    """
    return max(1, int((np.cumsum(spent) <= budget).sum()))
