from math import comb

import pytest

from ftlib.clipr.monitoring import Batch, gate, risk, settled
from ftlib.clipr.settings import GateSettings

SETTINGS = GateSettings(target=0.8, certainty=0.6, drop=0.3, window=2, patience=3)


def batches(*accepted, of=8):
    return [Batch(of, of, n) for n in accepted]


@pytest.mark.parametrize(("accepted", "rejected"), [(0, 0), (8, 0), (3, 5), (15, 1)])
def test_risk_is_the_sum_of_a_binomial(accepted, rejected):
    """P(Beta(a, b) < p) = P(Binomial(a + b − 1, p) ≥ a), for whole a and b."""
    p, a, b = SETTINGS.target, 1 + accepted, 1 + rejected
    n = a + b - 1
    exact = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(a, n + 1))
    batch = Batch(accepted + rejected, accepted + rejected, accepted)
    assert risk([batch], SETTINGS) == pytest.approx(exact, abs=1e-12)


def test_only_the_window_counts_and_only_what_was_observed():
    seen = Batch(8, 4, 3)
    assert risk([*batches(0, 0), seen, seen], SETTINGS) == risk([seen] * 2, SETTINGS)
    unseen = Batch(8, 0, 0)
    assert risk([seen, unseen], SETTINGS) == risk([seen], SETTINGS)


def test_the_gate_opens_when_the_share_is_probably_too_low():
    assert not gate(batches(8), SETTINGS).open
    assert gate(batches(4), SETTINGS).open
    assert "below 80% with probability 9" in gate(batches(4), SETTINGS).reason
    assert gate(batches(4), SETTINGS).risk == risk(batches(4), SETTINGS)


def test_the_gate_opens_when_the_share_falls():
    patient = GateSettings(target=0.8, certainty=1.0, drop=0.3)
    assert not gate(batches(8, 6), patient).open
    assert gate(batches(8, 5), patient).open
    assert gate(batches(8, 5), patient).reason == "fell from 100% to 62%"


def test_nothing_observed_opens_nothing():
    assert not gate([], SETTINGS).open
    assert not gate([Batch(8, 0, 0)], SETTINGS).open
    assert not gate([*batches(0), Batch(8, 0, 0)], SETTINGS).open


def test_rules_are_settled_after_enough_good_batches_in_a_row():
    assert not settled(batches(8, 8), SETTINGS)
    assert settled(batches(2, 8, 7, 8), SETTINGS)
    assert not settled(batches(8, 8, 6), SETTINGS)
    assert not settled([*batches(8, 8), Batch(8, 0, 0)], SETTINGS)
    assert not settled(batches(*[8] * 9), GateSettings(patience=None))
