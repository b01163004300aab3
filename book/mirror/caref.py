# %% [markdown]
# # CAREF: regularise how sure a model is of every word
#
# *Nithisopa and Panboonyuen, “CAREF: Calibration-Aware Regularization for Explanation
# Faithfulness Without Rationale Supervision”* {cite:p}`nithisopa2026caref`.
#
# Some models give a reason with their answer: *contradiction because the man cannot be
# asleep while he runs*. Fine-tuning scores one number at each word, the probability of
# the word that a person wrote. It does not say what becomes of all the other words.
# CAREF does. It adds two terms that look at the whole distribution at every word, and
# trains few of the weights. The paper reports explanations closer to people's than
# those of LoRA and AdaLoRA, at a higher accuracy.
#
# Three words will be kept apart in this chapter. A model is **calibrated** if it is
# right in eight of ten cases where it says 80 %. An explanation is **plausible** if it
# reads like a person's. It is **faithful** if the model decided by what it cites. We
# will measure each by itself, in a world where the right reason, and even the right
# probability, is known.

# %% [markdown]
# ## What you will be able to do
#
# * derive what a regulariser of distributions makes a model say, before any training:
#   where its optima lie, and how many there are;
# * write CAREF's loss for logits, and put it into a training of your own, with or
#   without transformers' `Trainer`;
# * choose by name which weights are trained, and check the share that a paper states;
# * tell calibration, plausibility and faithfulness apart, and measure each;
# * read a table in which one metric contains another.
#
# You need: cross-entropy and entropy, PyTorch. It helps to have seen an encoder-decoder
# such as T5.

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
import tempfile
import textwrap
import warnings
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from peft import get_peft_model
from tokenizers import Tokenizer, models as words, pre_tokenizers
from torch import nn
from torch.nn import functional as F
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from ftlib import models, plots, published, results, runtime
from ftlib.caref import (
    benchmarks,
    evidence,
    experiment,
    faithfulness,
    tasks,
    theory,
)
from ftlib.caref.baselines import CONFIDENCE_PENALTY, CROSS_ENTROPY
from ftlib.caref.evaluation import (
    ENTROPY_STEP,
    LABEL_TOKENS,
    believe,
    decision_metrics,
    distribution_metrics,
    write,
)
from ftlib.caref.objective import (
    CAREF,
    caref_loss,
    loss_from_logits,
    token_loss_of_logits,
    trainer_loss,
)
from ftlib.caref.selection import (
    RELEASED_PATTERNS,
    adalora,
    lora,
    matching,
    select,
)
from ftlib.caref.settings import EVIDENCE, FEW_SHOT, GRID, KNOB
from ftlib.data import DataUnavailable
from ftlib.metrics import bertscore
from ftlib.ops import TokenLoss
from ftlib.outcomes import outcomes
from ftlib.results import PACKED_PREFIX

plots.use_style()
paper = published.load("caref")
V = 32_128  # logits of a T5
SCED_ONLY = TokenLoss(sced=CAREF.sced)
LOSSES = {
    "CE": CROSS_ENTROPY,
    "CE + KL": CONFIDENCE_PENALTY,
    "CE + SCED": SCED_ONLY,
    "CAREF": CAREF,
}


def line(index):
    """Colour and dashes of a curve, without its marker."""
    style = plots.arm_style(index)
    return {key: style[key] for key in ("color", "linestyle")}


# %% [markdown]
# ## The idea in one picture
#
# The model **reads** the pale words and **writes** the dark ones. At each dark word it
# has a distribution over all words it knows, say 32,128. Below are three that give the
# right word the same probability. Cross-entropy sees no difference between them. CAREF's
# two terms do.

# %% mystnb={"image": {"alt": "Above: a note of facts and a question in pale boxes, and in dark boxes the answer, contradiction because it says rob follows cat and cat is probably in lima. Below: three bar charts of a distribution over words, each with 0.5 on the right word. In the first one rival has the other half, in the second ten rivals have 0.05 each, in the third all other words share it. The cross-entropy is 0.69 for all three. The divergence from uniform falls from 9.7 over 8.5 to 4.5, SCED from 23.4 over 13.0 to 11.7."}} tags=["hide-input"]
shown = next(
    e
    for e in evidence.sample(
        6, "train", seed=8, world=evidence.World(facts=3, hedged=0.5)
    )
    if "probably" in e.target
)


def draw_words(ax, y, text, dark):
    x = 0.0
    for word in text.split():
        box = {
            "boxstyle": "round,pad=0.18",
            "facecolor": plots.colour(0) if dark else "#eeeeee",
            "edgecolor": "none",
        }
        ax.text(
            x, y, word, fontsize=6.8, family="monospace", va="center",
            color="white" if dark else "black", bbox=box,
        )
        x += 0.82 * len(word) + 1.9


def half_and(others):
    """One half on the first word, the rest shared by the next ones."""
    probs = np.zeros(V)
    probs[0], probs[1 : 1 + others] = 0.5, 0.5 / others
    return probs


fig, axes = plt.subplot_mosaic(
    "aaa;bcd", figsize=(7, 3.6), height_ratios=[1, 1.5]
)
draw_words(axes["a"], 0, shown.text, dark=False)
draw_words(axes["a"], -1, shown.target, dark=True)
axes["a"].set(xlim=(-1, 95), ylim=(-1.7, 0.6))
axes["a"].axis("off")
rivals = {"one rival": 1, "ten rivals": 10, "all other words": V - 1}
for key, (name, others) in zip("bcd", rivals.items(), strict=True):
    probs = half_and(others)
    ax = axes[key]
    ax.bar(range(14), probs[:14], color=[plots.colour(0)] + ["grey"] * 13)
    ax.set(title=name, ylim=(0, 0.6), xticks=[])
    ax.set_xlabel(
        f"cross-entropy {-math.log(0.5):.2f}\n"
        f"KL {theory.kl_to_uniform(probs):.1f}"
        f"   SCED {theory.sced(probs):.1f}"
    )
axes["b"].set_ylabel("probability")
plt.show()

# %% [markdown]
# Rob is where Cat is, and Cat is *probably* in Lima. In this world that means 70 %. So a
# calibrated model gives *entailment* 0.7 and *contradiction* 0.3, and this time the coin
# fell on the second. Keep the case in mind: at such a word there is a right
# distribution, and it is not a certain one.
#
# ## What the paper claims

# %% tags=["hide-input"]
table = paper["results"]


def theirs(model, metric, column="average"):
    return table.value(model, metric, column=column)


claims = [
    ["", "claim", "where we answer it"],
    ["caref‑1", "One loss couples calibration by entropy with sparsity at"
     " each token, without supervision of rationales",
     "the equations; train; the knob"],
    ["caref‑2", f"Average accuracy {theirs('CAREF-AQ', 'accuracy'):.2f} %",
     "paper beside ours"],
    ["caref‑3", "Explanations agree with people's:"
     f" {theirs('CAREF-AQ', 'nBERT'):.2f} nBERT",
     "plausible is not faithful; paper beside ours"],
    ["caref‑4", "Only"
     f" {paper['weights'].value('CAREF-AQ', column='percent'):g} % of the"
     " weights are trained (CAREF-AQ)", "which weights"],
    ["caref‑5", "CAREF-AQ outperforms LoRA and AdaLoRA",
     "train; paper beside ours"],
]
shares = paper["weights"]
Markdown(
    f"""
{results.markdown_table(claims)}

The paper's main table ({table.source}; means over 60 splits), first the
accuracy in percent:

{table.markdown(["accuracy"])}

and nBERT, the likeness of explanations to people's, counted as 0 where the
answer is wrong:

{table.markdown(["nBERT"])}

The names of the models say which weights are trained. Their shares, in
percent:

{shares.markdown()}
"""
)

# %% [markdown]
# All rows called CAREF are trained with the same loss. So the table compares *which
# weights* are trained, and CAREF's loss on few weights with LoRA, which we take to be
# under the ordinary loss. It cannot say what the loss does by itself. The paper has a
# figure for that, whose numbers we could not get.
#
# What we had: the abstract, the first paragraphs, the project page and the released
# code. What we did not have: the other sections and the appendices. The paper is a
# preprint under review. Where below we say *the code*, we mean the authors' repository.
#
# ## The equations
#
# ### The loss
#
# At target position $t$ let $p_v$ be the model's probability of token $v$, of $V$
# tokens, and $U = 1/V$. CAREF minimises
#
# $$
# \mathcal{L} = \underbrace{-\log p_y}_{\text{CE}}
# + \lambda_{\text{SCED}} \underbrace{\sum_v \Big|p_v \log\frac{p_v}{U}\Big|^{\alpha}
#   (1-p_v)^{\beta}}_{\text{SCED}}
# + \lambda_{\text{KL}} \underbrace{\sum_v p_v \log\frac{p_v}{U}}_{\text{KL}} ,
# $$
#
# averaged over the target tokens (the page writes a sum over $t$, the code takes the
# mean). $V$ is the width of the logits, with those that only pad the vocabulary: 32,128
# in T5, and so in what follows. SCED stands for *sparsity-calibrated entropic
# divergence*. The code's values are $\alpha = 2$, $\beta = 1$ and both weights 0.1.
#
# The KL term is an old friend: $\sum_v p_v \log(p_v V) = \log V - H(p)$. Minimising it
# is raising the entropy, the **confidence penalty** of Pereyra and others
# {cite:p}`pereyra2017regularizing`. So CE + KL is not only a part of CAREF but its
# first rival. What is new is SCED.
#
# ### Its gradient
#
# Write $f(p) = |p\log(pV)|^\alpha (1-p)^\beta$ and $a = p\log(pV)$. By the product rule
#
# $$
# f'(p) = \alpha |a|^{\alpha-1} \operatorname{sign}(a)\,(\log(pV) + 1)\,(1-p)^\beta
# - \beta |a|^\alpha (1-p)^{\beta-1},
# $$
#
# and through the softmax, for which $\partial p_v / \partial z_j = p_v(1[v=j] - p_j)$,
#
# $$
# \frac{\partial}{\partial z_j} \sum_v f(p_v)
# = p_j \Big( f'(p_j) - \sum_v p_v f'(p_v) \Big).
# $$
#
# The page lists special cases of SCED. Two of its four descriptions need a second look,
# at $(1, 0)$ and at $\beta > 0$.
#
# ### With α = 1 and β = 0 it is not the divergence
#
# The bars of the absolute value matter. A token below $U$ has a *negative* term in the
# divergence, and SCED turns its sign. With $N = \sum_{p_v < U} |p_v \log (p_v V)|$
#
# $$
# \text{SCED}_{1,0} = \mathrm{KL}(p \,\|\, U) + 2N, \qquad 0 \le N < 1/e .
# $$
#
# The bound: $n$ tokens below $U$ that share the mass $m$ have at most
# $N = m \log \frac{n}{mV}$, which is largest at $m = n/(eV)$ and is then
# $n/(eV) < 1/e$. So at $\alpha = 1$ the difference is small, and the authors' own test
# says that it is there (`tests/test_losses.py`). On random distributions:

# %% tags=["nbval-check-output"]
rng = np.random.default_rng(0)
for spread in (0.3, 1, 3):
    probs = np.exp(spread * rng.standard_normal(V))
    probs /= probs.sum()
    sced, kl = theory.sced(probs, 1, 0), theory.kl_to_uniform(probs)
    below = theory.mass_below_uniform(probs)
    np.testing.assert_allclose(sced, kl + 2 * below, rtol=1e-12)
    assert 0 < below < 1 / math.e
    print(f"logits of spread {spread:3}:  SCED {sced:.3f}"
          f" = KL {kl:.3f} + 2 × {below:.3f}")

# %% [markdown]
# ### Two zeros and a ridge
#
# At $\alpha > 1$ the power does what the bars began: a small $p$ hardly counts. And the
# factor $(1-p)^\beta$ is zero at $p = 1$. So for $\beta > 0$ SCED vanishes twice, at the
# uniform distribution **and at every certain one**. Between two zeros there is a
# maximum. Let one token have $p$ and the others share the rest equally (a *spike*).
# Setting $f'(p) = 0$ and dividing by $f(p)$ gives the place:
#
# $$
# \frac{\alpha}{p} + \frac{\alpha}{p \log(pV)} = \frac{\beta}{1-p} .
# $$

# %% mystnb={"image": {"alt": "Four curves over the probability of the top token, from 0 to 1. The divergence from uniform rises all the way to log V, about 10.4. SCED with alpha 2 and beta 1 rises to a peak of 14.8 near 0.69 and falls back to zero at 1. So do the curves for alpha 1.5, beta 0.5, whose peak is lower and further right, and for alpha 2.5, beta 2, whose peak is further left."}} tags=["hide-input"]
p = np.linspace(1 / V, 1 - 1e-9, 800)
settings = [(2.0, 1.0), (1.5, 0.5), (2.5, 2.0)]
fig, ax = plt.subplots(figsize=(6, 3.4))
for i, (alpha, beta) in enumerate(settings):
    peak = theory.spike_peak(V, alpha, beta)
    ax.plot(p, theory.spike_sced(p, V, alpha, beta), **line(i),
            label=f"SCED, α = {alpha:g}, β = {beta:g}")
    ax.plot(*peak, plots.arm_style(i)["marker"], color=plots.colour(i))
rest = np.log((1 - p) / (V - 1))
ax.plot(p, p * np.log(p * V) + (1 - p) * (rest + math.log(V)), **line(3),
        label="KL from uniform")
ax.set(xlabel="probability of the top token", ylabel="value")
ax.legend()
plt.show()

