"""Maps from logits to sparse probabilities: sparsemax, 1.5-entmax, the top-k gate.

Sparsemax and 1.5-entmax are α-entmax at α = 2 and 1.5 (Peters, Niculae and Martins,
2019): with z = (α−1)·logits and a threshold τ that makes the sum one,
p = (z − τ)₊^{1/(α−1)}. For all three maps the gradient by the logits is

    dz = s (g − Σ s g / Σ s),   s = p^{2−α},   g the gradient by p,

where the gate, a softmax over k logits, has α = 1. So the output is all that the
backward pass needs, in the output's own precision too: bf16 has the range of float32,
so that p stays positive where it was; s then has a relative error of at most 2⁻⁹; and
since the same s stands above and below the fraction, a constant part of g still
cancels. In float16 probabilities under 3e-8 would be flushed to 0, and with them a
flat tail's share of Σ s: float16 logits therefore go through float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ftlib.ops.backends import Backend, check_backend, kernels_of

SPARSEMAX, ENTMAX15, SOFTMAX = 2.0, 1.5, 1.0


def sparsemax(
    logits: Tensor, dim: int = -1, *, backend: Backend | None = None
) -> Tensor:
    """Return the point of the simplex that is nearest to the logits.

    Logits of −inf get probability 0; where all are −inf, as where all are equal, the
    result is uniform. NaN and +inf make their whole row NaN. An infinite upstream
    gradient where p = 0 counts as 0, so that entropies can be differentiated.

    Args:
        logits: any shape, float.
        dim: the dimension that sums to one.
        backend: ``torch`` or ``triton``; by default Triton on GPUs of compute
            capability 8.0 and up, for rows of at most 65536 logits that are not
            float64. On CPU tensors Triton runs only under ``TRITON_INTERPRET=1``,
            and never in bf16, which the interpreter computes wrongly.

    Returns:
        Probabilities, shape and dtype of ``logits``, computed in float32 (float64 for
        float64).

    Raises:
        ValueError: there are no logits, they are no floats, or the back end that was
            asked for cannot take them.

    >>> sparsemax(torch.tensor([1.0, 0.5, -1.0])).tolist()
    [0.75, 0.25, 0.0]
    """
    rows = _columns_last(logits, dim, backend)
    probs = _entmax(rows, SPARSEMAX, backend or "")
    return probs.to(logits.dtype).movedim(-1, dim)


def entmax15(
    logits: Tensor, dim: int = -1, *, backend: Backend | None = None
) -> Tensor:
    """Return 1.5-entmax, ``(logits/2 − τ)₊²`` with the τ that makes the sum one.

    Between softmax and sparsemax. Arguments, result, infinities and errors are those
    of :func:`sparsemax`.
    """
    rows = _columns_last(logits, dim, backend)
    probs = _entmax(rows, ENTMAX15, backend or "")
    return probs.to(logits.dtype).movedim(-1, dim)


def top_k_gate(
    logits: Tensor, k: int, dim: int = -1, *, backend: Backend | None = None
) -> Tensor:
    """Return the softmax over exactly the k largest logits, and 0 elsewhere.

    Among equal logits the lower indices are chosen. Logits of −inf get probability 0,
    chosen or not; where all are −inf, the first k get 1/k each. NaN and +inf make their
    whole row NaN.

    Args:
        logits: any shape, float.
        k: how many are chosen, from 1 to the size of ``dim``.
        dim: the dimension that sums to one.
        backend: as for :func:`sparsemax`.

    Returns:
        Probabilities, shape and dtype of ``logits``.

    Raises:
        ValueError: as for :func:`sparsemax`, or k is out of range.

    >>> top_k_gate(torch.tensor([1.0, 3.0, 3.0]), k=2).tolist()
    [0.0, 0.5, 0.5]
    """
    rows = _columns_last(logits, dim, backend)
    if not 1 <= k <= rows.shape[-1]:
        raise ValueError(
            f"k is {k} and dimension {dim} holds {rows.shape[-1]} logits: k must be "
            "from 1 to that"
        )
    probs = _top_k_gate(rows, k, backend or "")
    return probs.to(logits.dtype).movedim(-1, dim)


def _columns_last(logits: Tensor, dim: int, backend: str | None) -> Tensor:
    """Check the arguments; return the logits with ``dim`` last, float16 as float32."""
    check_backend(backend)
    if not logits.is_floating_point():
        raise ValueError(f"logits are {logits.dtype}: cast them to a float dtype")
    if logits.dim() == 0:
        raise ValueError("logits are a single number: expected one dimension or more")
    rows = logits.movedim(dim, -1)
    if rows.shape[-1] == 0:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}: dimension {dim} is empty"
        )
    return rows.float() if rows.dtype == torch.float16 else rows


# --- twins: the specification, and the path of everything but a recent GPU ------------


def entmax_rows(logits: Tensor, alpha: float) -> Tensor:
    """Return α-entmax of each row of (N, V), for α = 2 (sparsemax) or 1.5.

    Newton's method from the left of the root τ of Σ (z − τ)₊^{1/(α−1)} = 1, convex
    and decreasing in τ: it never passes the root, and it ends on the support after
    about log₂ V + 13 steps at most in float32. The largest z is 0, so τ is in [−1, 0).
    """
    values = _accumulator(logits)
    largest = values.amax(-1, keepdim=True)
    z = (alpha - 1) * (values - largest)
    tau = torch.full_like(largest, -1)
    step = _newton_step(z, tau, alpha)
    while (moves := tau + step > tau).any():
        tau = torch.where(moves, tau + step, tau)
        step = _newton_step(z, tau, alpha)
    # The last step is too small for τ but not for z − τ: without it a row of n nonzeros
    # would miss a sum of one by n roundings of τ.
    p = (z - tau - step).clamp(min=0) ** (1 / (alpha - 1))
    return torch.where(largest == -torch.inf, 1 / z.shape[-1], p).to(logits.dtype)


def _newton_step(z: Tensor, tau: Tensor, alpha: float) -> Tensor:
    w = (z - tau).clamp(min=0)
    if alpha == SPARSEMAX:
        return (w.sum(-1, keepdim=True) - 1) / (w > 0).sum(-1, keepdim=True)
    return ((w * w).sum(-1, keepdim=True) - 1) / (2 * w.sum(-1, keepdim=True))


def top_k_rows(logits: Tensor, k: int) -> Tensor:
    """Return the softmax of each row of (N, V) over its k largest, first among ties."""
    values = _accumulator(logits)
    ordered = values.sort(dim=-1, descending=True, stable=True)
    largest, first = ordered.values[:, :1], ordered.indices[:, :k]
    below = torch.where(largest == -torch.inf, 0, values - largest)
    left_out = torch.ones_like(values, dtype=torch.bool).scatter(-1, first, False)
    return below.masked_fill(left_out, -torch.inf).softmax(-1).to(logits.dtype)


def gradient_rows(probs: Tensor, grad: Tensor, alpha: float) -> Tensor:
    """Return ``s(g − Σ sg / Σ s)``, s = p^{2−α}, for rows of p and g (N, V)."""
    p, g = _accumulator(probs), _accumulator(grad)
    s = torch.where(p > 0, p ** (2 - alpha), 0)
    g = torch.where(p > 0, g, 0)
    mean = (s * g).sum(-1, keepdim=True) / s.sum(-1, keepdim=True)
    return (s * (g - mean)).to(probs.dtype)


def _accumulator(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


# --- registered operations -------------------------------------------------------


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).contiguous()


@torch.library.custom_op("ftlib::entmax", mutates_args=())
def _entmax(logits: Tensor, alpha: float, backend: str) -> Tensor:
    """Return α-entmax along the last dimension; backend "" leaves the choice open."""
    rows = _rows(logits)
    kernels = kernels_of("simplex", backend, [rows], columns=rows.shape[-1])
    solve = kernels.entmax_rows if kernels else entmax_rows
    return solve(rows, alpha).view(logits.shape)


@torch.library.custom_op("ftlib::top_k_gate", mutates_args=())
def _top_k_gate(logits: Tensor, k: int, backend: str) -> Tensor:
    """Return the top-k gate along the last dimension."""
    rows = _rows(logits)
    kernels = kernels_of("simplex", backend, [rows], columns=rows.shape[-1])
    solve = kernels.top_k_rows if kernels else top_k_rows
    return solve(rows, k).view(logits.shape)


@torch.library.custom_op("ftlib::simplex_gradient", mutates_args=())
def _simplex_gradient(
    probs: Tensor, grad: Tensor, alpha: float, backend: str
) -> Tensor:
    """Return the gradient by the logits of what gave ``probs``."""
    rows = _rows(probs)
    kernels = kernels_of("simplex", backend, [rows], columns=rows.shape[-1])
    solve = kernels.gradient_rows if kernels else gradient_rows
    return solve(rows, _rows(grad), alpha).view(probs.shape)


def _fake(values: Tensor, *arguments: Any) -> Tensor:
    return values.new_empty(values.shape)


def _save_entmax(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.alpha, ctx.backend = inputs
    ctx.save_for_backward(output)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.alpha, ctx.backend = SOFTMAX, inputs[-1]
    ctx.save_for_backward(output)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (probs,) = ctx.saved_tensors
    return _simplex_gradient(probs, grad, ctx.alpha, ctx.backend), None, None


for _operation in (_entmax, _top_k_gate, _simplex_gradient):
    _operation.register_fake(_fake)
_entmax.register_autograd(_backward, setup_context=_save_entmax)
_top_k_gate.register_autograd(_backward, setup_context=_save_gate)
