"""A training that can be killed anywhere: a target of processes, and a script.

Usage: python _training_run.py DIRECTORY SECONDS_PER_STEP
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from _processes import Operations, kill_this_process
from accelerate.utils import set_seed

from ftlib.models.tiny import tiny_gpt
from ftlib.training import History, TrainingSettings, train

SETTINGS = TrainingSettings(
    steps=12, batch_size=4, learning_rate=0.01, warmup_steps=2, checkpoint_every=2
)
LAST = f"step-{SETTINGS.steps:06d}"


def new_model():
    return tiny_gpt(7, width=32, layers=1, heads=2, context=8)


def on_policy(model, batch):
    """REINFORCE on the model's own samples: every step draws random numbers."""
    tokens = batch[:, None] % 7
    for _ in range(3):
        logits = model(tokens).logits[:, -1]
        tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
    log_probs = model(tokens).logits[:, :-1].log_softmax(-1)
    chosen = log_probs.gather(-1, tokens[:, 1:, None]).sum((1, 2))
    reward = (tokens == 2).float().mean(1)
    return -(reward * chosen).mean(), {"reward": reward.mean()}


def run(directory: Path, loss=on_policy, settings=SETTINGS) -> History:
    """Train from the start, or go on where the directory's checkpoints end."""
    torch.set_num_threads(1)
    os.environ |= {"FTLIB_DEVICE": "cpu", "TQDM_DISABLE": "1"}
    set_seed(5)
    return train(new_model(), range(9), loss, settings, directory=directory)


def killed_before_operation(directory: Path, operation: int) -> None:
    Operations(directory, operation)
    run(directory)


def killed_in_step(directory: Path, step: int) -> None:
    steps = iter(range(1, SETTINGS.steps + 1))

    def loss(model, batch):
        if next(steps) == step:
            kill_this_process()
        return on_policy(model, batch)

    run(directory, loss)


def measured(directory: Path, report: Path) -> None:
    """Run undisturbed, and report what there is to choose a point from."""
    operations, begun = Operations(directory), time.monotonic()
    run(directory)
    told = {"operations": operations.count, "seconds": time.monotonic() - begun}
    report.write_text(json.dumps(told))


if __name__ == "__main__":

    def slow(model, batch):
        time.sleep(float(sys.argv[2]))
        return on_policy(model, batch)

    run(Path(sys.argv[1]), slow)
