"""NaN and inf in the middle of a run: it stops in time, and what was good serves."""

import json
import math
from dataclasses import replace

import pytest
import torch
from _training_run import LAST, SETTINGS, new_model, on_policy, run
from safetensors.torch import load_file

from ftlib import experiments, files
from ftlib.experiments import Arm, RunsFailedError, run_plan
from ftlib.training import NonFiniteLossError, train

STEP = 7  # which fails: after the checkpoint of step 6


def failing(spoil):
    """The loss of the run, spoilt at one step."""
    steps = iter(range(1, SETTINGS.steps + 1))

    def loss(model, batch):
        value, metrics = on_policy(model, batch)
        return (spoil(value) if next(steps) == STEP else value), metrics

    return loss


SPOILERS = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss + math.inf,
    "gradient": lambda loss: loss + (loss * 0).abs().sqrt(),  # 0, with a slope of inf
}


@pytest.fixture(params=SPOILERS)
def stopped(request, tmp_path):
    """A run that was stopped, and the error that told of it."""
    with pytest.raises(NonFiniteLossError) as error:
        run(tmp_path, failing(SPOILERS[request.param]))
    return tmp_path, error.value


def test_the_cause_put_right_the_run_ends_as_if_nothing_had_been(stopped, straight):
    directory, error = stopped
    assert (error.step, error.checkpoint) == (STEP, directory / "step-000006")
    run(directory)
    ends = [(end / files.SEAL).read_text() for end in (directory / LAST, straight)]
    assert ends[0] == ends[1]


def test_the_cause_left_as_it_was_the_run_stops_there_again(stopped):
    directory, error = stopped
    again = iter(range(error.step, SETTINGS.steps + 1))

    def loss(model, batch):
        value, metrics = on_policy(model, batch)
        return (value * math.nan if next(again) == 7 else value), metrics

    with pytest.raises(NonFiniteLossError, match="step 7") as second:
        run(directory, loss)
    assert second.value.checkpoint == error.checkpoint


def test_the_last_good_weights_are_finite_and_train_on_with_a_lower_rate(stopped):
    directory, error = stopped
    weights = load_file(error.checkpoint / "model.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    model = new_model()
    model.load_state_dict(weights, strict=False)  # tied weights are there once
    lower = replace(SETTINGS, learning_rate=SETTINGS.learning_rate / 10)
    history = train(model, range(9), on_policy, lower, directory=directory / "lower")
    assert [record["step"] for record in history] == list(range(1, 13))
    assert all(math.isfinite(record["loss"]) for record in history)


def test_a_metric_may_be_nan_and_is_resumed_from(tmp_path):
    """Only loss and gradient move weights."""

    def loss(model, batch):
        return on_policy(model, batch)[0], {"ratio": math.nan}

    def dies(model, batch):
        if (tmp_path / "step-000006").exists():
            raise InterruptedError
        return loss(model, batch)

    with pytest.raises(InterruptedError):
        run(tmp_path, dies)
    ratios = run(tmp_path, loss).column("ratio")
    assert len(ratios) == SETTINGS.steps
    assert all(map(math.isnan, ratios))


def test_a_run_that_diverges_stops_no_other_and_nan_is_recorded_as_null(
    tmp_path, monkeypatch
):
    def diverges(seed):
        run(tmp_path / "training", failing(SPOILERS["nan"]))

    arms = [
        Arm("e", "diverges", {}, diverges),
        Arm("e", "measures nothing", {}, lambda seed: {"kl": math.nan}),
    ]
    monkeypatch.setitem(experiments.METHODS, "toy", "test_divergence")
    monkeypatch.setitem(globals(), "plan", lambda scale: arms)
    with pytest.raises(RunsFailedError, match="e/diverges seed 0: NonFiniteLossError"):
        run_plan("toy", "cpu", [0], directory=tmp_path / "results")
    stored = json.loads((tmp_path / "results" / "toy" / "cpu.json").read_text())
    (record,) = stored["records"]
    assert record["arm"] == "measures nothing"
    assert record["metrics"] == {"kl": {"value": None, "n": None}}
