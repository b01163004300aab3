"""The vocabulary head against its float64 specification, on every back end."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from measuring import memory_of
from peers import plain_loss

from ftlib.ops import TokenLoss, tiles, vocabulary_head
from ftlib.ops.reference import vocabulary_head_reference

FLOATS = (
    "log_prob",
    "entropy",
    "log_sum_exp",
    "collision_prob",
    "mean_logit",
    "varentropy",
)
ALL = (*FLOATS, "argmax", "top1_hit")
BACKENDS = ("torch", "chunked", "fused")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOSSES = {
    "cross-entropy": TokenLoss(),
    "label smoothing": TokenLoss(label_smoothing=0.1),
    "entropy": TokenLoss(entropy=-0.3),
    "confidence penalty": TokenLoss(kl_to_uniform=0.2),
    "z-loss": TokenLoss(z_loss=1e-3),
    "caref": TokenLoss(sced=0.1, kl_to_uniform=0.1),
    "sced (1, 0)": TokenLoss(sced=0.5, alpha=1.0, beta=0.0),
    "sced (1.5, 0.5)": TokenLoss(sced=0.5, alpha=1.5, beta=0.5),
    "sced (2.5, 2)": TokenLoss(sced=0.5, alpha=2.5, beta=2.0),
    "everything": TokenLoss(0.7, 0.2, -0.1, 1e-3, 0.1, 0.1),
}


def problem(rows=7, columns=127, size=24, dtype=torch.float32, seed=0, spread=1.0):
    """Hidden states, weights and targets; the last target is the last column."""
    generator = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(rows, size, generator=generator)
    weight = torch.randn(columns, size, generator=generator)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[-1] = columns - 1
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype).requires_grad_(),
        targets.to(DEVICE),
    )


def upstream_of(output, names=FLOATS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = getattr(output, names[0]).shape
    return [torch.randn(shape, generator=generator).to(DEVICE) for _ in names]


def gradients(output, inputs, names=FLOATS):
    values = [getattr(output, name) for name in names]
    upstream = [
        g.to(v.dtype) for g, v in zip(upstream_of(output, names), values, strict=True)
    ]
    return torch.autograd.grad(values, inputs, upstream)


def close(a, b, tolerance):
    """Maximum difference, relative to the size of what is compared."""
    scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
    assert (a.double() - b).abs().max().item() <= tolerance * scale


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (0.7, 5.0)])
@pytest.mark.parametrize("columns", [1, 7, 127])
def test_statistics_and_their_gradients_equal_the_specification(
    backend, scale, softcap, columns
):
    hidden, weight, targets = problem(columns=columns)
    options = {"statistics": ALL, "logit_scale": scale, "softcap": softcap}
    ours = vocabulary_head(hidden, weight, targets, backend=backend, **options)
    theirs = vocabulary_head_reference(hidden, weight, targets, **options)
    for name in FLOATS:
        close(getattr(ours, name), getattr(theirs, name), 1e-5)
    assert torch.equal(ours.argmax, theirs.argmax)
    assert torch.equal(ours.top1_hit, theirs.top1_hit)
    for a, b in zip(
        gradients(ours, (hidden, weight)),
        gradients(theirs, (hidden, weight)),
        strict=True,
    ):
        close(a, b, 1e-5)


@pytest.mark.parametrize("name", FLOATS)
def test_each_statistic_differentiates_alone(name):
    """Where it is the only one asked for, its moments are still there."""
    hidden, weight, targets = problem()
    found = [
        gradients(f(hidden, weight, targets, statistics=(name,)), hidden, (name,))[0]
        for f in (vocabulary_head, vocabulary_head_reference)
    ]
    close(*found, 1e-5)


def test_gradcheck_of_every_statistic_and_loss():
    hidden, weight, targets = problem(4, 11, 5, torch.float64)
    targets[1] = -100

    def statistics(hidden, weight):
        output = vocabulary_head(hidden, weight, targets, statistics=FLOATS)
        return tuple(getattr(output, name) for name in FLOATS)

    def caref(hidden, weight):
        loss = TokenLoss(sced=0.3, kl_to_uniform=0.1, alpha=1.5, beta=0.5)
        return vocabulary_head(hidden, weight, targets, loss=loss).loss

    assert torch.autograd.gradcheck(statistics, (hidden, weight))
    assert torch.autograd.gradcheck(caref, (hidden, weight))


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_losses_equal_the_specification(backend, name, reduction):
    hidden, weight, targets = problem(spread=0.7)
    targets[2] = -100
    weights = torch.tensor([1.0, 0.0, 2.0, -1.5, 0.3, 1.0, 1.0], device=DEVICE)
    options = {"loss": LOSSES[name], "weights": weights, "reduction": reduction}
    ours = vocabulary_head(hidden, weight, targets, backend=backend, **options)
    theirs = vocabulary_head_reference(hidden, weight, targets, **options)
    close(ours.loss, theirs.loss, 1e-5)
    close(ours.token_loss, theirs.token_loss, 1e-5)
    for a, b in zip(
        torch.autograd.grad(3 * ours.loss, (hidden, weight)),
        torch.autograd.grad(3 * theirs.loss, (hidden, weight)),
        strict=True,
    ):
        close(a, b, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS[:2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float64, torch.bfloat16])
def test_weights_of_any_dtype(backend, dtype):
    hidden, weight, targets = problem()
    weights = torch.tensor([1, 0, 1, 1, 0, 1, 1], device=DEVICE)
    losses = [
        vocabulary_head(
            hidden, weight, targets, loss=LOSSES["caref"], weights=w, backend=backend
        ).loss
        for w in (weights.float(), weights.to(dtype))
    ]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, weight)[0] for loss in losses))


def test_cross_entropy_is_pytorchs():
    """An oracle that shares no line with ours."""
    hidden, weight, targets = problem()
    targets[3] = -100
    for smoothing in (0.0, 0.1):
        theirs = F.cross_entropy(hidden @ weight.T, targets, label_smoothing=smoothing)
        ours = vocabulary_head(
            hidden, weight, targets, loss=TokenLoss(label_smoothing=smoothing)
        )
        close(ours.loss, theirs.double(), 1e-6)


def test_a_loss_of_log_probabilities_is_a_policy_gradient():
    """weights = −c give the gradient of Σ c·log p_y."""
    hidden, weight, targets = problem()
    c = torch.randn(7, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    loss = vocabulary_head(
        hidden, weight, targets, loss=TokenLoss(), weights=-c, reduction="sum"
    ).loss
    log_prob = vocabulary_head(hidden, weight, targets).log_prob
    ours = torch.autograd.grad(loss, hidden)[0]
    close(ours, torch.autograd.grad((c * log_prob).sum(), hidden)[0].double(), 1e-6)


# The interpreter needs seconds for a fused product with a large vocabulary.
SIZED_BACKENDS = [
    (backend, columns)
    for backend in BACKENDS
    for columns in (7, 127, 32127, 50257)
    if backend != "fused" or columns < 50000
]


@pytest.mark.parametrize(("backend", "columns"), SIZED_BACKENDS)
def test_accuracy_promised_for_float32(backend, columns):
    """Log-prob and entropy ≤ 2e-5 absolute on peaked and on flat rows, V not round."""
    hidden, weight, targets = problem(4, columns, 37)
    with torch.no_grad():
        hidden[:3] *= torch.tensor([[3.0], [1e-3], [0.2]], device=DEVICE)
        ours = vocabulary_head(
            hidden, weight, targets, statistics=("log_prob", "entropy"), backend=backend
        )
        theirs = vocabulary_head_reference(
            hidden, weight, targets, statistics=("log_prob", "entropy")
        )
    assert (ours.log_prob - theirs.log_prob).abs().max() <= 2e-5
    assert (ours.entropy - theirs.entropy).abs().max() <= 2e-5


def offset_problem(offset, columns=97):
    """Logits of a peaked row plus an offset, both exact in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(-64, 0, (3, columns), generator=generator) / 8.0
    logits[:, 5] = 4.0
    hidden = torch.cat((torch.eye(3), torch.ones(3, 1)), dim=1)
    weight = torch.cat((logits.T, torch.full((columns, 1), offset)), dim=1)
    return (
        hidden.to(DEVICE).requires_grad_(),
        weight.to(DEVICE).requires_grad_(),
        torch.tensor([5, 0, columns - 1], device=DEVICE),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4, -304.0])
