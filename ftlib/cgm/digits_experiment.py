"""Handwritten digits: every class equally often, from a model that prefers a few.

``digits``: relax, reward and balanced fine-tuning on one sample budget.
``digits-size``: relax and reward on models of other sizes (scale gpu).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.cgm import digits, objective
from ftlib.cgm.calibrate import calibrate, chunks, frozen_copy
from ftlib.cgm.digits import Images, Painter, Parts, Viewers
from ftlib.cgm.dual import DualError, choose_kl_weight
from ftlib.cgm.estimates import mean_and_error
from ftlib.cgm.imitation import balanced_rows, imitate
from ftlib.cgm.language import Continuations
from ftlib.cgm.settings import (
    DIGIT_LEARNING_RATES,
    DIGITS,
    CalibrationSettings,
    DigitSettings,
)
from ftlib.experiments import Arm
from ftlib.models.tiny import tiny_gpt
from ftlib.results import Metric
from ftlib.runtime import Scale
from ftlib.training import train

Array = NDArray[np.float64]
Metrics = dict[str, Metric | float]

TARGET = torch.full((digits.DIGITS - 1,), 1 / digits.DIGITS)
_CHUNK = 2048  # samples scored at a time
_NEIGHBOURS = 1024  # samples whose nearest training image is looked for


# -- the problem -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """A base model of a seed, and all that looks at its images.

    Attributes:
        model: to be changed in place.
        base: the same, frozen.
        viewers: judge, examiner, network.
        parts: the data.
        trained_on: the images that the model learned from.
    """

    model: Painter
    base: Painter
    viewers: Viewers
    parts: Parts
    trained_on: Images

    def h(self, samples: Continuations) -> Tensor:
        """The judge's digits 0 to 8 as indicators, float [n, 9]."""
        found = self.viewers.judged(self.model.images(samples))
        return digits.indicators(found).to(samples.tokens.device)


FineTuning = Callable[[Problem], Metrics]


def pose(world: DigitSettings, seed: int) -> Problem:
    """The problem of a seed, its model a fresh copy every time."""
    parts = digits.split(seed)
    model = base_model(world, seed)
    return Problem(
        model=model,
        base=frozen_copy(model),
        viewers=_viewers(seed),
        parts=parts,
        trained_on=digits.unequal(parts.generator, world.images),
    )


@lru_cache(maxsize=2)
def _viewers(seed: int) -> Viewers:
    return digits.train_viewers(digits.split(seed), seed)


def base_model(world: DigitSettings, seed: int) -> Painter:
    """A model trained on unequally many images of each digit, now or before."""
    identity = [
        *(world.images, world.copies, world.warp, world.patch, world.codes),
        *(world.width, world.layers, dataclasses.asdict(world.pretraining), seed),
    ]
    path = base_path("cgm-digits", seed, identity)
    return kept_base(_untrained(world), path, partial(_pretrain, world, seed)).eval()


def _untrained(world: DigitSettings) -> Painter:
    tokens = digits.SIDE**2 // (world.patch[0] * world.patch[1])
    network = tiny_gpt(
        world.codes, width=world.width, layers=world.layers, context=tokens + 1
    )
    return Painter(network, world.patch, world.codes)


def _pretrain(world: DigitSettings, seed: int, directory: Path) -> Painter:
    torch.manual_seed(seed)
    painter = _untrained(world)
    images = digits.unequal(digits.split(seed).generator, world.images)
    pixels = digits.warped(images.pixels, world.copies, world.warp, seed)
    patches = digits.cut(pixels, world.patch)
    painter.codebook.copy_(digits.learn_codebook(patches, world.codes, seed))
    settings = dataclasses.replace(world.pretraining, seed=seed)
    tokens = painter.tokens(pixels)

    def loss(network: torch.nn.Module, batch: Tensor) -> Tensor:
        return painter.next_token_loss(batch)

    painter.to(runtime.device())
    train(painter.model, tokens, loss, settings, directory=directory, label="painting")
    return painter


