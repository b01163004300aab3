"""AdamW over slices: against torch's on whole parameters, and what it leaves alone."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ftlib.ops.head_adamw import HeadAdamW, WeightSlice, training_only
from ftlib.training import TrainingSettings, train

EVERYTHING = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def make_parameters(dtype=torch.float32):
    """Two projections, a norm and a bias, nowhere near zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((12, 10), (10, 12), (10,), (12,))
    values = (torch.rand(shape, generator=generator) + 0.5 for shape in shapes)
    return [nn.Parameter(value.to(dtype)) for value in values]


def heads_of(parameters):
    """Rows of the first, columns of the second, all of the third, some of the last."""
    q, o, norm, bias = parameters
    return [
        WeightSlice(q, 0, 2, 4),
        WeightSlice(o, 1, 2, 4),
        norm,
        WeightSlice(q, 0, 8, 12),
        WeightSlice(bias, 0, 3, 8),
    ]


def selected(parameters, slices):
    """A mask of each parameter."""
    masks = {p: torch.zeros_like(p, dtype=torch.bool) for p in parameters}
    for cut in slices:
        if isinstance(cut, nn.Parameter):
            masks[cut][:] = True
        else:
            part = masks[cut.parameter]
            part.narrow(cut.dim, cut.start, cut.stop - cut.start)[:] = True
    return [masks[p] for p in parameters]


def give_gradients(parameters, step, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.dtype)


def clones(parameters):
    return [parameter.detach().clone() for parameter in parameters]


def ulps(found, expected):
    """How many representable numbers lie between two float32 tensors at most."""
    steps = found.view(torch.int32).long() - expected.view(torch.int32).long()
    return steps.abs().max().item()


# --- the step -----------------------------------------------------------------------


def test_selected_weights_are_torchs_and_the_others_do_not_move():
    ours, whole = make_parameters(), make_parameters()
    before, masks = clones(ours), selected(ours, heads_of(ours))
    optimizer = HeadAdamW(heads_of(ours), **EVERYTHING)
    reference = torch.optim.AdamW(whole, **EVERYTHING)
    for step in range(100):
        give_gradients(ours, step)
        give_gradients(whole, step)
        optimizer.step()
        reference.step()
    for a, b, start, mask in zip(ours, whole, before, masks, strict=True):
        assert ulps(a[mask], b[mask]) <= 1
        assert not torch.equal(a[mask], start[mask])
        assert_equal(a[~mask], start[~mask])


