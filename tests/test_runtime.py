import importlib.util
import random
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ftlib import runtime
from ftlib.runtime import SettingError

SECOND_GPU = torch.device("cuda:1")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch):
    for name in ("FTLIB_SCALE", "FTLIB_DEVICE", "CI", "TQDM_DISABLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def t4(monkeypatch):
    """Torch as it answers on a machine with one T4, which emulates bf16."""
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30)
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda: True,
        "get_device_capability": lambda _: (7, 5),
        "get_device_properties": lambda _: properties,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


# --- scale -------------------------------------------------------------------


def test_scale_without_anything_follows_the_device(no_cuda):
    assert runtime.scale() == "cpu"


def test_scale_with_cuda_is_gpu(t4):
    assert runtime.scale() == "gpu"


def test_scale_of_a_gpu_machine_told_to_use_its_cpu(t4, monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    assert runtime.scale() == "cpu"


def test_scale_prefers_the_argument_then_the_variable(no_cuda, monkeypatch):
    monkeypatch.setenv("FTLIB_SCALE", "gpu")
    assert runtime.scale() == "gpu"
    assert runtime.scale("paper") == "paper"
    monkeypatch.setenv("FTLIB_SCALE", "")
    assert runtime.scale() == "cpu"


def test_unknown_scale_says_where_it_came_from(monkeypatch):
    with pytest.raises(SettingError, match=r"'GPU' \(from the argument\).*cpu, gpu"):
        runtime.scale("GPU")
    monkeypatch.setenv("FTLIB_SCALE", "big")
    with pytest.raises(ValueError, match=r"'big' \(from FTLIB_SCALE\)"):
        runtime.scale()


# --- device and dtype --------------------------------------------------------


def test_device_prefers_the_variable(t4, monkeypatch):
    assert runtime.device() == torch.device("cuda")
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    assert runtime.device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none_is_refused(no_cuda, monkeypatch, name):
    monkeypatch.setenv("FTLIB_DEVICE", name)
    with pytest.raises(SettingError, match=f"FTLIB_DEVICE='{name}'.*sees 0 CUDA"):
        runtime.device()


def test_a_second_gpu_where_there_is_one_is_refused(t4, monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cuda:1")
    with pytest.raises(SettingError, match="sees 1 CUDA"):
        runtime.device()


def test_a_device_that_does_not_exist_is_refused(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "quantum")
    with pytest.raises(SettingError, match="'quantum' is no device"):
        runtime.device()


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 0), torch.float32),
        ((7, 5), torch.float32),
        ((8, 0), torch.bfloat16),
        ((8, 6), torch.bfloat16),
        ((9, 0), torch.bfloat16),
        ((10, 0), torch.bfloat16),
        ((12, 1), torch.bfloat16),
    ],
)
def test_bf16_follows_the_compute_capability(capability, dtype):
    chosen = runtime.precision(torch.device("cuda"), capability)
    assert chosen.dtype is dtype
    assert ".".join(map(str, capability)) in chosen.reason


def test_precision_asks_the_capability_and_not_torch(t4):
    assert torch.cuda.is_bf16_supported()
    assert runtime.precision().dtype is torch.float32
    assert not runtime.triton_supported()


def test_precision_and_triton_without_cuda(no_cuda):
    assert runtime.precision().dtype is torch.float32
    assert not runtime.triton_supported()