@lru_cache(maxsize=4)
def base_shares(world: DigitSettings, seed: int) -> Array:
    """The judge's share of every digit among many samples of a base, float64 [10]."""
    with torch.random.fork_rng():
        problem = pose(world, seed)
        torch.manual_seed(seed)
        images = paint(problem.base, world.base_samples)[1]
    return shares(problem.viewers.judged(images))


def paint(model: Painter, n: int) -> tuple[Continuations, Array]:
    """Draw n samples, and their images [n, 8, 8]."""
    samples = model.sample(n)
    return samples, model.images(samples)


def shares(digit: NDArray[np.int64]) -> Array:
    """The share of every digit, float64 [10]."""
    return np.bincount(digit, minlength=digits.DIGITS) / len(digit)


# -- the arms --------------------------------------------------------------------------


def arms(scale: Scale) -> list[Arm]:
    """Return the arms of the digits at a scale."""
    world = DIGITS[scale]
    return [*method_arms(world), *size_arms(world)]


def method_arms(world: DigitSettings) -> list[Arm]:
    """The base, relax at each λ, reward at each N, and balanced fine-tuning."""
    fine_tunings: dict[str, FineTuning] = {"base": lambda problem: {}}
    for weight in world.kl_weights:
        fine_tunings[f"relax λ={weight:g}"] = partial(relax, world, weight)
    fine_tunings["relax λ chosen"] = partial(relax_chosen, world)
    for n in world.dual_samples:
        fine_tunings[f"reward N={n}"] = partial(reward, world, n)
    fine_tunings["balanced SFT"] = partial(imitate_balanced, world)
    return [_arm("digits", n, world, tuning) for n, tuning in fine_tunings.items()]


def size_arms(world: DigitSettings) -> list[Arm]:
    """The base, relax and reward on models of every size."""
    most = max(world.dual_samples)
    found = []
    for width, layers in world.sizes:
        sized = dataclasses.replace(world, width=width, layers=layers)
        tunings: dict[str, FineTuning] = {
            "base": lambda problem: {},
            "relax λ chosen": partial(relax_chosen, sized),
            f"reward N={most}": partial(reward, sized, most),
        }
        for name, tuning in tunings.items():
            title = f"{name}, {layers} × {width}"
            found.append(_arm("digits-size", title, sized, tuning))
    return found


def _arm(name: str, arm: str, world: DigitSettings, tuning: FineTuning) -> Arm:
    settings = {
        **dataclasses.asdict(world),
        "learning_rates": DIGIT_LEARNING_RATES,
        "arm": arm,
    }
    return Arm(name, arm, settings, partial(run, world, tuning))


def relax(world: DigitSettings, kl_weight: float, problem: Problem) -> Metrics:
    """CGM-relax with a baseline on the violation, in place."""
    settings = CalibrationSettings(
        "relax",
        world.training(DIGIT_LEARNING_RATES["relax"]),
        kl_weight=kl_weight,
        violation_baseline=True,
        score_chunk=_CHUNK,
    )
    calibrate(problem.model, problem.h, TARGET, settings)
    return {"kl_weight": kl_weight}


def relax_chosen(world: DigitSettings, problem: Problem) -> Metrics:
    """CGM-relax at the λ that a pilot sample says falls short as much as allowed."""
    pilot = problem.h(problem.base.sample(world.pilot_samples))
    return relax(world, choose_kl_weight(pilot, TARGET, world.shortfall), problem)


def reward(world: DigitSettings, dual_samples: int, problem: Problem) -> Metrics:
    """CGM-reward in place."""
    settings = CalibrationSettings(
        "reward",
        world.training(DIGIT_LEARNING_RATES["reward"]),
        dual_samples=dual_samples,
        score_chunk=_CHUNK,
    )
    calibrate(problem.model, problem.h, TARGET, settings)
    return {}


def imitate_balanced(world: DigitSettings, problem: Problem) -> Metrics:
    """Fine-tune on samples of the base in which the judge sees every digit as often.

    As many are drawn as the other methods draw during their training.
    """
    drawn, images = paint(problem.base, world.steps * world.batch_size)
    label = torch.from_numpy(problem.viewers.judged(images))
    kept = drawn[balanced_rows(label, digits.DIGITS).to(drawn.tokens.device)]
    imitate(problem.model, kept, world.training(DIGIT_LEARNING_RATES["balanced SFT"]))
    return {"kept": Metric(len(kept) / len(drawn), len(drawn))}


