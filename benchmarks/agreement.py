"""What every head is given, and what its outputs must agree with."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from typing import Any, Literal, NamedTuple

import torch
from peers import LOSSES, Outputs, Problem, load_plain
from torch import Tensor

from ftlib import runtime

Data = Literal["peaked", "flat"]

# Allowed beyond what the plain head's own error allows, since that can be small by
# chance (a loss is a single number). A hundred columns too many in 32,128 show more.
FLOOR = 2e-4

# Logits that exist at once while a reference is made.
ELEMENTS = 2**27

NOISE = 1.5
MARGIN, MARGIN_SPREAD = 1.8, 3.0


class Size(NamedTuple):
    """N tokens, hidden size D and a vocabulary of V columns."""

    tokens: int
    hidden: int
    columns: int

    def __str__(self) -> str:
        return f"N {self.tokens}, D {self.hidden}, V {self.columns}"

    @property
    def matmul(self) -> float:
        """Operations of the product of hidden states and weight."""
        return 2.0 * self.tokens * self.hidden * self.columns


@functools.lru_cache(maxsize=1)
def make_problem(size: Size, data: Data) -> Problem:
    """Return hidden states, weight, targets and upstream gradients.

    ``flat`` is a head at its start: weights of standard deviation 0.02, normal hidden
    states, any target. In ``peaked`` a hidden state is noise, which makes logits of
    standard deviation 1.5, plus so much of its target's row that the target leads all
    the others together by a margin from N(1.8, 3²), in log-odds: the mean of the
    largest probability is then about 0.7, and the target is mostly the top token.
    """
    device = runtime.device()
    n, d, v = size
    generator = torch.Generator(device).manual_seed(0)
    drawn: dict[str, Any] = {"generator": generator, "device": device}
    targets = torch.randint(v, (n,), **drawn)
    upstream = torch.randn(2, n, **drawn)
    hidden, weight = torch.randn(n, d, **drawn), torch.randn(v, d, **drawn)
    if data == "flat":
        weight *= 0.02
    else:
        weight *= d**-0.5
        hidden *= NOISE
        margin = MARGIN + MARGIN_SPREAD * torch.randn(n, **drawn)
        hidden += _towards(weight[targets], hidden, margin, v)
    dtype = runtime.precision(device).dtype
    return Problem(hidden.to(dtype), weight.to(dtype), targets, upstream)


def _towards(rows: Tensor, hidden: Tensor, margin: Tensor, columns: int) -> Tensor:
    """Return what to add to hidden states, so that their targets lead by a margin.

    The other logits are normal; their variance is that of the noise, and of the
    target's row on all others, which is as long as its logit.
    """
    log_columns = math.log(columns)
    variance = NOISE**2 + (log_columns + MARGIN + NOISE**2 / 2) ** 2 / rows.shape[1]
    log_sum_exp = log_columns + variance / 2
    missing = log_sum_exp + margin - (hidden * rows).sum(1)
    return (missing / rows.square().sum(1))[:, None] * rows


def in_rows(task: str, problem: Problem, dtype: torch.dtype) -> Outputs:
    """Do a task with the plain head in a dtype, some rows at a time."""
    run = load_plain(problem.hidden.device)[task]
    count = len(problem.hidden)
    weight = problem.weight.to(dtype)
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    step = max(1, ELEMENTS // len(weight))
    for start in range(0, count, step):
        part = slice(start, start + step)
        hidden, targets = problem.hidden[part].to(dtype), problem.targets[part]
        found = run(Problem(hidden, weight, targets, problem.upstream[:, part]))
        share = len(hidden) / count if task in LOSSES else 1
        for name, value in found.items():
            parts[name].append(value * share if value.is_floating_point() else value)
    return {name: _joined(name, values) for name, values in parts.items()}


def _joined(name: str, values: list[Tensor]) -> Tensor:
    if name not in ("loss", "grad_weight"):
        return torch.cat(values)
    wide = torch.promote_types(values[0].dtype, torch.float32)
    return functools.reduce(torch.add, (value.to(wide) for value in values))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return ‖found − exact‖ / ‖exact‖, ∞ for NaN; of indices, how many differ."""
    if not found.is_floating_point():
        return float((found != exact).double().mean())
    difference = torch.linalg.vector_norm(found.to(exact.dtype) - exact)
    error = float(difference / torch.linalg.vector_norm(exact))
    return math.inf if math.isnan(error) else error


class Reference(NamedTuple):
    """The outputs of a task in a wider dtype, and the error that each is allowed."""

    outputs: Outputs
    allowed: dict[str, float]

    def errors(self, found: Outputs) -> dict[str, float]:
        """Return the relative error of each output."""
        return {
            name: relative_error(value, self.outputs[name])
            for name, value in found.items()
        }

    def differing(self, found: Outputs) -> list[str]:
        """Return the outputs whose error rounding does not explain.

        One that was rounded to a narrow dtype is allowed half its last digit.
        """
        return [
            name
            for name, error in self.errors(found).items()
            if error > self.allowed[name] + _half_digit(found[name])
        ]


def _half_digit(value: Tensor) -> float:
    return torch.finfo(value.dtype).eps / 2 if value.is_floating_point() else 0.0


def make_reference(task: str, problem: Problem) -> Reference:
    """Do a task with the plain head in a wider dtype, and in the problem's own.

    A head may err twice as much as the plain one that computes in the same dtype.
    """
    dtype = problem.hidden.dtype
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    exact, plain = in_rows(task, problem, wide), in_rows(task, problem, dtype)
    allowed = {
        name: 2 * relative_error(plain[name], value) + FLOOR
        for name, value in exact.items()
    }
    return Reference(exact, allowed)
