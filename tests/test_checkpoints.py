import copy
import itertools
import json
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import Adafactor, GPT2Config, GPT2LMHeadModel

from ftlib import checkpoints
from ftlib.checkpoints import CheckpointError, Checkpoints
from ftlib.training import TrainingSettings, train

SETTINGS = TrainingSettings(
    steps=10, batch_size=4, learning_rate=0.05, warmup_steps=2, weight_decay=0.1
)

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("TQDM_DISABLE", "1")


def make_dataset():
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(22, 3, generator=generator)
    return list(zip(inputs, inputs.prod(1, keepdim=True), strict=True))


class DropoutAndNorm(nn.Module):
    """Dropout, running statistics, frozen weights, two names for one buffer."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Linear(3, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.3)
        self.out = nn.Linear(8, 1)
        self.register_buffer("scale", torch.ones(4))
        self.register_buffer("view", self.scale[:2])

    def forward(self, inputs):
        return self.out(self.dropout(self.norm(self.frozen(inputs))))


def noisy_error(model, batch):
    """Draw from all three generators that a checkpoint keeps."""
    inputs, targets = batch
    noise = torch.randn_like(targets) + random.gauss(0, 1)
    noise += np.random.normal()  # noqa: NPY002
    return (model(inputs) - targets - noise).square().mean(), {"noise": noise.mean()}


def make_tied_gpt():
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=7, n_positions=6, n_embd=8, n_layer=1, n_head=2)
    )


def on_policy(model, batch):
    """REINFORCE on the model's own samples, through its dropout."""
    tokens = batch[:, None] % 7
    for _ in range(4):
        logits = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    log_probs = model(tokens).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).sum((1, 2))
    reward = (tokens == 2).float().mean(1)
    return -(reward * chosen).mean(), {"reward": reward.mean()}


adamw = partial(torch.optim.AdamW, lr=0.05, eps=1e-6)
# Its state holds plain numbers beside the tensors.
adafactor = partial(Adafactor, lr=0.05, relative_step=False)
CASES = {
    "noise": (DropoutAndNorm, make_dataset, noisy_error, adamw),
    "on-policy": (make_tied_gpt, lambda: range(8), on_policy, adamw),
    "adafactor": (DropoutAndNorm, make_dataset, noisy_error, adafactor),
}


class Attempt:
    """One attempt at a run, made from scratch as a new process would make it."""

    def __init__(self, case, seed=0):
        make, dataset, self.loss, optimizer = CASES[case]
        torch.manual_seed(99)  # what is frozen is not in a checkpoint
        self.model, self.dataset = make(), dataset()
        self.optimizer = optimizer(
            [p for p in self.model.parameters() if p.requires_grad]
        )
        set_seed(seed)
        random.gauss(0, 1)  # leaves a second draw waiting in the generator's state

    def train(self, settings=SETTINGS, directory=None, fail_at=None):
        calls = itertools.count(1)

        def loss(model, batch):
            if next(calls) == fail_at:
                raise KeyboardInterrupt
            return self.loss(model, batch)

        return train(
            self.model,
            self.dataset,
            loss,
            settings,
            directory=directory,
            optimizer=self.optimizer,
        )

    def draws(self):
        numpy = np.random.random()  # noqa: NPY002
        return random.random(), random.gauss(0, 1), numpy, torch.rand(()).item()


