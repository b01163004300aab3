"""Before any test imports Triton: without a GPU its kernels run interpreted."""

import os
from collections import defaultdict

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def best_rates():
    """What a recorded search chose, by the setting that names what was tuned.

    The best mean validation accuracy on the tuning seeds, the smallest among equals.
    """

    def best(records, name):
        tried = defaultdict(lambda: defaultdict(list))
        for record in records:
            rates = tried[record.settings[name]]
            rate = record.settings["learning_rate"]
            rates[rate].append(record.metrics["validation"].value)
        return {
            tuned: max(sorted(rates), key=lambda rate: np.mean(rates[rate]))
            for tuned, rates in tried.items()
        }

    return best