# %% tags=["nbval-check-output"]
peak = theory.spike_peak(V)
alpha, beta, p = CAREF.alpha, CAREF.beta, peak.probability
left = alpha / p + alpha / (p * math.log(p * V))
np.testing.assert_allclose(left, beta / (1 - p), rtol=1e-5)
certain, uniform = np.eye(1, V)[0], np.full(V, 1 / V)
assert abs(theory.sced(uniform)) < 1e-12
print("SCED of a uniform distribution: ", f"{theory.sced(uniform):.2f}")
print(f"SCED at its peak, p = {p:.4f}:  {peak.sced:.2f}")
for p in (0.9, 0.99, 0.999):
    print(f"SCED at p = {p:<5}:           {theory.spike_sced(p, V):6.2f}")
print("SCED of a certain distribution: ", f"{theory.sced(certain):.2f}")

# %% [markdown]
# The divergence is a slope that always points to *less sure*. SCED is a ridge. On one
# side of it the model is pushed to be less sure, on the other side **surer**. Whether
# the term calms a model or drives it on depends on where the model stands.
#
# ### Where the pressure goes
#
# The page says of $\alpha = 1$, $\beta > 0$ that it puts pressure on the tail, and the
# code says the same of $\beta > 0$ in general. The factor $(1-p)^\beta$ is indeed one
# for small $p$ and zero for large. But it multiplies something that is already gone
# there. Take natural language's favourite tail, in which the $k$-th token has a
# probability in proportion to $1/k^s$ (Zipf), and ask which token SCED's sum consists
# of.

# %% mystnb={"image": {"alt": "Left: the term of one token against its probability, both on logarithmic axes. It is zero at one in 32,128, stays below a billionth to the left of that, rises to the right through a millionth at ten times that probability, and peaks near 0.69. Right: share of SCED in the first k tokens against k. With a Zipf tail of exponent 1 the curves begin at 0.987 and above, with exponent 1.5 and top probability 0.5 at 0.82; all reach one within ten tokens."}} tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2))
grid = np.logspace(-6, -1e-4, 2000)
left.loglog(grid, theory.sced_terms(np.log(grid), V), **line(0))
left.axvline(1 / V, color="grey", linewidth=1)
left.text(1.3 / V, 30, "U = 1/V", fontsize=8)
left.set(xlabel="probability of a token", ylabel="its term in SCED",
         ylim=(1e-12, 100))
k = np.arange(1, 101)
tails = [(s, top) for s in (1.0, 1.5) for top in (0.9, 0.5)]
for i, (s, top) in enumerate(tails):
    found = theory.sced_shares(theory.zipf(top, V, s)).cumsum()
    right.semilogx(k, found[:100], **line(i),
                   label=f"top {top}, exponent {s:g}")
right.set(xlabel="first k tokens", ylabel="their share of SCED",
          ylim=(0.75, 1.01))
right.legend(loc="lower right")
plt.show()

# %% tags=["nbval-check-output"]
for s, top in tails:
    probs = theory.zipf(top, V, s)
    found, below = theory.sced_shares(probs), probs < 1 / V
    assert found[below].sum() < 2e-7
    print(f"Zipf tail of exponent {s:g}, top token {top}: the top token has"
          f" {found[0]:.1%} of SCED")
    print(f"    {below.mean():.0%} of the tokens lie below U and have less"
          " than 0.00002 % of it")

# %% [markdown]
# SCED is, to a good approximation, a function of the few most likely tokens. For the
# special case that the page describes it is the same:

# %% tags=["nbval-check-output"]
probs = theory.zipf(0.5, V)
below = probs < 1 / V
for alpha, beta in [(1, 0), (1, 1), (2, 0), (2, 1)]:
    found = theory.sced_shares(probs, alpha, beta)
    print(f"α = {alpha}, β = {beta}: top token {found[0]:6.1%},"
          f"  next ten {found[1:11].sum():6.1%},"
          f"  below U {found[below].sum():6.1%}")

# %% [markdown]
# With $\alpha = 1$ the tail below $U$ does carry a share, and $\beta$ raises it a little.
# With $\alpha = 2$, the value that is used, nothing is left there to raise.
#
# ### A word that is certain
#
# What does a model that is trained to the end say? At one position, with one right
# token and the rest shared equally, the loss is a function of $p$ alone. CE by itself
# wants $p \to 1$. Here are all four losses, and to the right the push that each gives
# to the log-odds of the right token, $-\partial\mathcal{L}/\partial\log\frac{p}{1-p}$.
# Above zero it makes the model surer.

# %% mystnb={"image": {"alt": "Two panels over the probability of the right token, from 0.01 to 0.9999 on a logit axis. Left, the loss: CE falls throughout; CE plus KL has a flat minimum at 0.83; CE plus SCED and CAREF fall to a minimum near 0.3, rise to a barrier above 0.6 and fall again towards 1. Right, the push on the log-odds: CE's is always above zero; that of CE plus KL crosses zero once; those of CE plus SCED and CAREF are below zero from about 0.3 to 0.65 and above it afterwards."}} tags=["hide-input"]
z = np.linspace(math.log(0.01 / 0.99), math.log(9999), 1500)
p = 1 / (1 + np.exp(-z))
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.4))
for i, (name, loss) in enumerate(LOSSES.items()):
    value = theory.spike_loss(z, V, loss)
    left.plot(p, value, **line(i), label=name)
    right.plot(p, -np.gradient(value, z), **line(i))
    for point in theory.spike_stationary_points(V, loss):
        if point.probability < p[-1]:
            face = plots.colour(i) if point.is_minimum else "white"
            left.plot(point.probability, point.loss, "o", markersize=6,
                      color=plots.colour(i), markerfacecolor=face)
right.axhline(0, color="grey", linewidth=1)
for ax in (left, right):
    ax.set_xscale("logit")
    ax.set_xticks([0.01, 0.1, 0.5, 0.9, 0.99, 0.999],
                  ["0.01", "0.1", "0.5", "0.9", "0.99", "0.999"])
    ax.set_xticks([], minor=True)
    ax.set_xlabel("probability of the right token")
left.set(ylabel="loss", ylim=(0, 5))
right.set(ylabel="push towards certainty", ylim=(-1.2, 1.2))
fig.legend(loc="outside lower center", ncols=4)
plt.show()


# %% [markdown]
# Filled points are minima, open ones barriers. Where they lie:

# %% tags=["nbval-check-output"]
def places(loss, vocabulary=V):
    """The minima and barriers of a word that is certain, as text."""
    points = theory.spike_stationary_points(vocabulary, loss)
    found = [
        f"{'minimum' if point.is_minimum else 'barrier'}"
        f" {point.probability:.3f}"
        if point.log_odds < 20
        else f"minimum 1 − e^−{point.log_odds:.0f}"
        for point in points
    ]
    if not points or not points[-1].is_minimum:
        found.append("falls to p = 1")
    return ", ".join(found)


for name, loss in LOSSES.items():
    print(f"{name:10} {places(loss)}")
diffuse, barrier, sure = theory.spike_stationary_points(V, CAREF)
assert sure.loss < diffuse.loss < barrier.loss

# %% [markdown]
# CE + KL smooths, as the confidence penalty should. With SCED there are **two** minima.
# Left of the barrier a model is led to give the right word a quarter of the
# probability, right of it to certainty, as CE alone would. The global minimum is the
# certain one. Which one a training finds depends on where it begins.
#
# ### A word that is not
#
# Now let the first of two tokens be right with probability $q$ and the second
# otherwise: the *label* of our picture. The expected CE has its minimum at $p_1 = q$,
# which is calibration. `theory.pair_optima` seeks all minima of the others.

# %% tags=["nbval-check-output"]
for q in (0.6, 0.7, 0.8, 0.9):
    for name, loss in LOSSES.items():
        found = theory.pair_optima(q, V, loss)
        print(f"q = {q}  {name:10}",
              "  ".join(f"({o.first:.3f}, {o.second:.3f})" for o in found))
        if name == "CE":
            assert abs(found[0].first - q) < 1e-5
        if loss.sced:
            assert len(found) == 3
            assert max(o.first for o in found) > q + 0.09

# %% [markdown]
# Each pair is $(p_1, p_2)$, the lowest minimum first. CE + KL takes a seventh of the
# probability away from both and moves the first little otherwise. With SCED there are
# three minima: **sure** of the likelier token, far beyond $q$; **diffuse**, with two
# thirds of the probability on words that are never right; and **sure of the wrong
# one**.

# %% mystnb={"image": {"alt": "Predicted probability of the first token against q, the probability that it is right, from 0.5 to 0.95. Left, the lowest minimum of each loss: CE on the diagonal, CE plus KL below it, CE plus SCED between 0.95 and 1, and CAREF near 0.2 up to q of about 0.72 and above 0.97 beyond. Right, the three minima of CAREF: sure, between 0.95 and 1; diffuse, from 0.17 to 0.25; sure of the wrong one, from 0.05 to 0.15."}} tags=["hide-input"]
qs = np.linspace(0.51, 0.96, 16)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6), sharey=True)
for ax in (left, right):
    ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    ax.set_xlabel("q: how often the first token is right")
for i, (name, loss) in enumerate(LOSSES.items()):
    lowest = [theory.pair_optima(q, V, loss)[0].first for q in qs]
    style = plots.arm_style(i) | {"linestyle": "none", "markersize": 5}
    left.plot(qs, lowest, **style, label=name)


def kind(optimum):
    if optimum.rest > 0.5:
        return "diffuse"
    return "sure" if optimum.first > 0.5 else "sure of the wrong one"


for i, name in enumerate(("sure", "diffuse", "sure of the wrong one")):
    every = [(q, theory.pair_optima(q, V, CAREF)) for q in qs]
    points = np.array([
        (q, o.first) for q, found in every for o in found
        if kind(o) == name
    ])
    style = plots.arm_style(4 + i) | {"linestyle": "none", "markersize": 5}
    right.plot(*points.T, **style, label=name)
left.set(ylabel="predicted probability", title="lowest minimum",
         ylim=(-0.02, 1.02))
right.set(title="all minima of CAREF")
left.legend(loc="lower right", bbox_to_anchor=(1, 0.1))
right.legend(loc="center right", bbox_to_anchor=(1, 0.45))
plt.show()


# %% [markdown]
# Which of CAREF's minima is the lowest changes with $q$: up to about $q = 0.72$ it is
# the diffuse one, beyond it the sure one. Neither lies on the diagonal. A theory of optima
# does not say which one is reached. Fine-tuning usually begins at a model that has
# been trained with CE, so begin there: logits for all 32,128 tokens, at the
# calibrated values, and plain gradient descent on the expected CAREF loss.

# %% tags=["nbval-check-output"]
def descend(logits, weights, loss=CAREF, steps=60, rate=2.0):
    """Descend on Σ weight · loss with target 0, 1, … of each row."""
    for _ in range(steps):
        logits = logits.detach().requires_grad_()
        total = sum(
            (share * token_loss_of_logits(
                loss, logits, torch.full((len(logits),), target)
            )).sum()
            for target, share in enumerate(weights)
        )
        (gradient,) = torch.autograd.grad(total, logits)
        logits = logits - rate * gradient
    return logits.detach().softmax(-1)


def start(*tokens, vocabulary=V):
    """Logits with these probabilities, the rest shared equally."""
    rest = (1 - sum(tokens)) / (vocabulary - len(tokens))
    logits = torch.full((vocabulary,), math.log(rest), dtype=torch.float64)
    logits[: len(tokens)] = torch.tensor(tokens).log()
    return logits


q = torch.tensor([0.6, 0.9], dtype=torch.float64)
calibrated = [start(0.99 * one, 0.99 * (1 - one)) for one in (0.6, 0.9)]
reached = descend(torch.stack(calibrated), (q, 1 - q))
for share, pair in zip(q, reached, strict=True):
    print(f"q = {share:.1f}: from ({share:.2f}, {1 - share:.2f})"
          f" to ({pair[0]:.2f}, {pair[1]:.2f})")
    optima = theory.pair_optima(float(share), V, CAREF)
    sure = next(o for o in optima if kind(o) == "sure")
    assert abs(pair[0] - sure.first) < 0.01

certain = [0.05, 0.3, 0.64, 0.7, 0.9]
ends = descend(torch.stack([start(p) for p in certain]), (1.0,))
for p, end in zip(certain, ends[:, 0], strict=True):
    side = diffuse.probability if p < barrier.probability else 1.0
    assert abs(end - side) < 0.01
    print(f"certain word: from {p:.2f} to {end:.2f}")


# %% [markdown]
# A token that was right 60 % of the time, and that the model gave 60 %, ends near 96 %.
# On an ambiguous word SCED does not calibrate, **it undoes calibration**. And a certain
# word goes to whichever side of the barrier it started from.
#
# All of this is ours, not the paper's, and it is about one position on its own. A
# network shares its weights between positions, it is trained for few steps, and a small
# learning rate may keep it far from any optimum. So take it as a prediction, and as
# such we wrote it down before any training: *CAREF's expected calibration error is
# larger than that of CE where words are ambiguous, unless the KL term wins.*
#
# ## Build it in forty lines
#
# The loss of a batch of logits, straight from the definition. Only one thing is done
# with care: everything is computed from $\log p$, since $1 - p$ and $\log p$ lose their
# digits when $p$ comes near one or zero.

