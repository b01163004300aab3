"""Without a network: what is missing, where it was looked for, and what to do."""

import re
import socket
import time

import pytest
from _records import record
from typer.testing import CliRunner

from ftlib import cli, data, experiments, models
from ftlib.data import registry
from ftlib.experiments import Arm, run_plan
from ftlib.models.registry import MODELS
from paths import MIRROR

DATA = {name: entry.files[0] for name, entry in registry.data_sets().items()}
BUNDLED = {"tidybot", "tidybot-replies"}
SECONDS = 30  # pip tries twice; the rest takes a moment


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Nothing answers, in this process and in those it starts; the caches are empty."""

    def refuse(*arguments, **options):
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("FTLIB_DATA_DIR", "FTLIB_MODEL_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NO_PROXY", "*")
    begun = time.monotonic()
    yield
    assert time.monotonic() - begun < SECONDS


def test_nothing_is_reached():
    with pytest.raises(OSError, match="unreachable"):
        socket.create_connection(("127.0.0.1", 9))


@pytest.mark.parametrize("name", sorted(DATA.keys() - BUNDLED))
def test_missing_data_are_told_with_place_and_remedy(name, tmp_path):
    file = DATA[name]
    with pytest.raises(data.DataUnavailable) as error:
        data.fetch(file.path)
    message = str(error.value)
    assert f"data file {file.path} ({name}) is not available" in message
    assert "FTLIB_DATA_DIR: not set" in message
    assert f"cache: {tmp_path / 'cache' / 'data'}" in message
    if file.url:
        assert f"network: {file.url}" in message
        assert f"run `ftlib data fetch {name}`" in message
    else:
        assert "network: it is not published" in message


LOADERS = {
    "gsm8k": lambda: data.gsm8k("train"),
    "math500": data.math500,
    "minerva": data.minerva,
    "amc23": data.amc23,
    "svamp": data.svamp,
    "esnli": lambda: data.esnli("dev"),
    "comve": lambda: data.comve("train"),
    "cose": lambda: data.cose("dev"),
    "nusax": lambda: data.nusax("javanese", "train"),
    "indonli": lambda: data.indonli("val"),
    "xnli": lambda: data.xnli("en", "dev"),
    "mobile manipulation": lambda: data.mobile_manipulation("tasks"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_says_that_its_data_are_missing(name):
    with pytest.raises(data.DataUnavailable, match="is not available"):
        LOADERS[name]()


def test_what_ftlib_brings_along_needs_no_network():
    assert len(data.tidybot()) == 96
    assert len(data.tidybot_replies()) == 821


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_model_is_told_with_every_place(name):
    with pytest.raises(models.ModelUnavailable) as error:
        models.locate(name)
    message = str(error.value)
    assert f"model {name} is not available: set FTLIB_MODEL_DIR" in message
    for place in ("FTLIB_MODEL_DIR", "cache", "hub's cache", "hub", "package index"):
        assert f"\n  {place}: " in message
    assert message.count("\n") == 5


def test_every_model_that_a_chapter_asks_for_is_refused_not_raised(capsys):
    text = "".join(path.read_text() for path in MIRROR.glob("*.py"))
    named = set(re.findall(r'models\.available\(\s*"([^"]+)"', text))
    assert named
    for name in named:
        assert models.available(name, fetch=True) is False


def test_runs_without_their_model_are_left_out_and_the_others_made(
    tmp_path, monkeypatch, capsys
):
    made = record()
    arms = [
        Arm("e", "small", {}, lambda seed: made.metrics),
        Arm("e", "large", {}, pytest.fail, requires=["qwen2.5-0.5b"]),
    ]
    monkeypatch.setitem(experiments.METHODS, "toy", __name__)
    monkeypatch.setitem(globals(), "plan", lambda scale: arms)
    assert run_plan("toy", "cpu", [0], directory=tmp_path).arms() == ["small"]
    said = capsys.readouterr().err
    assert "skipped e/large: no model qwen2.5-0.5b; get it with: ftlib models" in said


@pytest.mark.parametrize("what", [("data", "gsm8k"), ("models", "qwen2.5-0.5b")])
def test_the_command_says_so_in_plain_words(what):
    done = CliRunner().invoke(cli.app, [what[0], "fetch", what[1]])
    assert done.exit_code == 1
    assert f"{what[1]}" in done.stderr
    assert "FTLIB_" in done.stderr
    assert "Traceback" not in done.output
