"""One stream beside a shared total, against two in float64 by the published rules."""

import importlib.util
import math

import pytest
import torch
from torch.nn import functional as F

from ftlib.ops import decomposition as ops
from ftlib.ops.decomposition import (
    decomposed_activation,
    decomposed_gate,
    decomposed_linear,
    decomposed_norm,
    relevant_epilogue_,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
each_backend = pytest.mark.parametrize(
    "backend", ["torch", pytest.param("triton", marks=needs_triton)]
)
each_width = pytest.mark.parametrize("width", [1, 7, 100, 896, 1030])
each_bias_rule = pytest.mark.parametrize("bias_rule", ["split", "irrelevant"])
each_activation = pytest.mark.parametrize(
    "activation", ["gelu", "gelu_tanh", "relu", "silu"]
)
# Triton's interpreter computes exp(-x) and x / 0 where they are not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SOURCES, ROWS, EPS = 3, 2, 1e-5

# What an activation's change may err by, in units of |β|: some ten roundings of 1, and
# twice as many where exponentials and quotients are those of a GPU.
ERROR = 1e-6 if DEVICE == "cpu" else 2e-6


# --- two streams, β and γ, in float64 -------------------------------------------------


def plain(activation, x):
    if activation == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    return getattr(F, activation)(x)


def split_bias(bias, beta, gamma):
    """The published shares, without the tolerance that keeps them from adding up."""
    whole = beta.abs() + gamma.abs()
    share = torch.where(whole > 0, beta.abs() / whole, 0.0)
    return bias * share, bias * (1 - share)


def two_stream_norm(beta, gamma, weight, bias, kind, bias_rule):
    """Both outputs, each stream divided by what divides the sum of both."""
    total = beta + gamma
    if kind == "layer":
        scale = 1 / (total.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()
        outputs = [
            (x - x.mean(-1, keepdim=True)) * scale * weight for x in (beta, gamma)
        ]
    else:
        scale = 1 / (total.square().mean(-1, keepdim=True) + EPS).sqrt()
        outputs = [x * scale * weight for x in (beta, gamma)]
    if bias is None:
        return outputs
    shares = (0 * bias, bias)
    if bias_rule == "split":
        shares = split_bias(bias, beta, gamma)
    return [output + share for output, share in zip(outputs, shares, strict=True)]


def two_stream_linear(beta, gamma, weight, bias, bias_rule, clean_up):
    beta, gamma = beta @ weight.T, gamma @ weight.T
    shares = (0 * bias, bias)
    if bias_rule == "split":
        shares = split_bias(bias, beta, gamma)
    beta, gamma = beta + shares[0], gamma + shares[1]
    return cleaned_up(beta, gamma) if clean_up else (beta, gamma)


def cleaned_up(beta, gamma):
    """Where signs are opposite the smaller part becomes 0, the larger the sum."""
    opposite = beta * gamma < 0
    larger = beta.abs() >= gamma.abs()
    total = beta + gamma
    cleaned = torch.where(opposite, torch.where(larger, total, 0.0), beta)
    return cleaned, total - cleaned


# --- data -----------------------------------------------------------------------------


def normal(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator)).to(DEVICE)


def streams(width, seed=0, sources=SOURCES, rows=ROWS):
    """A total, and relevant parts of all of it, of a little of it and of nothing."""
    total = normal(rows, width, seed=seed, scale=2.0)
    relevant = normal(sources, rows, width, seed=seed + 1)
    relevant[0] = total
    if sources > 1:
        relevant[1] = 0
    return relevant, total


def vectors(width):
    weight, bias = 1 + normal(width, seed=8, scale=0.3), normal(width, seed=9)
    return weight, bias


def close(found, expected, atol, rtol=0.0):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=atol, rtol=rtol)


# --- norm -----------------------------------------------------------------------------


@each_backend
@each_width
@each_bias_rule
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_is_that_of_two_streams(backend, width, kind, bias_rule):
    relevant, total = streams(width)
    weight, bias = vectors(width)
    found = decomposed_norm(
        relevant,
        total,
        weight,
        bias,
        eps=EPS,
        kind=kind,
        bias_rule=bias_rule,
        backend=backend,
    )
    beta, gamma = relevant.double(), total.double() - relevant.double()
    expected, rest = two_stream_norm(
        beta, gamma, weight.double(), bias.double(), kind, bias_rule
    )
    close(found, expected, atol=3e-6)
    assert (found[1] == 0).all()
    if kind == "layer" and width > 1:  # of one column, both norms are 0 and the bias
        normed = F.layer_norm(total, (width,), weight, bias, EPS).double()
        close(normed, (expected + rest)[2], atol=3e-6)
        if bias_rule == "split":
            close(found[0], normed, atol=3e-6)


