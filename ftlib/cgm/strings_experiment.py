"""Strings of helix, strand and coil: from one constraint to hundreds.

``strings``: every loss as the grid of constraints gets finer, on one sample budget.
``strings-feasibility``: whether the dual of reward has a solution; nothing is trained.
``strings-batch``: large batches against many steps. ``strings-size``: model widths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import softmax
from torch import Tensor, nn

from ftlib import runtime
from ftlib.bases import base_path, kept_base
from ftlib.cgm import objective
from ftlib.cgm.calibrate import Scorer, calibrate, chunks, frozen_copy
from ftlib.cgm.dual import (
    DualError,
    InfeasibleTargetError,
    RedundantConstraintError,
    Tilt,
    choose_kl_weight,
    solve_dual,
)
from ftlib.cgm.estimates import mean_and_error
from ftlib.cgm.settings import STRINGS, CalibrationSettings, StringSettings
from ftlib.cgm.strings import (
    LABORATORY,
    NATURE,
    Grid,
    MaskedDiffusion,
    Paths,
    residue_counts,
    segments,
)
from ftlib.experiments import Arm
from ftlib.results import Metric
from ftlib.runtime import Scale
from ftlib.training import train

Array = NDArray[np.float64]
Metrics = dict[str, Metric | float]
Parts = tuple[int, int]

_CHUNK = 2048  # samples scored at a time


def arms(scale: Scale) -> list[Arm]:
    """Return the arms of the strings at a scale."""
    world = STRINGS[scale]
    return [
        *constraint_arms(world),
        *feasibility_arms(world),
        *batch_arms(world),
        *size_arms(world),
    ]


# -- the problem -----------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """What is to be calibrated, and to what.

    Attributes:
        model: to be changed in place.
        base: the same, frozen.
        h: the statistic, of ``h.constraints`` indicators.
        target: its exact mean in nature, float [d].
    """

    model: MaskedDiffusion
    base: MaskedDiffusion
    h: Grid
    target: Tensor


Way = Callable[[Problem, CalibrationSettings], None]


def pose(world: StringSettings, seed: int, parts: Parts) -> Problem:
    """The base model of a seed and a grid of constraints; a fresh copy every time."""
    model = base_model(world, seed)
    grid = finest_grid(world).coarser(*parts)
    nature = grid.cell_probabilities(NATURE.count_probabilities(world.length))
    target = torch.from_numpy(nature).float() @ grid.indicators
    return Problem(model, frozen_copy(model), grid, target)


def finest_grid(world: StringSettings) -> Grid:
    """The grid that every other one is a part of."""
    return Grid(world.helix_limits, world.strand_limits)


def base_model(world: StringSettings, seed: int) -> MaskedDiffusion:
    """Masked diffusion trained on strings of the laboratory, now or before."""
    model = MaskedDiffusion(world.length, world.unmasking_steps, world.width)
    identity = [
        *(world.length, world.unmasking_steps, world.width, world.corpus, seed),
        dataclasses.asdict(world.pretraining),
        LABORATORY.transitions.tolist(),
    ]
    path = base_path("cgm-strings", seed, identity)
    return kept_base(model, path, partial(_pretrain, world, seed)).eval()


def _pretrain(world: StringSettings, seed: int, directory: Path) -> MaskedDiffusion:
    torch.manual_seed(seed)
    model = MaskedDiffusion(world.length, world.unmasking_steps, world.width)
    generator = torch.Generator().manual_seed(seed)
    strings = LABORATORY.sample(world.corpus, world.length, generator)
    settings = dataclasses.replace(world.pretraining, seed=seed)

    def loss(scorer: nn.Module, strings: Tensor) -> Tensor:
        # The usual cross-entropy on the positions of the next step, in nats a residue:
        # each string in a random order, all steps of the order at once.
        paths = Paths(strings, model.random_steps(len(strings)))
        return -scorer(paths).mean() / strings.shape[1]

    model.to(runtime.device())
    scorer = Scorer(model)
    train(scorer, strings, loss, settings, directory=directory, label="pretraining")
    return model


@dataclass(frozen=True)
class BaseFacts:
    """What many samples say about a base model.

    Attributes:
        counts: share of strings with n_H helix and n_E strand residues,
            float64 [L + 1, L + 1].
        structure: mean of each of :func:`structure` in every cell of the finest grid,
            float64 [cells, 2]; not-a-number in a cell without samples.
    """

    counts: Array
    structure: Array


@lru_cache(maxsize=4)
def base_facts(world: StringSettings, seed: int) -> BaseFacts:
    """Draw ``base_samples`` strings of a base, once a process."""
    # The caller's random numbers must not depend on whether the facts were known.
    with torch.random.fork_rng():
        model = base_model(world, seed)
        torch.manual_seed(seed)
        drawn = [
            model.sample(_CHUNK).strings.cpu()
            for _ in range(world.base_samples // _CHUNK)
        ]
    strings = torch.cat(drawn)
    counts = residue_counts(strings)
    table = np.zeros((world.length + 1, world.length + 1))
    np.add.at(table, tuple(counts.numpy().T), 1 / len(strings))
    finest = finest_grid(world)
    cells = finest.cell(counts).numpy()
    per_cell = partial(np.bincount, cells, minlength=finest.constraints + 1)
    totals = [per_cell(column) for column in structure(strings).numpy().T]
    with np.errstate(invalid="ignore"):
        means = np.stack(totals, 1) / per_cell()[:, None]
    return BaseFacts(table, means)


def structure(strings: Tensor) -> Tensor:
    """What no constraint mentions, float64 [n, 2].

    The log-probability in nats that the laboratory gives the string among those with
    the same counts, and the number of its segments.
    """
    local = LABORATORY.log_prob_given_counts(strings)
    return torch.stack([local, segments(strings).cpu().double()], 1)


# -- every loss, from one constraint to hundreds ---------------------------------------


def constraint_arms(world: StringSettings) -> list[Arm]:
    """The base, and each loss on each grid."""
    trained = [
        _trained_arm("strings", f"{name} d={_constraints(parts)}", world, name, parts)
        for parts in world.grids
        for name in LOSSES
    ]
    return [_trained_arm("strings", "base", world, None, world.paper_grid), *trained]


def batch_arms(world: StringSettings) -> list[Arm]:
    """Relax with fewer steps of larger batches, on few and on many constraints."""
    return [
        _trained_arm(
            "strings-batch",
            f"n={batch} d={_constraints(parts)}",
            world,
            "relax",
            parts,
            batch,
        )
        for parts in world.batch_grids
        for batch in world.batches
    ]


def size_arms(world: StringSettings) -> list[Arm]:
    """Relax on models of several widths, each pre-trained for itself."""
    return [
        _trained_arm(
            "strings-size",
            f"width={width}",
            dataclasses.replace(world, width=width),
            "relax",
            world.paper_grid,
        )
        for width in world.widths
    ]


def _constraints(parts: Parts) -> int:
    return parts[0] * parts[1] - 1


def _trained_arm(
    experiment: str,
    name: str,
    world: StringSettings,
    loss: str | None,
    parts: Parts,
    batch_size: int | None = None,
) -> Arm:
    batch = batch_size or world.batch_size
    own = {"arm": name, "constraints": _constraints(parts), "batch": batch}
    return Arm(
        experiment,
        name,
        {**dataclasses.asdict(world), **own},
        partial(_run, world, loss, parts, batch),
    )


def _run(
    world: StringSettings, loss: str | None, parts: Parts, batch: int, seed: int
) -> Metrics:
    problem = pose(world, seed, parts)
    if loss is None:
        return {
            **theory(world, seed, problem, 0.0),
            **evaluate(problem, world, seed),
            **order_cost(problem, world, seed),
        }
    settings = LOSSES[loss](world, problem, batch)
    return calibrated(world, problem, seed, settings, plain)


def calibrated(
    world: StringSettings,
    problem: Problem,
    seed: int,
    settings: CalibrationSettings,
    way: Way,
) -> Metrics:
    """Calibrate a problem in some way, and report theory and measurement.

    A dual without a unique solution is a result: ``MEASURED`` is then not-a-number.
    """
    kl_weight = settings.kl_weight or settings.dual_ridge
    expected = theory(world, seed, problem, kl_weight)
    try:
        way(problem, settings)
    except DualError:
        return {"feasible": 0.0, **expected, **dict.fromkeys(MEASURED, float("nan"))}
    return {"feasible": 1.0, **expected, **evaluate(problem, world, seed)}


def plain(problem: Problem, settings: CalibrationSettings) -> None:
    """Calibrate a problem with the loss of its settings."""
    calibrate(problem.model, problem.h, problem.target, settings)


def relax(world: StringSettings, problem: Problem, batch: int) -> CalibrationSettings:
    """CGM-relax with the λ that a pilot sample asks for."""
    return CalibrationSettings(
        "relax",
        world.training(batch, world.relax_learning_rate),
        kl_weight=pilot_kl_weight(world, problem),
        violation_baseline=True,
    )


def reward(world: StringSettings, problem: Problem, batch: int) -> CalibrationSettings:
    """CGM-reward; the problem does not matter for its settings."""
    training = world.training(batch, world.reward_learning_rate)
    return CalibrationSettings("reward", training, dual_samples=world.dual_samples)


def ridge_reward(
    world: StringSettings, problem: Problem, batch: int
) -> CalibrationSettings:
    """CGM-reward towards the tilt that relax is after, as N samples see it."""
    return dataclasses.replace(
        reward(world, problem, batch), dual_ridge=pilot_kl_weight(world, problem)
    )


def pilot_kl_weight(world: StringSettings, problem: Problem) -> float:
    """λ for the settings' shortfall, from as many base samples as reward gets."""
    pilot = problem.h(problem.base.sample(world.dual_samples))
    return choose_kl_weight(pilot, problem.target, world.shortfall)


