# %% [markdown]
# # CGM: calibrate what a model generates
#
# *Smith, Diamant and Trippe, “Calibrating Generative Models to Distributional
# Constraints”* {cite:p}`smith2025calibrating`.
#
# Ask a small story model for a tale about a nurse and it tells you about a woman; ask
# for a pilot and it is a man. No single story is wrong. What is wrong is the
# *distribution* of stories, and fine-tuning on better single stories does not address
# it directly. CGM does: it takes a generative model, a few numbers that its samples
# should average to, and finds the model closest to the old one that has those
# averages.
#
# One word of warning first. *Calibration* here has nothing to do with the confidence
# of a classifier. A generator is calibrated when the mean of some statistic over its
# own samples is what you asked for.

# %% [markdown]
# ## What you will be able to do
#
# * state calibration as a constrained problem and solve it exactly where that is
#   possible;
# * derive the two losses of the paper, **relax** and **reward**, and estimate their
#   gradients without bias, from samples alone;
# * calibrate any model that can sample and score, in ten lines with `ftlib.cgm`;
# * measure what matters, the violation *and* the distance to the base model, against
#   the smallest distance that any method can reach;
# * say when each loss fails, before it does.
#
# You need: probability, PyTorch. It helps to have met policy gradients.

# %% tags=["generated", "hide-cell", "nbval-skip", "skip-execution"]
# Written by `make generate`. On Colab this installs ftlib and what is not
# there yet; torch, triton and numpy stay as they are. Colab's torchao is
# older than peft accepts, and ftlib does not use it.
import sys

if "google.colab" in sys.modules:
    source = "git+https://github.com/finetuning-book/finetuning-book@v0.1.0"
    # !pip list --format=freeze | grep -E "^(numpy|torch|triton)=" > kept.txt
    # !pip install -q -c kept.txt "ftlib[models] @ {source}"
    # !pip uninstall -q -y torchao

# %% tags=["generated"]
# Written by `make generate`: where this runs, at which scale, with what.
from ftlib import runtime

print(runtime.report())

# %% tags=["hide-input"]
import dataclasses
import math
import textwrap
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from torch import nn

from ftlib import models, plots, results, runtime
from ftlib.cgm import calibrate as cgm
from ftlib.cgm import experiment, mixture, objective, stories
from ftlib.cgm.dual import solve_dual
from ftlib.cgm.settings import (
    MIXTURE,
    STORIES,
    STORY_LEARNING_RATES,
    TALES,
    CalibrationSettings,
)
from ftlib.training import TrainingSettings

plots.use_style()
records = results.load("cgm", "cpu")
torch.set_num_threads(1)  # models so small are not faster on more

# %% [markdown]
# ## The idea in one picture
#
# A base model makes points around −1 and around +1, half of them each. We want 80 %
# of the points to the right of zero. Many distributions have that property. Two of
# them are below. One keeps the shape of each bump and changes only how often it is
# visited. The other moves to a place where the base model never was. Both meet the
# constraint. What separates them is the Kullback–Leibler divergence from the base.

# %% mystnb={"image": {"alt": "Three densities over x from minus 2.5 to 2.5. The base has two equal bumps at minus one and plus one. The closest calibrated density has the same bumps, the right one four times as high as the left. A third, a single wide bump shifted to the right, also has 80 percent of its mass right of zero but does not look like the base at all."}} tags=["hide-input"]
base = mixture.two_bumps()
closest = mixture.two_bumps(0.8)
shift = 0.84  # a Gaussian with mean 0.84 sd has 80 % right of zero
careless = mixture.GaussianMixture(
    torch.ones(1), torch.tensor([shift]), torch.ones(1)
)
x = torch.linspace(-3, 3.5, 600)[:, None]
shown = [
    ("base: 50 % right of zero", base, base),
    ("calibrated, closest", closest, base),
    ("calibrated, careless", careless, base),
]
fig, ax = plt.subplots(figsize=(7, 3))
for i, (name, model, reference) in enumerate(shown):
    kl = model.kl_from(reference)
    style = plots.arm_style(i)
    ax.plot(
        x,
        model.log_prob(x).exp().detach(),
        color=style["color"],
        linestyle=style["linestyle"],
        label=f"{name}: KL {kl:.2f} nats",
    )
ax.axvline(0, color="grey", linewidth=1)
ax.set(xlabel="x", ylabel="density")
ax.legend()
plt.show()

# %% [markdown]
# ## What the paper claims
#
# | | claim | where we answer it |
# | --- | --- | --- |
# | cgm‑1 | Calibration is a constrained problem: the closest model in KL that meets the constraints | the equations; the mixture |
# | cgm‑2 | The relax loss, a penalty on miscalibration, cuts the calibration error substantially | all three experiments |
# | cgm‑3 | The reward loss, calibration as reward fine-tuning, does so too | all three experiments |
# | cgm‑4 | It holds for hundreds of simultaneous constraints, across proteins, images and language, up to 9 B parameters | language in this chapter; images, sequences and diffusion in the [second part](cgm_beyond.ipynb) |
#
# The abstract, the authors' code and their public demo notebook were at hand for this
# chapter. The result tables of the paper were not, so no number of theirs stands
# beside ours. What is our derivation and not the paper's is said to be ours.

