"""Time and memory of a call, a process to measure in, and a budget of time."""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ftlib import runtime

# What a head is expected to take of the budget before any of its arms has run.
FIRST_SECONDS = 10.0


def scale_to_time(scale: str | None) -> str:
    """Return the scale to measure at, or end the process where it would mislead.

    Args:
        scale: as given; by default the one of this machine.
    """
    chosen = runtime.scale(scale)
    if chosen != ("gpu" if runtime.device().type == "cuda" else "cpu"):
        sys.exit(
            f"scale {chosen} on {runtime.describe_device()}: give --scale gpu where "
            "there is a CUDA device, else --scale cpu"
        )
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 would time the interpreter: unset it")
    return chosen


class Times(NamedTuple):
    """Milliseconds of repeated calls: median, 20th and 80th percentile."""

    median: float
    low: float
    high: float
    repeats: int


class Memory(NamedTuple):
    """Bytes that a call allocates at its peak: all, and beyond what it returns."""

    peak: int
    extra: int


def time_of(call: Callable[[], object]) -> Times:
    """Time a call: on CUDA by events with a cold cache, else at least five times."""
    if runtime.device().type == "cuda":
        from triton.testing import do_bench

        times = do_bench(call, warmup=50, rep=300, return_mode="all")
    else:
        times = _times_on_cpu(call)
    spread = [*times, times[0]] if len(times) == 1 else times
    fifths = statistics.quantiles(spread, n=5, method="inclusive")
    return Times(statistics.median(times), fifths[0], fifths[-1], len(times))


def _times_on_cpu(call: Callable[[], object]) -> list[float]:
    times: list[float] = []
    while len(times) < 5 or sum(times) < 1000:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return times


def free_memory() -> None:
    """Give back what is not used any more, to other processes on a GPU too."""
    gc.collect()
    if runtime.device().type == "cuda":
        torch.cuda.empty_cache()


def memory_of(call: Callable[[], object]) -> Memory:
    """Return what a call allocates. It should have been called before, to warm up."""
    if runtime.device().type != "cuda":
        return _memory_on_cpu(call)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    torch.cuda.synchronize()
    peak, after = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del kept
    return Memory(peak - before, peak - after)


def _memory_on_cpu(call: Callable[[], object]) -> Memory:
    """Add up the allocator's events; they include what compiled code allocates."""
    with _quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        kept = call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    allocations = [event for event in events if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(allocations, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return Memory(peak, peak - held)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Silence the profiler, which writes past sys.stderr when it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def matmul_rate() -> float:
    """Return the operations per second of the best of a few large plain matmuls."""
    device = runtime.device()
    dtype = runtime.precision(device).dtype
    m = 8192 if device.type == "cuda" else 1024
    rates = []
    for n, k in ((m, m), (2 * m, m // 2), (m // 2, 2 * m)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(k, n, device=device, dtype=dtype)
        milliseconds = time_of(functools.partial(torch.mm, a, b)).median
        rates.append(2000.0 * m * n * k / milliseconds)
    return max(rates)


def copy_rate() -> float:
    """Return the bytes per second that a plain copy reads and writes."""
    elements = 2**29 if runtime.device().type == "cuda" else 2**25
    source = torch.zeros(elements, device=runtime.device(), dtype=torch.bfloat16)
    target = torch.empty_like(source)
    milliseconds = time_of(lambda: target.copy_(source)).median
    return 2000 * source.nbytes / milliseconds


class ArmError(RuntimeError):
    """A call raised, or ended its process."""


class ArmTimeoutError(ArmError):
    """A call took longer than it was given."""


def _attempt(function: Callable[..., Any], *args: object) -> Any:
    """Call a function; make of what it raises an error that every process can read."""
    try:
        return function(*args)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ArmError(reason[:300]) from None


class Worker:
    """A process that calls functions, replaced when one breaks it or does not end."""

    def __init__(self) -> None:
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        self.stop(kill=error is not None)

    def __call__(
        self, function: Callable[..., Any], *args: object, seconds: float
    ) -> Any:
        """Call a function in the process, for as many seconds.

        Raises:
            ArmTimeoutError: the seconds were over.
            ArmError: it raised, or its process ended.
        """
        if self._executor is None:
            spawn = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(1, mp_context=spawn)
        future = self._executor.submit(_attempt, function, *args)
        try:
            return future.result(timeout=seconds)
        except TimeoutError as error:
            self.stop()
            raise ArmTimeoutError(f"not done after {seconds:.0f} s") from error
        except BrokenProcessPool as error:
            self.stop()
            raise ArmError("its process ended") from error
        except ArmError:
            # On a GPU it may have left the process without a working device.
            self.stop()
            raise

    def stop(self, kill: bool = True) -> None:
        """End the process: at once, or without ``kill`` when it is done."""
        if self._executor is None:
            return
        if kill:
            for process in multiprocessing.active_children():
                process.kill()
        self._executor.shutdown()
        self._executor = None


@dataclass
class Budget:
    """The time that is left, and what the last arm of each head took.

    Attributes:
        seconds: in all.
        clock: gives the time in seconds.
    """

    seconds: float
    clock: Callable[[], float] = time.monotonic
    _taken: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._end = self.clock() + self.seconds

    def left(self) -> float:
        """Seconds to the end, not below zero."""
        return max(0.0, self._end - self.clock())

    def fits(self, head: str) -> bool:
        """Whether an arm should end in time, if it takes as long as the last one."""
        return self._taken.get(head, FIRST_SECONDS) < self.left()

    @contextlib.contextmanager
    def spend(self, head: str) -> Iterator[None]:
        """Note how long an arm takes."""
        start = self.clock()
        yield
        self._taken[head] = self.clock() - start
