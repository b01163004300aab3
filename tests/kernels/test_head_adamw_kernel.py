"""The kernel of AdamW over slices, on a GPU or else interpreted on the CPU."""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from ftlib.kernels import head_adamw as kernels

from ftlib.ops.head_adamw import HeadAdamW, WeightSlice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16][: 3 if DEVICE == "cuda" else 2]
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameter(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(shape, generator=generator) + 0.5
    return nn.Parameter(values.to(DEVICE, dtype))


def aligned(dtype):
    """Rows of two and a half tiles, columns of one and a half, a norm."""
    q, o, norm = (parameter(*s, dtype=dtype) for s in ((48, 64), (64, 48), (64,)))
    return [WeightSlice(q, 0, 8, 48), WeightSlice(o, 1, 16, 40), norm]


def crooked(dtype):
    """Nothing that is a multiple of anything."""
    q, o, bias = (parameter(*s, dtype=dtype) for s in ((31, 37), (101, 23), (41,)))
    cuts = [WeightSlice(q, 0, 1, 30), WeightSlice(o, 1, 2, 3), WeightSlice(o, 1, 5, 18)]
    return [*cuts, WeightSlice(bias, 0, 3, 40)]


def parameters_of(slices):
    found = (s if isinstance(s, nn.Parameter) else s.parameter for s in slices)
    return list(dict.fromkeys(found))


def twin(slices):
    """The same slices of copies, with an optimiser that uses the twin."""
    copies = {p: nn.Parameter(p.detach().clone()) for p in parameters_of(slices)}
    same = [
        copies[s] if isinstance(s, nn.Parameter) else s._replace(parameter=copies[s[0]])
        for s in slices
    ]
    return list(copies.values()), HeadAdamW(same, **SETTINGS, backend="torch")


def give_gradients(*groups, step):
    generator = torch.Generator().manual_seed(step)
    for same in zip(*groups, strict=True):
        values = torch.randn(same[0].shape, generator=generator)
        for p in same:
            p.grad = values.to(p)


def assert_within(found, expected, ulps):
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected, rtol=ulps * eps, atol=0)


@pytest.mark.parametrize("make", [aligned, crooked])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_twin_agree(dtype, make):
    """No weight comes near zero: an ulp of a sum is one of its larger term."""
    slices = make(dtype)
    ours, (theirs, reference) = parameters_of(slices), twin(slices)
    optimizer = HeadAdamW(slices, **SETTINGS, backend="triton")
    for step in range(3):
        give_gradients(ours, theirs, step=step)
        optimizer.step()
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            # Each step may round otherwise once more.
            assert_within(a.detach(), b.detach(), ulps=1 + step)
            for name in ("exp_avg", "exp_avg_sq"):
                moments = optimizer.state[a][name], reference.state[b][name]
                torch.testing.assert_close(*moments, rtol=2e-6, atol=1e-7)


def test_one_step_is_within_an_ulp_of_torchs():
    p, q = parameter(40, 40), parameter(40, 40)
    optimizer = HeadAdamW([p], **SETTINGS, backend="triton")
    reference = torch.optim.AdamW([q], **SETTINGS)
    give_gradients([p], [q], step=0)
    optimizer.step()
    reference.step()
    assert_within(p.detach(), q.detach(), ulps=1)


def test_the_kernel_errs_no_more_than_torch_does():
    """Both against float64, on weights that pass through zero."""
    start = parameter(33, 31).detach() - 1
    ours, plain, exact = (
        nn.Parameter(x.clone()) for x in (start, start, start.double())
    )
    optimizers = [
        HeadAdamW([ours], lr=0.1, backend="triton"),
        torch.optim.AdamW([plain], lr=0.1),
        torch.optim.AdamW([exact], lr=0.1),
    ]
    for step in range(10):
        give_gradients([ours], [plain], [exact], step=step)
        for optimizer in optimizers:
            optimizer.step()
    error, allowed = ((p.double() - exact).abs() for p in (ours, plain))
    assert error.mean() < 1.2 * allowed.mean() + 1e-8
    assert error.max() < 2 * allowed.max()


@pytest.mark.parametrize("make", [aligned, crooked])
def test_other_weights_are_never_read_nor_written(make):
    """They and their gradients are NaN, of which the bits would show a change."""
    slices = make(torch.float32)
    parameters = parameters_of(slices)
    optimizer = HeadAdamW(slices, **SETTINGS, backend="triton")
    masks = {p: torch.zeros_like(p, dtype=torch.bool) for p in parameters}
    for s in slices:
        cut = s if isinstance(s, WeightSlice) else WeightSlice(s, 0, 0, len(s))
        masks[cut[0]].narrow(cut.dim, cut.start, cut.stop - cut.start)[:] = True
    for p in parameters:
        p.data[~masks[p]] = torch.nan
    before = {p: p.detach().clone() for p in parameters}
    for step in range(2):
        give_gradients(parameters, step=step)
        for p in parameters:
            p.grad[~masks[p]] = torch.nan
        optimizer.step()
    for p in parameters:
        a, b, mask = p.detach(), before[p], masks[p]
        assert torch.equal(a.view(torch.int32)[~mask], b.view(torch.int32)[~mask])
        assert a[mask].isfinite().all()
        assert (a[mask] != b[mask]).all()


def test_parameters_of_two_dtypes_and_one_without_a_gradient():
    slices = [parameter(8, 8), parameter(12), parameter(5, dtype=torch.float16)]
    ours, (theirs, reference) = parameters_of(slices), twin(slices)
    optimizer = HeadAdamW(slices, **SETTINGS, backend="triton")
    for step in range(3):
        give_gradients(ours, theirs, step=step)
        if step == 1:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_within(a.detach(), b.detach(), ulps=3)
        assert optimizer.state[a]["step"] == reference.state[b]["step"]