def assert_resumes(settings, directory):
    """Resume, and compare with a run that was never stopped."""
    straight = Attempt("noise")
    expected = straight.train()
    resumed = Attempt("noise", seed=1)
    assert resumed.train(settings, directory) == expected
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_bit_for_bit(case, tmp_path):
    straight = Attempt(case)
    expected = straight.train()
    expected_draws = straight.draws()

    settings = replace(SETTINGS, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        Attempt(case).train(settings, tmp_path, fail_at=7)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    resumed = Attempt(case, seed=1)
    with torch.no_grad():  # weights of the checkpoint, not of a lucky start
        for parameter in resumed.model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    history = resumed.train(settings, tmp_path)

    assert history == expected
    assert_equal(resumed.model.state_dict(), straight.model.state_dict())
    assert resumed.draws() == expected_draws
    found, wanted = resumed.optimizer.state_dict(), straight.optimizer.state_dict()
    assert_equal(found["state"], wanted["state"])
    assert json.dumps(found["param_groups"]) == json.dumps(wanted["param_groups"])


def test_a_finished_run_is_taken_up_without_another_step(tmp_path):
    first = Attempt("noise")
    expected = first.train(directory=tmp_path)
    expected_draws = first.draws()
    again = Attempt("noise", seed=1)
    assert again.train(directory=tmp_path, fail_at=1) == expected
    assert_equal(again.model.state_dict(), first.model.state_dict())
    assert again.draws() == expected_draws


def test_checkpoints_are_safetensors_and_json_and_the_newest_two(tmp_path):
    Attempt("on-policy").train(replace(SETTINGS, checkpoint_every=3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-000009",
        "step-000010",
    ]
    assert sorted(path.name for path in (tmp_path / "step-000010").iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "rng-0.json",
        "sha256.json",
        "training.json",
    ]


def test_beyond_a_million_steps_the_newest_is_still_found(tmp_path):
    for name in ("step-999999", "step-1000000", "step-2000000x", "partial"):
        (tmp_path / name).mkdir()
    found = Checkpoints(tmp_path, {}, Accelerator(cpu=True)).newest()
    assert found == tmp_path / "step-1000000"


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_crash_while_writing_costs_that_checkpoint_only(tmp_path, monkeypatch, file):
    settings = replace(SETTINGS, checkpoint_every=2)
    save_file = checkpoints.save_file

    def full_disk(tensors, path):
        if path.name == f"{file}.safetensors" and (tmp_path / "step-000004").exists():
            path.write_bytes(b"half")
            raise OSError("no space left on device")
        save_file(tensors, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save_file", full_disk)
        with pytest.raises(CheckpointError, match=r"step-000006 .*no space left"):
            Attempt("noise").train(settings, tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-000002", "step-000004"]

    assert_resumes(settings, tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("model.safetensors", lambda content: content[: len(content) // 2]),
        ("optimizer.safetensors", lambda content: b""),
        ("training.json", lambda content: content[:-20]),
        ("training.json", lambda content: b"{}"),
        ("rng-0.json", None),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_serves(
    tmp_path, file, damage
):
    settings = replace(SETTINGS, checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        Attempt("noise").train(settings, tmp_path, fail_at=10)
    path = tmp_path / "step-000008" / file
    content = path.read_bytes()
    path.unlink()
    if damage:
        path.write_bytes(damage(content))
    with pytest.raises(CheckpointError, match=r"step-000008 .*Delete it to fall back"):
        Attempt("noise").train(settings, tmp_path)

    path.parent.rename(tmp_path / "elsewhere")
    assert_resumes(settings, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 20}, "steps was 10 and is 20"),
        ({"learning_rate": 0.1}, r"learning_rate was 0\.05 and is 0\.1"),
        ({"schedule": "linear"}, "schedule was 'cosine' and is 'linear'"),
        ({"seed": 7, "shuffle": False}, "shuffle was .*; seed was 0 and is 7"),
    ],
)
def test_a_run_with_other_settings_is_not_resumed(tmp_path, change, message):
    Attempt("noise").train(directory=tmp_path)
    attempt = Attempt("noise")
    before = copy.deepcopy(attempt.model.state_dict())
    with pytest.raises(CheckpointError, match=f"{message}.*another directory"):
        attempt.train(replace(SETTINGS, **change), tmp_path)
    assert_equal(attempt.model.state_dict(), before)


def test_another_number_of_examples_is_another_run(tmp_path):
    Attempt("noise").train(directory=tmp_path)
    attempt = Attempt("noise")
    attempt.dataset = attempt.dataset[:-1]
    with pytest.raises(CheckpointError, match="examples was 22 and is 21"):
        attempt.train(directory=tmp_path)


def test_how_often_checkpoints_are_kept_may_change(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Attempt("noise").train(
            replace(SETTINGS, checkpoint_every=5), tmp_path, fail_at=8
        )
    assert_resumes(replace(SETTINGS, checkpoint_every=1), tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "out", nn.Linear(9, 2)), r"2 tensors .* out\.bias"),
        (lambda m: setattr(m, "more", nn.Linear(1, 1)), r"2 tensors .* more\.bias"),
        (lambda m: delattr(m, "norm"), r"5 tensors .* norm\.bias"),
    ],
    ids=["shape", "more", "fewer"],
)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, change, message):
    Attempt("noise").train(directory=tmp_path)
    attempt = Attempt("noise")
    change(attempt.model)
    before = copy.deepcopy(attempt.model.state_dict())
    with pytest.raises(CheckpointError, match=f"{message}.*another directory"):
        attempt.train(directory=tmp_path)
    assert_equal(attempt.model.state_dict(), before)
