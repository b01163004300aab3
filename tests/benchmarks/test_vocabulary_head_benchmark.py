"""What the timings rest on: floors, agreement, meters, budgets. No speed is tested."""

import importlib
import math
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path

import peers
import pytest
import torch
import vocabulary_head as bench
from agreement import Size, make_problem, make_reference
from measuring import (
    FIRST_SECONDS,
    ArmError,
    ArmTimeoutError,
    Budget,
    Memory,
    Times,
    Worker,
    memory_of,
    time_of,
)
from peers import TASKS, Outputs
from torch import Tensor

from ftlib.results import Record, Results, read, results_path

TINY = Size(48, 32, 1000)
T5 = Size(8192, 768, 32128)
MIB = 2**20


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    make_problem.cache_clear()


def arm(task: str = peers.FORWARD, head: str = "naive", size: Size = TINY) -> bench.Arm:
    return bench.Arm(size, "peaked", task, head)


# --- the floor ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "milliseconds"),
    [(peers.FORWARD, 0.51), (peers.AUTOGRAD, 2.05), (peers.CROSS_ENTROPY, 1.54)],
)
def test_floor_is_the_matmuls_alone(task: str, milliseconds: float) -> None:
    """T5-base at 790 TFLOP/s, worked out by hand."""
    floor = bench.floor_milliseconds(arm(task, size=T5), 790e12)
    assert floor == pytest.approx(milliseconds, abs=0.005)


def test_every_task_has_a_floor() -> None:
    assert set(bench.MATMULS) == set(TASKS)


# --- data --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [128, 512])
def test_peaked_logits_are_as_said(hidden: int) -> None:
    problem = make_problem(Size(256, hidden, 8192), "peaked")
    top, argmax = (problem.hidden @ problem.weight.T).softmax(-1).max(-1)
    assert 0.6 < top.mean() < 0.8
    assert (argmax == problem.targets).float().mean() > 0.9
    assert top.quantile(0.1) < 0.3


def test_flat_logits_are_nearly_uniform() -> None:
    problem = make_problem(Size(64, 128, 8192), "flat")
    log_p = (problem.hidden @ problem.weight.T).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert (math.log(8192) - entropy).max() < 0.1


# --- agreement ---------------------------------------------------------------------


@pytest.mark.parametrize("data", ["peaked", "flat"])
@pytest.mark.parametrize("task", TASKS)
def test_ours_agrees_with_the_reference(task: str, data: bench.Data) -> None:
    problem = make_problem(TINY, data)
    found = peers.load_ours(torch.device("cpu"), "torch")[task](problem)
    reference = make_reference(task, problem)
    assert reference.differing(found) == []
    assert set(found) == set(reference.outputs)


@pytest.mark.parametrize("task", TASKS)
def test_rows_in_parts_are_the_whole(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(Size(5, 16, 97), "peaked")
    whole = peers.load_plain(torch.device("cpu"))[task](problem)
    monkeypatch.setattr("agreement.ELEMENTS", 2 * 97)
    parts = make_reference(task, problem).outputs
    for name, value in whole.items():
        torch.testing.assert_close(parts[name].to(value.dtype), value, msg=name)


def padded(columns: int) -> Callable[..., Outputs]:
    """A head that takes columns beyond the vocabulary for logits of 0."""

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
    ) -> Outputs:
        weight = torch.cat((weight, weight.new_zeros(columns, weight.shape[1])))
        return peers.plain_statistics(hidden, weight, targets, names)

    return statistics


@pytest.mark.parametrize("task", [peers.LOG_PROB, peers.AUTOGRAD, peers.CROSS_ENTROPY])
def test_padding_that_counts_is_caught(task: str) -> None:
    """128 columns too many in 32,128, as a peer once had."""
    problem = make_problem(Size(64, 32, 32128), "flat")
    wrong = peers.tasks_of(padded(128), peers.PAIR)[task](problem)
    right = peers.tasks_of(padded(0), peers.PAIR)[task](problem)
    reference = make_reference(task, problem)
    assert reference.differing(wrong)
    assert reference.differing(right) == []


def test_a_wrong_gradient_and_a_nan_are_caught() -> None:
    problem = make_problem(TINY, "peaked")
    reference = make_reference(peers.AUTOGRAD, problem)
    found = peers.load_plain(torch.device("cpu"))[peers.AUTOGRAD](problem)
    found["grad_weight"] = found["grad_weight"] * 1.001
    found["entropy"][7] = math.nan
    assert reference.differing(found) == ["entropy", "grad_weight"]