def test_float64_weights_follow_the_formula():
    parameters = make_parameters(torch.float64)
    q = parameters[0]
    optimizer = HeadAdamW([WeightSlice(q, 0, 2, 4)], **EVERYTHING)
    w = q.detach()[2:4].clone()
    m = v = torch.zeros_like(w)
    beta1, beta2 = EVERYTHING["betas"]
    lr, eps, decay = (EVERYTHING[k] for k in ("lr", "eps", "weight_decay"))
    for t in range(1, 9):
        give_gradients([q], t)
        g = q.grad[2:4]
        optimizer.step()
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
        w = w - lr * decay * w - lr * m_hat / (v_hat.sqrt() + eps)
        torch.testing.assert_close(q.detach()[2:4], w, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_rounded_once(dtype):
    """Torch's AdamW on float32 copies, put back into the narrow dtype at each step."""
    ours = make_parameters(dtype)
    wide = [nn.Parameter(p.detach().float()) for p in ours]
    optimizer = HeadAdamW(heads_of(ours), **EVERYTHING)
    reference = torch.optim.AdamW(wide, **EVERYTHING)
    for step in range(20):
        give_gradients(ours, step)
        for a, b in zip(ours, wide, strict=True):
            b.grad = a.grad.float()
        optimizer.step()
        reference.step()
        for b in wide:
            b.data = b.data.to(dtype).float()
    for a, b, mask in zip(ours, wide, selected(ours, heads_of(ours)), strict=True):
        torch.testing.assert_close(
            a[mask].float(), b[mask], rtol=torch.finfo(dtype).eps, atol=0
        )
    states = optimizer.state_dict()["state"].values()
    assert {s["exp_avg"].dtype for s in states} == {torch.float32}


def test_a_parameter_without_a_gradient_is_skipped_and_does_not_count_the_step():
    ours, whole = make_parameters(), make_parameters()
    optimizer = HeadAdamW(heads_of(ours), **EVERYTHING)
    reference = torch.optim.AdamW(whole, **EVERYTHING)
    for step in range(6):
        for group in (ours, whole):
            give_gradients(group, step)
            group[0].grad = None
            if step % 2:
                group[1].grad = None
        optimizer.step()
        reference.step()
    masks = selected(ours, heads_of(ours))
    for a, b, mask in zip(ours, whole, masks, strict=True):
        assert ulps(a[mask], b[mask]) <= 1
    assert [int(optimizer.state[p]["step"]) for p in ours] == [0, 3, 6, 6]


def test_no_gradient_at_all_changes_nothing():
    parameters = make_parameters()
    before = clones(parameters)
    optimizer = HeadAdamW(heads_of(parameters), **EVERYTHING)
    optimizer.step()
    for a, b in zip(parameters, before, strict=True):
        assert_equal(a.detach(), b)


def test_memory_layouts_do_not_matter():
    """A transposed parameter with gaps, a gradient laid out otherwise."""
    base = torch.rand(9, 14) + 0.5
    odd, plain = nn.Parameter(base[:, ::2].T), nn.Parameter(base[:, ::2].T.contiguous())
    assert not odd.is_contiguous()
    optimizers = [HeadAdamW([WeightSlice(p, 1, 2, 5)]) for p in (odd, plain)]
    for _ in range(3):
        gradient = torch.randn(9, 7).T
        odd.grad, plain.grad = gradient, gradient.contiguous()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(odd.detach(), plain.detach(), check_stride=False)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_slices(data):
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    dim = data.draw(st.integers(0, 1))
    chosen = data.draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))
    order = data.draw(st.permutations(sorted(chosen)))
    ours, whole = (nn.Parameter(torch.full(shape, 0.75)) for _ in range(2))
    optimizer = HeadAdamW([WeightSlice(ours, dim, i, i + 1) for i in order])
    reference = torch.optim.AdamW([whole])
    for step in range(3):
        give_gradients([ours], step)
        give_gradients([whole], step)
        optimizer.step()
        reference.step()
    expected = torch.full(shape, 0.75)
    index = torch.tensor(sorted(chosen))
    expected.index_copy_(dim, index, whole.detach().index_select(dim, index))
    torch.testing.assert_close(ours.detach(), expected, rtol=2e-7, atol=0)
    assert optimizer.state[ours]["exp_avg"].numel() == expected.numel() // shape[
        dim
    ] * len(chosen)


def test_a_closure_makes_the_gradients():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = HeadAdamW([parameter], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert (parameter < 1).all()


def test_autograd_knows_that_the_weights_changed():
    parameter = nn.Parameter(torch.ones(3))
    optimizer = HeadAdamW([parameter])
    loss = parameter.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scheduler_sets_the_rate():
    ours, whole = make_parameters(), make_parameters()
    optimizer = HeadAdamW(heads_of(ours), **EVERYTHING)
    reference = torch.optim.AdamW(whole, **EVERYTHING)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step))
        for o in (optimizer, reference)
    ]
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(whole, step)
        optimizer.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
    for a, b, mask in zip(ours, whole, selected(ours, heads_of(ours)), strict=True):
        assert ulps(a[mask], b[mask]) <= 1


# --- masking the gradient is wrong ----------------------------------------------------


def step_with_a_mask(optimizer, parameter, mask, step):
    give_gradients([parameter], step)
    parameter.grad *= mask
    optimizer.step()