# %%
def caref_by_hand(logits, labels, sced=0.1, kl=0.1, alpha=2.0, beta=1.0):
    """Mean of CE + λ SCED + λ KL over the targets that are not −100."""
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    p = log_p.exp()
    cross_entropy = -log_p.gather(1, labels[kept][:, None])[:, 0]
    distance = p * (log_p + math.log(logits.shape[-1]))
    complement = -torch.expm1(log_p)
    sparse = (distance.abs() ** alpha * complement**beta).sum(-1)
    return (cross_entropy + sced * sparse + kl * distance.sum(-1)).mean()


def gradient_by_hand(logits, labels, sced, kl, alpha, beta):
    """The same loss's gradient, from the equations."""
    kept = labels != -100
    log_p = logits[kept].log_softmax(-1)
    p, vocabulary = log_p.exp(), logits.shape[-1]
    stretch = log_p + math.log(vocabulary)
    a = p * stretch
    growth = alpha * a.abs() ** (alpha - 1) * a.sign() * (stretch + 1)
    slope = growth * (1 - p) ** beta
    slope -= beta * a.abs() ** alpha * (1 - p) ** (beta - 1)
    slope = sced * slope + kl * (stretch + 1)  # of SCED and KL, by p
    out = torch.zeros_like(logits)
    one_hot = F.one_hot(labels[kept], vocabulary)
    slope -= (p * slope).sum(-1, keepdim=True)
    out[kept] = p - one_hot + p * slope
    return out / kept.sum()


# %% [markdown]
# Three checks in float64. Against differences of the loss itself, one logit at a time.
# Against the formula above. And against `ftlib`, whose version works through chunks of
# positions, so that a vocabulary of 32,128 does not fill the memory.

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
logits = 2 * torch.randn(2, 3, 11, dtype=torch.float64)
labels = torch.tensor([[4, 0, -100], [7, -100, -100]])


def differences(loss, logits, h=1e-5):
    """Central differences of a loss, one logit at a time."""
    found = torch.zeros_like(logits)
    for at in np.ndindex(*logits.shape):
        moved = torch.zeros_like(logits)
        moved[at] = h
        found[at] = (loss(logits + moved) - loss(logits - moved)) / (2 * h)
    return found


for alpha, beta in [(1, 0), (2, 1), (1.5, 0.5), (2.5, 2)]:
    terms = {"sced": 0.1, "kl": 0.1, "alpha": alpha, "beta": beta}
    numeric = differences(
        partial(caref_by_hand, labels=labels, **terms), logits
    )
    formula = gradient_by_hand(logits, labels, **terms)
    torch.testing.assert_close(formula, numeric, rtol=1e-6, atol=1e-9)
    z = logits.clone().requires_grad_()
    ours = loss_from_logits(
        z, labels, TokenLoss(1.0, sced=0.1, kl_to_uniform=0.1,
                             alpha=alpha, beta=beta)
    )
    by_hand = caref_by_hand(logits, labels, **terms)
    torch.testing.assert_close(ours, by_hand, rtol=1e-12, atol=0)
    (found,) = torch.autograd.grad(ours, z)
    torch.testing.assert_close(found, formula, rtol=1e-10, atol=1e-12)
    assert found[labels == -100].abs().max() == 0
    print(f"α = {alpha}, β = {beta}: differences, formula and ftlib agree")

# %% [markdown]
# From here on we use `ftlib`'s.
#
# ## Use ftlib's
#
# ### A model of transformers
#
# `caref_loss` takes a model and what its collator makes. It never stores the logits: it
# stops the model before its last matrix and goes on through
# [the vocabulary head](vocabulary_head.ipynb). An encoder-decoder and a decoder-only model
# will do, with PEFT or without. A tiny T5 and the notes of our picture:

# %% tags=["hide-input"]
vocabulary = evidence.Vocabulary()
WIDTH = 128  # of the logits: some rows pad the vocabulary, as in T5


def tiny_t5():
    """Two layers each; its weights are drawn from torch's generator."""
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=WIDTH, d_model=64, d_kv=16, d_ff=128, num_layers=2,
            num_heads=4, feed_forward_proj="gated-gelu", dropout_rate=0.0,
            decoder_start_token_id=vocabulary.pad,
            pad_token_id=vocabulary.pad, eos_token_id=vocabulary.end,
        )
    )