def test_low_precision_may_err_as_the_plain_head_does() -> None:
    exact = make_problem(TINY, "peaked")
    rough = exact._replace(
        hidden=exact.hidden.bfloat16(), weight=exact.weight.bfloat16()
    )
    found = peers.load_plain(torch.device("cpu"))[peers.AUTOGRAD](rough)
    assert make_reference(peers.AUTOGRAD, rough).differing(found) == []
    assert make_reference(peers.AUTOGRAD, exact).differing(found)


# --- peers -------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["TRL", "CCE (torch.compile)", "verl", "fla"])
def test_a_peer_that_is_not_installed_is_absent(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str, *_: object) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "No module named" in bench.offer(head)


@pytest.mark.parametrize("head", ["verl", "CCE (exact)", "Liger FLCE (chunk 1)"])
def test_triton_peers_are_absent_without_a_gpu(
    head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench.offer(head) == "its Triton kernels need a GPU"


# --- meters ------------------------------------------------------------------------


def test_memory_of_a_known_allocation() -> None:
    def call() -> Tensor:
        first = torch.ones(4 * MIB, dtype=torch.uint8)
        second = torch.ones(8 * MIB, dtype=torch.uint8)
        del first, second
        return torch.ones(2 * MIB, dtype=torch.uint8)

    assert memory_of(call) == Memory(peak=12 * MIB, extra=10 * MIB)


def test_memory_of_the_plain_head_holds_its_logits() -> None:
    problem = make_problem(Size(256, 32, 8192), "flat")
    run = peers.load_plain(torch.device("cpu"))[peers.CROSS_ENTROPY]
    logits = 256 * 8192 * 4
    assert memory_of(lambda: run(problem)).extra >= 2 * logits


def test_time_is_a_median_with_its_spread() -> None:
    times = time_of(lambda: time.sleep(0.21))
    assert 210 <= times.low <= times.median <= times.high < 400
    assert times.repeats == 5


# --- the process -------------------------------------------------------------------


def test_worker_outlives_what_breaks_it() -> None:
    with Worker() as worker:
        with pytest.raises(ArmError, match="ZeroDivisionError: division by zero"):
            worker(operator.truediv, 1, 0, seconds=60)
        with pytest.raises(ArmError, match="its process ended"):
            worker(os._exit, 1, seconds=60)
        with pytest.raises(ArmError, match="UnicodeDecodeError: 'utf-8' codec"):
            worker(bytes.decode, b"\xff", seconds=60)
        with pytest.raises(ArmTimeoutError, match="not done after 1 s"):
            worker(time.sleep, 60, seconds=1)
        assert worker(operator.add, 1, 2, seconds=60) == 3


# --- the budget --------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_arms_that_no_longer_fit_are_skipped() -> None:
    clock, ran = Clock(), []
    budget = Budget(100, clock)

    def run(which: bench.Arm, left: float) -> str:
        ran.append((which.head, left))
        clock.now += 45 if which.head == "naive" else 1
        return which.head

    arms = [arm(head=head) for head in ("naive", "TRL", "naive", "naive", "TRL")]
    records, skipped = bench.run_arms(arms, budget, run)
    assert ran == [("naive", 100), ("TRL", 55), ("naive", 54), ("TRL", 9)]
    assert records == ["naive", "TRL", "naive", "TRL"]
    assert [which.head for which in skipped] == ["naive"]


def test_an_arm_that_never_ran_needs_some_time() -> None:
    assert Budget(FIRST_SECONDS + 1, Clock()).fits("TRL")
    assert not Budget(FIRST_SECONDS - 1, Clock()).fits("TRL")


# --- records and tables ------------------------------------------------------------


CONTEXT = bench.Context("cpu", rate=1e12, absent={"verl": "No module named 'verl'"})


def failing(error: Exception) -> Callable[..., None]:
    def worker(*_: object, **__: object) -> None:
        raise error

    return worker


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Results]:
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    return lambda: read(results_path("kernels", "cpu"))