def test_weight_decay_moves_masked_weights_and_not_ours():
    masked, ours = (make_parameters()[0] for _ in range(2))
    before, cut = masked.detach().clone(), [WeightSlice(ours, 0, 2, 4)]
    mask = selected([ours], cut)[0]
    dense = torch.optim.AdamW([masked], lr=1e-2, weight_decay=0.1)
    sliced = HeadAdamW(cut, lr=1e-2, weight_decay=0.1)
    for step in range(10):
        step_with_a_mask(dense, masked, mask, step)
        step_with_a_mask(sliced, ours, mask, step)
    shrunk = before[~mask] * (1 - 1e-2 * 0.1) ** 10
    torch.testing.assert_close(masked[~mask], shrunk)
    assert_equal(ours[~mask], before[~mask])


def test_momentum_of_an_earlier_phase_moves_masked_weights_and_not_ours():
    masked, ours = (make_parameters()[0] for _ in range(2))
    cut = [WeightSlice(ours, 0, 2, 4)]
    mask = selected([ours], cut)[0]
    dense = torch.optim.AdamW([masked], lr=1e-2, weight_decay=0.0)
    give_gradients([masked], 0)
    dense.step()
    ours.data = masked.detach().clone()
    between = masked.detach().clone()
    sliced = HeadAdamW(cut, lr=1e-2, weight_decay=0.0)
    for step in range(1, 4):
        step_with_a_mask(dense, masked, mask, step)
        step_with_a_mask(sliced, ours, mask, step)
    assert ((masked - between)[~mask].abs() > 1e-3).all()
    assert_equal(ours[~mask], between[~mask])


# --- gradients of the slices alone ----------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x):
        return self.frozen * self.second(torch.tanh(self.first(x)))

    def slices(self):
        return [
            WeightSlice(self.first.weight, 0, 2, 4),
            WeightSlice(self.second.weight, 1, 2, 4),
            self.second.bias,
        ]


def gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {n: None if p.grad is None else p.grad.clone() for n, p in named(model)}


def named(model):
    return list(model.named_parameters())


def test_only_the_slices_get_a_gradient():
    model, x = TwoLayers(), torch.randn(5, 3)
    whole = gradients(model, x)
    with training_only(model, model.slices()):
        assert all(p.grad is None for p in model.parameters())
        found = gradients(model, x)
        assert found["first.bias"] is None
        assert found["frozen"] is None
        masks = selected(list(model.parameters()), model.slices())
        for (name, _), mask in zip(named(model), masks, strict=True):
            if mask.any():
                assert_equal(found[name], whole[name] * mask)
        squares = sum(g.square().sum() for g in found.values() if g is not None)
        norm = clip_grad_norm_(model.parameters(), math.inf)
        torch.testing.assert_close(norm, squares.sqrt())
    for name, gradient in gradients(model, x).items():
        assert (gradient is None) == (name == "frozen")
        assert gradient is None or torch.equal(gradient, whole[name])


def test_accumulated_gradients_stay_zero_outside():
    model, x = TwoLayers(), torch.randn(5, 3)
    with training_only(model, model.slices()):
        for _ in range(2):
            model(x).square().sum().backward()
        gradient = model.first.weight.grad
    assert not gradient[:2].any()
    assert not gradient[4:].any()
    assert gradient[2:4].all()


def test_an_error_in_the_block_still_gives_the_model_back():
    model = TwoLayers()
    with pytest.raises(KeyError), training_only(model, model.slices()):
        raise KeyError
    assert model.first.bias.requires_grad
    assert not model.frozen.requires_grad
    assert all(gradients(model, torch.randn(5, 3))["first.weight"][0])


def test_a_slice_of_another_model_is_refused():
    model = TwoLayers()
    with pytest.raises(ValueError, match="the model does not have"):
        training_only(model, TwoLayers().slices()).__enter__()
    assert model.first.bias.requires_grad


# --- the state ----------------------------------------------------------------------


