"""Triton kernels for sparsemax, 1.5-entmax and the top-k gate: one program per row.

The forward kernels hold their row in registers and never sort it. The twins of these
functions, in ``ftlib.ops.simplex``, are the specification.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Above this a row does not fit in the registers of one program, 64 for each of 1024
# threads. Up to half of it none spill; between the two, some do.
MAX_COLUMNS = 65536
COLUMNS_PER_THREAD = 32

# What the backward pass takes at a time: it has two rows to hold, and twice the sums.
GRADIENT_BLOCK = 4096

# Whether the kernels below run in the interpreter, which Triton decides on decoration.
INTERPRETED = bool(triton.knobs.runtime.interpret)


# --- sparsemax and 1.5-entmax ----------------------------------------------------


@triton.jit
def _above(z: tl.tensor, tau: tl.tensor) -> tl.tensor:
    """Return (z − τ)₊; a NaN stays one, so that it reaches every sum of its row."""
    return tl.maximum(z - tau, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _newton_step(z: tl.tensor, tau: tl.tensor, ALPHA: tl.constexpr) -> tl.tensor:
    """Return −f(τ)/f'(τ) for f(τ) = Σ (z − τ)₊^{1/(α−1)} − 1, with α = 2 or 1.5."""
    w = _above(z, tau)
    if ALPHA == 2.0:
        excess = tl.sum(w, 0) - 1
        descent = tl.sum((z > tau).to(tl.float32), 0)
    else:
        excess = tl.sum(w * w, 0) - 1
        descent = 2 * tl.sum(w, 0)
    return excess / descent


