"""AdamW over slices of weights: the rows and columns of chosen heads, and norms.

Where only some heads of a projection are trained, masking the gradient of the others
and giving the whole matrix to AdamW is wrong. A zero gradient is not a zero step:
weight decay shrinks the masked weights, and moments from before the mask push them on.
It is also slow, for the step reads and writes every weight and two moments of each.

:class:`HeadAdamW` keeps moments for the selected weights alone and touches no other:
those stay equal bit for bit. Backward passes still give a whole parameter its gradient,
so gradients that are clipped by their norm should be made in :func:`.training_only`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ftlib.ops.backends import (
    Backend,
    check_backend,
    common_device,
    kernels_of,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class WeightSlice(NamedTuple):
    """Some rows or columns of a parameter, next to one another.

    Attributes:
        parameter: a vector or a matrix.
        dim: along which it is cut: 0 for rows (or the elements of a vector), 1 for
            columns.
        start: the first of them.
        stop: one past the last.
    """

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int


Slices = Sequence[WeightSlice | nn.Parameter]


class Block(NamedTuple):
    """Slices of one parameter that lie next to one another, as one.

    Attributes:
        parameter: the number of the parameter, in the order of first mention.
        dim: as in :class:`WeightSlice`.
        start: likewise.
        stop: likewise.
        state: elements of the moments that come before this block's.
    """

    parameter: int
    dim: int
    start: int
    stop: int
    state: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the block's part of a tensor that is shaped as its parameter."""
        return tensor.narrow(self.dim, self.start, self.stop - self.start)


@contextmanager
def training_only(model: nn.Module, slices: Slices) -> Iterator[None]:
    """Give gradients to nothing but some slices, as long as the block lasts.

    Parameters without a slice do not require a gradient, which saves the backward pass
    their matmuls. In those with one, the gradient outside the slices is set to zero as
    soon as it is made. Gradient norms over ``model.parameters()``, and clipping by
    them, then count what :class:`HeadAdamW` moves and nothing else; otherwise they
    would count the whole matrices, and clip the slices by several times too much.

    Gradients from before the block are dropped. After it, every parameter requires a
    gradient again if it did before.

    Args:
        model: the model.
        slices: as for :class:`HeadAdamW`.

    Raises:
        ValueError: a slice is not of this model, or as for :class:`HeadAdamW`.
    """
    parameters, blocks = _merged(slices)
    required = {p: p.requires_grad for p in model.parameters()}
    if any(p not in required for p in parameters):
        raise ValueError(
            "a slice is of a parameter that the model does not have: make the slices "
            "from this model"
        )
    for parameter in required:
        parameter.grad = None
        parameter.requires_grad_(False)
    hooks = []
    for i, parameter in enumerate(parameters):
        own = [block for block in blocks if block.parameter == i]
        hook = _zero_outside(own, parameter.shape[own[0].dim])
        parameter.requires_grad_(True)
        hooks.append(parameter.register_post_accumulate_grad_hook(hook))
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
        for parameter, was_required in required.items():
            parameter.requires_grad_(was_required)


def _zero_outside(blocks: Sequence[Block], size: int) -> Callable[[Tensor], None]:
    """Return a hook that zeroes a parameter's gradient between its blocks."""
    starts, stops = zip(*(block[2:4] for block in blocks), strict=True)
    edges = zip((0, *stops), (*starts, size), strict=True)
    gaps = [blocks[0]._replace(start=a, stop=b) for a, b in edges if a < b]

    @torch.no_grad()
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for gap in gaps:
            gap.of(parameter.grad).zero_()

    return hook


