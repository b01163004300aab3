"""The first cell of a notebook, on Colab: it adds, and replaces nothing.

``pip-freeze.txt`` is what the stock image holds. An environment that claims to hold the
same is made of empty distributions, since pip reads no more of one than its metadata.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import generated
from paths import ROOT

FREEZE = Path(__file__).with_name("pip-freeze.txt").read_text(encoding="utf-8")


def pinned(freeze):
    """Return name to version; what was installed from an address has no ``==``."""
    lines = (line.partition("==") for line in freeze.splitlines() if line[0] != "#")
    return {canonicalize_name(name): version for name, _, version in lines if version}


# --- offline: the bounds ----------------------------------------------------------


def requirements():
    about = generated.project()
    models = about["optional-dependencies"]["models"]
    return [Requirement(line) for line in [*about["dependencies"], *models]]


def refused(versions, requirements):
    """Return the requirements that a version which is there does not satisfy."""
    return [
        f"{requirement}, but Colab has {versions[name]}"
        for requirement in requirements
        if (name := canonicalize_name(requirement.name)) in versions
        and not requirement.specifier.contains(versions[name], prereleases=True)
    ]


def test_what_colab_has_is_within_the_bounds():
    assert refused(pinned(FREEZE), requirements()) == []


def test_a_bound_above_what_colab_has_is_noticed():
    bounds = [Requirement("torch>=2.12"), Requirement("gguf>=99")]
    assert refused(pinned(FREEZE), bounds) == [
        "torch>=2.12, but Colab has 2.11.0+cu128"
    ]


def test_colabs_python_is_within_the_bounds():
    (version,) = re.findall(r"^#   python   ([\d.]+)$", FREEZE, re.MULTILINE)
    bounds = Requirement(f"python{generated.project()['requires-python']}")
    assert bounds.specifier.contains(version)


# --- with the package index: the cell itself ----------------------------------------


def make_environment(folder, versions):
    """Make an environment with nothing in it that claims to hold these versions."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "INSTALLER").write_text("pip\n")
        files = ("METADATA", "INSTALLER", "RECORD")
        (info / "RECORD").write_text("".join(f"{info.name}/{f},,\n" for f in files))
    return folder


def pip(environment, *arguments):
    command = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    return [*command, *arguments]


def held(environment):
    listed = pip(environment, "list", "--format=json")
    found = json.loads(subprocess.run(listed, check=True, capture_output=True).stdout)
    return {canonicalize_name(item["name"]): item["version"] for item in found}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The release as this checkout has it, built of a copy."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("ftlib", "kernels", "book/results"):
        shutil.copytree(ROOT / name, tree / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(tree)]
    subprocess.run(build, check=True, capture_output=True)
    return next((tree / "dist").glob("*.whl"))


def run_first_cell(environment, folder, wheel):
    """Run the cell in IPython as on Colab, where ``pip`` works on the environment.

    In place of the tag it installs the wheel.
    """
    folder.mkdir()
    command = folder / "pip"
    command.write_text(f'#!/bin/sh\nexec {" ".join(pip(environment))} "$@"\n')
    command.chmod(0o755)
    about = generated.project()
    source = generated.generated_cells(about)[0].source
    tagged = f'"git+{about["urls"]["Repository"]}@v{about["version"]}"'
    assert tagged in source
    colab = "import sys; sys.modules['google.colab'] = sys\n"
    cell = colab + source.replace(tagged, repr(wheel.as_uri()))
    (folder / "cell.ipy").write_text(cell)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "IPYTHONDIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "IPython", "cell.ipy"],
        cwd=folder,
        env=os.environ | paths,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def _index(tmp_path_factory):
    """Skip where no package index answers; under CI one must."""
    folder = str(tmp_path_factory.mktemp("probe"))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q"]
    options = ["--retries", "0", "--timeout", "10", "-d", folder, "gguf"]
    probe = subprocess.run([*command, *options], capture_output=True, text=True)
    if probe.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            f"no package index answers: {probe.stderr.strip()[-200:]}"
        )


def changed(before, after):
    """Return what was replaced or removed, and what was added."""
    gone = {name: after.get(name) for name in before if after.get(name) != before[name]}
    return gone, set(after) - set(before)


@pytest.mark.usefixtures("_index")
def test_the_first_cell_adds_and_replaces_nothing(tmp_path, wheel):
    versions = pinned(FREEZE)
    environment = make_environment(tmp_path / "colab", versions)
    done = run_first_cell(environment, tmp_path / "cell", wheel)
    after = held(environment)
    assert changed(versions, after) == ({"torchao": None}, {"ftlib", "gguf"}), done
    assert after["ftlib"] == generated.project()["version"]
    kept = (tmp_path / "cell" / "kept.txt").read_text().split()
    names = ("numpy", "torch", "triton")
    assert kept == [f"{name}=={versions[name]}" for name in names]


@pytest.mark.usefixtures("_index")
def test_a_replaced_package_is_noticed(tmp_path, wheel):
    """PyYAML, because it is small and needs nothing."""
    versions = pinned(FREEZE) | {"pyyaml": "5.4"}
    environment = make_environment(tmp_path / "colab", versions)
    run_first_cell(environment, tmp_path / "cell", wheel)
    replaced, _ = changed(versions, held(environment))
    assert set(replaced) == {"torchao", "pyyaml"}


@pytest.mark.usefixtures("_index")
def test_torch_is_kept_even_where_it_is_too_old(tmp_path, wheel):
    """Then nothing is installed, and pip says which pin is in the way."""
    versions = pinned(FREEZE) | {"torch": "2.9.0+cu128"}
    environment = make_environment(tmp_path / "colab", versions)
    done = run_first_cell(environment, tmp_path / "cell", wheel)
    assert "ResolutionImpossible" in done.stdout + done.stderr
    assert changed(versions, held(environment)) == ({"torchao": None}, set())
