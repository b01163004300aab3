"""Gradient noise against moments by enumeration."""

import pytest
import torch
from torch import nn

from ftlib.cgm.noise import gradient_noise


class Die(nn.Module):
    """Three faces with trainable logits."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.0, 0.5, -0.5]))

    def sample(self, n):
        return torch.multinomial(self.logits.softmax(0), n, True)

    def log_prob(self, faces):
        return self.logits.log_softmax(0)[faces]


def value(faces):
    return torch.tensor([1.0, 3.0, -2.0])[faces]


def exact_moments(f, n):
    """E[g] and tr Cov(g) of g = (1/n) Σ f(x_i) ∇log p(x_i), over all faces."""
    p = Die().logits.softmax(0).detach().double()
    score = torch.eye(3).double() - p
    terms = f.double()[:, None] * score
    mean = p @ terms
    covariance = (terms - mean).T @ (p[:, None] * (terms - mean))
    return mean, float(covariance.trace()) / n


def test_moments_are_those_of_enumeration():
    torch.manual_seed(0)
    model, n = Die(), 8
    before = model.logits.clone()
    found = gradient_noise(
        model,
        lambda x, _: {"plain": value(x) / n, "baseline": (value(x) - 1) / n},
        batch_size=n,
        batches=4000,
    )
    assert torch.equal(model.logits, before)
    for name, shift in (("plain", 0), ("baseline", 1)):
        mean, noise = exact_moments(value(torch.arange(3)) - shift, n)
        error = 4 * (noise / 4000) ** 0.5
        torch.testing.assert_close(found[name].mean.double(), mean, rtol=0, atol=error)
        assert found[name].noise == pytest.approx(noise, rel=0.1)
        assert found[name].signal == pytest.approx(float(mean @ mean), abs=2 * error)


def test_coefficients_of_zero_have_neither_signal_nor_noise():
    torch.manual_seed(0)
    found = gradient_noise(
        Die(), lambda x, _: {"none": 0 * value(x)}, batch_size=4, batches=2
    )["none"]
    assert (found.signal, found.noise) == (0, 0)


def test_the_estimators_see_the_log_probability_without_gradient():
    def reads(faces, log_prob):
        assert not log_prob.requires_grad
        torch.testing.assert_close(log_prob, Die().log_prob(faces).detach())
        return {"reads": log_prob}

    gradient_noise(Die(), reads, batch_size=4, batches=2)


def test_one_batch_is_refused():
    with pytest.raises(ValueError, match="draw 2 or more"):
        gradient_noise(Die(), lambda x, _: {}, batch_size=4, batches=1)
