"""The logits one tile at a time: the passes behind :func:`.vocabulary_head`.

A tile is the product of some rows of ``hidden`` with the whole ``weight``. It is the
only place where logits exist; its gradient overwrites it. The passes are registered
with ``torch.library``, so that ``torch.compile`` takes each as one node.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from ftlib.kernels.types import Logits, MomentFlags, Moments, Sced
from ftlib.ops import rows
from ftlib.ops.statistics import Gradient, Statistics, from_moments, logit_gradient
from ftlib.ops.token_loss import TokenLoss
from ftlib.runtime import triton_supported

Backend = Literal["torch", "chunked", "fused"]

# What a pass may allocate beside its results, whatever the number of tokens.
WORKSPACE_BYTES = 512 * 2**20

# The twins hold up to this many copies of a tile at once, in the accumulator's dtype.
TWIN_COPIES = 16

# Matmuls work on blocks of this many rows: a tile that fills its blocks wastes none.
MATMUL_ROWS = 128

# Up to this hidden size the statistics are taken in the matmul's epilogue. Above it a
# vendor matmul into a tile, read once more, should win: estimated from bandwidth and
# matmul rate (see benchmarks/NOTES.md), still to be measured.
FUSED_UP_TO = 1024


class Head(NamedTuple):
    """What a pass works on, without the rows that are ignored.

    Attributes:
        hidden: (N, D).
        weight: (V, D), in the dtype of ``hidden``.
        targets: (N,), int64, each in [0, V).
        transform: how products x·w become logits.
        backend: which functions take the moments and the gradients.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    transform: Logits
    backend: Backend

    @property
    def columns(self) -> int:
        """V."""
        return self.weight.shape[0]


class Kept(NamedTuple):
    """The rows whose target is not ignored, among N."""

    rows: Tensor
    total: int

    def spread(self, values: Tensor, dim: int = -1, fill: float = 0) -> Tensor:
        """Widen a dimension of values from the kept rows to all N."""
        if self.rows.numel() == self.total:
            return values
        shape = list(values.shape)
        shape[dim] = self.total
        return values.new_full(shape, fill).index_copy_(dim, self.rows, values)


def choose_backend(device: torch.device, dtype: torch.dtype, size: int) -> Backend:
    """Choose the back end of a forward pass over ``size`` hidden dimensions."""
    if not triton_supported(device) or dtype == torch.float64:
        return "torch"
    return "fused" if size <= FUSED_UP_TO else "chunked"


def _prepare(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    transform: Logits,
    ignore_index: int,
    backend: str,
) -> tuple[Head, Kept]:
    """Leave out the ignored rows, which waits for the device to tell them."""
    kept = targets != ignore_index
    taking_part = kept.nonzero()[:, 0]
    if taking_part.numel() < targets.numel():
        hidden, targets = hidden[taking_part], targets[taking_part]
    chosen = backend or choose_backend(hidden.device, hidden.dtype, hidden.shape[1])
    head = Head(hidden, weight, targets, transform, cast(Backend, chosen))
    return head, Kept(taking_part, kept.numel())


def _check_targets(targets: Tensor, columns: int, ignore_index: int) -> None:
    wrong = (targets != ignore_index) & ((targets < 0) | (targets >= columns))
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target {int(targets[row])} of row {row} is not in [0, {columns}), the "
            f"vocabulary, and is not the ignore_index {ignore_index}"
        )


def _row_functions(backend: Backend) -> ModuleType:
    if backend == "torch":
        return rows
    return importlib.import_module("ftlib.kernels.vocabulary_head")


