"""The kernels against float64 PyTorch, on a GPU or else interpreted on the CPU."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from ftlib.kernels import vocabulary_head as kernels  # noqa: E402
from ftlib.kernels.types import Logits, MomentFlags, Moments, Sced  # noqa: E402

# The interpreter's numpy warns where σ(x) = 1 / (1 + exp(−x)) ends in 1 / inf.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 3 if DEVICE == "cuda" else 2]
EVERY = MomentFlags(second=True, squares=True, total=True, argmax=True)
PLAIN = Logits()
CAPPED = Logits(scale=0.7, softcap=30.0)
SCED_EXPONENTS = [(1.0, 0.0), (2.0, 1.0), (1.5, 0.5), (2.5, 2.0)]


# --- the oracle: float64, from the same inputs --------------------------------------


def logits(products, transform):
    z = transform.scale * products.double()
    c = transform.softcap
    return z if c is None else c * torch.tanh(z / c)


def statistics(z):
    """Each statistic of rows of float64 logits, by its definition."""
    u = torch.log_softmax(z, dim=-1)
    p = u.exp()
    surprise = torch.where(p > 0, -u, 0.0)
    H = (p * surprise).sum(-1)
    return {
        "entropy": H,
        "log_sum_exp": torch.logsumexp(z, -1),
        "collision_prob": p.square().sum(-1),
        "mean_logit": z.mean(-1),
        "varentropy": (p * (surprise - H[..., None]).square()).sum(-1),
    }


def from_moments(moments, columns):
    """The same statistics, and the log-probability of the maximum, from the sums."""
    m, s, t, t2, squares, total, _ = (x.double() for x in moments)
    return {
        "entropy": s.log() - t / s,
        "log_sum_exp": m + s.log(),
        "collision_prob": squares / s.square(),
        "mean_logit": total / columns,
        "varentropy": t2 / s - (t / s).square(),
    }


def merge(parts):
    """Moments of the whole row, in float64, from those of its splits."""
    m, s, t, t2, squares, total, argmax = (x.double() for x in parts)
    d = m - m.amax(0)
    return Moments(
        m.amax(0),
        (d.exp() * s).sum(0),
        (d.exp() * (t + d * s)).sum(0),
        (d.exp() * (t2 + 2 * d * t + d.square() * s)).sum(0),
        ((2 * d).exp() * squares).sum(0),
        total.sum(0),
        torch.where(d == 0, argmax, math.inf).amin(0),
    )


def first_maximum(z):
    return torch.from_numpy(np.argmax(z.cpu().numpy(), axis=-1)).to(z.device)


def check_moments(moments, products, transform):
    z = logits(products, transform)
    observed, expected = from_moments(moments, z.shape[1]), statistics(z)
    # A float32 logit is itself known to this much only.
    rounding = 2**-23 * z.abs().amax(-1)
    for name in ("entropy", "varentropy", "collision_prob"):
        error = (observed[name] - expected[name]).abs()
        assert (error <= 2e-5 * (1 + expected[name])).all(), (name, error)
    for name in ("log_sum_exp", "mean_logit"):
        error = (observed[name] - expected[name]).abs()
        assert (error <= 2e-5 + 2 * rounding).all(), (name, error)
    target = torch.arange(len(z), device=z.device) * 7 % z.shape[1]
    log_prob = pick(z, target).float() - moments.maximum.float()
    log_prob = log_prob.double() - moments.sum_exp.double().log()
    error = (log_prob - pick(torch.log_softmax(z, -1), target)).abs()
    assert (error <= 2e-5 + 2 * rounding * (transform.softcap is not None)).all(), error
    if transform.softcap is None:
        assert torch.equal(moments.argmax.long(), first_maximum(z))
    else:  # where the cap is nearly reached, float32 has ties that float64 has not
        assert (pick(z, moments.argmax.long()) >= z.amax(-1) - 2 * rounding).all()


def pick(z, columns):
    return z.gather(-1, columns[:, None])[:, 0]


# --- hard rows ------------------------------------------------------------------------


def hard_rows(columns, dtype=torch.float32, seed=0):
    """Products of every shape that has broken a kernel of this kind."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(9, columns, generator=generator)
    rows = torch.stack(
        [
            noise[0],
            12 * noise[1],  # peaked
            0 * noise[2],  # flat: every column ties
            noise[3] - 300,
            noise[4] + 1e4,
            3 * noise[5] - 1e4,
            noise[6],  # one column holds nearly all
            noise[7],  # the maximum three times
            noise[8],  # the maximum in the last column
        ]
    )
    rows[6, columns // 2] = 25
    rows[7, [1, columns // 2, columns - 2]] = 9
    rows[8, -1] = 12
    return rows.to(dtype).to(DEVICE)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [7, 127, 1000])
def test_moments_of_hard_rows(columns, dtype, transform):
    tile = hard_rows(columns, dtype)
    check_moments(kernels.row_moments(tile, transform, EVERY), tile, transform)


def test_moments_over_many_blocks():
    tile = hard_rows(32_127)[[1, 4, 7]]
    check_moments(kernels.row_moments(tile, PLAIN, EVERY), tile, PLAIN)


def test_entropy_keeps_its_digits_under_an_offset():
    """Where log Σe − Σz·e/Σe, the textbook's form, loses what the offset takes."""
    generator = torch.Generator().manual_seed(1)
    tile = torch.randn(4, 1000, generator=generator) + 1e4
    tile[:, 3] += 16
    expected = statistics(tile.double())["entropy"]

    e = (tile - tile.amax(-1, keepdim=True)).exp()
    raw = torch.logsumexp(tile, -1) - (tile * e).sum(-1) / e.sum(-1)
    assert (raw - expected).abs().max() > 7e-4

    moments = kernels.row_moments(tile.to(DEVICE), PLAIN, EVERY)
    entropy = from_moments(moments, 1000)["entropy"].cpu()
    assert (entropy - expected).abs().max() <= 1e-6


def test_columns_of_minus_infinity_have_no_probability():
    tile = hard_rows(127)[:2]
    tile[:, 100:] = -math.inf
    moments = kernels.row_moments(tile, PLAIN, EVERY)
    tile = tile[:, :100]
    trimmed = kernels.row_moments(tile, PLAIN, EVERY)
    for name in ("maximum", "sum_exp", "first", "second", "squares", "argmax"):
        torch.testing.assert_close(getattr(moments, name), getattr(trimmed, name))


def test_nan_is_not_hidden():
    tile = hard_rows(127)[:2]
    tile[0, 70] = math.nan
    moments = kernels.row_moments(tile, PLAIN, EVERY)
    assert moments.sum_exp.isnan().tolist() == [True, False]
    assert moments.first.isnan().tolist() == [True, False]


def test_moments_that_are_not_flagged_are_absent():
    tile = hard_rows(127)
    every = kernels.row_moments(tile, CAPPED, EVERY)
    for name in MomentFlags._fields:
        moments = kernels.row_moments(tile, CAPPED, MomentFlags(**{name: True}))
        for field, values in moments._asdict().items():
            if field in (name, "maximum", "sum_exp", "first"):
                torch.testing.assert_close(values, getattr(every, field))
            else:
                assert values is None


def test_rows_may_be_strided():
    wide = hard_rows(300)
    tile = wide[::2, 11:138]
    torch.testing.assert_close(
        kernels.row_moments(tile, PLAIN, EVERY),
        kernels.row_moments(tile.contiguous(), PLAIN, EVERY),
    )


# --- offsets past 2³¹ -----------------------------------------------------------------


@triton.jit
def _offset_kernel(stride, output_ptr):
    row = tl.program_id(0)
    tl.store(output_ptr + 2 * row, (row * stride).to(tl.int64))
    tl.store(output_ptr + 2 * row + 1, row.to(tl.int64) * stride)


def test_rows_may_start_past_two_to_the_31():
    """A view of memory that is reserved but, on the CPU, never touched."""
    stride, columns = 2**30 + 64, 100
    offsets = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    _offset_kernel[(3,)](stride, offsets)
    assert offsets[2, 1] == 2 * stride
    assert offsets[2, 0] != 2 * stride, "int32 arithmetic would have passed"

    memory = torch.empty(2 * stride + columns, dtype=torch.float16, device=DEVICE)
    tile = memory.as_strided((3, columns), (stride, 1))
    tile.copy_(hard_rows(columns)[:3])
    products = tile.clone()
    moments = kernels.row_moments(tile, PLAIN, EVERY)
    check_moments(moments, products, PLAIN)

    log_sum = moments.sum_exp.log()
    first = (tile, moments.maximum, log_sum)
    per_row = (*first, moments.argmax, 2.0, 1.0, PLAIN)
    dense = (products, *per_row[1:])
    torch.testing.assert_close(kernels.row_sced(*per_row), kernels.row_sced(*dense))

    coefficients = torch.ones(5, 3, device=DEVICE)
    kernels.row_gradient_(*first, coefficients, PLAIN)
    kernels.row_gradient_(products, *first[1:], coefficients, PLAIN)
    assert torch.equal(tile, products)


# --- the matmul -----------------------------------------------------------------------


def random_head(rows, size, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(columns, size, generator=generator) * (3 / math.sqrt(size))
    return hidden.to(dtype).to(DEVICE), weight.to(dtype).to(DEVICE)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_of_the_fused_matmul_merge_to_the_whole(dtype, transform):
    hidden, weight = random_head(37, 70, 700, dtype)
    parts = kernels.fused_moments(hidden, weight, transform, EVERY)
    assert parts.maximum.shape[0] > 1
    products = hidden.double() @ weight.double().T
    check_moments(merge(parts), products, transform)


def test_fused_moments_of_hard_rows():
    """The weight is an identity, so that the products are the hard rows themselves."""
    tile = hard_rows(200)
    weight = torch.eye(200, device=DEVICE)
    parts = kernels.fused_moments(tile, weight, PLAIN, EVERY)
    check_moments(merge(parts), tile, PLAIN)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 600),
    size=st.integers(1, 50),
    half=st.booleans(),
)
def test_any_shape(rows, columns, size, half):
    dtype = torch.float16 if half else torch.float32
    hidden, weight = random_head(rows, size, columns, dtype)
    products = hidden.double() @ weight.double().T
    parts = kernels.fused_moments(hidden, weight, CAPPED, EVERY)
    check_moments(merge(parts), products, CAPPED)
    few = hidden[:3].double() @ weight.double().T
    check_moments(kernels.row_moments(few.float(), CAPPED, EVERY), few.float(), CAPPED)


def test_fused_moments_that_are_not_flagged_are_absent():
    hidden, weight = random_head(3, 20, 40)
    bare = kernels.fused_moments(hidden, weight, CAPPED, MomentFlags())
    every = kernels.fused_moments(hidden, weight, CAPPED, EVERY)
    assert bare[3:] == (None,) * 4
    torch.testing.assert_close(bare[:3], every[:3])


def test_hidden_and_weight_may_be_transposed():
    hidden, weight = random_head(5, 33, 90)
    transposed = hidden.T.contiguous().T, weight.T.contiguous().T
    targets = torch.arange(5, device=DEVICE)
    torch.testing.assert_close(
        kernels.fused_moments(*transposed, PLAIN, EVERY),
        kernels.fused_moments(hidden, weight, PLAIN, EVERY),
    )
    torch.testing.assert_close(
        kernels.target_logits(*transposed, targets, PLAIN),
        kernels.target_logits(hidden, weight, targets, PLAIN),
    )


def test_no_rows_at_all():
    hidden, weight = random_head(0, 16, 30)
    assert kernels.fused_moments(hidden, weight, PLAIN, EVERY).total.shape[1] == 0
    tile = torch.empty(0, 30, device=DEVICE)
    assert kernels.row_moments(tile, PLAIN, EVERY).argmax.shape == (0,)


@given(
    rows=st.integers(1, 100_000),
    columns=st.integers(1, 300_000),
    processors=st.integers(1, 200),
)
def test_splits_cover_the_vocabulary_and_keep_the_device_busy(
    rows, columns, processors
):
    row_blocks, tiles = triton.cdiv(rows, 128), triton.cdiv(columns, 256)
    per_split = kernels.tiles_per_split(rows, row_blocks, tiles, processors)
    splits = triton.cdiv(tiles, per_split)
    assert splits * per_split >= tiles > (splits - 1) * per_split
    assert splits * rows * 32 < 8 * 2**20
    rounds = triton.cdiv(row_blocks * splits, processors)
    assert rounds * per_split <= triton.cdiv(row_blocks, processors) * tiles


def test_a_large_batch_leaves_few_processors_waiting():
    """Qwen's vocabulary on 132 and 108 processors, in tiles of both devices."""
    for processors, width in ((132, 256), (108, 128)):
        tiles = triton.cdiv(151_936, width)
        per_split = kernels.tiles_per_split(8192, 64, tiles, processors)
        rounds = triton.cdiv(64 * triton.cdiv(tiles, per_split), processors)
        assert 64 * tiles / (processors * rounds * per_split) > 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_the_targets(dtype):
    hidden, weight = random_head(6, 77, 50, dtype)
    targets = torch.tensor([0, 49, 3, 3, 50, -1], device=DEVICE)
    observed = kernels.target_logits(hidden, weight, targets, CAPPED)
    z = logits(hidden.double() @ weight.double().T, CAPPED)
    expected = pick(z[:4], targets[:4])
    assert (observed[:4] - expected).abs().max() <= 2e-5
    assert observed[4:].isnan().all(), "not in the vocabulary"


# --- gradients ------------------------------------------------------------------------


def coefficients_for(at, upstream, columns):
    """A, B, C, E and F of the statistics' gradients, derived in the module's terms."""
    H, q, v = at["entropy"], at["collision_prob"], at["varentropy"]
    g = upstream
    return torch.stack(
        [
            g["log_sum_exp"]
            - g["log_prob"]
            - H * g["entropy"]
            - 2 * q * g["collision_prob"]
            + (2 * H + H.square() - v) * g["varentropy"],
            2 * (1 + H) * g["varentropy"] - g["entropy"],
            2 * g["collision_prob"],
            g["varentropy"],
            g["mean_logit"] / columns,
        ]
    )


def autograd(function, products, transform):
    """The gradient, by float64 products, of a function of their logits."""
    leaf = products.double().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits(leaf, transform)), leaf)
    return gradient


