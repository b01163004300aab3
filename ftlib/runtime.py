"""Where and how the code runs: scale, device, dtype, seeds, one-line report.

Every decision that depends on the machine is taken here and nowhere else.
Torch is imported inside the functions, so that importing this module is free.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
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


class Precision(NamedTuple):
    """A dtype together with the reason it was chosen."""

    dtype: torch.dtype
    reason: str


def scale(explicit: str | None = None) -> Scale:
    """Return the scale to run at.

    The order is the argument, then ``FTLIB_SCALE``, then ``gpu`` where CUDA is
    available and ``cpu`` where it is not.

    Raises:
        ValueError: the name is not one of ``cpu``, ``gpu``, ``paper``.
    """
    name = explicit or os.environ.get("FTLIB_SCALE")
    if not name:
        return "gpu" if device().type == "cuda" else "cpu"
    if name not in SCALES:
        source = "the argument" if explicit else "FTLIB_SCALE"
        raise ValueError(
            f"unknown scale {name!r} (from {source}): choose one of {', '.join(SCALES)}"
        )
    return name


def device() -> torch.device:
    """Return ``FTLIB_DEVICE`` if it is set, else CUDA if there is any, else the CPU."""
    import torch

    default = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(os.environ.get("FTLIB_DEVICE") or default)


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
    """Whether Triton kernels are used on a device: CUDA at capability 8.0 and up."""
    import torch

    on = on or device()
    return on.type == "cuda" and torch.cuda.get_device_capability(on) >= AMPERE


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
    import torch

    on = device()
    if on.type == "cuda":
        properties = torch.cuda.get_device_properties(on)
        where = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        where = f"{on.type}, {os.cpu_count()} cores"
    packages = ", ".join(f"{name} {v}" for name, v in versions().items())
    return f"scale {scale()} | {where} | {precision(on).reason} | {packages}"


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

    ``None`` where ftlib was installed without one.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        return None
    status = subprocess.run(
        [*git, "status", "--porcelain", "--", "ftlib", "kernels"],
        capture_output=True,
        text=True,
    )
    return head.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def reset_peak_memory() -> None:
    """Start a new peak-memory measurement on the GPU (the CPU's cannot be reset)."""
    import torch

    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int:
    """Peak memory in bytes: allocated on the GPU, or resident in this process."""
    import torch

    if device().type == "cuda":
        return torch.cuda.max_memory_allocated()
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
    from tqdm.auto import tqdm

    return tqdm(iterable, disable=quiet(), **{"dynamic_ncols": True, **options})