class HeadAdamW(Optimizer):
    """AdamW that moves slices of parameters and leaves the rest of them untouched.

    With gradient g, t counting the steps of its parameter and t = 1 the first::

        m ← β₁m + (1 − β₁)g          v ← β₂v + (1 − β₂)g²
        w ← (1 − lr·λ)w − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

    as :class:`torch.optim.AdamW` (Loshchilov and Hutter, 2019) would for the slices
    alone. All is computed in float32 (float64 if a parameter is float64), in which the
    moments are kept, and a weight is rounded once. A parameter whose gradient is
    ``None`` is skipped, and its t with it.

    There is one parameter group. Schedulers, :func:`ftlib.training.train` and
    checkpoints take this optimiser as any other; :func:`training_only` makes gradient
    norms right. Its ``state_dict`` holds the moments of the slices, flat, and fits an
    optimiser of the same slices only.

    Args:
        slices: of parameters on one device; a parameter stands for all of itself.
            Slices that are next to one another are merged.
        lr: learning rate.
        betas: β₁ and β₂, decay of the moments.
        eps: ε.
        weight_decay: λ, decoupled.
        backend: ``torch`` or ``triton``; by default Triton, in one launch for each
            dtype, on GPUs of compute capability 8.0 and up unless a parameter is
            float64. On CPU tensors Triton runs only under ``TRITON_INTERPRET=1``, and
            never in bf16.

    Raises:
        ValueError: there are no slices, one is out of range, two overlap, a parameter
            cannot be optimised, or a setting is out of its range.
    """

    def __init__(
        self,
        slices: Slices,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        backend: Backend | None = None,
    ) -> None:
        _check_settings(lr, betas, eps, weight_decay, backend)
        parameters, self._blocks = _merged(slices)
        self._backend = backend
        self._addresses: list[int] = []
        self._tables: list[Any] | None = None
        self._steps = torch.zeros(0, dtype=torch.int64)
        # What a state must agree with to be loaded.
        shapes = [list(parameter.shape) for parameter in parameters]
        saved = [[*block, shapes[block.parameter]] for block in self._blocks]
        super().__init__(
            [{"params": parameters, "slices": saved}],
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError(
                "HeadAdamW has one parameter group: give it all slices when it is made"
            )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimiser of the same slices.

        Raises:
            ValueError: the slices are others.
        """
        (saved,), (group,) = state_dict["param_groups"], self.param_groups
        if saved.get("slices") != group["slices"]:
            raise ValueError(
                "the state is of other slices than this optimiser's: make HeadAdamW "
                "with the slices that it was saved with"
            )
        # The base class would round the moments to the dtype of the weights.
        super().load_state_dict({**state_dict, "state": {}})
        self._steps = self._steps[:0]
        if state_dict["state"]:
            self._allocate()
        for index, entries in state_dict["state"].items():
            for name, value in self.state[self._parameters[index]].items():
                value.copy_(entries[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: makes the gradients anew and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError: a gradient is sparse, the weights are on several devices or
                have left that of their moments, or the back end that was asked for
                cannot take them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grads = [parameter.grad for parameter in self._parameters]
        _check_dense(grads)
        self._find_weights()
        self._steps += torch.tensor([grad is not None for grad in grads])
        group = self.param_groups[0]
        rates = _rates(self._steps.numpy(), group["lr"], group["betas"])
        decay = 1 - group["lr"] * group["weight_decay"]
        move = self._move if self._tables is None else self._launch
        move(grads, rates, decay=decay, betas=group["betas"], eps=group["eps"])
        return loss

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return self.param_groups[0]["params"]

    def _move(
        self, grads: Sequence[Tensor | None], rates: np.ndarray, **terms: Any
    ) -> None:
        """Take the step block by block."""
        for block in self._blocks:
            i = block.parameter
            if (grad := grads[i]) is None:
                continue
            weights = block.of(self._parameters[i])
            part = slice(block.state, block.state + weights.numel())
            exp_avg, exp_avg_sq = (m[part].view_as(weights) for m in self._moments)
            step_size, root = rates[i].tolist()
            adamw_(
                weights,
                block.of(grad),
                exp_avg,
                exp_avg_sq,
                step_size=step_size,
                root=root,
                **terms,
            )

    def _launch(
        self, grads: Sequence[Tensor | None], rates: np.ndarray, **terms: Any
    ) -> None:
        """Take the step of all blocks in one launch for each dtype."""
        # They are, but for one that was made by hand.
        laid_out = [
            g if g is None or (g.stride(), g.dtype) == layout else _laid_out(g, *layout)
            for g, layout in zip(grads, self._layouts, strict=True)
        ]
        addresses = [0 if g is None else g.data_ptr() for g in laid_out]
        kernels = importlib.import_module("ftlib.kernels.head_adamw")
        kernels.adamw_(
            self._tables, self._addresses, addresses, rates, *self._moments, **terms
        )
        # Autograd does not see what a kernel writes.
        pairs = zip(self._parameters, grads, strict=True)
        torch.autograd.graph.increment_version([p for p, g in pairs if g is not None])

    def _find_weights(self) -> None:
        """Allocate the state at the first step; make new tables when weights moved."""
        if not len(self._steps):
            self._allocate()
        addresses = [parameter.data_ptr() for parameter in self._parameters]
        if addresses == self._addresses:
            return
        if (device := common_device(self._parameters)) != self._moments.device:
            raise ValueError(
                f"the weights are on {device} and their moments on "
                f"{self._moments.device}: move the model before the first step"
            )
        kernels = kernels_of("head_adamw", self._backend, self._parameters)
        self._tables = self._make_tables(kernels) if kernels else None
        self._layouts = [(p.stride(), p.dtype) for p in self._parameters]
        self._addresses = addresses

    def _make_tables(self, kernels: ModuleType) -> list[Any]:
        """Tell the kernel where the blocks are."""
        pieces = []
        for block in self._blocks:
            parameter = self._parameters[block.parameter]
            part = block.of(parameter)
            offset = part.storage_offset() - parameter.storage_offset()
            pieces.append(kernels.Piece(block.parameter, part, offset, block.state))
        return kernels.make_tables(pieces, self._moments.device)

    def _allocate(self) -> None:
        """Set all steps and moments to zero; the state has parts of these tensors."""
        sizes = [0] * len(self._parameters)
        for block in self._blocks:
            part = block.of(self._parameters[block.parameter])
            sizes[block.parameter] += part.numel()
        dtypes = {parameter.dtype for parameter in self._parameters}
        self._moments = torch.zeros(
            (2, sum(sizes)),
            dtype=torch.float64 if torch.float64 in dtypes else torch.float32,
            device=common_device(self._parameters),
        )
        self._steps = torch.zeros(len(sizes), dtype=torch.int64)
        parts = (moments.split(sizes) for moments in self._moments)
        for parameter, *values in zip(
            self._parameters, self._steps, *parts, strict=True
        ):
            names = ("step", "exp_avg", "exp_avg_sq")
            self.state[parameter] = dict(zip(names, values, strict=True))


# --- twin: the specification, and the path of everything but a recent GPU -------------


def adamw_(
    weights: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step_size: float,
    root: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take a step in place, in the precision of the moments; weights round once.

    Args:
        weights: any shape and strides, float.
        grad: shape of ``weights``, float.
        exp_avg: m, shape of ``weights``, float32 or float64.
        exp_avg_sq: v, likewise.
        step_size: lr / (1 − β₁ᵗ).
        root: √(1 − β₂ᵗ).
        decay: 1 − lr·λ.
        betas: β₁ and β₂.
        eps: ε.
    """
    beta1, beta2 = betas
    wide, grad = weights.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(root).add_(eps)
    wide.mul_(decay).addcdiv_(exp_avg, denominator, value=-step_size)
    if wide is not weights:
        weights.copy_(wide)


def _rates(steps: np.ndarray, lr: float, betas: tuple[float, float]) -> np.ndarray:
    """Return lr / (1 − β₁ᵗ) and √(1 − β₂ᵗ) of each parameter, shape (parameters, 2)."""
    # Where t = 0 there is no step yet, and any numbers do.
    beta1_t, beta2_t = (beta ** np.maximum(steps, 1) for beta in betas)
    return np.stack((lr / (1 - beta1_t), np.sqrt(1 - beta2_t)), axis=1)


# --- arguments ---------------------------------------------------------------------


def _merged(slices: Slices) -> tuple[list[nn.Parameter], list[Block]]:
    """Check slices; return their parameters and, parameter by parameter, blocks."""
    cuts: dict[nn.Parameter, list[WeightSlice]] = {}
    for given in slices:
        if isinstance(given, Tensor):
            _check_parameter(given)
            given = WeightSlice(given, 0, 0, len(given))
        _check_slice(given)
        cuts.setdefault(given.parameter, []).append(given)
    if not cuts:
        raise ValueError("there are no slices: select a head or a parameter to train")
    blocks: list[Block] = []
    state = 0
    for i, (parameter, own) in enumerate(cuts.items()):
        for cut in _joined(own):
            blocks.append(Block(i, cut.dim, cut.start, cut.stop, state))
            state += blocks[-1].of(parameter).numel()
    return list(cuts), blocks


def _joined(cuts: Sequence[WeightSlice]) -> list[WeightSlice]:
    """Return slices of one parameter in order, neighbours joined."""
    joined: list[WeightSlice] = []
    for cut in sorted(cuts, key=lambda cut: cut[1:]):
        last = joined[-1] if joined else None
        if last and (cut.dim != last.dim or cut.start < last.stop):
            raise ValueError(
                f"{_name(last)} and {_name(cut)} overlap: select each weight once"
            )
        if last and cut.start == last.stop:
            joined[-1] = last._replace(stop=cut.stop)
        else:
            joined.append(cut)
    return joined


def _name(cut: WeightSlice) -> str:
    """Name a slice as an error does."""
    kind = "columns" if cut.dim == 1 else "rows"
    shape = tuple(cut.parameter.shape)
    return f"{kind} {cut.start} to {cut.stop} of a parameter of shape {shape}"


def _check_parameter(parameter: Tensor) -> None:
    shape = tuple(parameter.shape)
    if not parameter.is_leaf:
        raise ValueError(
            f"a tensor of shape {shape} is no leaf: take the parameters of a model, "
            "not what was computed from them"
        )
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"a parameter of shape {shape} is {parameter.dtype}: HeadAdamW takes "
            "float32, bfloat16, float16 and float64"
        )
    if parameter.ndim not in (1, 2):
        raise ValueError(
            f"a parameter has shape {shape}: HeadAdamW takes vectors and matrices"
        )


def _check_slice(cut: WeightSlice) -> None:
    _check_parameter(cut.parameter)
    dims = cut.parameter.ndim
    if cut.dim not in range(dims):
        raise ValueError(
            f"a slice along dimension {cut.dim} of a parameter of shape "
            f"{tuple(cut.parameter.shape)}: choose 0" + (" or 1" if dims == 2 else "")
        )
    size = cut.parameter.shape[cut.dim]
    if not 0 <= cut.start < cut.stop <= size:
        raise ValueError(
            f"{_name(cut)} are not there or none: expected 0 ≤ start < stop ≤ {size}"
        )


def _check_settings(
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    backend: str | None,
) -> None:
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name} is {value}: it must be at least 0")
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas are {betas}: both must be at least 0 and below 1")
    check_backend(backend)


def _check_dense(grads: Sequence[Tensor | None]) -> None:
    if any(g is not None and g.layout is not torch.strided for g in grads):
        raise ValueError("a gradient is sparse: make its embedding with sparse=False")


def _laid_out(grad: Tensor, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a copy of a gradient that is laid out in memory as asked."""
    copy = torch.empty_strided(grad.shape, stride, dtype=dtype, device=grad.device)
    return copy.copy_(grad)