# %% [markdown]
# ## The equations
#
# ### Closest model under constraints
#
# Let $p$ be the base model, $h(x) \in \mathbb{R}^d$ a statistic of a sample, and $h^*$
# the value its mean should have. $h$ is a black box: an indicator, a classifier, a
# rule. We look for
#
# $$
# p^* = \arg\min_{q}\; \mathrm{KL}(q \,\|\, p)
# \quad\text{subject to}\quad \mathbb{E}_q[h(x)] = h^* .
# $$
#
# Write the Lagrangian, with multipliers $\alpha$ for the constraints and $\mu$ for
# normalisation, and set its derivative in $q(x)$ to zero:
#
# $$
# \log\frac{q(x)}{p(x)} + 1 - \alpha^\top h(x) - \mu = 0
# $$
#
# $$
# \Longrightarrow\quad
# p_\alpha(x) = \frac{p(x)\, e^{\alpha^\top h(x)}}{Z(\alpha)},
# \qquad Z(\alpha) = \mathbb{E}_p\!\left[e^{\alpha^\top h(x)}\right].
# $$
#
# The solution is an **exponential tilt** of the base. Only $d$ numbers are unknown,
# and they maximise the concave dual
#
# $$
# \alpha^* = \arg\max_\alpha\; \alpha^\top h^* - \log Z(\alpha),
# $$
#
# whose gradient is $h^* - \mathbb{E}_{p_\alpha}[h]$ and whose value at the top is the
# smallest KL that *any* calibrated model can have. That number is the yardstick of
# this chapter. A solution exists when $h^*$ lies inside the convex hull of the values
# that $h$ takes, and it is unique when no constraint follows from the others.
#
# For one yes-or-no statistic with base probability $p$ everything is in closed form:
# $\alpha^* = \operatorname{logit} h^* - \operatorname{logit} p$. Our picture has
# $p = 0.5$ and $h^* = 0.8$:

# %% tags=["nbval-check-output"]
tilt = solve_dual(
    h=torch.tensor([[0.0], [1.0]]),
    target=torch.tensor([0.8]),
    weights=torch.tensor([0.5, 0.5]),
)
print(f"α* = {tilt.alpha[0]:.4f}   ln 4 = {math.log(4):.4f}")
print(f"smallest KL = {tilt.kl:.4f} nats")

# %% [markdown]
# ### Relax: a penalty
#
# A neural network cannot be tilted by hand. **CGM-relax** trains it on a penalty,
#
# $$
# \mathcal{L}^{\text{relax}}(\theta) =
# \underbrace{\big\| \mathbb{E}_{p_\theta}[h] - h^* \big\|^2}_{\text{violation}}
# + \lambda\, \mathrm{KL}(p_\theta \,\|\, p).
# $$
#
# Where does this end if the network can represent anything? Setting the derivative to
# zero again gives a tilt, with $\alpha_\lambda = \tfrac{2}{\lambda}\,(h^* -
# \mathbb{E}_{p_{\alpha_\lambda}}[h])$ (ours). Read backwards: relax never meets the
# constraint; it falls short by exactly $\lambda\alpha_\lambda/2$. Since $\alpha_\lambda
# \to \alpha^*$, the shortfall is about $\lambda\alpha^*/2$ and can be predicted
# *before* training. The same equation is the gradient of
# $\alpha^\top h^* - \log Z(\alpha) - \tfrac{\lambda}{4}\|\alpha\|^2$: relax solves the
# dual with a ridge, which is why it always has a solution, also where the constrained
# problem has none.
#
# ### Reward: a fixed tilt
#
# **CGM-reward** draws $N$ samples from the base, solves the dual on them for
# $\hat\alpha_N$, and then trains towards that tilt:
#
# $$
# \mathcal{L}^{\text{reward}}(\theta) = \mathrm{KL}(p_\theta \,\|\, p_{\hat\alpha_N})
# = \mathrm{KL}(p_\theta \,\|\, p) - \mathbb{E}_{p_\theta}\!\big[\hat\alpha_N^\top h(x)\big]
# + \log Z .
# $$
#
# This is reward fine-tuning with the reward $\hat\alpha_N^\top h(x)$ and a KL weight of
# exactly one. There is no $\lambda$. The price is that an error in $\hat\alpha_N$ is
# baked in, and that for rare events the sample dual may have no solution at all.
#
# ### Gradients from samples
#
# Neither the sampler nor $h$ is differentiated. With $\nabla \mathbb{E}_{p_\theta}[f] =
# \mathbb{E}_{p_\theta}[f \,\nabla\log p_\theta]$, each loss becomes a weighted sum of
# scores, $\sum_i c_i \nabla \log p_\theta(x_i)$, with one coefficient a sample. Three
# details decide whether it is right.
#
# *The violation needs a U-statistic.* The obvious plug-in $\|\bar h - h^*\|^2$ is too
# large by $\operatorname{tr}\operatorname{Cov}(h)/n$. With $y_i = h(x_i) - h^*$, the
# sum over pairs of *different* samples is unbiased, and so is its gradient:
#
# $$
# \hat V = \frac{1}{n(n-1)} \sum_{i \ne j} y_i^\top y_j, \qquad
# c_i^{V} = \frac{2}{n}\, y_i^\top \bar y_{-i}, \qquad
# \bar y_{-i} = \frac{1}{n-1}\sum_{j\ne i} y_j .
# $$
#
# *The KL needs a baseline.* With $\ell_i = \log p_\theta(x_i) - \log p(x_i)$ the
# coefficient is $c_i^{\mathrm{KL}} = \tfrac1n(\ell_i - \bar\ell_{-i})$. Leaving sample
# $i$ out of its own baseline keeps the gradient unbiased.
#
# *The violation may have one too.* $\bar y_{-i}$ is part of the estimate, not a
# baseline. Subtracting from $c_i^V$ what the other samples predict for it, that is
# $\tfrac2n \hat V_{-i}$, changes nothing on average and lowers the variance. The
# paper's code does not do this; its successor kCGM does.

# %% [markdown]
# ## Build it in forty lines
#
# A mixture with trainable weights, means and widths can sample and can score. That is
# all CGM asks for.

# %% tags=["nbval-check-output"]
TARGET = torch.tensor([0.8])
KL_WEIGHT = 0.1


def leave_one_out(values):
    """Mean of all other rows, for every row."""
    return (values.sum(0) - values) / (len(values) - 1)


def relax_coefficients(log_ratio, h, target, kl_weight):
    """c_i, so that Σ c_i ∇log p(x_i) estimates the relax gradient."""
    y = h - target
    violation = 2 * (y * leave_one_out(y)).sum(-1)
    kl = log_ratio - leave_one_out(log_ratio)
    return (violation + kl_weight * kl) / len(y)


