"""Triton kernels of contextual decomposition: one relevant part, one shared total.

A program takes a block of columns of one row for a group of sources, so that what the
sources share is read and computed once for the group. Programs that follow one another
take the other sources of the same block, whose totals they find in the L2 cache: what
is left to move is the relevant part, read once and written once.

The twins of these functions, in ``ftlib.ops.decomposition``, are the specification, and
say where the formulas come from. Everything is computed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a program's tile, of which each thread holds 32; and its columns, unless
# a whole row is needed.
TILE_ELEMENTS = 4096
ELEMENTS_PER_WARP = 1024
COLUMNS = 1024

# A longer row does not fit in the registers of one program. Only norms need whole rows.
MAX_COLUMNS = 8192

# Whether the kernels below run in the interpreter, which Triton decides on decoration.
INTERPRETED = bool(triton.knobs.runtime.interpret)

_SQRT_HALF = tl.constexpr(math.sqrt(1 / 2))
_DENSITY_AT_0 = tl.constexpr(1 / math.sqrt(2 * math.pi))
_GELU_SCALE = tl.constexpr(math.sqrt(8 / math.pi))
_GELU_CUBIC = tl.constexpr(0.044715)

# Below these a difference is taken by its series, whose next term is then a rounding.
_TANH_SERIES_BELOW = tl.constexpr(0.25)
_NORMAL_SERIES_BELOW = tl.constexpr(0.42)


# --- parts that the kernels share -----------------------------------------------------


@triton.jit
def _place(
    S: tl.tensor, F: tl.tensor, GROUP: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tuple:
    """Return a program's row, sources [GROUP, 1] and columns [1, BLOCK]; int64."""
    groups = tl.cdiv(S, GROUP)
    blocks = tl.cdiv(F, BLOCK)
    program = tl.program_id(0)
    row = program // (groups * blocks)
    block = program // groups % blocks
    sources = program % groups * GROUP + tl.arange(0, GROUP)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    return row.to(tl.int64), sources.to(tl.int64)[:, None], columns[None, :]


