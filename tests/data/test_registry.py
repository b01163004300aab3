import functools
import hashlib
import http.server
import threading

import pytest

from ftlib import data
from ftlib.data import registry
from ftlib.data.registry import DataFile, DataSet

CONTENT = b'{"question": "1 + 1?", "answer": "#### 2"}\n'
NAME = "math/toy/all data.jsonl"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """An empty cache, and no folder named."""
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path / "cache" / project)
    monkeypatch.delenv("FTLIB_DATA_DIR", raising=False)
    return tmp_path


@pytest.fixture
def cache(folders):
    return folders / "cache" / "ftlib" / "data"


@pytest.fixture
def upstream(tmp_path):
    """A folder served over HTTP, with its base address."""
    root = tmp_path / "upstream"
    root.mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=str(root)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield root, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def register(monkeypatch, url):
    file = DataFile(NAME, url, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    toy = DataSet("toy", "a toy", "MIT", (file,), None if url else "made by hand")
    monkeypatch.setattr(registry, "data_sets", lambda: {"toy": toy})


def write(folder, content=CONTENT):
    path = folder / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_order_is_folder_cache_network(tmp_path, cache, upstream, monkeypatch):
    root, base = upstream
    (root / "file").write_bytes(CONTENT)
    register(monkeypatch, f"{base}/file")
    assert data.fetch(NAME) == cache / NAME  # the network, into the cache
    (root / "file").unlink()
    assert data.fetch(NAME) == cache / NAME  # the cache
    named = write(tmp_path / "named")
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path / "named"))
    assert data.fetch(NAME) == named
    named.unlink()
    assert data.fetch(NAME) == cache / NAME  # the cache fills the folder's gaps


@pytest.mark.parametrize(
    "damaged",
    [CONTENT[:-3], b"", CONTENT.replace(b"2", b"3")],
    ids=["truncated", "empty", "altered"],
)
@pytest.mark.parametrize("place", ["named", "cache"])
def test_damaged_file_is_refused_by_name(place, damaged, tmp_path, cache, monkeypatch):
    register(monkeypatch, "http://127.0.0.1:9/never-asked")
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path / "named"))
    path = write(tmp_path / "named" if place == "named" else cache, damaged)
    with pytest.raises(data.DataCorrupt) as error:
        data.fetch(NAME)
    message = str(error.value)
    assert str(path) in message
    assert hashlib.sha256(CONTENT).hexdigest() in message
    assert hashlib.sha256(damaged).hexdigest() in message


def test_file_altered_after_verification_is_refused(cache, monkeypatch):
    register(monkeypatch, None)
    path = write(cache)
    assert data.fetch(NAME) == path
    write(cache, CONTENT.replace(b"1 + 1", b"2 + 2"))  # of the same size
    with pytest.raises(data.DataCorrupt):
        data.fetch(NAME)


def test_altered_upstream_is_refused_and_leaves_nothing(cache, upstream, monkeypatch):
    root, base = upstream
    (root / "file").write_bytes(CONTENT + b"more")
    register(monkeypatch, f"{base}/file")
    with pytest.raises(data.DataCorrupt, match="does not hold the registered"):
        data.fetch(NAME)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_connection_cut_halfway_leaves_nothing(cache, monkeypatch):
    class Cut(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:10])

    with http.server.HTTPServer(("127.0.0.1", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        register(monkeypatch, f"http://127.0.0.1:{server.server_port}/file")
        with pytest.raises((data.DataUnavailable, data.DataCorrupt), match="all data"):
            data.fetch(NAME)
        server.shutdown()
    assert [path for path in cache.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("status", ["refused", "404"])
def test_unavailable_names_file_places_and_command(
    status, tmp_path, cache, upstream, monkeypatch
):
    base = upstream[1] if status == "404" else "http://127.0.0.1:9"
    register(monkeypatch, f"{base}/file")
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataUnavailable) as error:
        data.fetch(NAME)
    message = str(error.value)
    for part in (
        NAME,
        f"{tmp_path / 'nowhere'} does not exist",
        f"cache: {cache}",
        f"{base}/file",
        "`ftlib data fetch toy`",
    ):
        assert part in message
    assert isinstance(error.value, FileNotFoundError)


def test_file_without_an_address_says_so(monkeypatch):
    register(monkeypatch, None)
    with pytest.raises(data.DataUnavailable, match="made by hand") as error:
        data.fetch(NAME)
    assert "FTLIB_DATA_DIR: not set" in str(error.value)
    assert "ftlib data fetch" not in str(error.value)


@pytest.mark.parametrize("name", ["../../etc/passwd", "math/gsm8k/dev.jsonl", ""])
def test_unregistered_name_is_refused(name):
    with pytest.raises(ValueError, match="no data file is registered"):
        data.fetch(name)


def test_catalogue_counts_what_is_where(tmp_path, cache, monkeypatch):
    places = {row.name: row.where for row in data.catalogue()}
    bundled = {name: places.pop(name) for name in ("tidybot", "tidybot-replies")}
    assert set(bundled.values()) == {"ftlib"}
    assert set(places.values()) == {"not here"}
    (cache / "math/gsm8k").mkdir(parents=True)
    (cache / "math/gsm8k/test.jsonl").touch()
    (tmp_path / "svamp").mkdir()
    (tmp_path / "svamp/SVAMP.json").touch()
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path))
    rows = {row.name: row for row in data.catalogue()}
    assert rows["gsm8k"].where == "1 cache, 1 not here"
    assert rows["gsm8k"].bytes == 749738 + 4166206
    assert rows["svamp"].where == "FTLIB_DATA_DIR"


def test_registry_is_well_formed():
    files = [file for entry in registry.data_sets().values() for file in entry.files]
    assert len({file.path for file in files}) == len(files) == 81
    for entry in registry.data_sets().values():
        assert entry.what
        assert entry.licence
        for file in entry.files:
            assert len(bytes.fromhex(file.sha256)) == 32
            assert file.bytes > 0
            assert (file.url is None) == (entry.how is not None)
    urls = [file.url for file in files if file.url]
    hosts = ("https://raw.githubusercontent.com/", "https://dl.fbaipublicfiles.com/")
    assert all(url.startswith(hosts) for url in urls)
    assert not any(" " in url or "/main/" in url or "/master/" in url for url in urls)


def test_comve_address_is_quoted():
    (train,) = (f for f in registry.data_sets()["comve"].files if "train" in f.path)
    assert train.url.endswith("/ALL%20data/train.csv")