torch.manual_seed(0)
model, base = mixture.two_bumps(), mixture.two_bumps()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
for _ in range(300):
    x = model.sample(256)
    log_prob = model.log_prob(x)
    log_ratio = (log_prob - base.log_prob(x)).detach()
    h = mixture.right_of_zero(x)
    c = relax_coefficients(log_ratio, h, TARGET, KL_WEIGHT)
    optimizer.zero_grad()
    (c * log_prob).sum().backward()
    optimizer.step()
    schedule.step()

theory = solve_dual(
    torch.tensor([[0.0], [1.0]]), TARGET, kl_weight=KL_WEIGHT
)
reached = float(model.double_copy().mass_right_of_zero())
assert abs(reached - theory.mean[0]) < 0.01
assert abs(model.kl_from(base) - theory.kl) < 0.01
print(f"theory: {theory.mean[0]:.2f} of the mass right of zero")
print("training ends within 0.01 of it, in mass and in KL")

# %% [markdown]
# The exact answer for $\lambda = 0.1$ is not 0.80: the penalty stops short by
# $\lambda\alpha_\lambda/2$, and so does the training. Now the library's version. Same
# numbers on a small batch, to the last digit that float64 has:

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
log_prob = torch.randn(6, dtype=torch.float64, requires_grad=True)
log_base = torch.randn(6, dtype=torch.float64)
h = torch.randn(6, 2, dtype=torch.float64)
target = torch.zeros(2, dtype=torch.float64)

objective.relax_loss(log_prob, log_base, h, target, 0.3).backward()
ours = relax_coefficients((log_prob - log_base).detach(), h, target, 0.3)
torch.testing.assert_close(log_prob.grad, ours, rtol=1e-12, atol=1e-12)
print("the forty lines and ftlib.cgm.objective agree:", ours.shape)

# %% [markdown]
# ### Why not the plug-in?
#
# Ten samples from a fair coin, target 0.8. The true violation is 0.09. Below are
# 20,000 estimates of each kind.

# %% mystnb={"image": {"alt": "Stems show how often each value of two estimates of the violation occurred among 20,000 batches of ten coin flips. The mean of the U-statistic falls on the true value 0.09, and some of its values are below zero. The plug-in has the same stems moved to the right; it is never negative and its mean is about 0.115, too large."}} tags=["hide-input"]
torch.manual_seed(0)
batches = torch.rand(20_000, 10, 1).lt(0.5).double()
goal = torch.tensor([0.8], dtype=torch.float64)
unbiased = torch.vmap(lambda h: objective.violation(h, goal))(batches)
plug_in = torch.vmap(lambda h: objective.plug_in_violation(h, goal))(
    batches
)
fig, ax = plt.subplots(figsize=(7, 3))
estimates = [("U-statistic", unbiased), ("plug-in", plug_in)]
for i, (name, values) in enumerate(estimates):
    value, count = np.unique(values.numpy().round(6), return_counts=True)
    style = plots.arm_style(i)
    ax.vlines(
        value, 0, count, style["color"], linestyles=style["linestyle"]
    )
    ax.plot(
        value, count, style["marker"], color=style["color"],
        label=f"{name}: mean {values.mean():.3f}",
    )
ax.axvline(0.09, color="black", linewidth=1, label="true violation")
ax.axvline(0, color="grey", linewidth=1, linestyle=":")
ax.set(xlabel="estimated violation", ylabel="batches of 20,000")
ax.legend()
plt.show()

# %% tags=["nbval-check-output"]
error = float(4 * unbiased.std() / 20_000**0.5)
print("U-statistic within four errors of 0.09:",
      bool(abs(unbiased.mean() - 0.09) < error))
print("plug-in too large by p(1-p)/n = 0.025: ",
      bool(abs(plug_in.mean() - 0.115) < error))
share = float((unbiased < 0).double().mean())
print("the U-statistic is sometimes negative: ", share > 0.01)


# %% [markdown]
# ## Use ftlib's
#
# `ftlib.cgm.calibrate` asks two things of a `torch.nn.Module`: `sample(n)` and
# `log_prob(samples)`. Here is a model of your own, a six-sided die, calibrated to a
# mean of 4.5. It is an old friend: Jaynes posed it in 1962 to
# teach maximum entropy, and the answer is in the textbooks {cite:p}`jaynes1963brandeis`.

# %% tags=["nbval-check-output"]
class Die(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(6))

    def sample(self, n):
        return torch.multinomial(self.logits.softmax(0), n, True)

    def log_prob(self, faces):
        return self.logits.log_softmax(0)[faces]


torch.manual_seed(0)
die = Die()
training = TrainingSettings(
    steps=400, batch_size=512, learning_rate=0.03, max_grad_norm=None
)
cgm.calibrate(
    die,
    h=lambda faces: (faces + 1.0)[:, None],
    target=torch.tensor([4.5]),
    settings=CalibrationSettings("reward", training, dual_samples=10_000),
)
faces = np.arange(1.0, 7.0)
exact = np.exp(solve_dual(faces[:, None], np.array([4.5])).alpha * faces)
exact /= exact.sum()
jaynes = [0.05435, 0.07877, 0.11416, 0.16545, 0.23977, 0.34749]
np.testing.assert_allclose(exact, jaynes, atol=1e-5)
found = die.logits.softmax(0).detach().cpu().numpy()
assert np.abs(found - exact).max() < 0.02, found
print("the textbook's die:", np.round(exact, 4))
print("trained: every face within 0.02")

# %% [markdown]
# Before it trains, `calibrate` draws samples and checks that `log_prob` belongs to
# them. A sampler with top-k, a temperature or a forgotten end token would pass
# silently otherwise, and every gradient would be wrong. The test rests on an identity:
# for samples of $p_\theta$ the ratio $p_{\theta'}(x)/p_\theta(x)$ has mean one,
# whatever $\theta'$ is. Exercise 5 shows it at work. A target that no mixture of
# samples can meet is refused too, by name:

# %% tags=["nbval-check-output"]
from ftlib.cgm.dual import InfeasibleTargetError, RedundantConstraintError

