"""Chains, grids and masked diffusion against enumeration."""

import itertools

import numpy as np
import pytest
import torch

from ftlib.cgm.calibrate import InconsistentModelError, check_scores
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.strings import (
    COIL,
    HELIX,
    LABORATORY,
    NATURE,
    STRAND,
    Chain,
    Grid,
    MaskedDiffusion,
    Paths,
    decode,
    residue_counts,
    segments,
)

UNEVEN = Chain(np.array([[0.5, 0.5, 0.0], [0.2, 0.1, 0.7], [0.3, 0.3, 0.4]]))


def every_string(length):
    return torch.tensor(list(itertools.product(range(3), repeat=length)))


def probability_by_hand(chain, string):
    p = chain.start[string[0]]
    for before, after in itertools.pairwise(string):
        p *= chain.transitions[before, after]
    return p


# -- chains ----------------------------------------------------------------------------


@pytest.mark.parametrize("chain", [LABORATORY, NATURE, UNEVEN])
def test_the_start_is_stationary(chain):
    np.testing.assert_allclose(chain.start @ chain.transitions, chain.start, atol=1e-12)
    assert chain.start.sum() == pytest.approx(1)
    np.testing.assert_allclose(chain.transitions.sum(1), 1)


@pytest.mark.parametrize("length", [1, 2, 6])
def test_count_probabilities_equal_enumeration(length):
    expected = np.zeros((length + 1, length + 1))
    for string in every_string(length).tolist():
        p = probability_by_hand(UNEVEN, string)
        expected[string.count(HELIX), string.count(STRAND)] += p
    np.testing.assert_allclose(UNEVEN.count_probabilities(length), expected, atol=1e-15)


def test_counts_of_sampled_strings_follow_the_table():
    strings = NATURE.sample(100_000, 20, torch.Generator().manual_seed(0))
    table = NATURE.count_probabilities(20)
    counts = residue_counts(strings).double()
    mean = [(table.sum(1 - i) * np.arange(21)).sum() for i in range(2)]
    error = counts.std(0) / len(counts) ** 0.5
    assert ((counts.mean(0) - torch.tensor(mean)).abs() < 4 * error).all()


def test_log_prob_equals_the_product_of_transitions():
    strings = every_string(4)
    expected = [probability_by_hand(UNEVEN, s) for s in strings.tolist()]
    np.testing.assert_allclose(UNEVEN.log_prob(strings).exp(), expected, atol=1e-15)


def test_strings_with_the_same_counts_share_one_unit_of_probability():
    strings = every_string(5)
    p = NATURE.log_prob_given_counts(strings).exp()
    for counts in residue_counts(strings).unique(dim=0):
        same = (residue_counts(strings) == counts).all(1)
        assert float(p[same].sum()) == pytest.approx(1)


def test_segments_and_letters():
    string = torch.tensor([[HELIX, HELIX, COIL, STRAND, STRAND, HELIX]])
    assert segments(string).tolist() == [4]
    assert decode(string[0]) == "HHCEEH"
    assert residue_counts(string).tolist() == [[3, 2]]


# -- grids -----------------------------------------------------------------------------

GRID = Grid((1, 3, 4), (0, 2))


def paths_of(strings):
    return Paths(strings, torch.zeros_like(strings))


def test_h_is_the_indicator_of_the_limits():
    strings = every_string(6)
    helix, strand = residue_counts(strings).T
    limits = [(a, b) for a in (*GRID.helix, 6) for b in (*GRID.strand, 6)][:-1]
    expected = torch.stack([(helix <= a) & (strand <= b) for a, b in limits], 1)
    assert GRID.constraints == len(limits) == 11
    assert torch.equal(GRID(paths_of(strings)), expected.float())


def test_one_list_of_limits_may_be_empty():
    strings = every_string(3)
    h = Grid((1,), ())(paths_of(strings))
    assert torch.equal(h, (strings == HELIX).sum(1, keepdim=True).le(1).float())


def test_cell_probabilities_are_those_of_the_strings():
    strings, table = every_string(6), UNEVEN.count_probabilities(6)
    cells = GRID.cell(residue_counts(strings))
    expected = torch.zeros(12, dtype=torch.float64)
    expected.index_add_(0, cells, UNEVEN.log_prob(strings).exp())
    found = GRID.cell_probabilities(table)
    np.testing.assert_allclose(found, expected, atol=1e-14)
    mean = UNEVEN.log_prob(strings).exp() @ GRID(paths_of(strings)).double()
    np.testing.assert_allclose(found @ GRID.indicators.double().numpy(), mean)


