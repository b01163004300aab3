import copy
import itertools
import json
import math
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from _two_process_training import CLIPPED
from _two_process_training import STEPS as TWO_PROCESS_STEPS
from _two_process_training import weights as two_process_weights
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from two_processes import run_in_two_processes

from ftlib import runtime
from ftlib.training import (
    NonFiniteLossError,
    TrainingSettings,
    example_ids,
    train,
)

SETTINGS = TrainingSettings(
    steps=10, batch_size=4, learning_rate=0.05, warmup_steps=2, weight_decay=0.1
)


assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("TQDM_DISABLE", "1")


def make_model(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def make_dataset(examples=22, dtype=torch.float32):
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(examples, 3, generator=generator).to(dtype)
    return list(zip(inputs, inputs.prod(1, keepdim=True), strict=True))


def squared_error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_fine_tuning_warms_up_over_a_tenth_of_the_steps():
    assert TrainingSettings.fine_tuning(55, 4, 1e-3, 7) == TrainingSettings(
        steps=55, batch_size=4, learning_rate=1e-3, warmup_steps=5, seed=7
    )
    linear = TrainingSettings.fine_tuning(9, 4, 1e-3, 0, "linear")
    assert (linear.warmup_steps, linear.schedule) == (0, "linear")


# --- the data -----------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "batch"), [(22, 4), (4, 4), (9, 1), (7, 5)])
def test_an_epoch_is_a_permutation_cut_into_whole_batches(examples, batch):
    settings = replace(SETTINGS, steps=60, batch_size=batch)
    steps = list(example_ids(examples, settings))
    assert len(steps) == 60
    per_epoch = examples // batch
    epochs = [
        list(itertools.chain(*steps[first : first + per_epoch]))
        for first in range(0, 60 - per_epoch + 1, per_epoch)
    ]
    for epoch in epochs:
        assert len(epoch) == per_epoch * batch
        assert set(Counter(epoch).values()) == {1}
        assert set(epoch) <= set(range(examples))
    assert len({tuple(epoch) for epoch in epochs}) > 1
    # What one epoch leaves out comes in another.
    assert set(itertools.chain(*epochs)) == set(range(examples))


@pytest.mark.parametrize("after", [0, 1, 4, 5, 6, 9, 10])
def test_the_ids_of_a_step_do_not_depend_on_where_the_run_began(after):
    assert (
        list(example_ids(22, SETTINGS, after))
        == list(example_ids(22, SETTINGS))[after:]
    )


def test_the_order_follows_the_seed_alone():
    torch.manual_seed(1)
    first = list(example_ids(22, SETTINGS))
    torch.manual_seed(2)
    assert list(example_ids(22, SETTINGS)) == first
    assert list(example_ids(22, replace(SETTINGS, seed=1))) != first


def test_without_shuffling_the_data_set_s_own_order_is_kept():
    ids = example_ids(9, replace(SETTINGS, steps=3, shuffle=False))
    assert list(ids) == [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]


def test_batches_are_collated_from_the_ids_of_the_step():
    seen = []

    def loss(model, batch):
        seen.append(batch)
        return model(torch.ones(1, 3)).square().mean()

    prompts = [f"prompt {i}" for i in range(6)]
    train(make_model(), prompts, loss, SETTINGS, collate=lambda examples: examples)
    assert seen == [[prompts[i] for i in ids] for ids in example_ids(6, SETTINGS)]


def test_a_range_of_the_batch_s_size_makes_every_step_an_epoch():
    seen = []

    def loss(model, batch):
        seen.append(sorted(batch.tolist()))
        return model(torch.randn(len(batch), 3)).square().mean()

    train(make_model(), range(4), loss, SETTINGS)
    assert seen == [[0, 1, 2, 3]] * 10


def test_a_mapped_file_trains_like_what_is_in_memory(tmp_path):
    examples = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float32)
    np.save(tmp_path / "examples.npy", examples)
    mapped = np.load(tmp_path / "examples.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)

    def loss(model, batch):
        return model(batch).square().mean()

    models = [make_model(), make_model()]
    for model, dataset in zip(models, (examples, mapped), strict=True):
        train(
            model, dataset, loss, SETTINGS, collate=lambda x: torch.tensor(np.stack(x))
        )
    for first, second in zip(*(m.parameters() for m in models), strict=True):
        assert_equal(first, second)


# --- the arithmetic -----------------------------------------------------------------


def learning_rate(settings, step):
    """The schedules' definition, with steps counted from 0."""
    warmup, total = settings.warmup_steps, settings.steps
    if step < warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / (total - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return settings.learning_rate * shape[settings.schedule]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("max_grad_norm", [0.05, None])
def test_training_equals_a_loop_written_by_hand(schedule, max_grad_norm):
    settings = replace(SETTINGS, schedule=schedule, max_grad_norm=max_grad_norm)
    dataset = make_dataset()
    model, twin = make_model(), make_model()
    history = train(model, dataset, squared_error, settings)

    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05, weight_decay=0.1)
    norms = []
    for step, ids in enumerate(example_ids(22, settings)):
        inputs, targets = (
            torch.stack(column)
            for column in zip(*[dataset[i] for i in ids], strict=True)
        )
        optimizer.param_groups[0]["lr"] = learning_rate(settings, step)
        optimizer.zero_grad()
        loss = F.mse_loss(twin(inputs), targets)
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()
        norms.append(norm.item())
        if max_grad_norm:
            nn.utils.clip_grad_norm_(twin.parameters(), max_grad_norm)
        optimizer.step()
        assert history[step]["loss"] == loss.item()
        assert history[step]["learning_rate"] == pytest.approx(
            learning_rate(settings, step), rel=1e-14
        )
    assert_equal(state_of(model), state_of(twin))
    assert history.column("step") == list(range(1, 11))
    assert history.column("grad_norm") == pytest.approx(norms, rel=1e-5)
    assert max(norms) > 0.05, "clipping was never put to work"


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_chunks_train_like_one_batch(accumulate):
    def loss(model, batch):
        error = squared_error(model, batch)
        return error, {"half": error / 2, "examples": float(len(batch[0]))}

    dataset = make_dataset(dtype=torch.float64)
    whole, parts = make_model(torch.float64), make_model(torch.float64)
    expected = train(whole, dataset, loss, SETTINGS)
    found = train(parts, dataset, loss, replace(SETTINGS, accumulate=accumulate))
    for name, tensor in state_of(whole).items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, rtol=0, atol=1e-13)
    for name in ("loss", "half", "grad_norm"):
        assert found.column(name) == pytest.approx(expected.column(name), rel=1e-10)
    assert found.column("examples") == [4 / accumulate] * 10


