"""The Makefile and .ci/run: what they list, install, refuse and pass on."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import generated
from paths import ROOT


def test_make_help_lists_every_target() -> None:
    listed = subprocess.run(
        ["make", "--no-print-directory", "help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert {line.split()[1] for line in listed.stdout.splitlines()} == set(
        phony.split()
    )


def test_make_installs_every_extra() -> None:
    extras = generated.project()["optional-dependencies"]
    installed = re.findall(r"-e '\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert set(",".join(installed).split(",")) == set(extras)


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    """The check runs before anything is created."""
    old = tmp_path / "python3.10"
    old.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && exec {sys.executable} -c '
        '"import sys; sys.version_info = (3, 10); $2"\nexit 9\n'
    )
    old.chmod(0o755)
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["make", "book", f"PYTHON={old}"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "is Python 3.10, but ftlib needs" in done.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with .ci/run, and programs that only say how they were called."""
    shutil.copytree(ROOT / ".ci", tmp_path / "repo" / ".ci")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("make", "chromium"):
        echo = f'#!/bin/sh\necho {name} "$@" $CI $FTLIB_DATA_DIR $FTLIB_MODEL_DIR\n'
        (programs / name).write_text(f"{echo}exit $STATUS\n")
        (programs / name).chmod(0o755)
    return tmp_path / "repo"


def ci_run(
    checkout: Path, status: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    path = f"{checkout.parent / 'bin'}:{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FTLIB", "CI"))}
    return subprocess.run(
        [checkout / ".ci" / "run"],
        env={**kept, "PATH": path, "STATUS": str(status), **variables},
        capture_output=True,
        text=True,
    )


def test_ci_runs_the_tests_and_returns_their_status(checkout: Path) -> None:
    done = ci_run(checkout, status=2)
    assert done.stdout == "make test true\n"
    assert done.returncode == 2


def test_ci_finds_data_and_models_beside_the_checkout(checkout: Path) -> None:
    shared = checkout.parent / "shared"
    for name in ("data", "models"):
        (shared / name).mkdir(parents=True)
    assert ci_run(checkout).stdout == f"make test true {shared}/data {shared}/models\n"
    chosen = ci_run(checkout, FTLIB_DATA_DIR="elsewhere")
    assert chosen.stdout == f"make test true elsewhere {shared}/models\n"