def test_the_state_is_of_the_selected_weights_alone():
    parameters = make_parameters()
    optimizer = HeadAdamW(heads_of(parameters))
    give_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state_dict()["state"]
    sizes = [int(mask.sum()) for mask in selected(parameters, heads_of(parameters))]
    for name in ("exp_avg", "exp_avg_sq"):
        assert [state[i][name].numel() for i in range(4)] == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bit_for_bit(dtype):
    straight = make_parameters(dtype)
    optimizer = HeadAdamW(heads_of(straight), **EVERYTHING)
    for step in range(8):
        if step == 4:
            saved = copy.deepcopy(optimizer.state_dict())
            resumed = [nn.Parameter(p.detach().clone()) for p in straight]
        give_gradients(straight, step)
        optimizer.step()
    other = HeadAdamW(heads_of(resumed))
    other.load_state_dict(saved)
    for step in range(4, 8):
        give_gradients(resumed, step)
        other.step()
    for a, b in zip(straight, resumed, strict=True):
        assert_equal(a.detach(), b.detach())
    assert other.param_groups[0]["weight_decay"] == EVERYTHING["weight_decay"]


def test_loading_a_state_from_before_the_first_step_starts_anew():
    parameters = make_parameters()
    optimizer = HeadAdamW(heads_of(parameters), **EVERYTHING)
    fresh = copy.deepcopy(optimizer.state_dict())
    give_gradients(parameters, 0)
    optimizer.step()
    optimizer.load_state_dict(fresh)
    optimizer.step()
    assert int(optimizer.state[parameters[0]]["step"]) == 1


def test_the_moments_can_be_saved_as_safetensors():
    parameters = make_parameters()
    optimizer = HeadAdamW(heads_of(parameters))
    give_gradients(parameters, 0)
    optimizer.step()
    moments = optimizer.state[parameters[1]]["exp_avg_sq"]
    assert_equal(load(save({"v": moments.clone()}))["v"], moments)


def others(parameters):
    """Selections that differ from ``heads_of``: in place, in number, in shape."""
    q = parameters[0]
    wider = nn.Parameter(torch.rand(12, 11))
    chosen = heads_of(parameters)
    return [
        [WeightSlice(q, 0, 3, 5), *chosen[1:]],
        chosen[:-1],
        [c._replace(parameter=wider) if c[0] is q else c for c in chosen],
    ]


@pytest.mark.parametrize("which", range(3))
def test_a_state_of_other_slices_is_refused(which):
    parameters = make_parameters()
    saved = HeadAdamW(heads_of(parameters)).state_dict()
    other = HeadAdamW(others(parameters)[which])
    with pytest.raises(ValueError, match="of other slices"):
        other.load_state_dict(saved)


def test_a_state_of_torchs_own_is_refused():
    parameters = make_parameters()
    saved = torch.optim.AdamW(parameters).state_dict()
    with pytest.raises(ValueError, match="of other slices"):
        HeadAdamW(parameters).load_state_dict(saved)


SETTINGS = TrainingSettings(
    steps=6, batch_size=4, learning_rate=0.05, max_grad_norm=0.1, checkpoint_every=2
)


def squared_error(model, batch):
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def run_training(directory, stop=math.inf):
    """Train a model's slices; stop by an error in the step after ``stop``."""
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(24, 3, generator=generator)
    examples = list(zip(inputs, inputs.prod(1, keepdim=True), strict=True))
    model, calls = TwoLayers(), iter(range(1, 100))

    def loss(model, batch):
        if next(calls) > stop:
            raise InterruptedError
        return squared_error(model, batch)

    optimizer = HeadAdamW(model.slices(), lr=0.05, weight_decay=0.1)
    with training_only(model, model.slices()):
        history = train(
            model, examples, loss, SETTINGS, directory=directory, optimizer=optimizer
        )
    return model, history


def test_the_training_loop_resumes_it_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    straight, history = run_training(tmp_path / "straight")
    with pytest.raises(InterruptedError):
        run_training(tmp_path / "resumed", stop=5)
    resumed, continued = run_training(tmp_path / "resumed")
    assert history == continued
    start = TwoLayers()
    masks = selected(list(straight.parameters()), straight.slices())
    triples = zip(named(straight), resumed.parameters(), masks, strict=True)
    for (name, a), b, mask in triples:
        assert_equal(a.detach(), b.detach())
        first = start.get_parameter(name)
        assert_equal(a[~mask].detach(), first[~mask].detach())
        assert not mask.any() or (a[mask] != first[mask]).any()


