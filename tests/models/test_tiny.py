import pytest
import torch
from torch import nn

from ftlib.models.tiny import tiny_gpt


def test_shapes_follow_the_arguments():
    model = tiny_gpt(11, width=32, layers=3, heads=8, context=16)
    assert model(torch.zeros(2, 16, dtype=torch.long)).logits.shape == (2, 16, 11)
    assert len(model.transformer.h) == 3
    assert model.config.n_head == 8
    with pytest.raises(IndexError):
        model(torch.zeros(1, 17, dtype=torch.long))


def test_seed_decides_the_weights():
    def weights(seed):
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(tiny_gpt(11).parameters())

    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))


def test_training_mode_has_no_dropout():
    model = tiny_gpt(11).train()
    ids = torch.arange(11)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_generates_to_the_requested_length():
    ids = tiny_gpt(11).generate(
        torch.zeros(3, 1, dtype=torch.long), do_sample=True, max_new_tokens=8
    )
    assert ids.shape == (3, 9)


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        tiny_gpt(11, width=30)
