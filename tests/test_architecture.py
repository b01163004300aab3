"""The shape of the code: who imports whom, how long functions are, what is unused.

Each check is a function of source code. It passes over the repository, and a broken
example beside it shows what it catches.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from vulture import Vulture

from paths import MIRROR, ROOT

PACKAGES = {"ftlib": ROOT / "ftlib", "ftlib.kernels": ROOT / "kernels"}
OURS = [*PACKAGES.values(), ROOT / "book" / "tools", ROOT / "benchmarks"]


def python_files(*folders):
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


# --- imports run one way --------------------------------------------------------

# A room is a subpackage or a module of ftlib. It imports rooms of the layers below its
# own, and none beside it.
LAYERS = (
    "combination cli",
    "caref cft cgm clipr ctsft",
    "data",
    "bases experiments footprint metrics outcomes plots published sequences training",
    "checkpoints models ops results",
    "checksum files runtime splits streams words",
    "kernels",
)
LAYER_OF = {room: -n for n, rooms in enumerate(LAYERS) for room in rooms.split()}


def room_of(path):
    name = next(n for n, folder in PACKAGES.items() if path.is_relative_to(folder))
    inside = path.relative_to(PACKAGES[name]).with_suffix("").parts
    return ".".join((name, *inside)).split(".")[1]


def imported(source):
    """The full names that a module imports, wherever in it that is written."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=0):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                raise ValueError(f"line {node.lineno}: write the import in full")
            case ast.Call(
                func=ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=name), *_],
            ):
                yield name


def wrong_imports(room, source):
    """The rooms that a module of a room must not import."""
    rooms = {
        name.split(".")[1] for name in imported(source) if name.startswith("ftlib.")
    }
    return {
        other
        for other in rooms - {room, "__version__"}
        if LAYER_OF[other] >= LAYER_OF[room] or (other == "kernels" and room != "ops")
    }


MODULES = [
    path
    for path in python_files(*PACKAGES.values())
    if path != ROOT / "ftlib" / "__init__.py"
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    assert not wrong_imports(room_of(path), path.read_text("utf-8"))


def test_every_room_has_one_layer():
    rooms = [room for layer in LAYERS for room in layer.split()]
    assert sorted(rooms) == sorted({room_of(path) for path in MODULES})


@pytest.mark.parametrize(
    ("room", "source", "wrong"),
    [
        ("ops", "from ftlib.training import train", "training"),
        ("caref", "from ftlib import ctsft, runtime", "ctsft"),
        ("cft", "import ftlib.cgm.dual", "cgm"),
        ("cft", "from ftlib.combination.circuit import find", "combination"),
        ("models", "def late():\n    from ftlib.data import fetch", "data"),
        ("clipr", "from ftlib.kernels.types import Logits", "kernels"),
        ("kernels", "from ftlib.ops.rows import slope", "ops"),
        ("results", "import importlib\nimportlib.import_module('ftlib.cft')", "cft"),
    ],
)
def test_an_import_that_runs_the_other_way_is_found(room, source, wrong):
    assert wrong_imports(room, source) == {wrong}


def test_an_import_that_does_not_say_where_from_is_refused():
    with pytest.raises(ValueError, match="line 1: write the import in full"):
        wrong_imports("cft", "from ..cgm import dual")


# --- functions are short --------------------------------------------------------

LONGEST = 60  # lines from def to the end, without the docstring


def long_functions(source):
    """The functions that are too long, each with its number of lines."""
    return {
        node.name: lines
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := code_lines(node)) > LONGEST
    }


def code_lines(function):
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    docstring = function.body[0]
    return lines - (docstring.end_lineno - docstring.lineno + 1)


@pytest.mark.parametrize("folder", OURS, ids=lambda folder: folder.name)
def test_functions_are_short(folder):
    found = {
        str(path.relative_to(ROOT)): long_functions(path.read_text("utf-8"))
        for path in python_files(folder)
    }
    assert not {path: functions for path, functions in found.items() if functions}


def test_a_function_that_is_too_long_is_found_and_its_docstring_is_not_counted():
    lines = "    x = 1\n" * LONGEST
    documented = '    """Say what it does.\n\n    At length.\n    """\n'
    assert long_functions(f"def long():\n{lines}") == {"long": LONGEST + 1}
    assert long_functions(f"async def long():\n{lines}") == {"long": LONGEST + 1}
    assert not long_functions(f"def f():\n{documented}{lines[:-10]}")


# --- nothing is unused ----------------------------------------------------------