h = torch.eye(3)[[0, 1, 2, 1, 0, 2]]  # one-hot classes
try:
    solve_dual(h, torch.full((3,), 1 / 3))
except RedundantConstraintError as problem:
    print(textwrap.fill(f"redundant: {problem}", 70))
try:
    solve_dual(h[:, :2], torch.tensor([0.7, 0.7]))
except InfeasibleTargetError as problem:
    print(textwrap.fill(f"infeasible: {problem}", 70))

# %% [markdown]
# ## Train it against fair baselines
#
# Now a language model, still one whose every probability can be read off. A small GPT
# learns stories such as
#
# > once a nurse named Mia . she found a red kite .
#
# for twelve professions whose names lean towards one gender. The name decides the
# pronoun. P(female | profession) is one forward pass, with no sampling; so is the
# chance that the pronoun fits the name, which serves as our measure of quality. Eight
# professions are calibrated to as many women as men. Four others, never mentioned in a
# constraint, show what spills over.
#
# Four ways to do it, on the same budget of 200 × 256 samples:
#
# * **relax** and **reward**;
# * **forward KL**, the older idea of pulling the model towards the tilt from the other
#   side {cite:p}`khalifa2021distributional`: minimise $\mathrm{KL}(p_{\hat\alpha}
#   \,\|\, p_\theta)$ with importance weights;
# * **balanced SFT**, what many would try first: draw stories from the base model, keep
#   as many of one gender as of the other, fine-tune on those. It deserves respect.
#   Throwing samples away until the classes balance *is* sampling from the tilt.
#
# Learning rates were chosen for each on other seeds (experiment `learning-rate` in the
# records). What we expected, written before the runs: relax loses at least 90 % of the
# imbalance; its KL overshoots the smallest possible at small λ, where noise moves the
# model in directions that $h$ does not see; reward is limited by $\hat\alpha$ at
# $N=256$ and not at $N=4096$; balanced SFT is competitive, because here rejection is
# cheap.
#
# Live, with one seed:

# %%
teller = experiment.story_base(STORIES, seed=0)
torch.manual_seed(0)
for tokens in teller.sample(4).tokens:
    print(stories.decode(tokens))


# %%
def live(name, fine_tune):
    model = experiment.story_base(STORIES, seed=0)
    base = cgm.frozen_copy(model)
    torch.manual_seed(0)
    fine_tune(model)
    return name, experiment.evaluate_stories(model, base, 2048)


def calibrated(loss, **options):
    settings = experiment.story_settings(loss, **options)
    return partial(experiment.calibrate_stories, settings)


imitation = STORIES.training(STORY_LEARNING_RATES["balanced SFT"])
live_runs = dict(
    [
        live("base", lambda model: None),
        live("relax λ=0.3", calibrated("relax", kl_weight=0.3)),
        live("reward N=4096", calibrated("reward", dual_samples=4096)),
        live(
            "balanced SFT",
            partial(experiment.imitate_balanced, imitation),
        ),
    ]
)
smallest = float(live_runs["base"]["smallest_kl"])
print("                imbalance    KL     pronoun fits")
for name, m in live_runs.items():
    kl, fits = m["kl"].value, m["agreement"]
    print(f"{name:14}  {m['mean_abs_imbalance']:.3f}     "
          f"{kl:6.3f}    {fits:.4f}")
print(f"smallest KL of a calibrated model: {smallest:.3f} nats")

# %% tags=["nbval-check-output"]
start = live_runs["base"]["mean_abs_imbalance"]
for name in ("relax λ=0.3", "reward N=4096", "balanced SFT"):
    left = live_runs[name]["mean_abs_imbalance"]
    print(f"{name:14} removes most of the imbalance:", left < start / 2)

# %% [markdown]
# ## Evaluate it, over five seeds
#
# A new base model is trained for every seed, so the spread includes that of the base.
# Each arm shows its seeds, and the mean with a 95 % bootstrap interval. Never look at
# the violation alone: a model can always buy it with KL. The dashed line is the KL
# that no calibrated model can go below (whoever stands to its left is not calibrated
# yet); the star is the exact optimum, whose imbalance
# of zero lies below any logarithmic axis.

# %% tags=["hide-input"]
ARMS = {
    "base": "base",
    "relax λ=1": "relax λ=1",
    "relax λ=0.3": "relax λ=0.3",
    "relax λ=0.1": "relax λ=0.1",
    "relax λ=0.1, baseline": "relax λ=0.1, baseline",
    "relax λ=0.03": "relax λ=0.03",
    "reward N=256": "reward N=256",
    "reward N=4096": "reward N=4096",
    "forward-KL N=4096": "forward KL N=4096",
    "balanced SFT": "balanced SFT",
}
stories_records = records.select(experiment="stories")
Markdown(
    results.table(
        stories_records,
        {
            "mean_abs_imbalance": "mean imbalance",
            "kl": "KL (nats)",
            "agreement": "pronoun fits name",
            "held_out_imbalance": "held-out imbalance",
        },
        ARMS,
    )
)

# %% mystnb={"image": {"alt": "Scatter of KL from the base in nats against mean absolute imbalance on a logarithmic axis, one marker a method and seed. The base sits at zero KL and the largest imbalance. The calibrated arms lie lower, near or to the right of a dashed vertical line with a star at its foot, which marks the smallest KL of any calibrated model."}} tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 4.6))
plots.frontier(ax, stories_records, "kl", "mean_abs_imbalance", ARMS)
smallest = stories_records.select(arm="base").values("smallest_kl")
ax.axvline(smallest.mean(), color="black", linestyle="--", linewidth=1)
ax.set_yscale("log")
ax.set(
    xlabel="KL from the base (nats)",
    ylabel="mean |P(female) − P(male)|",
)
bottom = ax.get_ylim()[0]
ax.set_ylim(bottom)
ax.plot(
    smallest.mean(), bottom, "*", color="black", markersize=13,
    clip_on=False, zorder=5, label="exact optimum (imbalance 0)",
)
ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()