LOSSES: Mapping[str, Callable[[StringSettings, Problem, int], CalibrationSettings]] = {
    "relax": relax,
    "reward": reward,
    "ridge reward": ridge_reward,
}


# -- whether the dual has a solution ---------------------------------------------------


def feasibility_arms(world: StringSettings) -> list[Arm]:
    """The dual on samples of the laboratory chain itself, for each N; no model."""
    return [
        Arm(
            "strings-feasibility",
            f"N={n}",
            {**dataclasses.asdict(world), "samples": n},
            partial(try_dual, world, n),
        )
        for n in world.feasibility_samples
    ]


def try_dual(world: StringSettings, samples: int, seed: int) -> Metrics:
    """Solve the dual on many draws of N samples, and evaluate the tilts exactly.

    For every grid, ``feasible``, ``infeasible`` and ``redundant`` are the shares of the
    draws with each outcome of ``solve_dual``, and ``error`` is the mean absolute error
    of E[h] under the exact base tilted by the α̂ that was found, over the draws that
    have one. A cell without a sample makes constraints redundant on these samples *and*
    the target impossible; the share counts what is noticed first.
    """
    rng = np.random.default_rng(seed)
    laboratory = LABORATORY.count_probabilities(world.length)
    nature = NATURE.count_probabilities(world.length)
    metrics: Metrics = {}
    for parts in world.grids:
        grid = finest_grid(world).coarser(*parts)
        probabilities = grid.cell_probabilities(laboratory)
        h, target = grid.indicators.double().numpy(), _mean(grid, nature)
        outcomes: list[str] = []
        errors: list[float] = []
        for _ in range(world.feasibility_draws):
            shares = rng.multinomial(samples, probabilities) / samples
            try:
                alpha = solve_dual(h, target, weights=shares).alpha
            except DualError as problem:
                outcomes.append(_OUTCOMES[type(problem)])
                continue
            outcomes.append("feasible")
            tilted = softmax(np.log(probabilities) + h @ alpha)
            errors.append(float(np.abs(tilted @ h - target).mean()))
        d = grid.constraints
        for outcome in ("feasible", *_OUTCOMES.values()):
            share = outcomes.count(outcome) / len(outcomes)
            metrics[f"{outcome} d={d}"] = Metric(share, len(outcomes))
        error = float(np.mean(errors)) if errors else float("nan")
        metrics[f"error d={d}"] = Metric(error, len(errors))
    return metrics