# --- bad input ----------------------------------------------------------------------


MATRIX, VECTOR = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4))
BAD_SLICES = [
    ([], "there are no slices"),
    ([WeightSlice(MATRIX, 0, 2, 5)], r"rows 2 to 5 .* \(4, 6\) .* stop ≤ 4"),
    ([WeightSlice(MATRIX, 1, -1, 5)], "columns -1 to 5 .* stop ≤ 6"),
    ([WeightSlice(MATRIX, 0, 2, 2)], "rows 2 to 2"),
    ([WeightSlice(MATRIX, 2, 0, 1)], "dimension 2 .* choose 0 or 1"),
    ([WeightSlice(MATRIX, -1, 0, 1)], "dimension -1"),
    ([WeightSlice(VECTOR, 1, 0, 1)], "dimension 1 .* choose 0$"),
    ([WeightSlice(MATRIX, 0, 0, 2), WeightSlice(MATRIX, 0, 1, 3)], "0 to 2 .* overlap"),
    ([WeightSlice(MATRIX, 0, 0, 2), WeightSlice(MATRIX, 1, 4, 5)], "overlap"),
    ([VECTOR, VECTOR], "overlap"),
    ([VECTOR * 2], "no leaf"),
    ([nn.Parameter(torch.ones(3).long(), requires_grad=False)], "is torch.int64"),
    ([nn.Parameter(torch.ones(()))], "vectors and matrices"),
    ([nn.Parameter(torch.ones(2, 2, 2))], "vectors and matrices"),
    ([nn.Parameter(torch.ones(0))], "rows 0 to 0"),
]


@pytest.mark.parametrize(("slices", "message"), BAD_SLICES)
def test_bad_slices_are_refused(slices, message):
    with pytest.raises(ValueError, match=message):
        HeadAdamW(slices)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"lr": math.nan}, "lr is nan"),
        ({"eps": -1.0}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas are"),
        ({"backend": "cuda"}, "choose from torch, triton"),
    ],
)
def test_bad_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        HeadAdamW([VECTOR], **setting)


def test_a_second_group_is_refused():
    with pytest.raises(ValueError, match="one parameter group"):
        HeadAdamW([VECTOR]).add_param_group({"params": [MATRIX]})


def test_a_sparse_gradient_is_refused_before_anything_moves():
    embedding = nn.Embedding(4, 3, sparse=True)
    other = nn.Parameter(torch.ones(3))
    embedding(torch.tensor([1])).sum().backward()
    other.grad = torch.ones(3)
    with pytest.raises(ValueError, match="sparse=False"):
        HeadAdamW([other, embedding.weight]).step()
    assert (other == 1).all()


def test_parameters_on_several_devices_are_refused():
    elsewhere = nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match="are on cpu, meta"):
        HeadAdamW([VECTOR, elsewhere]).step()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_weights_that_leave_their_moments_are_refused():
    layer = nn.Linear(3, 2)
    optimizer = HeadAdamW([layer.weight])
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    layer.cuda()
    with pytest.raises(ValueError, match="are on cuda:0 and their moments on cpu"):
        optimizer.step()


def test_the_kernel_is_refused_what_it_cannot_take():
    wide = HeadAdamW([nn.Parameter(torch.ones(3).double())], backend="triton")
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="float64"):
        wide.step()


def test_accumulated_chunks_are_clipped_as_one_batch(monkeypatch):
    """Clipping counts the selected weights, however the gradient was made."""
    monkeypatch.setenv("FTLIB_DEVICE", "cpu")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    norms = []
    for accumulate in (1, 2):
        inputs = torch.linspace(-1, 1, 24).view(8, 3)
        examples = list(zip(inputs, inputs[:, :1], strict=True))
        chosen = replace(SETTINGS, steps=1, checkpoint_every=None)
        model = TwoLayers()
        optimizer = HeadAdamW(model.slices())
        with training_only(model, model.slices()):
            history = train(
                model,
                examples,
                squared_error,
                replace(chosen, accumulate=accumulate),
                optimizer=optimizer,
            )
        norms.append(history[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
