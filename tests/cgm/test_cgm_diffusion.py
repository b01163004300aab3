"""The diffusion against chains of torch.distributions, quadrature and closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.special import rel_entr
from scipy.stats import norm
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ftlib.cgm import diffusion
from ftlib.cgm.calibrate import InconsistentModelError, calibrate, check_scores
from ftlib.cgm.diffusion import BumpDiffusion, Paths, bernoulli_kl, exact, right_of
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.settings import CalibrationSettings
from ftlib.training import TrainingSettings


def pushed(size=0.3, **options):
    """A model whose offset is a random network instead of zero."""
    torch.manual_seed(0)
    model = BumpDiffusion(**options)
    nn.init.normal_(model.offset.out.weight, std=size)
    nn.init.normal_(model.offset.out.bias, std=size)
    return model


class Constant(nn.Module):
    """An offset that does not depend on state or time."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, x, steps):
        return self.value.expand_as(x)


class Doob(nn.Module):
    """The best offset, for use with all steps at once."""

    def __init__(self, model, alpha):
        super().__init__()
        self.model, self.alpha = [model.double()], alpha

    def forward(self, x, steps):
        with torch.enable_grad():
            return self.model[0].doob_offset(x, self.alpha)


def noised(model, k):
    """The bumps as they are when step k begins."""
    a, variance = model.signal[k], model.variance[k]
    weights = torch.tensor([1 - model.right, model.right], dtype=a.dtype)
    means = torch.cat([-a, a])
    return MixtureSameFamily(
        Categorical(weights), Normal(means, variance.sqrt().expand(2))
    )


@pytest.mark.parametrize("right", [0.5, 1e-4])
def test_the_score_is_the_gradient_of_the_noised_density(right):
    model = BumpDiffusion(right, steps=10).double()
    x = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    for k in range(10):
        density = noised(model, k).log_prob(x).sum()
        (expected,) = torch.autograd.grad(density, x)
        found = model.score(x[:, None, None], slice(k, k + 1))
        torch.testing.assert_close(found[:, 0, 0], expected)


def test_bumps_are_noised_as_the_process_says():
    """x_t = a x_0 + √(1 − a²) z, with a² from the paper's κ by integration."""
    model = BumpDiffusion(steps=20)
    for k in (0, 7, 19):
        noising, _ = quad(lambda t: 1 / (1 - t + 0.01), 0, 1 - k / 20)
        assert float(model.signal[k]) == pytest.approx(math.exp(-noising / 2), rel=1e-6)
    expected = model.signal**2 * 0.25**2 + 1 - model.signal**2
    torch.testing.assert_close(model.variance, expected)


@pytest.mark.parametrize(("dimensions", "right"), [(1, 0.5), (3, 0.1)])
def test_log_prob_is_the_log_ratio_of_two_gaussian_chains(dimensions, right):
    model = pushed(dimensions=dimensions, right=right, steps=12).double()
    paths = model.sample(20)
    total = torch.zeros(20, dtype=torch.float64)
    for k in range(12):
        x, after = paths.states[:, k], paths.states[:, k + 1].detach()
        at = x.detach().requires_grad_()
        (score,) = torch.autograd.grad(noised(model, k).log_prob(at).sum(), at)
        ds = model.clock[k]
        mean = x + ds * (x / 2 + score)
        shifted = mean + ds * model.offset(x[:, None], slice(k, k + 1))[:, 0]
        tuned, plain = Normal(shifted, ds.sqrt()), Normal(mean, ds.sqrt())
        total += (tuned.log_prob(after) - plain.log_prob(after)).sum(-1)
    assert total.abs().max() > 0.1
    torch.testing.assert_close(model.log_prob(paths), total)


def test_log_prob_is_precise_in_a_hundred_dimensions_of_float32():
    model = pushed(0.02, dimensions=100)
    paths = model.sample(64)
    found = model.log_prob(paths)
    precise = Paths(paths.states.double(), paths.noise.double())
    error = (found.double() - model.double().log_prob(precise)).abs()
    assert error.max() < 2e-5


def test_an_untrained_model_is_the_base_exactly():
    model = BumpDiffusion(dimensions=4)
    paths = model.sample(16)
    assert not model.log_prob(paths).any()
    found = exact(BumpDiffusion())
    assert found.path_kl == found.end_kl == 0


