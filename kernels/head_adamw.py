"""A Triton kernel for AdamW over slices of many parameters, in one launch.

The slices are cut into tiles of ``BLOCK`` elements, a program each. A table on the
device, made once, says where a tile lies in its parameter and where its moments are.
Where the parameters and their gradients are, and how far each one's step goes, is
uploaded at every step: 24 bytes for each parameter.

The twin of this step, in ``ftlib.ops.head_adamw``, is the specification.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

# Whether the kernel below runs in the interpreter, which Triton decides on decoration.
INTERPRETED = bool(triton.knobs.runtime.interpret)

# Elements of a tile, at eight for each thread.
BLOCK = 1024
WARPS = 4

# Neighbours in a row that are read and written together, if all of them lie so that it
# is allowed: 16 bytes of each moment.
VECTOR = 4

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}

# What a table holds of a tile, and an upload of a parameter, in int64.
_TILE_FIELDS = tl.constexpr(8)
_PARAMETER_FIELDS = tl.constexpr(3)


@triton.jit
def _pointers(
    address: tl.tensor,
    offsets: tl.tensor,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Point at elements. What is known of an address is lost when it becomes one."""
    BYTES: tl.constexpr = WIDTH * ELEMENT.primitive_bitwidth // 8
    pointers = address.to(tl.pointer_type(ELEMENT)) + offsets
    return tl.multiple_of(pointers, [1, BYTES])


