"""Time of contextual decomposition with one stream, beside two streams in plain torch.

    python benchmarks/decomposition.py [--scale cpu|gpu]

Each operation is timed alone, at the sizes of GPT-2 small, and judged by the bytes it
has to move at the rate of a plain copy on the same device. Then a whole block with the
published rules (β-softmax, bias split, clean-up of the MLP and of the block), and whole
models of GPT-2's shape with every head as a source, under both sets of rules. What is
compared are our back ends, in the precision of the device, and two streams in float32,
as the released code has them, eager and compiled. All are checked against two streams
in float64: the operations and the block on one source, models on all. Each arm leaves
a record in ``book/results/decomposition/<scale>.json``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import two_streams as two
import typer
from measuring import (
    ArmError,
    Times,
    Worker,
    copy_rate,
    free_memory,
    matmul_rate,
    scale_to_time,
    time_of,
)
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from two_streams import EPS, HEAD, STACKED, Streams

from ftlib import runtime
from ftlib.ctsft.decomposition import OURS, PUBLISHED, propagate, trace
from ftlib.ctsft.heads import Head
from ftlib.ops.backends import Backend
from ftlib.ops.decomposition import (
    decomposed_activation,
    decomposed_gate,
    decomposed_linear,
    decomposed_norm,
    relevant_epilogue_,
)
from ftlib.results import Metric, Record, append, markdown_table

MODULES = ("norm", "activation", "gate", "epilogue", "block")
MODELS = {"model, published rules": PUBLISHED, "model, our rules": OURS}

TWO_STREAMS, CACHED, COMPILED = "two streams", ", cached", ", compiled"

# A larger relative error than this is a bug and no rounding. Bias split and clean-up,
# layer upon layer, make much of bf16's.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.5}

# Room for all sources of a model at a time.
MEMORY = 2**32

# What an arm that is compiled may take in all, in a process of its own.
COMPILED_SECONDS = {"gpu": 180.0, "cpu": 120.0}

GOALS = {
    "cpu": dict.fromkeys(MODELS, "≥ 4 × two streams"),
    "gpu": dict.fromkeys(MODULES[:4], "≥ 3,200 GB/s")
    | dict.fromkeys(MODELS, "≤ 46 ms, ≥ 15 × two streams, ≥ 4 × compiled"),
}


class Size(NamedTuple):
    """How many sources are propagated through what."""

    sources: int
    prompts: int
    length: int
    width: int

    def __str__(self) -> str:
        return "{}×{}×{}, D={}".format(*self)

    @property
    def rows(self) -> int:
        """Tokens of a source."""
        return self.prompts * self.length

    @property
    def heads(self) -> list[Head]:
        """The heads of a model that has as many as there are sources."""
        in_layer = self.width // HEAD
        return [Head(*divmod(i, in_layer)) for i in range(self.sources)]

    @property
    def layers(self) -> int:
        """The layers of that model."""
        return self.heads[-1].layer + 1


GPT2_SMALL = Size(144, 64, 16, 768)
SIZES = {"gpu": GPT2_SMALL, "cpu": Size(8, 4, 16, 768)}
MODEL_SIZES = {
    "gpu": [GPT2_SMALL],
    "cpu": [Size(36, 2, 12, 384), Size(144, 1, 8, 768)],
}


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

    def layers(self) -> list[two.Layer]:
        """Return the four linear layers, each with its bias."""
        weights = [self.qkv, self.out, self.up, self.down]
        biases = self.biases.split([len(weight) for weight in weights])
        return list(zip(weights, biases, strict=True))

    def block(self) -> two.Block:
        """Return the weights as the two streams take them."""
        norms = [(weight, bias) for weight, bias in self.norms]
        qkv, out, up, down = self.layers()
        return two.Block(norms[0], qkv, out, norms[1], up, down)

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
    return two.attend(*qkv.chunk(3, -1))


# --- one stream ----------------------------------------------------------------------


def one_stream(backend: Backend, p: Problem) -> Tensor:
    """Return the relevant part behind a block; all totals are computed once."""

    def norm(i: int, beta: Tensor, t: Tensor) -> Streams:
        weight, bias = p.norms[i]
        plain = F.layer_norm(t, t.shape[-1:], weight, bias, EPS)
        beta = decomposed_norm(beta, t, weight, bias, eps=EPS, backend=backend)
        return beta, plain

    def through(layer: two.Layer, beta: Tensor, t: Tensor, clean_up: bool) -> Streams:
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


# --- what is timed --------------------------------------------------------------------

Task = Callable[[], Tensor]


class Arm(NamedTuple):
    """A way to the relevant part.

    Attributes:
        name: in records.
        dtype: of what it is given.
        backend: of our operations; None for two streams.
        is_cached: whether two streams begin where their first source does.
        is_compiled: by ``torch.compile``.
    """

    name: str
    dtype: torch.dtype
    backend: Backend | None = None
    is_cached: bool = False
    is_compiled: bool = False


def arms_of(task: str, size: Size) -> list[Arm]:
    """Return the arms of a task."""
    is_model, on_gpu = task in MODELS, runtime.device().type == "cuda"
    arms = [Arm(TWO_STREAMS, torch.float32)]
    if is_model and size.sources > STACKED:
        arms.append(Arm(TWO_STREAMS + CACHED, torch.float32, is_cached=True))
    # Each number of stacked sources is compiled anew: too long on a CPU.
    if on_gpu or not is_model or size.sources <= STACKED:
        arms += [
            arm._replace(name=arm.name + COMPILED, is_compiled=True) for arm in arms
        ]
    native = runtime.precision().dtype
    has_kernels = runtime.triton_supported()
    # The model's decomposition takes the best back end and cannot be told another.
    if not (is_model and has_kernels):
        arms.append(Arm("ours (torch)", native, "torch"))
    if has_kernels:
        arms.append(Arm("ours (triton)", native, "triton"))
    if is_model and native != torch.float32:
        arms.append(arms[-1]._replace(name="ours, float32", dtype=torch.float32))
    return arms


def one_stream_tasks(p: Problem, backend: Backend) -> dict[str, Task]:
    """Return what is timed of ours; the epilogue overwrites ``p.wide``."""
    up, norm, (_, bias) = p.wide.flip(-1), p.norms[0], p.layers()[2]
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
    up = p.wide.flip(-1)
    up_rest = p.wide_total - up
    weights = p.block()
    _, bias = weights.up
    before = rest - bias

    def epilogue() -> Tensor:
        shares = two.bias_shares(wide, before, bias, PUBLISHED)
        return two.clean(wide + shares[0], before + shares[1], PUBLISHED)[0]

    return {
        "norm": lambda: two.norm(beta, gamma, weights.first_norm, PUBLISHED)[0],
        "activation": lambda: two.activation(wide, rest)[0],
        "gate": lambda: two.gate(wide, rest, up, up_rest),
        "epilogue": epilogue,
        "block": lambda: two.block(weights, beta, gamma, PUBLISHED)[0],
    }


class ModelProblem(NamedTuple):
    """A GPT-2 and what its heads are scored on; see :func:`two.propagate`."""

    model: GPT2LMHeadModel
    ids: Tensor
    means: Tensor
    tokens: Tensor


def make_model(size: Size, dtype: torch.dtype) -> ModelProblem:
    """Draw a model whose every weight matters, biases too.

    Its vocabulary is small: no arm forms the logits of more than three tokens.
    """
    shape = {
        "n_layer": size.layers,
        "n_embd": size.width,
        "n_head": size.width // HEAD,
        "n_positions": size.length,
        "vocab_size": 1000,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    for parameter in model.parameters():
        spread = 0.1 if parameter.ndim == 1 else len(parameter) ** -0.5
        centre = 1.0 if bool((parameter == 1).all()) else 0.0
        parameter.data = centre + spread * torch.randn_like(parameter)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        embedding.weight.data = torch.randn_like(embedding.weight)
    device = runtime.device()
    return ModelProblem(
        model.to(device=device, dtype=dtype),
        torch.randint(1000, (size.prompts, size.length)).to(device),
        0.1 * torch.randn(size.layers, size.width // HEAD, HEAD).to(device, dtype),
        torch.tensor([5, 7, 9], device=device),
    )


def one_stream_model(size: Size, task: str, dtype: torch.dtype) -> Task:
    """Return our decomposition of a model, with the plain pass that it rests on."""
    p, heads = make_model(size, dtype), size.heads

    def run() -> Tensor:
        traced = trace(p.model, {"input_ids": p.ids})
        return propagate(
            traced, heads, p.means, p.tokens, rules=MODELS[task], memory=MEMORY
        ).relevant

    return run


def two_stream_model(size: Size, task: str, arm: Arm) -> Task:
    """Return the same with two streams."""
    p, heads = make_model(size, arm.dtype), size.heads
    parts = two.compiled_parts() if arm.is_compiled else two.Parts()

    def run() -> Tensor:
        streams = two.propagate(
            *p[:2], heads, *p[2:], MODELS[task], is_cached=arm.is_cached, parts=parts
        )
        return streams[0]

    return run


def call_of(size: Size, arm: Arm, task: str) -> Task:
    """Return what an arm does at a task, to be called often."""
    if task in MODELS:
        if arm.backend:
            return one_stream_model(size, task, arm.dtype)
        return two_stream_model(size, task, arm)
    p = make_problem(size).to(arm.dtype)
    if arm.backend:
        return one_stream_tasks(p, arm.backend)[task]
    call = two_stream_tasks(p)[task]
    return torch.compile(call, dynamic=False) if arm.is_compiled else call


@functools.lru_cache(maxsize=1)
def expected_of(size: Size, task: str) -> Tensor:
    """Return what two streams in float64 give: for all sources of a model, or one."""
    if task in MODELS:
        return two_stream_model(size, task, Arm(TWO_STREAMS, torch.float64))()
    return two_stream_tasks(make_problem(size).first().to(torch.float64))[task]()


# --- measuring -----------------------------------------------------------------------


class Measurement(NamedTuple):
    """What an arm did.

    Attributes:
        times: of the whole task.
        error: relative to the norm of the reference.
        rank_correlation: of the heads' scores with the reference's, of a model.
        floor: milliseconds.
        bytes: that one operation moves.
        peak_bytes: of memory; see :class:`ftlib.results.Record`.
    """

    times: Times
    error: float
    rank_correlation: float | None
    floor: float
    bytes: int | None
    peak_bytes: int


@torch.no_grad()
def measure(size: Size, arm: Arm, task: str, rates: tuple[float, float]) -> Measurement:
    """Check and time one arm at one task.

    Args:
        size: of the problem.
        arm: of :func:`arms_of`.
        task: one of ``MODULES`` or ``MODELS``.
        rates: bytes per second of a copy, operations per second of a matmul.
    """
    free_memory()
    expected = expected_of(size, task)
    runtime.reset_peak_memory()
    call = call_of(size, arm, task)
    found = call()[: len(expected)].double()
    error = float((found - expected).norm() / expected.norm())
    ranks = rank_correlation(found, expected) if task in MODELS else None
    moved = moved_bytes(task, size)
    floor = floor_milliseconds(task, size, rates)
    times = time_of(call)
    return Measurement(times, error, ranks, floor, moved, runtime.peak_memory())


def rank_correlation(found: Tensor, expected: Tensor) -> float:
    """Return Spearman's correlation of the sources' scores, of (S, B, tokens).

    A score is what a head adds to the first logit, beyond the others, on average.
    """
    scores = [x[..., 0] - x[..., 1:].mean(-1) for x in (found, expected)]
    ranks = [x.mean(-1).argsort().argsort().double() for x in scores]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def moved_bytes(task: str, size: Size) -> int | None:
    """Return the bytes that an operation reads and writes at least, or None."""
    passes = {"norm": 2, "activation": 2, "gate": 3, "epilogue": 2}.get(task)
    if passes is None:
        return None
    features = size.width if task == "norm" else 4 * size.width
    streams = passes * size.sources + passes - 1
    return streams * size.rows * features * runtime.precision().dtype.itemsize


def floor_milliseconds(task: str, size: Size, rates: tuple[float, float]) -> float:
    """Return the time of the bytes of an operation, or else of the matmuls.

    A source of a model passes half of its first layer, where it begins behind the
    attention, and half of the last, which ends where the logits are read: with as many
    in each layer, (layers − 1) / 2 layers on average. To a model's matmuls the bytes of
    fused operations between them are added, (15 D + 2 · 4 D) numbers in a row.
    """
    copied, multiplied = rates
    if (moved := moved_bytes(task, size)) is not None:
        return 1000 * moved / copied
    rows, D = size.sources * size.rows, size.width
    matmuls = 24 * rows * D**2 / multiplied
    if task not in MODELS:
        return 1000 * matmuls
    between = 23 * rows * D * runtime.precision().dtype.itemsize / copied
    return 1000 * (size.layers - 1) / 2 * (matmuls + between)


# --- records and tables --------------------------------------------------------------


def record_of(size: Size, arm: Arm, task: str, found: Measurement) -> Record:
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
    if found.rank_correlation is not None:
        metrics["rank_correlation"] = Metric(found.rank_correlation, size.sources)
    return Record(
        method="decomposition",
        experiment=f"{task}, {size}",
        arm=arm.name,
        seed=0,
        scale="gpu" if runtime.device().type == "cuda" else "cpu",
        settings={
            **size._asdict(),
            "task": task,
            "dtype": str(arm.dtype).removeprefix("torch."),
            "float32_matmuls": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads(),
        },
        metrics=metrics,
        seconds=repeats * median / 1000,
        peak_memory_bytes=found.peak_bytes,
        device=runtime.describe_device(),
        versions=runtime.versions(),
        data={},
        commit=runtime.git_commit(),
    )


HEADING = (
    "task|arm|ms [20 %, 80 %]|× floor|GB/s|× two streams|× cached|× compiled|error|"
    "ranks|goal"
)


def table(records: Iterable[Record]) -> str:
    """Return all arms as a Markdown table; "× compiled" is of the fastest such arm."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.experiment, []).append(record)
    rows = (row for group in groups.values() for row in _rows(group))
    return markdown_table([HEADING.split("|"), *rows])


