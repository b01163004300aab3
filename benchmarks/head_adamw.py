"""Time and state of AdamW over a tenth of the heads, beside what one would do without.

    python benchmarks/head_adamw.py [--scale cpu|gpu]

Each arm moves the query rows and output columns of the same heads, and all norms, of a
model that has the shapes of Qwen2.5-1.5B. Its first step is compared with plain AdamW
in float64, and the weights that should not move are counted if they do. The floor is
the bytes of the selected weights, gradients and moments at the rate of a plain copy on
the same device.

A last table shows, on a small model, why masking is wrong and not only slow: what moves
the weights whose gradient is masked. Each arm leaves a record in
``book/results/head_adamw/<scale>.json``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import typer
from measuring import (
    ArmError,
    Times,
    Worker,
    copy_rate,
    free_memory,
    scale_to_time,
    time_of,
)
from torch import Tensor, nn

from ftlib import runtime
from ftlib.ops.head_adamw import HeadAdamW, WeightSlice
from ftlib.results import Metric, Record, append, markdown_table

SETTINGS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
SHARE = 0.1
# What an arm that is compiled may take in all, in a process of its own.
COMPILED_SECONDS = {"gpu": 180.0, "cpu": 120.0}


class Size(NamedTuple):
    """The shapes of a decoder with grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads"

    @property
    def head(self) -> int:
        """Dimensions of a head."""
        return self.hidden // self.heads


QWEN = Size(28, 1536, 12, 2, 8960, 151_936)
SIZES = {"gpu": QWEN, "cpu": Size(4, 256, 4, 2, 1024, 4096)}
DTYPES = {"gpu": (torch.bfloat16, torch.float32), "cpu": (torch.float32,)}
# Of QWEN in bf16, on an H200.
GOALS = {
    "ours (triton)": "≤ 0.20 ms, ≤ 126 MB",
    "mask + AdamW(fused)": "≥ 45 × ours",
    "separate + AdamW(fused) + copies": "≥ 1.3 × ours",
}


class Problem(NamedTuple):
    """Parameters with gradients, and the slices of them that are to move."""

    parameters: list[nn.Parameter]
    slices: list[WeightSlice]

    def values(self) -> list[Tensor]:
        """Return copies of the slices' weights."""
        return [part_of(cut).clone() for cut in self.slices]


class Method(NamedTuple):
    """A way to take the step: the call, and the optimiser that holds its state."""

    step: Callable[[], object]
    optimizer: torch.optim.Optimizer


def make_problem(size: Size, dtype: torch.dtype) -> Problem:
    """Return weights and gradients of a whole model, a tenth of its heads selected."""
    torch.manual_seed(0)
    device = runtime.device()
    parameters: list[nn.Parameter] = []

    def parameter(*shape: int) -> nn.Parameter:
        made = nn.Parameter(0.02 * torch.randn(shape, device=device, dtype=dtype))
        made.grad = torch.randn_like(made)
        parameters.append(made)
        return made

    chosen = select(size)
    slices: list[WeightSlice] = []
    parameter(size.vocabulary, size.hidden)
    for layer in range(size.layers):
        q, o = (parameter(size.hidden, size.hidden) for _ in range(2))
        for index in chosen[layer]:
            start, stop = index * size.head, (index + 1) * size.head
            slices += [WeightSlice(q, 0, start, stop), WeightSlice(o, 1, start, stop)]
        for _ in ("key", "value"):
            parameter(size.kv_heads * size.head, size.hidden)
        for shape in ((size.inner, size.hidden),) * 2 + ((size.hidden, size.inner),):
            parameter(*shape)
        for _ in ("before attention", "before MLP"):
            slices.append(WeightSlice(parameter(size.hidden), 0, 0, size.hidden))
    slices.append(WeightSlice(parameter(size.hidden), 0, 0, size.hidden))
    return Problem(parameters, slices)


