"""Sparsemax, 1.5-entmax and the top-k gate against independent float64 answers."""

import importlib
import importlib.util
from functools import partial

import entmax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ftlib.ops import backends, simplex
from ftlib.ops.simplex import entmax15, sparsemax, top_k_gate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
TRITON = pytest.param("triton", marks=needs_triton)
BACKENDS = ["torch", TRITON]
COLUMNS = [1, 7, 127, 1000, 4099]
INFINITY = torch.inf

# Each map with the package's exact form, which sorts.
SPARSE = {"sparsemax": sparsemax, "entmax15": entmax15}
EXACT = {"sparsemax": entmax.sparsemax, "entmax15": entmax.entmax15}
MAPS = SPARSE | {"gate": partial(top_k_gate, k=2)}

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_sparse = pytest.mark.parametrize("name", SPARSE)
each_map = pytest.mark.parametrize("name", MAPS)


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE)


def hard_rows(columns):
    """Rows (N, V) in float32 that have broken implementations, ours or others'."""
    x = normal(columns, seed=columns).cpu()
    ramp = torch.linspace(0, 1, columns)
    masked = torch.where(torch.arange(columns) % 3 == 1, -1e30, x)
    gap = torch.full((columns,), -3e4).index_fill(0, torch.tensor(columns // 2), 3e4)
    steps = torch.full((columns,), -1.0).index_fill(0, torch.tensor(0), 0.0)
    rows = {
        "normal": x,
        "wide": 10 * x,
        "nearly flat": 1e-3 * x,
        "all equal": torch.full((columns,), 0.3),
        "ties": (2 * x).round() / 2,
        "a tie at the threshold": steps,
        "far above": x + 1e4,
        "far below": x - 1e4,
        "masked": masked,
        "all masked": torch.full((columns,), -1e30),
        "one-hot": gap,
        "geometric": -(0.99 ** torch.arange(columns)),
        "geometric from the top": -(2.0 ** (torch.arange(columns) % 50 - 40)),
        "ramp": -0.9 * ramp,
        "steep ramp": -30 * ramp,
    }
    return torch.stack(list(rows.values())).to(DEVICE)


def gate_oracle(row, k):
    """Softmax over the k first of the columns ordered by logit, then by number."""
    order = sorted(range(len(row)), key=lambda j: (-row[j], j))[:k]
    probs = torch.zeros(len(row), dtype=torch.float64)
    probs[order] = torch.tensor([row[j] for j in order]).double().softmax(0)
    return probs


def gradient(name, logits, upstream, **options):
    logits = logits.detach().clone().requires_grad_()
    MAPS[name](logits, **options).backward(upstream)
    return logits.grad


# --- values ------------------------------------------------------------------------


@each_backend
@each_sparse
@pytest.mark.parametrize("columns", COLUMNS)
def test_sparse_maps_agree_with_the_exact_ones_in_float64(name, columns, backend):
    logits = hard_rows(columns)
    expected = EXACT[name](logits.double(), -1)
    probs = SPARSE[name](logits, backend=backend)
    assert probs.dtype == torch.float32
    assert (probs - expected).abs().max() <= 1e-6
    assert (probs.double().sum(-1) - 1).abs().max() <= 2e-6
    torch.testing.assert_close(probs > 0, expected > 0, rtol=0, atol=0)


@each_sparse
def test_the_twins_are_exact_in_float64(name):
    logits = hard_rows(1000).double()
    expected = EXACT[name](logits, -1)
    assert (SPARSE[name](logits) - expected).abs().max() <= 1e-14


@each_backend
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_gate_is_the_softmax_of_the_first_k_in_order(columns, backend):
    logits = hard_rows(columns)
    for k in sorted({1, (columns + 1) // 2, columns}):
        probs = top_k_gate(logits, k, backend=backend).cpu().double()
        expected = torch.stack([gate_oracle(row.tolist(), k) for row in logits])
        assert (probs - expected).abs().max() <= 1e-6
        assert torch.equal(probs > 1e-40, expected > 1e-40)
        assert (probs.sum(-1) - 1).abs().max() <= 2e-6


@each_backend
def test_the_gate_tells_apart_logits_that_agree_once_the_largest_is_subtracted(backend):
    close = 1 + 2**-23
    logits = torch.tensor([[60.0, 1.0, close, 1.0]], device=DEVICE)
    probs = top_k_gate(logits, 2, backend=backend)
    assert (probs > 0).tolist() == [[True, False, True, False]]


@each_backend
def test_the_gate_takes_zeros_of_both_signs_for_equal(backend):
    logits = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=DEVICE)
    assert top_k_gate(logits, 3, backend=backend)[0, 3] == 0


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@each_backend
@each_map
def test_infinite_and_undefined_logits(name, backend):
    logits = torch.tensor(
        [
            [-INFINITY, 1.0, -INFINITY, 1.5],
            [-INFINITY, 2.0, -INFINITY, -INFINITY],
            [-INFINITY, -INFINITY, -INFINITY, -INFINITY],
            [torch.nan, 1.0, 2.0, 3.0],
            [-torch.nan, 1.0, 2.0, 3.0],
            [INFINITY, 1.0, 2.0, 3.0],
        ],
        device=DEVICE,
    )
    probs = MAPS[name](logits, backend=backend)
    finite = MAPS[name](logits[:2].clamp(min=-1e30), backend="torch")
    torch.testing.assert_close(probs[:2], finite, rtol=0, atol=1e-6)
    assert probs[:2][logits[:2] == -INFINITY].eq(0).all()
    uniform = [0.5, 0.5, 0, 0] if name == "gate" else [0.25] * 4
    assert probs[2].tolist() == uniform
    assert probs[3:].isnan().all()


@each_sparse
@pytest.mark.parametrize("columns", [1000, 65536])
def test_the_number_of_newton_steps_is_bounded(name, columns, monkeypatch):
    taken = []
    step = simplex._newton_step
    monkeypatch.setattr(
        simplex, "_newton_step", lambda *a: (taken.append(1), step(*a))[1]
    )
    j = torch.arange(columns)
    slow = [-(r**j) for r in (0.5, 0.9, 0.99, 0.999)]
    slow += [-(torch.linspace(0, 1, columns) ** q) for q in (0.1, 1, 3, 10)]
    SPARSE[name](torch.stack(slow))
    assert 4 <= len(taken) <= torch.tensor(columns).log2() + 13


# --- gradients ---------------------------------------------------------------------


@each_map
def test_gradcheck_in_float64(name):
    logits = normal(3, 5, seed=3).double().requires_grad_()
    assert torch.autograd.gradcheck(MAPS[name], logits)
    assert torch.autograd.gradcheck(partial(MAPS[name], dim=0), logits)


@needs_triton
@each_map
@pytest.mark.parametrize("columns", [2, 7, 127, 1000, 4099, 8200])
def test_triton_gradients_agree_with_the_twin_in_float64(name, columns):
    logits, upstream = normal(4, columns), normal(4, columns, seed=1) + 10
    expected = gradient(name, logits.double(), upstream.double())
    found = gradient(name, logits, upstream, backend="triton")
    assert (found - expected).abs().max() <= 2e-5
    assert torch.equal(found != 0, expected != 0)


@each_backend
@each_map
def test_an_upstream_gradient_that_is_one_number_has_no_effect(name, backend):
    logits = normal(3, 40).requires_grad_()
    MAPS[name](logits, backend=backend).sum().backward()  # expanded: strides 0
    assert logits.grad.abs().max() <= 1e-6
    weighted = gradient(name, logits, normal(40, seed=2).expand(3, 40), backend=backend)
    full = gradient(name, logits, normal(40, seed=2).repeat(3, 1), backend=backend)
    assert torch.equal(weighted, full)
    assert full.abs().max() > 1e-2


@each_backend
@each_map
def test_infinite_upstream_gradients_where_p_is_zero_count_as_zero(name, backend):
    logits = torch.tensor([[2.0, 1.9, -5.0, -6.0]], device=DEVICE, requires_grad=True)
    probs = MAPS[name](logits, backend=backend)
    torch.special.entr(probs).sum().backward()
    assert logits.grad.isfinite().all()
    on = torch.tensor([[2.0, 1.9]], device=DEVICE, requires_grad=True)
    torch.special.entr(MAPS[name](on)).sum().backward()
    torch.testing.assert_close(logits.grad[:, :2], on.grad, rtol=0, atol=1e-6)
    assert (logits.grad[:, 2:] == 0).all()


# --- precision ---------------------------------------------------------------------


@each_map
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_results_and_gradients_err_like_one_rounding(name, dtype):
    logits = normal(20, 500, scale=2).to(dtype)
    upstream = (normal(20, 500, seed=1) + 3).to(dtype)
    exact = MAPS[name](logits.double())
    probs = MAPS[name](logits)
    assert probs.dtype == dtype
    torch.testing.assert_close(probs, exact.to(dtype), rtol=2**-8, atol=1e-6)
    exact = gradient(name, logits.double(), upstream.double())
    found = gradient(name, logits, upstream)
    assert found.dtype == dtype
    rounding = (exact.to(dtype) - exact).norm()
    assert (found - exact).norm() <= 2 * rounding


def test_float16_keeps_the_weight_of_a_tail_that_it_cannot_hold():
    logits = torch.full((1, 40_001), -2 + 2**-10)
    logits[0, 0] = 0
    upstream = torch.zeros_like(logits).index_fill(1, torch.tensor(0), 1.0)
    half = logits.half()
    assert (entmax15(half) > 0).sum() == 1
    exact = gradient("entmax15", logits.double(), upstream.double())[0, 0]
    assert 0.5 < exact < 0.9
    assert (gradient("entmax15", half, upstream.half())[0, 0] - exact).abs() <= 1e-3


@needs_triton
def test_the_kernels_compute_in_float32_whatever_they_read_and_write():
    kernels = importlib.import_module("ftlib.kernels.simplex")
    logits, upstream = normal(5, 300).half(), normal(5, 300, seed=1).half()
    for alpha in (simplex.SPARSEMAX, simplex.ENTMAX15, simplex.SOFTMAX):
        solve = "top_k_rows" if alpha == simplex.SOFTMAX else "entmax_rows"
        argument = 20 if alpha == simplex.SOFTMAX else alpha
        expected = getattr(simplex, solve)(logits, argument)
        probs = getattr(kernels, solve)(logits, argument)
        torch.testing.assert_close(probs, expected, rtol=2**-10, atol=6e-8)
        expected = simplex.gradient_rows(probs, upstream, alpha)
        found = kernels.gradient_rows(probs, upstream, alpha)
        torch.testing.assert_close(found, expected, rtol=2**-10, atol=1e-6)


@needs_triton
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter's bfloat16 is wrong")
@each_map
def test_triton_in_bfloat16_agrees_with_its_twin(name):
    logits = normal(20, 500, scale=2).bfloat16()
    upstream = normal(20, 500, seed=1).bfloat16()
    for function in (MAPS[name], partial(gradient, name, upstream=upstream)):
        expected, found = function(logits), function(logits, backend="triton")
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-6)


# --- shapes ------------------------------------------------------------------------


@each_backend
@each_map
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_any_dimension_and_any_strides(name, dim, backend):
    logits = normal(4, 5, 6).transpose(0, 2)[:, ::2]
    upstream = normal(5, 6, 4).permute(1, 0, 2)[:, ::2]
    size = logits.shape[dim]
    rows = logits.movedim(dim, -1).reshape(-1, size)
    probs = MAPS[name](logits, dim=dim, backend=backend)
    expected = MAPS[name](rows, backend="torch")
    torch.testing.assert_close(
        probs.movedim(dim, -1).reshape(-1, size), expected, rtol=0, atol=1e-6
    )
    found = gradient(name, logits, upstream, dim=dim, backend=backend)
    expected = gradient(name, rows, upstream.movedim(dim, -1).reshape(-1, size))
    torch.testing.assert_close(
        found.movedim(dim, -1).reshape(-1, size), expected, rtol=0, atol=1e-6
    )


@each_backend
@each_map
def test_no_rows_give_no_rows(name, backend):
    logits = torch.empty(0, 4, device=DEVICE, requires_grad=True)
    probs = MAPS[name](logits, backend=backend)
    probs.sum().backward()
    assert probs.shape == logits.grad.shape == (0, 4)


# --- properties --------------------------------------------------------------------

# Multiples of 1/64, so that shifts and permutations are exact and ties are common.
grids = st.lists(st.integers(-300, 300), min_size=1, max_size=24)


@each_backend
@each_sparse
@settings(max_examples=20, deadline=None)
@given(row=grids, shift=st.integers(-64_000, 64_000), seed=st.integers(0, 9))
def test_sparse_maps_are_equivariant_and_follow_the_order(
    name, backend, row, shift, seed
):
    logits = torch.tensor(row, device=DEVICE) / 64
    probs = SPARSE[name](logits, backend=backend)
    expected = EXACT[name](logits.double(), -1)
    assert (probs - expected).abs().max() <= 1e-6
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))
    moved = SPARSE[name](logits[order] + shift / 64, backend=backend)
    torch.testing.assert_close(moved, probs[order], rtol=0, atol=1e-6)
    ranked = probs[logits.argsort()]
    assert (ranked.diff() >= 0).all()


