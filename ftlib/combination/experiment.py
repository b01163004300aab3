"""The combination's experiments: arms × seeds → records.

CFT rederive fine-tunes the base of CFT's chapter on critiques that work the question
out again. Every arm does that, with the same examples, batches and steps. They differ
in which weights may move:

==================  ===================================================================
arm                 trains
==================  ===================================================================
full                all weights: CFT as in its chapter
full, lower rate    all weights, at a lower rate
circuit             the heads that CT-SFT's discovery finds, and all norms
random              as many heads, drawn, and all norms
norms               all norms
LoRA                adapters on the attention, with as many weights as ``circuit``
==================  ===================================================================

Measured, on the way and at the end: ``gap`` questions (what is to be learnt),
``no-gap`` questions (which the base can do, and which are trained as critiques alone),
and ``surprise`` at critiques in the three forms that are not trained. At the end also
``rederive``: critiques as trained, of gap questions that nobody trained on. Trial runs
on seed 1000 showed that the base writes the other forms and often judges wrongly in
them, and that it never loses the form; so the finer measure was taken.

What was expected, before any arm was run:

* Full fine-tuning learns most of gap questions. The circuit is 20 points or more
  behind: a misconception replaces results of an operation, and results are made in the
  MLPs, which the circuit leaves alone.
* Circuit and random heads differ by less than 5 points on gap questions.
* Norms alone learn less than a third of what full fine-tuning learns.
* LoRA learns as much as the circuit, within 5 points.
* At its own rate the circuit forgets less than full fine-tuning. At equal gain on gap
  questions it forgets no less than full fine-tuning at a lower rate.

The experiments: ``combination`` (all arms), ``heads`` (other numbers of heads),
``discovery`` (how good the circuit is), and ``learning-rate`` (how each arm's was
chosen, on seeds of their own).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import get_peft_model
from torch import nn

from ftlib.cft import settings as cft
from ftlib.cft.data import PaddingCollator
from ftlib.cft.experiment import base_model, features, homework
from ftlib.cft.objective import Learner, training_loss
from ftlib.combination.circuit import circuit_of, evidence
from ftlib.combination.settings import (
    ARMS,
    COMBINATION,
    LEARNING_RATES,
    LOWER,
    OTHER_SIZES,
    SIZES,
    TUNING_SEED,
    Settings,
    tried,
)
from ftlib.combination.skills import (
    answers,
    other_critiques,
    rederivations,
    surprise,
)
from ftlib.ctsft.heads import Head
from ftlib.ctsft.runs import (
    discovery_metrics,
    heads_to_train,
    overlap_metrics,
)
from ftlib.ctsft.tuning import Recipe, distance, lora, size, slices_of, weights_of
from ftlib.experiments import Arm, PlanError
from ftlib.ops.head_adamw import HeadAdamW, Slices, training_only
from ftlib.outcomes import Booleans, outcome_metrics
from ftlib.results import PACKED_PREFIX, Metric
from ftlib.runtime import Scale
from ftlib.streams import stream
from ftlib.training import train

Metrics = Mapping[str, Metric | float]


def plan(scale: Scale) -> list[Arm]:
    """Return the arms of the combination.

    Raises:
        PlanError: the scale is gpu, for which there are none.
    """
    if scale != "cpu":
        raise PlanError(
            f"the combination has no plan at scale {scale!r}: it is about the small"
            " world of chain arithmetic; choose cpu"
        )
    return arms()


def arms(settings: Settings = COMBINATION) -> list[Arm]:
    """All arms; those of the search first."""
    given = {**dataclasses.asdict(settings), "sizes": SIZES}
    return [
        *(_arm(candidate, search) for candidate in searched(settings)),
        Arm("discovery", "circuit", given, partial(discover, settings)),
        *(_arm(condition, run) for condition in conditions(settings)),
    ]


@dataclass(frozen=True)
class Condition:
    """Which weights of a base are trained, and how.

    Attributes:
        experiment: in which it is compared with others.
        name: unique there.
        method: the arm's name, whatever the number of heads and the rate.
        recipe: which weights; ``None`` leaves the base as it is.
        settings: what all arms have in common.
        learning_rate: 0 for a base left as it is.
    """

    experiment: str
    name: str
    method: str
    recipe: Recipe | None
    settings: Settings
    learning_rate: float

    def described(self) -> dict[str, Any]:
        """All that is set, for the record."""
        recipe = self.recipe and dataclasses.asdict(self.recipe)
        return {
            **dataclasses.asdict(self.settings),
            "method": self.method,
            "recipe": recipe,
            "learning_rate": self.learning_rate,
        }


def conditions(settings: Settings = COMBINATION) -> list[Condition]:
    """Every way to train that is compared with others."""
    main = partial(Condition, "combination", settings=settings)
    return [
        main("base", "base", None, learning_rate=0.0),
        main("full, lower rate", "full", ARMS["full"], learning_rate=LOWER),
        *(
            main(name, name, recipe, learning_rate=LEARNING_RATES[name])
            for name, recipe in ARMS.items()
        ),
        *(
            Condition(
                "heads",
                f"circuit {heads}",
                "circuit",
                ARMS["circuit"],
                dataclasses.replace(settings, heads=heads),
                LEARNING_RATES["circuit"],
            )
            for heads in OTHER_SIZES
        ),
    ]


def searched(settings: Settings = COMBINATION) -> list[Condition]:
    """Every learning rate that an arm's is chosen from."""
    return [
        Condition("learning-rate", f"{name} {rate:g}", name, recipe, settings, rate)
        for name, recipe in ARMS.items()
        for rate in tried(name)
    ]


