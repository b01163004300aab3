"""The losses CAREF is compared with, against other libraries and closed forms."""

import math

import entmax
import pytest
import torch
import torch.nn.functional as F

from ftlib.caref import baselines
from ftlib.caref.baselines import (
    CONFIDENCE_PENALTY,
    CROSS_ENTROPY,
    ENTMAX15,
    LABEL_SMOOTHING,
    SPARSEMAX,
    FenchelYoungLoss,
    FocalLoss,
)
from ftlib.caref.objective import STATISTICS, loss_from_logits
from ftlib.ops import OutputHead
from ftlib.sequences import IGNORED

V = 50
PEERS = {SPARSEMAX: entmax.sparsemax_loss, ENTMAX15: entmax.entmax15_loss}
ROW_LOSSES = [FocalLoss(), FocalLoss(0.5), SPARSEMAX, ENTMAX15]


def draw(rows=12, columns=V, spread=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(rows, columns, generator=generator)
    targets = torch.randint(columns, (rows,), generator=generator)
    targets[:4] = logits[:4].argmax(-1)
    return logits.to(dtype).requires_grad_(), targets


def draw_head(dtype=torch.float64, scale=0.7, softcap=5.0):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 5, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, 8, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (3, 5), generator=generator)
    targets[0, 3:] = IGNORED
    weights = torch.rand(3, 5, generator=generator).to(dtype) * (targets != IGNORED)
    return OutputHead(hidden, weight, scale, softcap), targets, weights


def logits_of(head):
    z = head.logit_scale * (head.hidden @ head.weight.T)
    return head.softcap * torch.tanh(z / head.softcap)


# --- values ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", PEERS, ids=str)
def test_fenchel_young_losses_are_the_peers(loss):
    logits, targets = draw()
    found, expected = loss.of_logits(logits, targets), PEERS[loss](logits, targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.linspace(-1, 1, len(targets), dtype=torch.float64)
    (got,) = torch.autograd.grad(found, logits, upstream)
    (want,) = torch.autograd.grad(expected, logits, upstream)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    p = loss.probabilities(logits)
    assert (p == 0).any()
    one_hot = F.one_hot(targets, V)
    torch.testing.assert_close(got, upstream[:, None] * (p - one_hot))


@pytest.mark.parametrize("loss", PEERS, ids=str)
def test_fenchel_young_losses_are_zero_where_the_target_is_certain(loss):
    logits = torch.zeros(1, 5, requires_grad=True)
    margin = torch.tensor([[0.0, 2.5, 0.0, 0.0, 0.0]])
    value = loss.of_logits(logits + margin, torch.tensor([1]))
    value.sum().backward()
    assert value == 0
    assert (logits.grad == 0).all()
    assert loss.of_logits(logits + margin, torch.tensor([2])) > 1


@pytest.mark.parametrize("loss", PEERS, ids=str)
def test_an_offset_of_the_logits_costs_no_digits(loss):
    logits, targets = draw(dtype=torch.float32)
    logits = (256 * logits).round() / 256  # so that the sum below is exact
    expected = loss.of_logits(logits, targets)
    torch.testing.assert_close(
        loss.of_logits(logits + 1024, targets), expected, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_focal_loss(gamma):
    logits, targets = draw()
    p = logits.softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = -((1 - p) ** gamma) * p.log()
    found = FocalLoss(gamma).of_logits(logits, targets)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    (got,) = torch.autograd.grad(found.sum(), logits)
    (want,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    if gamma == 0:
        torch.testing.assert_close(
            found, F.cross_entropy(logits, targets, reduction="none")
        )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_loss_of_what_is_certain(gamma):
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0]], requires_grad=True)
    value = FocalLoss(gamma).of_logits(logits, torch.tensor([0, 0]))
    value.sum().backward()
    assert value.tolist() == [0, 200]
    torch.testing.assert_close(
        logits.grad, torch.tensor([[0.0, 0.0], [-1.0, 1.0]]), atol=1e-6, rtol=0
    )


def test_token_losses():
    logits, targets = draw()
    cross_entropy = F.cross_entropy(logits, targets)
    found = loss_from_logits(logits, targets, CROSS_ENTROPY)
    torch.testing.assert_close(found, cross_entropy)
    smoothed = F.cross_entropy(logits, targets, label_smoothing=0.1)
    found = loss_from_logits(logits, targets, LABEL_SMOOTHING)
    torch.testing.assert_close(found, smoothed)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    expected = cross_entropy - 0.1 * (entropy - math.log(V))
    found = loss_from_logits(logits, targets, CONFIDENCE_PENALTY)
    torch.testing.assert_close(found, expected)


# --- from the head ---------------------------------------------------------------


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
def test_from_the_head_as_from_the_logits(loss, monkeypatch):
    monkeypatch.setattr(baselines, "CHUNK_LOGITS", 4 * V)  # four rows at a time
    head, targets, weights = draw_head()
    out = loss.of_head(head, targets, weights)
    kept = targets != IGNORED
    logits = logits_of(head)[kept]
    expected = (weights[kept] * loss.of_logits(logits, targets[kept])).sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(expected, (head.hidden, head.weight))
    found = torch.autograd.grad(out.loss, (head.hidden, head.weight))
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-11)
    assert (found[0][~kept] == 0).all()


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
def test_statistics_are_of_the_distribution_that_is_trained(loss):
    head, targets, weights = draw_head()
    out = loss.of_head(head, targets, weights)
    kept = targets != IGNORED
    logits = logits_of(head).detach()
    p = logits.softmax(-1)
    if isinstance(loss, FenchelYoungLoss):
        map_of = {2.0: entmax.sparsemax, 1.5: entmax.entmax15}[loss.alpha]
        p = map_of(logits, dim=-1)
    expected = {
        "log_prob": p.gather(-1, targets.where(kept, 0)[..., None])[..., 0].log(),
        "entropy": torch.distributions.Categorical(p, validate_args=False).entropy(),
        "collision_prob": (p**2).sum(-1),
        "top1_hit": p.argmax(-1) == targets,
    }
    if isinstance(loss, FenchelYoungLoss):
        expected["entropy"] = torch.special.entr(p).sum(-1)
    for name in STATISTICS:
        found = getattr(out, name)
        assert not found.requires_grad
        torch.testing.assert_close(
            found, expected[name].where(kept, 0).to(found.dtype), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(loss, dtype):
    head, targets, weights = draw_head(dtype)
    out = loss.of_head(head, targets, weights)
    exact = head._replace(
        hidden=head.hidden.detach().double(), weight=head.weight.detach().double()
    )
    expected = loss.of_head(exact, targets, weights.double()).loss
    assert out.loss.item() == pytest.approx(expected.item(), rel=2e-2)
    out.loss.backward()
    assert torch.isfinite(head.hidden.grad).all()
    assert head.hidden.grad.abs().max() > 0


@pytest.mark.parametrize("loss", ROW_LOSSES, ids=str)
def test_nothing_of_the_size_of_the_logits_is_kept(loss):
    head, targets, weights = draw_head()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t) or t, lambda t: t
    ):
        loss.of_head(head, targets, weights)
    assert not [t for t in saved if t.shape[-1:] == (V,)]


def test_what_is_out_of_range_is_refused():
    with pytest.raises(ValueError, match="gamma is -1"):
        FocalLoss(-1)
    with pytest.raises(ValueError, match=r"alpha is 1\.0: choose 2"):
        FenchelYoungLoss(1.0)
