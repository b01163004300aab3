"""Digits: data, painter, viewers and distances against enumeration and brute force."""

import copy
import itertools

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ftlib.cgm import digits
from ftlib.cgm.calibrate import InconsistentModelError, check_scores
from ftlib.cgm.digits import Images, Painter
from ftlib.cgm.dual import solve_dual
from ftlib.models.tiny import tiny_gpt

SEED = 1000


@pytest.fixture(scope="module")
def parts():
    return digits.split(SEED)


@pytest.fixture(scope="module")
def viewers(parts):
    return digits.train_viewers(parts, SEED)


def painter(patch=(4, 4), codes=3, spread=3.0):
    """Far from uniform, so that mistakes show."""
    torch.manual_seed(0)
    tokens = 64 // (patch[0] * patch[1])
    network = tiny_gpt(codes, width=16, context=tokens + 1)
    for parameter in network.parameters():
        parameter.data.mul_(spread)
    model = Painter(network, patch, codes)
    model.codebook.copy_(torch.randn(model.codebook.shape))
    return model.eval()


# -- data ------------------------------------------------------------------------------


def test_parts_are_disjoint_complete_and_stratified(parts):
    together = [parts.generator, parts.judge, parts.examiner]
    dealt = sorted(p.tobytes() for part in together for p in part.pixels)
    pixels, digit = load_digits(return_X_y=True)
    assert dealt == sorted(p.tobytes() for p in pixels)
    for part, share in zip(together, (0.6, 0.2, 0.2), strict=True):
        expected = share * np.bincount(digit)
        assert np.abs(np.bincount(part.digit) - expected).max() <= 2


def test_another_seed_deals_otherwise_and_the_same_one_alike(parts):
    again, other = digits.split(SEED), digits.split(SEED + 1)
    assert np.array_equal(again.judge.pixels, parts.judge.pixels)
    assert not np.array_equal(other.judge.pixels, parts.judge.pixels)


def test_unequal_keeps_the_counts_asked_for(parts):
    counts = (5, 0, 3, 1, 1, 1, 1, 1, 1, 90)
    kept = digits.unequal(parts.generator, counts)
    assert tuple(np.bincount(kept.digit, minlength=10)) == counts
    known = {p.tobytes() for p in parts.generator.pixels}
    assert all(p.tobytes() in known for p in kept.pixels)
    with pytest.raises(ValueError, match="asked for"):
        digits.unequal(parts.generator, (500,) + (1,) * 9)


def test_warping_with_no_strength_changes_nothing(parts):
    pixels = parts.generator.pixels[:7]
    same = digits.warped(pixels, 3, 0.0, SEED)
    assert np.array_equal(same, np.tile(pixels, (3, 1, 1)))


def test_warped_digits_stay_digits(parts, viewers):
    """A rotation that cuts off the edge, or ink that is lost, would show."""
    pixels, digit = parts.examiner.pixels, parts.examiner.digit
    copies = digits.warped(pixels, 2, 0.5, SEED)[len(pixels) :]
    assert ((copies >= 0) & (copies <= 16) & (copies == copies.round())).all()
    assert not np.array_equal(copies, pixels)
    assert abs(copies.mean() / pixels.mean() - 1) < 0.02
    loss = (viewers.judged(pixels) == digit).mean() - (
        viewers.judged(copies) == digit
    ).mean()
    assert loss < 0.03


# -- the model -------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(1, 1), (2, 2), (2, 4), (1, 8), (8, 8)])
def test_patches_are_in_reading_order_and_can_be_joined(patch):
    pixels = np.arange(3 * 64, dtype=float).reshape(3, 8, 8)
    patches = digits.cut(pixels, patch)
    across = 8 // patch[1]
    for t in range(patches.shape[1]):
        top, left = patch[0] * (t // across), patch[1] * (t % across)
        window = pixels[1, top : top + patch[0], left : left + patch[1]]
        assert np.array_equal(patches[1, t], window.ravel())
    assert np.array_equal(digits.joined(patches, patch), pixels)


def test_the_codebook_of_single_pixels_is_the_grey_levels(parts):
    patches = digits.cut(parts.generator.pixels, (1, 1))
    codebook = digits.learn_codebook(patches, 17, SEED)
    assert codebook.flatten().tolist() == list(range(17))


def test_images_of_codes_survive_the_round_trip():
    model = painter((2, 4), codes=9)
    images = model.images(model.sample(20))
    tokens = model.tokens(images)
    restored = model.codebook[tokens].double().numpy()
    np.testing.assert_allclose(digits.joined(restored, (2, 4)), images)


def test_tokens_are_the_nearest_patches_and_k_means_beats_chance(parts):
    pixels = parts.generator.pixels[:100]
    patches = digits.cut(pixels, (2, 4))
    model = painter((2, 4), codes=32)
    model.codebook.copy_(digits.learn_codebook(patches, 32, SEED))
    book = model.codebook.double().numpy()
    squares = ((patches[:, :, None] - book) ** 2).sum(-1)
    chosen = model.tokens(pixels).numpy()
    nearest = np.take_along_axis(squares, chosen[..., None], 2)[..., 0]
    np.testing.assert_allclose(nearest, squares.min(-1), atol=1e-3)
    # A codebook explains most of the variance; any 32 patches do not.
    assert squares.min(-1).mean() < 0.3 * patches.var(axis=(0, 1)).sum()


def test_probabilities_of_all_images_sum_to_one():
    model = painter()
    samples = model.sample(81)
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    samples.tokens[:, 1:] = every
    log_prob = model.log_prob(samples).detach().double()
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-5)
    # The loss of the pretraining is that of the very same probabilities.
    loss = model.next_token_loss(every).detach()
    assert float(-log_prob.mean() / 4) == pytest.approx(float(loss), abs=1e-5)