def _arm(condition: Condition, run: Callable[[Condition, int], Metrics]) -> Arm:
    return Arm(
        condition.experiment,
        condition.name,
        condition.described(),
        partial(run, condition),
    )


# -- one run ---------------------------------------------------------------------------


def run(condition: Condition, seed: int) -> Metrics:
    """Train a seed's base, and test it on the way and at the end.

    Returns:
        Of the last step, the shares of ``gap`` and ``no-gap`` questions and of
        ``rederive`` critiques that are right, with the outcome of each; ``surprise`` at
        the other forms of critiques, in nats a token; ``distance``, ‖Δθ‖. Curves of all
        but ``rederive``, and how many weights were ``trained``.
    """
    settings, looks = condition.settings, {}
    exams = answers(settings, "test", seed)
    others = other_critiques(settings, "test", seed)
    start = weights_of(base_model(settings.world.base, seed))

    def look(model: nn.Module, step: int) -> None:
        if step % (settings.world.steps // settings.looks):
            return
        looks[step] = Look(
            {name: exam.right(model) for name, exam in exams.items()},
            surprise(model, others),
            distance(model, start),
        )

    model, trained = tune(condition, seed, look)
    last = looks[max(looks)]
    right = {
        **last.right,
        "rederive": rederivations(settings, "test", seed).right(model),
    }
    metrics = {**last._replace(right=right).metrics(), "trained": float(trained)}
    for step, seen in looks.items():
        for name, value in seen.metrics().items():
            metrics[f"{PACKED_PREFIX}curve/{name}/{step}"] = value
    for name, outcomes in right.items():
        metrics |= outcome_metrics(name, outcomes)
    return metrics


def search(candidate: Condition, seed: int) -> Metrics:
    """Try a learning rate on a seed that is not reported, without a look at a test."""
    seed += TUNING_SEED
    model, _ = tune(candidate, seed)
    exams = answers(candidate.settings, "validation", seed)
    shares = {name: float(exam.right(model).mean()) for name, exam in exams.items()}
    return {"validation": float(np.mean(list(shares.values()))), **shares}


class Look(NamedTuple):
    """What was measured after some steps.

    Attributes:
        right: whether each question was answered rightly, by test.
        surprise: at critiques that are not trained, in nats a token.
        distance: ‖Δθ‖.
    """

    right: Mapping[str, Booleans]
    surprise: float
    distance: float

    def metrics(self) -> dict[str, Metric | float]:
        """All shares, surprise and distance."""
        shares = {
            name: Metric(float(right.mean()), len(right))
            for name, right in self.right.items()
        }
        return {**shares, "surprise": self.surprise, "distance": self.distance}


def tune(
    condition: Condition,
    seed: int,
    watch: Callable[[nn.Module, int], None] = lambda model, step: None,
) -> tuple[nn.Module, int]:
    """Train a seed's base; every arm sees the same examples in the same order.

    Args:
        condition: which weights, and how.
        seed: of base, examples and order.
        watch: called with the model after each step, with the number of steps taken;
            with 0 for a base that is left as it is.

    Returns:
        The model, and how many weights were trained.
    """
    settings, recipe = condition.settings, condition.recipe
    model = base_model(settings.world.base, seed)
    if recipe is None:
        watch(model, 0)
        return model, 0
    circuit = partial(circuit_of, settings.world, settings.heads, seed)
    heads = heads_to_train(recipe, circuit, seed)
    torch.manual_seed(stream(seed, "adapters"))
    weights = trained_weights(model, recipe, heads)
    criticise(model, weights, condition, seed, watch)
    return model, size(weights)


def trained_weights(model: Any, recipe: Recipe, heads: list[Head]) -> Slices:
    """Return what a recipe trains; for LoRA, after its adapters are put in."""
    if recipe.weights == "all":
        return list(model.parameters())
    budget = slices_of(model, recipe, heads)
    if recipe.weights != "lora":
        return budget
    adapters = lora(model, size(budget))
    adapters.fan_in_fan_out = True  # GPT-2 keeps its matrices transposed
    get_peft_model(model, adapters)
    return [p for p in model.parameters() if p.requires_grad]


def criticise(
    model: nn.Module,
    weights: Slices,
    condition: Condition,
    seed: int,
    watch: Callable[[nn.Module, int], None],
) -> None:
    """Fine-tune some weights with CFT rederive, and nothing else.

    Args:
        model: changed in place.
        weights: that may move.
        condition: its world and learning rate.
        seed: of the homework and its order.
        watch: called after each step, as in :func:`tune`.
    """
    world, rate = condition.settings.world, condition.learning_rate
    examples = features(cft.Recipe("critique"), homework(world, seed), seed)
    step = count(1)
    with training_only(model, weights):
        optimizer = HeadAdamW(weights, lr=rate, weight_decay=0.0)
        optimizer.register_step_post_hook(lambda *_: watch(model, next(step)))
        train(
            Learner(model),
            examples,
            training_loss,
            # The order of CFT's chapter, so that the full arm is its CFT rederive.
            world.training(rate, world.steps, stream(seed, "stage 0")),
            collate=PaddingCollator(),
            optimizer=optimizer,
            label=condition.name,
        )


# -- the circuit -----------------------------------------------------------------------


def discover(settings: Settings, seed: int) -> Metrics:
    """Say how good the circuit of a seed's base is.

    Returns:
        The metrics of :func:`ftlib.ctsft.runs.discovery_metrics`, and those of
        :func:`ftlib.ctsft.runs.overlap_metrics` with the values of gap questions
        (``gap``) and of critiques as trained (``critique``).
    """
    world = settings.world
    model, circuit = (
        base_model(world.base, seed),
        circuit_of(world, settings.heads, seed),
    )
    others = {
        "gap": (model, evidence(world, "gap", seed)),
        "critique": (model, evidence(world, "no-gap", seed, critiques=True)),
    }
    by = evidence(world, "no-gap", seed)
    return {
        **discovery_metrics(model, by, circuit, SIZES, settings.draws, seed),
        **overlap_metrics(circuit, others),
    }
