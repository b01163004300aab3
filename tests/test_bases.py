"""Methods test that a base resumes; here is what any base can rely on."""

import pytest
import torch
from torch import nn

from ftlib.bases import base_path, kept_base


@pytest.fixture(autouse=True)
def _here(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")


def pretrain(directory):
    directory.mkdir()  # where checkpoints would be
    torch.manual_seed(5)
    return nn.Linear(2, 3)


def test_a_base_is_trained_once_and_leaves_the_random_numbers_alone():
    path = base_path("toy", 0, ["settings", 0])
    torch.manual_seed(1)
    first = kept_base(nn.Linear(2, 3), path, pretrain)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    second = kept_base(nn.Linear(2, 3), path, lambda _: pytest.fail("trained again"))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(5)
    assert torch.equal(first.weight, nn.Linear(2, 3).weight)


def test_nothing_but_the_weights_is_left_behind():
    path = base_path("toy", 0, {})
    kept_base(nn.Linear(2, 3), path, pretrain)
    assert {p.suffix for p in path.parent.iterdir()} == {".lock", ".safetensors"}


def test_an_interrupted_training_leaves_no_base():
    path = base_path("toy", 0, {})

    def dies(directory):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept_base(nn.Linear(2, 3), path, dies)
    assert not path.exists()


def test_paths_differ_by_method_seed_and_identity():
    others = [("a", 0, [1]), ("b", 0, [1]), ("a", 1, [1]), ("a", 0, [2])]
    assert len({base_path(*other) for other in others}) == 4