def word_tokenizer():
    """The world's words as a tokenizer of transformers."""
    ids = {word: i for i, word in enumerate(vocabulary.words)}
    made = Tokenizer(words.WordLevel(ids, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>"
    )


tokenizer = word_tokenizer()

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
model = tiny_t5()
world = evidence.World(facts=3, hedged=0.5)
examples = evidence.sample(64, "train", seed=0, world=world)
features = [
    {
        "input_ids": vocabulary.encode(e.text),
        "labels": vocabulary.encode(e.target),
    }
    for e in examples
]
collate = DataCollatorForSeq2Seq(tokenizer, model=model)
batch = collate(features[:4])

out = caref_loss(model, **batch, loss=CAREF, mean="token")
logits = model(**batch).logits
torch.testing.assert_close(
    out.loss, caref_by_hand(logits, batch["labels"]), rtol=1e-5, atol=0
)
print("logits would be", tuple(logits.shape), "for", int(out.tokens),
      "target tokens")
for name, value in out._asdict().items():
    print(f"{name:15} {value:.2f}")

# %% [markdown]
# Beside the loss come the numbers to watch while it trains: the probability of the
# target, the entropy, and $\sum p^2$, all averaged as the loss is.
#
# ### Your own `Trainer`, in five lines
#
# With `Trainer` of transformers the loss is one argument. A collator that knows the
# model makes the decoder's inputs. All else is yours.

# %% tags=["hide-input"]
folder = tempfile.TemporaryDirectory()
quiet = {
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
    "logging_strategy": "no", "dataloader_pin_memory": False, "seed": 0,
}
arguments = Seq2SeqTrainingArguments(
    folder.name, max_steps=30, per_device_train_batch_size=8,
    learning_rate=5e-3, lr_scheduler_type="constant", **quiet,
)


def loss_on(model, features):
    """CAREF's loss on all features, without training."""
    batch = collate(features).to(model.device)
    with torch.no_grad():
        return float(caref_loss(model, **batch, mean="token").loss)


# %% tags=["nbval-check-output"]
torch.manual_seed(0)
model = tiny_t5()
before = loss_on(model, features)
trainer = Seq2SeqTrainer(
    model, arguments, train_dataset=features,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    compute_loss_func=trainer_loss(model, CAREF),
)
trainer.pop_callback(trainer.callback_handler.callbacks[-1])  # prints times
trainer.train()
after = loss_on(model, features)
assert after < before / 2
print(f"{trainer.state.global_step} steps; the loss has more than halved")

# %% [markdown]
# `trainer_loss` divides by the number of target tokens of *all* batches that make an
# update. So gradients accumulated over two batches are those of one batch of twice the
# size, which the mean of two means would not be.
#
# ### What can go wrong with a batch
#
# Each of these has a stated outcome.

# %% tags=["nbval-check-output"]
torch.manual_seed(0)
logits = torch.randn(2, 5, 512)
labels = torch.randint(0, 512, (2, 5))
labels[1, 3:] = -100
plain = loss_from_logits(logits, labels)


def same(a, b, rtol=1e-6):
    return "the same loss" if torch.isclose(a, b, rtol=rtol) else "differs"


def padded(extra):
    """The loss with more padding on the right."""
    return loss_from_logits(
        F.pad(logits, (0, 0, 0, extra), value=9.0),
        F.pad(labels, (0, extra), value=-100),
    )


def in_half(function):
    """What becomes of the loss, and its gradient, of logits in float16."""
    z = logits.half().requires_grad_()
    value = function(z)
    (gradient,) = torch.autograd.grad(value, z)
    if not value.isfinite() or not gradient.isfinite().all():
        return "not a number"
    return same(value.float(), plain, rtol=1e-2)


def released_formula(z):
    """log(p + 1e-9) in the dtype of the logits."""
    p = z[labels != -100].softmax(-1)
    a = p * ((p + 1e-9).log() + math.log(512))
    sced = (a.abs() ** 2 * (1 - p)).sum(-1)
    hard = F.cross_entropy(z[labels != -100], labels[labels != -100])
    return hard + 0.1 * sced.mean() + 0.1 * a.sum(-1).mean()


print("padded by 7 more:           ", same(padded(7), plain))
for fill in (math.inf, math.nan):
    broken = logits.clone()
    broken[1, 4] = fill
    print(f"{fill} at a masked position:".ljust(28),
          same(loss_from_logits(broken, labels), plain))
z = logits.clone().requires_grad_()
nothing = loss_from_logits(z, torch.full_like(labels, -100))
(gradient,) = torch.autograd.grad(nothing, z)
print("all positions masked:        loss", f"{nothing:.1f},",
      "gradient", f"{gradient.abs().max():.1f}")
torch.testing.assert_close(released_formula(logits), plain)
logits[0, 0, :8] -= 30  # a few tokens without probability
plain = loss_from_logits(logits, labels)
print("float16, ftlib:             ", in_half(
    lambda z: loss_from_logits(z, labels)))
print("float16, log(p + 1e-9):     ", in_half(released_formula))
too_large = (1e6 * logits).half()  # float16 ends at 65,504
print("float16, overflown logits:  ",
      "not a number" if loss_from_logits(too_large, labels).isnan()
      else "a number")
try:
    loss_from_logits(logits, labels[:, 1:])
except ValueError as problem:
    print(textwrap.fill(f"labels too short: {problem}", 74))

# %% [markdown]
# In float16 the number $10^{-9}$ is zero, so $\log(p + 10^{-9})$ is minus infinity where
# $p$ is. The released loss has that form. Under automatic mixed precision on a GPU its
# softmax is computed in float32 and the case does not arise; it does where a model and
# its logits are float16 throughout. `ftlib` computes in float32 whatever the logits are.
# Logits that have overflown before it sees them stay lost, which in T5 happens inside
# the model: train it in bfloat16 or float32.
#
# ### Which weights
#
# `select` takes a variant's name, sets what is trained, and says how much that is. The
# model below is Flan-T5-large's shape on PyTorch's *meta* device, with sizes but
# without numbers, so nothing is downloaded.

# %% tags=["hide-input"]
# A name that peft asks for and that transformers will rename.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")


def flan_t5_large(layers=24):
    """The shape of google/flan-t5-large, without its weights."""
    config = T5Config(
        vocab_size=V, d_model=1024, d_kv=64, d_ff=2816, num_layers=layers,
        num_heads=16, feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        made = T5ForConditionalGeneration(config)
        made.lm_head = nn.Linear(1024, V, bias=False)  # its own, not tied
    return made


# %% tags=["nbval-check-output"]
large = flan_t5_large()
shares = paper["weights"]
print(f"{'variant':11}{'weights':>12}{'share':>9}{'paper':>8}"
      "   the released pattern selects")
for variant in ("BASE", "DEC", "AQKV", "LAQ", "AQ"):
    found = select(large, variant)
    other = select(large, variant, attentions="self")
    assert other.parameters == found.parameters  # which attentions? below
    stated = shares.value(f"CAREF-{variant}", column="percent")
    assert round(100 * found.share, 2) == stated
    pattern = RELEASED_PATTERNS.get(variant)
    released = matching(large, [pattern]).share if pattern else None
    print(f"{variant:11}{found.parameters:12,}{found.share:9.2%}{stated:8g}"
          + (f"   {pattern:10} {released:7.2%}" if pattern else ""))
adapters = {
    "LoRA r=4": lora(4), "LoRA r=128": lora(128),
    "AdaLoRA": adalora(steps=300),
}
for name, config in adapters.items():
    adapted = get_peft_model(flan_t5_large(layers=1), config)
    each, _ = adapted.get_nb_trainable_parameters()
    trained = 24 * each  # the layers are alike
    share = trained / (found.total + trained)
    stated = shares.value(name, column="percent")
    assert round(100 * share, 2) == stated
    print(f"{name:11}{trained:12,}{share:9.2%}{stated:8g}")

# %% [markdown]
# Every published share comes out to the second digit, from the shape alone: AQ is the
# query matrices of 48 attentions, LAQ those and every layer norm, and the adapters sit
# on every linear layer of the blocks, AdaLoRA's at rank 32. That settles claim caref‑4.
#
# One thing it does not settle. Flan-T5-large has 72 attentions, and 48 of them may be
# those of the decoder, to itself and to the encoder (the author's page and the released
# pattern for AQ), or the self-attentions of encoder and decoder. Both have the same
# share. `select` takes the decoder's unless told `attentions="self"`.
#
# The last column is what the code's patterns find among the parameters' names. Two of
# the three select something else than the share says: `q|k|v` finds the *k* of
# *block*, and `q` the queries of all 72. A pattern that is searched in names deserves a
# count:

# %% tags=["nbval-check-output"]
small = tiny_t5()
print("\n".join(select(small, "AQ").names))
for wrong in (
    lambda: select(small, "aqv"),
    lambda: matching(small, ["SelfAttn.q"]),
):
    try:
        wrong()
    except ValueError as problem:
        print()
        print(textwrap.fill(str(problem), 74))

# %% [markdown]
# ### What the model reads and writes
#
# The paper follows the benchmark FEB {cite:p}`marasovic2022fewshot`: 48 examples to train
# on, and an output that is the label, the word *because*, and an explanation. An
# output is taken apart at that word, and the label is right if it is the gold one, case
# aside:

# %% tags=["nbval-check-output"]
item = tasks.Item(
    prompt="explain nli hypothesis: A man sleeps. premise: A man runs.",
    label="contradiction",
    explanations=("a man who runs does not sleep.",),
)
print("reads: ", item.prompt)
print("writes:", item.target)
for text in (item.target, "contradiction", "It is a contradiction because"
             " he runs because he must."):
    print(tasks.read(text))

# %% [markdown]
# The explanation is part of the target. So *without rationale supervision* means
# without marked words and without a loss of their own; the explanations of people are
# learned from, word by word. And *label*: the released `caref/data.py` builds other
# examples. There the prompt contains the gold answer and the target is the explanation
# alone, so that no label is asked for. The accuracies in the table need FEB's format,
# which is what we use.
#
# **nBERT** is FEB's score: BERTScore {cite:p}`zhang2020bertscore` with the best of the gold
# explanations, and 0 if the label is wrong. Published numbers use RoBERTa-large. Ours
# name their encoder, here a small one.

# %%
if models.available(bertscore.STAND_IN[0], fetch=True):
    encoder = bertscore.load_encoder()
    gold = "a man who runs does not sleep."
    answers = {
        "contradiction because someone running is awake.": "right",
        "neutral because someone running is awake.": "label wrong",
        "contradiction because the boat is blue.": "about nothing",
    }
    for text, case in answers.items():
        label, told = tasks.read(text)
        score = bertscore.nbert(
            [label], ["contradiction"], [told], [[gold]], encoder
        )
        print(f"{case:14} nBERT {score.gated.mean:5.1f},"
              f" not gated {score.ungated.mean:5.1f}")
    print("encoder:", encoder)
else:
    print(bertscore.STAND_IN[0], "is not here: `ftlib models` says more")

# %% [markdown]
# And a look at real text. SmolLM2-135M learns for eight steps from ComVE, whose items ask
# which of two sentences makes no sense. It shows what goes in and comes out, and
# measures nothing; the measurement on real text is at scale `gpu`, below.

# %%
try:
    for name, text in benchmarks.taste()._asdict().items():
        print(textwrap.fill(f"{name}: {text}", 74), end="\n\n")
except (models.ModelUnavailable, DataUnavailable) as missing:
    print(textwrap.fill(str(missing).splitlines()[0], 74))


# %% [markdown]
# ### Plausible is not faithful
#
# nBERT compares with what people wrote. To ask whether a model *decided* by what it
# cites one has to change something and ask again. `ftlib.caref.faithfulness` does so in
# three ways: edit what is cited and what is not; insert a *not* and see whether the
# explanation mentions it; and let a simple simulator guess the label with and without
# the explanation.
#
# To see that they measure something, take three models that are written by hand, in a
# world whose **mark**, the first word of a note, always agrees with the label. *Honest*
# decides by the facts and cites them. *Rationaliser* decides by the mark and then
# cites the facts that speak about the question. *Confabulator* decides by the facts
# and cites one that has nothing to do with it.

# %% tags=["hide-input"]
def parse(text):
    """The example behind an input; its label is not known."""
    mark, rest = text.split(" : ")
    *facts, question = rest.removesuffix(" ?").split(" . ")
    subject, place = question.split(" is in ")
    return evidence.Example(
        mark, tuple(map(fact_of, facts)), subject, place, "", "we read"
    )


def fact_of(text):
    subject, *relation, where = text.split()
    return evidence.Fact(subject, " ".join(relation), where)


def by_facts(example):
    return evidence.LABELS[int(evidence.posterior(example).argmax())]


def by_mark(example):
    return evidence.LABELS[evidence.MARKS.index(example.mark)]


def evidence_of(example):
    return example.explanations[0]


def beside_the_point(example):
    other = next(
        fact for at, fact in enumerate(example.facts)
        if at not in example.evidence
    )
    return f"we read {other.text}"


# %% tags=["nbval-check-output"]
def written_by_hand(decide, cite):
    """A model: inputs in, labels and explanations out."""
    def predict(texts):
        notes = [parse(text) for text in texts]
        return [decide(n) for n in notes], [cite(n) for n in notes]

    return predict


marked = evidence.World(hedged=0.0, shortcut=1.0)
asked = evidence.sample(300, "test", seed=0, world=marked)
by_hand = {
    "honest": written_by_hand(by_facts, evidence_of),
    "rationaliser": written_by_hand(by_mark, evidence_of),
    "confabulator": written_by_hand(by_facts, beside_the_point),
}
edits = evidence.edits(asked, seed=0)
inserted = evidence.insertions(asked)
print(f"{'':14}{'label':>8}{'reason':>8}   flips if edited"
      f"{'label changed by':>20}")
print(f"{'':14}{'right':>8}{'right':>8}{'cited':>9}{'other':>9}"
      f"{'an unmentioned not':>20}")
rates = {}
for name, predict in by_hand.items():
    labels, told = predict([e.text for e in asked])
    judged = [
        (y == e.label, t in e.explanations)
        for y, t, e in zip(labels, told, asked, strict=True)
    ]
    right, like = np.mean(judged, axis=0)
    flips = faithfulness.flip_rates(predict, edits)
    effect = faithfulness.insertion_effect(predict, inserted)
    rates[name] = flips
    print(f"{name:14}{right:8.0%}{like:8.0%}{flips.cited.value:9.0%}"
          f"{flips.other.value:9.0%}{effect.unfaithful.value:20.0%}")
assert rates["honest"].cited.value == 1
assert rates["rationaliser"].cited.value == 0

# %% [markdown]
# The first two write the same labels and the same explanations. Any comparison with
# people's explanations, nBERT included, gives them the same score, and the
# rationaliser's are false about itself. The edits tell them apart: its label stays when
# what it cites is edited, and follows the mark, which is half of the other edits. The
# confabulator has the right labels for the right reasons and gives wrong ones: its label
# follows edits of what it does not cite, and a *not* that changes it goes unmentioned.
# Such edits are the measurement that we add to the paper's.
#
# ## Train it against fair baselines
#
# ### A world in which the reason is known
#
# A note has a few facts, a question, and in front a mark. Who follows someone is where
# that one is. What is said of a person decides the label:
#
# | what is said | in Rome? | in Oslo? |
# | --- | --- | --- |
# | is in Rome | entailment | contradiction |
# | is not in Rome | contradiction | neutral |
# | is *likely* in Rome | one of both | one of both |
# | nothing | neutral | neutral |
#
# The explanation cites the facts that decide: one, two, or that nothing is said. Three
# things in this world can be uncertain, each with a known probability. *Maybe*,
# *probably*, *likely* and *surely* make the **label** a coin of 60, 70, 80 and 90 %. An
# explanation begins in one of three **wordings**, *we read* half of the time, *it says*
# and *facts say* less often. And the **mark** may agree with the label more often than
# chance, a shortcut that no explanation names.
#
# So for every question the calibrated answer is known exactly, at two words of the
# output. At the words that name the evidence there is nothing to be unsure of.

# %% tags=["nbval-check-output"]
print(textwrap.fill(shown.text, 74))
print("writes: ", textwrap.fill(shown.target, 64))
chances = evidence.posterior(shown).round(2).tolist()
print("labels: ", dict(zip(evidence.LABELS, chances, strict=True)))
print("wording:", dict(evidence.WORDINGS),
      f"entropy {evidence.WORDING_ENTROPY:.3f} nats")
counts = {
    split: sum(
        evidence.split_of(f"{name} is in {place}") == split
        for name in evidence.NAMES for place in evidence.PLACES
    )
    for split in ("pretrain", "train", "validation", "test")
}
print("questions:", counts)

# %% [markdown]
# Every question belongs to one split for good, by a hash of its text. An edited note asks
# the same question and so stays in its split.
#
# ### One base, and what differs

# %% tags=["hide-input"]
base, world = EVIDENCE.base, EVIDENCE.world
Markdown(
    f"""
The **base** is a T5 of {base.layers} layers and width {base.width},
pre-trained by cross-entropy on {base.examples:,} notes of
{base.world.facts} facts, whose marks say nothing. Its logits are
{base.logits:,} wide, far more than there are words ({len(vocabulary)}),
since CAREF's terms grow with log V. T5's {V:,} would cost sixteen times as
much here.

Every arm **fine-tunes** that base on the same {EVIDENCE.examples:,}
notes of a harder world, for {EVIDENCE.steps} steps of
{EVIDENCE.batch_size}: notes have {world.facts} facts,
{world.hedged:.0%} of the questions are hedged, and
{world.shortcut:.0%} of the marks are those of the label, the rest are
drawn at random. Validation and test are of that world too.
"""
)

# %% tags=["hide-input"]
records = results.load("caref", "cpu")
table_of = {
    name: records.select(experiment=name)
    for name in ("evidence", "few-shot", "short base", "knob")
}
many = table_of["evidence"]
GRID_ARMS = {
    "CE": "CE",
    "KL": "CE + KL",
    "SCED": "CE + SCED",
    "CAREF": "CAREF",
    "AQ CE": "AQ: CE",
    "AQ KL": "AQ: CE + KL",
    "AQ SCED": "AQ: CE + SCED",
    "AQ CAREF": "AQ: CAREF",
}
OTHER_ARMS = {
    "temperature": "CE, temperature after",
    "label smoothing": "label smoothing",
    "focal": "focal loss",
    "entmax": "1.5-entmax",
    "sparsemax": "sparsemax",
    "LoRA r=4": "LoRA r=4: CE",
    "LoRA r=16": "LoRA r=16: CE",
    "AdaLoRA": "AdaLoRA: CE",
    "base": "base, not tuned",
}
ARMS = GRID_ARMS | OTHER_ARMS
whole = many.select(arm="CE").values("trained")[0]
listed = [["arm", "weights trained", "of all",
           f"rate, {EVIDENCE.examples:,} examples",
           f"rate, {FEW_SHOT.examples} examples"]]
for arm, label in ARMS.items():
    trained = many.select(arm=arm).values("trained")[0]
    rates = [
        table_of[name].select(arm=arm)[0].settings["learning_rate"]
        for name in ("evidence", "few-shot")
    ]
    listed.append([
        label, f"{trained:,.0f}", f"{trained / whole:.1%}",
        *(f"{rate:g}" if rate else "–" for rate in rates),
    ])
Markdown(results.markdown_table(listed))

# %% [markdown]
# The first eight are the **grid**: SCED or not, KL or not, all weights or the decoder's
# attention queries (AQ). CE + KL is the confidence penalty. The rest are what one would
# try otherwise: other losses on all weights, among them two that replace the softmax by
# a map with exact zeros; a temperature fitted to the labels of validation; and
# adapters. In a model this small ranks 4 and 16 have the shares of the weights that
# AdaLoRA and LoRA of rank 128 have in the paper's.
#
# All take the same number of steps. Every arm has its own learning rate, with many
# examples and with few, and AdaLoRA its ranks and schedule too: the best of those
# tried, by the accuracy on plain questions of validation, with other seeds than those
# reported. The calibration was not tuned, in any arm.

# %% [markdown]
# **What we expected**, written down before any run:
#
# * SCED raises the confidence on hedged questions far above the exact posterior, and
#   with it the calibration error. A label of 60 % is believed at 90 % or more. This is
#   the prediction of the theory above.
# * KL lowers the confidence, and misses calibration on the other side. With both terms
#   SCED prevails.
# * At the wording, SCED leaves less than half of the true entropy.
# * A temperature mends the calibration of CE's labels. It cannot mend what is worded.
# * The queries alone (AQ) are as accurate as LoRA of rank 4, within two points.
# * nBERT follows accuracy.
# * Faithfulness moves little, and the mark is relied on as much with SCED as without:
#   no term of the loss knows what decides.
# * With 48 examples, the number, batches and epochs of the paper's protocol,
#   cross-entropy learns by heart how the coins fell. Its confidence is far too high;
#   label smoothing, focal loss and KL mend some of it, and SCED makes it worse. Few
#   weights overfit less, so AQ and LoRA lose less than all weights do.
# * On a base that is less sure, SCED leads to the diffuse optimum instead. This one
#   follows from the theory; we saw it in a trial run before we added it to the
#   experiments.

# %% [markdown]
# Now live, with the first seed, on the base that is less sure, since it takes a third
# of the time. It is pre-trained once and then kept on disk.

# %%
torch.set_num_threads(1)  # so small a model is not faster on more
LIVE = ["CE", "CAREF"]
live, models_of = {}, {}
for condition in experiment.conditions():
    if condition.experiment == "short base" and condition.name in LIVE:
        runtime.seed_everything(0)
        model = experiment.fine_tune(condition, seed=0)
        test = experiment.examples_of(condition.world, "test", seed=0)
        beliefs = believe(model, test, condition.probabilities)
        live[condition.name] = {
            **decision_metrics(beliefs.labels, test, world.shortcut),
            **distribution_metrics(beliefs),
        }
        models_of[condition.name] = model

asked = next(e for e in test if e.deciding and "maybe" in e.deciding.text)
print(textwrap.fill(asked.text, 74))
chances = evidence.posterior(asked, world.shortcut)
print("labels:  ", *evidence.LABELS)
print("in truth:        ", chances.round(2))
for arm, model in models_of.items():
    beliefs = believe(model, [asked], partial(torch.softmax, dim=-1))
    other = 1 - beliefs.label[0, LABEL_TOKENS].sum()
    print(f"{arm:8} believes", beliefs.labels[0].round(2),
          f" with {other:.2f} on other words")
    print(f"{'':8} writes:", *write(model, [asked.text]))

# %% tags=["nbval-check-output"]
# Sums of float32 differ between machines, and training amplifies that.
TOLERANCE = {"plain": 0.15, "label mass": 0.2, "wording entropy": 1.0}
for arm in LIVE:
    recorded = table_of["short base"].select(arm=arm)
    for metric, within in TOLERANCE.items():
        there = recorded.by_seed(metric)[0]
        distance = abs(live[arm][metric].value - there)
        assert distance < within, (arm, metric, distance)
print("the live run agrees with the record of seed 0")
lost = {a: 1 - live[a]["label mass"].value for a in LIVE}
print("CAREF gives words that are no labels over ten times what CE gives:",
      lost["CAREF"] > 10 * lost["CE"])

# %% [markdown]
# ## Evaluate it
#
# The records hold five seeds: five bases, five sets of examples, five tests of 600
# questions. Small points are seeds; the marker with a black edge is their mean, with a
# bootstrap interval.
#
# ### What the loss does to beliefs
#
# A hedge is a word with a known probability. So plot what the models believe against
# it.

# %% mystnb={"image": {"alt": "Three panels of mean belief in a hedged statement against the probability of the hedge, 0.6 to 0.9, with the diagonal. All weights: CE and CE plus KL run a little below the diagonal, CE plus SCED and CAREF far above it, at 0.75 and higher everywhere. Queries only: CE and CE plus KL are at 0.53 rising to 0.74; SCED and CAREF start above the diagonal and end below it, with wide bands. Other losses: label smoothing, 1.5-entmax and sparsemax follow the diagonal from below, focal loss lies far below."}} tags=["hide-input"]
hedges = np.array(list(evidence.HEDGES.values()))
fig, axes = plt.subplots(1, 3, figsize=(7, 3.2), sharey=True)
PANELS = {
    "all weights": ["CE", "KL", "SCED", "CAREF"],
    "queries (AQ)": ["AQ CE", "AQ KL", "AQ SCED", "AQ CAREF"],
    "other losses": ["label smoothing", "focal", "entmax", "sparsemax"],
}
for ax, (title, arms) in zip(axes, PANELS.items(), strict=True):
    ax.plot([0.5, 1], [0.5, 1], color="grey", linewidth=1)
    for i, arm in enumerate(arms):
        of_arm = many.select(arm=arm)
        each = np.array([
            of_arm.values(f"belief {hedge}") for hedge in evidence.HEDGES
        ])
        style = plots.arm_style(i + 4 * (title == "other losses"))
        ax.plot(hedges, each.mean(1), **style,
                label=ARMS[arm].removeprefix("AQ: "))
        ax.fill_between(hedges, each.min(1), each.max(1),
                        color=style["color"], alpha=0.15, linewidth=0)
    ax.set(title=title, xlabel="probability of the hedge",
           xlim=(0.58, 0.92), ylim=(0.38, 1.02))
    ax.legend(fontsize=7)
axes[0].set_ylabel("belief in what is hedged")
plt.show()

# %% [markdown]
# The bands reach from the lowest seed to the highest. (The belief is a mean over
# questions, and the mark moves the probability of a single one to both sides.) All arms,
# with the accuracy where there is nothing to be unsure of, and the spread of the words
# where the right one is known:

# %% mystnb={"image": {"alt": "Three panels with one row an arm. Plain questions: all arms on all weights and the adapters lie near 0.96, AQ under CE at 0.86 with one seed at 0.67, AQ with CAREF at 0.91, the base at 0.77. ECE on hedged questions: near 0.08 for most, about 0.2 for SCED and CAREF, 0.14 and 0.17 with AQ. Entropy at the wording: at the line of 1.03 for most, 2.0 for label smoothing, 2.3 for SCED, 4.7 for CAREF."}} tags=["hide-input"]
fig, axes = plt.subplots(1, 3, figsize=(7, 4.6), sharey=True)
PANELS = {
    "plain": ("plain questions", "share right"),
    "hedged ECE": ("hedged questions", "ECE"),
    "wording entropy": ("first word of explanations", "entropy (nats)"),
}
for ax, (metric, (title, label)) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, many, metric, ARMS)
    ax.set(xlabel=label, title=title)
    ax.title.set_size(9)
axes[2].axvline(evidence.WORDING_ENTROPY, color="grey", linewidth=1)
plt.show()


# %% [markdown]
# The grey line is the true entropy of the wording.
#
# What each choice does by itself is a difference within seeds: the arm with it minus the
# arm without it, on the same base, examples and test.

# %% tags=["hide-input"]
def effect(experiment_name, arm, other, metric):
    """Arm minus other, paired by seed."""
    chosen = table_of[experiment_name]
    return results.paired_by_seed(
        chosen.select(arm=arm), chosen.select(arm=other), metric
    )


CHOICES = {
    "+ KL": ("KL", "CE"),
    "+ SCED": ("SCED", "CE"),
    "+ SCED, where KL is": ("CAREF", "KL"),
    "+ both: CAREF": ("CAREF", "CE"),
    "AQ, not all weights": ("AQ CE", "CE"),
    "AQ: + KL": ("AQ KL", "AQ CE"),
    "AQ: + SCED": ("AQ SCED", "AQ CE"),
    "AQ: + both": ("AQ CAREF", "AQ CE"),
}
MEASURES = {
    "plain": ("plain right (points)", 100),
    "hedged ECE": ("hedged ECE (points)", 100),
    "wording entropy": ("wording entropy (nats)", 1),
    "evidence": ("evidence right (points)", 100),
}


def effects(experiment_name, choices=CHOICES):
    """Mean paired differences with intervals, one row a choice."""
    shown = [["", *(label for label, _ in MEASURES.values())]]
    for name, (arm, other) in choices.items():
        cells = []
        for metric, (_, unit) in MEASURES.items():
            found = effect(experiment_name, arm, other, metric).difference
            mean, low, high = (unit * x for x in found[:3])
            digits = 1 if unit == 100 else 2
            cells.append(f"{mean:+.{digits}f}"
                         f" [{low:+.{digits}f}, {high:+.{digits}f}]")
        shown.append([name, *cells])
    return Markdown(results.markdown_table(shown))


effects("evidence")


# %% tags=["hide-input"]
def mean(arm, metric, of=many):
    """Mean over seeds."""
    return of.select(arm=arm).values(metric).mean()


def pct(arm, metric, of=many):
    return f"{mean(arm, metric, of):.0%}"


def nats(arm, of=many):
    return f"{mean(arm, 'wording entropy', of):.2f}"


entropy = f"{evidence.WORDING_ENTROPY:.2f}"
aq_gains = sorted(
    100 * (many.select(arm="AQ CAREF").values("plain")
           - many.select(arm="AQ CE").values("plain")), reverse=True
)
Markdown(
    f"""
**SCED makes the models surer of what is not certain.** On hedged questions
the confidence rises from {pct("CE", "hedged confidence")} under CE to
{pct("SCED", "hedged confidence")} with SCED and
{pct("CAREF", "hedged confidence")} with both terms, and the ECE from
{mean("CE", "hedged ECE"):.2f} to {mean("SCED", "hedged ECE"):.2f} and
{mean("CAREF", "hedged ECE"):.2f}. This is what theory said, and where the
two terms meet, SCED prevails, as it said too. A hedge of 60 % is believed
at {pct("SCED", "belief maybe")}: we had expected 90 % or more.

**KL alone lowers the confidence** ({pct("KL", "hedged confidence")}). We
expected it to miss on the other side. It does not: CE is too sure here,
and with KL the ECE is {mean("KL", "hedged ECE"):.2f}.

**At the wording SCED does the opposite of what we expected.** The entropy
is {nats("CE")} nats under CE, as in truth ({entropy}), and we
expected SCED to halve it. It *rises*, to {nats("SCED")} with SCED and to
{nats("CAREF")} with both. The models still pick among the three wordings
when they take the likeliest; a sampled explanation would often begin with
a word that never begins one.

**On all weights the accuracy hardly moves**: {pct("CE", "plain")} of plain
questions under CE, {pct("CAREF", "plain")} with CAREF.
**On the queries alone it does, in one seed of five.** There CAREF gains
{aq_gains[0]:.0f} points, nearly all of it by SCED; in the others it is
between {aq_gains[-1]:+.1f} and {aq_gains[1]:+.1f}.
"""
)


# %% [markdown]
# What happened in that seed? The records keep every outcome, so sort its questions by
# what decides them. (We looked at this after the fact.)

# %% tags=["hide-input"]
def right_by_relation(arm, seed):
    """Share of right labels by what decides."""
    right = {"is in": [], "is not in": [], "nothing": [], "a hedge": []}
    record = next(r for r in many.select(arm=arm) if r.seed == seed)
    test = experiment.examples_of(EVIDENCE, "test", seed)
    told = outcomes(record.metrics, "label")
    for example, is_right in zip(test, told, strict=True):
        fact = example.deciding
        said = fact.relation if fact else "nothing"
        right[said if said in right else "a hedge"].append(is_right)
    return {said: np.mean(found) for said, found in right.items()}


lone = int(np.argmax(
    many.select(arm="AQ CAREF").values("plain")
    - many.select(arm="AQ CE").values("plain")
))
listed = [[f"seed {lone}", "*is in*", "*is not in*", "nothing", "a hedge"]]
for arm in ("base", "AQ CE", "AQ KL", "AQ SCED", "AQ CAREF", "LoRA r=4"):
    found = right_by_relation(arm, lone).values()
    listed.append([ARMS[arm], *(f"{share:.0%}" for share in found)])
Markdown(results.markdown_table(listed))


# %% [markdown]
# *Is not in* has a word where hedges have one too, and in this seed so few weights could
# not tell them all apart. Cross-entropy then takes the compromise that is best on
# average and believes *not* as if it were a hedge. Under SCED a compromise is dear, so
# the model decides. It decides the hedges too, which is where the calibration goes.

# %% [markdown]
# Was the theory wrong, or we? We had worked out a choice between two, and extrapolated.
# The wording is a choice among three, at 50, 30 and 20 %. `theory.settle` follows the
# gradient on such a choice, from the calibrated distribution on:

# %% tags=["nbval-check-output"]
def wording_entropy(loss):
    """Entropy at the wording that descent leads to, in nats."""
    chances = list(evidence.WORDINGS.values())
    probs = theory.settle(chances, EVIDENCE.base.logits, loss)
    counts = np.append(np.ones_like(chances), EVIDENCE.base.logits - 3)
    return -(counts * probs * np.log(probs)).sum()


recorded = dict(zip(LOSSES, ("CE", "KL", "SCED", "CAREF"), strict=True))
print("entropy at the wording, nats    theory   trained")
for name, loss in LOSSES.items():
    print(f"{name:31} {wording_entropy(loss):6.2f}"
          f" {nats(recorded[name]):>9}")


# %% [markdown]
# We were. Where no word has more than half, every one is left of the ridge, and SCED
# pushes it down: towards the diffuse optimum, which is where CAREF's models were found,
# almost to the digit. SCED's alone are on the way there. The same term drives a label
# of 80 % to certainty and dissolves a choice among three.

# %% [markdown]
# The histograms of entropies say where on its ridge SCED has put the models:

# %% mystnb={"image": {"alt": "Two step histograms with logarithmic counts. At the label, SCED and CAREF have more questions in the lowest bin of entropy and fewer between 0.5 and 1 nat than CE and CE plus KL. At the wording, CE and CE plus KL lie at 1 to 1.5 nats, SCED between 1.75 and 3, CAREF between 4.25 and 5.25; a line marks the truth at 1.03."}} tags=["hide-input"]
def entropy_counts(of_arm, name, bins):
    """Share of distributions in each bin of entropy, over all seeds."""
    counts = np.zeros(bins)
    for record in of_arm:
        for index in range(bins):
            key = f"{PACKED_PREFIX}{name} entropy/{index}"
            if key in record.metrics:
                counts[index] += record.metrics[key].value
    return counts / counts.sum()


fig, axes = plt.subplots(1, 2, figsize=(7, 3.2))
longest = {"label": 2.0, "wording": 6.0}
truth = {"label": None, "wording": evidence.WORDING_ENTROPY}
for ax, (name, most) in zip(axes, longest.items(), strict=True):
    bins = round(most / ENTROPY_STEP)
    edges = ENTROPY_STEP * np.arange(bins)
    for i, arm in enumerate(["CE", "KL", "SCED", "CAREF"]):
        found = entropy_counts(many.select(arm=arm), name, bins)
        ax.step(edges, found, where="post", **line(i), label=ARMS[arm])
    if truth[name]:
        ax.axvline(truth[name], color="grey", linewidth=1)
    ax.set(xlabel="entropy (nats)", title=f"at the {name}", yscale="log")
axes[0].set_ylabel("share of questions")
fig.legend(*axes[0].get_legend_handles_labels(),
           loc="outside lower center", ncols=4)
plt.show()


# %% [markdown]
# ### Calibration
#
# ECE depends on the number of questions, so beside it stands what a perfectly calibrated
# model with the same confidences would have on as many. Brier and the negative
# log-likelihood are proper scores, and nobody can beat the exact posterior's in
# expectation. The distance is the total variation between a model's labels and the
# posterior's.

# %% tags=["hide-input"]
def summary(of, columns, arms, *more):
    """Means with intervals over seeds, each column in its unit."""
    rows = [["", *(label for label, _ in columns.values())]]
    for arm, label in arms.items():
        values = of.select(arm=arm)
        cells = []
        for metric, (_, unit) in columns.items():
            found = results.bootstrap(unit * values.values(metric))
            m, low, high = found[:3]
            digits = 2 if metric == "NLL" else 1
            cells.append(
                f"{m:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
                if np.isfinite(m) else "not finite"
            )
        rows.append([label, *cells])
    return Markdown(results.markdown_table([*rows, *more]))


SCORES = {
    "ECE": ("ECE (%)", 100),
    "ECE if calibrated": ("if calibrated", 100),
    "ECE classwise": ("classwise", 100),
    "Brier": ("Brier × 100", 100),
    "NLL": ("NLL", 1),
    "hedged distance": ("distance, hedged", 100),
}


def blind_distance(seed):
    """How far from the posterior one is who knows hedges but no marks."""
    asked = [
        e for e in experiment.examples_of(EVIDENCE, "test", seed)
        if e.deciding and 0 < e.deciding.probability < 1
    ]
    gaps = [
        evidence.posterior(e) - evidence.posterior(e, world.shortcut)
        for e in asked
    ]
    return np.abs(gaps).sum(1).mean() / 2


best = {
    name: many.select(arm="CE").values(f"posterior {name}").mean()
    for name in ("Brier", "NLL", "confidence")
}
blind = np.mean([blind_distance(seed) for seed in range(5)])
summary(
    many, SCORES, ARMS,
    ["the exact posterior", "", "", "", f"{100 * best['Brier']:.1f}",
     f"{best['NLL']:.2f}", "0"],
    ["hedges known, marks not", *[""] * 5, f"{100 * blind:.1f}"],
)

# %% tags=["hide-input"]
Markdown(
    f"""
A **temperature** fitted on validation takes the ECE of CE from
{mean("CE", "ECE"):.3f} to {mean("temperature", "ECE"):.3f}, for the price
of one number. Brier and NLL agree with the order: SCED and CAREF are last
among the arms that train all weights, in both.

The distance to the exact posterior says something else, and we had expected
it to follow the others. It is large for everybody, since hardly any arm
learned what the mark tells about a hedged question; CE, whose rate is the
larger one, did in some seeds. Who knows all about the hedges and nothing
about the marks is as far away as the last row says. Against a posterior
that is often nearly certain, an arm that is too sure by accident is not
further off.
"""
)

# %% [markdown]
# ### Explanations: like people's, right, and faithful

# %% tags=["hide-input"]
EXPLANATIONS = {
    "valid": ("well formed (%)", 100),
    "evidence": ("evidence right", 100),
    "justified": ("and label right, plain", 100),
    "nBERT": ("nBERT", 1),
    "nBERT ungated": ("not gated", 1),
}
summary(many, EXPLANATIONS, ARMS)

# %% [markdown]
# *Evidence right* is exact: the explanation cites the facts that decide and no others.
# nBERT and the score without the gate are from 0 to 100, with a small encoder in the
# place of RoBERTa-large; with hardly anything but names and places to tell sentences
# apart, all of its scores are high.

# %% mystnb={"image": {"alt": "Four panels with one row an arm, of labels changed by an edit. Evidence that is cited: near 0.95 for most, 0.88 for AQ under CE, 0.8 for the base. A fact that is not cited: 0.05, with AQ 0.08, base 0.17. The mark of plain questions: 0.02 or less. The mark of hedged ones: near zero for SCED, KL and all AQ arms, and between 0.1 and 0.2 with single seeds above 0.4 for CE, focal, 1.5-entmax and sparsemax."}} tags=["hide-input"]
fig, axes = plt.subplots(1, 4, figsize=(7.4, 4.4), sharey=True)
PANELS = {
    "flips cited": "evidence,\nif cited",
    "flips other": "a fact that is\nnot cited",
    "flips mark plain": "the mark,\nplain",
    "flips mark hedged": "the mark,\nhedged",
}
for ax, (metric, title) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, many, metric, ARMS)
    ax.set(xlabel="labels changed", title=title)
    ax.title.set_size(9)
