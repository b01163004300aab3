r"""Contextual decomposition (CD-T) with one stream: the relevant part of an activation.

CD-T (Hsu et al., arXiv 2407.00886) writes an activation as t = β + γ, of which β is
what some heads, the source, contributed. Every rule keeps the sum, and t does not
depend on the source: so t is computed once, (..., D), and only the β of each of S
sources is carried, (S, ..., D). Where a rule needs γ it is t − β.

* norm: :func:`.decomposed_norm`
* linear layer: :func:`.decomposed_linear`; the sign clean-up:
  :func:`.relevant_epilogue_`
* activation: :func:`.decomposed_activation`, β' = f(t) − f(γ)
* gated activation: :func:`.decomposed_gate`, β' = f(g)u − f(γ_g)γ_u

β = 0 stays exactly 0, and β = t gives what the plain module computes. Results have the
dtype of the relevant part; inside everything is float32, or float64 where one of the
tensors is. No gradient flows through these functions.

``ftlib.kernels.decomposition`` holds a Triton kernel for each; the twins at the end of
this file are their specification.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from ftlib.ops.backends import Backend, check_backend, kernels_of

NormKind = Literal["layer", "rms"]
Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
BiasRule = Literal["split", "irrelevant"]

# What the twins work on at a time, so that their temporaries stay in the cache.
BLOCK_ELEMENTS = 2**16


@overload
def decomposed_norm(
    relevant: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: NormKind = ...,
    residual: None = None,
    bias_rule: BiasRule = ...,
    backend: Backend | None = None,
) -> Tensor: ...


@overload
def decomposed_norm(
    relevant: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: NormKind = ...,
    residual: Tensor,
    bias_rule: BiasRule = ...,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.no_grad()
def decomposed_norm(
    relevant: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    kind: NormKind = "layer",
    residual: Tensor | None = None,
    bias_rule: BiasRule = "split",
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the relevant part behind a LayerNorm or an RMSNorm.

    Both streams are divided by what the plain norm divides t by::

        layer: β' = (β − mean β) / √(var t + ε) ⊙ w + share of b
        rms:   β' = β / √(mean t² + ε) ⊙ w + share of b

    The share of the bias is ``b ⊙ |β| / (|β| + |γ|)``, of the norm's inputs, under
    ``split`` (0 where both are 0), and 0 under ``irrelevant``.

    Args:
        relevant: β, shape (S, ..., D), float.
        total: t, the norm's input, shape (..., D); with its residual added.
        weight: w, shape (D,).
        bias: b, shape (D,), if there is one.
        eps: ε.
        kind: ``layer`` or ``rms``.
        residual: what is added to β first, shape of ``relevant``.
        bias_rule: ``split``, as published, or ``irrelevant``.
        backend: ``torch`` or ``triton``; by default Triton on GPUs of compute
            capability 8.0 and up, unless a tensor is float64 or D above 8192. On CPU
            tensors Triton runs only under ``TRITON_INTERPRET=1``, and never in bf16.

    Returns:
        β', shape (S, ..., D); with ``residual``, also the sum β + residual.

    Raises:
        ValueError: shapes, names or the back end do not fit; the message says which.
    """
    _check_name("kind", kind, NormKind)
    _check_name("bias_rule", bias_rule, BiasRule)
    _check_streams("relevant", relevant, "total", total)
    _check_vectors(total.shape[-1], weight=weight, bias=bias)
    if residual is not None and residual.shape != relevant.shape:
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and relevant "
            f"{tuple(relevant.shape)}: they are added, so they must agree"
        )
    tensors = (relevant, total, weight, bias, residual)
    kernels = _kernels(backend, *tensors, columns=total.shape[-1])
    norm = kernels.norm_rows if kernels else norm_rows
    split = None if bias_rule == "irrelevant" else bias
    added = None if residual is None else _by_source(residual)
    normed, summed = norm(
        _by_source(relevant), _rows(total), weight, split, eps, kind, added
    )
    if summed is None:
        return normed.view(relevant.shape)
    return normed.view(relevant.shape), summed.view(relevant.shape)


