"""The CFT experiments: arms × seeds → records.

A tiny GPT is pre-trained once per seed on chain arithmetic by a solver who is mostly
mistaken on one kind of question (a *gap*), and on critiques of answers to the other
kind. Every arm fine-tunes that base on the same questions, with the same steps and
batch. What differs is what it is shown and what it has to write:

=====================  ==============  =================  ==========================
arm                    prompt          loss falls on      right solutions it is told
=====================  ==============  =================  ==========================
SFT noisy              question        response           those among the responses
SFT verified           question        right response     of those questions
SFT teacher            question        solution           all
CFT verdict            and response    right or wrong     none
CFT locate             and response    first wrong step   none
CFT fix                and response    that step, right   one step of each
CFT rederive           and response    solution, verdict  all
=====================  ==============  =================  ==========================

What was expected, before anything was run:

* CFT rederive beats SFT noisy by 30 points or more on gap questions. This is the
  claim that is tested.
* CFT rederive is at most as good as SFT teacher, which is told the same solutions.
* Verdict, locate and fix transfer little to answering.
* A shuffled response does as well as the question's own: what helps is the right
  solution in the target.
* Slips without a system harm SFT little, since the most frequent result stays right.
* A base that never saw a critique forgets how to answer, under CFT.

Trial runs, with other questions than the recorded ones, came between these
expectations and the records. The sizes were chosen by what the base and SFT teacher
did in them, but the other arms were seen too. On one early base (one misconception, a
solver always mistaken, a higher learning rate, verdicts of one token) CFT rederive
reached 15 % of gap questions where SFT teacher reached 94 %, and harmed no-gap ones.
With this code a base like it took up critiques (68 %); what made the difference was
not looked for.

The experiments: ``chains`` (the table), ``controls``, ``equal-tokens`` (each CFT arm
takes as many steps as make its target tokens those of SFT), ``never-criticised`` and
``always-mistaken`` (other bases), ``noise`` (how often the responses' solver is
mistaken), ``inference`` (criticising one's own answer, against a vote of as many
tokens), and ``learning-rate`` (how each arm's was chosen). At scale gpu there are
others, on a real language model: see :mod:`ftlib.cft.gsm8k`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from transformers import GPT2LMHeadModel

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.cft import chains
from ftlib.cft.chains import Chains, Kind
from ftlib.cft.critiques import (
    Form,
    is_right,
    write_critique,
    write_wrong_critique,
)
from ftlib.cft.data import Features, PaddingCollator, supervise
from ftlib.cft.evaluation import (
    CONTEXT,
    KINDS,
    ROUNDS,
    VOCABULARY,
    Exam,
    Exams,
    answer,
    ask,
    ask_critique,
    compare,
    grade,
    read_answer,
    scores,
    scores_and_outcomes,
)
from ftlib.cft.finetuning import (
    Snapshots,
    Tuned,
    mean_target_tokens,
    strangers,
)
from ftlib.cft.gsm8k import gsm8k_arms
from ftlib.cft.objective import Learner, training_loss
from ftlib.cft.settings import (
    CHAINS,
    CONTROLS,
    EQUAL_TOKENS,
    LEARNING_RATES,
    MAIN,
    NOISE,
    ON_OTHER_BASES,
    OTHER_BASES,
    TEMPERATURES,
    TRIED_LEARNING_RATES,
    TUNING_SEED,
    BaseSettings,
    ChainSettings,
    Recipe,
    Stages,
)
from ftlib.cft.solutions import CHAIN, Solution
from ftlib.experiments import Arm
from ftlib.models.tiny import tiny_gpt
from ftlib.results import Metric
from ftlib.runtime import Scale
from ftlib.splits import Split
from ftlib.streams import generator, stream
from ftlib.training import train

Metrics = Mapping[str, Metric | float]

FORMS: tuple[Form, ...] = get_args(Form)


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the method: chain arithmetic at cpu, GSM8K at gpu."""
    return chain_arms() if scale == "cpu" else gsm8k_arms()


def chain_arms(world: ChainSettings = CHAINS) -> list[Arm]:
    """All arms on chain arithmetic; those of the tuning first."""
    compared = conditions(world)
    tuned = [c for c in compared if c.tuned_as == str(c) and c.stages]
    return [
        *(_tuning_arm(c, rate) for rate in TRIED_LEARNING_RATES for c in tuned),
        *(_arm(c) for c in compared),
        *(_inference_arm(name, world) for name in ("base", "CFT rederive")),
    ]