def test_scores_match_samples():
    torch.manual_seed(1)
    assert check_scores(BumpDiffusion(dimensions=3), 2000) < 4.5
    assert check_scores(pushed(dimensions=2), 2000) < 4.5


class Cooled(BumpDiffusion):
    """Draws its noise at a lower temperature than it scores."""

    def sample(self, n):
        paths = super().sample(n)
        return Paths(paths.states, 0.9 * paths.noise)


class Careless(BumpDiffusion):
    """Forgets the quadratic term of Girsanov's formula."""

    def log_prob(self, paths):
        push = self.push(paths.states[:, :-1])
        return (push * paths.noise).sum((1, 2))


@pytest.mark.parametrize("wrong", [Cooled, Careless])
def test_a_wrong_score_is_noticed(wrong):
    torch.manual_seed(2)
    model = wrong()
    nn.init.normal_(model.offset.out.weight, std=0.5)
    with pytest.raises(InconsistentModelError):
        check_scores(model, 4000)


def test_paths_are_sliced_as_one():
    paths = BumpDiffusion(dimensions=2, steps=5).sample(7)
    part = paths[2:5]
    assert (len(paths), len(part)) == (7, 3)
    assert part.states.shape == (3, 6, 2)
    assert part.noise.shape == (3, 5, 2)
    assert torch.equal(part.ends, paths.states[2:5, -1])


def test_right_of_is_an_indicator_per_coordinate():
    paths = Paths(torch.tensor([[[9.0, 9.0], [-1.0, 0.5]]]), torch.zeros(1, 1, 2))
    assert right_of(0.0, paths).tolist() == [[0, 1]]
    assert right_of(0.5, paths).tolist() == [[0, 0]]


def test_both_kl_estimates_are_of_the_exact_kl_and_one_is_better():
    model = pushed()
    torch.manual_seed(3)
    paths = model.sample(20_000)
    truth = exact(model).path_kl
    assert truth > 0.05
    base = BumpDiffusion()
    with torch.no_grad():
        log_ratio, drift = model.log_prob(paths), model.path_kl(base, paths)
    for estimate in (log_ratio, drift):
        error = float(estimate.std()) / len(paths) ** 0.5
        assert abs(float(estimate.mean()) - truth) < 4 * error
    assert drift.var() < log_ratio.var() / 4


def test_path_kl_is_from_the_base_that_is_given():
    """Between two trained models it is the mean of the difference of log_probs."""
    model, other = pushed(0.1, dimensions=2), pushed(0.1, dimensions=2)
    nn.init.constant_(other.offset.out.bias, 0.2)
    torch.manual_seed(4)
    paths = model.sample(20_000)
    with torch.no_grad():
        difference = model.log_prob(paths) - other.log_prob(paths)
        drift = model.path_kl(other, paths)
    error = float((difference - drift).std()) / len(paths) ** 0.5
    assert abs(float((difference - drift).mean())) < 4 * error


def test_quadrature_of_a_constant_offset_has_a_closed_form_kl():
    model = BumpDiffusion()
    model.offset = Constant(0.3)
    expected = 0.3**2 / 2 * float(model.clock.double().sum())
    assert exact(model).path_kl == pytest.approx(expected, rel=1e-6)


def test_quadrature_agrees_with_samples():
    model = pushed(right=0.2)
    found = exact(model)
    torch.manual_seed(5)
    ends = model.sample(50_000).ends[:, 0].numpy()
    width = found.grid[1] - found.grid[0]
    assert found.density.sum() * width == pytest.approx(1, abs=1e-6)
    for value, sample in [
        (found.mass, ends > 0),
        (found.density @ found.grid * width, ends),
        (found.density @ found.grid**2 * width, ends**2),
    ]:
        assert abs(value - sample.mean()) < 4 * sample.std() / len(ends) ** 0.5
    assert found.end_kl <= found.path_kl


def test_the_base_ends_near_the_bumps_and_nearer_with_more_steps():
    def distance(steps):
        found = exact(BumpDiffusion(steps=steps))
        bumps = (norm.pdf(found.grid, -1, 0.25) + norm.pdf(found.grid, 1, 0.25)) / 2
        assert found.base_mass == pytest.approx(0.5, abs=1e-6)
        gap = np.abs(found.base_density - bumps).sum()
        return gap * (found.grid[1] - found.grid[0]) / 2

    assert distance(100) < 0.6 * distance(50) < 0.03