def test_coarser_grids_keep_limits_of_the_finest():
    finest = Grid(tuple(range(10, 29)), tuple(range(4, 23)))
    assert finest.coarser(20, 20) == finest
    for parts in (2, 3, 5, 10, 14):
        coarse = finest.coarser(parts, 1)
        assert len(set(coarse.helix)) == parts - 1
        assert set(coarse.helix) <= set(finest.helix)
        assert coarse.strand == ()
    assert finest.coarser(2, 2) == Grid((19,), (13,))


def test_the_dual_gives_every_cell_its_share_in_nature():
    """The cells determine h and h the cells: the smallest KL is that of the cells."""
    grid = Grid((10, 17, 24), (5, 9, 15))
    p, q = (
        grid.cell_probabilities(chain.count_probabilities(64))
        for chain in (LABORATORY, NATURE)
    )
    h = grid.indicators.double().numpy()
    tilt = solve_dual(h, q @ h, weights=p)
    assert tilt.kl == pytest.approx(float((q * np.log(q / p)).sum()), rel=1e-8)
    odds = np.log(q / p) - np.log(q / p)[-1]
    np.testing.assert_allclose(h @ tilt.alpha, odds, atol=1e-6)


# -- masked diffusion ------------------------------------------------------------------


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = MaskedDiffusion(length=5, steps=3, width=16)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # far from uniform
    return model


def every_path(model, order):
    strings = every_string(len(order))
    return Paths(strings, order.expand_as(strings))


@torch.no_grad()
def log_prob_by_hand(model, string, order):
    """Step by step, the one-hot input written out, float64."""
    network, total = model.network.double(), 0.0
    for step in range(model.steps):
        seen = torch.zeros(len(string), 3, dtype=torch.float64)
        for i, letter in enumerate(string):
            if order[i] < step:
                seen[i, letter] = 1
        logits = network(seen.flatten()).view(-1, 3).log_softmax(-1)
        total += sum(logits[i, s] for i, s in enumerate(string) if order[i] == step)
    network.float()
    return float(total)


@pytest.mark.parametrize(
    ("length", "steps", "sizes"),
    [(6, 3, [1, 2, 3]), (64, 8, [1, 4, 6, 8, 9, 12, 12, 12]), (4, 1, [4])],
)
def test_the_schedule_unmasks_every_position_once(length, steps, sizes):
    drawn = MaskedDiffusion(length, steps, 4).random_steps(7)
    for row in drawn:
        assert row.bincount(minlength=steps).tolist() == sizes


def test_orders_are_uniform(model):
    torch.manual_seed(1)
    first = (model.random_steps(30_000) == 0).double().mean(0)
    assert (first - 0.2).abs().max() < 4 * (0.16 / 30_000) ** 0.5


def test_log_prob_equals_scoring_step_by_step(model):
    torch.manual_seed(1)
    paths = model.sample(20)
    scores = model.log_prob(paths).tolist()
    for i, score in enumerate(scores):
        expected = log_prob_by_hand(
            model, paths.strings[i].tolist(), paths.steps[i].tolist()
        )
        assert score == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_probabilities_of_all_strings_sum_to_one_in_any_order(model):
    torch.manual_seed(2)
    for order in model.random_steps(5):
        total = model.log_prob(every_path(model, order)).exp().sum()
        assert float(total) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_sampling_frequencies_are_the_probabilities(model):
    torch.manual_seed(3)
    order, n = model.random_steps(1)[0], 100_000
    drawn = model.unmask(order.expand(n, -1)).strings
    digits = 3 ** torch.arange(4, -1, -1)
    found = torch.bincount(drawn @ digits, minlength=3**5) / n
    expected = model.log_prob(every_path(model, order)).exp()
    error = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() < 4.5 * error + 1e-5).all()
    assert expected.max() > 5 * expected.mean()  # far from uniform


def test_samples_have_a_length_and_slices(model):
    paths = model.sample(10)
    part = paths[2:5]
    assert len(paths) == 10
    assert len(part) == 3
    assert torch.equal(part.steps, paths.steps[2:5])


def test_scores_belong_to_samples(model):
    torch.manual_seed(4)
    assert check_scores(model, 4096) < 4.5


def test_scores_of_another_schedule_are_noticed(model, monkeypatch):
    """Scored as if the first two steps were one."""
    honest = model.log_prob

    def with_two_steps_in_one(paths):
        return honest(Paths(paths.strings, (paths.steps - 1).clamp(min=0)))

    monkeypatch.setattr(model, "log_prob", with_two_steps_in_one)
    torch.manual_seed(5)
    with pytest.raises(InconsistentModelError, match="contradicts"):
        check_scores(model, 8192)


def test_a_step_without_positions_is_refused():
    with pytest.raises(ValueError, match="20 steps on a cosine schedule leave one"):
        MaskedDiffusion(length=100, steps=20, width=4)
