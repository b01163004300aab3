"""Rejection to balance, and fine-tuning on what is left."""

import pytest
import torch

from ftlib.cgm import mixture
from ftlib.cgm.imitation import balanced_rows, imitate
from ftlib.training import TrainingSettings


def test_every_label_is_kept_equally_often_and_the_first_of_each():
    label = torch.tensor([2, 0, 0, -1, 1, 2, 0, 1, 2])
    assert balanced_rows(label, 3).tolist() == [1, 2, 4, 7, 0, 5]


def test_a_label_without_rows_is_refused_by_name():
    with pytest.raises(ValueError, match="none of 3 samples has label 1, 3"):
        balanced_rows(torch.tensor([0, 2, 0]), 4)


def test_imitation_finds_the_maximum_likelihood():
    torch.manual_seed(0)
    model = mixture.two_bumps()
    samples = mixture.two_bumps(0.8).sample(4096)
    settings = TrainingSettings(
        steps=200, batch_size=256, learning_rate=0.02, max_grad_norm=None
    )
    imitate(model, samples, settings)
    share = float(mixture.right_of_zero(samples).mean())
    assert float(model.mass_right_of_zero()) == pytest.approx(share, abs=0.01)
