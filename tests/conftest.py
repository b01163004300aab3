"""Before any test imports Triton: without a GPU its kernels run interpreted."""

import os
from collections import defaultdict

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from ftlib import runtime

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


@pytest.fixture
def base_cache(monkeypatch, tmp_path_factory):
    """On the CPU, with one cache for all tests: a toy base is then trained once."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("CI", "true")


@pytest.fixture
def check_base(monkeypatch, tmp_path):
    """Check that a base is pre-trained once, and goes on where it was stopped.

    Its training has four steps, with a checkpoint after the second.
    """

    def check(experiment, base):
        whole = experiment.base_model(base, 7).state_dict()

        def refuse(*args, **kwargs):
            raise AssertionError("trained a second time")

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "train", refuse)
            cached = experiment.base_model(base, 7).state_dict()
        assert all(torch.equal(cached[name], whole[name]) for name in whole)

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        training_loss, calls = experiment.training_loss, []

        def dies(learner, batch):
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return training_loss(learner, batch)

        with monkeypatch.context() as patch:
            patch.setattr(experiment, "training_loss", dies)
            with pytest.raises(KeyboardInterrupt):
                experiment.base_model(base, 7)
            calls.extend([1] * 10)  # from here on it lives
            resumed = experiment.base_model(base, 7).state_dict()
        assert len(calls) == 4 + 10 + 2  # steps 3 and 4, after the checkpoint of step 2
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)

    return check


@pytest.fixture
def fresh_accelerate():
    """Let a test set Accelerate up in its own way."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def as_on_a_gpu(monkeypatch, fresh_accelerate):
    """Weights in float32, passes in bf16; Accelerate is set up anew for that."""
    bf16 = runtime.Precision(torch.bfloat16, "as on a GPU of capability 8.0")
    monkeypatch.setattr(runtime, "precision", lambda on: bf16)
