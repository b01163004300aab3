"""What the timings of decomposition rest on: agreement, bytes. No speed is tested."""

import functools

import decomposition as bench
import pytest
import torch
import two_streams as two
from measuring import ArmError, Times
from torch.nn import functional as F

from ftlib.ctsft.decomposition import OURS, PUBLISHED

TINY = bench.Size(3, 2, 5, 128)
# All heads of a model of three layers with two heads each.
TINY_MODEL = bench.Size(6, 2, 5, 128)


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("FTLIB_RESULTS_DIR", str(tmp_path))
    monkeypatch.setattr(bench.runtime, "git_commit", lambda: None)


@pytest.mark.parametrize("task", bench.MODULES)
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
    through = functools.partial(two.block, p.block(), rules=PUBLISHED)
    kept, _ = through(whole, nothing)
    qkv, out, up, down = p.layers()
    t = whole
    inner = F.linear(F.layer_norm(t, (128,), *p.norms[0], bench.EPS), *qkv)
    t = t + F.linear(bench.attend(inner), *out)
    inner = F.linear(F.layer_norm(t, (128,), *p.norms[1], bench.EPS), *up)
    t = t + F.linear(F.gelu(inner, approximate="tanh"), *down)
    torch.testing.assert_close(kept, t, rtol=1e-10, atol=1e-10)
    assert (through(nothing, whole)[0] == 0).all()


# --- models --------------------------------------------------------------------------


def exact_arm(**changes):
    return bench.Arm("an arm", torch.float64)._replace(**changes)