def row_state(products, transform):
    z = logits(products, transform)
    maximum = z.amax(-1)
    log_sum = (z - maximum[:, None]).exp().sum(-1).log()
    return maximum.float(), log_sum.float()


def assert_gradient(tile, expected, dtype):
    error = (tile.double() - expected).abs()
    scale = expected.abs().amax(-1, keepdim=True)
    rounding = torch.finfo(dtype).eps * expected.abs()
    # The smallest float16 numbers are 6e-8 apart.
    assert (error <= rounding + 2e-5 * scale + 6e-8).all(), (error / scale).amax(-1)


@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [7, 1000, 5003])
def test_gradient_of_every_statistic(columns, dtype, transform):
    products = hard_rows(columns, dtype)
    z = logits(products, transform)
    targets = torch.arange(len(z), device=DEVICE) % columns
    names = ["log_prob", *statistics(z)]
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(len(names), len(z), generator=generator, dtype=torch.float64)
    upstream = dict(zip(names, drawn.to(DEVICE), strict=True))

    def weighted_sum(z):
        log_prob = torch.log_softmax(z, -1)
        found = statistics(z) | {"log_prob": pick(log_prob, targets)}
        own_column = pick(z, targets)  # which the caller of the kernel adds
        return sum((upstream[name] * found[name]).sum() for name in names) - (
            (upstream["log_prob"] * own_column).sum()
        )

    coefficients = coefficients_for(statistics(z), upstream, columns).float()
    expected = autograd(weighted_sum, products, transform)
    tile = products.clone()
    kernels.row_gradient_(
        tile, *row_state(products, transform), coefficients, transform
    )
    assert_gradient(tile, expected, dtype)


