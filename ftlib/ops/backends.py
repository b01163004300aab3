"""Whether an operation runs its Triton kernels or their PyTorch twin."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from ftlib.runtime import triton_supported

Backend = Literal["torch", "triton"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)


def check_backend(backend: str | None) -> None:
    """Refuse a back end that there is not.

    Raises:
        ValueError: the message lists those there are.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose from {', '.join(BACKENDS)}")


def common_device(tensors: Sequence[Tensor]) -> torch.device:
    """Return the device of all tensors.

    Raises:
        ValueError: they are on several.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"the tensors are on {names}: move them to one device")
    return devices.pop()


def kernels_of(
    operation: str, backend: str | None, tensors: Sequence[Tensor], columns: int = 0
) -> ModuleType | None:
    """Return the module of an operation's kernels, or None for the twin.

    Args:
        operation: its module's name in ``ftlib.kernels``.
        backend: what was asked for; without it, what the device and the tensors allow.
        tensors: what the kernels are to work on, one or more.
        columns: those of a row that a program has to hold, where it holds one.

    Raises:
        ValueError: the kernels were asked for and cannot take the tensors, or these
            are on several devices.
    """
    device = common_device(tensors)
    if backend == "torch" or not (backend or triton_supported(device)):
        return None
    kernels = importlib.import_module(f"ftlib.kernels.{operation}")
    dtypes = {tensor.dtype for tensor in tensors}
    obstacle = _obstacle(kernels, dtypes, device, columns)
    if obstacle and backend:
        raise ValueError(f"backend='triton' cannot take {obstacle}")
    return None if obstacle else kernels


def _obstacle(
    kernels: ModuleType, dtypes: set[torch.dtype], device: torch.device, columns: int
) -> str | None:
    """Say what keeps the kernels from the tensors, and what to do about it."""
    if torch.float64 in dtypes:
        return "float64: cast the tensors to float32, or use backend='torch'"
    if columns and columns > kernels.MAX_COLUMNS:
        return (
            f"rows of {columns} columns, only up to {kernels.MAX_COLUMNS}: use "
            "backend='torch'"
        )
    if kernels.INTERPRETED and torch.bfloat16 in dtypes:
        return (
            "bfloat16 under TRITON_INTERPRET=1, whose bfloat16 arithmetic is wrong: "
            "cast the tensors to float32, or use backend='torch'"
        )
    if not (kernels.INTERPRETED or device.type == "cuda"):
        return (
            f"tensors on {device}: move them to a GPU, set TRITON_INTERPRET=1 before "
            "Triton is imported, or use backend='torch'"
        )
    return None