plt.show()

# %% [markdown]
# Edit one thing and ask again. A label should follow what its explanation cites and
# nothing else. Of a hedged question the mark does tell something, so a calibrated model
# may be moved by it; but no explanation mentions it.

# %% tags=["hide-input"]
FAITH = {
    "flips cited": ("flips, cited (%)", 100),
    "flips other": ("flips, other", 100),
    "insertion mentioned": ("*not* mentioned", 100),
    "simulatability": ("simulatability", 100),
    "plain misled": ("right against the mark", 100),
}
summary(many, FAITH, ARMS)

# %% tags=["hide-input"]
ungated = [mean(arm, "nBERT ungated") for arm in ARMS if arm != "base"]
marks = many.select(arm="CE").values("flips mark hedged")
Markdown(
    f"""
**nBERT** ranks the arms as the accuracy does. Without its gate all trained
arms lie between {min(ungated):.1f} and {max(ungated):.1f}.

**Faithfulness** moves with the accuracy too. Edit the cited evidence, and
{pct("CE", "flips cited")} of the labels change under CE,
{pct("CAREF", "flips cited")} under CAREF, and
{pct("AQ CE", "flips cited")} with AQ under CE: a label that is wrong for
want of understanding does not follow the evidence. Edits of other facts
change few labels, and an inserted *not* is nearly always mentioned. As
expected, no loss makes explanations more or less faithful by itself.

**On plain questions the mark was ignored**, by all. On hedged ones it does
tell something. Under CE {pct("CE", "flips mark hedged")} of the labels
follow it ({marks.max():.0%} in the seed where most do), and those models
are nearer to the posterior for it. No explanation ever says so. With SCED
it is {pct("SCED", "flips mark hedged")}, with CAREF
{pct("CAREF", "flips mark hedged")}. We had expected no difference. It need
not be a virtue: a model that has made up its mind about a hedge has no use
for a hint.
"""
)