_OUTCOMES: Mapping[type[Exception], str] = {
    InfeasibleTargetError: "infeasible",
    RedundantConstraintError: "redundant",
}


# -- what is measured ------------------------------------------------------------------


def theory(
    world: StringSettings, seed: int, problem: Problem, kl_weight: float
) -> Metrics:
    """Where the base stands, and where the optimum does, from the base's cells.

    Args:
        world: the settings.
        seed: of the base.
        problem: gives the grid and the target.
        kl_weight: λ of relax, or of the ridge; 0 for the constrained problem.
    """
    base = base_facts(world, seed).counts
    optimum = _base_tilt(base, problem, kl_weight)
    return {
        "kl_weight": kl_weight,
        "smallest_kl": Metric(_smallest_kl(base, problem), world.base_samples),
        "predicted_kl": Metric(optimum.kl, world.base_samples),
        "predicted_error": Metric(
            _mean_abs(optimum.mean, problem.target), world.base_samples
        ),
        "base_error": Metric(
            _mean_abs(_mean(problem.h, base), problem.target), world.base_samples
        ),
    }


def _smallest_kl(counts: Array, problem: Problem) -> float:
    """KL of the constrained optimum; not-a-number where a cell of the base is empty."""
    try:
        return _base_tilt(counts, problem, 0.0).kl
    except DualError:
        return float("nan")


