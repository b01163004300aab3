"""Triton kernels of the vocabulary head: the sums over a row of logits.

A row of logits z is needed only through a few sums over the vocabulary. They are
folded in block by block, so the row may come from a stored tile (``row_moments``) or
from the accumulator of a matmul that never stores it (``fused_moments``). With
m = max z, s = Σ exp(z − m) and u = log p = (z − m) − log s, every gradient is a
polynomial in u and p, which ``row_gradient_`` writes over the tile.

``ftlib.ops.rows`` holds the PyTorch twins. Everything is summed in float32. The host
functions take tensors on a CUDA device, or on the CPU where Triton interprets its
kernels (``TRITON_INTERPRET=1``), which computes no bfloat16.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from ftlib.kernels.types import (
    SMALLEST_COMPLEMENT,
    Logits,
    MomentFlags,
    Moments,
    Sced,
)
from torch import Tensor

_INTERPRETED: bool = triton.knobs.runtime.interpret

# Every loop's bound is a constexpr: the interpreter of Triton 3.6 cannot run a range()
# with a bound known only at run time under numpy 2.4. V and D are constants of a model.

# exp(−1e4) is 0 in float32, and so is 0 · (−1e4). Held above this, the −inf of a padded
# column or of a maximum over nothing needs no case of its own.
_FLOOR = tl.constexpr(-1.0e4)

_SMALLEST_COMPLEMENT = tl.constexpr(SMALLEST_COMPLEMENT)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)


# --- parts that the kernels share --------------------------------------------------


@triton.jit
def _logits(products: tl.tensor, scale: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Turn products x·w into float32 logits; ``softcap`` may be None.

    Scalars are cast because ``torch.compile`` passes Python floats as float64. tanh x
    is 2σ(2x) − 1 because libdevice does not run interpreted.
    """
    z = products.to(tl.float32) * tl.cast(scale, tl.float32)
    if softcap is not None:
        cap = tl.cast(softcap, tl.float32)
        z = cap * (2 * tl.sigmoid(z * (2 / cap)) - 1)
    return z


@triton.jit
def _slope(z: tl.tensor, scale: tl.tensor, softcap: tl.tensor) -> tl.tensor:
    """Return dz / d(x·w) at logits z."""
    slope = tl.cast(scale, tl.float32)
    if softcap is not None:
        ratio = z / tl.cast(softcap, tl.float32)
        slope = slope * (1 - ratio * ratio)
    return slope


@triton.jit
def _log_probabilities(
    z: tl.tensor, maximum: tl.tensor, log_sum: tl.tensor
) -> tl.tensor:
    """Return u = (z − m) − log s, in this order: exact for logits far from zero."""
    return tl.maximum(z - maximum, _FLOOR, tl.PropagateNan.ALL) - log_sum