# %% [markdown]
# ### With 48 examples
#
# The paper's protocol has 48 examples, batches of four and fifty epochs. The same grid
# and baselines in that regime, on the same bases:

# %% mystnb={"image": {"alt": "Three panels with one row an arm, after 48 examples. Plain questions: between 0.84 and 0.92, the base at 0.77. ECE on hedged questions: from 0.18 to 0.28 for most, focal loss the lowest of them, 0.16 for AQ with SCED or CAREF, 0.1 for AQ under CE, and for CE with a temperature. Evidence right: between 0.84 and 0.92, lowest for AQ."}} tags=["hide-input"]
few = table_of["few-shot"]
fig, axes = plt.subplots(1, 3, figsize=(7, 4.6), sharey=True)
PANELS = {
    "plain": ("plain questions", "share right"),
    "hedged ECE": ("hedged questions", "ECE"),
    "evidence": ("explanations", "evidence right"),
}
for ax, (metric, (title, label)) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, few, metric, ARMS)
    ax.set(xlabel=label, title=title)
    ax.title.set_size(9)
plt.show()

# %% tags=["hide-input"]
effects("few-shot", {
    **CHOICES,
    "label smoothing": ("label smoothing", "CE"),
    "LoRA r=4": ("LoRA r=4", "CE"),
    "AQ CAREF − LoRA r=4": ("AQ CAREF", "LoRA r=4"),
})


# %% tags=["hide-input"]
def few_ece(arm):
    return f"{mean(arm, 'hedged ECE', few):.2f}"


def lost(arm):
    """Points of accuracy that go with the examples."""
    points = 100 * (mean(arm, "plain") - mean(arm, "plain", few))
    return f"{points:.1f}"


Markdown(
    f"""
As expected, **48 coins are learned by heart**: CE believes
{pct("CE", "hedged confidence", few)} on hedged questions, against
{pct("CE", "hedged confidence")} with all examples, and its ECE there is
{few_ece("CE")}. One **temperature** brings that to
{few_ece("temperature")}, though it is fitted to many more examples than
those of the training. Focal loss gives {few_ece("focal")}, label smoothing
{few_ece("label smoothing")} and KL {few_ece("KL")}, less help than we had
expected. SCED has {few_ece("SCED")} and CAREF {few_ece("CAREF")}.

**Few weights**, we wrote, overfit less. Of the coins this is true: the
queries have no room to learn them by heart (AQ under CE: ECE
{few_ece("AQ CE")}; LoRA of rank 4: {few_ece("LoRA r=4")}). With SCED they
are sure all the same ({few_ece("AQ SCED")}). Of accuracy, going from
{EVIDENCE.examples:,} examples to {FEW_SHOT.examples} costs AQ under CE
{lost("AQ CE")} points, LoRA of rank 4 {lost("LoRA r=4")}, and all weights
{lost("CE")}.

**CAREF-AQ**, the paper's proposal in the paper's regime, gets
{pct("AQ CAREF", "plain", few)} of plain questions right, LoRA of rank 4
{pct("LoRA r=4", "plain", few)}, all weights under CE
{pct("CE", "plain", few)}.

For most arms the smallest rate that was tried is the best, by a point or
less over the next one.
"""
)

# %% [markdown]
# ### On a base that is less sure
#
# Theory says that the optimum SCED leads to depends on where the model starts. So
# start at a base that was pre-trained for a third as long.

# %% mystnb={"image": {"alt": "Two rows of four panels with the eight arms of the grid, for the base and for the one that is less sure. On the second base plain accuracy is near 0.72 on all weights and 0.54 on the queries. Where the mark misleads it is between 0.2 and 0.4 on all weights and about 0.5 on the queries; on the first base it is as high as elsewhere. CAREF on all weights has little more than half of its probability on the labels where all others have nearly all, and its entropy at the wording is the highest on both bases."}} tags=["hide-input"]
fig, axes = plt.subplots(
    2, 4, figsize=(7.4, 4.6), sharey=True, sharex="col"
)
PANELS = {
    "plain": "plain, right",
    "plain misled": "right against\nthe mark",
    "label mass": "mass on labels",
    "wording entropy": "wording\nentropy (nats)",
}
STARTS = {"evidence": "base", "short base": "less sure base"}
for row, (name, title) in zip(axes, STARTS.items(), strict=True):
    for ax, (metric, label) in zip(row, PANELS.items(), strict=True):
        plots.dot_plot(ax, table_of[name], metric, GRID_ARMS)
        ax.set_xlabel(label if name == "short base" else "")
    row[3].axvline(evidence.WORDING_ENTROPY, color="grey", linewidth=1)
    row[0].set_ylabel(title)
plt.show()

# %% tags=["hide-input"]
short = table_of["short base"]
TAKEN = {
    "flips cited": ("flips, cited (%)", 100),
    "flips mark plain": ("flips, mark", 100),
    "plain misled": ("right against the mark", 100),
    "evidence": ("evidence right", 100),
    "nBERT": ("nBERT", 1),
    "hedged ECE": ("ECE, hedged", 100),
}
summary(short, TAKEN, GRID_ARMS)

# %% tags=["hide-input"]
mass = {
    arm: pct(arm, "label mass", short) for arm in ("CE", "SCED", "CAREF")
}
flips = {
    arm: pct(arm, "flips mark plain", short)
    for arm in ("CE", "KL", "SCED", "CAREF", "AQ CE")
}
Markdown(
    f"""
**Vaguer.** CAREF leaves {mass["CAREF"]} of the probability on the three
labels together; under CE it is {mass["CE"]}, with SCED alone
{mass["SCED"]}. The rest is spread over words that are never right there.
The same loss with the same weights makes one base surer and another one
vaguer, as theory has it.

**And the mark is taken.** We had not planned this, but a base that cannot
follow the facts has a use for a shortcut. Trained on all weights, it
answers by the mark: an edit of the mark alone changes {flips["CE"]} of the
labels under CE, while an edit of the evidence that is cited changes
{pct("CE", "flips cited", short)}. It is right in
{pct("CE", "plain", short)} of plain questions, and in
{pct("CE", "plain misled", short)} of those whose mark misleads. This is the
rationaliser of our three models written by hand. The explanations name
facts, the right ones in {pct("CE", "evidence", short)} of cases. None names
the mark.

So here is a case for *faithfulness*, and the loss does not help: with SCED
{flips["SCED"]} of the labels follow the mark, with CAREF {flips["CAREF"]}.
The confidence penalty alone has the lowest share of the four,
{flips["KL"]}, at the same learning rate as SCED. Training only the queries
takes less of the shortcut ({flips["AQ CE"]}) and learns less of all else.
"""
)

# %% [markdown]
# ## Turn one knob

# %% [markdown]
# The knob is $\lambda_{\text{SCED}}$, without the KL term, and after it $\alpha$ and
# $\beta$. Before the measurement, what theory says at the width of these logits. First
# the minima for a word that is certain, then the pairs for a label of 70 %, the lowest
# first.

# %% tags=["nbval-check-output"]
doses = {"SCED 0.03": KNOB["SCED 0.03"], "SCED 0.1": GRID["SCED"]}
doses |= {name: KNOB[name] for name in ("SCED 0.3", "SCED 1")}
doses |= {name: KNOB[name] for name in KNOB if "(" in name}
width = EVIDENCE.base.logits
for name, recipe in doses.items():
    pairs = theory.pair_optima(0.7, width, recipe.loss)
    print(f"{name:12} certain: {places(recipe.loss, width)}")
    print(f"{'':12} 70 %:    ",
          "  ".join(f"({o.first:.2f}, {o.second:.2f})" for o in pairs))

# %% [markdown]
# At this width the released 0.1 does not split a certain word, but a label of 70 %
# already has a minimum at 95 %. The dose makes the rest. Of the other two, $(1, 0)$ is
# nearly the KL term, as derived. And $(2, 0)$ is a penalty of confidence that never
# turns: without the factor $(1-p)^\beta$ there is no ridge. What makes a model surer is
# $\beta$.

# %% [markdown]
# Now the records. All doses have the learning rate of SCED.