def tile_rows(head: Head) -> int:
    """Return how many rows of logits fit in the workspace; at least one."""
    itemsize = head.hidden.dtype.itemsize
    if head.backend == "torch":
        itemsize = TWIN_COPIES * rows.accumulator(head.hidden.dtype).itemsize
    fit = max(1, WORKSPACE_BYTES // (itemsize * head.columns))
    return fit - fit % MATMUL_ROWS if fit > MATMUL_ROWS else fit


def _tiles(head: Head) -> Iterator[tuple[slice, Tensor]]:
    """Give the rows of each tile, as a slice, with the tile (n, V)."""
    step = tile_rows(head)
    for start in range(0, head.hidden.shape[0], step):
        part = slice(start, start + step)
        yield part, head.hidden[part] @ head.weight.T


# --- passes over the tiles -----------------------------------------------------


def _empty_results(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return room for the statistics (6, N), and an argmax (N,) of −1."""
    shape = (len(Statistics._fields), len(hidden))
    values = hidden.new_empty(shape, dtype=rows.accumulator(hidden.dtype))
    return values, torch.full_like(targets, -1)


def _statistics(head: Head, flags: MomentFlags) -> tuple[Tensor, Tensor]:
    """Return all statistics, stacked (6, N), and the argmax (N,), −1 if not flagged."""
    if head.backend == "fused":
        return _fused_statistics(head, flags)
    values, argmax = _empty_results(head.hidden, head.targets)
    for part, tile in _tiles(head):
        moments, found = _tile_statistics(head, part, tile, flags)
        values[:, part] = torch.stack(found)
        if moments.argmax is not None:
            argmax[part] = moments.argmax
    return values, argmax


def _fused_statistics(head: Head, flags: MomentFlags) -> tuple[Tensor, Tensor]:
    kernels = _row_functions(head.backend)
    parts = kernels.fused_moments(head.hidden, head.weight, head.transform, flags)
    target = kernels.target_logits(
        head.hidden, head.weight, head.targets, head.transform
    )
    moments = rows.merge_moments(parts)
    argmax = moments.argmax
    if argmax is None:
        argmax = torch.full_like(head.targets, -1)
    return torch.stack(from_moments(moments, target, head.columns)), argmax


def _tile_statistics(
    head: Head, part: slice, tile: Tensor, flags: MomentFlags
) -> tuple[Moments, Statistics]:
    moments = _row_functions(head.backend).row_moments(tile, head.transform, flags)
    product = tile.gather(1, head.targets[part, None])[:, 0]
    target = rows.to_logits(product, head.transform)
    return moments, from_moments(moments, target, head.columns)


# --- SCED ------------------------------------------------------------------------


class TileSced(NamedTuple):
    """SCED over the rows of a tile.

    Attributes:
        value: Σ f(p), shape (n,).
        rest: Σ p·f'(p) over all columns but the argmax, shape (n,).
        argmax: the column of the largest logit, shape (n,).
        term: what the gradient of a column takes.
    """

    value: Tensor
    rest: Tensor
    argmax: Tensor
    term: Sced


def _tile_sced(
    head: Head, tile: Tensor, moments: Moments, weights: Tensor, loss: TokenLoss
) -> TileSced:
    """Sum f and p·f' over a tile; R gets back the argmax column, where u = −log s."""
    assert moments.argmax is not None
    log_sum = moments.log_sum
    value, rest = _row_functions(head.backend).row_sced(
        tile,
        moments.maximum,
        log_sum,
        moments.argmax,
        loss.alpha,
        loss.beta,
        head.transform,
    )
    slope = rows.sced_slope(-log_sum, head.columns, loss.alpha, loss.beta)
    mean_slope = rest + slope / moments.sum_exp
    term = Sced(loss.sced * weights, mean_slope, loss.alpha, loss.beta)
    return TileSced(value, rest, moments.argmax, term)


# --- gradients -----------------------------------------------------------------


class HeadGradient:
    """Accumulates the gradients by ``hidden`` and ``weight`` over tiles.

    Each tile gives whole rows of the first, in one matmul. The second is summed over
    tiles in float32, since sums rounded to bf16 at each tile drift.
    """

    def __init__(self, head: Head, need_hidden: bool, need_weight: bool) -> None:
        self.head = head
        self.hidden = torch.empty_like(head.hidden) if need_hidden else None
        total = rows.accumulator(head.weight.dtype)
        self.weight = (
            torch.zeros_like(head.weight, dtype=total) if need_weight else None
        )

    def add(self, part: slice, tile: Tensor) -> None:
        """Add what a tile that holds d loss / d(x·w) contributes."""
        if self.hidden is not None:
            self.hidden[part] = tile @ self.head.weight
        if self.weight is not None:
            _add_product_(self.weight, tile.T, self.head.hidden[part])

    def results(self, kept: Kept) -> tuple[Tensor, Tensor]:
        """Return both gradients, an empty tensor for one that is not needed."""
        hidden, weight = self.hidden, self.weight
        nothing = self.head.hidden.new_empty  # each its own: results may not alias
        return (
            nothing(0) if hidden is None else kept.spread(hidden, dim=0),
            nothing(0) if weight is None else weight.to(self.head.weight.dtype),
        )


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to a total of higher precision, without rounding the product."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def _differentiate_(
    head: Head,
    part: slice,
    tile: Tensor,
    moments: Moments,
    at: Statistics,
    upstream: Statistics,
    sced: TileSced | None = None,
) -> None:
    """Overwrite a tile of products x·w with d loss / d(x·w).

    The probabilities come from the tile's own moments, so that they add up to one
    however the products were rounded.
    """
    gradient = logit_gradient(at, upstream, head.columns)
    log_sum = moments.log_sum
    targets = head.targets[part, None]
    columns = targets
    if sced is not None:
        columns = torch.cat((targets, sced.argmax[:, None]), dim=1)
    products = tile.gather(1, columns)
    _row_functions(head.backend).row_gradient_(
        tile,
        moments.maximum,
        log_sum,
        gradient.coefficients,
        head.transform,
        None if sced is None else sced.term,
    )
    z = rows.to_logits(products, head.transform)
    u = z - moments.maximum[:, None] - log_sum[:, None]
    dz = _target_gradient(u, columns == targets, gradient)
    if sced is not None:
        dz += _sced_gradient(u, columns, head.columns, sced)
    dz = dz * rows.slope(z, head.transform)
    tile.scatter_(1, columns, dz.to(tile.dtype))


def _target_gradient(log_p: Tensor, is_target: Tensor, gradient: Gradient) -> Tensor:
    """Return ``p(A + Bu + Cp + Eu²) + F + g·1[y]`` in columns (n, k) that may be y.

    −g is part of A, and g(1 − p) is written without the difference: at p → 1 it is
    all that is left of the cross-entropy's gradient.
    """
    g = gradient.target[:, None] * is_target
    A, *others = gradient.coefficients[:, :, None].expand(-1, -1, log_p.shape[1])
    coefficients = torch.stack((A + g, *others))
    return rows.smooth_gradient(log_p, coefficients) - g * torch.expm1(log_p)


def _sced_gradient(
    log_p: Tensor, columns: Tensor, vocabulary: int, sced: TileSced
) -> Tensor:
    """Return λp(f'(p) − R) in columns (n, k), exact in the argmax column too.

    There f' − R = (1−p)f' − Σ p·f' over the others, which stays finite as p → 1.
    """
    term = sced.term
    of_f = (log_p, vocabulary, term.alpha, term.beta)
    difference = torch.where(
        columns == sced.argmax[:, None],
        rows.sced_slope_by_complement(*of_f) - sced.rest[:, None],
        rows.sced_slope(*of_f) - term.mean_slope[:, None],
    )
    return term.weight[:, None] * log_p.exp() * difference


# --- registered passes -----------------------------------------------------------


@torch.library.custom_op("ftlib::vocabulary_statistics", mutates_args=())
def statistics_pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    flags: list[bool],
    scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the statistics (6, N) and the argmax (N,) of N rows.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,), int64.
        flags: a :class:`MomentFlags`.
        scale: multiplies x·w.
        softcap: of the logits, if they have one.
        ignore_index: the target of rows that are left out: their statistics are 0,
            their argmax is −1.
        backend: a ``Backend``, or "" to choose one.
    """
    _check_targets(targets, len(weight), ignore_index)
    head, kept = _prepare(
        hidden, weight, targets, Logits(scale, softcap), ignore_index, backend
    )
    values, argmax = _statistics(head, MomentFlags(*flags))
    return kept.spread(values), kept.spread(argmax, fill=-1)


@statistics_pass.register_fake
def _(hidden, weight, targets, flags, scale, softcap, ignore_index, backend):  # type: ignore[no-untyped-def]
    return _empty_results(hidden, targets)


@torch.library.custom_op("ftlib::vocabulary_gradient", mutates_args=())
def gradient_pass(  # noqa: D417
    upstream: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    flags: list[bool],
    scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Return Σ upstream · statistic differentiated by ``hidden`` and ``weight``.

    Args:
        upstream: (6, N).
        need_hidden: whether the first result is wanted; it is empty if not.
        need_weight: likewise the second.

    The other arguments are those of :func:`statistics_pass`.
    """
    head, kept = _prepare(
        hidden, weight, targets, Logits(scale, softcap), ignore_index, backend
    )
    wanted = MomentFlags(*flags)._replace(total=False, argmax=False)
    gradient = HeadGradient(head, need_hidden, need_weight)
    upstream = upstream[:, kept.rows]
    for part, tile in _tiles(head):
        moments, at = _tile_statistics(head, part, tile, wanted)
        _differentiate_(head, part, tile, moments, at, Statistics(*upstream[:, part]))
        gradient.add(part, tile)
    return gradient.results(kept)


