import hashlib

import pytest
from typer.testing import CliRunner

from ftlib.data import cli, registry
from ftlib.data.registry import DataFile, DataSet


@pytest.fixture(autouse=True)
def toy(tmp_path, monkeypatch):
    """One data set of two files, of which one is in the cache."""
    monkeypatch.delenv("FTLIB_DATA_DIR", raising=False)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path)
    (tmp_path / "data" / "toy").mkdir(parents=True)
    (tmp_path / "data" / "toy" / "a").write_bytes(b"a")
    files = [
        DataFile(f"toy/{name}", None, 1, hashlib.sha256(name.encode()).hexdigest())
        for name in "ab"
    ]
    sets = {"toy": DataSet("toy", "a toy", "MIT", tuple(files), "made by hand")}
    monkeypatch.setattr(registry, "data_sets", lambda: sets)
    monkeypatch.setattr(cli, "data_sets", lambda: sets)
    return tmp_path / "data" / "toy"


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_list_tells_size_licence_and_place(arguments):
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "2 files" in result.stdout
    assert "MIT" in result.stdout
    assert "1 cache, 1 not here" in result.stdout


def test_fetch_verifies_every_file(toy):
    (toy / "b").write_bytes(b"b")
    result = CliRunner().invoke(cli.app, ["fetch", "toy"])
    assert result.exit_code == 0
    assert result.stdout == "toy: 2 files here and verified\n"


@pytest.mark.parametrize("content", [None, b"damaged"])
def test_fetch_fails_with_the_file_named(content, toy):
    if content:
        (toy / "b").write_bytes(content)
    result = CliRunner().invoke(cli.app, ["fetch", "toy"])
    assert result.exit_code == 1
    assert "toy/b" in result.stderr
    assert "Traceback" not in result.output


def test_fetch_refuses_unknown_name():
    result = CliRunner().invoke(cli.app, ["fetch", "nothing"])
    assert result.exit_code == 2
    assert "unknown data set 'nothing'" in result.stderr