# %% tags=["hide-input"]
def mean(experiment_name, arm, metric):
    chosen = records.select(experiment=experiment_name, arm=arm)
    return results.bootstrap(chosen.values(metric)).mean


def removed(arm):
    start = mean("stories", "base", "mean_abs_imbalance")
    return 1 - mean("stories", arm, "mean_abs_imbalance") / start


relaxes = [arm for arm in ARMS if arm.startswith("relax")]
cuts = [removed(arm) for arm in relaxes]
excess = {arm: mean("stories", arm, "excess_kl") for arm in ARMS}
fits = {arm: mean("stories", arm, "agreement") for arm in ARMS}
versus = results.paired_by_seed(
    stories_records.select(arm="relax λ=0.1, baseline"),
    stories_records.select(arm="relax λ=0.1"),
    "kl",
)
Markdown(
    f"""
Relax removes {min(cuts):.0%} to {max(cuts):.0%} of the mean imbalance.
Against the smallest possible, its KL is {excess["relax λ=1"]:+.0%} at
λ = 1, {excess["relax λ=0.3"]:+.0%} at λ = 0.3 and
{excess["relax λ=0.03"]:+.0%} at λ = 0.03. Reward removes
{removed("reward N=256"):.0%} with 256 samples in its dual
({excess["reward N=256"]:+.0%}) and {removed("reward N=4096"):.0%} with
4,096 ({excess["reward N=4096"]:+.0%}). Forward KL removes
{removed("forward-KL N=4096"):.0%} ({excess["forward-KL N=4096"]:+.0%}),
balanced SFT {removed("balanced SFT"):.0%} ({excess["balanced SFT"]:+.0%}).
A baseline on the violation changes the KL of relax at λ = 0.1 by
{results.format_interval(versus.difference, 2)} nats (paired by seed,
p = {versus.p_value:.2f}; five seeds cannot give less than 0.06).

Quality moves with KL. The pronoun fits the name in {fits["base"]:.2%} of
the base model's stories, in {fits["relax λ=1"]:.2%} after relax with
λ = 1, in {fits["relax λ=0.03"]:.2%} with λ = 0.03, and in
{fits["balanced SFT"]:.2%} after balanced SFT.
"""
)

# %% [markdown]
# ### Professions that nobody asked about
#
# Constraints were set for eight professions. What happened to the other four?

# %% mystnb={"image": {"alt": "For each of the four held-out professions judge, dancer, baker and sheriff, the probability of a woman under the base model, after relax with lambda 0.3, and after balanced fine-tuning, with one dot a seed. A horizontal line marks one half."}} tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 3.6))
shown = ["base", "relax λ=0.3", "reward N=4096", "balanced SFT"]
for i, arm in enumerate(shown):
    for k, profession in enumerate(stories.HELD_OUT):
        plots.seed_points(
            ax,
            k + 0.18 * (i - 1.5),
            stories_records.select(arm=arm).values(f"female/{profession}"),
            index=i,
            label=arm if k == 0 else None,
        )
ax.axhline(0.5, color="grey", linewidth=1)
ax.set_xticks(range(len(stories.HELD_OUT)), list(stories.HELD_OUT))
ax.set(ylim=(0, 1), ylabel="P(female | profession)")
ax.legend(ncols=4, loc="upper center")
plt.show()

# %% tags=["hide-input"]
unseen = {
    arm: mean("stories", arm, "held_out_imbalance") for arm in shown
}
Markdown(
    f"""
They followed. Their mean imbalance falls from {unseen["base"]:.2f} to
{unseen["relax λ=0.3"]:.2f} under relax with λ = 0.3, to
{unseen["reward N=4096"]:.2f} under reward and to
{unseen["balanced SFT"]:.2f} under balanced SFT. In this small world the
model learns “as many women as men” and not a list of professions. Welcome
here, it is a warning elsewhere: a constraint on some prompts moves others.
"""
)

# %% [markdown]
# ## A real language model
#
# The paper's language experiment asks Gemma-2-9B for stories about professions and
# counts women and men. At scale `cpu` we ask `stories15m`, a 15-million-parameter
# Llama trained on TinyStories by Andrej Karpathy {cite:p}`eldan2023tinystories`, whose
# bias is plain to see. The gender of a story is decided by a rule of the paper's kind:
# the first gendered pronoun; without one, the first title (Mrs, Ms, Miss, Mr); without
# one, the name. The rule is a proxy. It does not know whom a pronoun refers to, so we
# also report how often name and pronoun agree.
#
# A glimpse, live. If the model is not at hand the recorded results below still stand.

# %%
world = TALES[runtime.scale()]
at_hand = models.available(world.model, fetch=True)
if at_hand:
    teller = experiment.storyteller(world)
    torch.manual_seed(0)
    samples = teller.sample(8)
    told = zip(samples.prompt, teller.texts(samples), strict=True)
    for k, text in told:
        print(f"a {teller.professions[k]} named {text.strip()!r}")
else:
    print(f"{world.model} is not here: `ftlib models` says where to get it")

# %%
if at_hand:
    few = dataclasses.replace(world.training, steps=5)
    torch.manual_seed(0)
    run = cgm.calibrate(
        teller,
        teller.gender_constraints,
        torch.zeros(len(world.trained)),
        CalibrationSettings(
            "relax", few, kl_weight=1.0, violation_baseline=True,
            score_chunk=world.score_chunk, check_samples=0,
        ),
        strata=lambda samples: samples.prompt,
    )
    for step in run.history:
        print(f"step {step['step']:.0f}  violation {step['violation']:5.2f}"
              f"  KL {step['kl']:5.2f}")

# %% [markdown]
# The violation of one batch is a noisy thing. The records hold the full runs: five
# seeds, fresh stories of every model.

# %% mystnb={"image": {"alt": "Share of stories about a woman minus share about a man, for four trained and three held-out professions, before and after calibration, one dot a seed. Before, doctor and pilot are strongly male, nurse and teacher strongly female. After relax the trained professions lie close to zero."}} tags=["hide-input"]
tales_records = records.select(experiment="tales")
tale_arms = [
    "base",
    *[arm for arm in tales_records.arms() if arm != "base"],
]