@each_backend
@settings(max_examples=20, deadline=None)
@given(data=st.data(), row=grids)
def test_the_gate_is_exact_on_any_row(backend, data, row):
    k = data.draw(st.integers(1, len(row)))
    logits = torch.tensor(row, device=DEVICE) / 64
    probs = top_k_gate(logits, k, backend=backend).cpu().double()
    expected = gate_oracle(logits.tolist(), k)
    assert torch.equal(probs > 0, expected > 0)
    assert (probs - expected).abs().max() <= 1e-6
    assert (probs > 0).sum() == k


@each_map
@settings(max_examples=20, deadline=None)
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    data=st.data(),
)
def test_every_slice_along_the_dimension_sums_to_one(name, shape, data):
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    if name == "gate":
        shape[dim] += 1
    probs = MAPS[name](normal(*shape, scale=3), dim=dim)
    assert probs.shape == torch.Size(shape)
    assert (probs >= 0).all()
    assert (probs.sum(dim) - 1).abs().max() <= 1e-6


# --- registration ------------------------------------------------------------------


@each_backend
def test_opcheck(backend):
    logits = normal(2, 9).requires_grad_()
    for alpha in (simplex.SPARSEMAX, simplex.ENTMAX15):
        torch.library.opcheck(simplex._entmax, (logits, alpha, backend))
    transposed = normal(9, 2).T.requires_grad_()
    torch.library.opcheck(simplex._top_k_gate, (transposed, 3, backend))
    probs = logits.detach().softmax(-1)
    torch.library.opcheck(
        simplex._simplex_gradient, (probs, normal(2, 9), simplex.SOFTMAX, backend)
    )