# %% mystnb={"image": {"alt": "Four panels with one row a setting of SCED. With the weight, from 0 to 1, confidence on hedged questions rises from 0.78 to 0.99 and the entropy at the wording from 1 to 5.5 nats, while plain accuracy stays near 0.95. With alpha 1, beta 0 nothing but the confidence changes, which falls to 0.73. With alpha 2, beta 0 confidence falls to 0.45, the mass on labels to 0.55, accuracy to 0.76, and the wording has 3.9 nats."}} tags=["hide-input"]
STEPS = {"CE": "0", "SCED 0.03": "0.03", "SCED": "0.1",
         "SCED 0.3": "0.3", "SCED 1": "1",
         "SCED (1, 0)": "0.1, α = 1, β = 0",
         "SCED (2, 0)": "0.1, α = 2, β = 0"}
fig, axes = plt.subplots(1, 4, figsize=(7.4, 3.2), sharey=True)
PANELS = {
    "plain": "plain, right",
    "hedged confidence": "confidence, hedged",
    "label mass": "mass on labels",
    "wording entropy": "wording entropy (nats)",
}
knob = results.Results([
    *table_of["knob"],
    *(dataclasses.replace(record, experiment="knob")
      for arm in ("CE", "SCED") for record in many.select(arm=arm)),
])
for ax, (metric, label) in zip(axes, PANELS.items(), strict=True):
    plots.dot_plot(ax, knob, metric, STEPS)
    ax.set_xlabel(label)
axes[1].axvline(best["confidence"], color="grey", linewidth=1)
axes[3].axvline(evidence.WORDING_ENTROPY, color="grey", linewidth=1)
axes[0].set_ylabel("weight of SCED")
plt.show()

# %% [markdown]
# The grey lines are the truth.

# %% tags=["nbval-check-output"]
print("entropy at the wording, nats   theory   trained")
for name, recipe in {"CE": GRID["CE"], **doses}.items():
    arm = "SCED" if name == "SCED 0.1" else name
    trained = mean(arm, "wording entropy", knob)
    print(f"{STEPS[arm]:29} {wording_entropy(recipe.loss):7.2f}"
          f" {trained:9.2f}")

# %% [markdown]
# The more SCED, the surer the labels and the more dissolved the wordings, at once, as
# theory says. Its other predictions come out as well. With $(1, 0)$ little happens, for
# it is nearly a weak KL. With $(2, 0)$ the ridge is gone and with it all certainty: the
# labels lose half of their mass to words that are none, and the accuracy falls. Up to a
# weight of 0.3 the accuracy tells nothing of what goes on below it.

# %% [markdown]
# ## Paper beside ours

# %% [markdown]
# ### One metric contains another
#
# nBERT is zero where the label is wrong. So it cannot exceed the accuracy, and if
# explanations are equally good everywhere it is the accuracy times a constant. Here are
# all cells of the paper's table:

# %% mystnb={"image": {"alt": "nBERT against accuracy for each model and data set of the paper's table. Left, all cells: those of AdaLoRA lie far down at accuracies below 45, all others above 73, and all lie close to a line through the origin with slope 0.9. Right, the cells without AdaLoRA: they lie between the line of slope 0.85 and that of slope 0.95."}} tags=["hide-input"]
datasets = [name for name in table.columns if name != "average"]
rows = list(dict.fromkeys(model for model, _ in table.rows))
cells = {
    name: np.array([
        [theirs(name, metric, column) for column in datasets]
        for metric in ("accuracy", "nBERT")
    ])
    for name in rows
}
fig, axes = plt.subplots(1, 2, figsize=(7, 3.6))
for ax, low in zip(axes, (0, 70), strict=True):
    grid = np.array([low, 100])
    ax.plot(grid, 0.9 * grid, color="grey", linewidth=1)
    if low:
        for slope in (0.85, 0.95):
            ax.plot(grid, slope * grid, ":", color="grey", linewidth=1)
    for i, (name, (accuracy, scores)) in enumerate(cells.items()):
        inside = accuracy > low
        ax.plot(accuracy[inside], scores[inside], linestyle="none",
                marker=plots.arm_style(i)["marker"], markersize=5,
                color=plots.colour(i), label=name if low == 0 else None)
    ax.set(xlabel="accuracy (%)", xlim=(low, 100))
axes[0].set_ylabel("nBERT")
axes[1].set_title("without AdaLoRA")
fig.legend(loc="outside lower center", ncols=4)
plt.show()


# %% tags=["nbval-check-output"]
def correlation(names):
    accuracy, scores = np.concatenate([cells[n] for n in names], axis=1)
    return np.corrcoef(accuracy, scores)[0, 1]


print(f"correlation over all cells:         {correlation(rows):.3f}")
without = [name for name in rows if name != "AdaLoRA"]
print(f"correlation over all but AdaLoRA's: {correlation(without):.3f}")
print()
print("nBERT per right answer" + "".join(f"{d:>8}" for d in datasets))
for name in ("CAREF-AQ", "LoRA r=128", "CAREF-BASE"):
    accuracy, scores = cells[name]
    print(f"{name:22}"
          + "".join(f"{s:8.3f}" for s in scores / accuracy))
    assert (scores <= accuracy).all()
(best, theirs_128) = (cells[n][1] / cells[n][0] for n in
                      ("CAREF-AQ", "LoRA r=128"))
assert np.abs(best - theirs_128).max() < 0.0015

# %% [markdown]
# The correlation is that of a number with itself and a little noise. Divided by the
# accuracy, what is left is the mean score of an explanation whose answer is right, and
# there CAREF-AQ and LoRA agree to about a thousandth on every data set; full
# fine-tuning lies one or two hundredths lower. So the lead of CAREF-AQ over LoRA in
# nBERT is its lead in accuracy.
#
# That the published numbers are FEB's gated score is an inference of ours, from these
# ratios. `caref/metrics.py` in the code has another encoder, rescales its scores and has
# no gate.
#
# ### How large is the margin?
#
# The nearest rival is LoRA of rank 4, for which the page gives only the averages. It
# gives no standard errors. Standard deviations over splits appear in the code, as an
# example in the documentation of `caref/metrics.py`. If they are the paper's, and
# typical of all data sets and models:

# %% tags=["nbval-check-output"]
SPLITS = 60
deviations = paper["deviations"]
errors = {
    metric: math.sqrt(2 / (SPLITS * len(datasets)))
    * deviations.value("CoS-E", column=metric)
    for metric in ("accuracy", "nBERT")
}
for metric, error in errors.items():
    rival = paper["averages"].value("LoRA r=4", column=metric)
    margin = theirs("CAREF-AQ", metric) - rival
    print(f"{metric:9} CAREF-AQ − LoRA r=4 = {margin:+.2f}, that is"
          f" {margin / error:.1f} standard errors of {error:.2f}")
weights = paper["weights"].column("percent")
ratio = (shares.value("CAREF-AQ", column="percent")
         / shares.value("LoRA r=4", column="percent"))
print(f"CAREF-AQ trains {ratio:.0f} times as many weights as LoRA r=4")
best, other = cells["CAREF-AQ"], cells["LoRA r=128"]
for name, (a, e) in zip(datasets, (best - other).T, strict=True):
    print(f"{name:7} CAREF-AQ − LoRA r=128: accuracy {a:+.2f},"
          f" nBERT {e:+.2f}")

# %% [markdown]
# In the protocol the splits are the same for all models, so a paired comparison would
# be sharper than this one. It needs the scores of each split, which we did not find.
# Against rank 128 the lead comes from e-SNLI; on two data sets LoRA is ahead.
#
# **AdaLoRA** stands at less than one percent on e-SNLI, which has three labels. An
# answer drawn at random would have a third. A score so far below chance means outputs
# that cannot be read, not wrong ones. How it was tuned we do not know. A baseline in
# this state says little about the method it is compared with.
#
# ### Ours beside it
#
# Their rows are Flan-T5-large on four benchmarks after 48 examples, ours a tiny T5 in a
# made-up world after 48 and after 1,500; and LoRA's rank 128 has its match in our rank 16.
# So the numbers are not to be compared, but the order is, and the size of the steps.

# %% tags=["hide-input"]
BESIDE = {
    "CAREF-BASE": ("CAREF", "CAREF, all"),
    "CAREF-AQ": ("AQ CAREF", "CAREF, AQ"),
    "LoRA r=4": ("LoRA r=4", "LoRA r=4"),
    "LoRA r=128": ("LoRA r=16", "LoRA r=128 (16)"),
    "AdaLoRA": ("AdaLoRA", "AdaLoRA"),
    "": ("CE", "CE, all"),
}
METRICS = ("accuracy", "nBERT")
SIZES = {
    f"{FEW_SHOT.examples} examples": few,
    f"{EVIDENCE.examples:,} examples": many,
}
published_pairs = {
    **{name: [theirs(name, metric) for metric in METRICS] for name in rows},
    "LoRA r=4": [
        paper["averages"].value("LoRA r=4", column=metric)
        for metric in METRICS
    ],
}


def three(of, arm):
    """Plain questions right in percent, nBERT, the score not gated."""
    chosen = of.select(arm=arm)
    return [f"{100 * chosen.values('plain').mean():.1f}",
            f"{chosen.values('nBERT').mean():.1f}",
            f"{chosen.values('nBERT ungated').mean():.1f}"]


sizes = [f"{of.examples:,}:" for of in (FEW_SHOT, EVIDENCE)]
listed = [["", "paper: acc.", "nBERT",
           *(head for size in sizes
             for head in (f"{size} plain", "nBERT", "not gated"))]]
for model, (arm, label) in BESIDE.items():
    pair = published_pairs.get(model)
    reported = [f"{x:.2f}" for x in pair] if pair else ["–", "–"]
    listed.append([label, *reported, *three(few, arm), *three(many, arm)])
Markdown(results.markdown_table(listed))

# %% mystnb={"image": {"alt": "nBERT and the score without its gate against accuracy on plain questions, one point an arm, for 48 and for 1,500 examples. nBERT rises with accuracy along a line in both. Without the gate all points lie between 97.5 and 100."}} tags=["hide-input"]
fig, axes = plt.subplots(1, 2, figsize=(7, 3.2), sharex=True)
for ax, (metric, label) in zip(
    axes, {"nBERT": "nBERT", "nBERT ungated": "not gated"}.items(),
    strict=True,
):
    for i, (name, of) in enumerate(SIZES.items()):
        means = np.array([
            [100 * of.select(arm=arm).values("plain").mean(),
             of.select(arm=arm).values(metric).mean()]
            for arm in ARMS if arm != "base"
        ])
        style = plots.arm_style(i) | {"linestyle": "none", "markersize": 5}
        ax.plot(*means.T, **style, label=name)
    ax.set(xlabel="plain questions right (%)", ylabel=label)
axes[0].legend()
plt.show()

# %% tags=["nbval-check-output"]
for name, of in SIZES.items():
    right, gated, ungated = (
        np.array([of.select(arm=arm).values(metric).mean()
                  for arm in ARMS if arm != "base"])
        for metric in ("plain", "nBERT", "nBERT ungated")
    )
    print(f"{name:14} correlation with accuracy: nBERT"
          f" {np.corrcoef(right, gated)[0, 1]:.3f},"
          f" not gated {np.corrcoef(right, ungated)[0, 1]:.3f}")

# %% [markdown]
# In our arms too nBERT is little more than the accuracy. Each point is the mean of an arm
# over seeds. Without the gate all arms are within about two points, and what
# remains between them goes with the accuracy or not, depending on the number of examples.
#
# ### What the public code does
#
# The code helped us most with the loss, which it states in full. For a reader who wants
# to reproduce the table from it, this is what the files contained when we read them:
#
# * `scripts/train.py` trains on records made by a function called
#   `load_stub_records`, with a comment that asks to replace it. The scores it saves are
#   marked as placeholders: the published values of CAREF-AQ for CoS-E plus a tenth of
#   the split's number modulo three. They do not depend on the training or the data set.
# * `scripts/grid_search.py`, for the figure about $\alpha$ and $\beta$, likewise saves a
#   placeholder: a constant plus half of $\alpha$, plus 0.3 times $\beta$, plus noise.
# * `caref/trainer.py` has a validation that counts outputs which are not empty, marked
#   as a placeholder too; the training does not call it.
# * `caref/data.py` puts the gold answer into the prompt, and `caref/metrics.py` does not
#   gate, as said above.
# * The schedule warms up for 500 steps. 48 examples in batches of four for 50 epochs are
#   600 steps, so the learning rate rises for most of the training.
#
# So the table cannot be made with the public code as it stands, and we do not know the
# code that made it. This says something about the code, not about the table.
#
# ### The verdicts

# %% tags=["hide-input"]
margin = theirs("CAREF-AQ", "accuracy") - paper["averages"].value(
    "LoRA r=4", column="accuracy"
)
in_errors = margin / errors["accuracy"]


def gain(experiment_name, arm, other):
    """Points of accuracy on plain questions, with the interval."""
    found = effect(experiment_name, arm, other, "plain").difference
    mean_of, low, high = (100 * x for x in found[:3])
    return f"{mean_of:+.1f} [{low:+.1f}, {high:+.1f}]"