def test_gradient_where_the_probability_is_nothing():
    """p = 0 and u = −1e5: none of B·u, C·p and E·u² may turn it into a NaN."""
    tile = torch.tensor([[0.0, -1e5, -2.0, -math.inf]], device=DEVICE)
    state = row_state(tile, PLAIN)
    coefficients = torch.tensor([[1.0, 2, 3, 4, 0.5]], device=DEVICE).T
    kernels.row_gradient_(tile, *state, coefficients, PLAIN)
    assert tile.isfinite().all()
    assert tile[0, [1, 3]].tolist() == [0.5, 0.5]


def test_gradient_stays_within_strided_rows():
    wide = hard_rows(300)
    before = wide.clone()
    tile = wide[::2, 11:138]
    state = row_state(tile, PLAIN)
    coefficients = torch.ones(5, len(tile), device=DEVICE)
    kernels.row_gradient_(tile, *state, coefficients, PLAIN)
    dense = before[::2, 11:138].contiguous()
    kernels.row_gradient_(dense, *state, coefficients, PLAIN)
    assert torch.equal(tile, dense)
    untouched = torch.ones_like(wide, dtype=torch.bool)
    untouched[::2, 11:138] = False
    assert torch.equal(wide[untouched], before[untouched])


# --- SCED -----------------------------------------------------------------------------


