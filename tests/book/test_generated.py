"""What is generated from pyproject.toml equals what is committed, and works."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from packaging.requirements import Requirement

import generated
from paths import ENVIRONMENT, ROOT


def test_environment_is_current() -> None:
    assert ENVIRONMENT.read_text() == generated.environment(generated.project())


def test_environment_is_what_conda_reads() -> None:
    python, pip, from_pip = yaml.safe_load(ENVIRONMENT.read_text())["dependencies"]
    about = generated.project()
    assert python == f"python {about['requires-python']}"
    assert pip == "pip"
    (constraints, project) = from_pip["pip"]
    assert constraints == "-c requirements.lock"
    extras = Requirement(project.replace("-e .", "ftlib")).extras
    assert extras == set(about["optional-dependencies"]) - {"bench"}


def install_source() -> str:
    return generated.generated_cells(generated.project())[0].source


def run_install_cell(folder: Path, first: str) -> list[str]:
    """Run the cell in IPython with a pip that only notes how it was called."""
    pip = folder / "pip"
    pip.write_text(
        '#!/bin/sh\necho "$@" >> "$PIP_LOG"\n'
        'if [ "$1" = list ]; then printf "%s\\n" $PIP_LIST; fi\n'
    )
    pip.chmod(0o755)
    script = folder / "cell.ipy"
    script.write_text(f"{first}\n{install_source()}\n")
    log = folder / "log"
    environment = {
        **os.environ,
        "IPYTHONDIR": str(folder / "ipython"),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PIP_LIST": "numpy==2.1.3 torch==2.11.0+cu128 torchao==0.10.0 triton==3.6.0",
        "PIP_LOG": str(log),
    }
    command = [sys.executable, "-m", "IPython", script.name]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return log.read_text().splitlines() if log.exists() else []


def test_install_cell_does_nothing_away_from_colab(tmp_path: Path) -> None:
    assert run_install_cell(tmp_path, "") == []


def test_install_cell_on_colab_pins_torch_and_installs_the_release(
    tmp_path: Path,
) -> None:
    colab = "import sys; sys.modules['google.colab'] = sys"
    _, install, uninstall = run_install_cell(tmp_path, colab)
    about = generated.project()
    repository = about["urls"]["Repository"]
    assert install == (
        f"install -q -c kept.txt ftlib[models] @ git+{repository}@v{about['version']}"
    )
    assert uninstall.endswith("torchao")
    kept = (tmp_path / "kept.txt").read_text().split()
    assert kept == ["numpy==2.1.3", "torch==2.11.0+cu128", "triton==3.6.0"]


def test_versions_agree() -> None:
    version = generated.project()["version"]
    assert f'__version__ = "{version}"' in (ROOT / "ftlib" / "__init__.py").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == version


def test_cells_go_before_the_first_code_cell_once() -> None:
    about = generated.project()
    cells = [new_markdown_cell("# Title"), new_code_cell("1")]
    notebook = new_notebook(cells=cells)
    once = generated.with_generated_cells(notebook, about)
    sources = [cell.source for cell in once.cells]
    wanted = [cell.source for cell in generated.generated_cells(about)]
    assert sources == ["# Title", *wanted, "1"]
    twice = generated.with_generated_cells(once, about)
    assert [cell.source for cell in twice.cells] == sources


def test_current_cells_keep_outputs_and_stale_ones_lose_them() -> None:
    about = generated.project()
    notebook = generated.with_generated_cells(new_notebook(), about)
    report = notebook.cells[1]
    report.update(outputs=[new_output("stream", text="here")], execution_count=1)
    kept = generated.with_generated_cells(notebook, about).cells[1]
    assert (kept.outputs[0].text, kept.execution_count) == ("here", 1)
    kept.source = "print('edited')"
    fresh = generated.with_generated_cells(notebook, about).cells[1]
    assert (fresh.outputs, fresh.execution_count) == ([], None)


def test_tags_say_that_no_runner_installs() -> None:
    install, report = generated.generated_cells(generated.project())
    assert {"nbval-skip", "skip-execution"} <= set(install.metadata.tags)
    assert not {"nbval-skip", "skip-execution"} & set(report.metadata.tags)
