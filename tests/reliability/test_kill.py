"""kill -9 anywhere: nothing half-written is believed, and nothing finished is lost."""

import json
import random
import time

import _toy_runs
import _training_run
import pytest
from _processes import begin, finish

from ftlib import checkpoints, files
from ftlib.results import read

KILLED = -9
DRAW = random.Random(9)
# Parts of the run, and of what it does to files, in which the points lie.
FRACTIONS = [round((part + DRAW.random()) / 8, 3) for part in range(8)]
STEPS = DRAW.sample(range(1, _training_run.SETTINGS.steps + 1), 4)


def assert_same_end(directory, straight):
    """Weights, optimiser, history and random states, byte for byte."""
    end = directory / _training_run.LAST
    assert files.damaged(end) == []
    assert (end / files.SEAL).read_text() == (straight / files.SEAL).read_text()


def resume(directory, straight):
    finish(begin(_training_run.run, directory))
    assert_same_end(directory, straight)
    assert not (directory / "partial").exists()


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_training_killed_while_it_writes_ends_the_same(
    fraction, undisturbed, tmp_path
):
    straight, told = undisturbed
    operation = int(fraction * told["operations"])
    killed = begin(_training_run.killed_before_operation, tmp_path / "run", operation)
    finish(killed, KILLED)
    resume(tmp_path / "run", straight)


@pytest.mark.parametrize("step", STEPS)
def test_a_training_killed_in_a_step_ends_the_same(step, straight, tmp_path):
    finish(begin(_training_run.killed_in_step, tmp_path / "run", step), KILLED)
    resume(tmp_path / "run", straight)


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_training_killed_at_any_time_ends_the_same(fraction, undisturbed, tmp_path):
    straight, told = undisturbed
    process = begin(_training_run.run, tmp_path / "run")
    process.join(fraction * told["seconds"])
    process.kill()
    process.join()
    resume(tmp_path / "run", straight)


def test_a_training_killed_again_and_again_ends_the_same(undisturbed, tmp_path):
    straight, told = undisturbed
    run, most = tmp_path / "run", told["operations"] // 2
    for _ in range(5):
        operation = DRAW.randrange(most // 2, most)
        process = begin(_training_run.killed_before_operation, run, operation)
        process.join(120)
        assert process.exitcode in (0, KILLED)
    resume(run, straight)


def _forgetful(directory):
    checkpoints._set_rng_state = lambda state, device: None
    _training_run.run(directory)


def test_a_resumption_that_is_not_exact_is_seen(straight, tmp_path):
    finish(begin(_training_run.killed_in_step, tmp_path / "run", 8), KILLED)
    finish(begin(_forgetful, tmp_path / "run"))
    with pytest.raises(AssertionError):
        assert_same_end(tmp_path / "run", straight)


@pytest.fixture(scope="module")
def all_runs(tmp_path_factory):
    """Runs that nobody disturbs: what they measured, operations and seconds."""
    folder = tmp_path_factory.mktemp("runs")
    finish(begin(_toy_runs.run, folder, None, folder / "told"))
    return measured(folder), json.loads((folder / "told").read_text())


def measured(results):
    """What the file says now; it must be valid at every moment."""
    path = results / "toy" / "cpu.json"
    records = read(path) if path.exists() else []
    return {(r.arm, r.seed): r.metrics["draw"].value for r in records}


def assert_goes_on(results, all_runs):
    before = measured(results)
    assert before.items() <= all_runs[0].items()
    finish(begin(_toy_runs.run, results))
    assert measured(results) == all_runs[0]
    assert sorted(path.name for path in (results / "toy").iterdir()) == [
        "cpu.json",
        "cpu.lock",
    ]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_runs_killed_while_they_record_go_on(fraction, all_runs, tmp_path):
    operation = int(fraction * all_runs[1]["operations"])
    finish(begin(_toy_runs.run, tmp_path, operation), KILLED)
    assert_goes_on(tmp_path, all_runs)


@pytest.mark.parametrize("fraction", FRACTIONS[::2])
def test_runs_killed_at_any_time_go_on(fraction, all_runs, tmp_path):
    end = time.monotonic() + fraction * all_runs[1]["seconds"]
    process = begin(_toy_runs.run, tmp_path)
    while time.monotonic() < end and process.is_alive():
        assert measured(tmp_path).items() <= all_runs[0].items()
    process.kill()
    process.join()
    assert_goes_on(tmp_path, all_runs)


def test_what_is_wanted_is_all_there(all_runs):
    assert set(all_runs[0]) == _toy_runs.WANTED