def test_samples_follow_the_enumerated_distribution():
    model = painter()
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    listed = model.sample(81)
    listed.tokens[:, 1:] = every
    p = model.log_prob(listed).detach().exp().double().numpy()
    n = 20_000
    drawn = model.sample(n).written @ torch.tensor([27, 9, 3, 1])
    found = np.bincount(drawn.numpy(), minlength=81) / n
    assert (np.abs(found - p) / np.sqrt(p * (1 - p) / n)).max() < 4.5


def test_the_scores_of_a_painter_pass_and_those_of_a_liar_fail():
    model = painter((2, 4), codes=16)
    assert check_scores(model, 2048) < 4.5
    liar = copy.deepcopy(model)
    liar.generation_config.top_k = 3
    with pytest.raises(InconsistentModelError):
        check_scores(liar, 2048)


def test_the_codebook_is_saved_with_the_weights():
    model, other = painter(), painter()
    other.codebook.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.codebook, model.codebook)


# -- viewers ---------------------------------------------------------------------------


def test_viewers_know_real_digits_they_were_not_trained_on(parts, viewers):
    other = parts.generator
    for look, least in ((viewers.judged, 0.9), (viewers.examined, 0.94)):
        assert (look(other.pixels) == other.digit).mean() > least


def test_features_are_the_networks_hidden_layer(parts, viewers):
    """Its last layer on our features gives its own predictions."""
    pixels, network = parts.generator.pixels[:200], viewers.network
    logits = viewers.features(pixels) @ network.coefs_[1] + network.intercepts_[1]
    flat = pixels.reshape(200, -1) / 16
    assert np.array_equal(logits.argmax(1), network.predict(flat))


def test_judge_and_examiner_see_disjoint_images(parts, viewers):
    assert viewers.examiner.shape_fit_[0] == len(parts.examiner)
    assert not {p.tobytes() for p in parts.judge.pixels} & {
        p.tobytes() for p in parts.examiner.pixels
    }


def test_nine_indicators_of_ten_digits():
    h = digits.indicators(np.array([0, 8, 9]))
    assert h.dtype == torch.float32
    assert h.tolist() == [[1] + [0] * 8, [0] * 8 + [1], [0] * 9]


def test_the_smallest_kl_is_the_duals():
    p = np.array([0.2, 0.25, 0.06, 0.04, 0.12, 0.03, 0.05, 0.14, 0.02, 0.09])
    h = digits.indicators(np.arange(10))
    tilt = solve_dual(h, torch.full((9,), 0.1), weights=p)
    assert digits.smallest_kl(p) == pytest.approx(tilt.kl, abs=1e-8)
    assert digits.smallest_kl(np.full(10, 0.1)) == pytest.approx(0)
    assert digits.smallest_kl(np.eye(10)[0]) == np.inf


# -- distances -------------------------------------------------------------------------


def test_the_feature_distance_is_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 1

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    expected = (
        np.mean([k(x, y) for x, y in itertools.permutations(a, 2)])
        + np.mean([k(x, y) for x, y in itertools.permutations(b, 2)])
        - 2 * np.mean([k(x, y) for x in a for y in b])
    )
    assert digits.feature_distance(a, b) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="two"):
        digits.feature_distance(a[:1], b)


def test_the_feature_distance_has_no_bias():
    rng = np.random.default_rng(0)
    same = [digits.feature_distance(*rng.normal(size=(2, 20, 4))) for _ in range(2000)]
    error = np.std(same) / len(same) ** 0.5
    assert abs(np.mean(same)) < 4 * error
    apart = digits.feature_distance(
        rng.normal(size=(500, 4)), rng.normal(size=(500, 4)) + 1
    )
    assert apart > 10 * np.std(same) / 5


def test_only_the_distance_within_digits_ignores_their_mix(parts, viewers):
    images, real = parts.generator, parts.judge
    skewed = digits.unequal(images, (100, 60, 30, 20, 20, 20, 20, 20, 20, 20))
    features, mixed, to = (viewers.features(i.pixels) for i in (images, skewed, real))
    near = digits.feature_distance(features, to)
    far = digits.feature_distance(mixed, to)
    assert far > near + 0.1
    within = [
        digits.within_class_distance(f, i.digit, to, real.digit)
        for f, i in ((features, images), (mixed, skewed))
    ]
    assert abs(within[0] - within[1]) < 0.1


def test_a_digit_without_images_has_no_distance_and_no_diversity():
    rng = np.random.default_rng(0)
    of = np.arange(18) % 9
    a = rng.normal(size=(18, 3))
    assert np.isnan(digits.within_class_distance(a, of, a, of))
    assert np.isnan(digits.diversity(rng.normal(size=(18, 8, 8)), of))


def test_diversity_is_the_variance_within_digits():
    """The digits themselves may be as far apart as they like."""
    rng = np.random.default_rng(0)
    digit = np.repeat(np.arange(10), 400)
    pixels = 100.0 * digit[:, None, None] + 3 * rng.normal(size=(4000, 8, 8))
    assert digits.diversity(pixels, digit) == pytest.approx(9, rel=0.02)


def test_the_nearest_distance_is_in_grey_levels_a_pixel():
    known = np.zeros((2, 8, 8))
    known[1] = 10
    pixels = np.stack([known[0], known[1] + 3.0])
    assert digits.nearest_distance(pixels, known) == pytest.approx(1.5)


def test_images_are_chosen_by_rows(parts):
    chosen = parts.judge[np.array([3, 1])]
    assert isinstance(chosen, Images)
    assert np.array_equal(chosen.pixels[1], parts.judge.pixels[1])
