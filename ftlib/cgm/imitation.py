"""The plain rival of CGM: throw samples away until they balance, imitate the rest."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ftlib.cgm.calibrate import Generative, Samples, Scorer
from ftlib.training import TrainingSettings, train


def balanced_rows(label: Tensor, labels: int) -> Tensor:
    """Rows with the same number of every label, the first of each.

    Rejection until the labels balance is sampling from the tilt that balances them.

    Args:
        label: integer [n] from 0; rows with a negative label are left out.
        labels: how many there are.

    Returns:
        Row numbers, integer [m], label by label.

    Raises:
        ValueError: a label has no row.
    """
    cells = [torch.nonzero(label == k).squeeze(1) for k in range(labels)]
    smallest = min(map(len, cells))
    if smallest == 0:
        missing = [k for k, cell in enumerate(cells) if len(cell) == 0]
        raise ValueError(
            f"none of {len(label)} samples has label {', '.join(map(str, missing))}: "
            "draw more, they cannot be balanced"
        )
    return torch.cat([cell[:smallest] for cell in cells])


def imitate(model: Generative, samples: Samples, training: TrainingSettings) -> None:
    """Fine-tune a model in place on samples, by maximum likelihood.

    Args:
        model: a :class:`~ftlib.cgm.calibrate.Generative` module.
        samples: what it is to imitate, at least a batch of them.
        training: the settings; the samples are shuffled every epoch.
    """

    def loss(scorer: nn.Module, rows: Tensor) -> Tensor:
        return -scorer(samples[rows]).mean()

    settings = dataclasses.replace(training, shuffle=True)
    train(Scorer(model), range(len(samples)), loss, settings, label="balanced SFT")