def _rows(group: list[Record]) -> Iterator[list[str]]:
    times = {record.arm: record.metrics["milliseconds"].value for record in group}
    compiled = (time for arm, time in times.items() if arm.endswith(COMPILED))
    references = (
        times[TWO_STREAMS],
        times.get(TWO_STREAMS + CACHED),
        min(compiled, default=None),
    )
    for record in group:
        value = {name: metric.value for name, metric in record.metrics.items()}
        rate, ranks = (
            value.get(name) for name in ("gigabytes_per_second", "rank_correlation")
        )
        goal = ""
        if record.arm == "ours (triton)" or record.scale == "cpu":
            goal = GOALS[record.scale].get(record.settings["task"], "")
        yield [
            record.experiment,
            record.arm,
            "{milliseconds:#.4g} [{low:#.4g}, {high:#.4g}]".format(**value),
            f"{1 / value['floor_fraction']:.2f}",
            "" if rate is None else f"{rate:,.0f}",
            *(f"{time / times[record.arm]:.2f}" if time else "" for time in references),
            f"{value['error']:.1g}",
            "" if ranks is None else f"{ranks:.6f}",
            goal if record.arm.startswith("ours") else "",
        ]


def differing(records: Iterable[Record]) -> list[str]:
    """Name the arms whose error rounding does not explain."""
    return [
        f"{record.experiment}, {record.arm}: relative error {error:.1g}"
        for record in records
        if not (error := record.metrics["error"].value)
        <= TOLERANCES[getattr(torch, record.settings["dtype"])]
    ]