def sced_terms(u, columns, alpha, beta):
    """f(p) = |p log(pV)|^α (1−p)^β, column by column."""
    p = u.exp()
    distance = p * (u + math.log(columns))
    return distance.abs() ** alpha * (-torch.expm1(u)) ** beta


def sced_rows(columns, transform):
    """Rows in which float32 can tell p from 1, and some p from 1/V."""
    offset = [3, 4] if transform.softcap is None else [0, 1]  # a cap would flatten them
    return hard_rows(columns)[[0, 7, *offset]]


@pytest.mark.parametrize("transform", [PLAIN, CAPPED], ids=["plain", "capped"])
@pytest.mark.parametrize(("alpha", "beta"), SCED_EXPONENTS)
def test_sced_and_its_gradient(alpha, beta, transform):
    columns = 5003
    products = sced_rows(columns, transform)
    z = logits(products, transform)
    u = torch.log_softmax(z, -1).requires_grad_()
    f = sced_terms(u, columns, alpha, beta)
    (by_log,) = torch.autograd.grad(f.sum(), u)  # p·f'(p)
    argmax = first_maximum(z)
    state = row_state(products, transform)

    value, rest = kernels.row_sced(products, *state, argmax, alpha, beta, transform)
    without_argmax = by_log.sum(-1) - pick(by_log, argmax)
    torch.testing.assert_close(value.double(), f.sum(-1), rtol=3e-5, atol=1e-7)
    absolute = by_log.abs().sum(-1)
    assert ((rest - without_argmax).abs() <= 3e-5 * absolute).all()

    weight = torch.tensor([0.3, 1.0, 2.0, 0.0], device=DEVICE)
    term = Sced(weight, by_log.sum(-1).float(), alpha, beta)

    def penalty(z):
        terms = sced_terms(torch.log_softmax(z, -1), columns, alpha, beta)
        return (weight * terms.sum(-1)).sum() + z.mean(-1).sum()

    mean_alone = torch.zeros(5, len(z), device=DEVICE)
    mean_alone[4] = 1 / columns
    tile = products.clone()
    kernels.row_gradient_(tile, *state, mean_alone, transform, term)
    assert_gradient(tile, autograd(penalty, products, transform), torch.float32)