def test_an_offset_of_the_logits_changes_nothing(backend, offset):
    """softmax(z + c) = softmax(z): to 1e-6, where the raw moment loses 7e-4."""
    names = ("log_prob", "entropy", "collision_prob", "varentropy")
    inputs = offset_problem(offset)
    moved = vocabulary_head(*inputs, statistics=names, backend=backend)
    plain = vocabulary_head_reference(*offset_problem(0.0), statistics=names)
    for name in names:
        assert torch.isfinite(getattr(moved, name)).all()
        close(getattr(moved, name), getattr(plain, name), 1e-6)
    moved_gradient = gradients(moved, inputs[1], names)[0][:, :3]
    plain_inputs = offset_problem(0.0)
    plain = vocabulary_head_reference(*plain_inputs, statistics=names)
    close(moved_gradient, gradients(plain, plain_inputs[1], names)[0][:, :3], 2e-6)


def test_the_raw_moment_would_fail_that_test():
    z = (torch.cat((torch.full((1, 1), 4.0), torch.zeros(1, 96)), 1) + 1e4).float()
    raw = z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)
    exact = torch.distributions.Categorical(logits=z.double()).entropy()
    assert (raw - exact).abs().item() > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_ignored_are_exactly_zero(backend):
    hidden, weight, targets = problem()
    output = vocabulary_head(
        hidden, weight, targets.fill_(-100), statistics=ALL, backend=backend
    )
    for name in FLOATS:
        assert torch.equal(getattr(output, name), torch.zeros(7, device=DEVICE))
    assert (output.argmax == -1).all()
    assert not output.top1_hit.any()
    for gradient in gradients(output, (hidden, weight)):
        assert not gradient.any()
    if backend != "fused":
        loss = vocabulary_head(
            hidden, weight, targets, loss=LOSSES["caref"], backend=backend
        ).loss
        assert loss == 0
        for gradient in torch.autograd.grad(loss, (hidden, weight)):
            assert not gradient.any()


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignoring_some_rows_is_leaving_them_out(ignore_index):
    hidden, weight, targets = problem()
    targets[targets == ignore_index] = 4
    kept = torch.tensor([0, 1, 3, 5, 6], device=DEVICE)
    targets[[2, 4]] = ignore_index
    some = vocabulary_head(
        hidden, weight, targets, statistics=ALL, ignore_index=ignore_index
    )
    alone = vocabulary_head(hidden[kept], weight, targets[kept], statistics=ALL)
    for name in ALL:
        assert torch.equal(getattr(some, name)[kept], getattr(alone, name))
    assert not some.top1_hit[[2, 4]].any()
    ours, rest = gradients(some, hidden)[0], torch.tensor([2, 4], device=DEVICE)
    assert not ours[rest].any()
    assert ours[kept].any(dim=1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_go_to_the_first_column(backend):
    hidden = torch.ones(2, 3, device=DEVICE)
    weight = torch.zeros(600, 3, device=DEVICE)
    weight[[40, 290, 599]] = 1.0
    targets = torch.tensor([40, 599], device=DEVICE)
    output = vocabulary_head(hidden, weight, targets, statistics=ALL, backend=backend)
    assert output.argmax.tolist() == [40, 40]
    assert output.top1_hit.tolist() == [True, False]
    assert torch.equal(output.log_prob[0], output.log_prob[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_row_one_dimension_and_any_layout(backend):
    hidden, weight, targets = problem(1, 33, 1)
    one = vocabulary_head(hidden, weight, targets, backend=backend)
    close(
        one.log_prob, vocabulary_head_reference(hidden, weight, targets).log_prob, 1e-6
    )
    hidden, weight, targets = problem(6, 33, 17)
    turned = vocabulary_head(
        hidden.T.contiguous().T,
        weight.T.contiguous().T,
        targets.repeat_interleave(2)[::2],
        statistics=ALL,
        backend=backend,
    )
    plain = vocabulary_head(hidden, weight, targets, statistics=ALL, backend=backend)
    for name in FLOATS:
        close(getattr(turned, name), getattr(plain, name).double(), 1e-6)


def test_leading_dimensions_are_kept():
    hidden, weight, targets = problem(6)
    flat = vocabulary_head(
        hidden, weight, targets, statistics=ALL, loss=TokenLoss(), reduction="sum"
    )
    shaped = vocabulary_head(
        hidden.view(2, 3, -1),
        weight,
        targets.view(2, 3),
        statistics=ALL,
        loss=TokenLoss(),
        weights=torch.ones(2, 3, device=DEVICE),
        reduction="sum",
    )
    assert torch.equal(flat.loss, shaped.loss)
    for name in ("token_loss", *ALL):
        assert torch.equal(getattr(flat, name).view(2, 3), getattr(shaped, name))


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_without_memory_of_their_own(backend):
    """``.sum().backward()`` sends an expanded scalar, of stride 0."""
    hidden, weight, targets = problem()
    output = vocabulary_head(
        hidden, weight, targets, statistics=("entropy",), backend=backend
    )
    expanded = torch.autograd.grad(output.entropy.sum(), hidden, retain_graph=True)[0]
    ones = torch.ones(7, device=DEVICE)
    written_out = torch.autograd.grad(output.entropy, hidden, ones)[0]
    assert torch.equal(expanded, written_out)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=True,
)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.01, 1.0, 4.0]),
    backend=st.sampled_from(BACKENDS),
)
def test_any_shape(rows, columns, size, seed, spread, backend):
    hidden, weight, targets = problem(rows, columns, size, seed=seed, spread=spread)
    ours = vocabulary_head(hidden, weight, targets, statistics=FLOATS, backend=backend)
    theirs = vocabulary_head_reference(hidden, weight, targets, statistics=FLOATS)
    for name in FLOATS:
        close(getattr(ours, name), getattr(theirs, name), 2e-5)
    close(gradients(ours, hidden)[0], gradients(theirs, hidden)[0], 5e-5)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("torch", torch.float16),
        ("torch", torch.bfloat16),
        ("chunked", torch.float16),
        pytest.param(
            "chunked",
            torch.bfloat16,
            marks=pytest.mark.skipif(
                DEVICE == "cpu", reason="the interpreter computes bf16 wrongly"
            ),
        ),
    ],
)
@pytest.mark.parametrize("name", ["cross-entropy", "caref"])
def test_low_precision_is_as_exact_as_pytorchs_own_path(backend, dtype, name):
    """Gradients err at most 1.1 times as much as those of the plain path."""
    hidden, weight, targets = problem(64, 501, 32, dtype, spread=0.7)
    loss = LOSSES[name]
    exact = torch.autograd.grad(
        vocabulary_head_reference(hidden, weight, targets, loss=loss).loss,
        (hidden, weight),
    )
    ours = torch.autograd.grad(
        vocabulary_head(hidden, weight, targets, loss=loss, backend=backend).loss,
        (hidden, weight),
    )
    plain = torch.autograd.grad(
        plain_loss(hidden, weight, targets, loss), (hidden, weight)
    )
    for x, y, z in zip(ours, plain, exact, strict=True):
        assert x.dtype == dtype
        assert error(x, z) <= 1.1 * error(y, z)