def select(size: Size) -> list[list[int]]:
    """Return the heads that are trained in each layer, a random tenth of all."""
    total = size.layers * size.heads
    drawn = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    chosen = sorted(drawn[: max(1, round(SHARE * total))].tolist())
    return [
        [head % size.heads for head in chosen if head // size.heads == layer]
        for layer in range(size.layers)
    ]


def part_of(cut: WeightSlice, tensor: Tensor | None = None) -> Tensor:
    """Return a slice of its parameter, or of a tensor that is shaped alike."""
    source = cut.parameter.detach() if tensor is None else tensor
    return source.narrow(cut.dim, cut.start, cut.stop - cut.start)


# --- methods -----------------------------------------------------------------------


def ours(problem: Problem, backend: Any) -> Method:
    """HeadAdamW."""
    optimizer = HeadAdamW(problem.slices, **SETTINGS, backend=backend)
    return Method(optimizer.step, optimizer)


def masked(problem: Problem, **settings: Any) -> Method:
    """Zero the gradients outside, and give torch's AdamW the whole model.

    Args:
        problem: whose gradients are masked in each step.
        settings: of the optimiser, where they differ from those of all arms.
    """
    masks = {
        p: torch.zeros_like(p, dtype=torch.bool, requires_grad=False)
        for p in problem.parameters
    }
    for cut in problem.slices:
        part_of(cut, masks[cut.parameter]).fill_(True)
    pairs = [(p.grad, mask) for p, mask in masks.items() if p.grad is not None]
    settings = {**SETTINGS, "fused": True, **settings}
    optimizer = torch.optim.AdamW(problem.parameters, **settings)

    def step() -> None:
        for grad, mask in pairs:
            grad.mul_(mask)
        optimizer.step()

    return Method(step, optimizer)


def masked_compiled(problem: Problem) -> Method:
    """Compile masks and step together, which may read each gradient only once."""
    method = masked(problem, fused=False, foreach=True)
    return method._replace(step=torch.compile(method.step))


def separate(problem: Problem) -> Method:
    """Give torch's AdamW contiguous copies of the slices, and copy them back."""
    parts = [part_of(cut) for cut in problem.slices]
    grads = [part_of(cut, cut.parameter.grad) for cut in problem.slices]
    copies = [nn.Parameter(part.contiguous().clone()) for part in parts]
    own = [torch.empty_like(copy.detach()) for copy in copies]
    for copy, grad in zip(copies, own, strict=True):
        copy.grad = grad
    moved = [copy.detach() for copy in copies]
    optimizer = torch.optim.AdamW(copies, **SETTINGS, fused=True)

    def step() -> None:
        torch._foreach_copy_(own, grads)
        optimizer.step()
        torch._foreach_copy_(parts, moved)

    return Method(step, optimizer)


METHODS: dict[str, Callable[[Problem], Method]] = {
    "ours (triton)": functools.partial(ours, backend="triton"),
    "ours (torch)": functools.partial(ours, backend="torch"),
    "mask + AdamW(fused)": masked,
    "mask + AdamW, compiled": masked_compiled,
    "separate + AdamW(fused) + copies": separate,
}


# --- measuring ---------------------------------------------------------------------


class Measurement(NamedTuple):
    """What a method did.

    Attributes:
        times: of a step.
        state_bytes: of the optimiser.
        error: of the first step, in units in the last place of the dtype, at most.
        strayed: weights outside the slices that moved.
        peak_bytes: of memory; see :class:`ftlib.results.Record`.
    """

    times: Times
    state_bytes: int
    error: float
    strayed: int
    peak_bytes: int


def measure(name: str, size: Size, dtype: torch.dtype) -> Measurement:
    """Check a method's first step, then time it."""
    free_memory()
    runtime.reset_peak_memory()
    problem = make_problem(size, dtype)
    expected = after_a_step(problem)
    before = [parameter.detach().clone() for parameter in problem.parameters]
    method = METHODS[name](problem)
    method.step()
    error = max(
        ulps(found, exact)
        for found, exact in zip(problem.values(), expected, strict=True)
    )
    strayed = sum(int(move.count_nonzero()) for move in strays(problem, before))
    del before, expected
    times, held = time_of(method.step), state_bytes(method.optimizer)
    return Measurement(times, held, error, strayed, runtime.peak_memory())


def after_a_step(problem: Problem) -> list[Tensor]:
    """Return the slices after the first step of plain AdamW, in float64."""
    copies = [nn.Parameter(value.double()) for value in problem.values()]
    for copy, cut in zip(copies, problem.slices, strict=True):
        copy.grad = part_of(cut, cut.parameter.grad).double()
    torch.optim.AdamW(copies, **SETTINGS).step()
    return [copy.detach() for copy in copies]


def ulps(found: Tensor, exact: Tensor) -> float:
    """Return the largest error, in units of the last place of the largest weight."""
    unit = torch.finfo(found.dtype).eps * exact.abs().max()
    return float((found.double() - exact).abs().max() / unit)


def strays(problem: Problem, before: Iterable[Tensor]) -> Iterator[Tensor]:
    """Give how far each parameter has moved, with its slices taken as still."""
    for parameter, value in zip(problem.parameters, before, strict=True):
        move = (parameter.detach() - value).abs()
        for cut in problem.slices:
            if cut.parameter is parameter:
                part_of(cut, move).zero_()
        yield move


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of the moments."""
    return sum(
        value.nbytes
        for entries in optimizer.state.values()
        for name, value in entries.items()
        if name != "step"
    )


def floor_milliseconds(size: Size, dtype: torch.dtype, rate: float) -> float:
    """Return the time of reading w, g, m, v and writing w, m, v of the slices."""
    heads = sum(map(len, select(size)))
    selected = 2 * heads * size.head * size.hidden + (2 * size.layers + 1) * size.hidden
    return 1000 * selected * (3 * dtype.itemsize + 4 * 4) / rate


# --- what moves weights whose gradient is masked -------------------------------------

MASKED_STEPS = 10


class Masking(NamedTuple):
    """Circumstances of masking.

    Attributes:
        method: how the steps are taken.
        unmasked_steps: with all gradients, before the steps that count.
    """

    method: Callable[[Problem], Method]
    unmasked_steps: int = 0


MASKINGS = {
    "mask + AdamW, weight decay 0.01": Masking(masked),
    "mask + AdamW, one step before the mask": Masking(
        functools.partial(masked, weight_decay=0.0), unmasked_steps=1
    ),
    "mask + AdamW, neither": Masking(functools.partial(masked, weight_decay=0.0)),
    "ours, weight decay 0.01": Masking(functools.partial(ours, backend=None)),
}


class Straying(NamedTuple):
    """What became of the weights outside the slices.

    Attributes:
        share: of them that moved.
        farthest: any of them moved, in learning rates.
        weights: how many there are.
    """

    share: float
    farthest: float
    weights: int


def straying(name: str, size: Size) -> Straying:
    """Take ten steps, and look at the weights that should have stayed."""
    masking, problem = MASKINGS[name], make_problem(size, torch.float32)
    method = masking.method(problem)
    for _ in range(masking.unmasked_steps):
        method.optimizer.step()
    before = [parameter.detach().clone() for parameter in problem.parameters]
    for _ in range(MASKED_STEPS):
        method.step()
    moves = list(strays(problem, before))
    inside = sum(part_of(cut).numel() for cut in problem.slices)
    weights = sum(move.numel() for move in moves) - inside
    moved = sum(int(move.count_nonzero()) for move in moves)
    farthest = max(float(move.max()) for move in moves)
    return Straying(moved / weights, farthest / SETTINGS["lr"], weights)


# --- records and tables --------------------------------------------------------------


def record_of(
    name: str, size: Size, dtype: torch.dtype, found: Measurement, rate: float
) -> Record:
    """Return the record of an arm that was timed."""
    median, low, high, repeats = found.times
    floor = floor_milliseconds(size, dtype, rate)
    return _record(
        name,
        size,
        dtype,
        what="",
        settings={"copy_terabytes_per_second": rate / 1e12},
        metrics={
            "milliseconds": Metric(median, repeats),
            "low": Metric(low, repeats),
            "high": Metric(high, repeats),
            "floor_fraction": Metric(floor / median, repeats),
            "state_bytes": Metric(found.state_bytes, 1),
            "ulps": Metric(found.error, 1),
            "strayed": Metric(found.strayed, 1),
        },
        seconds=repeats * median / 1000,
        peak_memory_bytes=found.peak_bytes,
    )


def stray_record_of(name: str, size: Size, found: Straying, seconds: float) -> Record:
    """Return the record of what masking did."""
    masking = MASKINGS[name]
    return _record(
        name,
        size,
        torch.float32,
        what="weights outside the slices, ",
        settings={"steps": MASKED_STEPS, "unmasked_steps": masking.unmasked_steps},
        metrics={
            "strayed_share": Metric(found.share, found.weights),
            "farthest_in_learning_rates": Metric(found.farthest, found.weights),
        },
        seconds=seconds,
        peak_memory_bytes=runtime.peak_memory(),
    )


def _record(
    name: str,
    size: Size,
    dtype: torch.dtype,
    what: str,
    settings: dict[str, Any],
    **measured: Any,
) -> Record:
    precision = str(dtype).removeprefix("torch.")
    return Record(
        method="head_adamw",
        experiment=f"{what}{size}, {precision}",
        arm=name,
        seed=0,
        scale="gpu" if runtime.device().type == "cuda" else "cpu",
        settings={
            **size._asdict(),
            **SETTINGS,
            "share": SHARE,
            "dtype": precision,
            "threads": torch.get_num_threads(),
            **settings,
        },
        device=runtime.describe_device(),
        versions=runtime.versions(),
        data={},
        commit=runtime.git_commit(),
        **measured,
    )


HEADING = (
    "method|ms [20 %, 80 %]|× floor|× ours|state MB|error, ulp|strayed weights|goal"
)


def table(records: Iterable[Record]) -> str:
    """Return one experiment as a Markdown table, fastest first."""
    ordered = sorted(records, key=lambda record: record.metrics["milliseconds"].value)
    own = min(
        record.metrics["milliseconds"].value
        for record in ordered
        if record.arm.startswith("ours")
    )
    rows = []
    for record in ordered:
        value = {name: metric.value for name, metric in record.metrics.items()}
        rows.append(
            [
                record.arm,
                "{milliseconds:#.4g} [{low:#.4g}, {high:#.4g}]".format(**value),
                f"{1 / value['floor_fraction']:.2f}",
                f"{value['milliseconds'] / own:.2f}",
                f"{value['state_bytes'] / 1e6:,.1f}",
                f"{value['ulps']:.2f}",
                f"{value['strayed']:,.0f}",
                goal(record),
            ]
        )
    return markdown_table([HEADING.split("|"), *rows])


def goal(record: Record) -> str:
    """Return what an arm is meant to reach, if anything."""
    has_goals = record.experiment == f"{QWEN}, bfloat16"
    return GOALS.get(record.arm, "") if has_goals else ""


STRAY_HEADING = "method|weights that moved|farthest, learning rates"


def stray_table(records: Iterable[Record]) -> str:
    """Return what masking did as a Markdown table."""
    rows = [
        [
            record.arm,
            f"{100 * record.metrics['strayed_share'].value:.1f} %",
            f"{record.metrics['farthest_in_learning_rates'].value:.2g}",
        ]
        for record in records
    ]
    return markdown_table([STRAY_HEADING.split("|"), *rows])


# --- the run -------------------------------------------------------------------------


def run_arms(scale: str, dtype: torch.dtype, rate: float) -> Iterator[Record]:
    """Time and record every method; say which were skipped, and why."""
    size = SIZES[scale]
    with Worker() as worker:
        for name in METHODS:
            if name == "ours (triton)" and not runtime.triton_supported():
                continue
            try:
                if name.endswith("compiled"):
                    free_memory()
                    seconds = COMPILED_SECONDS[scale]
                    found = worker(measure, name, size, dtype, seconds=seconds)
                else:
                    found = measure(name, size, dtype)
            except ArmError as error:
                print(f"skipped: {name}, {dtype}: {error}")
                continue
            record = record_of(name, size, dtype, found, rate)
            append([record])
            yield record


def show_straying() -> Iterator[Record]:
    """Record what masking does, on the small model at every scale."""
    size = SIZES["cpu"]
    for name in MASKINGS:
        start = time.perf_counter()
        found = straying(name, size)
        record = stray_record_of(name, size, found, time.perf_counter() - start)
        append([record])
        yield record


def main(scale: str | None = None) -> None:
    """Measure every method, record it, and print a table for each dtype."""
    chosen = scale_to_time(scale)
    print(runtime.report())
    rate = copy_rate()
    print(f"plain copy: {rate / 1e12:.3g} TB/s")
    for dtype in DTYPES[chosen]:
        records = list(run_arms(chosen, dtype, rate))
        print(f"\n### {records[0].experiment}\n\n{table(records)}")
    records = list(show_straying())
    print(f"\n### {records[0].experiment}: {MASKED_STEPS} steps with masked gradients")
    print(f"\n{stray_table(records)}")


if __name__ == "__main__":
    typer.run(main)
