"""The experiments on strings: that they run, and that their yardsticks are right."""

import dataclasses

import numpy as np
import pytest
import torch
from cgm_toys import SHORT_STRINGS

from ftlib.cgm import strings_experiment as experiment
from ftlib.cgm.settings import STRINGS
from ftlib.cgm.strings import LABORATORY, NATURE, Paths, residue_counts
from ftlib.training import TrainingSettings

TOY = dataclasses.replace(
    SHORT_STRINGS,
    unmasking_steps=4,
    pretraining=TrainingSettings(steps=30, batch_size=64, learning_rate=1e-2),
    strand_limits=(0, 1, 2),
    grids=((2, 1), (4, 4)),
    paper_grid=(2, 2),
    shortfall=0.05,
    dual_samples=2048,
    feasibility_samples=(64,),
    steps=2,
    batch_size=256,
    batches=(128, 256),
    batch_grids=((2, 2),),
    widths=(8,),
    evaluation_samples=4096,
    base_samples=32_768,
)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """Pre-train once a test, in a folder of its own."""
    monkeypatch.setattr("ftlib.bases.pooch.os_cache", lambda name: tmp_path / name)
    experiment.base_facts.cache_clear()


def value(metrics, name):
    found = metrics[name]
    return getattr(found, "value", found)


def test_every_arm_runs_and_reports_the_same_metrics(monkeypatch):
    monkeypatch.setitem(STRINGS, "cpu", TOY)
    arms = experiment.arms("cpu")
    assert len({str(arm) for arm in arms}) == len(arms) == 7 + 1 + 2 + 1
    reported = set()
    for arm in arms:
        torch.manual_seed(0)
        metrics = arm.run(1000)
        if arm.experiment == "strings-feasibility" or arm.name == "base":
            continue
        assert value(metrics, "feasible") == 1
        assert set(experiment.MEASURED) <= set(metrics)
        assert all(np.isfinite(value(metrics, name)) for name in metrics)
        reported.add(frozenset(metrics))
    assert len(reported) == 1


def test_the_target_is_natures_exact_mean():
    problem = experiment.pose(TOY, 1000, (2, 2))
    strings = NATURE.sample(100_000, 12, torch.Generator().manual_seed(0))
    h = problem.h(Paths(strings, strings))
    assert (h.mean(0) - problem.target).abs().max() < 4 * 0.5 / 100_000**0.5
    assert problem.model is not problem.base


def test_theory_of_the_base_is_that_of_its_cells():
    problem = experiment.pose(TOY, 1000, (4, 4))
    found = experiment.theory(TOY, 1000, problem, 0.3)
    counts = experiment.base_facts(TOY, 1000).counts
    p = problem.h.cell_probabilities(counts)
    q = problem.h.cell_probabilities(NATURE.count_probabilities(12))
    assert counts.sum() == pytest.approx(1)
    kl = float((q * np.log(q / p)).sum())
    assert value(found, "smallest_kl") == pytest.approx(kl, rel=1e-6)
    assert 0 < value(found, "predicted_kl") < kl
    assert 0 < value(found, "predicted_error") < value(found, "base_error")


def test_an_unchanged_model_is_as_good_as_its_base():
    problem = experiment.pose(TOY, 1000, (2, 2))
    torch.manual_seed(0)
    found = experiment.evaluate(problem, TOY, 1000)
    base_error = value(experiment.theory(TOY, 1000, problem, 0.3), "base_error")
    assert value(found, "kl") == 0
    assert value(found, "error") == pytest.approx(base_error, abs=0.02)
    assert abs(value(found, "segments_change")) < 0.15
    assert abs(value(found, "local_change")) < 0.3


def test_a_damaged_model_shows_in_the_structure():
    """Uniform letters: the same cells are filled with strings of many segments."""
    training = dataclasses.replace(TOY.pretraining, steps=200)
    world = dataclasses.replace(TOY, pretraining=training)
    problem = experiment.pose(world, 1000, (2, 2))
    for parameter in problem.model.parameters():
        parameter.data.zero_()
    torch.manual_seed(0)
    found = experiment.evaluate(problem, world, 1000)
    assert value(found, "segments_change") > 0.5
    assert value(found, "local_change") < -1
    assert value(found, "kl") > 0.5


@pytest.mark.parametrize("samples", [64, 1024])
def test_the_dual_has_a_solution_when_every_cell_is_visited(samples):
    """Chance of that by drawing the strings themselves, for the finest grid."""
    world = dataclasses.replace(TOY, feasibility_draws=100)
    metrics = experiment.try_dual(world, samples, 0)
    grid, visited = experiment.finest_grid(TOY), 0
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        strings = LABORATORY.sample(samples, 12, generator)
        cells = grid.cell(residue_counts(strings))
        visited += len(cells.unique()) == grid.constraints + 1
    shares = [
        metrics[f"{o} d=15"].value for o in ("feasible", "infeasible", "redundant")
    ]
    assert sum(shares) == pytest.approx(1)
    assert abs(shares[0] - visited / 100) < 0.25
    assert metrics["feasible d=1"].value == 1


def test_a_dual_without_solution_is_a_recorded_result():
    world = dataclasses.replace(TOY, dual_samples=32)
    torch.manual_seed(0)
    metrics = experiment._run(world, "reward", (4, 4), 256, 1000)
    assert metrics["feasible"] == 0
    assert np.isnan([metrics[name] for name in experiment.MEASURED]).all()
    assert value(metrics, "smallest_kl") > 0


def test_the_order_costs_nothing_where_it_does_not_matter():
    """With one unmasking step there is only one order, so the cost is noise about 0."""
    world = dataclasses.replace(TOY, unmasking_steps=1)
    problem = experiment.pose(world, 1000, (2, 2))
    found = experiment.order_cost(problem, world, 1000)
    assert abs(value(found, "order_cost")) < 4 * value(found, "order_cost_sd_error")


def test_the_budget_is_the_same_for_every_batch():
    world = STRINGS["cpu"]
    for batch in world.batches:
        training = world.training(batch, 0.1)
        assert training.steps * batch == world.steps * world.batch_size
        ratio = (batch / world.batch_size) ** 0.5
        assert training.learning_rate == pytest.approx(0.1 * ratio)


def test_the_paper_grid_has_ninety_nine_constraints():
    for world in STRINGS.values():
        grid = experiment.finest_grid(world)
        assert grid.coarser(*world.paper_grid).constraints == 99
        assert grid.constraints == 399
        most = grid.helix[-1] + grid.strand[-1]
        assert most + 2 <= world.length  # or constraints would follow from others


def test_a_cell_without_samples_is_not_a_number():
    """More than twelve helix residues of twelve: no string reaches the last cells."""
    world = dataclasses.replace(TOY, helix_limits=(2, 4, 12), base_samples=4096)
    structure = experiment.base_facts(world, 1000).structure
    assert structure.shape == (16, 2)
    assert np.isnan(structure[12:]).all()
    assert np.isfinite(structure[0]).all()


def test_known_facts_do_not_change_the_callers_random_numbers():
    states = []
    for _ in range(2):  # worked out, then known
        torch.manual_seed(7)
        experiment.base_facts(TOY, 0)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