def test_the_sources_are_all_heads_of_gpt2_small():
    assert bench.GPT2_SMALL.layers == 12
    assert bench.GPT2_SMALL.heads[13] == (1, 1)
    assert bench.GPT2_SMALL.rows == 1024


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("task", bench.MODELS)
def test_one_stream_agrees_with_two_in_a_model(task, is_cached, monkeypatch):
    """Also if the stacked sources begin in one layer, and are not all there are."""
    monkeypatch.setattr(two, "STACKED", 4)
    arm = exact_arm(is_cached=is_cached)
    expected = bench.two_stream_model(TINY_MODEL, task, arm)()
    found = bench.one_stream_model(TINY_MODEL, task, torch.float64)()
    assert found.shape == (6, 2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert (expected.flatten(1).norm(dim=1) > 1e-3).all()


@pytest.mark.parametrize("rules", [PUBLISHED, OURS])
def test_two_streams_of_a_model_add_up_to_its_logits(rules):
    p = bench.make_model(TINY_MODEL, torch.float64)
    heads = TINY_MODEL.heads[1:4]
    streams = two.propagate(
        *p[:2], heads, *p[2:], rules, is_cached=False, parts=two.Parts()
    )
    logits = p.model(p.ids).logits[:, -1, p.tokens]
    torch.testing.assert_close(sum(streams), logits.expand(3, -1, -1))


def test_what_is_compiled_gives_the_same(monkeypatch):
    """Without the compiler behind dynamo, which is slow on a CPU."""
    compile_eagerly = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    (task, _) = bench.MODELS
    arm = exact_arm(is_compiled=True)
    found = bench.two_stream_model(TINY_MODEL, task, arm)()
    torch.testing.assert_close(found, bench.expected_of(TINY_MODEL, task))


def test_ranks_are_of_the_scores():
    """A score is the first logit beyond the mean of the others, over the examples."""
    expected = torch.tensor([[[3.0, 0, 0]], [[2.0, 1, 1]], [[2.5, 3, 3]], [[9, 0, 0]]])
    assert bench.rank_correlation(expected + 5, expected) == pytest.approx(1)
    assert bench.rank_correlation(-expected, expected) == pytest.approx(-1)
    swapped = expected[[0, 1, 3, 2]]
    # 1 − 6 Σ d² / (n (n² − 1)), by hand: two heads three places away.
    assert bench.rank_correlation(swapped, expected) == pytest.approx(1 - 6 * 18 / 60)


# --- arms, floors, records -----------------------------------------------------------


def names(task, size):
    return [arm.name for arm in bench.arms_of(task, size)]


def test_arms_on_a_cpu():
    task = "model, our rules"
    both = ["two streams", "two streams, compiled", "ours (torch)"]
    assert names("norm", TINY) == both
    assert names(task, TINY_MODEL) == both
    many = bench.Size(144, 1, 2, 768)
    assert names(task, many) == ["two streams", "two streams, cached", "ours (torch)"]


def test_arms_on_a_gpu(monkeypatch):
    monkeypatch.setattr(bench.runtime, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(bench.runtime, "triton_supported", lambda: True)
    precision = bench.runtime.Precision(torch.bfloat16, "")
    monkeypatch.setattr(bench.runtime, "precision", lambda: precision)
    assert names("gate", TINY)[2:] == ["ours (torch)", "ours (triton)"]
    assert names("model, our rules", bench.GPT2_SMALL) == [
        "two streams",
        "two streams, cached",
        "two streams, compiled",
        "two streams, cached, compiled",
        "ours (triton)",
        "ours, float32",
    ]


def test_bytes_that_an_operation_moves():
    """By hand: β is read and written, t is read; 4 bytes each."""
    assert bench.moved_bytes("activation", TINY) == 4 * (2 * 3 + 1) * 10 * 512
    assert bench.moved_bytes("gate", TINY) == 4 * (3 * 3 + 2) * 10 * 512
    assert bench.moved_bytes("norm", TINY) == 4 * (2 * 3 + 1) * 10 * 128
    assert bench.moved_bytes("block", TINY) is None


def test_the_floor_of_a_model_is_what_its_sources_pass():
    """Layer by layer: half a layer where a source begins, all behind it, half at last.

    Half is 18 D² of matmuls of 24 D² behind the attention, and 6 D² before it.
    """
    size, (copied, multiplied) = bench.GPT2_SMALL, (4e12, 8e14)
    behind = sum(12 * (18 + 24 * (10 - layer) + 6) for layer in range(11))
    milliseconds = 1000 * 1024 * behind * 768**2 / multiplied
    traffic = 1000 * 1024 * 12 * 66 * 23 * 768 * 4 / copied
    found = bench.floor_milliseconds("model, our rules", size, (copied, multiplied))
    assert found == pytest.approx(milliseconds + traffic)
    block = bench.floor_milliseconds("block", size, (copied, multiplied))
    assert block == pytest.approx(1000 * 144 * 1024 * 24 * 768**2 / multiplied)


def records_of(task, size, monkeypatch, milliseconds=(8.0, 4.0, 2.0)):
    """Measure all arms but those that are compiled, with times that are given."""
    arms = [arm for arm in bench.arms_of(task, size) if not arm.is_compiled]
    records = []
    for arm, median in zip(arms, milliseconds, strict=False):
        times = Times(median, 1.0, 9.0, 5)
        monkeypatch.setattr(bench, "time_of", lambda call, times=times: times)
        found = bench.measure(size, arm, task, (1e9, 1e12))
        records.append(bench.record_of(size, arm, task, found))
    return records


def cells_of(records):
    rows = bench.table(records).splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_an_arm_becomes_a_record_and_a_row(monkeypatch):
    records = records_of("activation", TINY, monkeypatch)
    value = records[1].metrics
    assert value["floor_fraction"].value == pytest.approx(4 * 70 * 512 / 1e9 / 4e-3)
    assert value["error"].value < 1e-6
    cells = cells_of(records)
    assert [row[1] for row in cells] == ["two streams", "ours (torch)"]
    assert [row[5] for row in cells] == ["1.00", "2.00"]
    assert bench.differing(records) == []


def test_rows_of_a_model(monkeypatch):
    monkeypatch.setattr(bench, "STACKED", 4)
    cells = cells_of(records_of("model, our rules", TINY_MODEL, monkeypatch))
    assert [row[5:8] for row in cells][2] == ["4.00", "2.00", ""]
    assert cells[2][9:] == ["1.000000", "≥ 4 × two streams"]
    assert cells[1][10] == ""


def test_a_wrong_arm_is_named(monkeypatch):
    expected = bench.expected_of(TINY, "norm")
    monkeypatch.setattr(bench, "expected_of", lambda *_: 1.001 * expected)
    records = records_of("norm", TINY, monkeypatch)
    assert len(bench.differing(records)) == len(records) == 2
    assert bench.differing(records)[1].startswith("norm, 3×2×5, D=128, ours")


def test_an_arm_that_cannot_be_compiled_is_skipped(monkeypatch, capsys):
    """As without a C++ compiler. The others go on."""

    def refuse(worker, function, *_, seconds):
        raise ArmError("no compiler")

    monkeypatch.setattr(bench.Worker, "__call__", refuse)
    monkeypatch.setattr(bench, "time_of", lambda call: Times(2.0, 1.0, 3.0, 5))
    monkeypatch.setattr(bench, "MODULES", ("norm",))
    monkeypatch.setitem(bench.SIZES, "cpu", TINY)
    monkeypatch.setitem(bench.MODEL_SIZES, "cpu", [])
    records = list(bench.run_arms("cpu", (1e9, 1e12)))
    assert [record.arm for record in records] == ["two streams", "ours (torch)"]
    printed = capsys.readouterr().out
    assert "skipped: norm, 3×2×5, D=128, two streams, compiled: no compiler" in printed