# What nobody calls by its name, and why it stays.
_FRAMEWORK = "called or read by a library"
_FIELD = "a field of what is returned, for those who use ftlib"
_API = "for those who use ftlib; tested, and in no chapter"
UNCALLED = {
    "ftlib/caref/experiment.py": {"tinit": _FRAMEWORK, "tfinal": _FRAMEWORK},
    "ftlib/caref/faithfulness.py": {"from_both": _FIELD, "leaking": _FIELD},
    "ftlib/caref/selection.py": {"PUBLISHED_SHARES": "a test holds ours against it"},
    "ftlib/cft/data.py": {"check_packing": _API},
    "ftlib/cgm/calibrate.py": {"mode": "the signature is torch's"},
    "ftlib/clipr/endpoint.py": {
        "from_environment": _API,
        "redirect_request": _FRAMEWORK,
        "req": "the signature is urllib's",
        "fp": "the signature is urllib's",
        "newurl": "the signature is urllib's",
        "damaged": _FIELD,
    },
    "ftlib/clipr/loop.py": {"review": "a phase, called by its name"},
    "ftlib/clipr/manipulation.py": {
        "overlap": _API,
        "place_tasks": _API,
        "STRANGE_PLACE_FAMILIES": _API,
    },
    "ftlib/clipr/prompted.py": {"PromptedUser": _API},
    "ftlib/clipr/walkthrough.py": {"_repr_html_": _FRAMEWORK},
    "ftlib/combination/experiment.py": {"fan_in_fan_out": _FRAMEWORK},
    "ftlib/data/arrays.py": {"find_class": _FRAMEWORK},
    "ftlib/data/cli.py": {"_default": _FRAMEWORK},
    "ftlib/data/sets.py": {
        "intended_objects": _FIELD,
        "intended_locations": _FIELD,
        "kitchen": _FIELD,
        "clear": _FIELD,
    },
    "ftlib/footprint.py": {"types": "the signature is torch's"},
    "ftlib/checksum.py": {"mtime_ns": "a part of the cache's key"},
    "ftlib/metrics/calibration.py": {"ece_interval": _API, "decompose": _API},
    "ftlib/metrics/grader.py": {"extracted": _FIELD},
    "ftlib/models/cli.py": {"_default": _FRAMEWORK},
    "ftlib/ops/tiles.py": {"_": _FRAMEWORK},
    "ftlib/results.py": {"finished": "read by its name"},
    "ftlib/runtime.py": {"benchmark": _FRAMEWORK},
    "ftlib/training.py": {"maxlist": _FRAMEWORK},
    "book/tools/exercises.py": {"exercises_of": "the tests read a chapter with it"},
    "book/tools/notebooks.py": {"nbformat_minor": _FRAMEWORK},
    "book/tools/paths.py": {"HTML": "the tests open it"},
    "book/tools/pdf.py": {"page_mode": _FRAMEWORK},
    "benchmarks/peers.py": {
        "maybe_gather_lm_head_ctx": _FRAMEWORK,
        "is_cuda_available": _FRAMEWORK,
        "get_device_name": _FRAMEWORK,
        "get_torch_device": _FRAMEWORK,
    },
}


def unused(folders, users=()):
    """Names by file that neither the code nor the notebooks mention again."""
    finder = Vulture()
    finder.scavenge([*folders, *users])
    found = {}
    for item in finder.get_unused_code():
        if any(item.filename.is_relative_to(folder) for folder in folders):
            found.setdefault(item.filename, set()).add(item.name)
    return found


def test_nothing_is_unused():
    found = {
        str(path.relative_to(ROOT)): names
        for path, names in unused(OURS, users=[MIRROR]).items()
    }
    surplus = {
        path: names - UNCALLED.get(path, {}).keys() for path, names in found.items()
    }
    assert not {path: names for path, names in surplus.items() if names}


def test_what_may_stay_unused_is_still_there():
    for path, names in UNCALLED.items():
        words = set(re.findall(r"\w+", (ROOT / path).read_text("utf-8")))
        assert names.keys() <= words, path


def test_what_is_unused_is_found_wherever_it_lies(tmp_path):
    (tmp_path / "ours").mkdir()
    module = tmp_path / "ours" / "module.py"
    module.write_text("LEFT = 1\ndef called(): pass\ndef left(): pass\n")
    (tmp_path / "notebook.py").write_text("called()\nunseen = 2\n")
    found = unused([tmp_path / "ours"], users=[tmp_path / "notebook.py"])
    assert found == {module: {"LEFT", "left"}}


# --- what is public is documented -----------------------------------------------


@pytest.mark.parametrize("folder", ["ftlib", "ftlib/cgm", "kernels", "book/tools"])
@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("X = 1\n", "D100"),
        ('"""A module."""\n\n\nclass Thing:\n    pass\n', "D101"),
        ('"""A module."""\n\n\ndef function() -> None:\n    pass\n', "D103"),
    ],
)
def test_ruff_misses_no_docstring(folder, source, rule):
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise"]
    name = ["--stdin-filename", str(Path(folder) / "new.py"), "-"]
    run = subprocess.run(
        [*command, *name], input=source, capture_output=True, text=True, cwd=ROOT
    )
    assert f"{rule} " in run.stdout
