"""Where and how the code runs: scale, device, dtype, seeds, one-line report.

Every decision that depends on the machine is taken here and nowhere else.
Torch is imported inside the functions, so that importing this module is free.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import random
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

Scale = Literal["cpu", "gpu", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)

# Triton and the hardware's own bf16 both begin with this compute capability.
AMPERE = (8, 0)

_REPORTED_PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")


class SettingError(ValueError):
    """An argument or an environment variable holds a value that cannot be used."""


class Precision(NamedTuple):
    """A dtype together with the reason it was chosen."""

    dtype: torch.dtype
    reason: str


def scale(explicit: str | None = None) -> Scale:
    """Return the scale to run at.

    The order is the argument, then ``FTLIB_SCALE``, then ``gpu`` where CUDA is
    available and ``cpu`` where it is not.

    Raises:
        SettingError: the name is not one of ``cpu``, ``gpu``, ``paper``.
    """
    name = explicit or os.environ.get("FTLIB_SCALE")
    if not name:
        return "gpu" if device().type == "cuda" else "cpu"
    if name not in SCALES:
        source = "the argument" if explicit else "FTLIB_SCALE"
        raise SettingError(
            f"unknown scale {name!r} (from {source}): choose one of {', '.join(SCALES)}"
        )
    return name


def device() -> torch.device:
    """Return ``FTLIB_DEVICE`` if it is set, else CUDA if there is any, else the CPU.

    Raises:
        SettingError: ``FTLIB_DEVICE`` names no device, or CUDA where there is none.
    """
    import torch

    cuda = torch.cuda.is_available()
    name = os.environ.get("FTLIB_DEVICE") or ("cuda" if cuda else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise SettingError(
            f"FTLIB_DEVICE={name!r} is no device: use cpu, cuda or cuda:N"
        ) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise SettingError(
            f"FTLIB_DEVICE={name!r}, but torch {torch.__version__} sees "
            f"{torch.cuda.device_count()} CUDA devices: unset it, or set it to cpu"
        )
    return chosen


def describe_device() -> str:
    """Name the device and its size: ``NVIDIA H200, 140 GiB`` or ``cpu, 2 cores``."""
    import torch

    on = device()
    if on.type != "cuda":
        return f"{on.type}, {os.cpu_count()} cores"
    properties = torch.cuda.get_device_properties(on)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def precision(
    on: torch.device | None = None, capability: tuple[int, int] | None = None
) -> Precision:
    """Choose the dtype for weights and activations on a device.

    The compute capability is asked, not ``torch.cuda.is_bf16_supported()``,
    which counts emulation and so answers yes on a T4.

    Args:
        on: the device; by default :func:`device`.
        capability: compute capability to decide for, in place of the device's.
    """
    import torch

    on = on or device()
    if on.type != "cuda":
        return Precision(torch.float32, "fp32: exact and fastest without a GPU")
    capability = capability or torch.cuda.get_device_capability(on)
    version = ".".join(map(str, capability))
    if capability >= AMPERE:
        return Precision(torch.bfloat16, f"bf16: compute capability {version}")
    return Precision(
        torch.float32, f"fp32: compute capability {version} has no bf16 of its own"
    )


def triton_supported(on: torch.device | None = None) -> bool:
    """Whether Triton kernels are used on a device: CUDA at capability 8.0 and up.

    Triton has no package for Windows and macOS; there the answer is no.
    """
    import torch

    on = on or device()
    if on.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(on) >= AMPERE


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), and ask for deterministic kernels.

    Operations without a deterministic version warn rather than stop the run.
    """
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  # libraries still draw from the global state
    torch.manual_seed(seed)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False


def report() -> str:
    """Describe scale, device, memory, dtype and versions in one line."""
    packages = ", ".join(f"{name} {v}" for name, v in versions().items())
    return " | ".join(
        (f"scale {scale()}", describe_device(), precision().reason, packages)
    )


def versions() -> dict[str, str]:
    """Versions of Python, ftlib and the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("ftlib", *_REPORTED_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """Commit of the checkout ftlib runs from, ``-dirty`` if its code has changed.

    ``None`` where ftlib was installed without one, or where git cannot read it.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "ftlib", "kernels")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("-dirty" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    """Output of a git command; read-only, so it takes no lock another git may hold."""
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.strip()


def reset_peak_memory() -> None:
    """Start a new peak-memory measurement on the GPU (the CPU's cannot be reset)."""
    import torch

    on = device()
    if on.type == "cuda":
        torch.cuda.init()  # there are no statistics to reset before this
        torch.cuda.reset_peak_memory_stats(on)


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process."""
    import torch

    on = device()
    if on.type == "cuda":
        return torch.cuda.max_memory_allocated(on)
    return _peak_resident()


def _peak_resident() -> int:
    """Peak resident memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where `ru_maxrss` begins with the parent's peak
        lines = status.read_text("utf-8").splitlines()
        peak = next(line for line in lines if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quiet() -> bool:
    """Whether progress bars stay off: under CI, or where ``TQDM_DISABLE`` is set."""
    return any(
        os.environ.get(name, "").lower() not in ("", "0", "false")
        for name in ("CI", "TQDM_DISABLE")
    )


def progress(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """Return a tqdm bar (with its time estimate) that is silent when :func:`quiet`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a notebook without ipywidgets gets text
        from tqdm.auto import tqdm

    return tqdm(iterable, disable=quiet(), **{"dynamic_ncols": True, **options})