@each_backend
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_adds_the_residual_first(backend, kind):
    relevant, total = streams(100)
    residual = normal(SOURCES, ROWS, 100, seed=5)
    weight, bias = vectors(100)
    arguments = {"eps": EPS, "kind": kind, "backend": backend}
    found, summed = decomposed_norm(
        relevant, total, weight, bias, residual=residual, **arguments
    )
    assert torch.equal(summed, relevant + residual)
    assert torch.equal(found, decomposed_norm(summed, total, weight, bias, **arguments))


@each_backend
def test_norm_of_float16_is_rounded_once(backend):
    relevant, total = (x.half() for x in streams(100))
    residual = normal(SOURCES, ROWS, 100, seed=5).half()
    weight, bias = vectors(100)
    found, summed = decomposed_norm(
        relevant, total, weight, bias, eps=EPS, residual=residual, backend=backend
    )
    assert found.dtype == summed.dtype == torch.float16
    beta = relevant.double() + residual.double()
    expected, _ = two_stream_norm(
        beta, total.double() - beta, weight.double(), bias.double(), "layer", "split"
    )
    close(found, expected, atol=1e-6, rtol=2**-11 * 1.01)
    close(summed, beta, atol=1e-7, rtol=2**-11)


@each_backend
def test_norm_far_from_zero(backend):
    """What a large common offset leaves of float32: the spread, not its square."""
    relevant, total = streams(896)
    offset = 1000.0
    relevant, total = relevant + offset, total + offset
    weight, _ = vectors(896)
    found = decomposed_norm(relevant, total, weight, eps=EPS, backend=backend)
    beta = relevant.double()
    expected, _ = two_stream_norm(
        beta, total.double() - beta, weight.double(), None, "layer", "split"
    )
    close(found, expected, atol=1e-3)


@each_backend
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norm_of_a_row_of_zeros(backend, kind):
    weight, bias = vectors(7)
    relevant, total = normal(2, 1, 7), torch.zeros(1, 7, device=DEVICE)
    relevant[1] = 0
    found = decomposed_norm(
        relevant, total, weight, bias, eps=EPS, kind=kind, backend=backend
    )
    assert found.isfinite().all()
    assert (found[1] == 0).all()


# --- linear ---------------------------------------------------------------------------


@each_backend
@each_width
@each_bias_rule
@pytest.mark.parametrize("clean_up", [False, True])
def test_linear_is_that_of_two_streams(backend, width, bias_rule, clean_up):
    relevant, total = streams(12)
    weight, bias = normal(width, 12, seed=3), normal(width, seed=4)
    found = decomposed_linear(
        relevant,
        F.linear(total, weight, bias),
        weight,
        bias,
        bias_rule=bias_rule,
        clean_up=clean_up,
        backend=backend,
    )
    beta, gamma = relevant.double(), total.double() - relevant.double()
    expected, rest = two_stream_linear(
        beta, gamma, weight.double(), bias.double(), bias_rule, clean_up
    )
    output = F.linear(total, weight, bias)
    allowed = 1e-5
    if bias_rule == "split":  # a share is as uncertain as a Wγ that is nearly 0
        W = weight.double()
        whole = (beta @ W.T).abs() + (gamma @ W.T).abs()
        summands = total.double().abs() @ W.abs().T + bias.abs()
        allowed = allowed + 1e-6 * bias.abs() * summands / whole
        assert ((found[0] - output).abs() <= allowed[0]).all()
    assert ((found - expected).abs() <= allowed).all()
    assert ((found + rest - output).abs() <= allowed).all()
    assert (found[1] == 0).all()


def test_linear_without_rules_adds_up():
    """β is linear in the source: of two sources together, the sum of both."""
    relevant, total = streams(12)
    weight, bias = normal(5, 12, seed=3), normal(5, seed=4)
    together = torch.cat((relevant, relevant.sum(0, keepdim=True)))
    output = F.linear(total, weight, bias)
    found = decomposed_linear(together, output, weight, bias, bias_rule="irrelevant")
    close(found[-1], found[:-1].sum(0).double(), atol=1e-5)
    assert torch.equal(found, decomposed_linear(together, output, weight))