@dataclass(frozen=True)
class Condition:
    """What a base is fine-tuned on, and how.

    Attributes:
        experiment: in which it is compared with others.
        name: unique there.
        stages: the recipes; none leaves the base as it is.
        world: questions, steps, batch, base.
        tuned_as: the condition whose learning rate it takes; by default its own.
        equal_tokens: take so many steps that the target tokens seen are those of SFT.
    """

    experiment: str
    name: str
    stages: Stages
    world: ChainSettings
    tuned_as: str = ""
    equal_tokens: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tuned_as", self.tuned_as or str(self))

    def __str__(self) -> str:
        return f"{self.experiment}/{self.name}"

    @property
    def learning_rate(self) -> float:
        """The rate that did best on validation; 0 for a base left as it is."""
        return LEARNING_RATES[self.tuned_as] if self.stages else 0.0

    def settings(self, learning_rate: float) -> dict[str, Any]:
        """All that is set, for the record."""
        return {
            **dataclasses.asdict(self.world),
            "arm": self.name,
            "stages": [[dataclasses.asdict(r) for r in s] for s in self.stages],
            "learning_rate": learning_rate,
            "equal_tokens": self.equal_tokens,
        }


def conditions(world: ChainSettings) -> list[Condition]:
    """Every base and every way to fine-tune it that is compared with others."""
    found = [Condition("chains", name, stages, world) for name, stages in MAIN.items()]
    found += [
        Condition("controls", name, stages, world) for name, stages in CONTROLS.items()
    ]
    for experiment, changes in OTHER_BASES.items():
        base = dataclasses.replace(world.base, **changes)
        other = dataclasses.replace(world, base=base)
        found += [
            Condition(experiment, name, MAIN[name], other) for name in ON_OTHER_BASES
        ]
    found += [
        Condition(
            "equal-tokens", name, MAIN[name], world, f"chains/{name}", equal_tokens=True
        )
        for name in EQUAL_TOKENS
    ]
    for mistaken, name in itertools.product(NOISE, ("SFT noisy", "CFT rederive")):
        noisier = dataclasses.replace(world, mistaken=mistaken)
        label = f"{name} {mistaken:.0%}"
        found.append(Condition("noise", label, MAIN[name], noisier, f"chains/{name}"))
    return found


def _arm(condition: Condition) -> Arm:
    rate = condition.learning_rate
    return Arm(
        condition.experiment,
        condition.name,
        condition.settings(rate),
        partial(run, condition, rate),
    )


def _tuning_arm(condition: Condition, rate: float) -> Arm:
    return Arm(
        "learning-rate",
        f"{condition} {rate:g}",
        {**condition.settings(rate), "method": str(condition)},
        partial(tune, condition, rate),
    )


def _inference_arm(name: str, world: ChainSettings) -> Arm:
    condition = Condition("inference", name, MAIN[name], world, f"chains/{name}")
    rate = condition.learning_rate
    return Arm(
        "inference",
        name,
        {**condition.settings(rate), "temperatures": TEMPERATURES, "rounds": ROUNDS},
        partial(run_inference, condition, rate),
    )


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, rate: float, seed: int) -> Metrics:
    """Fine-tune a seed's base; test the checkpoint best on validation, and the last."""
    tuned = fine_tune(condition, rate, seed)
    exams = exams_of(condition.world, "test", seed)
    last = scores(tuned.load(-1), exams)
    return {
        **scores_and_outcomes(tuned.load(tuned.best), exams),
        **{f"last {name}": metric for name, metric in last.items()},
        **tuned.effort(),
    }


