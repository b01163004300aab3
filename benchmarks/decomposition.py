"""Time of contextual decomposition with one stream, beside two streams in plain torch.

    python benchmarks/decomposition.py [--scale cpu|gpu]

Each operation is timed alone, at the sizes of GPT-2 small, and judged by the bytes it
has to move at the rate of a plain copy on the same device. Then a whole block with the
published rules (β-softmax, bias split, clean-up of the MLP and of the block). What is
compared are our back ends, in the precision of the device, and two streams in float32,
as the released code has them: both parts through every module, nothing fused. All are
checked against two streams in float64 on one source. Each arm leaves a record in
``book/results/decomposition/<scale>.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import typer
from measuring import Times, copy_rate, matmul_rate, scale_to_time, time_of
from torch import Tensor
from torch.nn import functional as F

from ftlib import runtime
from ftlib.ops.decomposition import (
    Backend,
    decomposed_activation,
    decomposed_gate,
    decomposed_linear,
    decomposed_norm,
    relevant_epilogue_,
)
from ftlib.results import Metric, Record, append, markdown_table

EPS, HEAD = 1e-5, 64
TWO_STREAMS = "two streams"
TASKS = ("norm", "activation", "gate", "epilogue", "block")


class Size(NamedTuple):
    """How many sources are propagated through what."""

    sources: int
    prompts: int
    length: int
    width: int

    def __str__(self) -> str:
        return "{}×{}×{}, D={}".format(*self)


SIZES = {"gpu": Size(144, 64, 16, 768), "cpu": Size(8, 4, 16, 768)}

Streams = tuple[Tensor, Tensor]
Layer = tuple[Tensor, Tensor]


class Problem(NamedTuple):
    """Inputs and weights of a block; β is (S, B, T, D) and t (B, T, D).

    ``wide`` and ``wide_total`` are those of an MLP's inner width. Weights and biases
    lie apart, so that the rows of a weight are aligned.
    """

    relevant: Tensor
    total: Tensor
    norms: Tensor
    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    biases: Tensor
    wide: Tensor
    wide_total: Tensor

    def layers(self) -> list[Layer]:
        """Return the four linear layers, each with its bias."""
        weights = [self.qkv, self.out, self.up, self.down]
        biases = self.biases.split([len(weight) for weight in weights])
        return list(zip(weights, biases, strict=True))

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the same in another dtype."""
        return Problem(*(tensor.to(dtype) for tensor in self))

    def first(self) -> Problem:
        """Return a copy with the first source alone."""
        beta, wide = self.relevant[:1].clone(), self.wide[:1].clone()
        return self._replace(relevant=beta, wide=wide)


def make_problem(size: Size) -> Problem:
    """Draw a block and what goes through it."""
    S, B, T, D = size
    device = runtime.device()
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator, device=device)

    return Problem(
        relevant=draw(S, B, T, D, scale=0.3),
        total=draw(B, T, D),
        norms=1 + draw(2, 2, D, scale=0.1),
        qkv=draw(3 * D, D, scale=D**-0.5),
        out=draw(D, D, scale=D**-0.5),
        up=draw(4 * D, D, scale=D**-0.5),
        down=draw(D, 4 * D, scale=(4 * D) ** -0.5),
        biases=draw(9 * D, scale=0.1),
        wide=draw(S, B, T, 4 * D, scale=0.3),
        wide_total=draw(B, T, 4 * D),
    )


def attend(qkv: Tensor) -> Tensor:
    """Causal attention of (..., T, 3D)."""
    q, k, v = qkv.unflatten(-1, (3, -1, HEAD)).movedim(-3, 0).transpose(-2, -3)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return z.transpose(-2, -3).flatten(-2)


# --- one stream ----------------------------------------------------------------------


def one_stream(backend: Backend, p: Problem) -> Tensor:
    """Return the relevant part behind a block; all totals are computed once."""

    def norm(i: int, beta: Tensor, t: Tensor) -> Streams:
        weight, bias = p.norms[i]
        plain = F.layer_norm(t, t.shape[-1:], weight, bias, EPS)
        beta = decomposed_norm(beta, t, weight, bias, eps=EPS, backend=backend)
        return beta, plain

    def through(layer: Layer, beta: Tensor, t: Tensor, clean_up: bool) -> Streams:
        weight, bias = layer
        t = F.linear(t, weight, bias)
        beta = decomposed_linear(
            beta, t, weight, bias, clean_up=clean_up, backend=backend
        )
        return beta, t

    qkv, out, up, down = p.layers()
    beta, t = through(qkv, *norm(0, p.relevant, p.total), clean_up=False)
    beta, t = through(out, attend(beta), attend(t), clean_up=False)
    kept = beta.add_(p.relevant), t + p.total
    beta, t = through(up, *norm(1, *kept), clean_up=True)
    beta = decomposed_activation(beta, t, "gelu_tanh", backend=backend)
    t = F.gelu(t, approximate="tanh")
    beta, t = through(down, beta, t, clean_up=True)
    return relevant_epilogue_(
        beta.add_(kept[0]), t + kept[1], clean_up=True, backend=backend
    )