@triton.jit
def _load(pointers: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(pointers, inside, other=0.0).to(tl.float32)


@triton.jit
def _relevant_share(relevant: tl.tensor, irrelevant: tl.tensor) -> tl.tensor:
    """Return |β| / (|β| + |γ|), and 0 where both are 0."""
    size = tl.abs(relevant)
    whole = size + tl.abs(irrelevant)
    return size / tl.where(whole == 0, 1.0, whole)


@triton.jit
def _smaller(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.minimum(x, y, tl.PropagateNan.ALL)


@triton.jit
def _larger(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    return tl.maximum(x, y, tl.PropagateNan.ALL)


# --- norm -----------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    relevant_ptr: tl.tensor,
    relevant_source_stride: tl.tensor,
    relevant_stride: tl.tensor,
    total_ptr: tl.tensor,
    total_stride: tl.tensor,
    residual_ptr: tl.tensor,
    residual_source_stride: tl.tensor,
    residual_stride: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    eps: tl.tensor,
    normed_ptr: tl.tensor,
    summed_ptr: tl.tensor,
    output_source_stride: tl.tensor,
    output_stride: tl.tensor,
    S: tl.tensor,
    D: tl.tensor,
    CENTRED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Norm one row of a group of sources; D ≤ BLOCK.

    The residual and the sum, and the bias, may be None.
    """
    row, sources, columns = _place(S, D, GROUP, BLOCK)
    in_row = columns < D
    inside = (sources < S) & in_row
    t = _load(total_ptr + row * total_stride + columns, in_row)
    spread = t
    if CENTRED:
        spread = tl.where(in_row, t - tl.sum(t, 1, keep_dims=True) / D, 0.0)
    variance = tl.sum(spread * spread, 1, keep_dims=True) / D
    scale = _load(weight_ptr + columns, in_row)
    scale *= tl.rsqrt(variance + tl.cast(eps, tl.float32))
    offsets = sources * relevant_source_stride + row * relevant_stride + columns
    beta = _load(relevant_ptr + offsets, inside)
    output = sources * output_source_stride + row * output_stride + columns
    if residual_ptr is not None:
        offsets = sources * residual_source_stride + row * residual_stride + columns
        beta += _load(residual_ptr + offsets, inside)
        tl.store(summed_ptr + output, beta, inside)
    normed = beta
    if CENTRED:
        normed = beta - tl.sum(beta, 1, keep_dims=True) / D
    normed *= scale
    if bias_ptr is not None:
        normed += _load(bias_ptr + columns, in_row) * _relevant_share(beta, t - beta)
    tl.store(normed_ptr + output, normed, inside)


# --- epilogue of a linear layer -------------------------------------------------------


@triton.jit
def _epilogue_kernel(
    relevant_ptr: tl.tensor,
    relevant_source_stride: tl.tensor,
    relevant_stride: tl.tensor,
    total_ptr: tl.tensor,
    total_stride: tl.tensor,
    bias_ptr: tl.tensor,
    S: tl.tensor,
    F: tl.tensor,
    CLEAN_UP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the share of a bias, which may be None, and clamp between 0 and the total."""
    row, sources, columns = _place(S, F, GROUP, BLOCK)
    in_row = columns < F
    inside = (sources < S) & in_row
    t = _load(total_ptr + row * total_stride + columns, in_row)
    offsets = sources * relevant_source_stride + row * relevant_stride + columns
    beta = _load(relevant_ptr + offsets, inside)
    if bias_ptr is not None:
        b = _load(bias_ptr + columns, in_row)
        beta += b * _relevant_share(beta, t - b - beta)
    if CLEAN_UP:
        beta = _smaller(_larger(beta, _smaller(t, 0.0)), _larger(t, 0.0))
    tl.store(relevant_ptr + offsets, beta, inside)


# --- activations ----------------------------------------------------------------------


@triton.jit
def _sigmoid_change(
    t: tl.tensor, beta: tl.tensor, a: tl.tensor, half: tl.tensor
) -> tl.tensor:
    """Return f(t) − f(t − β) for f(t) = t·σ(a), with half = (a(t) − a(t − β))/2."""
    turn = tl.where(a > 0, -1.0, 1.0)
    small = tl.sigmoid(turn * a)
    low = tl.sigmoid(turn * (a - 2 * half))
    x = half * half
    tanh = half * (1 + x * (-1 / 3 + x * (2 / 15 - x * (17 / 315))))
    by_series = tanh * (small + (1 - 2 * small) * low)
    direct = turn * (small - low)
    dropped = tl.where(tl.abs(half) < _TANH_SERIES_BELOW, by_series, direct)
    high = tl.where(a > 0, 1 - small, small)
    return high * beta + (t - beta) * dropped


@triton.jit
def _normal(x: tl.tensor) -> tl.tensor:
    """Return Φ(x)."""
    return 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)


@triton.jit
def _gelu_change(t: tl.tensor, beta: tl.tensor) -> tl.tensor:
    """Return f(t) − f(t − β) for f(t) = t·Φ(t)."""
    held = tl.clamp(t, -40.0, 40.0)
    before = tl.zeros_like(t)
    term = tl.exp(-0.5 * held * held) * _DENSITY_AT_0
    power = beta
    series = term * power
    for k in tl.static_range(1, 8):
        before, term = term, (held * term - (k - 1) / k * before) / (k + 1)
        power *= beta
        series += term * power
    high = _normal(t)
    rest = t - beta
    direct = high - _normal(rest)
    dropped = tl.where(tl.abs(beta) < _NORMAL_SERIES_BELOW, series, direct)
    return high * beta + rest * dropped


@triton.jit
def _change(t: tl.tensor, beta: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """Return f(t) − f(t − β), with an error of a few roundings of β."""
    if ACTIVATION == "relu":
        return _smaller(beta, t) - _smaller(t, 0.0)
    elif ACTIVATION == "silu":
        return _sigmoid_change(t, beta, t, 0.5 * beta)
    elif ACTIVATION == "gelu_tanh":
        # A constexpr stands on the right: interpreted, it takes over a tensor there.
        squared = t * t * _GELU_CUBIC
        quadratic = beta * (beta - 3 * t) * _GELU_CUBIC
        half = (1 + 3 * squared + quadratic) * beta * (_GELU_SCALE / 2)
        return _sigmoid_change(t, beta, t * (1 + squared) * _GELU_SCALE, half)
    else:
        tl.static_assert(ACTIVATION == "gelu")
        return _gelu_change(t, beta)


@triton.jit
def _activation_kernel(
    relevant_ptr: tl.tensor,
    relevant_source_stride: tl.tensor,
    relevant_stride: tl.tensor,
    total_ptr: tl.tensor,
    total_stride: tl.tensor,
    output_ptr: tl.tensor,
    output_source_stride: tl.tensor,
    output_stride: tl.tensor,
    S: tl.tensor,
    F: tl.tensor,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write f(t) − f(t − β)."""
    row, sources, columns = _place(S, F, GROUP, BLOCK)
    in_row = columns < F
    inside = (sources < S) & in_row
    t = _load(total_ptr + row * total_stride + columns, in_row)
    offsets = sources * relevant_source_stride + row * relevant_stride + columns
    beta = _load(relevant_ptr + offsets, inside)
    offsets = sources * output_source_stride + row * output_stride + columns
    tl.store(output_ptr + offsets, _change(t, beta, ACTIVATION), inside)


@triton.jit
def _gate_kernel(
    relevant_gate_ptr: tl.tensor,
    relevant_gate_source_stride: tl.tensor,
    relevant_gate_stride: tl.tensor,
    gate_ptr: tl.tensor,
    gate_stride: tl.tensor,
    relevant_up_ptr: tl.tensor,
    relevant_up_source_stride: tl.tensor,
    relevant_up_stride: tl.tensor,
    up_ptr: tl.tensor,
    up_stride: tl.tensor,
    output_ptr: tl.tensor,
    output_source_stride: tl.tensor,
    output_stride: tl.tensor,
    S: tl.tensor,
    F: tl.tensor,
    ACTIVATION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write f(g)β_u + (f(g) − f(g − β_g))(u − β_u)."""
    row, sources, columns = _place(S, F, GROUP, BLOCK)
    in_row = columns < F
    inside = (sources < S) & in_row
    g = _load(gate_ptr + row * gate_stride + columns, in_row)
    u = _load(up_ptr + row * up_stride + columns, in_row)
    offsets = sources * relevant_gate_source_stride + row * relevant_gate_stride
    beta_g = _load(relevant_gate_ptr + offsets + columns, inside)
    offsets = sources * relevant_up_source_stride + row * relevant_up_stride
    beta_u = _load(relevant_up_ptr + offsets + columns, inside)
    change = _change(g, beta_g, ACTIVATION)
    output = _change(g, g, ACTIVATION) * beta_u + change * (u - beta_u)
    offsets = sources * output_source_stride + row * output_stride + columns
    tl.store(output_ptr + offsets, output, inside)


# --- host functions -------------------------------------------------------------------


def tile(sources: int, columns: int) -> dict[str, int]:
    """Return the group of sources and the block of columns of a program, its warps."""
    block = triton.next_power_of_2(columns)
    group = min(max(TILE_ELEMENTS // block, 1), triton.next_power_of_2(sources))
    warps = min(max(block * group // ELEMENTS_PER_WARP, 1), 32)
    return {"GROUP": group, "BLOCK": block, "num_warps": warps}


def _launch(
    kernel: Any, relevant: Tensor, columns: int, *arguments: Any, **constants: Any
) -> None:
    """Run a kernel over all rows and sources, in blocks of so many columns."""
    S, N, F = relevant.shape
    if relevant.numel() == 0:
        return
    shape = tile(S, columns)
    programs = N * triton.cdiv(F, shape["BLOCK"]) * triton.cdiv(S, shape["GROUP"])
    with torch.cuda.device_of(relevant):
        kernel[(programs,)](*arguments, S, F, **constants, **shape)


def _pointer(tensor: Tensor) -> tuple[Any, ...]:
    """Return a tensor whose columns are contiguous, with its other strides."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    return tensor, *tensor.stride()[:-1]


def _output(relevant: Tensor) -> Tensor:
    return torch.empty_like(relevant, memory_format=torch.contiguous_format)


def norm_rows(
    relevant: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return the relevant part behind a norm, and the sum with the residual.

    Args:
        relevant: β, (S, N, D), D ≤ ``MAX_COLUMNS``; as all tensors here float32,
            bfloat16 or float16, with any strides.
        total: t, (N, D).
        weight: (D,).
        bias: what is split, (D,); None if nothing is.
        eps: ε.
        kind: ``layer`` or ``rms``.
        residual: (S, N, D), or None; then there is no sum.
    """
    normed = _output(relevant)
    summed = None if residual is None else _output(relevant)
    _launch(
        _norm_kernel,
        relevant,
        relevant.shape[-1],
        *_pointer(relevant),
        *_pointer(total),
        *((None, 0, 0) if residual is None else _pointer(residual)),
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        eps,
        normed,
        summed,
        *normed.stride()[:-1],
        CENTRED=kind == "layer",
    )
    return normed, summed


def epilogue_rows_(
    relevant: Tensor, total: Tensor, bias: Tensor | None, clean_up: bool
) -> None:
    """Overwrite Wβ with the relevant part of Wβ + Wγ + b.

    Args:
        relevant: Wβ, (S, N, F), with contiguous columns.
        total: t, (N, F).
        bias: what is split, (F,); None if nothing is.
        clean_up: whether to clamp between 0 and t.
    """
    _launch(
        _epilogue_kernel,
        relevant,
        min(relevant.shape[-1], COLUMNS),
        *_pointer(relevant),
        *_pointer(total),
        None if bias is None else bias.contiguous(),
        CLEAN_UP=clean_up,
    )


def activation_rows(relevant: Tensor, total: Tensor, activation: str) -> Tensor:
    """Return f(t) − f(t − β).

    Args:
        relevant: β, (S, N, F).
        total: t, (N, F).
        activation: ``gelu``, ``gelu_tanh``, ``relu`` or ``silu``.
    """
    output = _output(relevant)
    _launch(
        _activation_kernel,
        relevant,
        min(relevant.shape[-1], COLUMNS),
        *_pointer(relevant),
        *_pointer(total),
        *_pointer(output),
        ACTIVATION=activation,
    )
    return output


def gate_rows(
    relevant_gate: Tensor,
    gate: Tensor,
    relevant_up: Tensor,
    up: Tensor,
    activation: str,
) -> Tensor:
    """Return f(g)u − f(g − β_g)(u − β_u).

    Args:
        relevant_gate: β_g, (S, N, F).
        gate: g, (N, F).
        relevant_up: β_u, (S, N, F).
        up: u, (N, F).
        activation: as in :func:`activation_rows`.
    """
    output = _output(relevant_gate)
    _launch(
        _gate_kernel,
        relevant_gate,
        min(relevant_gate.shape[-1], COLUMNS),
        *_pointer(relevant_gate),
        *_pointer(gate),
        *_pointer(relevant_up),
        *_pointer(up),
        *_pointer(output),
        ACTIVATION=activation,
    )
    return output