def tune(condition: Condition, rate: float, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test."""
    tuned = fine_tune(condition, rate, TUNING_SEED + seed)
    return tuned.chosen()


def fine_tune(condition: Condition, rate: float, seed: int) -> Tuned:
    """Fine-tune the base of a seed, stage after stage, and validate its checkpoints."""
    world = condition.world
    model = base_model(world.base, seed)
    work = homework(world, seed)
    stages = [
        [one for recipe in recipes for one in features(recipe, work, seed)]
        for recipes in condition.stages
    ]
    steps = [_steps(condition, examples, work) for examples in stages]
    snapshots = Snapshots(model, steps, world.checkpoints)
    for index, examples in enumerate(stages):
        train(
            Learner(model),
            examples,
            snapshots.loss,
            world.training(rate, steps[index], stream(seed, f"stage {index}")),
            collate=PaddingCollator(),
            label=str(condition),
        )
    target_tokens = sum(
        n * world.batch_size * mean_target_tokens(examples)
        for n, examples in zip(steps, stages, strict=True)
    )
    tuned = Tuned.of(snapshots, sum(map(len, stages)), target_tokens)
    exams = exams_of(world, "validation", seed)
    for index in range(len(tuned.checkpoints)):
        tuned.validation.append(scores(tuned.load(index), exams)["accuracy"])
    return tuned


def _steps(condition: Condition, examples: list[Features], work: Homework) -> int:
    steps = condition.world.steps // len(condition.stages)
    if not condition.equal_tokens:
        return steps
    solved = features(Recipe("solution"), work, seed=0)
    return round(steps * mean_target_tokens(solved) / mean_target_tokens(examples))


def run_inference(condition: Condition, rate: float, seed: int) -> Metrics:
    """Answer, criticise and answer again, against a vote of as many tokens."""
    tuned = fine_tune(condition, rate, seed)
    model = tuned.load(tuned.best)
    metrics: dict[str, Metric | float] = {}
    for kind, exam in exams_of(condition.world, "test", seed).items():
        written = answer(model, exam)
        greedy = grade(exam, [read_answer(tokens) for tokens in written])
        metrics[f"{kind} greedy"] = Metric(float(greedy.mean()), len(greedy))
        for temperature in TEMPERATURES:
            torch.manual_seed(stream(seed, f"{kind} {temperature}"))
            for name, value in compare(model, exam, temperature).items():
                metrics[f"{kind} {name} T={temperature:g}"] = value
    return metrics


# -- the base --------------------------------------------------------------------------


def base_model(base: BaseSettings, seed: int) -> GPT2LMHeadModel:
    """Return the base of a seed, pre-trained now or before.

    Its weights are kept in the user's cache, by settings, seed and the texts it is
    pre-trained on, so that all arms start from the same ones.
    """
    pretrain = partial(_pretrain, base, seed)
    return kept_base(_new_model(base), _base_path(base, seed), pretrain)


def _new_model(base: BaseSettings) -> GPT2LMHeadModel:
    return tiny_gpt(
        len(VOCABULARY),
        width=base.width,
        layers=base.layers,
        heads=base.heads,
        context=CONTEXT,
    )


def _base_path(base: BaseSettings, seed: int) -> Path:
    few = dataclasses.replace(
        base, solutions=min(base.solutions, 64), critiques=min(base.critiques, 64)
    )
    return base_path("cft", seed, [dataclasses.asdict(base), seed, corpus(few, seed)])


def _pretrain(base: BaseSettings, seed: int, directory: Path) -> GPT2LMHeadModel:
    """Pre-train a base, going on where an interrupted process stopped."""
    torch.manual_seed(seed)
    model = _new_model(base).to(runtime.device())
    train(
        Learner(model),
        corpus(base, seed),
        training_loss,
        dataclasses.replace(base.training, seed=seed),
        collate=PaddingCollator(),
        directory=directory,
        label="pretraining",
    )
    return model


def corpus(base: BaseSettings, seed: int) -> list[Features]:
    """Solutions of a solver who is often mistaken, and critiques of no-gap answers."""
    gap = round(base.solutions * base.gap_share)
    texts = []
    for kind, n in zip(KINDS, (gap, base.solutions - gap), strict=True):
        asked = _sample(n, "pretrain", kind, base, seed)
        texts += [
            imitation(solution)
            for solution in _attempts(asked, base.mistaken, base, seed)
        ]
    asked = _sample(base.critiques, "pretrain", "no-gap", base, stream(seed, "asked"))
    references = chains.solutions(asked, chains.solve(asked))
    slipped = chains.solutions(asked, chains.slip(asked, stream(seed, "slip")))
    has_slip = generator(seed, "has slip").random(base.critiques) < base.slips
    for index, reference in enumerate(references):
        response = slipped[index] if has_slip[index] else reference
        form = FORMS[index % len(FORMS)]
        critique = write_critique(form, response, reference, CHAIN)
        shown = VOCABULARY.encode(response.text(CHAIN))
        texts.append(criticism(response.question, shown, form, critique))
    return texts


# -- questions and examples ------------------------------------------------------------


class Homework(NamedTuple):
    """The questions of fine-tuning, and who made what of them.

    Attributes:
        references: right solutions.
        responses: of a solver who is often mistaken.
        slipped: solutions with a slip each, all wrong.
    """

    references: list[Solution]
    responses: list[Solution]
    slipped: list[Solution]


def homework(world: ChainSettings, seed: int) -> Homework:
    """Draw the questions that every arm of a seed is fine-tuned on."""
    work = Homework([], [], [])
    gap = round(world.questions * world.gap_share)
    for kind, n in zip(KINDS, (gap, world.questions - gap), strict=True):
        asked = _sample(n, "train", kind, world.base, seed)
        work.references.extend(chains.solutions(asked, chains.solve(asked)))
        work.responses.extend(_attempts(asked, world.mistaken, world.base, seed))
        slips = chains.slip(asked, stream(seed, f"slips {kind}"))
        work.slipped.extend(chains.solutions(asked, slips))
    return work


def features(recipe: Recipe, work: Homework, seed: int) -> list[Features]:
    """Make a recipe's examples of the questions."""
    pairs = zip(work.responses, work.references, strict=True)
    right = [is_right(response, reference) for response, reference in pairs]
    responses = work.responses
    if recipe.noise == "slips":
        triples = zip(right, work.references, work.slipped, strict=True)
        responses = [good if ok else slipped for ok, good, slipped in triples]
    if recipe.target == "response":
        made = [imitation(response) for response in responses]
    elif recipe.target == "solution":
        made = [imitation(reference) for reference in work.references]
    else:
        made = _criticisms(recipe, responses, work, seed)
    return [
        example
        for example, ok in zip(made, right, strict=True)
        if recipe.kept == "all" or ok == (recipe.kept == "right")
    ]


def _criticisms(
    recipe: Recipe, responses: list[Solution], work: Homework, seed: int
) -> list[Features]:
    shown = _shown(recipe, responses, seed)
    chance = generator(seed, "wrong critiques").random(len(responses))
    made = []
    for index, (response, reference) in enumerate(
        zip(responses, work.references, strict=True)
    ):
        if chance[index] < recipe.wrong_critiques:
            critique = write_wrong_critique(
                recipe.form, response, reference, work.slipped[index], CHAIN
            )
        else:
            critique = write_critique(recipe.form, response, reference, CHAIN)
        made.append(criticism(response.question, shown[index], recipe.form, critique))
    return made


def _shown(recipe: Recipe, responses: list[Solution], seed: int) -> list[list[int]]:
    """Return what each critique's prompt holds in the response's place, as tokens."""
    written = [VOCABULARY.encode(response.text(CHAIN)) for response in responses]
    if recipe.shown == "own":
        return written
    if recipe.shown == "shuffled":
        return [written[index] for index in strangers(len(written), seed)]
    blank = VOCABULARY.pad
    return [[blank] * len(w) if recipe.shown == "blank" else [] for w in written]


def imitation(solution: Solution) -> Features:
    """Ask a question; the solution is to be written."""
    return _supervised(ask(solution.question), solution.text(CHAIN))


def criticism(
    question: str, response: Sequence[int], form: Form, critique: str
) -> Features:
    """Show a question and a response, as tokens; the critique is to be written."""
    return _supervised(ask_critique(question, response, form), critique)


def _supervised(prompt: list[int], target: str) -> Features:
    return supervise(prompt, [*VOCABULARY.encode(target), VOCABULARY.end], CONTEXT)


def exams_of(world: ChainSettings, split: Split, seed: int) -> Exams:
    """Draw a seed's validation or test."""
    n = world.validation if split == "validation" else world.test
    exams = {}
    for kind in KINDS:
        asked = _sample(n, split, kind, world.base, seed)
        solved = chains.solutions(asked, chains.solve(asked))
        exams[kind] = Exam(asked.questions(), [one.answer for one in solved])
    return exams


def _sample(n: int, split: Split, kind: Kind, base: BaseSettings, seed: int) -> Chains:
    own = stream(seed, f"{split} {kind}")
    return chains.sample(n, split, kind, own, base.misconceptions)


def _attempts(
    asked: Chains, mistaken: float, base: BaseSettings, seed: int
) -> list[Solution]:
    own = stream(seed, "attempts")
    values = chains.attempt(asked, mistaken, own, base.misconceptions)
    return chains.solutions(asked, values)