# -- the evaluation --------------------------------------------------------------------


def run(world: DigitSettings, fine_tune: FineTuning, seed: int) -> Metrics:
    """Fine-tune the base of a seed and evaluate it.

    A dual without a unique solution is a result: the measured metrics are then
    not-a-number.
    """
    problem = pose(world, seed)
    smallest = {"smallest_kl": digits.smallest_kl(base_shares(world, seed))}
    torch.manual_seed(seed)
    try:
        extra = fine_tune(problem)
    except DualError:
        missing = evaluate(world, problem)
        return {"feasible": 0.0, **dict.fromkeys(missing, float("nan")), **smallest}
    return {"feasible": 1.0, **evaluate(world, problem), **smallest, **extra}


def evaluate(world: DigitSettings, problem: Problem) -> Metrics:
    """Measure a model from fresh samples.

    Returns:
        ``kl`` and its standard error ``kl_error``, in nats; for the judge, and with the
        prefix ``examiner_`` for the examiner: ``share/<k>``, ``mean_abs_error`` of the
        ten shares, ``violation`` of the nine constraints (U-statistic); what
        :func:`blind_spots` returns.
    """
    n, model, viewers = world.evaluation_samples, problem.model, problem.viewers
    samples, images = paint(model, n)
    parts = chunks(samples, _CHUNK)
    kl = torch.cat([model.kl_from(problem.base, part) for part in parts]).double()
    return {
        **mean_and_error("kl", kl),
        **_calibration("", viewers.judged(images)),
        **_calibration("examiner_", viewers.examined(images)),
        **blind_spots(images, problem),
    }


def _calibration(prefix: str, digit: NDArray[np.int64]) -> Metrics:
    """How far a viewer's digits are from equal shares."""
    n, found = len(digit), shares(digit)
    h = digits.indicators(digit).double()
    violation = float(objective.violation(h, TARGET.double()))
    error = float(np.abs(found - 1 / digits.DIGITS).mean())
    return {
        f"{prefix}mean_abs_error": Metric(error, n),
        f"{prefix}violation": Metric(violation, n),
        **{f"{prefix}share/{k}": Metric(float(p), n) for k, p in enumerate(found)},
    }


def blind_spots(images: Array, problem: Problem) -> Metrics:
    """Measure what h does not see.

    Returns:
        ``disagreement``: share of images on which judge and examiner differ, and
        ``disagreement/<k>`` among those that the judge calls k; ``distance`` and
        ``within_distance``: feature distance to the judge's real images, as sets and
        digit by digit; ``diversity``; ``ink``: mean grey level; ``nearest``: distance
        to the nearest training image.
    """
    viewers, real = problem.viewers, problem.parts.judge
    judged, n = viewers.judged(images), len(images)
    differ = judged != viewers.examined(images)
    features, real_features = map(viewers.features, (images, real.pixels))
    few = images[:_NEIGHBOURS]
    known = problem.trained_on.pixels
    within = digits.within_class_distance(features, judged, real_features, real.digit)
    return {
        "disagreement": Metric(float(differ.mean()), n),
        **{
            f"disagreement/{k}": _share(differ[judged == k])
            for k in range(digits.DIGITS)
        },
        "distance": Metric(digits.feature_distance(features, real_features), n),
        "within_distance": Metric(within, n),
        "diversity": Metric(digits.diversity(images, judged), n),
        "ink": Metric(float(images.mean()), n),
        "nearest": Metric(digits.nearest_distance(few, known), len(few)),
    }


def real_images(problem: Problem) -> Metrics:
    """What :func:`blind_spots` says of real images, digits about equally often.

    They are the generator's, which neither judge nor examiner nor network has seen, so
    that ``distance`` is the floor: real against real. The model has seen some of them,
    and ``nearest`` says nothing here.
    """
    return blind_spots(problem.parts.generator.pixels, problem)


def _share(of: NDArray[np.bool_]) -> Metric:
    return Metric(float(of.mean()) if len(of) else float("nan"), len(of))