def imbalance(arm, profession):
    of_arm = tales_records.select(arm=arm)
    female = of_arm.values(f"female/{profession}")
    return female - of_arm.values(f"male/{profession}")


recorded = TALES["cpu"]
professions = [*recorded.trained, *recorded.held_out]
fig, ax = plt.subplots(figsize=(7, 3.8))
for i, arm in enumerate(tale_arms):
    for k, profession in enumerate(professions):
        plots.seed_points(
            ax,
            k + 0.2 * (i - 1),
            imbalance(arm, profession),
            index=i,
            label=arm if k == 0 else None,
        )
ax.axhline(0, color="grey", linewidth=1)
ax.axvline(len(recorded.trained) - 0.5, color="grey", linestyle=":")
ax.set_xticks(range(len(professions)), professions)
ax.set(ylim=(-1.3, 1), ylabel="P(female) − P(male)")
ax.text(1.5, -1.22, "trained", ha="center")
ax.text(5, -1.22, "held out", ha="center")
ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
plt.show()

# %% tags=["hide-input"]
Markdown(
    results.table(
        tales_records,
        {
            "mean_abs_imbalance": "imbalance, trained",
            "held_out_imbalance": "imbalance, held out",
            "kl": "KL (nats)",
            "name_fits_pronoun": "name fits pronoun",
        },
        tale_arms,
    )
)


# %% tags=["hide-input"]
def tale(arm, metric):
    return mean("tales", arm, metric)


relax_arm = next(arm for arm in tale_arms if arm.startswith("relax"))
reward_arm = next(arm for arm in tale_arms if arm.startswith("reward"))
noise = math.sqrt(2 / (math.pi * recorded.evaluation_samples))
possible = tale("base", "kl_to_balance")


def tale_cut(arm):
    start = tale("base", "mean_abs_imbalance")
    return 1 - tale(arm, "mean_abs_imbalance") / start


Markdown(
    f"""
Relax removes {tale_cut(relax_arm):.0%} of the imbalance of the trained
professions, reward {tale_cut(reward_arm):.0%}. A perfectly balanced model
would still show a mean imbalance of about {noise:.2f} with
{recorded.evaluation_samples} stories a profession. The closest calibrated
model has a KL of {possible:.2f} nats; relax ends at
{tale(relax_arm, "kl"):.2f} and reward at {tale(reward_arm, "kl"):.2f}. The
held-out professions move too, from
{tale("base", "held_out_imbalance"):.2f} to
{tale(relax_arm, "held_out_imbalance"):.2f} under relax and to
{tale(reward_arm, "held_out_imbalance"):.2f} under reward: about half of the
way. Name and pronoun agree as often as before.
"""
)

# %% [markdown]
# ## Turn one knob
#
# ### λ of relax
#
# On the mixture everything is exact, so the sweep can be laid over the theory of the
# equations above: no fit, no free parameter.

# %% mystnb={"image": {"alt": "Two panels over lambda on a logarithmic axis. Left: the mass right of zero; the trained models of five seeds follow the theoretical curve from 0.6 at lambda 1 up to the target 0.8, a dashed line. Right: KL from the base; it follows the curve up to the dashed limit 0.193 and lies a little above it at the smallest lambda."}} tags=["hide-input"]
mixture_records = records.select(experiment="mixture")
coin = torch.tensor([[0.0], [1.0]])
grid = np.geomspace(1e-3, 1, 60)
curve = [solve_dual(coin, TARGET, kl_weight=w) for w in grid]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2))
left.plot(grid, [t.mean[0] for t in curve], color="grey")
right.plot(grid, [t.kl for t in curve], color="grey", label="theory")
for weight in MIXTURE.kl_weights:
    arm = mixture_records.select(arm=f"relax λ={weight:g}")
    plots.seed_points(left, weight, arm.values("mass"))
    plots.seed_points(
        right,
        weight,
        arm.values("kl"),
        label="trained, five seeds" if weight == 1 else None,
    )
left.axhline(0.8, color="black", linestyle="--", linewidth=1)
right.axhline(tilt.kl, color="black", linestyle="--", linewidth=1)
left.set(xscale="log", xlabel="λ", ylabel="mass right of zero")
right.set(xscale="log", xlabel="λ", ylabel="KL from the base (nats)")
right.legend()
plt.show()

# %% [markdown]
# A rule follows (ours): choose the shortfall you can live with, solve the dual once on
# base samples for $\alpha^*$, and set $\lambda = 2 \cdot \text{shortfall} /
# \alpha^*$. (`ftlib.cgm.dual.choose_kl_weight` does it for any number of constraints, with
# the $\alpha_\lambda$ that belongs to the λ; the second part tries it.) Much smaller values do not buy accuracy, since the noise of the gradient
# takes over; they buy KL. Mind the units: λ weighs nats against squares of $h$. With a
# constraint of ±K for each of K prompts, as in the stories, the violation is the *sum* of
# the squared imbalances while the KL is a *mean* over prompts, so that λ = 1 is small.
#
# ### N of reward
#
# The error of reward is the error of $\hat\alpha_N$. It needs no training to see, only
# many draws of $N$ coin flips. For one binary statistic the trained model's mass would
# be $\sigma(\hat\alpha_N)$ exactly, since $\hat\alpha_N = \operatorname{logit} 0.8 -
# \operatorname{logit} \hat p_N$.

