"""Nothing in the repository runs what it reads: no pickle, no eval, no shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from paths import NOTEBOOKS, ROOT

SKIPPED = {".venv", "_build", "build", "dist", "node_modules"}
BUILTINS = {"eval", "exec"}
# A module and the functions of it that make objects, or a command line, of a text.
FUNCTIONS = {
    "pickle": {"load", "loads", "Unpickler"},
    "cPickle": {"load", "loads", "Unpickler"},
    "dill": {"load", "loads", "Unpickler"},
    "cloudpickle": {"load", "loads"},
    "joblib": {"load"},
    "marshal": {"load", "loads"},
    "shelve": {"open"},
    "os": {"system", "popen"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "pandas": {"read_pickle"},
}
ALIASES = {"np": "numpy", "pd": "pandas"}


def faults(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of every call in a program that could run what it reads."""
    tree = ast.parse(source)
    names = _imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (fault := _fault(node, names)):
            yield node.lineno, fault


def _imported(tree: ast.AST) -> dict[str, str]:
    """What the imports of a program call things, and what these are."""
    names = dict(ALIASES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def _fault(call: ast.Call, names: dict[str, str]) -> str | None:
    called = _dotted(call.func, names)
    module, _, function = called.rpartition(".")
    given = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if called in BUILTINS or function in FUNCTIONS.get(module, ()):
        return called
    if called == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if called == "numpy.load" and given.get("allow_pickle", "False") != "False":
        return "numpy.load with allow_pickle"
    if module == "yaml" and function in {"load", "load_all", "unsafe_load"}:
        loader = given.get("Loader") or "".join(map(ast.unparse, call.args[1:]))
        if "Safe" not in names.get(loader, loader):
            return f"{called} without SafeLoader"
    if given.get("shell", "False") != "False":
        return f"{called} with a shell"
    if given.get("trust_remote_code", "False") != "False":
        return "trust_remote_code"
    return None


def _dotted(function: ast.expr, names: dict[str, str]) -> str:
    """What is called, by its full name: `np.load` is numpy.load."""
    first, _, rest = ast.unparse(function).partition(".")
    return ".".join(filter(None, [names.get(first, first), rest]))


def programs() -> Iterator[tuple[str, str]]:
    """Yield every program of the repository with its name: files and notebooks."""
    rooms = [room for room in ROOT.iterdir() if room.name not in SKIPPED]
    for path in sorted(path for room in rooms for path in _python_files(room)):
        yield str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        for number, cell in enumerate(nbformat.read(path, as_version=4).cells, 1):
            if cell.cell_type == "code":
                plain = TransformerManager().transform_cell(cell.source)
                yield f"{path.name}, cell {number}", plain


def _python_files(room: Path) -> list[Path]:
    return (
        list(room.rglob("*.py")) if room.is_dir() else [room] * (room.suffix == ".py")
    )


def test_no_program_runs_what_it_reads():
    found = [
        f"{name}, line {line}: {fault}"
        for name, source in programs()
        for line, fault in faults(source)
    ]
    assert found == []


def test_all_rooms_are_looked_at():
    names = [name for name, _ in programs()]
    rooms = {name.partition("/")[0] for name in names}
    assert {"ftlib", "kernels", "book", "benchmarks", "tests"} < rooms
    chapters = {path.name for path in NOTEBOOKS.glob("*.ipynb")}
    assert chapters < {name.partition(", cell")[0] for name in names}


BROKEN = """
import pickle; pickle.load(file)
import pickle as p; p.loads(content)
from pickle import loads; loads(content)
from pickle import Unpickler as U; U(file).load()
import cPickle; cPickle.load(file)
import dill; dill.loads(content)
import joblib; joblib.load(path)
import marshal; marshal.loads(content)
import torch; torch.load(path)
import torch; torch.load(path, weights_only=False)
from torch import load; load(path, map_location="cpu")
import numpy as np; np.load(path, allow_pickle=True)
from numpy import load; load(path, allow_pickle=flag)
eval(text)
exec(compile(text, "", "exec"))
import os; os.system("rm -r " + path)
from os import system; system(command)
import os; os.popen(command)
import subprocess; subprocess.run(command, shell=True)
from subprocess import Popen; Popen(command, shell=flag)
import subprocess as s; s.getoutput(command)
import yaml; yaml.load(text)
import yaml; yaml.load(text, Loader=yaml.Loader)
import yaml; yaml.load(text, yaml.UnsafeLoader)
import yaml; yaml.unsafe_load(text)
AutoModel.from_pretrained(name, trust_remote_code=True)
""".strip().splitlines()


@pytest.mark.parametrize("source", BROKEN)
def test_what_runs_what_it_reads_is_seen(source):
    assert list(faults(source))


SOUND = """
model.eval()
self.eval(); model.train().eval()
import json; json.load(file); json.loads(text)
import torch; torch.load(path, weights_only=True)
import numpy as np; np.load(path); np.load(path, allow_pickle=False)
import subprocess; subprocess.run(["ls", path]); subprocess.run(a, shell=False)
import yaml; yaml.safe_load(text); yaml.load(text, Loader=yaml.CSafeLoader)
from safetensors.torch import load; load(content)
import re; re.compile(text)
""".strip().splitlines()


@pytest.mark.parametrize("source", SOUND)
def test_what_only_reads_is_let_be(source):
    assert list(faults(source)) == []
