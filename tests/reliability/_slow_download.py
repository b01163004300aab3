"""The `ftlib` command with one data set, of two files: the second is slow to come.

Usage: python _slow_download.py ADDRESS data fetch toy
"""

import hashlib
import sys

from ftlib import cli
from ftlib.data import cli as data_cli
from ftlib.data import registry
from ftlib.data.registry import DataFile, DataSet

CONTENTS = {"first": b"1" * 5000, "second": b"2" * 5000}


def data_sets(address):
    files = [
        DataFile(
            f"toy/{name}",
            f"{address}/{name}",
            len(content),
            hashlib.sha256(content).hexdigest(),
        )
        for name, content in CONTENTS.items()
    ]
    return {"toy": DataSet("toy", "a toy", "MIT", tuple(files), None)}


if __name__ == "__main__":
    address = sys.argv.pop(1)
    registry.data_sets = data_cli.data_sets = lambda: data_sets(address)
    cli.app()
