"""ftlib as installed: editable, as a wheel, and how little importing it costs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("ftlib", "kernels", "book/results")


def python(code: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_editable_install_maps_kernels_and_records(tmp_path: Path) -> None:
    code = "import ftlib.{0}; print(ftlib.{0}.__file__)"
    kernels = python(code.format("kernels"), tmp_path)
    records = python(code.format("records"), tmp_path)
    assert Path(kernels) == ROOT / "kernels" / "__init__.py"
    assert Path(records) == ROOT / "book" / "results" / "__init__.py"


def test_packages_are_the_directories() -> None:
    """An explicit list of packages forgets a new subpackage unless it is held."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    names = {"kernels": "ftlib.kernels", "book.results": "ftlib.records"}
    there = set()
    for source in SOURCES:
        for init in (ROOT / source).rglob("__init__.py"):
            dotted = ".".join(init.parent.relative_to(ROOT).parts)
            there.add(names.get(dotted, dotted))
    assert set(settings["packages"]) == there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy, since a build leaves files beside the sources."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for source in SOURCES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / source, tree / source, ignore=ignore)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir"]
    subprocess.run(
        [*command, str(tree / "dist"), str(tree)], check=True, capture_output=True
    )
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_wheel_holds_kernels_records_and_types(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "ftlib/kernels/__init__.py",
        "ftlib/records/__init__.py",
        "ftlib/records/cft/published.toml",
        "ftlib/records/cgm/cpu.json",
        "ftlib/py.typed",
    } <= names
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ftlib"}


def test_wheel_installs_and_imports(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "--target", str(target), str(wheel)], check=True, capture_output=True
    )
    code = "import ftlib, ftlib.kernels, ftlib.records; print(ftlib.records.__file__)"
    records = python(code, tmp_path, PYTHONPATH=str(target))
    assert Path(records) == target / "ftlib" / "records" / "__init__.py"


def test_import_is_cheap_and_leaves_torch_alone(tmp_path: Path) -> None:
    code = """
import sys, time
begin = time.perf_counter()
import ftlib
seconds = time.perf_counter() - begin
heavy = {"torch", "transformers", "numpy", "scipy"} & set(sys.modules)
print(seconds < 0.3, sorted(heavy))
"""
    assert python(code, tmp_path) == "True []"