def error(x, exact):
    return ((x.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def test_the_gradient_by_the_weight_does_not_drift_over_tiles(monkeypatch):
    """Many tiles err no more than one: they are summed in float32."""
    hidden, weight, targets = problem(256, 65, 16, torch.bfloat16)

    def gradient():
        loss = vocabulary_head(hidden, weight, targets, loss=TokenLoss()).loss
        return torch.autograd.grad(loss, weight)[0].double()

    exact = torch.autograd.grad(
        vocabulary_head_reference(hidden, weight, targets, loss=TokenLoss()).loss,
        weight,
    )[0].double()
    whole = gradient()
    monkeypatch.setattr(tiles, "tile_rows", lambda head: 2)
    assert error(gradient(), exact) <= 1.01 * error(whole, exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_of_any_height_give_the_same(backend, monkeypatch):
    hidden, weight, targets = problem(11, 40)
    targets[4] = -100

    def everything():
        output = vocabulary_head(
            hidden, weight, targets, statistics=FLOATS, backend=backend
        )
        return [
            *(getattr(output, n) for n in FLOATS),
            *gradients(output, (hidden, weight)),
        ]

    whole = everything()
    for height in (1, 3, 10):
        monkeypatch.setattr(tiles, "tile_rows", lambda head, height=height: height)
        for a, b in zip(everything(), whole, strict=True):
            close(a.detach(), b.detach().double(), 1e-5)


@pytest.mark.parametrize("beta", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("gap", [5.0, 15.0, 18.0, 40.0])
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_sced_near_certainty(backend, gap, beta):
    """β < 1 makes the slope at p → 1 unbounded, the gradient not."""
    columns = 50
    logits = torch.zeros(2, columns)
    logits[:, 7] = gap
    logits[1, :7] = torch.linspace(-3, 0, 7)
    hidden = torch.eye(2, device=DEVICE).requires_grad_()
    weight = logits.T.contiguous().to(DEVICE).requires_grad_()
    targets = torch.tensor([7, 3], device=DEVICE)
    loss = TokenLoss(cross_entropy=0.0, sced=1.0, alpha=2.0, beta=beta)
    ours = vocabulary_head(hidden, weight, targets, loss=loss, backend=backend)
    gradient = torch.autograd.grad(ours.loss, weight)[0].double()
    assert torch.isfinite(gradient).all()
    exact = sced_gradient_in_high_precision(logits.double(), 2.0, beta) / 2
    # Where 1 − p is below what float32 tells from 0, its power may be anything
    # between 0 and the power of one rounding error.
    floor = (2.0**-24) ** beta * math.log(columns) ** 2 if gap > 14 else 0
    close(gradient, exact.T.to(DEVICE), 2e-5 + floor)


def sced_gradient_in_high_precision(z, alpha, beta):
    """p_j((1−p_j) f'_j − Σ_{k≠j} p_k f'_k), with 1 − p summed from the others."""
    p = z.softmax(-1)
    others = p.sum(-1, keepdim=True) - p
    top = z.argmax(-1, keepdim=True)
    rest = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    others = others.scatter(-1, top, rest)
    L = z.log_softmax(-1) + math.log(z.shape[-1])
    a = p * L
    growth = alpha * a.abs() ** (alpha - 1) * a.sign() * (L + 1)
    slope = growth * others**beta - beta * a.abs() ** alpha * others ** (beta - 1)
    total = (p * slope).sum(-1, keepdim=True)
    without_top = (p * slope).scatter(-1, top, 0.0).sum(-1, keepdim=True)
    at_top = growth * others ** (beta + 1) - beta * a.abs() ** alpha * others**beta
    gradient = p * (slope - total)
    return gradient.scatter(-1, top, (p * (at_top - without_top)).gather(-1, top))


def test_a_certain_target_keeps_its_gradient():
    """p − 1 of the target is −Σ of the others, to full relative precision."""
    hidden = torch.tensor([[1.0]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[14.0], [0.0]], device=DEVICE, requires_grad=True)
    targets = torch.tensor([0], device=DEVICE)
    loss = vocabulary_head(hidden, weight, targets, loss=TokenLoss()).loss
    gradient = torch.autograd.grad(loss, weight)[0]
    exact = 1 / (1 + math.exp(14.0))
    assert gradient[1].item() == pytest.approx(exact, rel=1e-5)
    assert gradient[0].item() == pytest.approx(-exact, rel=0.2)  # log s near 0


@pytest.mark.parametrize("name", ["cross-entropy", "caref", "everything"])
def test_the_workspace_has_a_bound(name):
    """Peak memory beyond the results stays under the bound, for any number of rows."""
    hidden, weight, targets = problem(1200, 32128, 8)
    results = 4 * (2 * weight.numel() + 2 * hidden.numel() + 10 * len(targets))

    def step():
        vocabulary_head(hidden, weight, targets, loss=LOSSES[name]).loss.backward()

    assert memory_of(step).peak - results <= tiles.WORKSPACE_BYTES
    logits = 4 * len(targets) * weight.shape[0]
    assert memory_of(lambda: hidden @ weight.T).peak >= logits  # the meter sees them


def test_no_gradient_is_formed_that_nobody_takes():
    hidden, weight, targets = problem()
    frozen = weight.detach()
    loss = vocabulary_head(hidden, frozen, targets, loss=TokenLoss()).loss
    loss.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not vocabulary_head(
            hidden, weight, targets, loss=TokenLoss()
        ).loss.requires_grad
    flags = [False] * 4
    arguments = (
        targets,
        torch.ones(7, device=DEVICE),
        [1.0, *[0.0] * 5, 2.0, 1.0],
        flags,
    )
    *_, by_hidden, by_weight = tiles.loss_pass(
        hidden.detach(), frozen, *arguments, 1.0, None, -100, "", True, False
    )
    assert by_hidden.shape == hidden.shape
    assert by_weight.numel() == 0


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled_equals_eager(compiler):
    hidden, weight, targets = problem()
    targets[2] = -100

    def statistics(hidden, weight):
        found = vocabulary_head(2 * hidden, weight, targets, statistics=ALL)
        return (found.log_prob * found.entropy + found.varentropy).sum()

    def loss(hidden, weight):
        weights = torch.arange(7.0, device=DEVICE)
        found = vocabulary_head(
            2 * hidden, weight, targets, loss=LOSSES["caref"], weights=weights
        )
        return found.loss

    for function in (statistics, loss):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend=compiler)
        eager_value, value = function(hidden, weight), compiled(hidden, weight)
        torch.testing.assert_close(value, eager_value)
        for a, b in zip(
            torch.autograd.grad(value, (hidden, weight)),
            torch.autograd.grad(eager_value, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, targets = problem(5, 33, 8)
    targets[1] = -100
    flags, settings_ = [True] * 4, (1.0, 5.0, -100, backend)
    torch.library.opcheck(
        tiles.statistics_pass, (hidden, weight, targets, flags, *settings_)
    )
    torch.library.opcheck(
        tiles.gradient_pass,
        (
            torch.randn(6, 5, device=DEVICE),
            hidden.detach(),
            weight.detach(),
            targets,
            flags,
            *settings_,
            True,
            True,
        ),
    )
    constants = [1.0, 0.1, 0.1, 1e-3, 0.1, 0.1, 2.0, 1.0]
    torch.library.opcheck(
        tiles.loss_pass,
        (
            hidden,
            weight,
            targets,
            torch.rand(5, device=DEVICE),
            constants,
            flags,
            *settings_,
            True,
            True,
        ),
    )


def test_autocast_casts_as_a_linear_layer():
    hidden, weight, targets = problem()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        ours = vocabulary_head(hidden, weight, targets, backend="torch").log_prob
        logits = F.linear(hidden, weight)
    theirs = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_the_table_of_back_ends(monkeypatch):
    cpu = torch.device("cpu")
    assert tiles.choose_backend(cpu, torch.float32, 64) == "torch"
    monkeypatch.setattr(tiles, "triton_supported", lambda device: True)
    narrow, wide = tiles.FUSED_UP_TO, tiles.FUSED_UP_TO + 1
    assert tiles.choose_backend(cpu, torch.bfloat16, narrow) == "fused"
    assert tiles.choose_backend(cpu, torch.bfloat16, wide) == "chunked"
    assert tiles.choose_backend(cpu, torch.float64, narrow) == "torch"


def test_below_capability_eight_the_twins_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    t4 = torch.device("cuda:0")
    assert tiles.choose_backend(t4, torch.float16, 64) == "torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert tiles.choose_backend(t4, torch.float16, 64) == "fused"


def test_a_tile_fits_the_workspace_and_fills_its_blocks():
    hidden, weight, targets = problem(3, 200, 8, torch.bfloat16)
    for columns, expected in ((151936, 1664), (256000, 1024), (2**31, 1)):
        head = tiles.Head(
            hidden, weight[:1].expand(columns, 8), targets, None, "chunked"
        )
        assert tiles.tile_rows(head) == expected


BAD = {
    "expected (..., D) and (V, D)": lambda h, w, y: vocabulary_head(h, w.T, y),
    "cast one": lambda h, w, y: vocabulary_head(h, w.double(), y),
    "expected int64 of shape": lambda h, w, y: vocabulary_head(h, w, y[:3]),
    "int64": lambda h, w, y: vocabulary_head(h, w, y.int()),
    "unknown statistics perplexity": lambda h, w, y: vocabulary_head(
        h, w, y, statistics=("perplexity",)
    ),
    "softcap is 0": lambda h, w, y: vocabulary_head(h, w, y, softcap=0.0),
    "choose mean or sum": lambda h, w, y: vocabulary_head(
        h, w, y, loss=TokenLoss(), reduction="none"
    ),
    "backend is 'cuda'": lambda h, w, y: vocabulary_head(h, w, y, backend="cuda"),
    "give a loss too": lambda h, w, y: vocabulary_head(h, w, y, weights=y.float()),
    "fused backend never": lambda h, w, y: vocabulary_head(
        h, w, y, loss=TokenLoss(), backend="fused"
    ),
    "weights have shape": lambda h, w, y: vocabulary_head(
        h, w, y, loss=TokenLoss(), weights=torch.ones(2)
    ),
    "constants of the loss": lambda h, w, y: vocabulary_head(
        h, w, y, loss=TokenLoss(), weights=torch.ones(7, requires_grad=True)
    ),
    "target 127 of row 6": lambda h, w, y: vocabulary_head(
        h, w, y.index_fill(0, torch.tensor([6]), 127)
    ),
    "label_smoothing is 1": lambda h, w, y: TokenLoss(label_smoothing=1.0),
    "alpha 0.5": lambda h, w, y: TokenLoss(sced=1.0, alpha=0.5),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_by_name(message):
    hidden, weight, targets = (x.cpu() for x in problem())
    with pytest.raises(
        ValueError, match=message.replace("(", r"\(").replace(")", r"\)")
    ):
        BAD[message](hidden, weight, targets)