verdicts = [
    ["", "claim", "verdict", "measured here, or computed from the paper"],
    ["caref‑1", "one loss, calibration and sparsity, no rationales",
     "**the loss is as described; it does not calibrate**",
     "ECE on hedged questions"
     f" {mean('CE', 'hedged ECE'):.2f} → {mean('CAREF', 'hedged ECE'):.2f}"
     f" ({mean('KL', 'hedged ECE'):.2f} with its KL term alone). SCED has"
     f" a ridge at p = {peak.probability:.2f}; of two Zipf tails the top"
     f" token has {theory.sced_shares(theory.zipf(0.5, V, 1.5))[0]:.0%}"
     f" and {theory.sced_shares(theory.zipf(0.5, V))[0]:.0%} of it."
     " People's explanations are in the target"],
    ["caref‑2", f"accuracy {theirs('CAREF-AQ', 'accuracy'):.2f} %",
     "**not tested here; not reproducible from the public code**",
     "on the same weights CAREF changes the accuracy by"
     f" {gain('evidence', 'CAREF', 'CE')} points, on AQ by"
     f" {gain('evidence', 'AQ CAREF', 'AQ CE')}; with"
     f" {FEW_SHOT.examples} examples by"
     f" {gain('few-shot', 'CAREF', 'CE')} and"
     f" {gain('few-shot', 'AQ CAREF', 'AQ CE')}"],
    ["caref‑3", f"nBERT {theirs('CAREF-AQ', 'nBERT'):.2f}",
     "**follows from the accuracy**, in the paper's own table",
     f"correlation over cells {correlation(rows):.3f}; per right answer"
     " CAREF-AQ and LoRA r=128 agree to 0.001. Nothing of it says what a"
     " model decided by: where a shortcut was taken,"
     f" {pct('CE', 'flips mark plain', short)} of the labels followed it"
     f" under CE and {pct('CAREF', 'flips mark plain', short)} with CAREF,"
     " and no explanation did"],
    ["caref‑4", "6.43 % of the weights",
     "**holds; two readings of which**",
     "every published share follows from the model's shape"],
    ["caref‑5", "ahead of LoRA and AdaLoRA",
     "**not here**, and not by a margin in the paper",
     f"paper: {margin:+.2f} on LoRA r=4, {in_errors:.1f} standard errors;"
     " AdaLoRA below chance. Here CAREF-AQ minus LoRA r=4"
     f" {gain('evidence', 'AQ CAREF', 'LoRA r=4')} points, minus AdaLoRA"
     f" {gain('evidence', 'AQ CAREF', 'AdaLoRA')}; with"
     f" {FEW_SHOT.examples} examples"
     f" {gain('few-shot', 'AQ CAREF', 'LoRA r=4')} and"
     f" {gain('few-shot', 'AQ CAREF', 'AdaLoRA')}"],
]
Markdown(results.markdown_table(verdicts))

# %% [markdown]
# ## What did not reproduce, and why
#
# * **The lead over LoRA.** Here CAREF-AQ is behind LoRA of rank 4, with many examples and
#   with few. Reasons on our side: our base has to learn what hedges mean, while Flan-T5
#   knows the words and may only have to be pointed to them, which queries can do; our
#   AQ has fewer weights than LoRA of rank 4, theirs many times as many; and the base is
#   tiny. Where only queries are trained the loss did help, in one seed of five.
# * **Calibration.** The name promises it, and the loss does the opposite here. Reasons on
#   our side: half of our questions have no certain answer, benchmarks have far fewer; and
#   we measure it, which nothing we could read of the paper does.
# * **The special cases.** $\alpha = 1$, $\beta = 0$ is the divergence plus $2N$, and
#   $\beta > 0$ does not turn the pressure to the tail. The first is a matter of the
#   absolute value and small; the second of what $\alpha = 2$ leaves there.
# * **No number of theirs could be checked.** We found neither outputs nor the scores of
#   each split, and Flan-T5 was out of reach for this chapter's records at scale
#   `cpu`.
# * **What Flan-T5 has seen.** The collection it was trained on contains tasks built from
#   e-SNLI, ECQA and ComVE with explanations, and prompts for CoS-E
#   {cite:p}`longpre2023flan`. So 48 examples may call up what is there. A row for Flan-T5
#   before fine-tuning would tell; the table has none.
#
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/caref.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/caref.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# [The reference](../book/api/caref.md) describes all of `ftlib.caref`.
#
# **1. A slope without end.** With $\beta < 1$ the slope $f'(p)$ is infinite at $p = 1$.
# Is the gradient by the logits? Work it out, then give a position of probability one,
# as float32 has them, to `caref_by_hand` and to `ftlib` with $\beta = 0.5$.

# %% tags=["hide-cell", "nbval-check-output"]
for log_odds in (5, 10, 20):
    log_p = -np.log1p(np.exp(-log_odds))
    slope = float(theory.sced_slopes(log_p, V, 2, 0.5))
    by_logit = np.exp(log_p) * -np.expm1(log_p) * slope
    print(f"log-odds {log_odds:2}: f'(p) = {slope:10.0f},"
          f"  p(1−p) f'(p) = {by_logit:8.4f}")

logits = torch.zeros(1, 1, 512)
logits[..., 0] = 200  # softmax: one, and zeros
labels = torch.zeros(1, 1, dtype=torch.long)
half = TokenLoss(sced=0.1, kl_to_uniform=0.1, beta=0.5)
for name, function in {
    "by hand": lambda z: caref_by_hand(z, labels, beta=0.5),
    "ftlib": lambda z: loss_from_logits(z, labels, half),
}.items():
    z = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(z), z)
    print(f"{name:8} gradient finite: {bool(gradient.isfinite().all())}")


# %% [markdown]
# By the logit the slope is multiplied with $p(1-p)$, so what remains is of the order
# $(1-p)^\beta$ and goes to zero. Autograd does not see the product. It multiplies an
# infinite factor with a zero and gets *not a number*. `ftlib` holds $1-p$ just above
# zero before the power.
#
# **2. Who can call a model back?** A model gives the right word the log-odds 5, 10, 15,
# 20. How hard does label smoothing pull it back, how hard the KL term, how hard SCED?
# Give the derivative of each term by the log-odds.

# %% tags=["hide-cell", "nbval-check-output"]
def pull(loss, log_odds):
    """Derivative of a loss by the log-odds of a spike, by autograd."""
    z = torch.tensor(float(log_odds), dtype=torch.float64,
                     requires_grad=True)
    first = z + math.log(V - 1)
    logits = torch.cat(
        [first[None], torch.zeros(V - 1, dtype=torch.float64)]
    )
    value = token_loss_of_logits(loss, logits[None], torch.tensor([0]))
    return float(torch.autograd.grad(value[0], z)[0])


terms = {
    "CE": CROSS_ENTROPY,
    "smoothing 0.1": TokenLoss(label_smoothing=0.1),
    "0.1 KL": TokenLoss(0.0, kl_to_uniform=0.1),
    "0.1 SCED": TokenLoss(0.0, sced=0.1),
}
print("log-odds      " + "".join(f"{z:>12}" for z in (5, 10, 15, 20)))
for name, loss in terms.items():
    found = [pull(loss, z) for z in (5, 10, 15, 20)]
    print(f"{name:14}" + "".join(f"{one:12.1e}" for one in found))


# %% [markdown]
# Positive numbers pull back. Smoothing moves the target to 0.9, and a cross-entropy
# against it pulls with a constant 0.1 however sure the model is. The gradient of KL by
# $z_j$ is $p_j(\log p_j + H)$, which vanishes at a certain distribution: the confidence
# penalty hardly reaches a model that is saturated already. SCED's vanishes as well, and has
# the other sign.
#
# **3. How much SCED until it splits?** With both weights equal to $\lambda$, from which
# $\lambda$ on has a certain word two minima? Find it by bisection to three digits.

# %% tags=["hide-cell", "nbval-check-output"]
def minima(weight, vocabulary=V):
    """How many minima a word that is certain has."""
    loss = TokenLoss(sced=weight, kl_to_uniform=weight)
    points = theory.spike_stationary_points(vocabulary, loss)
    return sum(point.is_minimum for point in points)


def threshold(vocabulary=V, low=0.01, high=1.0):
    """The smallest weight with two minima."""
    assert minima(low, vocabulary) == 1 < minima(high, vocabulary)
    while high / low > 1.0005:
        middle = math.sqrt(low * high)
        if minima(middle, vocabulary) == 1:
            low = middle
        else:
            high = middle
    return high


print(f"two minima from λ = {threshold():.4f} on; released: {CAREF.sced}")
assert minima(0.05) == 1 < minima(CAREF.sced) == 2

# %% [markdown]
# The released weights are about twice that.
#
# **4. The size of the vocabulary.** SCED contains $\log V$, to the power $\alpha$. How does
# its peak grow with $V$? Which $\lambda$ splits a vocabulary of 2,048, and which one of
# 256,000? What follows for an experiment with a small vocabulary?

# %% tags=["hide-cell", "nbval-check-output"]
for size in (512, 2_048, 32_128, 256_000):
    top = theory.spike_peak(size)
    ratio = top.sced / math.log(size) ** 2
    print(f"V = {size:7,}: peak {top.sced:4.1f} at {top.probability:.2f},"
          f" {ratio:.3f} log² V; splits from λ = {threshold(size):.3f}")


# %% [markdown]
# The peak grows about as $\log^2 V$, and its place hardly moves. So the same $\lambda$ is
# a weaker dose for a small vocabulary, and for one of 512 the released 0.1 does not split
# anything. For this reason the models of our records have logits far wider than their
# vocabulary.
#
# **5. The gate.** Let twenty models have accuracies between 75 and 95 %, and let the mean
# score of their explanations be 90 with a spread of 1.5 *between models*, unrelated to the
# accuracy. How well do accuracy and nBERT correlate? How large must that spread be
# until the correlation is as low as the paper's is without AdaLoRA?

# %% tags=["hide-cell", "nbval-check-output"]
def gated_correlation(spread, trials=4000):
    """Mean correlation of accuracy and nBERT over sets of twenty models."""
    rng = np.random.default_rng(0)
    accuracy = rng.uniform(75, 95, (trials, 20))
    quality = 0.9 + spread / 100 * rng.standard_normal((trials, 20))
    pairs = zip(accuracy, accuracy * quality, strict=True)
    return np.mean([np.corrcoef(a, e)[0, 1] for a, e in pairs])


for spread in (0, 0.5, 1.5, 3, 6):
    print(f"spread {spread:3}: correlation {gated_correlation(spread):.2f}")

# %% [markdown]
# A spread of 1.5 points is enough to explain the paper's correlation. Between models
# of such different accuracy the gate decides the order almost alone. So report the
# score that is not gated beside nBERT, as we do.
#
# ## Run it at scale `gpu`
#
# `ftlib run caref --scale gpu --seeds 10` leaves the made-up notes for the benchmarks of
# the paper: e-SNLI {cite:p}`camburu2018esnli`, ComVE
# {cite:p}`wang2020semeval` and CoS-E {cite:p}`rajani2019explain` in FEB's format, with 48
# examples a seed or 4,000. The models are those at hand among Flan-T5 (small and base),
# an English-to-French translator (opus-mt-en-fr) and SmolLM2-135M. The arms are the
# grid of our records, with all weights or AQ, and LoRA of ranks 4 and 128. An arm that
# is not tuned stands beside them. `make gpu` runs the part with 48 examples on the
# translator and on SmolLM2.
#
# **What it can show**: the order of the losses on the same weights, and of the weights
# under the same loss, with intervals over seeds, and whether SCED changes calibration on
# real text. **What it cannot**: FEB's own 60 splits, its evaluation with
# RoBERTa-large unless that is at hand, and what Flan-T5-large does if a smaller or
# another model stands in for it.

# %% tags=["hide-input"]
try:
    gpu = results.load("caref", "gpu")
    minutes = sum(r.seconds for r in gpu) / 60
    memory = max(r.peak_memory_bytes for r in gpu) / 2**30
    text = (
        f"Recorded on {gpu[0].device}: {len(gpu)} runs, "
        f"{minutes:.0f} minutes, at most {memory:.0f} GiB.\n\n"
    )
    for name in gpu.experiments():
        if "learning-rate" in name:
            continue
        rows = results.table(
            gpu.select(experiment=name),
            {
                "accuracy": "accuracy",
                "nBERT": "nBERT",
                "nBERT ungated": "not gated",
                "ECE": "ECE",
                "because": "a *because*",
            },
        )
        text += f"**{name}**\n\n{rows}\n\n"
except results.NotRecordedError:
    text = (
        "No `gpu` run is recorded yet: minutes, memory and results of this "
        "scale are still to be measured."
    )
Markdown(text)

# %% [markdown]
# ## References
#
# * The paper: {cite:t}`nithisopa2026caref`, a preprint, version 2. Its project page:
#   <https://kaopanboonyuen.github.io/CAREF/>; its code:
#   <https://github.com/kaopanboonyuen/CAREF>.
# * The protocol: {cite:t}`marasovic2022fewshot`, with code (Apache-2.0) at
#   <https://github.com/allenai/feb>. BERTScore: {cite:t}`zhang2020bertscore`.
# * Other ways to deal with confidence: {cite:t}`pereyra2017regularizing` (penalty),
#   {cite:t}`szegedy2016rethinking` (label smoothing), {cite:t}`lin2017focal` (focal
#   loss), {cite:t}`guo2017calibration` (temperature), {cite:t}`martins2016softmax`
#   (sparsemax).
# * Few weights: {cite:t}`hu2022lora` (LoRA), {cite:t}`zhang2023adalora` (AdaLoRA).
# * Faithfulness: {cite:t}`atanasova2023faithfulness` (insertions),
#   {cite:t}`hase2020leakage` (simulatability).
# * Data: {cite:t}`camburu2018esnli`, {cite:t}`wang2020semeval` (ComVE),
#   {cite:t}`rajani2019explain` (CoS-E).
