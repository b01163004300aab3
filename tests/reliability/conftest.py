"""What all of the battery stands on: the CPU, no bars, and disks that can be full."""

import json
import resource
from contextlib import contextmanager

import pytest
from _processes import begin, finish
from _training_run import LAST, measured


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("CI", "true")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A training that nobody disturbs: its last checkpoint, operations and seconds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(begin(measured, folder / "run", folder / "told"))
    return folder / "run" / LAST, json.loads((folder / "told").read_text())


@pytest.fixture(scope="session")
def straight(undisturbed):
    """The last checkpoint of a training that nobody disturbs."""
    return undisturbed[0]


@pytest.fixture
def full_disk():
    """Let files grow to a number of bytes and no further: writing more is an OSError.

    Python ignores SIGXFSZ, so that the system call fails as it does on a full disk.
    """

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
