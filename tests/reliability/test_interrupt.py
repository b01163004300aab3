"""Ctrl-C: it is told how to go on, what was finished stays, and a repeat ends it."""

import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import _slow_download
import _toy_runs
import _training_run
import pytest
from _processes import begin, finish

from ftlib import files
from ftlib.models import cli as models_cli
from ftlib.results import read

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def interruptible():
    """A shell starts its background jobs deaf to Ctrl-C, and so are their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(script, *arguments, **environment):
    """Start a script as from a terminal: a Ctrl-C reaches it."""
    return subprocess.Popen(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        env=os.environ | {k: str(v) for k, v in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stopped(process, is_time):
    """Press Ctrl-C when it is time; return exit status and what it said."""
    end = time.monotonic() + 120
    while not is_time():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it took too long to begin"
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    return process.returncode, said


def ended(process):
    output, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return output


def test_a_training_says_from_where_it_goes_on(straight, tmp_path):
    process = command("_training_run.py", tmp_path, 0.2)
    status, said = stopped(process, (tmp_path / "step-000004").exists)
    assert status in (-signal.SIGINT, 1)  # Python's own; a library's exit may hide it
    assert said.rstrip().rpartition("the same call goes on from ")[2] in {
        str(path) for path in tmp_path.glob("step-*")
    }
    assert "KeyboardInterrupt\nstopped after step " in said
    _training_run.run(tmp_path)
    seals = [(end / files.SEAL) for end in (tmp_path / _training_run.LAST, straight)]
    assert seals[0].read_text() == seals[1].read_text()


@pytest.mark.parametrize("directory", [None, "checkpoints"])
def test_a_training_without_a_checkpoint_says_so(directory, tmp_path):
    def stops(model, batch):
        raise KeyboardInterrupt

    settings = _training_run.TrainingSettings(steps=3, batch_size=2, learning_rate=0.1)
    with pytest.raises(KeyboardInterrupt) as stop:
        _training_run.run(directory and tmp_path / directory, stops, settings)
    (note,) = stop.value.__notes__
    assert note.startswith("stopped after step 0: no checkpoint was written")


def test_runs_say_what_is_recorded_and_a_repeat_makes_the_rest(tmp_path):
    environment = {"FTLIB_RESULTS_DIR": tmp_path, "TOY_SECONDS": 0.5}
    arguments = ["run", "toy", "--scale", "cpu", "--seeds", str(_toy_runs.SEEDS)]
    path = tmp_path / "toy" / "cpu.json"
    process = command("_toy_runs.py", *arguments, **environment)
    status, said = stopped(process, lambda: path.exists() and len(read(path)) >= 2)
    assert status == 130
    recorded = list(read(path))
    assert said.startswith(
        f"ftlib: stopped: {len(recorded)} of {len(_toy_runs.WANTED)} runs are recorded "
        f"in {path}; repeat it"
    )
    assert "Traceback" not in said
    finish(begin(_toy_runs.run, tmp_path))
    assert {(r.arm, r.seed) for r in read(path)} == _toy_runs.WANTED
    assert [r for r in read(path) if r in recorded] == recorded


@contextmanager
def slow_server():
    """Serve the files, the second one half until told to go on."""
    halfway, go_on = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            content = _slow_download.CONTENTS[self.path[1:]]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.path == "/second" and not go_on.is_set():
                self.wfile.write(content[:2000])
                halfway.set()
                go_on.wait(60)
            else:
                self.wfile.write(content)

        def log_message(self, *arguments):
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", halfway, go_on
        server.shutdown()


def test_a_download_keeps_whole_files_and_a_repeat_fetches_the_rest(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("FTLIB_DATA_DIR", raising=False)
    environment = {"XDG_CACHE_HOME": tmp_path, "NO_PROXY": "127.0.0.1"}
    with slow_server() as (address, halfway, go_on):
        arguments = [address, "data", "fetch", "toy"]
        process = command("_slow_download.py", *arguments, **environment)
        status, said = stopped(process, halfway.is_set)
        assert status == 130
        assert "stopped: `ftlib data fetch toy` goes on" in said
        assert "Traceback" not in said
        assert fetched(tmp_path) == {"first"}
        go_on.set()
        told = ended(command("_slow_download.py", *arguments, **environment))
    assert told == "toy: 2 files here and verified\n"
    assert fetched(tmp_path) == {"first", "second"}


def fetched(cache):
    """Names of the files in the cache; there are no others, such as half ones."""
    found = {path for path in cache.rglob("*") if path.is_file()}
    for path in found:
        assert path.read_bytes() == _slow_download.CONTENTS[path.name]
    return {path.name for path in found}


def test_fetching_a_model_says_how_to_begin_again(monkeypatch, capsys):
    def stops(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(models_cli, "locate", stops)
    with pytest.raises(SystemExit) as stop:
        models_cli.app(["fetch", "minilm-l6"])
    assert stop.value.code == 130
    assert "`ftlib models fetch minilm-l6` begins again" in capsys.readouterr().err
