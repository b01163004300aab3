"""The loop: what it refuses, what it finds, what it leaves alone."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ftlib.cgm import calibrate as cgm
from ftlib.cgm.dual import InfeasibleTargetError, solve_dual
from ftlib.cgm.language import PromptedLM
from ftlib.cgm.mixture import GaussianMixture, right_of_zero, two_bumps
from ftlib.cgm.settings import CalibrationSettings
from ftlib.training import NonFiniteLossError, TrainingSettings

TARGET = torch.tensor([0.8])


def training(steps=300, batch_size=256):
    return TrainingSettings(
        steps=steps, batch_size=batch_size, learning_rate=0.02, max_grad_norm=None
    )


def relax(**options):
    return CalibrationSettings(
        "relax", training(**options), kl_weight=0.01, check_samples=0
    )


@pytest.mark.parametrize(
    ("settings", "mass"),
    [
        (CalibrationSettings("relax", training(), kl_weight=0.1), 0.7461),
        (CalibrationSettings("relax", training(), kl_weight=0.01), 0.7933),
        (
            CalibrationSettings(
                "relax", training(), kl_weight=0.1, violation_baseline=True
            ),
            0.7461,
        ),
        (CalibrationSettings("reward", training(), dual_samples=20_000), 0.8),
        (CalibrationSettings("forward_kl", training(), dual_samples=20_000), 0.8),
    ],
)
def test_every_loss_finds_its_theoretical_optimum(settings, mass):
    """Of the relax loss: the fixed point; of the others: the target."""
    torch.manual_seed(0)
    model = two_bumps()
    result = cgm.calibrate(model, right_of_zero, TARGET, settings)
    assert float(model.mass_right_of_zero()) == pytest.approx(mass, abs=0.015)
    assert len(result.history) == 300
    assert float(result.base.mass_right_of_zero()) == pytest.approx(0.5, abs=1e-4)


def test_chunked_scoring_gives_the_same_gradient():
    torch.manual_seed(0)
    model = two_bumps(dimensions=2)
    x = model.sample(10)

    def gradient(chunk):
        model.zero_grad()
        (cgm.Scorer(model, chunk)(x) * torch.arange(10)).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    for whole, parts in zip(gradient(None), gradient(3), strict=True):
        torch.testing.assert_close(whole, parts)


def test_scoring_is_not_autocast():
    torch.manual_seed(0)
    model = peaked_language_model()
    samples = model.sample(8)
    plain = cgm.Scorer(model)(samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(model.log_prob(samples), plain)  # it would matter
        assert torch.equal(cgm.Scorer(model)(samples), plain)


class Dropping(GaussianMixture):
    """A model with dropout, which must stay off while it is calibrated."""

    def __init__(self):
        super().__init__(torch.ones(2), torch.tensor([-1.0, 1.0]), torch.ones(2) / 4)
        self.dropout = nn.Dropout(0.5)
        self.modes = []

    def log_prob(self, x):
        self.modes.append(self.dropout.training)
        return super().log_prob(x)


def test_dropout_stays_off():
    model = Dropping()
    cgm.calibrate(model, right_of_zero, TARGET, relax(steps=3))
    assert model.modes
    assert not any(model.modes)


class Sharpened(GaussianMixture):
    """Samples at a lower temperature than it scores: what top-p or T ≠ 1 would do."""

    @torch.no_grad()
    def sample(self, n):
        hot = GaussianMixture(torch.ones(2), torch.ones(2), torch.ones(2))
        hot.load_state_dict(self.state_dict())
        hot.log_scales -= 0.25
        return hot.sample(n)


def test_scores_that_contradict_the_samples_are_found():
    torch.manual_seed(0)
    model = Sharpened(torch.ones(2), torch.tensor([-1.0, 1.0]), torch.ones(2) / 4)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(cgm.InconsistentModelError, match="contradicts sample"):
        cgm.check_scores(model, 2000)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


def peaked_language_model(kind=PromptedLM):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=6,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=12,
        bos_token_id=0,
        eos_token_id=0,
    )
    network = GPT2LMHeadModel(config).eval()
    network.transformer.wte.weight.data.normal_(std=0.25)
    return kind(network, [[1, 2]], 6, 0)


class MeanOverTokens(PromptedLM):
    def log_prob(self, samples):
        return super().log_prob(samples) / samples.scored.sum(1)


class WithoutEndToken(PromptedLM):
    def log_prob(self, samples):
        kept = samples.scored & (samples.written != self.end_token)
        return super().log_prob(dataclasses.replace(samples, scored=kept))


class TopTwo(PromptedLM):
    def sample(self, n):
        self.model.generation_config.top_k = 2
        return super().sample(n)


def test_the_score_check_is_the_same_in_chunks():
    def check(chunk):
        model = peaked_language_model()
        torch.manual_seed(1)
        return cgm.check_scores(model, 200, chunk=chunk)

    assert check(30) == pytest.approx(check(None), rel=1e-2)


@pytest.mark.parametrize("broken", [MeanOverTokens, WithoutEndToken, TopTwo])
def test_common_mistakes_with_language_models_are_found(broken):
    assert cgm.check_scores(peaked_language_model(), 2000) < 5
    with pytest.raises(cgm.InconsistentModelError, match="contradicts sample"):
        cgm.check_scores(peaked_language_model(broken), 2000)


def test_the_score_check_rarely_accuses_an_honest_model():
    torch.manual_seed(0)
    scores = [cgm.check_scores(two_bumps(0.3), 256) for _ in range(200)]
    assert max(scores) < 5
    assert max(scores) > 1  # it does measure something


def test_log_prob_of_the_wrong_shape_is_found():
    model = two_bumps()
    model.log_prob = lambda x: torch.zeros(len(x), 1)
    with pytest.raises(cgm.InconsistentModelError, match="shape"):
        cgm.check_scores(model, 32)


def test_too_few_samples_to_check_by_are_refused():
    with pytest.raises(ValueError, match="too few"):
        cgm.check_scores(two_bumps(), 8)


@pytest.mark.parametrize(
    ("h", "message"),
    [
        (lambda x: (x > 0).float()[:, 0], r"shape \[256, 1\].*returned \[256\]"),
        (lambda x: torch.zeros(len(x), 2), r"returned \[256, 2\]"),
        (lambda x: x > 0, "float tensor"),
        (lambda x: [0.0] * len(x), "float tensor"),
        (lambda x: torch.where(x > 0, torch.nan, x), r"nan for sample \d+ of 256"),
    ],
)
def test_a_bad_statistic_is_refused(h, message):
    with pytest.raises(cgm.StatisticError, match=message):
        cgm.calibrate(two_bumps(), h, TARGET, relax())


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match="use a larger batch"):
        cgm.calibrate(two_bumps(), right_of_zero, TARGET, relax(batch_size=1))


def test_a_model_without_the_two_methods_is_refused():
    with pytest.raises(TypeError, match="sample"):
        cgm.calibrate(nn.Linear(1, 1), right_of_zero, TARGET, relax())


@pytest.mark.parametrize("loss", ["reward", "forward_kl"])
def test_an_infeasible_target_is_refused_before_training(loss):
    settings = CalibrationSettings(loss, training(), dual_samples=100)
    with pytest.raises(InfeasibleTargetError, match="constraint 0"):
        cgm.calibrate(two_bumps(), right_of_zero, torch.tensor([1.5]), settings)


def test_a_diverging_run_stops_with_its_step():
    model = two_bumps()
    calls = []

    def h(x):
        calls.append(1)
        if len(calls) == 3:
            with torch.no_grad():
                model.logits.fill_(math.nan)
        return right_of_zero(x)

    with pytest.raises(NonFiniteLossError, match="step 3"):
        cgm.calibrate(model, h, TARGET, relax(steps=5))


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "relax"},
        {"loss": "relax", "kl_weight": 0.1, "dual_samples": 10},
        {"loss": "relax", "kl_weight": 0.0},
        {"loss": "reward"},
        {"loss": "reward", "dual_samples": 10, "kl_weight": 0.1},
        {"loss": "forward_kl", "dual_samples": 10, "violation_baseline": True},
        {"loss": "relax", "kl_weight": 0.1, "dual_ridge": 0.1},
        {"loss": "reward", "dual_samples": 10, "dual_ridge": -0.1},
    ],
)
def test_contradictory_settings_are_refused(options):
    with pytest.raises(ValueError, match=r"λ|N\)|relax|dual_ridge"):
        CalibrationSettings(training=training(), **options)


@pytest.mark.parametrize("loss", ["relax", "reward"])
def test_resuming_continues_bit_for_bit(tmp_path, loss):
    """The second call starts from another random state, and so from another dual."""
    schedule = dataclasses.replace(training(steps=20), checkpoint_every=5)
    knob = {"kl_weight": 0.01} if loss == "relax" else {"dual_samples": 100}
    settings = CalibrationSettings(loss, schedule, **knob)

    def run(seed, name, stop_at=None):
        torch.manual_seed(seed)
        model, calls = two_bumps(), []

        def h(x):
            calls.append(1)
            if len(calls) == stop_at:
                raise KeyboardInterrupt
            return right_of_zero(x)

        result = cgm.calibrate(model, h, TARGET, settings, directory=tmp_path / name)
        return model, result

    whole, straight = run(0, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(0, "broken", stop_at=13)
    resumed, again = run(99, "broken")
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert straight.history == again.history
    if loss == "reward":
        assert straight.tilt.to_json() == again.tilt.to_json()


def test_a_base_of_its_own_is_what_the_model_stays_close_to():
    """Already calibrated, but far from the base: a strong KL pulls it back."""
    torch.manual_seed(0)
    settings = CalibrationSettings("relax", training(), kl_weight=10.0)
    model, base = two_bumps(0.8), two_bumps(0.5)
    cgm.calibrate(model, right_of_zero, TARGET, settings, base=base)
    theory = solve_dual(torch.tensor([[0.0], [1.0]]), TARGET, kl_weight=10.0)
    reached = float(model.mass_right_of_zero())
    assert reached == pytest.approx(theory.mean[0], abs=0.02)
    assert base.logits.requires_grad  # the caller's copy is left alone


def test_a_ridge_gives_reward_a_tilt_where_the_dual_has_none():
    torch.manual_seed(0)
    settings = CalibrationSettings(
        "reward", training(), dual_samples=1000, dual_ridge=0.1
    )
    model = two_bumps()
    result = cgm.calibrate(model, right_of_zero, torch.tensor([1.05]), settings)
    theory = solve_dual(
        torch.tensor([[0.0], [1.0]]), torch.tensor([1.05]), kl_weight=0.1
    )
    assert result.tilt.alpha == pytest.approx(theory.alpha, rel=0.02)
    reached = float(model.mass_right_of_zero())
    assert reached == pytest.approx(theory.mean[0], abs=0.02)
