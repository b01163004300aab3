"""Before any test imports Triton: without a GPU its kernels run interpreted."""

import os
from collections import defaultdict

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def best_settings():
    """What a recorded search chose, by the setting that names what was tuned.

    The settings of the best mean validation accuracy on the tuning seeds, those with
    the smallest learning rate among equals.
    """

    def best(records, name):
        tried = defaultdict(lambda: defaultdict(list))
        settings = {}
        for record in sorted(records, key=lambda r: r.settings["learning_rate"]):
            settings[record.arm] = record.settings
            candidates = tried[record.settings[name]]
            candidates[record.arm].append(record.metrics["validation"].value)
        return {
            tuned: settings[max(means, key=lambda arm: np.mean(means[arm]))]
            for tuned, means in tried.items()
        }

    return best


@pytest.fixture
def best_rates(best_settings):
    """The learning rates that a recorded search chose; see ``best_settings``."""

    def best(records, name):
        chosen = best_settings(records, name)
        return {tuned: found["learning_rate"] for tuned, found in chosen.items()}

    return best