# --- two streams, as the published rules read ----------------------------------------


def split_bias(beta: Tensor, gamma: Tensor, bias: Tensor) -> Streams:
    whole = beta.abs() + gamma.abs()
    share = torch.where(whole == 0, 0, beta.abs() / whole)
    return bias * share, bias * (1 - share)


def two_norm(beta: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor) -> Streams:
    scale = ((beta + gamma).var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    shares = split_bias(beta, gamma, bias)
    return (
        (beta - beta.mean(-1, keepdim=True)) * scale * weight + shares[0],
        (gamma - gamma.mean(-1, keepdim=True)) * scale * weight + shares[1],
    )


def two_linear(beta: Tensor, gamma: Tensor, layer: Layer) -> Streams:
    weight, bias = layer
    beta, gamma = beta @ weight.T, gamma @ weight.T
    shares = split_bias(beta, gamma, bias)
    return beta + shares[0], gamma + shares[1]


def two_clean(beta: Tensor, gamma: Tensor) -> Streams:
    total, opposite = beta + gamma, beta * gamma < 0
    larger = beta.abs() >= gamma.abs()
    kept = torch.where(opposite, torch.where(larger, total, 0), beta)
    return kept, torch.where(opposite, torch.where(larger, 0, total), gamma)


def two_activation(beta: Tensor, gamma: Tensor) -> Streams:
    rest = F.gelu(gamma, approximate="tanh")
    return F.gelu(beta + gamma, approximate="tanh") - rest, rest


def two_gate(
    beta_g: Tensor, gamma_g: Tensor, beta_u: Tensor, gamma_u: Tensor
) -> Tensor:
    rest = F.silu(gamma_g) * gamma_u
    return F.silu(beta_g + gamma_g) * (beta_u + gamma_u) - rest


def two_streams(p: Problem, beta: Tensor, gamma: Tensor) -> Tensor:
    """Return the relevant part behind a block, with the irrelevant one beside it."""
    qkv, out, up, down = p.layers()
    parts = two_linear(*two_norm(beta, gamma, *p.norms[0]), qkv)
    z = attend(parts[0])
    parts = two_linear(z, attend(parts[0] + parts[1]) - z, out)
    beta, gamma = beta + parts[0], gamma + parts[1]
    parts = two_linear(*two_norm(beta, gamma, *p.norms[1]), up)
    parts = two_linear(*two_activation(*two_clean(*parts)), down)
    parts = two_clean(*parts)
    return two_clean(beta + parts[0], gamma + parts[1])[0]


# --- arms ----------------------------------------------------------------------------

Task = Callable[[], Tensor]


def one_stream_tasks(p: Problem, backend: Backend) -> dict[str, Task]:
    """Return what is timed of ours; the epilogue overwrites ``p.wide``."""
    up, norm, (_, bias) = p.wide.flip(0), p.norms[0], p.layers()[2]
    wide, t = p.wide, p.wide_total
    return {
        "norm": lambda: decomposed_norm(
            p.relevant, p.total, *norm, eps=EPS, backend=backend
        ),
        "activation": lambda: decomposed_activation(
            wide, t, "gelu_tanh", backend=backend
        ),
        "gate": lambda: decomposed_gate(wide, t, up, t, "silu", backend=backend),
        "epilogue": lambda: relevant_epilogue_(
            wide, t, bias, clean_up=True, backend=backend
        ),
        "block": lambda: one_stream(backend, p),
    }


def two_stream_tasks(p: Problem) -> dict[str, Task]:
    """Return the same with both streams, which are there before the clock starts."""
    beta, gamma = p.relevant, p.total - p.relevant
    wide, rest = p.wide, p.wide_total - p.wide
    up = p.wide.flip(0)
    up_rest = p.wide_total - up
    _, bias = p.layers()[2]
    before = rest - bias

    def epilogue() -> Tensor:
        shares = split_bias(wide, before, bias)
        return two_clean(wide + shares[0], before + shares[1])[0]

    return {
        "norm": lambda: two_norm(beta, gamma, *p.norms[0])[0],
        "activation": lambda: two_activation(wide, rest)[0],
        "gate": lambda: two_gate(wide, rest, up, up_rest),
        "epilogue": epilogue,
        "block": lambda: two_streams(p, beta, gamma),
    }


def moved_bytes(task: str, p: Problem) -> int | None:
    """Return the bytes that a task reads and writes at least; None for a block."""
    relevant, total = (
        (p.relevant, p.total) if task == "norm" else (p.wide, p.wide_total)
    )
    passes = {"norm": 2, "activation": 2, "gate": 3, "epilogue": 2}.get(task)
    if passes is None:
        return None
    return passes * relevant.nbytes + (passes - 1) * total.nbytes


class Measurement(NamedTuple):
    """What an arm did; ``error`` is relative to the norm of the reference."""

    times: Times
    error: float
    floor: float
    bytes: int | None


def measure(size: Size, arm: str, task: str, rates: tuple[float, float]) -> Measurement:
    """Check and time one arm at one task.

    Args:
        size: of the problem.
        arm: ``two streams``, or one of our back ends.
        task: a key of :func:`one_stream_tasks`.
        rates: bytes per second of a copy, operations per second of a matmul.
    """
    dtype = torch.float32 if arm == TWO_STREAMS else runtime.precision().dtype
    p = make_problem(size).to(dtype)

    def tasks(p: Problem) -> dict[str, Task]:
        if arm == TWO_STREAMS:
            return two_stream_tasks(p)
        return one_stream_tasks(p, "triton" if arm == "ours (triton)" else "torch")

    expected = two_stream_tasks(p.first().to(torch.float64))[task]()
    difference = tasks(p.first())[task]().double() - expected
    error = float(difference.norm() / expected.norm())
    times = time_of(tasks(p)[task])
    moved = moved_bytes(task, p.to(runtime.precision().dtype))
    rows = math.prod(size[:-1])
    floor = 24 * rows * size.width**2 / rates[1] if moved is None else moved / rates[0]
    return Measurement(times, error, 1000 * floor, moved)


# --- records and tables --------------------------------------------------------------


def record_of(size: Size, arm: str, task: str, found: Measurement) -> Record:
    """Return the record of an arm."""
    median, low, high, repeats = found.times
    metrics = {
        "milliseconds": Metric(median, repeats),
        "low": Metric(low, repeats),
        "high": Metric(high, repeats),
        "floor_fraction": Metric(found.floor / median, repeats),
        "error": Metric(found.error, 1),
    }
    if found.bytes is not None:
        metrics["gigabytes_per_second"] = Metric(found.bytes / median / 1e6, repeats)
    dtype = torch.float32 if arm == TWO_STREAMS else runtime.precision().dtype
    return Record(
        method="decomposition",
        experiment=f"{task}, {size}",
        arm=arm,
        seed=0,
        scale="gpu" if runtime.device().type == "cuda" else "cpu",
        settings={
            **size._asdict(),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
        },
        metrics=metrics,
        seconds=repeats * median / 1000,
        peak_memory_bytes=runtime.peak_memory(),
        device=runtime.describe_device(),
        versions=runtime.versions(),
        data={},
        commit=runtime.git_commit(),
    )


HEADING = "task|arm|ms [20 %, 80 %]|× floor|GB/s|× two streams|error"


def table(records: Iterable[Record]) -> str:
    """Return all arms as a Markdown table."""
    records = list(records)
    reference = {
        record.experiment: record.metrics["milliseconds"].value
        for record in records
        if record.arm == TWO_STREAMS
    }
    rows = []
    for record in records:
        value = {name: metric.value for name, metric in record.metrics.items()}
        speed = reference[record.experiment] / value["milliseconds"]
        rows.append(
            [
                record.experiment,
                record.arm,
                "{milliseconds:#.4g} [{low:#.4g}, {high:#.4g}]".format(**value),
                f"{1 / value['floor_fraction']:.2f}",
                f"{value.get('gigabytes_per_second', math.nan):,.0f}",
                f"{speed:.2f}",
                f"{value['error']:.1g}",
            ]
        )
    return markdown_table([HEADING.split("|"), *rows])


def main(scale: str | None = None) -> None:
    """Measure every task and arm, record them, and print a table."""
    chosen = scale_to_time(scale)
    print(runtime.report())
    size, rates = SIZES[chosen], (copy_rate(), matmul_rate())
    print(f"copy: {rates[0] / 1e9:.3g} GB/s, matmul: {rates[1] / 1e12:.3g} TFLOP/s")
    arms = [TWO_STREAMS, "ours (torch)"]
    if runtime.triton_supported():
        arms.append("ours (triton)")
    records = []
    with torch.no_grad():
        for task in TASKS:
            for arm in arms:
                found = measure(size, arm, task, rates)
                records.append(record_of(size, arm, task, found))
                append([records[-1]])
    print(f"\n{table(records)}")


if __name__ == "__main__":
    typer.run(main)