# %% mystnb={"image": {"alt": "Left panel: mean squared error of the reward loss's mass right of zero against N on two logarithmic axes, falling along a line proportional to one over N, with trained models of five seeds near it. Right panel: probability that the sample dual has no solution against N, for base probabilities 0.5, 0.05 and 0.005; the rarer the event, the more samples are needed."}} tags=["hide-input"]
rng = np.random.default_rng(0)
sizes = np.unique(np.geomspace(5, 10_000, 24).astype(int))
errors = []
for n in sizes:
    share = rng.binomial(n, 0.5, 20_000) / n
    share = share[(share > 0) & (share < 1)]
    alpha = math.log(4) - np.log(share / (1 - share))
    errors.append(np.mean((1 / (1 + np.exp(-alpha)) - 0.8) ** 2))
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2))
left.plot(sizes, errors, color=plots.colour(0), label="many draws")
law = (0.8 * 0.2) ** 2 / 0.25 / sizes
left.plot(sizes, law, "--", color="grey", label="(0.16)² / (0.25 N)")
for n in MIXTURE.dual_samples:
    arm = mixture_records.select(arm=f"reward N={n}")
    mass = arm.values("mass")
    left.scatter(
        [n] * len(mass), (mass - 0.8) ** 2, marker="s", s=14,
        color=plots.colour(1), label="trained" if n == 10 else None,
    )
left.set(xscale="log", yscale="log", xlabel="N", ylim=(1e-8, 1))
left.set_ylabel("squared error of E[h]")
left.legend()
for i, p in enumerate([0.5, 0.05, 0.005]):
    style = plots.arm_style(i)
    right.plot(
        sizes, p**sizes + (1 - p) ** sizes, label=f"P(h = 1) = {p}",
        color=style["color"], linestyle=style["linestyle"],
    )
right.set(xscale="log", xlabel="N", ylabel="P(dual has no solution)")
right.legend()
plt.show()

# %% tags=["nbval-check-output"]
ratio = np.array(errors)[sizes >= 300] / law[sizes >= 300]
print("1/N law holds within 10 % from N = 300:",
      bool(np.abs(ratio - 1).max() < 0.1))

# %% [markdown]
# ## Paper beside ours
#
# Settings first. The paper's come from its code, which trains LoRA weights of rank 32;
# they are data here, never run. Ours train all weights.

# %% tags=["hide-input"]
fields = [
    "model", "batch_size", "steps", "learning_rate", "kl_weights",
    "dual_samples", "max_new_tokens", "evaluation_samples",
]
rows = [["setting", "paper", "ours, `cpu`", "ours, `gpu`"]]
for field in fields:
    values = [getattr(TALES[s], field) for s in ("paper", "cpu", "gpu")]
    cells = [", ".join(map(str, np.atleast_1d(value))) for value in values]
    rows.append([field.replace("_", " "), *cells])
Markdown(results.markdown_table(rows))


# %% [markdown]
# ### The verdicts

# %% tags=["hide-input"]
def predicted(kl_weight):
    return solve_dual(coin, TARGET, kl_weight=kl_weight).mean[0]


mass = {w: mean("mixture", f"relax λ={w:g}", "mass") for w in (0.1, 0.01)}
verdicts = [
    ["", "claim", "verdict", "measured here"],
    [
        "cgm‑1",
        "closest model in KL under constraints",
        "**holds**",
        f"mixture, mass right of zero: {mass[0.1]:.3f} at λ = 0.1 and "
        f"{mass[0.01]:.3f} at λ = 0.01, where theory says "
        f"{predicted(0.1):.3f} and {predicted(0.01):.3f}",
    ],
    [
        "cgm‑2",
        "relax cuts the calibration error substantially",
        "**holds, at a price in KL**",
        f"{min(cuts):.0%} to {max(cuts):.0%} of the imbalance in template "
        f"stories, {tale_cut(relax_arm):.0%} in stories15m",
    ],
    [
        "cgm‑3",
        "reward does so too",
        "**holds, within its N**",
        f"{removed('reward N=256'):.0%} at N = 256 and "
        f"{removed('reward N=4096'):.0%} at N = 4,096 in template stories, "
        f"{tale_cut(reward_arm):.0%} in stories15m",
    ],
    [
        "cgm‑4",
        "hundreds of constraints, three modalities, 9 B parameters",
        "**see the second part**",
        "here: eight constraints, language, at most 15 M parameters",
    ],
]
Markdown(results.markdown_table(verdicts))

# %% [markdown]
# ## What did not reproduce, and why
#
# * **No table of the paper could be compared**, since none was at hand. The verdicts
#   above concern the claims, not their numbers.
# * **KL overshoot.** Theory says that relax approaches the smallest KL from below as λ
#   shrinks. Trained from samples it goes far above, on the template stories and on
#   stories15m alike, while the mixture with its six parameters follows the theory
#   closely. The cause is noise: Adam turns every direction in which the gradient has
#   noise into movement, a network has many directions that $h$ does not see, and λ
#   times the KL is too weak a spring to undo it. Reward has the same noise and a spring
#   of weight one, so it overshoots less and stops short for another reason, its
#   $\hat\alpha$.
# * **The baseline on the violation** lowers the variance of the gradient far from the
#   target (exercise 2) and does not change where training ends: close to the target
#   there is little left to subtract.
# * **Balanced SFT is no straw man.** On the template stories it has the best point of
#   the frontier at the same number of samples. When $h$ has few values, throwing
#   samples away *is* sampling from the exact tilt, and supervised learning has less
#   noise than a policy gradient. Its cost is hidden in the rejection: it grows with the
#   rarity of the rarest class, and there is no such thing as a balanced subset when $h$
#   is continuous in many dimensions. That is where CGM has no rival here;
#   the [second part](cgm_beyond.ipynb) goes there.
# * **Dealt prompts.** The paper's code deals prompts out in turn and uses the plain
#   U-statistic. That shrinks the estimated violation by $(n-K)/(n-1)$ (exercise 1): little
#   at their $n = 512$ and $K = 8$, more in small batches. `ftlib` corrects it.

# %% [markdown]
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/cgm.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/cgm.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# [The reference](../book/api/cgm.md) describes all of `ftlib.cgm`.
#
# **1. Dealt prompts.** Eight prompts are dealt to 64 samples in turn, and each has its
# own constraint. By what factor is the plain U-statistic too small? Check by
# simulation, and check that `strata` cures it.