def test_a_given_optimizer_is_scheduled_from_its_own_learning_rate():
    model, twin = make_model(), make_model()
    settings = replace(SETTINGS, steps=3, warmup_steps=0, schedule="constant")
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    history = train(model, make_dataset(4), squared_error, settings, optimizer=sgd)
    assert history.column("learning_rate") == [0.5] * 3

    other = torch.optim.SGD(twin.parameters(), lr=0.5)
    plain = replace(settings, learning_rate=123.0)
    train(twin, make_dataset(4), squared_error, plain, optimizer=other)
    assert_equal(state_of(model), state_of(twin))


def test_frozen_parameters_stay_and_gradients_of_old_are_dropped():
    model, twin = make_model(), make_model()
    model[0].requires_grad_(False)
    frozen = state_of(model[0])
    twin[0].requires_grad_(False)
    for parameter in model[2].parameters():
        parameter.grad = torch.full_like(parameter, 1e6)
    train(model, make_dataset(), squared_error, SETTINGS)
    train(twin, make_dataset(), squared_error, SETTINGS)
    assert_equal(state_of(model[0]), frozen)
    assert_equal(state_of(model), state_of(twin))


# --- what goes wrong ----------------------------------------------------------------


class FailingAt:
    """A loss whose value or gradient is spoilt at one step."""

    def __init__(self, step, spoil):
        self.calls, self.step, self.spoil = itertools.count(1), step, spoil

    def __call__(self, model, batch):
        self.weights = state_of(model)
        loss = squared_error(model, batch)
        return self.spoil(loss) if next(self.calls) == self.step else loss