def test_triton_from_capability_eight(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert runtime.triton_supported()


def test_no_triton_where_it_has_no_package(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not runtime.triton_supported()


# --- seeds -------------------------------------------------------------------


def _draws():
    return (
        random.random(),
        np.random.random(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.nn.Linear(3, 2).weight.tolist(),
    )


@pytest.fixture
def _algorithms():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("_algorithms")
def test_a_seed_repeats_every_generator_and_another_changes_each():
    drawn = []
    for seed in (3, 3, 4):
        runtime.seed_everything(seed)
        drawn.append(_draws())
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[0], drawn[2], strict=True))


@pytest.mark.usefixtures("_algorithms")
def test_seeding_asks_for_deterministic_kernels_with_a_warning_only():
    torch.use_deterministic_algorithms(False)
    runtime.seed_everything(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()


# --- report ------------------------------------------------------------------


def test_report_is_one_line_with_everything(no_cuda):
    line = runtime.report()
    assert "\n" not in line
    assert re.match(r"scale cpu \| cpu, \d+ cores \| fp32: .* \| python 3\.", line)
    assert f"torch {torch.__version__}" in line


def test_report_on_a_gpu(t4):
    line = runtime.report()
    assert line.startswith(
        "scale gpu | Tesla T4, 15 GiB | fp32: compute capability 7.5"
    )
    assert "\n" not in line


def test_versions_leave_out_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(runtime, "_REPORTED_PACKAGES", ("numpy", "no-such-package"))
    assert set(runtime.versions()) == {"python", "ftlib", "numpy"}
    assert runtime.versions()["numpy"] == np.__version__


# --- commit ------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of its own in which ftlib seems to lie, and its first commit."""
    (tmp_path / "ftlib").mkdir()
    (tmp_path / "ftlib" / "runtime.py").write_text("")
    (tmp_path / "notes.txt").write_text("")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for arguments in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True)
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "ftlib" / "runtime.py"))
    return tmp_path


def test_commit_is_marked_dirty_by_code_alone(checkout):
    commit = runtime.git_commit()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    (checkout / "notes.txt").write_text("changed")
    assert runtime.git_commit() == commit
    (checkout / "ftlib" / "new.py").write_text("")
    assert runtime.git_commit() == f"{commit}-dirty"


def test_commit_is_none_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "__file__", str(tmp_path / "ftlib" / "runtime.py"))
    assert runtime.git_commit() is None


def test_commit_is_none_where_git_fails_or_is_missing(checkout, monkeypatch):
    (checkout / ".git" / "HEAD").write_text("broken")
    assert runtime.git_commit() is None
    monkeypatch.setenv("PATH", "")
    assert runtime.git_commit() is None


# --- memory ------------------------------------------------------------------


def test_peak_memory_counts_bytes(no_cuda):
    runtime.reset_peak_memory()
    block = np.ones(2**25)  # 256 MiB, touched
    assert runtime.peak_memory() >= block.nbytes
    assert runtime.peak_memory() < 2**40


def test_peak_memory_is_not_that_of_the_parent(no_cuda):
    """On Linux a child's `ru_maxrss` begins with what its parent had."""
    block = np.ones(2**26)  # 512 MiB
    code = "from ftlib import runtime; print(runtime._peak_resident())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) < block.nbytes


def test_gpu_memory_is_that_of_the_chosen_device(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("FTLIB_DEVICE", "cuda:1")
    calls = []
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", calls.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {SECOND_GPU: 7}.get)
    runtime.reset_peak_memory()
    assert calls == ["init", SECOND_GPU]
    assert runtime.peak_memory() == 7


# --- progress ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["CI", "TQDM_DISABLE"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [("", False), ("0", False), ("false", False), ("True", True), ("1", True)],
)
def test_quiet(monkeypatch, name, value, expected):
    monkeypatch.setenv(name, value)
    assert runtime.quiet() is expected


@pytest.mark.parametrize("ci", ["", "true"])
def test_progress_draws_unless_quiet(monkeypatch, capsys, ci):
    monkeypatch.setenv("CI", ci)
    assert list(runtime.progress([1, 2, 3], desc="steps")) == [1, 2, 3]
    assert ("steps" in capsys.readouterr().err) is (not ci)


def test_progress_in_a_notebook_without_widgets_does_not_warn(monkeypatch):
    from tqdm import TqdmWarning

    class Warns:
        def __getattr__(self, name):
            warnings.warn("IProgress not found", TqdmWarning, stacklevel=2)
            raise AttributeError(name)

    monkeypatch.setitem(sys.modules, "tqdm.auto", Warns())
    with warnings.catch_warnings(record=True) as seen, pytest.raises(ImportError):
        runtime.progress([])
    assert seen == []


def test_importing_the_runtime_does_not_import_torch():
    code = "import sys, ftlib.runtime; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
