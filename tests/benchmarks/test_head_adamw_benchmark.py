"""What the timings of head-sliced AdamW rest on. No speed is tested."""

import functools
from pathlib import Path

import head_adamw as bench
import pytest
import torch
from measuring import ArmError, Times

from ftlib.results import read, results_path

TINY = bench.Size(layers=2, hidden=20, heads=5, kv_heads=1, inner=24, vocabulary=40)
TIMES = Times(2.0, 1.0, 3.0, 5)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    monkeypatch.setattr(bench, "time_of", lambda call: TIMES)
    monkeypatch.setattr(bench.runtime, "git_commit", lambda: None)


def test_the_model_has_the_size_of_qwen() -> None:
    """It has 1,543,714,304 weights with the biases of q, k and v, which no arm has."""
    s = bench.QWEN
    attention = 2 * s.hidden**2 + 2 * s.kv_heads * s.head * s.hidden
    block = attention + 3 * s.hidden * s.inner + 2 * s.hidden
    total = s.layers * block + s.vocabulary * s.hidden + s.hidden
    assert total == 1_543_714_304 - s.layers * (s.hidden + 2 * s.kv_heads * s.head)
    assert sum(map(len, bench.select(s))) == 34


def test_the_tiny_model_has_all_its_parts() -> None:
    problem = bench.make_problem(TINY, torch.float32)
    assert len(problem.parameters) == 1 + 2 * 9 + 1
    assert len(problem.slices) == 2 * sum(map(len, bench.select(TINY))) + 5
    assert all(p.grad is not None for p in problem.parameters)


@pytest.mark.parametrize(
    "name", ["ours (torch)", "mask + AdamW(fused)", "separate + AdamW(fused) + copies"]
)
def test_every_method_moves_the_slices_as_adamw_does(name: str) -> None:
    found = bench.measure(name, TINY, torch.float32)
    assert found.error <= 1
    total = sum(p.numel() for p in bench.make_problem(TINY, torch.float32).parameters)
    selected = count_selected(TINY)
    is_masked = name.startswith("mask")
    assert found.strayed == (total - selected if is_masked else 0)
    assert found.state_bytes == 2 * 4 * (total if is_masked else selected)


def count_selected(size: bench.Size) -> int:
    """Return how many weights the slices hold."""
    heads = sum(map(len, bench.select(size)))
    return 2 * heads * size.head * size.hidden + (2 * size.layers + 1) * size.hidden


def test_a_wrong_step_is_seen() -> None:
    problem = bench.make_problem(TINY, torch.float32)
    expected = bench.after_a_step(problem)
    method = bench.METHODS["ours (torch)"](problem)
    method.optimizer.param_groups[0]["weight_decay"] = 0.1
    method.step()
    pairs = zip(problem.values(), expected, strict=True)
    assert max(bench.ulps(found, exact) for found, exact in pairs) > 100


def test_the_floor_is_the_bytes_of_the_slices() -> None:
    """Qwen in bf16 at 4.3 TB/s, worked out by hand: 13,456,896 weights of 22 bytes."""
    floor = bench.floor_milliseconds(bench.QWEN, torch.bfloat16, 4.3e12)
    assert floor == pytest.approx(13_456_896 * 22 / 4.3e9)


def test_an_arm_leaves_a_record_and_a_row() -> None:
    found = bench.Measurement(TIMES, 3 * 10**6, 0.5, 7, 10**9)
    record = bench.record_of("ours (torch)", TINY, torch.float32, found, 1e12)
    bench.append([record])
    assert list(read(results_path("head_adamw", "cpu"))) == [record]
    row = bench.table([record]).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["ours (torch)", "2.000 [1.000, 3.000]"]
    assert cells[3:] == ["1.00", "3.0", "0.50", "7", ""]


def test_goals_are_those_of_qwen_in_bf16() -> None:
    found = bench.Measurement(TIMES, 3 * 10**6, 0.5, 7, 10**9)
    arm = "mask + AdamW(fused)"
    goals = [
        bench.goal(bench.record_of(arm, size, dtype, found, 1e12))
        for size in (bench.QWEN, TINY)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    assert goals == ["≥ 45 × ours", "", "", ""]


def test_what_moves_weights_whose_gradient_is_masked() -> None:
    """Ten steps: decay takes 1e-5 of a weight each; momentum takes most on the first.

    After a step with gradient g, m = 0.1 g and v = 0.001 g². The next with 0 for a
    gradient moves by 0.09 / (1 − 0.9²) over √(0.000999 / (1 − 0.999²)), in learning
    rates, and so on.
    """
    found = {name: bench.straying(name, TINY) for name in bench.MASKINGS}
    decayed, pushed, control, own = found.values()
    assert (control.share, control.farthest) == (own.share, own.farthest) == (0, 0)
    assert decayed.share == pushed.share == 1
    weights = torch.cat(
        [p.flatten() for p in bench.make_problem(TINY, torch.float32).parameters]
    )
    largest = float(weights.detach().abs().max())
    assert decayed.farthest <= 10 * 0.01 * largest
    steps = range(1, 11)
    path = sum(
        (0.1 * 0.9**k / (1 - 0.9 ** (k + 1)))
        / (0.001 * 0.999**k / (1 - 0.999 ** (k + 1))) ** 0.5
        for k in steps
    )
    assert pushed.farthest == pytest.approx(path, rel=1e-3)
    row = bench.stray_table(
        [bench.stray_record_of("mask + AdamW, neither", TINY, control, 1.0)]
    ).splitlines()[-1]
    assert row.split("|")[2].strip() == "0.0 %"


def test_what_is_compiled_takes_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the compiler behind dynamo, which is slow on a CPU.

    Traced, the optimiser corrects its moments in float32: a few roundings more.
    """
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    found = bench.measure("mask + AdamW, compiled", TINY, torch.float32)
    assert found.error <= 4


def test_an_arm_that_cannot_be_compiled_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As without a C++ compiler. The others go on."""

    def refuse(worker: object, *_: object, seconds: float) -> None:
        raise ArmError("no compiler")

    monkeypatch.setattr(bench.Worker, "__call__", refuse)
    monkeypatch.setitem(bench.SIZES, "cpu", TINY)
    records = list(bench.run_arms("cpu", torch.float32, 1e12))
    assert len(records) == len(bench.METHODS) - 2
    assert "skipped: mask + AdamW, compiled" in capsys.readouterr().out


def test_the_interpreter_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="would time the interpreter"):
        bench.main("cpu")


def test_the_scale_must_be_the_devices() -> None:
    with pytest.raises(SystemExit, match="scale gpu on cpu"):
        bench.main("gpu")