@triton.jit
def adamw_kernel(
    tiles_ptr: tl.tensor,
    parameters_ptr: tl.tensor,
    rates_ptr: tl.tensor,
    exp_avg_ptr: tl.tensor,
    exp_avg_sq_ptr: tl.tensor,
    decay: tl.tensor,
    gain: tl.tensor,
    beta_sq: tl.tensor,
    gain_sq: tl.tensor,
    eps: tl.tensor,
    ELEMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Take the step of one tile, ``WIDTH`` neighbours in a row at a time."""
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * _TILE_FIELDS
    parameter = tl.load(tile_ptr)
    start = tl.load(tile_ptr + 1)
    row_stride = tl.load(tile_ptr + 2)
    column_stride = tl.load(tile_ptr + 3)
    columns = tl.load(tile_ptr + 4).to(tl.int32)
    first = tl.load(tile_ptr + 5).to(tl.int32)
    count = tl.load(tile_ptr + 6).to(tl.int32)
    state = tl.load(tile_ptr + 7)
    weight_address = tl.load(parameters_ptr + parameter * _PARAMETER_FIELDS)
    grad_address = tl.load(parameters_ptr + parameter * _PARAMETER_FIELDS + 1)
    # The third field, read as two floats.
    rates_ptr += parameter * (2 * _PARAMETER_FIELDS) + 4
    step_size, root = tl.load(rates_ptr), tl.load(rates_ptr + 1)

    groups = tl.arange(0, BLOCK // WIDTH) * WIDTH
    lanes = tl.arange(0, WIDTH)[None, :]
    # A parameter without a gradient is left as it is.
    valid = (groups < tl.where(grad_address != 0, count, 0))[:, None]
    column = first + groups
    inside = column // columns * row_stride + column % columns * column_stride
    offsets = tl.multiple_of(start + inside, WIDTH)[:, None] + lanes
    moments = tl.multiple_of(state + groups, WIDTH)[:, None] + lanes

    weights_ptr = _pointers(weight_address, offsets, ELEMENT, WIDTH)
    grads_ptr = _pointers(grad_address, offsets, ELEMENT, WIDTH)
    weights = tl.load(weights_ptr, valid, other=0.0).to(tl.float32)
    g = tl.load(grads_ptr, valid, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + moments, valid, other=0.0)
    v = tl.load(exp_avg_sq_ptr + moments, valid, other=0.0)
    m += gain * (g - m)
    v = beta_sq * v + gain_sq * g * g
    moved = tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
    tl.store(weights_ptr, decay * weights - moved, valid)
    tl.store(exp_avg_ptr + moments, m, valid)
    tl.store(exp_avg_sq_ptr + moments, v, valid)


# --- host functions ---------------------------------------------------------------


class Piece(NamedTuple):
    """A slice of a parameter, and where its moments begin.

    Attributes:
        parameter: the number of the parameter.
        weights: a view of it, 1-D or 2-D.
        offset: elements of storage from the parameter's first to the view's.
        state: elements of the moments that come before the slice's.
    """

    parameter: int
    weights: Tensor
    offset: int
    state: int


class Table(NamedTuple):
    """The tiles of all pieces of one dtype.

    Attributes:
        tiles: (tiles, 8), int64, on the device.
        element: the dtype of weights and gradients.
        in_vectors: whether the tiles fall into whole groups of ``VECTOR`` neighbours.
    """

    tiles: Tensor
    element: torch.dtype
    in_vectors: bool


def make_tables(pieces: Iterable[Piece], device: torch.device) -> list[Table]:
    """Cut pieces into tiles; return a table for each dtype."""
    tiles: dict[torch.dtype, list[np.ndarray]] = {}
    for piece in pieces:
        tiles.setdefault(piece.weights.dtype, []).append(_tiles(piece))
    return [
        _table(np.concatenate(some), dtype, device) for dtype, some in tiles.items()
    ]


def _tiles(piece: Piece) -> np.ndarray:
    """Return the fields of a piece's tiles, in the order in which the kernel reads."""
    rows, columns = (1, *piece.weights.shape)[-2:]
    row_stride, column_stride = (0, *piece.weights.stride())[-2:]
    first = np.arange(0, rows * columns, BLOCK, dtype=np.int64)
    row, column = np.divmod(first, columns)
    fields = (
        piece.parameter,
        piece.offset + row * row_stride,
        row_stride,
        column_stride,
        columns,
        column,
        np.minimum(rows * columns - first, BLOCK),
        piece.state + first,
    )
    return np.stack(np.broadcast_arrays(*fields), axis=1)


def _table(tiles: np.ndarray, element: torch.dtype, device: torch.device) -> Table:
    _, start, row_stride, column_stride, columns, _, _, state = tiles.T
    whole = np.stack((start, row_stride, columns, state)) % VECTOR == 0
    in_vectors = bool(whole.all() and (column_stride == 1).all())
    return Table(torch.from_numpy(tiles).to(device), element, in_vectors)


def adamw_(
    tables: Iterable[Table],
    weights: Sequence[int],
    grads: Sequence[int],
    rates: np.ndarray,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take a step in place: one launch for each dtype.

    Args:
        tables: of :func:`make_tables`.
        weights: the address of each parameter.
        grads: the address of each gradient, laid out as its parameter; 0 for none.
        rates: (parameters, 2), lr / (1 − β₁ᵗ) and √(1 − β₂ᵗ) of each.
        exp_avg: first moments of all slices, 1-D, float32, on the tables' device.
        exp_avg_sq: likewise the second moments.
        decay: 1 − lr · weight decay.
        betas: β₁ and β₂.
        eps: added to the denominator.
    """
    device = exp_avg.device
    fields, is_aligned = _fields(weights, grads, rates, pinned=exp_avg.is_cuda)
    parameters = fields.to(device, non_blocking=True)
    with torch.cuda.device_of(exp_avg):
        for table in tables:
            adamw_kernel[(len(table.tiles),)](
                table.tiles,
                parameters,
                parameters.view(torch.float32),
                exp_avg,
                exp_avg_sq,
                decay,
                1 - betas[0],
                betas[1],
                1 - betas[1],
                eps,
                ELEMENT=ELEMENTS[table.element],
                WIDTH=VECTOR if table.in_vectors and is_aligned else 1,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )


def _fields(
    weights: Sequence[int],
    grads: Sequence[int],
    rates: np.ndarray,
    *,
    pinned: bool,
) -> tuple[Tensor, bool]:
    """Return what is uploaded of the parameters, and whether vectors may be read there.

    The memory is new at each step: PyTorch keeps it until its copy has been made.
    """
    parameters = torch.empty((len(weights), 3), dtype=torch.int64, pin_memory=pinned)
    fields = parameters.numpy()
    fields[:, 0], fields[:, 1] = weights, grads
    fields[:, 2:].view(np.float32)[:] = rates
    return parameters, not (fields[:, :2] % (4 * VECTOR)).any()