# %% tags=["hide-cell", "nbval-check-output"]
torch.manual_seed(0)
n, k = 64, 8
prompt = torch.arange(n) % k
p = torch.linspace(0.1, 0.9, k).double()
sign = 2 * torch.rand(20_000, n).lt(p[prompt]).double() - 1
h = k * sign[..., None] * torch.eye(k).double()[prompt]
truth = (2 * p - 1).square().sum()
zero = torch.zeros(k).double()
plain = torch.vmap(lambda h: objective.violation(h, zero))(h)
cured = torch.stack(
    [objective.violation(batch, zero, prompt) for batch in h[:4000]]
)
print(f"plain / true: {plain.mean() / truth:.2f}",
      f"  predicted (n-K)/(n-1): {(n - k) / (n - 1):.2f}")
print(f"with strata:  {cured.mean() / truth:.1f}")


# %% [markdown]
# **2. What is the baseline on the violation worth?** Measure the variance of the
# gradient on a frozen model, with many batches, not by final scores.

# %% tags=["hide-cell", "nbval-check-output"]
def gradients(right, baseline, n=100, batches=2000):
    """Violation gradients in one weight of a frozen mixture."""
    torch.manual_seed(0)
    frozen, found = mixture.two_bumps(right), []
    goal = torch.tensor([0.5])
    for _ in range(batches):
        x = frozen.sample(n)
        c = objective.violation_coefficients(
            mixture.right_of_zero(x), goal, baseline=baseline
        )
        loss = (c * frozen.log_prob(x)).sum()
        (gradient,) = torch.autograd.grad(loss, frozen.logits)
        found.append(gradient[0, 1])
    return torch.stack(found)


plain, based = gradients(0.3, False), gradients(0.3, True)
error = float((plain.var() / len(plain)).sqrt())
print("same mean:", bool((plain.mean() - based.mean()).abs() < 5 * error))
print(f"variance with / without: {based.var() / plain.var():.1f}")

# %% [markdown]
# **3. A rare event.** Relax learns only from positives that it draws. Let the right
# bump have a mass $p$ of 0.1, 0.01 or 0.001 and ask for 0.5, with batches of 100. How
# does the signal-to-noise ratio of one gradient depend on $p$? What does that mean for
# the number of steps?

# %% tags=["hide-cell", "nbval-check-output"]
for p in (0.1, 0.01, 0.001):
    g = gradients(p, baseline=True)
    ratio = float(g.mean().abs() / g.std())
    empty = (1 - p) ** 100
    print(f"p = {p:5}: batches without a positive {empty:4.0%}, "
          f"signal / noise over sqrt(n p): {ratio / (100 * p) ** 0.5:.0f}")


# %% [markdown]
# The signal-to-noise ratio is about $\sqrt{np}$, the root of the number of positives in a batch, so the
# samples needed to see a direction grow like $1/p$. Raising $h^*$ in steps would not
# help: it is the event that is out of reach, not the target. And since Adam divides by
# the size of the gradient, batches without any positive do not leave the model alone;
# they let it wander.
#
# **4. Reward in many dimensions.** The convex hull of $N$ samples must contain $h^*$.
# Take $d$ independent fair coins, the target 0.6 for each, and $N = 200$. How does the
# chance that the dual has a solution fall with $d$?

# %% tags=["hide-cell", "nbval-check-output"]
def feasible(d, tries=20, n=200):
    rng = np.random.default_rng(d)
    solved = 0
    for _ in range(tries):
        h = (rng.random((n, d)) < 0.5).astype(float)
        try:
            solve_dual(h, np.full(d, 0.6))
            solved += 1
        except InfeasibleTargetError:
            pass
    return solved / tries


for d in (1, 10, 30, 35, 40, 50):
    print(f"d = {d:2}: dual solved in {feasible(d):.0%} of 20 draws")

# %% [markdown]
# Relax needs no such thing: its ridge keeps the dual bounded.
#
# **5. A sampler that lies.** Set `top_k=3` in the story model's sampler and run
# `check_scores`. Which z-score does an honest model have?

# %% tags=["hide-cell", "nbval-check-output"]
torch.manual_seed(0)
honest = experiment.story_base(STORIES, seed=0)
print("honest model passes:", cgm.check_scores(honest, 1024) < 4.5)
honest.generation_config.top_k = 3
try:
    cgm.check_scores(honest, 1024)
except cgm.InconsistentModelError as problem:
    print(str(problem).split("(")[0] + "…")

# %% [markdown]
# ## Run it at scale `gpu`
#
# `make gpu` (or `ftlib run cgm --scale gpu --seeds 3`) runs the last experiment on
# SmolLM2-135M with the paper's eight trained and six held-out professions, its batch of
# 512 and its 200 steps, for three values of λ and the reward loss. Each run is recorded
# as it ends, and a stopped run goes on where it was.

# %% tags=["hide-input"]
try:
    gpu = results.load("cgm", "gpu").select(experiment="tales")
    minutes = sum(r.seconds for r in gpu) / 60
    memory = max(r.peak_memory_bytes for r in gpu) / 2**30
    text = (
        f"Recorded on {gpu[0].device}: {len(gpu)} runs, "
        f"{minutes:.0f} minutes, at most {memory:.0f} GiB.\n\n"
    )
    text += results.table(
        gpu,
        {
            "mean_abs_imbalance": "imbalance, trained",
            "held_out_imbalance": "imbalance, held out",
            "kl": "KL (nats)",
            "name_fits_pronoun": "name fits pronoun",
        },
    )
except results.NotRecordedError:
    text = (
        "No `gpu` run is recorded yet: minutes, memory and results of this "
        "scale are still to be measured."
    )
Markdown(text)

# %% [markdown]
# ## References
#
# * The paper: {cite:t}`smith2025calibrating`; its code (MIT):
#   <https://github.com/smithhenryd/cgm>.
# * The forward-KL baseline: {cite:t}`khalifa2021distributional`.
# * Maximum entropy and the die: {cite:t}`jaynes1963brandeis`.
# * TinyStories: {cite:t}`eldan2023tinystories`; the model `stories15m`:
#   <https://huggingface.co/karpathy/tinyllamas>.
