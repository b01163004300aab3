"""The equations of CGM against enumeration, autograd, closed forms and simulation."""

import math

import pytest
import torch
from torch.func import grad

from ftlib.cgm import objective


def pairs_violation(w, y, strata):
    """Enumerate all pairs: the definition of the (stratified) U-statistic."""
    n = len(y)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i == j:
                continue
            if strata is None:
                share = 1 / (n * (n - 1))
            elif strata[i] != strata[j]:
                share = 1 / n**2
            else:
                m = int((strata == strata[i]).sum())
                share = m / (m - 1) / n**2
            total = total + share * w[i] * w[j] * (y[i] @ y[j])
    return total


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(12, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
    return h, target


STRATA = [
    None,
    torch.tensor([0, 1, 2] * 4),
    torch.tensor([7, 7, 7, 2, 2, 2, 2, 2, 2, 2, 2, 2]),
]


@pytest.mark.parametrize("strata", STRATA)
def test_violation_equals_the_sum_over_pairs(batch, strata):
    h, target = batch
    expected = pairs_violation(torch.ones(12), h - target, strata)
    torch.testing.assert_close(objective.violation(h, target, strata), expected)


@pytest.mark.parametrize("strata", STRATA)
def test_violation_coefficients_equal_autograd_on_importance_weights(batch, strata):
    h, target = batch
    weights = torch.ones(12, dtype=torch.float64)
    expected = grad(pairs_violation)(weights, h - target, strata)
    actual = objective.violation_coefficients(h, target, strata)
    torch.testing.assert_close(actual, expected)


def test_violation_equals_the_papers_mean_and_variance_form(batch):
    h, target = batch
    y = h - target
    n = len(y)
    variance = (y - y.mean(0)).square().sum(0) / (n * (n - 1))
    expected = (y.mean(0).square() - variance).sum()
    torch.testing.assert_close(objective.violation(h, target), expected)


@pytest.mark.parametrize("strata", STRATA)
def test_violation_baseline_is_what_the_other_samples_predict(batch, strata):
    h, target = batch
    y = h - target
    plain = objective.violation_coefficients(h, target, strata)
    with_baseline = objective.violation_coefficients(h, target, strata, baseline=True)
    baseline = (plain - with_baseline) * len(y) / 2
    for i in range(len(y)):
        own = torch.ones(12).bool() if strata is None else strata == strata[i]
        across = y[~own].sum(0) / len(y)
        others = [j for j in range(12) if own[j] and j != i]
        within = own.sum() / len(y)
        values = []
        for j in others:
            rest = torch.stack([y[k] for k in others if k != j]).mean(0)
            values.append(y[j] @ (across + within * rest))
        torch.testing.assert_close(baseline[i], torch.stack(values).mean())


def test_kl_coefficients_use_the_mean_of_the_others():
    ratio = torch.tensor([1.0, 4.0, -2.0, 0.5], dtype=torch.float64)
    expected = [
        (ratio[i] - torch.cat([ratio[:i], ratio[i + 1 :]]).mean()) / 4 for i in range(4)
    ]
    torch.testing.assert_close(objective.kl_coefficients(ratio), torch.stack(expected))


class Categorical:
    """Five outcomes, so that every expectation can be enumerated."""

    h = torch.tensor([[0.0, 1], [1, 0], [1, 1], [-1, 2], [0, 0]], dtype=torch.float64)
    target = torch.tensor([0.6, 0.2], dtype=torch.float64)
    base = torch.tensor([0.3, 0.2, 0.1, 0.25, 0.15], dtype=torch.float64).log()
    theta = torch.tensor([0.2, -0.3, 0.5, 0.0, -0.4], dtype=torch.float64)
    alpha = torch.tensor([0.7, -0.4], dtype=torch.float64)

    @property
    def log_z(self):
        return float(torch.logsumexp(self.base + self.h @ self.alpha, 0))

    def exact(self, name, theta):
        log_p = theta.log_softmax(0)
        p = log_p.exp()
        tilt = self.base + self.h @ self.alpha - self.log_z
        return {
            "relax": (p @ self.h - self.target).square().sum()
            + 0.3 * (p @ (log_p - self.base)),
            "reward": p @ (log_p - tilt),
            "forward_kl": tilt.exp() @ (tilt - log_p),
        }[name]

    def estimate(self, name, theta, x, baseline=False):
        log_p = theta.log_softmax(-1)[x]
        log_base, h = self.base[x], self.h[x]
        if name == "relax":
            return objective.relax_loss(
                log_p, log_base, h, self.target, 0.3, violation_baseline=baseline
            )
        loss = getattr(objective, f"{name}_loss")
        return loss(log_p, log_base, h, self.alpha, self.log_z)


@pytest.mark.parametrize(
    ("name", "baseline"),
    [("relax", False), ("relax", True), ("reward", False), ("forward_kl", False)],
)
def test_losses_and_gradients_are_unbiased(name, baseline):
    """Over all batches of four from five outcomes, each with its probability."""
    world = Categorical()
    outcomes = torch.cartesian_prod(*[torch.arange(5)] * 4)
    log_p = world.theta.log_softmax(0)
    probability = log_p[outcomes].sum(1).exp()
    value, gradient = torch.func.vmap(
        lambda x: torch.func.grad_and_value(
            lambda theta: world.estimate(name, theta, x, baseline)
        )(world.theta)[::-1]
    )(outcomes)
    expected = world.exact(name, world.theta)
    expected_gradient = grad(lambda theta: world.exact(name, theta))(world.theta)
    torch.testing.assert_close((probability @ value), expected)
    torch.testing.assert_close(probability @ gradient, expected_gradient)


@pytest.mark.parametrize("name", ["relax", "reward", "forward_kl"])
def test_exact_gradients_equal_finite_differences(name):
    """Ties the oracle above to numbers that no autograd computed."""
    world = Categorical()
    analytic = grad(lambda theta: world.exact(name, theta))(world.theta)
    step = 1e-6
    for k in range(5):
        move = torch.zeros(5, dtype=torch.float64)
        move[k] = step
        up = world.exact(name, world.theta + move)
        down = world.exact(name, world.theta - move)
        torch.testing.assert_close(
            (up - down) / (2 * step), analytic[k], rtol=1e-7, atol=1e-8
        )


def test_u_statistic_is_unbiased_where_the_plug_in_is_not():
    """Bernoulli(0.5) against target 0.8, n = 10: the plug-in adds p(1−p)/n = 0.025."""
    generator = torch.Generator().manual_seed(0)
    h = torch.rand(200_000, 10, 1, generator=generator).lt(0.5).double()
    target = torch.tensor([0.8], dtype=torch.float64)
    unbiased = torch.func.vmap(lambda x: objective.violation(x, target))(h)
    plug_in = torch.func.vmap(lambda x: objective.plug_in_violation(x, target))(h)
    error = 4 * unbiased.std() / math.sqrt(len(h))
    assert abs(unbiased.mean() - 0.09) < error
    assert abs(plug_in.mean() - (0.09 + 0.025)) < error
    assert error < 0.002


def test_dealt_prompts_bias_the_plain_statistic_and_strata_cure_it():
    """n = 64 samples over K = 8 prompts: the plain estimate shrinks by (n−K)/(n−1)."""
    generator = torch.Generator().manual_seed(0)
    n, k, trials = 64, 8, 20_000
    prompt = torch.arange(n) % k
    p = torch.linspace(0.1, 0.9, k, dtype=torch.float64)
    female = torch.rand(trials, n, generator=generator) < p[prompt]
    columns = torch.eye(k, dtype=torch.float64)[prompt]
    y = k * (2 * female.double() - 1)[..., None] * columns
    target = torch.zeros(k, dtype=torch.float64)
    truth = (2 * p - 1).square().sum()
    plain = torch.func.vmap(lambda h: objective.violation(h, target))(y)
    by_prompt = torch.stack([objective.violation(h, target, prompt) for h in y[:5000]])
    error = plain.std() / math.sqrt(trials)
    assert abs(plain.mean() - truth * (n - k) / (n - 1)) < 4 * error
    assert abs(plain.mean() - truth) > 10 * error
    assert abs(by_prompt.mean() - truth) < 4 * by_prompt.std() / math.sqrt(5000)


def test_baseline_lowers_the_variance_of_the_violation_gradient():
    world = Categorical()
    torch.manual_seed(0)
    x = torch.distributions.Categorical(logits=world.theta).sample((4000, 32))

    def gradients(baseline):
        return torch.func.vmap(
            grad(
                lambda theta, x: objective.surrogate(
                    theta.log_softmax(-1)[x],
                    objective.violation_coefficients(
                        world.h[x], world.target, baseline=baseline
                    ),
                    torch.zeros(()),
                )
            ),
            in_dims=(None, 0),
        )(world.theta, x)

    assert gradients(True).var(0).sum() < gradients(False).var(0).sum()


def test_surrogate_has_the_value_and_the_gradient_asked_for():
    log_prob = torch.tensor([-3.0, -1e4], requires_grad=True)
    coefficients = torch.tensor([0.5, -2.0], requires_grad=True)
    loss = objective.surrogate(log_prob, coefficients, torch.tensor(7.0))
    loss.backward()
    assert loss.item() == 7.0
    assert log_prob.grad.tolist() == [0.5, -2.0]
    assert coefficients.grad is None


def test_extreme_log_probabilities_stay_finite():
    log_prob = torch.tensor([-1e4, -2.0, -1e4], requires_grad=True)
    log_base = torch.tensor([-1e4, -1e4, -3.0])
    h, target = torch.tensor([[1.0], [0.0], [1.0]]), torch.tensor([0.5])
    objective.relax_loss(log_prob, log_base, h, target, 0.1).backward()
    assert log_prob.grad.isfinite().all()


@pytest.mark.parametrize(
    "call",
    [
        lambda h, t: objective.violation(h[:1], t),
        lambda h, t: objective.violation(h, t, torch.arange(12)),
        lambda h, t: objective.violation_coefficients(h[:2], t, baseline=True),
        lambda h, t: objective.kl_coefficients(h[:1, 0]),
    ],
)
def test_too_few_samples_are_refused(batch, call):
    with pytest.raises(ValueError, match="use a larger batch"):
        call(*batch)