@triton.jit
def _no_moments(ROWS: tl.constexpr) -> tl.tuple:
    """Return the moments of rows without columns, in the order of ``Moments``."""
    zero = tl.zeros([ROWS], tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, tl.zeros([ROWS], tl.int32)


@triton.jit
def _fold(
    moments: tl.tuple,
    z: tl.tensor,
    columns: tl.tensor,
    V: tl.constexpr,
    outputs: tl.tuple,
) -> tl.tuple:
    """Fold a block of logits into running moments.

    When the maximum moves by d = m − m' ≤ 0 the sums move with it: s ← eᵈs,
    t ← eᵈ(t + ds), t2 ← eᵈ(t2 + 2dt + d²s), Σe² ← e²ᵈΣe².

    Args:
        moments: seven tensors [ROWS].
        z: logits [ROWS, COLUMNS], 0 beyond V.
        columns: which columns of the vocabulary they are, [COLUMNS], increasing.
        V: the size of the vocabulary.
        outputs: where each moment will go. One that goes nowhere is not computed.
    """
    maximum, sum_exp, first, second, squares, total, argmax = moments
    _, _, _, second_ptr, squares_ptr, total_ptr, argmax_ptr = outputs
    if total_ptr is not None:
        total += tl.sum(z, 1)
    z = tl.where(columns[None, :] < V, z, float("-inf"))
    block_maximum = tl.max(z, 1)
    if argmax_ptr is not None:
        at_maximum = tl.where(z == block_maximum[:, None], columns[None, :], V)
        argmax = tl.where(block_maximum > maximum, tl.min(at_maximum, 1), argmax)
    moved = tl.maximum(maximum, block_maximum)
    d = tl.maximum(maximum - moved, _FLOOR)
    factor = tl.exp(d)
    # A plain maximum would turn a NaN into the floor, and hide it.
    shifted = tl.maximum(z - moved[:, None], _FLOOR, tl.PropagateNan.ALL)
    e = tl.exp(shifted)
    weighted = e * shifted
    if second_ptr is not None:
        second = factor * (second + d * (2 * first + d * sum_exp))
        second += tl.sum(weighted * shifted, 1)
    if squares_ptr is not None:
        squares = factor * factor * squares + tl.sum(e * e, 1)
    first = factor * (first + d * sum_exp) + tl.sum(weighted, 1)
    sum_exp = factor * sum_exp + tl.sum(e, 1)
    return moved, sum_exp, first, second, squares, total, argmax


@triton.jit
def _store_moments(
    outputs: tl.tuple,
    moments: tl.tuple,
    offsets: tl.tensor,
    mask: tl.tensor,
) -> None:
    for i in tl.static_range(7):
        if outputs[i] is not None:
            tl.store(outputs[i] + offsets, moments[i], mask)


@triton.jit
def _power(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return x^y for x ≥ 0, and 0⁰ = 1."""
    return tl.exp(y * tl.log(tl.maximum(x, _SMALLEST_NORMAL)))


@triton.jit
def _complement(u: tl.tensor) -> tl.tensor:
    """Return 1 − exp(u) with all its digits: near 0 by the series of −expm1(u)."""
    series = 1.0
    for k in tl.static_range(7, 1, -1):
        series = 1 + u * (1.0 / k) * series
    return tl.where(u > -0.35, -u * series, 1 - tl.exp(u))


@triton.jit
def _sced(
    u: tl.tensor, log_columns: tl.tensor, alpha: tl.tensor, beta: tl.tensor
) -> tl.tuple:
    """Return f(p) and f'(p), with f(p) = |p log(pV)|^α (1−p)^β, at u = log p."""
    alpha = tl.cast(alpha, tl.float32)
    beta = tl.cast(beta, tl.float32)
    L = u + tl.cast(log_columns, tl.float32)
    sign = tl.where(L > 0, 1.0, tl.where(L < 0, -1.0, 0.0))
    a = tl.exp(u) * tl.abs(L)
    complement = _complement(u)
    power = _power(a, alpha - 1)
    kept = _power(complement, beta)
    divided = _power(tl.maximum(complement, _SMALLEST_COMPLEMENT), beta - 1)
    slope = power * (alpha * sign * (L + 1) * kept - beta * a * divided)
    return power * a * kept, slope


# --- moments of stored products ----------------------------------------------------


@triton.jit
def _row_moments_kernel(
    tile_ptr: tl.tensor,
    tile_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    maximum_ptr: tl.tensor,
    sum_exp_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    total_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take the moments of one row, block by block."""
    outputs = (
        maximum_ptr,
        sum_exp_ptr,
        first_ptr,
        second_ptr,
        squares_ptr,
        total_ptr,
        argmax_ptr,
    )
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    moments = _no_moments(1)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        pointers = tile_ptr + row[:, None] * tile_stride + columns[None, :]
        products = tl.load(pointers, columns[None, :] < V, other=0.0)
        z = _logits(products, scale, softcap)
        moments = _fold(moments, z, columns, V, outputs)
    _store_moments(outputs, moments, row, None)


# --- moments in the epilogue of a matmul -------------------------------------------


@triton.jit
def _product(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    weight_stride: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    N: tl.tensor,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Return the float32 products [rows, columns], 0 beyond N and V."""
    product = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    hidden_rows = hidden_ptr + rows.to(tl.int64)[:, None] * hidden_stride
    weight_rows = weight_ptr + columns.to(tl.int64)[:, None] * weight_stride
    for start in range(0, D, BLOCK_D):
        depth = start + tl.arange(0, BLOCK_D)[None, :]
        inside = depth < D
        x = tl.load(hidden_rows + depth, (rows[:, None] < N) & inside, other=0.0)
        w = tl.load(weight_rows + depth, (columns[:, None] < V) & inside, other=0.0)
        product = tl.dot(x, w.T, product, input_precision="ieee")
    return product


@triton.jit
def _halves(x: tl.tensor) -> tl.tuple:
    """Split [ROWS, COLUMNS] into its left and its right columns, in registers."""
    return x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _fused_moments_kernel(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    weight_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    maximum_ptr: tl.tensor,
    sum_exp_ptr: tl.tensor,
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    squares_ptr: tl.tensor,
    total_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    N: tl.tensor,
    V: tl.constexpr,
    D: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Take the moments of a block of rows over one split of the vocabulary.

    Programs that follow one another take the same split of different rows, so that
    they find its weights in the L2 cache.
    """
    outputs = (
        maximum_ptr,
        sum_exp_ptr,
        first_ptr,
        second_ptr,
        squares_ptr,
        total_ptr,
        argmax_ptr,
    )
    row_blocks = tl.cdiv(N, BLOCK_N)
    split = tl.program_id(0) // row_blocks
    rows = tl.program_id(0) % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    HALF: tl.constexpr = BLOCK_V // 2
    moments = _no_moments(BLOCK_N)
    for tile in range(TILES):
        start = (split * TILES + tile) * BLOCK_V
        product = _product(
            hidden_ptr,
            hidden_stride,
            weight_ptr,
            weight_stride,
            rows,
            start + tl.arange(0, BLOCK_V),
            N,
            V,
            D,
            BLOCK_D,
        )
        # Folded whole, the widest tile and its exponentials do not fit the registers.
        halves = _halves(product)
        for i in tl.static_range(2):
            z = _logits(halves[i], scale, softcap)
            columns = start + i * HALF + tl.arange(0, HALF)
            moments = _fold(moments, z, columns, V, outputs)
    _store_moments(outputs, moments, split.to(tl.int64) * N + rows, rows < N)


@triton.jit
def _target_logits_kernel(
    hidden_ptr: tl.tensor,
    hidden_stride: tl.tensor,
    weight_ptr: tl.tensor,
    weight_stride: tl.tensor,
    targets_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    output_ptr: tl.tensor,
    V: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take the logit of one row's target; NaN if that is no column."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    width = tl.where(known, D, 0)
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK):
        depth = start + tl.arange(0, BLOCK)
        inside = depth < width
        x = tl.load(hidden_ptr + row * hidden_stride + depth, inside, other=0.0)
        w = tl.load(weight_ptr + target * weight_stride + depth, inside, other=0.0)
        products += x.to(tl.float32) * w.to(tl.float32)
    z = _logits(tl.sum(products, 0), scale, softcap)
    tl.store(output_ptr + row, tl.where(known, z, float("nan")))


# --- gradients -----------------------------------------------------------------------


@triton.jit
def _row_gradient_kernel(
    tile_ptr: tl.tensor,
    tile_stride: tl.tensor,
    maximum_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    coefficients_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    sced_weight_ptr: tl.tensor,
    mean_slope_ptr: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    log_columns: tl.tensor,
    N: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Overwrite one block of one row of products with the gradient by them."""
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // BLOCKS).to(tl.int64)
    columns = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    pointers = tile_ptr + row * tile_stride + columns
    products = tl.load(pointers, columns < V, other=float("-inf"))
    z = _logits(products, scale, softcap)
    u = _log_probabilities(z, tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row))
    p = tl.exp(u)
    A = tl.load(coefficients_ptr + row)
    B = tl.load(coefficients_ptr + N + row)
    C = tl.load(coefficients_ptr + 2 * N + row)
    E = tl.load(coefficients_ptr + 3 * N + row)
    F = tl.load(coefficients_ptr + 4 * N + row)
    gradient = p * (A + u * (B + u * E) + C * p) + F
    if sced_weight_ptr is not None:
        _, slope = _sced(u, log_columns, alpha, beta)
        weight = tl.load(sced_weight_ptr + row)
        gradient += weight * p * (slope - tl.load(mean_slope_ptr + row))
    tl.store(pointers, gradient * _slope(z, scale, softcap), columns < V)


@triton.jit
def _row_sced_kernel(
    tile_ptr: tl.tensor,
    tile_stride: tl.tensor,
    maximum_ptr: tl.tensor,
    log_sum_ptr: tl.tensor,
    argmax_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    log_columns: tl.tensor,
    value_ptr: tl.tensor,
    rest_ptr: tl.tensor,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum f(p) over one row, and p·f'(p) over all of it but its argmax."""
    row = tl.program_id(0).to(tl.int64)
    maximum, log_sum = tl.load(maximum_ptr + row), tl.load(log_sum_ptr + row)
    argmax = tl.load(argmax_ptr + row)
    value = tl.zeros([BLOCK], tl.float32)
    rest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        pointers = tile_ptr + row * tile_stride + columns
        z = _logits(tl.load(pointers, columns < V, other=0.0), scale, softcap)
        z = tl.where(columns < V, z, float("-inf"))
        u = _log_probabilities(z, maximum, log_sum)
        f, slope = _sced(u, log_columns, alpha, beta)
        value += f
        rest += tl.where(columns == argmax, 0.0, tl.exp(u) * slope)
    tl.store(value_ptr + row, tl.sum(value, 0))
    tl.store(rest_ptr + row, tl.sum(rest, 0))


# --- how the kernels are launched ----------------------------------------------------


class FusedConfig(NamedTuple):
    """The tile that one program of the fused matmul works on.

    Attributes:
        rows: of hidden states.
        columns: of the vocabulary.
        depth: of the hidden size, per step.
        warps: per program.
        stages: of the pipeline that loads ahead.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# By compute capability (major) and bytes per element. With every moment asked for, none
# of them spills a register; of 16-bit numbers, tiles twice as large do.
FUSED_CONFIGS = {
    (8, 2): FusedConfig(128, 128, 32, warps=8, stages=4),
    (9, 2): FusedConfig(128, 256, 64, warps=8, stages=3),
    (8, 4): FusedConfig(64, 64, 16, warps=8, stages=3),
}
_INTERPRETED_CONFIG = FusedConfig(32, 128, 32, warps=1, stages=1)

# Columns of a row that a program has in registers at a time: fewer where SCED's powers
# are taken of them too.
ROW_BLOCK = 4096
SCED_BLOCK = 2048
ROW_WARPS = 8

# Partial moments of one row over one split take up to 32 bytes.
_PARTIAL_BYTES = 32
_MAX_PARTIALS_BYTES = 8 * 2**20

# Programs that the interpreter, which has no processors, is split for.
_INTERPRETED_PROCESSORS = 4


def fused_config(capability: int, itemsize: int) -> FusedConfig:
    """Return the tile of the fused matmul.

    Args:
        capability: the device's major compute capability.
        itemsize: bytes per element of hidden and weight.
    """
    return FUSED_CONFIGS.get((capability, itemsize), FUSED_CONFIGS[8, itemsize])


def tiles_per_split(rows: int, row_blocks: int, tiles: int, processors: int) -> int:
    """Return how many tiles of the vocabulary one program should take.

    The programs run in rounds of one per processor. Of the numbers of splits that just
    fill up to 16 rounds, with partial moments below 8 MiB, it takes the one whose last
    round ends first; of equals, the smallest.

    Args:
        rows: N.
        row_blocks: programs that one split takes.
        tiles: that the vocabulary consists of.
        processors: programs that run at the same time.
    """
    most = min(tiles, (_MAX_PARTIALS_BYTES - 1) // (_PARTIAL_BYTES * max(rows, 1)))

    def finish(splits: int) -> tuple[int, int]:
        rounds = triton.cdiv(row_blocks * splits, processors)
        return rounds * triton.cdiv(tiles, splits), splits

    filling = (n * processors // max(row_blocks, 1) for n in range(1, 17))
    splits = min((max(1, min(most, splits)) for splits in filling), key=finish)
    return triton.cdiv(tiles, splits)


def _check(**tensors: Tensor) -> None:
    """Refuse what the kernels cannot compute with."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name} is {tensor.dtype}; the kernels take float32, float16 or "
                "bfloat16 and sum in float32. Use backend='torch'"
            )
        if tensor.ndim != 2:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not (rows, …)")
        if _INTERPRETED and tensor.dtype == torch.bfloat16:
            raise TypeError(
                f"{name} is bfloat16, which Triton's interpreter computes wrongly; "
                "use float32 or float16 with TRITON_INTERPRET=1"
            )
        if not (tensor.is_cuda or _INTERPRETED):
            raise ValueError(
                f"{name} is on {tensor.device}; the kernels need a CUDA device. Use "
                "backend='torch', or set TRITON_INTERPRET=1 before the start"
            )


def _check_tile(tile: Tensor) -> None:
    _check(tile=tile)
    if tile.stride(1) != 1:
        raise ValueError(
            f"tile has strides {tile.stride()}; the columns of a row must be "
            "contiguous (the row stride is free)"
        )


def _check_head(hidden: Tensor, weight: Tensor) -> None:
    _check(hidden=hidden, weight=weight)
    if hidden.shape[1] != weight.shape[1] or hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} {hidden.dtype} and weight "
            f"{tuple(weight.shape)} {weight.dtype} must agree in size and dtype"
        )


def _per_row(
    name: str, values: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Return values as the kernels index them, or say why they cannot."""
    if values.shape != shape or values.dtype != dtype:
        raise ValueError(
            f"{name} is {tuple(values.shape)} {values.dtype}, not {shape} {dtype}"
        )
    return values.contiguous()


def _with_unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _empty_moments(
    shape: tuple[int, ...], flags: MomentFlags, device: torch.device
) -> Moments:
    def empty(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=device) if wanted else None

    maximum, sum_exp, first = torch.empty((3, *shape), device=device)
    return Moments(
        maximum,
        sum_exp,
        first,
        empty(flags.second),
        empty(flags.squares),
        empty(flags.total),
        empty(flags.argmax, torch.int64),
    )


def _block(columns: int, most: int) -> int:
    return min(most, triton.next_power_of_2(columns))


# --- host functions ------------------------------------------------------------------


def row_moments(tile: Tensor, transform: Logits, flags: MomentFlags) -> Moments:
    """Sum over each row of a tile.

    Args:
        tile: products x·w, shape (N, V), float32, float16 or bfloat16. Rows may be
            strided, columns are contiguous.
        transform: how they become logits.
        flags: the optional moments that are wanted.

    Returns:
        Moments of shape (N,).

    Raises:
        TypeError: for a dtype that the kernels, or the interpreter, cannot compute.
        ValueError: for a tensor in the wrong place or layout.
    """
    _check_tile(tile)
    N, V = tile.shape
    moments = _empty_moments((N,), flags, tile.device)
    with torch.cuda.device_of(tile):
        _row_moments_kernel[(N,)](
            tile,
            tile.stride(0),
            *transform,
            *moments,
            V=V,
            BLOCK=_block(V, ROW_BLOCK),
            num_warps=ROW_WARPS,
        )
    return moments


def fused_moments(
    hidden: Tensor, weight: Tensor, transform: Logits, flags: MomentFlags
) -> Moments:
    """Sum over each row of ``hidden @ weight.T`` without storing the product.

    The vocabulary is taken in S splits, whose moments
    :func:`ftlib.ops.rows.merge_moments` merges. S follows from the device: as many as
    keep it busy, with partial moments below 8 MiB for up to 262,143 rows.

    Args:
        hidden: shape (N, D), float32, float16 or bfloat16.
        weight: shape (V, D), same dtype.
        transform: how products become logits.
        flags: the optional moments that are wanted.

    Returns:
        Moments of shape (S, N), the splits in the order of the vocabulary; the argmax
        counts from the start of the whole vocabulary.

    Raises:
        TypeError: for a dtype that the kernels, or the interpreter, cannot compute.
        ValueError: for tensors in the wrong place or of sizes that do not agree.
    """
    _check_head(hidden, weight)
    hidden, weight = _with_unit_stride(hidden), _with_unit_stride(weight)
    (N, D), V = hidden.shape, weight.shape[0]
    config, processors = _INTERPRETED_CONFIG, _INTERPRETED_PROCESSORS
    if not _INTERPRETED:
        device = torch.cuda.get_device_properties(hidden.device)
        config = fused_config(device.major, hidden.element_size())
        processors = device.multi_processor_count
    row_blocks, tiles = triton.cdiv(N, config.rows), triton.cdiv(V, config.columns)
    per_split = tiles_per_split(N, row_blocks, tiles, processors)
    splits = triton.cdiv(tiles, per_split)
    moments = _empty_moments((splits, N), flags, hidden.device)
    with torch.cuda.device_of(hidden):
        _fused_moments_kernel[(row_blocks * splits,)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            *transform,
            *moments,
            N,
            V=V,
            D=D,
            TILES=per_split,
            BLOCK_N=config.rows,
            BLOCK_V=config.columns,
            BLOCK_D=config.depth,
            num_warps=config.warps,
            num_stages=config.stages,
        )
    return moments


def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, transform: Logits
) -> Tensor:
    """Return the logit of each row's target, float32, shape (N,).

    Args:
        hidden: shape (N, D), float32, float16 or bfloat16.
        weight: shape (V, D), same dtype.
        targets: shape (N,), int64. One outside [0, V) gives NaN: to raise, the host
            would have to wait for the device.
        transform: how products become logits.

    Raises:
        TypeError: for a dtype that the kernels, or the interpreter, cannot compute.
        ValueError: for tensors in the wrong place or of sizes that do not agree.
    """
    _check_head(hidden, weight)
    hidden, weight = _with_unit_stride(hidden), _with_unit_stride(weight)
    N, D = hidden.shape
    output = torch.empty(N, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _target_logits_kernel[(N,)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            _per_row("targets", targets, (N,), torch.int64),
            *transform,
            output,
            V=weight.shape[0],
            D=D,
            BLOCK=_block(D, ROW_BLOCK),
            num_warps=ROW_WARPS,
        )
    return output


def row_gradient_(
    tile: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    coefficients: Tensor,
    transform: Logits,
    sced: Sced | None = None,
) -> None:
    """Overwrite a tile of products x·w with a gradient with respect to them.

    With u = log p, every column gets ``p(A + Bu + Cp + Eu²) + F``, and with SCED also
    ``λp(f'(p) − R)``; then the slope of the logit transform.

    Args:
        tile: products, shape (N, V), float32, float16 or bfloat16. Rows may be
            strided, columns are contiguous.
        maximum: m of each row, shape (N,), float32.
        log_sum: log Σ exp(z − m), shape (N,), float32.
        coefficients: A, B, C, E, F, shape (5, N), float32.
        transform: how products become logits.
        sced: the term of :class:`~ftlib.kernels.types.Sced`, where the loss has one.

    Raises:
        TypeError: for a dtype that the kernels, or the interpreter, cannot compute.
        ValueError: for tensors in the wrong place, layout or shape.
    """
    _check_tile(tile)
    N, V = tile.shape
    per_row = ((N,), torch.float32)
    term: tuple[Tensor | None, Tensor | None, float, float] = (None, None, 1.0, 0.0)
    if sced is not None:
        weight = _per_row("sced.weight", sced.weight, *per_row)
        mean_slope = _per_row("sced.mean_slope", sced.mean_slope, *per_row)
        term = (weight, mean_slope, sced.alpha, sced.beta)
    block = _block(V, SCED_BLOCK)
    with torch.cuda.device_of(tile):
        _row_gradient_kernel[(N * triton.cdiv(V, block),)](
            tile,
            tile.stride(0),
            _per_row("maximum", maximum, *per_row),
            _per_row("log_sum", log_sum, *per_row),
            _per_row("coefficients", coefficients, (5, N), torch.float32),
            *transform,
            *term,
            math.log(V),
            N,
            V=V,
            BLOCK=block,
            num_warps=ROW_WARPS,
        )


def row_sced(
    tile: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    argmax: Tensor,
    alpha: float,
    beta: float,
    transform: Logits,
) -> tuple[Tensor, Tensor]:
    """Return Σ f(p) over a row, and Σ p·f'(p) over all of it but the argmax.

    f(p) = |p log(pV)|^α (1−p)^β. For β < 1 the slope at the argmax has no bound as
    p → 1, which is why that column is left to the caller.

    Args:
        tile: products x·w, shape (N, V), float32, float16 or bfloat16. Rows may be
            strided, columns are contiguous.
        maximum: m of each row, shape (N,), float32.
        log_sum: log Σ exp(z − m), shape (N,), float32.
        argmax: the column left out of the second sum, shape (N,), int64.
        alpha: exponent of |p log(pV)|, at least 1.
        beta: exponent of 1 − p, at least 0.
        transform: how products become logits.

    Raises:
        TypeError: for a dtype that the kernels, or the interpreter, cannot compute.
        ValueError: for tensors in the wrong place, layout or shape.
    """
    _check_tile(tile)
    N, V = tile.shape
    value, rest = torch.empty((2, N), device=tile.device)
    with torch.cuda.device_of(tile):
        _row_sced_kernel[(N,)](
            tile,
            tile.stride(0),
            _per_row("maximum", maximum, (N,), torch.float32),
            _per_row("log_sum", log_sum, (N,), torch.float32),
            _per_row("argmax", argmax, (N,), torch.int64),
            *transform,
            alpha,
            beta,
            math.log(V),
            value,
            rest,
            V=V,
            BLOCK=_block(V, SCED_BLOCK),
            num_warps=ROW_WARPS,
        )
    return value, rest