def test_odd_layouts_of_weights_and_gradients():
    """A transposed parameter with gaps; gradients of other strides and addresses."""
    odd = nn.Parameter((torch.rand(18, 22, device=DEVICE) + 0.5)[:, ::2].T)
    plain, moved = parameter(8, 12), parameter(16)
    slices = [WeightSlice(odd, 0, 2, 9), WeightSlice(plain, 1, 4, 8), moved]
    ours, (theirs, reference) = parameters_of(slices), twin(slices)
    optimizer = HeadAdamW(slices, **SETTINGS, backend="triton")
    for step in range(2):
        give_gradients(ours, theirs, step=step)
        plain.grad = plain.grad.T.contiguous().T
        unaligned = torch.empty(17, device=DEVICE)[1:]
        moved.grad = unaligned.copy_(moved.grad)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_within(a.detach(), b.detach().view_as(a), ulps=2)


def test_weights_that_are_given_new_memory_are_found():
    p, q = parameter(6, 8), parameter(6, 8)
    optimizer = HeadAdamW([WeightSlice(p, 0, 2, 4)], **SETTINGS, backend="triton")
    reference = HeadAdamW([WeightSlice(q, 0, 2, 4)], **SETTINGS, backend="torch")
    abandoned = []
    for step in range(3):
        give_gradients([p], [q], step=step)
        abandoned.append((p.data, p.data.clone()))
        p.data = p.data.clone()
        optimizer.step()
        reference.step()
    assert_within(p.detach(), q.detach(), ulps=3)
    assert all(torch.equal(a, b) for a, b in abandoned)


def test_a_state_goes_on_bit_for_bit():
    ours = aligned(torch.float32)
    optimizer = HeadAdamW(ours, **SETTINGS, backend="triton")
    for step in range(3):
        if step == 2:
            (resumed, other), saved = twin(ours), optimizer.state_dict()
            other = HeadAdamW(
                [
                    WeightSlice(resumed[0], 0, 8, 48),
                    WeightSlice(resumed[1], 1, 16, 40),
                    resumed[2],
                ],
                backend="triton",
            )
            other.load_state_dict(saved)
        give_gradients(parameters_of(ours), step=step)
        optimizer.step()
    give_gradients(resumed, step=2)
    other.step()
    for a, b in zip(parameters_of(ours), resumed, strict=True):
        assert torch.equal(a, b)


def test_autograd_knows_that_the_weights_changed():
    p = parameter(3)
    optimizer = HeadAdamW([p], backend="triton")
    loss = p.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- tables ---------------------------------------------------------------------------


def table_of(view, offset=0, state=0):
    pieces = [kernels.Piece(0, view, offset, state)]
    return kernels.make_tables(pieces, torch.device("cpu"))[0]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 64), (3, 2048), (2500, 3)])
def test_tiles_cover_every_element_once(shape):
    base = torch.zeros(shape[0] + 2, shape[1] + 7)
    view = base[1:-1, 4:-3]
    fields = table_of(view, view.storage_offset(), 10).tiles.numpy()
    places, moments = [], []
    for _, start, row_stride, column_stride, columns, first, count, state in fields:
        rows, column = np.divmod(first + np.arange(count), columns)
        places.append(start + rows * row_stride + column * column_stride)
        moments.append(state + np.arange(count))
    expected = torch.zeros(base.numel(), dtype=torch.long)
    expected[np.concatenate(places)] = torch.from_numpy(np.concatenate(moments)) + 1
    found = expected.view_as(base)[1:-1, 4:-3]
    assert torch.equal(found.flatten(), torch.arange(view.numel()) + 11)
    assert expected.count_nonzero() == view.numel()


@pytest.mark.parametrize(
    ("view", "offset", "state", "in_vectors"),
    [
        (torch.zeros(8, 64), 0, 0, True),
        (torch.zeros(8, 64)[:, 4:12], 4, 8, True),
        (torch.zeros(64), 0, 0, True),
        (torch.zeros(8, 64)[:, 2:6], 2, 0, False),
        (torch.zeros(8, 64)[:, :6], 0, 0, False),
        (torch.zeros(8, 66)[:, :4], 0, 0, False),
        (torch.zeros(8, 64).T, 0, 0, False),
        (torch.zeros(8, 64), 0, 2, False),
    ],
)
def test_vectors_are_used_where_all_lie_so(view, offset, state, in_vectors):
    assert table_of(view, offset, state).in_vectors is in_vectors


@pytest.mark.parametrize(
    ("addresses", "is_aligned"),
    [(([16, 32], [48, 0]), True), (([16, 32], [56, 0]), False), (([8], [16]), False)],
)
def test_vectors_are_not_read_from_addresses_in_between(addresses, is_aligned):
    rates = np.array([[0.5, 0.25]] * len(addresses[0]))
    fields, found = kernels._fields(*addresses, rates, pinned=False)
    assert found is is_aligned
    assert fields[:, :2].T.tolist() == list(addresses)
    assert fields.view(torch.float32)[:, 4:].tolist() == rates.tolist()


# --- what it cannot take --------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled, it computes bfloat16")
def test_bfloat16_is_refused_by_the_interpreter():
    optimizer = HeadAdamW([parameter(3, dtype=torch.bfloat16)], backend="triton")
    with pytest.raises(ValueError, match="bfloat16 under TRITON_INTERPRET"):
        optimizer.step()


def test_float64_is_refused():
    optimizer = HeadAdamW([parameter(3, dtype=torch.float64)], backend="triton")
    with pytest.raises(ValueError, match="cannot take float64"):
        optimizer.step()