@triton.jit
def entmax_kernel(
    logits_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    V: tl.tensor,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write α-entmax of each row, for α = 2 (sparsemax) or 1.5; V columns each."""
    start = tl.program_id(0).to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    valid = columns < V
    logits = tl.load(logits_ptr + start + columns, mask=valid, other=float("-inf"))
    logits = logits.to(tl.float32)
    largest = tl.max(logits, 0)
    z = (ALPHA - 1) * (logits - largest)
    # The largest z is 0, so the root is in [−1, 0). f is convex and decreasing: steps
    # from the left never pass it, and each divides f·|f'| by at least 4, which bounds
    # their number by about log₂ V + 13.
    tau = -1.0
    step = _newton_step(z, tau, ALPHA)
    while tau + step > tau:
        tau += step
        step = _newton_step(z, tau, ALPHA)
    # The last step is too small for τ but not for z − τ: without it a row of n nonzeros
    # would miss a sum of one by n roundings of τ.
    p = _above(z - tau, step)
    if ALPHA == 1.5:
        p = p * p
    p = tl.where(largest == float("-inf"), 1 / V, p)
    tl.store(probs_ptr + start + columns, p, mask=valid)


# --- top-k gate -------------------------------------------------------------------


@triton.jit
def _ordered_image(x: tl.tensor) -> tl.tensor:
    """Map float32 to uint32 in order: −0 like 0, NaN above all."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)
    image = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    return tl.where(x == x, image, 0xFFFFFFFF)


@triton.jit
def _from_image(image: tl.tensor) -> tl.tensor:
    """Invert :func:`_ordered_image`, so that a row is not held twice."""
    bits = tl.where(image >= 0x80000000, image & 0x7FFFFFFF, image ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _reach(
    image: tl.tensor, columns: tl.tensor, key: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Say which pairs (image, −column) are at least the pair that a key stands for."""
    bound = (key // BLOCK).to(tl.uint32)
    last = (BLOCK - 1 - key % BLOCK).to(tl.int32)
    return (image > bound) | ((image == bound) & (columns <= last))


@triton.jit
def _kth_key(
    image: tl.tensor, columns: tl.tensor, k: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """Return a key that k pairs (image, −column) reach; no two pairs are equal.

    Its bits are found from the highest down: one stays if k pairs still reach the key.
    """
    key = tl.full((), 0, tl.int64)
    bit = tl.full((), BLOCK << 31, tl.int64)
    reached = tl.full((), 0, tl.int32)
    while (bit > 0) & (reached != k):
        count = tl.sum(_reach(image, columns, key | bit, BLOCK).to(tl.int32), 0)
        key = tl.where(count >= k, key | bit, key)
        reached = tl.where(count >= k, count, reached)
        bit >>= 1
    return key


@triton.jit
def top_k_kernel(
    logits_ptr: tl.tensor,
    probs_ptr: tl.tensor,
    V: tl.tensor,
    k: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the softmax over the k largest of V logits of each row, 0 elsewhere."""
    start = tl.program_id(0).to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    valid = columns < V
    logits = tl.load(logits_ptr + start + columns, mask=valid, other=float("-inf"))
    # Padding is −inf and comes last, so it is never among the first k ≤ V.
    image = _ordered_image(logits.to(tl.float32))
    key = _kth_key(image, columns, k, BLOCK)
    largest = _from_image(tl.max(image, 0))
    below = _from_image(image) - largest
    below = tl.where(largest == float("-inf"), 0.0, below)
    chosen = _reach(image, columns, key, BLOCK)
    e = tl.exp(tl.where(chosen, below, float("-inf")))
    tl.store(probs_ptr + start + columns, e / tl.sum(e, 0), mask=valid)


# --- gradient ---------------------------------------------------------------------


@triton.jit
def _load_slopes(
    probs_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    offsets: tl.tensor,
    valid: tl.tensor,
    ALPHA: tl.constexpr,
) -> tl.tuple:
    """Return s = p^{2−α} and the upstream gradient g, both 0 where p = 0."""
    p = tl.load(probs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    if ALPHA == 2.0:
        s = (p > 0).to(tl.float32)
    elif ALPHA == 1.5:
        s = tl.sqrt(p)
    else:
        s = p
    g = tl.where(p > 0, g, 0.0)
    return s, g


@triton.jit
def gradient_kernel(
    probs_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    dz_ptr: tl.tensor,
    V: tl.tensor,
    ALPHA: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write dz = s(g − Σ sg / Σ s) of each row of V columns, BLOCK at a time.

    The second pass finds in the cache what the first one read.
    """
    start = tl.program_id(0).to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    done = 0
    while done < V:
        offsets = done + columns
        s, g = _load_slopes(probs_ptr, grad_ptr, start + offsets, offsets < V, ALPHA)
        total += s
        weighted += s * g
        done += BLOCK
    mean = tl.sum(weighted, 0) / tl.sum(total, 0)
    done = 0
    while done < V:
        offsets = done + columns
        valid = offsets < V
        s, g = _load_slopes(probs_ptr, grad_ptr, start + offsets, valid, ALPHA)
        tl.store(dz_ptr + start + offsets, s * (g - mean), mask=valid)
        done += BLOCK


# --- host functions ---------------------------------------------------------------


def row_block(columns: int, per_thread: int = COLUMNS_PER_THREAD) -> tuple[int, int]:
    """Return the block that holds a row, and the warps that hold the block."""
    block = triton.next_power_of_2(columns)
    return block, min(max(block // (32 * per_thread), 1), 32)


def entmax_rows(logits: Tensor, alpha: float) -> Tensor:
    """Return α-entmax of each row.

    Args:
        logits: (N, V), contiguous, float32, bfloat16 or float16, V ≤ ``MAX_COLUMNS``.
        alpha: 2 (sparsemax) or 1.5.
    """
    probs = torch.empty_like(logits)
    rows, columns = logits.shape
    block, warps = row_block(columns)
    entmax_kernel[(rows,)](
        logits, probs, columns, ALPHA=alpha, BLOCK=block, num_warps=warps
    )
    return probs


def top_k_rows(logits: Tensor, k: int) -> Tensor:
    """Return the softmax of each row over its k largest logits, the first among ties.

    Args:
        logits: (N, V), contiguous, float32, bfloat16 or float16, V ≤ ``MAX_COLUMNS``.
        k: in [1, V].
    """
    probs = torch.empty_like(logits)
    rows, columns = logits.shape
    block, warps = row_block(columns)
    top_k_kernel[(rows,)](logits, probs, columns, k, BLOCK=block, num_warps=warps)
    return probs


def gradient_rows(probs: Tensor, grad: Tensor, alpha: float) -> Tensor:
    """Return the gradient by the logits, ``s(g − Σ sg / Σ s)`` with ``s = p^{2−α}``.

    Args:
        probs: (N, V), contiguous, any V.
        grad: g, the gradient by ``probs``, of the same shape and layout.
        alpha: 2 (sparsemax), 1.5 (1.5-entmax) or 1 (softmax over the chosen k).
    """
    dz = torch.empty_like(probs)
    rows, columns = probs.shape
    block, warps = row_block(min(columns, GRADIENT_BLOCK), COLUMNS_PER_THREAD // 2)
    gradient_kernel[(rows,)](
        probs, grad, dz, columns, ALPHA=alpha, BLOCK=block, num_warps=warps
    )
    return dz
