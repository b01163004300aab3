import os

import pytest

from ftlib import data
from ftlib.data import registry


def test_jsonl_keeps_text_exact(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "x\u2028y"}\r\n{"a": "é\\n"}'.encode())
    assert data.read_jsonl(path) == [{"a": "x\u2028y"}, {"a": "é\n"}]


@pytest.mark.parametrize(
    "line", [b'{"a": 1', b"[1]", b"", b'{"a": "\xff"}', b"{'a': 1}"]
)
def test_jsonl_error_has_the_line(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: "):
        data.read_jsonl(path)


def test_csv_reads_quoted_fields_and_byte_order_mark(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffid,text\n1,"a, ""b""\nc"\n2,é\n'.encode())
    assert data.read_csv(path) == [
        {"id": "1", "text": 'a, "b"\nc'},
        {"id": "2", "text": "é"},
    ]


def test_csv_takes_a_delimiter(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("a\tb\n1,5\t2\n")
    assert data.read_csv(path, delimiter="\t") == [{"a": "1,5", "b": "2"}]


@pytest.mark.parametrize("row", [b"1", b"1,2,3", b'1,"2', b"1,\xff"])
def test_csv_error_has_the_line(row, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n1,2\n" + row + b"\n")
    with pytest.raises(ValueError, match=r"a\.csv, line 3: "):
        data.read_csv(path)


def test_gsm8k_refuses_unknown_split():
    with pytest.raises(ValueError, match=r"no split 'dev'.*train or test"):
        data.gsm8k("dev")


def where(name):
    return next(row.where for row in data.catalogue() if row.name == name)


@pytest.mark.skipif(where("gsm8k") == "not here", reason="GSM8K is not here")
def test_gsm8k_answers_end_in_numbers():
    rows = data.gsm8k("test")
    assert len(rows) == 1319
    numbers = [row["answer"].rpartition("\n#### ")[2] for row in rows]
    assert all(number.replace(",", "").lstrip("-").isdigit() for number in numbers)


@pytest.mark.skipif(not os.environ.get("FTLIB_DATA_DIR"), reason="no FTLIB_DATA_DIR")
def test_every_file_of_the_folder_verifies_and_reads():
    read = {".jsonl": data.read_jsonl, ".csv": data.read_csv}
    for name, entry in registry.data_sets().items():
        if where(name) != "FTLIB_DATA_DIR":
            continue
        for file in entry.files:
            path = data.fetch(file.path)
            assert path.stat().st_size == file.bytes
            if path.suffix in read:
                assert read[path.suffix](path)
