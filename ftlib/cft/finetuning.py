"""What every CFT experiment fine-tunes with: pairings, snapshots, candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ftlib.cft.data import Features
from ftlib.cft.objective import training_loss
from ftlib.results import Metric
from ftlib.streams import generator
from ftlib.training import Metrics

Weights = dict[str, Tensor]


def strangers(n: int, seed: int) -> list[int]:
    """For each of n examples another one, for two or more; no one is taken twice."""
    order = generator(seed, "shuffled").permutation(n).tolist()
    others = dict(zip(order, np.roll(order, 1).tolist(), strict=True))
    return [others[index] for index in range(n)]


def mean_target_tokens(examples: Sequence[Features]) -> float:
    """Mean number of tokens that the loss falls on."""
    return float(
        np.mean([sum(label >= 0 for label in one["labels"]) for one in examples])
    )


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


class Snapshots:
    """Weights at equal distances in the last stage, which training does not keep.

    Only what is trained is copied, to the CPU's memory.

    Args:
        model: whose weights are copied.
        steps: of every stage.
        wanted: how many copies, the last step's among them.

    Attributes:
        model: the same.
        taken: weights by the number of steps before them.
    """

    def __init__(self, model: nn.Module, steps: Sequence[int], wanted: int) -> None:
        self.model, self._step = model, 0
        before, last = sum(steps[:-1]), sum(steps[-1:])
        self._due = {before + last * i // wanted for i in range(1, wanted)}
        self.taken: dict[int, Weights] = {}

    def take(self) -> None:
        """Copy the weights as they are now."""
        self.taken[self._step] = {
            name: weight.detach().to("cpu", copy=True)
            for name, weight in _trained(self.model).items()
        }

    def loss(self, learner: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """Return the loss of the next step, after a copy if one is due."""
        if self._step in self._due:
            self.take()
        self._step += 1
        return training_loss(learner, batch)


@dataclass
class Tuned:
    """A fine-tuned model with the checkpoints it went through.

    Attributes:
        model: holds the weights that were loaded last.
        checkpoints: weights, the last step's at the end.
        steps: after how many steps, of each.
        validation: accuracy of each.
        examples: how many different ones there were.
        target_tokens: how many tokens the loss fell on, all steps together.
    """

    model: nn.Module
    checkpoints: list[Weights]
    steps: list[int]
    validation: list[Metric]
    examples: int
    target_tokens: float

    @classmethod
    def of(cls, snapshots: Snapshots, examples: int, target_tokens: float) -> Tuned:
        """Take the last checkpoint; what is tuned has yet to be validated."""
        snapshots.take()
        checkpoints, steps = list(snapshots.taken.values()), list(snapshots.taken)
        return cls(snapshots.model, checkpoints, steps, [], examples, target_tokens)

    def chosen(self) -> dict[str, Metric | float]:
        """Return what a search records: how the best checkpoint did, and when."""
        return {
            "validation": self.validation[self.best],
            "step": float(self.steps[self.best]),
        }

    def effort(self) -> dict[str, Metric | float]:
        """Return what is recorded of how it was reached."""
        return {
            **self.chosen(),
            "steps": float(self.steps[-1]),
            "examples": float(self.examples),
            "target tokens": self.target_tokens,
        }

    @property
    def best(self) -> int:
        """Which checkpoint did best on validation, the earliest among equals."""
        return int(np.argmax([metric.value for metric in self.validation]))

    def load(self, index: int) -> nn.Module:
        """Return the model with the weights of a checkpoint."""
        with torch.no_grad():
            for name, weight in _trained(self.model).items():
                weight.copy_(self.checkpoints[index][name])
        return self.model
