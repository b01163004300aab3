import shutil

import pytest
from typer.testing import CliRunner

from ftlib.models import cli


@pytest.mark.parametrize("arguments", [[], ["list"]])
def test_list_tells_size_licence_and_place(
    arguments, isolated, monkeypatch, tiny_llama
):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated))
    shutil.copytree(tiny_llama, isolated / "smollm2-135m")
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert f"here: {isolated / 'smollm2-135m'}" in result.stdout
    assert "from: hub Qwen/Qwen2.5-0.5B" in result.stdout
    assert "134.5 M" in result.stdout
    assert "Gemma terms" in result.stdout


def test_fetch_tells_where_the_model_is(isolated, monkeypatch, tiny_llama):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated))
    shutil.copytree(tiny_llama, isolated / "smollm2-135m")
    result = CliRunner().invoke(cli.app, ["fetch", "smollm2-135m"])
    assert result.exit_code == 0
    assert result.stdout == f"smollm2-135m is in {isolated / 'smollm2-135m'}\n"


@pytest.mark.usefixtures("isolated")
def test_fetch_out_of_reach_fails_in_plain_words():
    result = CliRunner().invoke(cli.app, ["fetch", "qwen2.5-0.5b"])
    assert result.exit_code == 1
    assert "model qwen2.5-0.5b is not available" in result.stderr
    assert "Traceback" not in result.output


def test_fetch_refuses_unknown_name():
    result = CliRunner().invoke(cli.app, ["fetch", "nothing"])
    assert result.exit_code == 2
    assert "unknown model 'nothing'" in result.stderr