@torch.no_grad()
def decomposed_linear(
    relevant: Tensor,
    total_output: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    bias_rule: BiasRule = "split",
    clean_up: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Return the relevant part behind a linear layer, β' = Wβ + share of b.

    Args:
        relevant: β, shape (S, ..., D), float.
        total_output: Wt + b, what the plain layer gives, shape (..., F).
        weight: W, shape (F, D), dtype of ``relevant``. The Conv1D of GPT-2 has it
            transposed: pass ``weight.T``.
        bias: b, shape (F,), if there is one.
        bias_rule: as in :func:`relevant_epilogue_`.
        clean_up: as in :func:`relevant_epilogue_`.
        backend: as in :func:`decomposed_norm`; of what follows the matmul.

    Returns:
        β', shape (S, ..., F).

    Raises:
        ValueError: as in :func:`decomposed_norm`.
    """
    if weight.dim() != 2 or weight.shape != (
        total_output.shape[-1],
        relevant.shape[-1],
    ):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; relevant ends in "
            f"{relevant.shape[-1]} and total_output in {total_output.shape[-1]}, so "
            f"expected ({total_output.shape[-1]}, {relevant.shape[-1]})"
        )
    return relevant_epilogue_(
        relevant @ weight.T,
        total_output,
        bias,
        bias_rule=bias_rule,
        clean_up=clean_up,
        backend=backend,
    )


@torch.no_grad()
def relevant_epilogue_(
    relevant: Tensor,
    total: Tensor,
    bias: Tensor | None = None,
    *,
    bias_rule: BiasRule = "split",
    clean_up: bool = False,
    backend: Backend | None = None,
) -> Tensor:
    """Give a relevant part its share of a bias, and clean its signs up, in place.

    With a bias, ``relevant`` is Wβ and ``total`` is Wβ + Wγ + b. Under ``split`` its
    share ``b ⊙ |Wβ| / (|Wβ| + |Wγ|)``, 0 where both are 0, is added.

    The published clean-up: where β and γ have opposite signs, the smaller one becomes 0
    and the larger one their sum t. That is, β is clamped between 0 and t. Without a
    bias this cleans up any sum, such as a block's output.

    Args:
        relevant: shape (S, ..., F), float; contiguous, because it is overwritten.
        total: t, shape (..., F).
        bias: b, shape (F,), if there is one.
        bias_rule: ``split``, as published, or ``irrelevant``, which adds nothing.
        clean_up: whether signs are cleaned up.
        backend: as in :func:`decomposed_norm`.

    Returns:
        ``relevant``.

    Raises:
        ValueError: as in :func:`decomposed_norm`, or ``relevant`` is not contiguous.
    """
    _check_name("bias_rule", bias_rule, BiasRule)
    _check_streams("relevant", relevant, "total", total)
    _check_vectors(total.shape[-1], bias=bias)
    if not relevant.is_contiguous():
        raise ValueError(
            f"relevant has strides {relevant.stride()} and would be overwritten: pass "
            "relevant.contiguous()"
        )
    split = None if bias_rule == "irrelevant" else bias
    if split is None and not clean_up:
        return relevant
    kernels = _kernels(backend, relevant, total, bias)
    epilogue = kernels.epilogue_rows_ if kernels else epilogue_rows_
    epilogue(_by_source(relevant), _rows(total), split, clean_up)
    return relevant


@torch.no_grad()
def decomposed_activation(
    relevant: Tensor,
    total: Tensor,
    activation: Activation,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the relevant part behind an activation, f(t) − f(t − β).

    For β much smaller than t the two terms cancel: as written, the error is a rounding
    of f(t), which in float32 is 6 % of β for β = 1e-6 t. But f(t) = t·h(t), except for
    ReLU, so that it is h(t)β + (t − β)(h(t) − h(t − β)); with a difference of h that
    does not cancel either, the error stays below 1e-6 β (1e-13 β in float64).

    Args:
        relevant: β, shape (S, ..., F), float.
        total: t, the activation's input, shape (..., F).
        activation: f: ``gelu``, ``gelu_tanh`` (transformers' ``gelu_new``), ``relu`` or
            ``silu``.
        backend: as in :func:`decomposed_norm`.

    Returns:
        Shape and dtype of ``relevant``.

    Raises:
        ValueError: as in :func:`decomposed_norm`.
    """
    _check_name("activation", activation, Activation)
    _check_streams("relevant", relevant, "total", total)
    kernels = _kernels(backend, relevant, total)
    activate = kernels.activation_rows if kernels else activation_rows
    found: Tensor = activate(_by_source(relevant), _rows(total), activation)
    return found.view(relevant.shape)


@torch.no_grad()
def decomposed_gate(
    relevant_gate: Tensor,
    gate: Tensor,
    relevant_up: Tensor,
    up: Tensor,
    activation: Activation,
    *,
    backend: Backend | None = None,
) -> Tensor:
    """Return the relevant part of f(g) ⊙ u: f(g)u − f(g − β_g)(u − β_u).

    Computed as f(g)β_u + (f(g) − f(g − β_g))(u − β_u), it has no error of the size of
    f(g)u: see :func:`decomposed_activation`.

    Args:
        relevant_gate: β_g, shape (S, ..., F), float.
        gate: g, the activation's input, shape (..., F).
        relevant_up: β_u, shape and dtype of ``relevant_gate``.
        up: u, shape (..., F).
        activation: f, as in :func:`decomposed_activation`.
        backend: as in :func:`decomposed_norm`.

    Returns:
        Shape and dtype of ``relevant_gate``.

    Raises:
        ValueError: as in :func:`decomposed_norm`.
    """
    _check_name("activation", activation, Activation)
    _check_streams("relevant_gate", relevant_gate, "gate", gate)
    _check_streams("relevant_up", relevant_up, "up", up)
    if relevant_gate.shape != relevant_up.shape:
        raise ValueError(
            f"relevant_gate has shape {tuple(relevant_gate.shape)} and relevant_up "
            f"{tuple(relevant_up.shape)}: they are multiplied, so they must agree"
        )
    kernels = _kernels(backend, relevant_gate, gate, relevant_up, up)
    multiply = kernels.gate_rows if kernels else gate_rows
    found: Tensor = multiply(
        _by_source(relevant_gate),
        _rows(gate),
        _by_source(relevant_up),
        _rows(up),
        activation,
    )
    return found.view(relevant_gate.shape)


# --- what the functions above share ---------------------------------------------------


def _rows(total: Tensor) -> Tensor:
    return total.reshape(-1, total.shape[-1])


def _by_source(relevant: Tensor) -> Tensor:
    rows = math.prod(relevant.shape[1:-1])
    return relevant.reshape(len(relevant), rows, relevant.shape[-1])


def _check_name(what: str, name: object, choices: object) -> None:
    if name not in get_args(choices):
        raise ValueError(
            f"{what} is {name!r}: choose from {', '.join(get_args(choices))}"
        )


def _check_streams(
    relevant_name: str, relevant: Tensor, total_name: str, total: Tensor
) -> None:
    if total.dim() < 1 or relevant.shape[1:] != total.shape or relevant.dim() < 2:
        raise ValueError(
            f"{relevant_name} has shape {tuple(relevant.shape)} and {total_name} "
            f"{tuple(total.shape)}: expected (sources, ..., D) and (..., D)"
        )
    for name, tensor in ((relevant_name, relevant), (total_name, total)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}: cast it to a float dtype")


def _check_vectors(size: int, **vectors: Tensor | None) -> None:
    for name, vector in vectors.items():
        if vector is not None and vector.shape != (size,):
            raise ValueError(
                f"{name} has shape {tuple(vector.shape)}: expected ({size},), one "
                "number for each column"
            )


def _kernels(
    backend: Backend | None, *tensors: Tensor | None, columns: int = 0
) -> ModuleType | None:
    """Return the module of the kernels, or None where the twins are to be used.

    Args:
        backend: what was asked for.
        tensors: what they are to work on.
        columns: those of a row that a program has to hold.
    """
    check_backend(backend)
    given = [tensor for tensor in tensors if tensor is not None]
    return kernels_of("decomposition", backend, given, columns)


# --- twins: the specification, and the path of everything but a recent GPU ------------


def norm_rows(
    relevant: Tensor,
    total: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: NormKind,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return :func:`.decomposed_norm` of β (S, N, D) and t (N, D), and the sum.

    Args:
        relevant: β.
        total: t.
        weight: (D,).
        bias: what is split, (D,); None if nothing is.
        eps: ε.
        kind: ``layer`` or ``rms``.
        residual: (S, N, D), or None; then there is no sum.
    """
    dtype = _computed_in(relevant, total)
    t, w = total.to(dtype), weight.to(dtype)
    spread = t - t.mean(-1, keepdim=True) if kind == "layer" else t
    scale = w * (spread.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = torch.empty_like(relevant, memory_format=torch.contiguous_format)
    summed = None if residual is None else torch.empty_like(normed)
    for rows, sources in itertools.product(*_blocks(relevant)):
        beta = relevant[sources, rows].to(dtype)
        if residual is not None and summed is not None:
            beta = beta + residual[sources, rows]
            summed[sources, rows] = beta
        centred = beta - beta.mean(-1, keepdim=True) if kind == "layer" else beta
        output = centred * scale[rows]
        if bias is not None:
            share = _relevant_share(beta, t[rows] - beta)
            output.addcmul_(share, bias.to(dtype))
        normed[sources, rows] = output
    return normed, summed


def epilogue_rows_(
    relevant: Tensor, total: Tensor, bias: Tensor | None, clean_up: bool
) -> None:
    """Overwrite β (S, N, F) as :func:`.relevant_epilogue_` does.

    Args:
        relevant: Wβ.
        total: t, (N, F).
        bias: what is split, (F,); None if nothing is.
        clean_up: whether signs are cleaned up.
    """
    dtype = _computed_in(relevant, total)
    b = None if bias is None else bias.to(dtype)
    row_blocks, source_blocks = _blocks(relevant)
    for rows in row_blocks:
        t = total[rows].to(dtype)
        low, high = t.clamp(max=0), t.clamp(min=0)
        before = t if b is None else t - b
        for sources in source_blocks:
            beta = relevant[sources, rows].to(dtype)
            if b is not None:
                share = _relevant_share(beta, before - beta)
                beta = torch.addcmul(beta, share, b)
            relevant[sources, rows] = beta.clamp(low, high) if clean_up else beta


def activation_rows(relevant: Tensor, total: Tensor, activation: Activation) -> Tensor:
    """Return f(t) − f(t − β) for β (S, N, F) and t (N, F)."""
    dtype = _computed_in(relevant, total)
    output = torch.empty_like(relevant, memory_format=torch.contiguous_format)
    row_blocks, source_blocks = _blocks(relevant)
    for rows in row_blocks:
        change = CHANGES[activation](total[rows].to(dtype))
        for sources in source_blocks:
            output[sources, rows] = change(relevant[sources, rows].to(dtype))
    return output


def gate_rows(
    relevant_gate: Tensor,
    gate: Tensor,
    relevant_up: Tensor,
    up: Tensor,
    activation: Activation,
) -> Tensor:
    """Return f(g)u − f(g − β_g)(u − β_u) for β (S, N, F) and g, u (N, F)."""
    dtype = _computed_in(relevant_gate, gate, up)
    output = torch.empty_like(relevant_gate, memory_format=torch.contiguous_format)
    row_blocks, source_blocks = _blocks(relevant_gate)
    for rows in row_blocks:
        g, u = gate[rows].to(dtype), up[rows].to(dtype)
        change = CHANGES[activation](g)
        activated = change(g)
        for sources in source_blocks:
            beta_u = relevant_up[sources, rows].to(dtype)
            changed = change(relevant_gate[sources, rows].to(dtype))
            output[sources, rows] = activated * beta_u + changed * (u - beta_u)
    return output


def _computed_in(*tensors: Tensor) -> torch.dtype:
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _blocks(relevant: Tensor) -> tuple[list[slice], list[slice]]:
    """Return slices of the rows and of the sources, whose blocks stay in the cache."""
    S, N, F = relevant.shape
    rows = min(max(BLOCK_ELEMENTS // max(F, 1), 1), max(N, 1))
    sources = max(BLOCK_ELEMENTS // max(rows * F, 1), 1)
    return (
        [slice(i, i + rows) for i in range(0, N, rows)],
        [slice(i, i + sources) for i in range(0, S, sources)],
    )


def _relevant_share(relevant: Tensor, irrelevant: Tensor) -> Tensor:
    """Return |β| / (|β| + |γ|), and 0 where both are 0."""
    size = relevant.abs()
    whole = irrelevant.abs().add_(size)
    return size.div_(whole.clamp_(min=torch.finfo(whole.dtype).tiny))


# --- changes of activations: f(t) − f(t − β), with an error of a few roundings of β ---

Change = Callable[[Tensor], Tensor]
"""Takes β to f(t) − f(t − β)."""


def _relu_change(t: Tensor) -> Change:
    below = t.clamp(max=0)
    return lambda beta: torch.minimum(beta, t) - below


def _silu_change(t: Tensor) -> Change:
    return _sigmoid_change(t, t, lambda beta: beta / 2)


def _gelu_tanh_change(t: Tensor) -> Change:
    """For f(t) = t·σ(a) with a(t) = √(8/π)(t + ct³), c = 0.044715.

    a(t) − a(t − β) = √(8/π)·β·(1 + c(3t² − 3tβ + β²)).
    """
    scale, c = math.sqrt(8 / math.pi), 0.044715
    squared = c * t * t
    constant = scale / 2 * (1 + 3 * squared)

    def half_difference(beta: Tensor) -> Tensor:
        quadratic = torch.sub(beta, t, alpha=3).mul_(beta)
        return torch.add(constant, quadratic, alpha=scale / 2 * c).mul_(beta)

    return _sigmoid_change(t, scale * t * (1 + squared), half_difference)


def _sigmoid_change(t: Tensor, a: Tensor, half_difference: Change) -> Change:
    """Return the change of f(t) = t·σ(a(t)).

    σ(a) − σ(b) = tanh((a − b)/2)·(σ(a) + σ(b) − 2σ(a)σ(b)), whose second factor is
    the same for −a and −b. With the signs that make σ(a) the smaller, no digit is lost.

    Args:
        t: where f is taken.
        a: at t.
        half_difference: takes β to (a(t) − a(t − β))/2.
    """
    turn = torch.where(a > 0, -1.0, 1.0).to(a.dtype)
    turned = a * turn
    small, high = turned.sigmoid(), a.sigmoid()
    slope = 1 - 2 * small

    def change(beta: Tensor) -> Tensor:
        half = half_difference(beta)
        low = torch.addcmul(turned, turn, half, value=-2).sigmoid_()
        dropped = torch.addcmul(small, slope, low).mul_(half.tanh_())
        return dropped.mul_(t - beta).addcmul_(high, beta)

    return change


def _gelu_change(t: Tensor) -> Change:
    """For f(t) = t·Φ(t), with Φ and φ of the normal distribution.

    Φ(t) − Φ(t − β) for small β by its series, Σ φ(t)·Heₖ(t)·βᵏ⁺¹/(k + 1)!, with the
    Hermite polynomials Heₖ. After k = 7 it is short by at most β⁹/8600.
    """
    high = _normal(t)
    held = t.clamp(-40, 40)  # φ(40) = 0, and He₇(40) is finite
    terms = [(-held.square() / 2).exp() / math.sqrt(2 * math.pi)]
    terms.append(held * terms[0] / 2)
    for k in range(2, 8):
        terms.append((held * terms[-1] - (k - 1) / k * terms[-2]) / (k + 1))
    # Where the next term is a rounding, a difference of two Φ has lost few digits.
    bound = (8600 * torch.finfo(t.dtype).eps) ** (1 / 8)

    def change(beta: Tensor) -> Tensor:
        rest = t - beta
        series = terms[-1]
        for term in terms[-2::-1]:
            series = torch.addcmul(term, series, beta)
        dropped = torch.where(
            beta.abs() < bound, series.mul_(beta), high - _normal(rest)
        )
        return dropped.mul_(rest).addcmul_(high, beta)

    return change


def _normal(x: Tensor) -> Tensor:
    """Return Φ(x)."""
    return (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)


CHANGES: dict[Activation, Callable[[Tensor], Change]] = {
    "gelu": _gelu_change,
    "gelu_tanh": _gelu_tanh_change,
    "relu": _relu_change,
    "silu": _silu_change,
}
