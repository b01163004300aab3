"""The mixture's exact quantities against torch.distributions and quadrature."""

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ftlib.cgm.mixture import GaussianMixture, right_of_zero, two_bumps


@pytest.fixture
def mixture():
    return GaussianMixture(
        torch.tensor([0.2, 0.5, 0.3]),
        torch.tensor([-2.0, 0.1, 1.5]),
        torch.tensor([0.5, 1.0, 0.2]),
    ).double()


def peer(mixture, coordinate=0):
    return MixtureSameFamily(
        Categorical(logits=mixture.logits[coordinate]),
        Normal(mixture.means[coordinate], mixture.log_scales[coordinate].exp()),
    )


def test_log_prob_equals_torch_distributions(mixture):
    x = torch.linspace(-40, 40, 101, dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(x[:, None]), peer(mixture).log_prob(x))


def test_coordinates_are_independent_and_have_their_own_parameters():
    model = two_bumps(0.3, dimensions=3)
    with torch.no_grad():
        model.means[1] += 1
    x = torch.randn(7, 3)
    expected = sum(peer(model, d).log_prob(x[:, d]) for d in range(3))
    torch.testing.assert_close(model.log_prob(x), expected)


def test_samples_follow_the_cumulative_distribution(mixture):
    torch.manual_seed(0)
    x = mixture.sample(200_000)
    assert x.shape == (200_000, 1)
    for point in (-2.0, 0.0, 1.5):
        share = (x < point).double().mean()
        truth = peer(mixture).cdf(torch.tensor(point, dtype=torch.float64))
        assert abs(share - truth) < 4 * (truth * (1 - truth) / len(x)) ** 0.5


def test_mass_right_of_zero_is_the_complement_of_the_cdf(mixture):
    expected = 1 - peer(mixture).cdf(torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(mixture.mass_right_of_zero(), expected)


def test_kl_of_reweighted_bumps_is_the_bernoulli_kl():
    """Bumps 8 sd apart: only the weights differ, so the KL is that of the weights."""
    kl = two_bumps(0.8).kl_from(two_bumps(0.5))
    assert kl == pytest.approx(0.19274475702, abs=1e-4)
    assert two_bumps(0.8).kl_from(two_bumps(0.8)) == 0


def test_kl_of_shifted_gaussians_has_a_closed_form():
    def gaussian(mean):
        return GaussianMixture(torch.ones(1), torch.tensor([mean]), torch.ones(1) / 2)

    kl = gaussian(1.0).kl_from(gaussian(0.25))
    assert kl == pytest.approx(0.75**2 / (2 * 0.25), rel=1e-7)


def test_right_of_zero_is_an_indicator_per_coordinate():
    x = torch.tensor([[-1.0, 0.0], [1e-9, 3.0]])
    assert right_of_zero(x).tolist() == [[0, 0], [1, 1]]