@pytest.mark.parametrize(("alpha", "beta"), SCED_EXPONENTS)
def test_sced_of_a_peaked_row(alpha, beta):
    """1 − p comes from −expm1(u): float32's 1 − exp(u) would keep three digits."""
    columns = 1000
    tile = torch.zeros(1, columns, device=DEVICE)
    tile[0, 5] = 16.0
    u = torch.log_softmax(tile.double(), -1)
    assert 1e-4 < 1 - u.exp().max() < 2e-4
    expected = sced_terms(u, columns, alpha, beta).sum(-1)
    argmax = torch.tensor([5], device=DEVICE)
    state = row_state(tile, PLAIN)
    value, rest = kernels.row_sced(tile, *state, argmax, alpha, beta, PLAIN)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    assert rest.isfinite().all()


@pytest.mark.parametrize(("alpha", "beta"), SCED_EXPONENTS)
def test_sced_stays_finite_at_certainty(alpha, beta):
    """p is exactly 1 in one column and 0 in the others."""
    tile = torch.zeros(1, 50, device=DEVICE)
    tile[0, 5] = 1e4
    state = row_state(tile, PLAIN)
    argmax = torch.tensor([5], device=DEVICE)
    value, rest = kernels.row_sced(tile, *state, argmax, alpha, beta, PLAIN)
    expected = math.log(50) ** alpha if beta == 0 else 0.0
    assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-12)
    assert rest.item() == 0
    one = torch.ones(1, device=DEVICE)
    coefficients = torch.zeros(5, 1, device=DEVICE)
    kernels.row_gradient_(
        tile, *state, coefficients, PLAIN, Sced(one, one, alpha, beta)
    )
    assert tile[0, 5].abs() < 1e5, "divided by less than 2⁻²⁴"
    tile[0, 5] = 0
    assert (tile == 0).all()