def test_an_arm_is_measured_and_recorded(stored: Callable[[], Results]) -> None:
    def worker(
        function: Callable[..., object], *args: object, seconds: float
    ) -> object:
        return function(*args)

    record = bench.recorded(arm(peers.AUTOGRAD, "ours (torch)"), 99, worker, CONTEXT)
    (read_back,) = stored()
    assert read_back == record
    assert record.experiment == "autograd, N 48, D 32, V 1000, peaked"
    assert record.settings["absent"] == CONTEXT.absent
    assert record.settings["differing"] == []
    value = {name: metric.value for name, metric in record.metrics.items()}
    floor = 4 * 2 * 48 * 32 * 1000 / 1e12 * 1000
    assert value["floor_fraction"] == pytest.approx(floor / value["milliseconds"])
    inputs = 4 * (48 * 32 + 1000 * 32 + 2 * 48) + 8 * 48
    gradients = 4 * (48 * 32 + 1000 * 32)
    assert value["peak_bytes"] >= inputs + gradients + value["extra_bytes"]
    assert value["extra_bytes"] >= 48 * 1000 * 4


def test_a_failure_is_recorded(stored: Callable[[], Results]) -> None:
    bench.recorded(arm(), 1000, failing(ArmError("OutOfMemoryError: no")), CONTEXT)
    (record,) = stored()
    assert record.settings["failed"] == "OutOfMemoryError: no"
    assert math.isnan(record.metrics["milliseconds"].value)


def test_too_little_time_leaves_the_older_record(stored: Callable[[], Results]) -> None:
    bench.recorded(arm(), 1000, failing(ArmError("older")), CONTEXT)
    late = failing(ArmTimeoutError("not done after 3 s"))
    assert bench.recorded(arm(), 3, late, CONTEXT) is None
    (record,) = stored()
    assert record.settings["failed"] == "older"


def record_of(
    head: str, milliseconds: float, size: Size = TINY, differing: tuple[str, ...] = ()
) -> Record:
    found = bench.Measurement(
        Times(milliseconds, milliseconds, milliseconds, 5),
        Memory(3 * MIB, MIB),
        MIB,
        0,
        {"log_prob": 1e-3},
        list(differing),
    )
    return bench.make_record(arm(peers.WITH_ENTROPY, head, size), found, 1.0, CONTEXT)


def test_table_compares_with_the_best_peer_that_agrees() -> None:
    records = [
        record_of("ours (torch)", 2.0, T5),
        record_of("naive", 8.0, T5),
        record_of("TRL", 4.0, T5),
        record_of("verl", 1.0, T5, ("log_prob",)),
        bench.make_record(arm(peers.WITH_ENTROPY, "fla", T5), "no", 1.0, CONTEXT),
    ]
    text = bench.tables(records)
    _, _, heading, _, *lines = text.splitlines()
    names = [name.strip() for name in heading.strip("|").split("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    table = {row[0]: dict(zip(names, row, strict=True)) for row in rows}
    assert list(table) == [
        "verl (differs: log_prob)",
        "ours (torch)",
        "TRL",
        "naive",
        "fla (failed: no)",
    ]
    assert table["ours (torch)"]["× best peer"] == "0.50"
    assert table["ours (torch)"]["goal"] == "≤ 2.6 ms"
    assert table["ours (torch)"]["peak MiB"] == "4"
    assert table["TRL"]["goal"] == ""


# --- the plan ----------------------------------------------------------------------


def test_plan_takes_what_is_offered_in_order_of_value() -> None:
    offers = {"naive": TASKS, "torch.compile": TASKS, "fla": (peers.CROSS_ENTROPY,)}
    arms = bench.plan("gpu", offers)
    assert len(set(arms)) == len(arms)
    assert {which.task for which in arms if which.head == "fla"} == set(offers["fla"])
    goals = bench.SIZES["gpu"][0]
    first = arms[: len(goals) * (len(TASKS) + 1)]
    assert {which.data for which in first} == {"peaked"}
    assert {which.head for which in first} == {"naive", "fla"}
    assert {which.size for which in first} == set(goals)
    assert {which.size for which in arms} == {*goals, *bench.SIZES["gpu"][1]}


@pytest.mark.parametrize(
    ("setting", "scale", "message"),
    [("1", None, "interpreter"), ("0", "gpu", "--scale cpu")],
)
def test_nothing_is_timed_where_it_would_mean_nothing(
    setting: str, scale: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    monkeypatch.delenv("FTLIB_SCALE", raising=False)
    with pytest.raises(SystemExit, match=message):
        bench.main(scale=scale)