SPOILERS = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss * math.inf,
    "gradient": lambda loss: loss + (loss * 0).sqrt(),
}


@pytest.mark.parametrize("spoiler", SPOILERS)
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_non_finite_loss_stops_before_the_step(tmp_path, spoiler, checkpointed):
    model, loss = make_model(), FailingAt(6, SPOILERS[spoiler])
    directory = tmp_path if checkpointed else None
    every = 2 if checkpointed else None
    settings = replace(SETTINGS, checkpoint_every=every)
    with pytest.raises(NonFiniteLossError) as caught:
        train(model, make_dataset(), loss, settings, directory=directory)
    ids = list(example_ids(22, SETTINGS))[5]
    error = caught.value
    assert (error.step, error.example_ids) == (6, ids)
    assert "step 6" in str(error)
    assert str(ids) in str(error)
    assert_equal(state_of(model), loss.weights)
    if checkpointed:
        assert error.checkpoint == tmp_path / "step-000004"
        assert str(error.checkpoint) in str(error)
    else:
        assert error.checkpoint is None
        assert "pass `directory`" in str(error)


def test_a_non_finite_chunk_is_seen_through_accumulation():
    settings = replace(SETTINGS, accumulate=2)
    with pytest.raises(NonFiniteLossError, match="step 2: loss nan"):
        train(make_model(), make_dataset(), FailingAt(3, SPOILERS["nan"]), settings)


def test_a_large_batch_is_named_in_a_readable_message():
    error = NonFiniteLossError(
        1, {"loss": math.nan, "grad_norm": 0.0}, range(4096), None
    )
    assert error.example_ids == list(range(4096))
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -0.1}, "learning_rate must be at least 0"),
        ({"learning_rate": math.nan}, "learning_rate must be at least 0"),
        ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be above 0, or None"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin': .*cosine, linear"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 23}, "22 examples, fewer than batch_size 23"),
        ({"accumulate": 3}, r"batch_size 4 .* 3 equal parts \(1 processes"),
        ({"checkpoint_every": 2}, "no directory"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        train(make_model(), make_dataset(), squared_error, replace(SETTINGS, **change))


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        train(
            make_model().requires_grad_(False), make_dataset(), squared_error, SETTINGS
        )


def test_an_accelerator_that_scales_gradients_itself_is_refused():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps at 1"):
        train(
            make_model(),
            make_dataset(),
            squared_error,
            SETTINGS,
            accelerator=accelerator,
        )


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"loss of shape \(4, 1\).*mean"),
        (
            lambda model, batch: (model(batch[0]).mean(), {"grad_norm": 1.0}),
            "metrics named grad_norm",
        ),
    ],
)
def test_what_a_loss_function_must_return(loss, message):
    with pytest.raises(ValueError, match=message):
        train(make_model(), make_dataset(), loss, SETTINGS)


def test_metrics_that_change_from_chunk_to_chunk_are_refused():
    names = iter("abcd")

    def loss(model, batch):
        return squared_error(model, batch), {next(names): 1.0}

    with pytest.raises(ValueError, match="metrics b after a"):
        train(make_model(), make_dataset(), loss, replace(SETTINGS, accumulate=2))


# --- the surroundings ---------------------------------------------------------------


@pytest.mark.parametrize("was_training", [True, False])
@pytest.mark.parametrize("fail_at", [1, 0])
def test_the_model_is_given_back_as_it_came(was_training, fail_at):
    model = make_model().train(was_training)
    modes, attributes = [], set(vars(model))
    failing = FailingAt(fail_at, SPOILERS["nan"])

    def loss(model, batch):
        modes.append(model.training)
        return failing(model, batch)

    if fail_at:
        with pytest.raises(NonFiniteLossError):
            train(model, make_dataset(), loss, SETTINGS)
    else:
        train(model, make_dataset(), loss, SETTINGS)
    assert all(modes)
    assert model.training is was_training
    assert all(module.training is was_training for module in model)
    assert set(vars(model)) == attributes