@pytest.mark.parametrize("right", [0.5, 1e-3])
def test_end_right_is_the_conditional_probability(right):
    """Bayes' rule by numerical integration, bumps and noise each a Gaussian."""
    model = BumpDiffusion(right, steps=10).double()

    def joint(end, x, a):
        bumps = (1 - right) * norm.pdf(end, -1, 0.25) + right * norm.pdf(end, 1, 0.25)
        return bumps * norm.pdf(x, a * end, math.sqrt(1 - a * a))

    for k in (0, 5, 9):
        a = float(model.signal[k])
        for x in (-2.0, -0.1, 0.7):
            above, _ = quad(joint, 0, 4, args=(x, a), points=[0.5, 1], epsabs=1e-14)
            below, _ = quad(joint, -4, 0, args=(x, a), points=[-1], epsabs=1e-14)
            state = torch.full((1, 10, 1), x, dtype=torch.float64)
            found = float(model.end_right(state)[0, k, 0])
            assert found == pytest.approx(above / (above + below), rel=1e-6)


def test_doobs_offset_is_the_gradient_of_the_log_expectation():
    model = BumpDiffusion(0.2, steps=10).double()
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None, None].expand(9, 10, 1)
    alpha, step = 1.4, 1e-5

    def log_expectation(x):
        right = model.end_right(x)
        return torch.log(1 - right + right * math.exp(alpha))

    numeric = (log_expectation(x + step) - log_expectation(x - step)) / (2 * step)
    torch.testing.assert_close(model.doob_offset(x, alpha), numeric)


def test_doobs_offset_calibrates_at_the_smallest_kl():
    """The h-transform is the optimum, up to the discretisation of time."""
    model = BumpDiffusion(steps=100)
    model.offset = Doob(BumpDiffusion(steps=100), math.log(4))
    found = exact(model)
    assert found.mass == pytest.approx(0.8, abs=0.004)
    assert found.path_kl == pytest.approx(bernoulli_kl(0.8, 0.5), abs=0.006)


def test_with_fifty_steps_the_start_is_forgotten():
    found = exact(BumpDiffusion(steps=50))
    closed = bernoulli_kl(0.8, 0.5)
    assert found.smallest_path_kl(0.8) == pytest.approx(closed, rel=1e-5)
    assert exact(BumpDiffusion(steps=100)).smallest_path_kl(0.8) > closed + 1e-4


def test_the_smallest_path_kl_is_the_minimum_over_all_conditional_laws():
    """Against a general-purpose optimiser, for a start that tells a lot."""
    grid = np.linspace(-8, 8, 33)
    p = 1 / (1 + np.exp(-2 * grid - 1))
    start = norm.pdf(grid) * 0.5
    zero = np.zeros_like(grid)
    law = diffusion.Exact(grid, zero, start, 0.0, p)
    found = law.smallest_path_kl(0.9)

    def kl(q):
        return start @ (rel_entr(q, p) + rel_entr(1 - q, 1 - p))

    best = minimize(
        kl,
        p,
        jac=lambda q: start * np.log(q * (1 - p) / ((1 - q) * p)),
        method="SLSQP",
        bounds=[(1e-9, 1 - 1e-9)] * len(p),
        constraints={"type": "eq", "fun": lambda q: start @ q - 0.9},
        options={"maxiter": 500, "ftol": 1e-12},
    )
    assert best.fun == pytest.approx(found, rel=1e-3)


def test_bernoulli_kl_is_the_duals():
    atoms, goal = np.array([[0.0], [1.0]]), np.array([0.8])
    tilt = solve_dual(atoms, goal, weights=np.array([0.999, 0.001]))
    assert bernoulli_kl(0.8, 0.001) == pytest.approx(tilt.kl, rel=1e-9)


def test_training_comes_near_the_theory():
    torch.manual_seed(1000)
    model = BumpDiffusion()
    training = TrainingSettings(
        steps=150, batch_size=256, learning_rate=0.02, max_grad_norm=None
    )
    settings = CalibrationSettings(
        "relax", training, kl_weight=0.1, violation_baseline=True
    )
    calibrate(model, partial(right_of, 0.0), torch.tensor([0.8]), settings)
    theory = solve_dual(np.array([[0.0], [1.0]]), np.array([0.8]), kl_weight=0.1)
    found = exact(model)
    assert found.mass == pytest.approx(theory.mean[0], abs=0.03)
    assert theory.kl - 0.04 < found.path_kl < theory.kl + 0.06