# --- the run -------------------------------------------------------------------------


def run_arms(scale: str, rates: tuple[float, float]) -> Iterator[Record]:
    """Measure and record every arm; say which were skipped, and why."""
    plan = [(task, SIZES[scale]) for task in MODULES]
    plan += [(task, size) for task in MODELS for size in MODEL_SIZES[scale]]
    with Worker() as worker:
        for task, size in plan:
            for arm in arms_of(task, size):
                run = functools.partial(measure, size, arm, task, rates)
                try:
                    if arm.is_compiled:
                        free_memory()
                        found = worker(run, seconds=COMPILED_SECONDS[scale])
                    else:
                        found = run()
                except ArmError as error:
                    print(f"skipped: {task}, {size}, {arm.name}: {error}")
                    continue
                record = record_of(size, arm, task, found)
                append([record])
                yield record


def main(scale: str | None = None) -> None:
    """Measure every task and arm, record them, and print a table."""
    chosen = scale_to_time(scale)
    print(runtime.report())
    rates = copy_rate(), matmul_rate()
    print(f"copy: {rates[0] / 1e9:.3g} GB/s, matmul: {rates[1] / 1e12:.3g} TFLOP/s")
    records = list(run_arms(chosen, rates))
    print(f"\n{table(records)}")
    if wrong := differing(records):
        sys.exit("\n".join(["arms that differ from the reference:", *wrong]))


if __name__ == "__main__":
    typer.run(main)
