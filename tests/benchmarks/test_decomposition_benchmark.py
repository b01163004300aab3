"""What the timings of decomposition rest on: agreement, bytes. No speed is tested."""

import decomposition as bench
import pytest
import torch
from measuring import Times
from torch.nn import functional as F

TINY = bench.Size(3, 2, 5, 128)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")


@pytest.mark.parametrize("task", bench.TASKS)
def test_one_stream_agrees_with_two(task):
    p = bench.make_problem(TINY)
    expected = bench.two_stream_tasks(p.to(torch.float64))[task]()
    found = bench.one_stream_tasks(p, "torch")[task]()
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_two_streams_are_the_block_when_they_are_added():
    """The parts of all of the input and of none of it: a plain block, and nothing."""
    p = bench.make_problem(TINY).to(torch.float64)
    whole = p.total[None]
    nothing = torch.zeros_like(whole)
    kept = bench.two_streams(p, whole, nothing)
    qkv, out, up, down = p.layers()
    t = whole
    inner = F.linear(F.layer_norm(t, (128,), *p.norms[0], bench.EPS), *qkv)
    t = t + F.linear(bench.attend(inner), *out)
    inner = F.linear(F.layer_norm(t, (128,), *p.norms[1], bench.EPS), *up)
    t = t + F.linear(F.gelu(inner, approximate="tanh"), *down)
    torch.testing.assert_close(kept, t, rtol=1e-10, atol=1e-10)
    assert (bench.two_streams(p, nothing, whole) == 0).all()


def test_bytes_that_an_activation_moves():
    """By hand: β is read and written, t is read; 4 bytes each."""
    p = bench.make_problem(TINY)
    assert bench.moved_bytes("activation", p) == 4 * (2 * 3 + 1) * 10 * 512
    assert bench.moved_bytes("gate", p) == 4 * (3 * 3 + 2) * 10 * 512
    assert bench.moved_bytes("norm", p) == 4 * (2 * 3 + 1) * 10 * 128
    assert bench.moved_bytes("block", p) is None


def test_an_arm_becomes_a_record_and_a_row(monkeypatch):
    monkeypatch.setattr(bench, "time_of", lambda call: Times(2.0, 1.0, 3.0, 5))
    records = []
    for arm in (bench.TWO_STREAMS, "ours (torch)"):
        found = bench.measure(TINY, arm, "activation", (1e9, 1e12))
        records.append(bench.record_of(TINY, arm, "activation", found))
    value = records[1].metrics
    assert value["floor_fraction"].value == pytest.approx(4 * 70 * 512 / 1e9 / 2e-3)
    assert value["error"].value < 1e-6
    header, _, *rows = bench.table(records).splitlines()
    assert len(rows) == 2
    assert "× two streams" in header
    assert "1.00" in rows[1]