def _base_tilt(counts: Array, problem: Problem, kl_weight: float) -> Tilt:
    return solve_dual(
        problem.h.indicators,
        problem.target,
        weights=problem.h.cell_probabilities(counts),
        kl_weight=kl_weight,
    )


def _mean(grid: Grid, counts: Array) -> Array:
    """E[h], float64 [d], under a table of count probabilities [L + 1, L + 1]."""
    mean: Array = grid.cell_probabilities(counts) @ grid.indicators.double().numpy()
    return mean


def _mean_abs(mean: Array, target: Tensor) -> float:
    return float(np.abs(mean - target.numpy()).mean())


MEASURED = (
    *("error", "max_error", "fine_error", "violation", "kl", "kl_sd_error"),
    *("local_change", "segments_change"),
)


@torch.no_grad()
def evaluate(problem: Problem, world: StringSettings, seed: int) -> Metrics:
    """Measure a calibrated model on fresh strings: ``MEASURED``.

    ``error`` and ``max_error`` are the mean and the largest absolute error over the
    grid's own constraints, ``fine_error`` the mean over those of the finest grid;
    ``violation`` is unbiased. ``local_change`` and ``segments_change`` compare
    :func:`structure` with base strings of the same cell of the finest grid: the
    closest calibrated model changes how often a cell is visited, and nothing in it.
    """
    n = world.evaluation_samples
    paths = problem.model.sample(n)
    log_ratio = torch.cat(
        [
            problem.model.log_prob(part) - problem.base.log_prob(part)
            for part in chunks(paths, _CHUNK)
        ]
    ).double()
    counts = residue_counts(paths.strings).cpu()
    fine = finest_grid(world)
    nature = NATURE.count_probabilities(world.length)
    h = problem.h(paths).cpu()
    own_error = h.mean(0) - problem.target
    fine_error = fine(paths).mean(0).cpu().numpy() - _mean(fine, nature)
    typical = base_facts(world, seed).structure[fine.cell(counts).numpy()]
    change = np.nanmean(structure(paths.strings).numpy() - typical, 0)
    violation = objective.violation(h, problem.target)
    values = {
        "error": own_error.abs().mean(),
        "max_error": own_error.abs().max(),
        "fine_error": np.abs(fine_error).mean(),
        "violation": violation,
        "kl": log_ratio.mean(),
        "kl_sd_error": log_ratio.std() / n**0.5,
        "local_change": change[0],
        "segments_change": change[1],
    }
    return {name: Metric(float(value), n) for name, value in values.items()}


@torch.no_grad()
def order_cost(problem: Problem, world: StringSettings, seed: int) -> Metrics:
    """KL in nats, to second order, that not choosing the order costs (ours).

    The closest calibrated distribution of strings and orders visits the orders o in
    proportion to Z(o) = E_base[exp(α·h) | o]. The model must keep their mix, which
    costs about half the variance of Z(o)/Z. Two strings of one order tell it: it is
    the covariance of their tilt weights.
    """
    tilt = _base_tilt(base_facts(world, seed).counts, problem, 0.0)
    alpha = torch.from_numpy(tilt.alpha)
    n = world.evaluation_samples
    steps = problem.base.random_steps(n)
    first, second = (
        (problem.h(problem.base.unmask(steps)).cpu().double() @ alpha - tilt.log_z)
        for _ in range(2)
    )
    half_variance = ((first + second).exp() - 1) / 2
    return mean_and_error("order_cost", half_variance, "sd_error")