@each_backend
def test_clean_up_of_every_combination_of_signs(backend):
    parts = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], device=DEVICE)
    beta, gamma = (x.flatten() for x in torch.meshgrid(parts, parts, indexing="ij"))
    found = relevant_epilogue_(
        beta[None, None].clone(), (beta + gamma)[None], clean_up=True, backend=backend
    )
    assert torch.equal(found[0, 0], cleaned_up(beta, gamma)[0])


@each_backend
def test_epilogue_works_in_place(backend):
    relevant, total = streams(100)
    found = relevant_epilogue_(
        relevant, total, normal(100, seed=4), clean_up=True, backend=backend
    )
    assert found is relevant
    assert torch.equal(found, found.clamp(total.clamp(max=0), total.clamp(min=0)))


@each_backend
def test_a_nan_does_not_get_lost(backend):
    relevant, total = streams(7)
    relevant[2, 0, 3] = math.nan
    total[1, 2] = math.nan
    for bias in (None, normal(7)):
        found = relevant_epilogue_(
            relevant.clone(), total, bias, clean_up=True, backend=backend
        )
        assert found[2, 0, 3].isnan()
        assert found[2, 1, 2].isnan()
    found = decomposed_activation(relevant, total, "relu", backend=backend)
    assert found[2, 0, 3].isnan()
    assert found[2, 1, 2].isnan()


# --- activation -----------------------------------------------------------------------


@each_backend
@each_width
@each_activation
def test_activation_is_that_of_two_streams(backend, width, activation):
    relevant, total = streams(width)
    found = decomposed_activation(relevant, total, activation, backend=backend)
    beta, gamma = relevant.double(), total.double() - relevant.double()
    expected = plain(activation, beta + gamma) - plain(activation, gamma)
    close(found, expected, atol=1e-5)
    close(found[0], plain(activation, total).double(), atol=2e-6)
    assert (found[1] == 0).all()