# --- what is refused ------------------------------------------------------------------


def test_float64_is_refused():
    with pytest.raises(TypeError, match=r"tile is torch\.float64.*backend='torch'"):
        kernels.row_moments(torch.zeros(2, 3, dtype=torch.float64), PLAIN, EVERY)


def test_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"tile has shape \(3,\)"):
        kernels.row_moments(torch.zeros(3, device=DEVICE), PLAIN, EVERY)


@pytest.mark.skipif(DEVICE == "cuda", reason="bfloat16 is right on a GPU")
def test_bfloat16_is_refused_by_the_interpreter():
    hidden, weight = random_head(2, 16, 3, torch.bfloat16)
    with pytest.raises(TypeError, match="interpreter computes wrongly"):
        kernels.fused_moments(hidden, weight, PLAIN, EVERY)


def test_the_cpu_is_refused_unless_interpreted(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETED", False)
    with pytest.raises(ValueError, match=r"on cpu.*TRITON_INTERPRET=1"):
        kernels.row_moments(torch.zeros(2, 3), PLAIN, EVERY)


def test_strided_columns_are_refused():
    with pytest.raises(ValueError, match=r"strides \(1, 4\).*contiguous"):
        kernels.row_moments(torch.zeros(3, 4, device=DEVICE).T, PLAIN, EVERY)


def test_a_head_that_does_not_fit_is_refused():
    hidden, weight = random_head(2, 16, 3)
    with pytest.raises(ValueError, match=r"\(2, 16\).*\(3, 15\).*agree"):
        kernels.fused_moments(hidden, weight[:, :15], PLAIN, EVERY)
    with pytest.raises(ValueError, match=r"float32.*float16.*agree"):
        kernels.fused_moments(hidden, weight.half(), PLAIN, EVERY)


def test_targets_of_another_type_are_refused():
    hidden, weight = random_head(2, 16, 3)
    targets = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"targets is \(2,\) torch\.int32"):
        kernels.target_logits(hidden, weight, targets, PLAIN)


def test_values_of_other_rows_are_refused():
    tile = torch.zeros(2, 3, device=DEVICE)
    two, three = torch.zeros(2, device=DEVICE), torch.zeros(3, device=DEVICE)
    five = torch.zeros(5, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"maximum is \(3,\)"):
        kernels.row_gradient_(tile, three, two, five, PLAIN)
    with pytest.raises(ValueError, match=r"coefficients is \(2, 5\)"):
        kernels.row_gradient_(tile, two, two, five.T, PLAIN)
    sced = Sced(three, two, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"sced\.weight is \(3,\)"):
        kernels.row_gradient_(tile, two, two, five, PLAIN, sced)
    with pytest.raises(ValueError, match=r"argmax is \(2,\) torch\.float32"):
        kernels.row_sced(tile, two, two, two, 1.0, 0.0, PLAIN)