@gradient_pass.register_fake
def _(upstream, hidden, weight, *arguments):  # type: ignore[no-untyped-def]
    return _fake_gradients(hidden, weight, *arguments[-2:])


def _fake_gradients(
    hidden: Tensor, weight: Tensor, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if need_hidden else hidden.new_empty(0),
        torch.empty_like(weight) if need_weight else hidden.new_empty(0),
    )


def _save_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, targets, *ctx.settings = inputs
    ctx.save_for_backward(hidden, weight, targets)


def _statistics_backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Any, ...]:
    needed = ctx.needs_input_grad[:2]
    hidden, weight = gradient_pass(upstream, *ctx.saved_tensors, *ctx.settings, *needed)
    return (
        hidden if needed[0] else None,
        weight if needed[1] else None,
        *(None,) * (1 + len(ctx.settings)),
    )


statistics_pass.register_autograd(
    _statistics_backward, setup_context=_save_for_gradient
)


@torch.library.custom_op("ftlib::vocabulary_loss", mutates_args=())
def loss_pass(  # noqa: D417
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    weights: Tensor,
    loss: list[float],
    flags: list[bool],
    scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
    need_hidden: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a loss, summed over N rows, with its gradients.

    Args:
        weights: the factor of each row's loss, shape (N,).
        loss: the fields of a :class:`TokenLoss`.
        need_hidden: whether the gradient by ``hidden`` is wanted; it is empty if not.
        need_weight: likewise by ``weight``.

    The other arguments are those of :func:`statistics_pass`.

    Returns:
        The summed loss (), each row's loss (N,), the statistics (6, N), the argmax
        (N,), and the gradients of the summed loss by ``hidden`` and ``weight``.
    """
    _check_targets(targets, len(weight), ignore_index)
    head, kept = _prepare(
        hidden, weight, targets, Logits(scale, softcap), ignore_index, backend
    )
    token_loss = TokenLoss(*loss)
    wanted = token_loss.moments(MomentFlags(*flags))
    gradient = HeadGradient(head, need_hidden, need_weight)
    weights = weights[kept.rows]
    values, argmax = _empty_results(head.hidden, head.targets)
    losses = torch.empty_like(values[0])
    for part, tile in _tiles(head):
        moments, at = _tile_statistics(head, part, tile, wanted)
        w = weights[part]
        sced = None
        if token_loss.sced:
            sced = _tile_sced(head, tile, moments, w, token_loss)
        value = token_loss.value(at, sced.value if sced else 0.0, head.columns)
        losses[part] = w * value
        values[:, part] = torch.stack(at)
        if moments.argmax is not None:
            argmax[part] = moments.argmax
        if need_hidden or need_weight:
            upstream = Statistics(*(w * g for g in token_loss.partials(at)))
            _differentiate_(head, part, tile, moments, at, upstream, sced)
            gradient.add(part, tile)
    return (
        losses.sum(),
        kept.spread(losses),
        kept.spread(values),
        kept.spread(argmax, fill=-1),
        *gradient.results(kept),
    )


@loss_pass.register_fake
def _(hidden, weight, targets, *arguments):  # type: ignore[no-untyped-def]
    values, argmax = _empty_results(hidden, targets)
    return (
        values.new_empty(()),
        values.new_empty(len(hidden)),
        values,
        argmax,
        *_fake_gradients(hidden, weight, *arguments[-2:]),
    )


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*output[-2:])
    ctx.arguments = len(inputs)


def _loss_backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Any, ...]:
    found = (
        (upstream * gradient).to(gradient.dtype) if needed else None
        for gradient, needed in zip(
            ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True
        )
    )
    return (*found, *(None,) * (ctx.arguments - 2))


loss_pass.register_autograd(_loss_backward, setup_context=_save_gradients)