@each_backend
@each_map
def test_compiled_equals_eager(name, backend):
    def loss(logits):
        return (MAPS[name](logits, dim=0, backend=backend) * target).sum()

    target = normal(9, 3, seed=5)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        logits = normal(9, 3).requires_grad_()
        value = function(logits)
        value.backward()
        results.append((value, logits.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


# --- back ends and errors ----------------------------------------------------------


class StandIn:
    """A module of kernels that says only what it can take."""

    MAX_COLUMNS = 10
    INTERPRETED = True

    @staticmethod
    def entmax_rows(rows, alpha):
        return torch.full_like(rows, 7)


@pytest.fixture
def recent_gpu(monkeypatch):
    """What this module sees of a GPU of capability 8.0, with kernels that answer 7."""
    monkeypatch.setattr(backends, "triton_supported", lambda device: True)
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: StandIn)


def test_the_device_chooses_the_back_end(recent_gpu, monkeypatch):
    short, long = torch.ones(2, 8), torch.ones(2, 16)
    assert (sparsemax(short) == 7).all()
    assert (sparsemax(long) == 1 / 16).all()
    assert (sparsemax(short.double()) == 1 / 8).all()
    assert (sparsemax(short, backend="torch") == 1 / 8).all()
    monkeypatch.setattr(backends, "triton_supported", lambda device: False)
    assert (sparsemax(short) == 1 / 8).all()


def test_errors_say_what_the_kernels_cannot_take(recent_gpu, monkeypatch):
    def refused(logits, message):
        with pytest.raises(ValueError, match=message):
            sparsemax(logits, backend="triton")

    refused(torch.ones(3).double(), "cast the tensors to float32")
    refused(torch.ones(11), "rows of 11 columns, only up to 10")
    refused(torch.ones(3).bfloat16(), "bfloat16 under TRITON_INTERPRET=1")
    monkeypatch.setattr(StandIn, "INTERPRETED", False)
    refused(torch.ones(3), "tensors on cpu: move them to a GPU")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sparsemax(torch.ones(3), backend="cuda"), "backend is 'cuda'"),
        (lambda: entmax15(torch.tensor([1, 2])), "logits are torch.int64"),
        (lambda: sparsemax(torch.ones(2, 0)), r"shape \(2, 0\): dimension -1 is empty"),
        (lambda: top_k_gate(torch.tensor(1.0), 1), "logits are a single number"),
        (lambda: top_k_gate(torch.ones(2, 3), 4), "k is 4 and dimension -1 holds 3"),
        (lambda: top_k_gate(torch.ones(2, 3), 3, dim=0), "k is 3 and dimension 0"),
        (lambda: top_k_gate(torch.ones(2, 3), 0), "k is 0"),
    ],
)
def test_errors_say_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_dimension_that_is_not_there():
    with pytest.raises(IndexError, match="Dimension out of range"):
        sparsemax(torch.ones(2, 3), dim=2)