@each_backend
@each_activation
@pytest.mark.parametrize("size", [1e-9, 1e-6, 1e-3, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("spread", [1.0, 4.0, 30.0])
def test_small_relevant_parts_do_not_cancel(backend, activation, size, spread):
    """Where f(t) − f(t − β) in float32 would have an error of a rounding of f(t)."""
    total = normal(ROWS, 501, seed=1, scale=spread)
    relevant = normal(SOURCES, ROWS, 501, seed=2, scale=size)
    found = decomposed_activation(relevant, total, activation, backend=backend)
    expected = change(activation, total.double(), relevant.double())
    assert ((found - expected).abs() <= ERROR * relevant.abs()).all()


def change(activation, t, beta):
    """f(t) − f(t − β) = ∫ f' in float64, by Gauss–Legendre where that is smooth."""
    direct = plain(activation, t) - plain(activation, t - beta)
    if activation == "relu":
        exact = (torch.sign(t) == torch.sign(t - beta)) & (t != 0)
        return torch.where(exact, torch.where(t > 0, beta, 0.0), direct)
    nodes, weights = torch.tensor(GAUSS, dtype=torch.float64, device=DEVICE)
    points = (t[..., None] - beta[..., None] * (nodes + 1) / 2).requires_grad_()
    with torch.enable_grad():
        slopes = torch.autograd.grad(plain(activation, points).sum(), points)[0]
    return torch.where(beta.abs() < 0.01, beta * (slopes @ weights) / 2, direct)


ROOT = math.sqrt(3 / 5)
GAUSS = ((-ROOT, 0.0, ROOT), (5 / 9, 8 / 9, 5 / 9))


@each_activation
def test_activation_of_float64_is_as_exact(activation):
    total = normal(ROWS, 501, seed=1, scale=4.0).double()
    for size in (1e-9, 1e-3, 1e-2, 3.0):
        relevant = normal(SOURCES, ROWS, 501, seed=2, scale=size).double()
        found = decomposed_activation(relevant, total, activation)
        expected = change(activation, total, relevant)
        # Near 0.01 the reference itself is a difference.
        assert ((found - expected).abs() <= 1e-12 * relevant.abs() + 4e-15).all()


@each_backend
@each_activation
def test_activation_far_from_zero(backend, activation):
    total = torch.tensor([[-1e4, -300.0, -90.0, 90.0, 300.0, 1e4]], device=DEVICE)
    relevant = torch.stack(
        [total, 0 * total, total / 3, 2 * total, -total, total / 1e6]
    )
    found = decomposed_activation(relevant, total, activation, backend=backend)
    expected = plain(activation, total) - plain(activation, total - relevant.double())
    close(found, expected, atol=1e-30, rtol=1e-6)


# --- gate -----------------------------------------------------------------------------


@each_backend
@each_width
@each_activation
def test_gate_is_that_of_two_streams(backend, width, activation):
    (beta_g, g), (beta_u, u) = streams(width), streams(width, seed=20)
    found = decomposed_gate(beta_g, g, beta_u, u, activation, backend=backend)
    G, U = g.double(), u.double()
    rest = plain(activation, G - beta_g.double()) * (U - beta_u.double())
    close(found, plain(activation, G) * U - rest, atol=5e-5, rtol=1e-6)
    close(found[0], (plain(activation, G) * U).double(), atol=1e-5)
    assert (found[1] == 0).all()


@each_backend
@each_activation
def test_small_relevant_parts_of_a_gate_do_not_cancel(backend, activation):
    g, u = normal(ROWS, 300, seed=1, scale=3.0), normal(ROWS, 300, seed=2, scale=3.0)
    beta_g = normal(SOURCES, ROWS, 300, seed=3, scale=1e-6)
    beta_u = normal(SOURCES, ROWS, 300, seed=4, scale=1e-6)
    found = decomposed_gate(beta_g, g, beta_u, u, activation, backend=backend)
    G, U, beta_G, beta_U = (x.double() for x in (g, u, beta_g, beta_u))
    f = plain(activation, G)
    expected = f * beta_U + change(activation, G, beta_G) * (U - beta_U)
    scale = G.abs() * beta_U.abs() + beta_G.abs() * U.abs()
    assert ((found - expected).abs() <= ERROR * scale).all()


@each_backend
def test_gate_is_linear_in_up(backend):
    """With β_g = 0, what is left is f(g)β_u."""
    (beta_g, g), (beta_u, u) = streams(100), streams(100, seed=20)
    found = decomposed_gate(0 * beta_g, g, beta_u, u, "silu", backend=backend)
    close(found, F.silu(g.double()) * beta_u.double(), atol=2e-6)


# --- layouts, dtypes, gradients -------------------------------------------------------


def strided(tensor, how):
    """The same numbers in another layout."""
    if how == "columns":
        return tensor.mT.contiguous().mT
    wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    wide[..., 1:-2] = tensor
    return wide[..., 1:-2]


@each_backend
@pytest.mark.parametrize("how", ["columns", "part of a row"])
def test_strided_inputs(backend, how):
    relevant, total = streams(100)
    residual = normal(SOURCES, ROWS, 100, seed=5)
    weight, bias = vectors(100)

    def results(place):
        beta, t, r = place(relevant), place(total), place(residual)
        options = {"eps": EPS, "residual": r, "backend": backend}
        return (
            *decomposed_norm(beta, t, weight, bias, **options),
            decomposed_activation(beta, t, "silu", backend=backend),
            decomposed_gate(beta, t, r, t, "silu", backend=backend),
            relevant_epilogue_(relevant.clone(), t, bias, backend=backend),
        )

    moved = results(lambda x: strided(x, how))
    for found, expected in zip(moved, results(lambda x: x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.is_contiguous()


@each_backend
def test_more_dimensions_are_rows(backend):
    """As of attention: (sources, batch, time, D) beside (batch, time, D)."""
    relevant, total = streams(12, rows=6)
    weight, bias = vectors(12)
    options = {"eps": EPS, "backend": backend}
    flat = decomposed_norm(relevant, total, weight, bias, **options)
    beta, t = relevant.view(SOURCES, 2, 3, 12), total.view(2, 3, 12)
    found = decomposed_norm(beta, t, weight, bias, **options)
    assert torch.equal(found, flat.view(beta.shape))
    single = decomposed_norm(relevant[:, 0], total[0], weight, bias, **options)
    assert torch.equal(single, flat[:, 0])


@each_backend
@pytest.mark.parametrize("shape", [(0, 2, 7), (2, 0, 7)])
def test_nothing_gives_nothing(backend, shape):
    relevant, total = normal(*shape), normal(*shape[1:])
    weight, bias = vectors(7)
    found = [
        decomposed_norm(relevant, total, weight, bias, eps=EPS, backend=backend),
        decomposed_activation(relevant, total, "gelu", backend=backend),
        decomposed_gate(relevant, total, relevant, total, "gelu", backend=backend),
        relevant_epilogue_(relevant, total, bias, backend=backend),
    ]
    assert all(output.shape == shape for output in found)


@pytest.mark.parametrize("sources", [1, 5])
@pytest.mark.parametrize("elements", [1, 30, 10**6])
def test_blocks_make_no_difference(sources, elements, monkeypatch):
    relevant, total = streams(10, sources=sources, rows=7)
    weight, bias = vectors(10)

    def results():
        return torch.stack(
            [
                decomposed_norm(relevant, total, weight, bias, eps=EPS),
                decomposed_activation(relevant, total, "gelu_tanh"),
                decomposed_gate(relevant, total, relevant, total, "gelu"),
                relevant_epilogue_(relevant.clone(), total, bias, clean_up=True),
            ]
        )

    expected = results()
    monkeypatch.setattr(ops, "BLOCK_ELEMENTS", elements)
    torch.testing.assert_close(results(), expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_computed_in_float32():
    relevant, total = (x.bfloat16() for x in streams(100))
    found = decomposed_activation(relevant, total, "gelu", backend="torch")
    assert found.dtype == torch.bfloat16
    beta, t = relevant.double(), total.double()
    close(found, F.gelu(t) - F.gelu(t - beta), atol=1e-5, rtol=2**-8)


def test_a_float64_total_is_not_rounded():
    relevant, total = streams(100)
    total = total.double() + 1e-9
    weight, bias = vectors(100)
    found = decomposed_norm(relevant.double(), total, weight, bias, eps=EPS)
    expected, _ = two_stream_norm(
        relevant.double(),
        total - relevant.double(),
        weight.double(),
        bias.double(),
        "layer",
        "split",
    )
    close(found, expected, atol=1e-13)


def test_no_gradient_flows():
    relevant, total = streams(7)
    found = decomposed_activation(relevant.requires_grad_(), total, "silu")
    assert not found.requires_grad


# --- errors ---------------------------------------------------------------------------


def test_what_does_not_fit_is_said():
    relevant, total = streams(7)
    weight, bias = vectors(7)

    def norm(beta=relevant, t=total, w=weight, b=bias, **options):
        return decomposed_norm(beta, t, w, b, **{"eps": EPS} | options)

    with pytest.raises(ValueError, match=r"relevant has shape \(3, 2, 7\) and total"):
        norm(t=total[:1])
    with pytest.raises(ValueError, match=r"weight has shape \(6,\): expected \(7,\)"):
        norm(w=weight[:6])
    with pytest.raises(ValueError, match="bias has shape"):
        norm(b=bias[:6])
    with pytest.raises(ValueError, match="kind is 'batch': choose from layer, rms"):
        norm(kind="batch")
    with pytest.raises(ValueError, match="bias_rule is 'half'"):
        norm(bias_rule="half")
    with pytest.raises(ValueError, match=r"residual has shape \(1, 2, 7\)"):
        norm(residual=relevant[:1])
    with pytest.raises(ValueError, match=r"total is torch\.int64: cast it"):
        norm(t=total.long())
    with pytest.raises(
        ValueError, match="backend is 'cuda': choose from torch, triton"
    ):
        norm(backend="cuda")
    with pytest.raises(ValueError, match=r"so expected \(7, 5\)"):
        decomposed_linear(normal(2, 2, 5), total, normal(5, 7))
    with pytest.raises(ValueError, match=r"pass relevant\.contiguous\(\)"):
        relevant_epilogue_(strided(relevant, "columns"), total, bias)
    with pytest.raises(ValueError, match="activation is 'tanh'"):
        decomposed_activation(relevant, total, "tanh")
    with pytest.raises(ValueError, match="they are multiplied, so they must agree"):
        decomposed_gate(relevant, total, relevant[:2], total, "silu")
    with pytest.raises(ValueError, match=r"the tensors are on .*meta"):
        norm(t=total.to("meta"))


@needs_triton
def test_what_the_kernels_cannot_take_is_said():
    relevant, total = streams(7)
    with pytest.raises(ValueError, match="cannot take float64: cast the tensors"):
        decomposed_activation(relevant.double(), total, "silu", backend="triton")
    relevant, total = streams(20_000, rows=1)
    weight, _ = vectors(20_000)
    with pytest.raises(ValueError, match="rows of 20000 columns, only up to 8192"):
        decomposed_norm(relevant, total, weight, eps=EPS, backend="triton")
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET=1"):
            decomposed_activation(relevant.bfloat16(), total, "silu", backend="triton")
