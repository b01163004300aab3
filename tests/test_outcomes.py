import numpy as np
import pytest

from ftlib.outcomes import outcome_metrics, outcomes
from ftlib.results import Metric, NotRecordedError


def test_outcomes_survive_a_record():
    right = np.random.default_rng(0).random(123) < 0.5
    right[:50] = True  # all bits of a number
    metrics = outcome_metrics("gap", right)
    stored = {k: Metric(float(repr(v.value)), v.n) for k, v in metrics.items()}
    assert (outcomes(stored, "gap") == right).all()
    with pytest.raises(NotRecordedError):
        outcomes(stored, "no-gap")
