"""NusaX and IndoNLI as published, and XNLI's reader on an archive made here."""

import json
import zipfile
from collections import Counter

import pytest

from ftlib import data
from ftlib.data import registry, sets

SPLITS = {"train": 500, "valid": 100, "test": 400}
CLASSES = {"entailment", "neutral", "contradiction"}


def skip_unless_here(name):
    where = next(row.where for row in data.catalogue() if row.name == name)
    if where == "not here":
        pytest.skip(f"{name} is not here")


# --- NusaX --------------------------------------------------------------------


def test_nusax_is_parallel_in_all_languages():
    skip_unless_here("nusax")
    assert len(sets.NUSAX_LANGUAGES) == 12
    for split, n in SPLITS.items():
        parts = {lang: sets.nusax(lang, split) for lang in sets.NUSAX_LANGUAGES}
        keys = {tuple((r["id"], r["label"]) for r in part) for part in parts.values()}
        assert len(keys) == 1
        for language, part in parts.items():
            assert all(row["text"] == row["text"].strip() != "" for row in part)
            # Two texts of Ngaju's test differ in the spaces around them alone.
            twice = (language, split) == ("ngaju", "test")
            assert len({row["text"] for row in part}) == n - twice
        first = {part[0]["text"] for part in parts.values()}
        assert len(first) == 12


def test_nusax_labels_and_ids_are_those_counted_upstream():
    skip_unless_here("nusax")
    rows = {split: sets.nusax("javanese", split) for split in SPLITS}
    counts = {split: Counter(r["label"] for r in part) for split, part in rows.items()}
    assert counts["train"] == {"negative": 192, "positive": 189, "neutral": 119}
    assert counts["valid"] == {"negative": 38, "positive": 38, "neutral": 24}
    assert counts["test"] == {"negative": 153, "positive": 151, "neutral": 96}
    ids = [row["id"] for part in rows.values() for row in part]
    assert len(set(ids)) == len(ids) == 1000


# --- IndoNLI ------------------------------------------------------------------


def test_indonli_has_its_pairs_with_labels_in_words():
    skip_unless_here("indonli")
    sizes = {"train": 10_330, "val": 2197, "test_lay": 2201, "test_expert": 2984}
    rows = {split: sets.indonli(split) for split in sizes}
    assert {split: len(part) for split, part in rows.items()} == sizes
    for part in rows.values():
        assert {row["label"] for row in part} == CLASSES
        assert all(row["premise"] and row["hypothesis"] for row in part)
    assert rows["train"][0]["label"] == "contradiction"
    assert rows["train"][0]["hypothesis"] == (
        "Prediksi akhir wabah tidak disampaikan Jokowi."
    )
    labels = Counter(row["label"] for row in rows["train"])
    assert labels == {"entailment": 3476, "contradiction": 3439, "neutral": 3415}


def test_indonli_premises_of_train_come_again_but_not_in_test_expert():
    skip_unless_here("indonli")
    seen = {row["premise"] for row in sets.indonli("train")}
    shares = {}
    for split in ("val", "test_lay", "test_expert"):
        rows = sets.indonli(split)
        shares[split] = sum(row["premise"] in seen for row in rows) / len(rows)
    assert shares["val"] == pytest.approx(0.94, abs=0.01)
    assert shares["test_lay"] == pytest.approx(0.89, abs=0.01)
    assert shares["test_expert"] == 0


# --- XNLI ---------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A small archive of XNLI's form, with texts that csv's quoting would break."""
    rows = [
        {
            "language": language,
            "gold_label": label,
            "sentence1": f' {language} "one ',
            "sentence2": f"two\u2028{label}",
            "pairID": str(n),
        }
        for n, label in enumerate(["neutral", "entailment", "contradiction"])
        for language in ("en", "sw")
    ]
    path = tmp_path / "XNLI-1.0.zip"
    with zipfile.ZipFile(path, "w") as file:
        for split, part in (("dev", rows), ("test", rows[:2])):
            lines = "".join(json.dumps(row) + "\n" for row in part)
            file.writestr(f"XNLI-1.0/xnli.{split}.jsonl", lines)
    monkeypatch.setattr("ftlib.data.sets.fetch", lambda name: path)


@pytest.mark.usefixtures("archive")
def test_xnli_reads_one_language_out_of_the_archive():
    rows = sets.xnli("sw", "dev")
    assert [row["label"] for row in rows] == ["neutral", "entailment", "contradiction"]
    assert rows[0] == {
        "premise": 'sw "one',
        "hypothesis": "two\u2028neutral",
        "label": "neutral",
    }
    assert len(sets.xnli("en", "test")) == 1
    assert sets.xnli("de", "dev") == []


def test_a_broken_line_in_an_archive_is_named(tmp_path, monkeypatch):
    path = tmp_path / "XNLI-1.0.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("XNLI-1.0/xnli.dev.jsonl", '{"language": "en"\n')
    monkeypatch.setattr("ftlib.data.sets.fetch", lambda name: path)
    with pytest.raises(ValueError, match=r"xnli\.dev\.jsonl, line 1"):
        sets.xnli("en", "dev")


def test_xnli_is_pinned_and_told_where_to_find(tmp_path, monkeypatch):
    (file,) = registry.data_sets()["xnli"].files
    assert file.url == "https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip"
    monkeypatch.setattr("pooch.os_cache", lambda project: tmp_path)
    monkeypatch.setenv("FTLIB_DATA_DIR", str(tmp_path / "named"))
    (tmp_path / "named" / "xnli").mkdir(parents=True)
    wrong = tmp_path / "named" / "xnli" / "XNLI-1.0.zip"
    wrong.write_bytes(b"not the archive")
    with pytest.raises(data.DataCorrupt, match=file.sha256):
        sets.xnli("en", "dev")
    wrong.unlink()
    monkeypatch.setattr("pooch.retrieve", refuse)
    with pytest.raises(data.DataUnavailable, match=r"XNLI-1\.0\.zip.*ftlib data fetch"):
        sets.xnli("en", "dev")


def refuse(*args, **options):
    raise OSError("no network")


def test_xnli_has_all_its_pairs():
    skip_unless_here("xnli")
    for split, n in (("dev", 2490), ("test", 5010)):
        for language in sets.XNLI_LANGUAGES:
            rows = sets.xnli(language, split)
            assert len(rows) == n
            assert {row["label"] for row in rows} == CLASSES


# --- errors -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "arguments", "message"),
    [
        (sets.nusax, ("javanese", "dev"), "NusaX has no split 'dev': choose train or"),
        (sets.nusax, ("jv", "test"), "NusaX has no language 'jv'.*javanese"),
        (sets.indonli, ("test",), "IndoNLI has no split 'test'.*test_expert"),
        (sets.xnli, ("en", "train"), "XNLI has no split 'train': choose dev or test"),
        (sets.xnli, ("id", "dev"), "XNLI has no language 'id': choose one of ar, bg"),
    ],
)
def test_what_does_not_exist_is_an_error(load, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments)