def test_a_forward_of_the_model_s_own_outlives_training():
    model = make_model()
    plain = model.forward
    model.forward = lambda inputs: 2 * plain(inputs)
    doubled = model.forward
    train(model, make_dataset(), squared_error, SETTINGS)
    assert model.forward is doubled


@pytest.mark.usefixtures("as_on_a_gpu")
def test_bf16_casts_the_forward_pass_and_no_weight():
    inner = []
    model = make_model()
    model[0].register_forward_hook(lambda *args: inner.append(args[2].dtype))

    def loss(model, batch):
        assert model(batch[0]).dtype is torch.float32
        return squared_error(model, batch)

    train(model, make_dataset(), loss, SETTINGS)
    assert set(inner) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert copy.deepcopy(model)(torch.ones(2, 3)).dtype is torch.float32
    assert inner[-1] is torch.float32, "the model is still cast after training"
    before = len(inner)
    train(model, make_dataset(), loss, SETTINGS)
    assert set(inner[before:]) == {torch.bfloat16}, "a second training is not cast"


@pytest.mark.usefixtures("fresh_accelerate")
def test_a_device_that_accelerate_is_not_set_up_on_is_refused(monkeypatch):
    Accelerator(cpu=True)
    monkeypatch.setenv("FTLIB_DEVICE", "xpu")
    with pytest.raises(RuntimeError, match=r"asked for on xpu .* set up on cpu"):
        train(make_model(), make_dataset(), squared_error, SETTINGS)


def test_the_bar_shows_the_loss_and_is_silent_when_asked(monkeypatch, capsys):
    train(make_model(), make_dataset(), squared_error, SETTINGS, label="critique")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(runtime, "quiet", lambda: False)
    history = train(
        make_model(), make_dataset(), squared_error, SETTINGS, label="critique"
    )
    bar = capsys.readouterr().err
    assert "critique: 100%" in bar
    assert "10/10" in bar
    assert f"loss={history[-1]['loss']:.4g}" in bar


def test_a_resumed_bar_begins_where_the_run_stood(tmp_path, monkeypatch, capsys):
    train(make_model(), make_dataset(), squared_error, SETTINGS, directory=tmp_path)
    monkeypatch.setattr(runtime, "quiet", lambda: False)
    train(make_model(), make_dataset(), squared_error, SETTINGS, directory=tmp_path)
    assert "10/10" in capsys.readouterr().err


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Run the two-process script over loopback; return what it wrote."""
    out = tmp_path_factory.mktemp("two-processes")
    script = Path(__file__).with_name("_two_process_training.py")
    run_in_two_processes(script, out)
    return out


@pytest.mark.parametrize("file", ["plain", "accumulated"])
def test_two_processes_train_like_one(two_processes, file):
    expected, history = two_process_weights()
    found = load_file(two_processes / f"{file}.safetensors")
    losses = found.pop("losses", None)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-13)
    if losses is not None:
        assert losses.tolist() == pytest.approx(history.column("loss"), rel=1e-6)
        assert len(losses) == TWO_PROCESS_STEPS


def test_shards_on_two_processes_train_like_one(two_processes):
    expected, history = two_process_weights(**CLIPPED)
    found = load_file(two_processes / "sharded.safetensors")
    losses, norms, local = (found.pop(n) for n in ("loss", "grad_norm", "local"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-13)
    assert losses.tolist() == pytest.approx(history.column("loss"), rel=1e-13)
    # The norm is that of the whole gradient, and clipping by it took place.
    assert norms.tolist() == pytest.approx(history.column("grad_norm"), rel=1e-13)
    assert norms.min() > CLIPPED["max_grad_norm"]
    assert found.keys() == expected.keys()
    total = sum(weight.numel() for weight in expected.values())
    assert total / 2 <= local < total


def test_every_process_keeps_a_random_state_of_its_own(two_processes):
    """That the resumed run equals the straight one, the script has asserted."""
    newest = two_processes / "resumed" / f"step-{TWO_PROCESS_STEPS:06d}"
    first, second = (
        json.loads((newest / f"rng-{index}.json").read_text()) for index in (0, 1)
    )
    assert first["torch"] != second["torch"]
    assert not (two_processes / "resumed" / "partial").exists()
