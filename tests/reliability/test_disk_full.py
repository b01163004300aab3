"""A full disk: the old state is whole, the error says where, and nothing is left."""

import functools
import hashlib
import http.server
import threading

import pytest
from _folders import NAME, make_wheel, offer
from _records import record
from _training_run import LAST, on_policy, run
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import save_file
from torch import nn, ones
from typer.testing import CliRunner

import notebooks
from ftlib import cli, data, experiments, files, models
from ftlib.bases import kept_base
from ftlib.checkpoints import CheckpointError
from ftlib.data import registry
from ftlib.data.registry import DataFile, DataSet
from ftlib.experiments import Arm
from ftlib.files import replacing
from ftlib.models import convert
from ftlib.results import NotWrittenError, append, read


def all_files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_disk_is_full_where_it_says_so(full_disk, tmp_path):
    path = tmp_path / "a"
    with full_disk(100), pytest.raises(OSError, match="File too large"):
        path.write_bytes(bytes(101))
    path.write_bytes(bytes(101))


def test_what_replaces_a_file_is_whole_or_gone(full_disk, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def replace(write):
        with replacing(path) as partial:
            partial.write_text("half")
            write(partial)

    def stops(partial):
        raise KeyboardInterrupt

    with full_disk(100), pytest.raises(OSError, match=r"too large: '.*a\.txt'"):
        replace(lambda partial: partial.write_bytes(bytes(101)))
    assert all_files(tmp_path) == {path: b"old"}
    with pytest.raises(KeyboardInterrupt):
        replace(stops)
    assert all_files(tmp_path) == {path: b"old"}
    replace(lambda partial: partial.write_text("new"))
    assert all_files(tmp_path) == {path: b"new"}


IN_ORDER = ["rng-0.json", "model.safetensors", "optimizer.safetensors"]


@pytest.mark.parametrize("file", IN_ORDER)
def test_a_checkpoint_that_has_no_room_costs_itself_alone(
    file, straight, full_disk, tmp_path
):
    """Each file is larger than the one written before it: so that is where it stops."""
    sizes = {name: (straight / name).stat().st_size for name in IN_ORDER}
    assert sorted(sizes.values()) == list(sizes.values())
    room = sizes[file] * 9 // 10

    def fills_up(model, batch):
        if not whole and (tmp_path / "step-000004").exists():
            whole.update(all_files(tmp_path))
            disk.__enter__()
        return on_policy(model, batch)

    whole, disk = {}, full_disk(room)
    try:
        with pytest.raises(CheckpointError, match=r"step-000006 cannot .*too large"):
            run(tmp_path, fills_up)
    finally:
        disk.__exit__(None, None, None)
    assert all_files(tmp_path) == whole
    run(tmp_path)
    seals = [(end / files.SEAL).read_text() for end in (tmp_path / LAST, straight)]
    assert seals[0] == seals[1]


def test_records_that_have_no_room_leave_the_old_ones(full_disk, tmp_path):
    append([record(seed) for seed in range(5)], tmp_path)
    path = tmp_path / "toy" / "cpu.json"
    before = all_files(tmp_path)
    with full_disk(path.stat().st_size), pytest.raises(NotWrittenError) as error:
        append([record(5)], tmp_path)
    assert f"{path} cannot be written: File too large" in str(error.value)
    assert all_files(tmp_path) == before
    append([record(5)], tmp_path)
    assert len(read(path)) == 6


def test_runs_that_cannot_be_recorded_are_not_begun(full_disk, tmp_path, monkeypatch):
    begun = []

    def measure(seed):
        begun.append(seed)
        return {"kl": 0.0}

    monkeypatch.setitem(experiments.METHODS, "toy", "test_disk_full")
    arms = [Arm("mixture", "relax", {"steps": 10}, measure)]
    monkeypatch.setitem(globals(), "plan", lambda scale: arms)
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    command = ["run", "toy", "--scale", "cpu", "--seeds"]
    assert CliRunner().invoke(cli.app, [*command, "2"]).exit_code == 0
    with full_disk((tmp_path / "toy" / "cpu.json").stat().st_size):
        done = CliRunner().invoke(cli.app, [*command, "9"])
    assert done.exit_code == 1
    assert "cpu.json cannot be written: File too large" in done.stderr
    assert begun == [0, 1, 2]
    assert CliRunner().invoke(cli.app, [*command, "4"]).exit_code == 0
    assert begun == [0, 1, 2, 2, 3]


def test_a_download_that_has_no_room_leaves_nothing(full_disk, tmp_path, monkeypatch):
    content = bytes(50_000)
    upstream = tmp_path / "upstream"
    upstream.mkdir()
    (upstream / "file").write_bytes(content)
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(upstream)
    )
    cache = tmp_path / "cache"
    monkeypatch.setattr("pooch.os_cache", lambda project: cache)
    monkeypatch.delenv("FTLIB_DATA_DIR", raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file"
        sha256 = hashlib.sha256(content).hexdigest()
        file = DataFile("toy/all", url, len(content), sha256)
        toy = DataSet("toy", "a toy", "MIT", (file,), None)
        monkeypatch.setattr(registry, "data_sets", lambda: {"toy": toy})
        with full_disk(20_000), pytest.raises(data.DataUnavailable) as error:
            data.fetch(file.path)
        assert f"cannot be written to {cache / 'data'}: File too large" in str(
            error.value
        )
        assert all_files(cache) == {}
        assert data.fetch(file.path).read_bytes() == content
        server.shutdown()


def _quantised(file, wheel, folder):
    """As the conversion of a GGUF file writes: through safetensors."""
    save_file({"weight": ones(32, 32)}, folder / "model.safetensors")


@pytest.mark.parametrize("conversion", [convert.convert, _quantised])
def test_a_conversion_that_has_no_room_leaves_nothing(
    conversion, full_disk, tmp_path, monkeypatch
):
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    wheel = make_wheel(tmp_path / "wheel")
    offer(monkeypatch, wheel)
    monkeypatch.setattr(convert, "convert", conversion)
    cache = tmp_path / "cache" / "ftlib" / "models"
    # The wheel has room: what it holds is packed.
    with full_disk(4000), pytest.raises(models.ModelUnavailable) as error:
        models.locate(NAME)
    assert f"cannot be converted in {cache}" in str(error.value)
    assert "File too large" in str(error.value)
    assert set(all_files(cache)) <= {cache / f"{NAME}.lock"}
    assert not models.available(NAME)


def test_a_base_that_has_no_room_is_not_there(full_disk, tmp_path):
    def pretrain(directory):
        directory.mkdir(exist_ok=True)
        return nn.Linear(64, 64)

    path = tmp_path / "base.safetensors"
    with full_disk(1000), pytest.raises(OSError, match=r"large: '.*base\.safetensors'"):
        kept_base(nn.Linear(64, 64), path, pretrain)
    assert set(all_files(tmp_path)) == {path.with_suffix(".lock")}
    kept_base(nn.Linear(64, 64), path, pretrain)


def test_outputs_that_have_no_room_leave_the_old_notebook(full_disk, tmp_path):
    path, mirror = tmp_path / "chapter.ipynb", tmp_path / "mirror"
    notebooks.store(path, new_notebook(cells=[new_code_cell("print(1)")]), mirror)
    before = all_files(tmp_path)
    longer = new_notebook(cells=[new_code_cell(f"print({10**3000})")])
    with full_disk(2000), pytest.raises(OSError, match=r"large: '.*chapter\.ipynb'"):
        notebooks.store(path, longer, mirror)
    assert all_files(tmp_path) == before
