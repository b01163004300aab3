# %% [markdown]
# # CLIPR: learn the rules behind what a person chooses
#
# *Hyk and Saisubramanian, “Learning Transferable Latent User Preferences for
# Human-Aligned Decision Making”* {cite:p}`hyk2026clipr`.
#
# *Bring me a mug.* There are four on the shelf, and each of them would do. Which one is
# right depends on who asks, and the request does not say it. CLIPR holds a short
# conversation, writes what it has learnt as **rules** in plain words, and decides by
# them: this task, the next ones, and tasks of a kind that was never spoken of. Its
# second variant, Adaptive-CLIPR, watches how well it does batch by batch (in ours: how
# many decisions are accepted), asks when that is too little, and mends the rules.
#
# No weights need be trained for this. What is learnt is a page of text that a person can
# read, correct, and hand to another model. In the paper a large language model does it,
# as far as we know. We build every step without one, so that each can be checked against an exact
# answer, let models take the places of the steps, and in the end put the rules into a
# small model's weights.

# %% [markdown]
# ## What you will be able to do
#
# * say what a preference, a rule and an ambiguous task are, so that *right* can be
#   measured, in distribution and out of it, and what it costs to get there;
# * derive which question tells most, why an L1 penalty turns answers into few rules for
#   all families, and when a gate should ask again;
# * write the whole loop in forty lines, and check each piece against an exact answer;
# * run it on tasks of your own, with a model of your own, on this machine or behind an
#   address, in ten lines;
# * edit rules by hand, and see which decisions change;
# * tell a method that learns what a person likes from one that learns what is often
#   right.
#
# You need: logistic regression, entropy, the Beta distribution. No language model is
# needed to follow; it helps to have prompted one.

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
import json
import math
import tempfile
import textwrap
import threading
import warnings
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from matplotlib.patches import Arc, Ellipse, FancyBboxPatch, Rectangle
from scipy.special import expit
from scipy.stats import beta as beta_law, binom
from sklearn.linear_model import LogisticRegression
from tokenizers import Tokenizer, decoders, models as words, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast, logging

from ftlib import data, models, plots, published, results
from ftlib.clipr import kitchens, manipulation, monitoring, prompts, tidybot
from ftlib.clipr.conversation import (
    Answer,
    Belief,
    History,
    Question,
    dimension_questions,
    mutual_information,
    task_questions,
)
from ftlib.clipr.division import divide
from ftlib.clipr.endpoint import Budget, Endpoint, EndpointError, Patience
from ftlib.clipr.experiment import methods
from ftlib.clipr.loop import LearningInterrupted, State, accuracy, learn
from ftlib.clipr.models import (
    LocalModel,
    RecordedReplies,
    ReplyNotRecordedError,
    Usage,
    votes,
)
from ftlib.clipr.monitoring import Batch
from ftlib.clipr.prompted import PromptedReasoner
from ftlib.clipr.reasoners import SymbolicReasoner
from ftlib.clipr.refinement import revise
from ftlib.clipr.rules import Rule, RuleError, RuleSet, Vocabulary
from ftlib.clipr.runs import by_person, try_with_all
from ftlib.clipr.settings import (
    BUDGETS,
    MAIN_BUDGET,
    ConversationSettings,
    GateSettings,
    Population,
    RefinementSettings,
    Settings,
    SynthesisSettings,
)
from ftlib.clipr.synthesis import (
    comparisons,
    fit as fit_preferences,
    lasso_bradley_terry,
    rounded,
    synthesise,
)
from ftlib.clipr.tasks import Correction, Option, Task
from ftlib.clipr.users import SimulatedUser
from ftlib.clipr.walkthrough import walkthrough
from ftlib.results import PACKED_PREFIX

torch.set_num_threads(1)  # the models here are small
logging.set_verbosity_error()
logging.disable_progress_bar()
plots.use_style()
paper = published.load("clipr")
BRIEF = ConversationSettings(questions=6, candidates=500)
LIVE = Settings(conversation=BRIEF)


def show(text, indent=""):
    """Print long lines so that they fit the page."""
    for line in str(text).splitlines():
        print(textwrap.fill(
            line, 74, initial_indent=indent,
            subsequent_indent=indent + "    ",
        ))


# %% [markdown]
# ## The idea in one picture
#
# Three people want a mug, and later a plate. The shelf has the same four mugs for all of
# them, and the same four plates. We asked each about a bowl, a box and a spoon, and
# never about mugs or plates. Only what was said is known; what they like is hidden.

# %% mystnb={"image": {"alt": "A table of three rows, one a person. First column: three answers, such as for a bowl: small plain ceramic. Second: the rules that were written from the answers, one or two lines each. Third and fourth: four drawn mugs and four drawn plates, small or large, plain or patterned, in the colours of ceramic, steel, glass and plastic, with the one that was decided on in a frame. The first person gets the small plain ceramic one of both, the second the large plain steel one, the third the large patterned glass one."}} tags=["hide-input"]
SHELF = ("small plain ceramic", "large plain steel",
         "large patterned glass", "small patterned plastic")
FACES = {"ceramic": "#f2d9c4", "steel": "#c3ccd5", "glass": "#d9efee",
         "plastic": "#f3c6d3"}


def thing(name, noun):
    """An option such as a small plain ceramic mug."""
    size, finish, material = name.split()
    return Option(f"{name} {noun}", {
        "size": size, "finish": finish, "material": material, "kind": noun,
    })


def shelf(noun, names=SHELF):
    return Task(f"a {noun}", "", f"Bring me a {noun}.", f"{noun}s",
                tuple(thing(name, noun) for name in names))


spoken_of = [
    shelf("bowl", ("small plain ceramic", "large plain steel",
                   "large patterned ceramic", "small patterned glass")),
    shelf("box", ("small plain glass", "large plain ceramic",
                  "small patterned steel", "large patterned glass")),
    shelf("spoon", ("small patterned ceramic", "large plain glass",
                    "small plain steel", "large patterned plastic")),
]
HIDDEN = {
    "Ada": "Prefer material ceramic over anything else. (weight 2)\n"
    "Prefer size small over large.",
    "Ben": "Prefer finish plain over patterned. (weight 2)\n"
    "Prefer size large over small.",
    "Cem": "Prefer material glass over anything else. (weight 2)\n"
    "Prefer finish patterned over plain.",
}


def draw_thing(ax, x, y, option, chosen):
    """A mug, or a plate from above: size, hatching and colour tell."""
    a = option.attributes
    s = 0.95 if a["size"] == "large" else 0.62
    style = {
        "facecolor": FACES[a["material"]], "edgecolor": "#555555",
        "hatch": "////" if a["finish"] == "patterned" else None,
        "linewidth": 0.8,
    }
    if a["kind"] == "mug":
        handle = Arc((x + 0.17 * s, y), 0.2 * s, 0.26 * s, color="#555555")
        ax.add_patch(handle)
        corner = (x - 0.19 * s, y - 0.24 * s)
        ax.add_patch(Rectangle(corner, 0.36 * s, 0.48 * s, **style))
    else:
        ax.add_patch(Ellipse((x, y), 0.56 * s, 0.56 * s, **style))
        ax.add_patch(Ellipse((x, y), 0.30 * s, 0.30 * s, fill=False,
                             edgecolor="#555555", linewidth=0.6))
    if chosen:
        ax.add_patch(FancyBboxPatch(
            (x - 0.28, y - 0.31), 0.57, 0.62, fill=False, linewidth=2.2,
            boxstyle="round,pad=0.02", edgecolor=plots.colour(1),
        ))


def picture(crowd):
    fig, ax = plt.subplots(figsize=(7, 3.1))
    heads = {0.0: "what was said", 2.4: "rules", 4.95: "a mug",
             7.6: "a plate"}
    for x, text in heads.items():
        ax.text(x, 3.62, text, fontsize=9, weight="bold")
    for row, (name, state) in enumerate(crowd.items()):
        y = 3 - 1.1 * row
        said = [
            f"{asked.task.id}? {given.value.rsplit(' ', 1)[0]}"
            for asked, given in state.history.answered
        ]
        ax.text(0, y + 0.28, f"{name}", fontsize=8.5, weight="bold",
                va="center")
        ax.text(0, y - 0.1, "\n".join(said), fontsize=6.8, va="center")
        lines = [
            textwrap.fill(rule.claim.to_text(), 33) for rule in state.rules
        ]
        ax.text(2.4, y, "\n".join(lines), fontsize=6.8, va="center")
        for x, noun in ((5.2, "mug"), (7.85, "plate")):
            task = shelf(noun)
            index = state.rules.decide(task).index
            for at, option in enumerate(task.options):
                draw_thing(ax, x + 0.66 * at, y, option, at == index)
        if row:
            ax.axhline(y + 0.55, color="#dddddd", linewidth=0.8)
    ax.set(xlim=(-0.05, 10.1), ylim=(0.35, 3.85), aspect="equal")
    ax.axis("off")


learnt = {}
for name, text in HIDDEN.items():
    history = History()
    person = SimulatedUser(RuleSet.from_text(text))
    for question in task_questions(spoken_of):
        history = history.add(question, person.answer(question))
    rules = synthesise(history, RuleSet(), SynthesisSettings())
    learnt[name] = State(rules=rules, history=history)
    for noun in ("mug", "plate"):
        assert person.right(shelf(noun), rules.decide(shelf(noun)).index)
picture(learnt)
plt.show()

# %% [markdown]
# Size, hatching (patterned) and colour (what it is made of) tell the things apart. The
# frame is what was decided. Two things make this work, and they are what the paper
# claims and what we will test: a few answers are enough to tell people apart, and what
# they tell holds for things nobody asked about.
#
# ## What the paper claims

# %% tags=["hide-input"]
reported = paper["accuracy"]
fewer, gain = paper["claimed"].column("percent")
(asked_people,) = paper["study"].column("number")
claims = [
    ["", "claim", "where we answer it"],
    ["clipr‑1", "Latent preferences are inferred from a few conversations",
     "build it; use ftlib's; evaluate it"],
    ["clipr‑2", "What is learned transfers to new tasks",
     "evaluate it, out of distribution; the knob"],
    ["clipr‑3", "Ahead of its peers on three data sets",
     "train it against baselines; paper beside ours"],
    ["clipr‑4", "Fewer interactions, lower inference cost",
     "evaluate it: turns and calls; paper beside ours"],
]
Markdown(
    f"""
{results.markdown_table(claims)}

Numbers that are reported ({reported.source}), in percent:

{reported.markdown()}

Besides: up to {fewer:g} % fewer calls of a model, up to about {gain:g} %
more accuracy than the baselines (points or parts, we could not tell), and a
study with {asked_people:g} people.
"""
)

# %% [markdown]
# **Read this before you compare anything.** Only the abstract and the first paragraph of
# the paper could be had, and what others wrote about it. There is no released code that
# we could find, no prompt, no table. So in this chapter little is *theirs*. The two
# are kept apart here, and again at every step:

# %% tags=["hide-input"]
known = [
    ["step", "known, and from where", "ours: a reconstruction"],
    ["the problem", "several actions satisfy a request; a latent preference"
     " decides (abstract)", "all symbols; options with attributes; ties"],
    ["what is learned", "rules in natural language, that decide and that"
     " transfer (abstract)", "the form of a rule, and how rules decide"],
    ["the conversation", "short, about example tasks; the model asks, the"
     " user answers freely (abstract, summaries)",
     "which question comes next; how many; what an answer can be"],
    ["from talk to rules", "the model finds dimensions of preference and"
     " writes rules (summaries)", "a penalised Bradley–Terry model,"
     " rounded; or a prompt of our own"],
    ["two variants", "CLIPR and Adaptive-CLIPR (summaries)",
     "that the first keeps its rules as they are"],
    ["watching", "by batch, with an adaptive gate (summaries)",
     "the test, its thresholds, the size of a batch"],
    ["refinement", "feedback changes rules (abstract)",
     "the cases: add, except, reweight, delete, generalise"],
    ["the user", f"{asked_people:g} people in a study (summaries); in the"
     " other experiments not known", "simulated: hidden rules, errors,"
     " impatience, changes of mind"],
    ["data", "AmbiK, Housekeep, Mobile Manipulation, KitchenAmbig"
     " (abstract, summaries)", "kitchens of our own; Mobile Manipulation"
     " with attributes by hand; TidyBot's recorded replies"],
    ["baselines", "zero-shot, ICL, RLHF, TidyBot, GATE, CIPHER,"
     " introspective planning (summaries)",
     "small versions, on the same user and as many turns; of introspective"
     " planning none"],
    ["models", "of the Claude and GPT families (summaries)",
     "none, or small ones that run here"],
]
Markdown(results.markdown_table(known))

# %% [markdown]
# *Summaries* were mostly written by machines. We take them as likely, not as certain. An
# earlier version of the paper was at a workshop; its abstract has three data sets and no
# study with people.
#
# What can be tested, then, are the sentences of an abstract, on tasks where the right
# answer is known. What cannot be tested is any of the numbers above.
#
# ## The equations
#
# ### The task
#
# A task $\tau = (x, g, A)$ is a scene, a stated goal, and the options $A$ that satisfy
# it; it is ambiguous if $|A| \ge 2$. A user has a latent $\theta$, and likes best
#
# $$
# a^\star(\tau) = \arg\max_{a \in A} U(a \mid \tau, \theta) ,
# $$
#
# which may be more than one option: to someone who cares about materials alone, two
# steel mugs are equal. What is learnt is a set of rules $R$, and $\pi(\tau, R)$ is the
# option that is taken by them. On a set of tasks $D$
#
# $$
# \mathrm{Acc}(R; D) = \frac1{|D|} \sum_{\tau \in D}
#   \mathbf 1\big[\pi(\tau, R) \in a^\star(\tau)\big] .
# $$
#
# Tasks come in **families**: mugs, bread. *In distribution* are new tasks of families
# that were spoken of or decided before. *Out of distribution* are families that never
# occurred. A method can be good at the first by remembering what was taken, and at the
# second only by knowing why.
#
# There are two costs. $N_\text{user}$ counts **turns**: each answer and each correction,
# which take a person's time. (A nod or a shake of the head at a decision is counted
# apart.) $N_\text{calls}$ counts how often the reasoner is asked, which takes money and
# seconds. A high accuracy with many turns is no achievement, so every comparison has to
# be made at equal turns.
#
# ### From answers to utilities
#
# Every answer says that something is better than something else: of three bowls the
# steel one is the best, so it beats the other two. Let $\phi(a)$ have a 1 for each
# attribute of option $a$. Bradley and Terry {cite:p}`bradley1952` put
#
# $$
# P(a \succ b) = \sigma\big(\beta \cdot (\phi(a) - \phi(b))\big) ,
# \qquad \sigma(z) = \frac1{1 + e^{-z}} ,
# $$
#
# which is logistic regression on differences. Half a dozen answers do not determine a
# dozen utilities, and most attributes do not matter to most people. So we add an L1
# penalty {cite:p}`tibshirani1996lasso` and minimise
#
# $$
# \lVert\beta\rVert_1 + C \sum_i \log\big(1 + e^{-x_i \cdot \beta}\big),
# \qquad x_i = \phi(\text{better}_i) - \phi(\text{worse}_i) .
# $$
#
# **Why this gives rules.** At the minimum every $\beta_j$ that is zero has
#
# $$
# \Big| C \sum_i x_{ij}\, \sigma(-x_i \cdot \beta) \Big| \le 1 ,
# $$
#
# where $\sigma(-x_i \cdot \beta)$ is how much answer $i$ is still unexplained. An
# attribute gets a utility only if the unexplained answers pull at it by more than one
# unit together. What is explained by another attribute pulls no more. So few are left,
# exactly zero elsewhere, and each that is left can be said as a sentence.
#
# How much does one answer count? Say that $n$ answers prefer $u$ over $v$ on one
# dimension, and nothing else differs. The utility difference $d$ costs
# $d + nC\log(1 + e^{-d})$, however it is split between the two values, and is least at
#
# $$
# d = \log(nC - 1) \quad \text{if } nC > 2, \text{ else } 0 .
# $$
#
# **Why rules are for all families.** Each attribute has its column twice: one for all
# families, and one for the answer's own, multiplied by $s < 1$. An own column feels
# the pulls of its family alone, times $s$. While families agree, the common column feels
# all of them together, which is at most 1 at the minimum. So every own column feels at
# most $s$, and stays zero. Only a family that **speaks against** the others gets
# utilities of its own. This is the whole reason why what is learnt can transfer:
# not that rules are words, but that a preference is taken to be common until something
# says otherwise. If a person's preferences do differ between families that were not
# spoken of, this is wrong, and nothing in the conversation shows it (exercise 6).

# %% tags=["nbval-check-output"]
C, s = SynthesisSettings().inverse_penalty, SynthesisSettings().family_scale
pair = np.array([[1.0, -1.0]])  # u preferred over v
print(f"answers n, C = {C:g}:   difference d   log(nC − 1)")
for n in (1, 2, 4, 8):
    found = lasso_bradley_terry(np.repeat(pair, n, axis=0), C)
    d, expected = found[0] - found[1], math.log(n * C - 1)
    np.testing.assert_allclose(d, expected, rtol=1e-6)
    print(f"{n:9}{d:23.3f}{expected:14.3f}")
assert not lasso_bradley_terry(pair, 2.0).any()  # nC = 2: no rule yet

own = s * np.eye(4)  # mugs, boxes, cups, bowls
same = np.column_stack([np.ones(4), own])  # a column for all, four own
against = same * np.array([[1], [1], [1], [-1]])  # but for bowls
print("utility for all, then of mugs, boxes, cups and bowls alone:")
for name, x in {"all agree": same, "bowls do not": against}.items():
    found = lasso_bradley_terry(x, C)
    print(f"{np.round(found, 2) + 0.0}  {name}")
    assert (found[1:4] == 0).all()
    assert (found[4] == 0) == (name == "all agree")

# %% [markdown]
# Here is what Ada said about a bowl, a box and a spoon, with the columns for all
# families alone. From left to right the penalty becomes weaker. With L1 ceramic comes first,
# because it explains most. Small and plain (one line upon the other) come later, for
# what ceramic does not explain, and steel, glass and plastic never: whatever they could
# say is said. An L2 penalty makes all of them small and none of them zero. That would
# be a rule for each value.

# %% mystnb={"image": {"alt": "Two panels of utilities against C from 0.2 to 20, logarithmic. Left, the L1 penalty: all curves are zero at 0.2; ceramic rises from there to above 5; small and plain rise together from about C of 2 to 0.7, large and patterned fall as their mirror image; steel, glass and plastic stay at zero throughout. Right, the L2 penalty: every curve is different from zero everywhere, ceramic up to 3, small and plain up to 0.7, the others negative, steel and glass down to minus 1.3."}} tags=["hide-input"]
seen = comparisons(learnt["Ada"].history)
items = list(dict.fromkeys(
    item for c in seen for side in (c.better, c.worse)
    for item in side.items() if item[0] != "kind"
))
ada = np.array([
    [(c.better[d] == v) * 1.0 - (c.worse[d] == v) for d, v in items]
    for c in seen
])
strengths = np.geomspace(0.2, 20, 40)


def ridge(x, c):
    """The same fit with an L2 penalty; both labels, each at half."""
    model = LogisticRegression(C=c, fit_intercept=False, tol=1e-8)
    labels = np.repeat([1, 0], len(x))
    model.fit(np.concatenate([x, -x]), labels, np.full(2 * len(x), 0.5))
    return model.coef_[0]


fig, axes = plt.subplots(1, 2, figsize=(7, 2.9))
fits = {"L1": lasso_bradley_terry, "L2": ridge}
for ax, (name, fitted) in zip(axes, fits.items(), strict=True):
    paths = np.array([fitted(ada, c) for c in strengths])
    for at, (_, value) in enumerate(items):
        style = plots.arm_style(at)
        ax.plot(strengths, paths[:, at], color=style["color"],
                linestyle=style["linestyle"], label=value)
    ax.set(xscale="log", xlabel="C", title=f"{name} penalty",
           xticks=[0.2, 1, 5, 20], xticklabels=["0.2", "1", "5", "20"])
    ax.minorticks_off()
axes[0].set_ylabel("utility")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
plt.show()

# %% [markdown]
# ### Which question tells most
#
# Before the first answer nothing is known, so imagine many users: utilities drawn at
# random, with some dimensions that do not matter to them, and some families in which
# they differ. Every imagined user has an answer $Y_q$ to every question $q$ and a choice
# $Z_\tau$ in every example task. A question is worth what its answer tells about the
# choices,
#
# $$
# \operatorname{value}(q) = \frac1{|E|} \sum_{\tau \in E} I(Y_q; Z_\tau) , \qquad
# I(Y; Z) = H(Y) + H(Z) - H(Y, Z) ,
# $$
#
# in bits. Ask the one with the highest value, make those users likelier that would have
# answered so, and go on, until no question is worth much. This is greedy: it looks one
# answer ahead. The entropy $H(Y_q)$ alone would not do. A question whose answers are
# wide open, but which bears on no task, has a high entropy and no value.
#
# ### The gate
#
# Decisions are watched batch by batch. Of the last $n$ that the user reacted to, $a$
# were accepted. With a prior $\mathrm{Beta}(\alpha, \beta)$ on the share $p$ that would
# be,
#
# $$
# \text{risk} = P(p < p_0 \mid a, n) = I_{p_0}(\alpha + a,\; \beta + n - a) ,
# $$
#
# the regularised incomplete Beta function. The gate opens if the risk is at least some
# certainty. For whole parameters there is a second way to say it, by counting coins:
#
# $$
# P\big(\mathrm{Beta}(k, m) < p_0\big)
#   = P\big(\mathrm{Binomial}(k + m - 1,\, p_0) \ge k\big) .
# $$

# %% tags=["nbval-check-output"]
law = GateSettings()
n = 16
rng = np.random.default_rng(0)
print(f"target p₀ = {law.target:g}; opens at a risk of {law.certainty:g}")
for rejected in range(5):
    risk = monitoring.risk([Batch(n, n, n - rejected)], law)
    k, m = 1 + n - rejected, 1 + rejected
    coins = binom.sf(k - 1, k + m - 1, law.target)
    drawn = rng.beta(k, m, 200_000) < law.target
    np.testing.assert_allclose(risk, beta_law.cdf(law.target, k, m))
    np.testing.assert_allclose(risk, coins, rtol=1e-9)
    np.testing.assert_allclose(risk, drawn.mean(), atol=0.005)
    is_open = monitoring.gate([Batch(n, n, n - rejected)], law).open
    assert is_open == (risk >= law.certainty)
    print(f"{rejected} of {n} rejected: risk {risk:.2f},"
          f" {'open' if is_open else 'closed'}")

# %% [markdown]
# One rejected decision in sixteen does not open it, and two do. A gate on a bare mean
# would not know how much it knows: with the same share rejected, more decisions make it
# surer.

# %% mystnb={"image": {"alt": "Risk against the share of rejected decisions, from 0 to 0.5, for 8, 16, 32 and 64 decisions, with a grey line at 0.7, above which the gate opens. At a share of 0 the risk is 0.4 for 8 decisions and nearly 0 for 64. All curves rise, the one for 64 most steeply; they cross near a share of 0.1 and are all near 1 from 0.3 on."}} tags=["hide-input"]
fig, ax = plt.subplots(figsize=(6, 2.9))
for at, n in enumerate((8, 16, 32, 64)):
    rejected = np.arange(n // 2 + 1)
    risks = [monitoring.risk([Batch(n, n, n - r)], law) for r in rejected]
    ax.plot(rejected / n, risks, **plots.arm_style(at), markersize=4,
            label=f"{n} decisions")
ax.axhline(law.certainty, color="grey", linewidth=1)
ax.text(0.5, law.certainty - 0.02, "opens above", ha="right", va="top",
        fontsize=8)
ax.set(xlabel="share rejected", ylabel=f"P(p < {law.target:g})",
       ylim=(-0.02, 1.05))
ax.legend(loc="lower right")
plt.show()


# %% [markdown]
# There is a second reason to open: the share fell far
# below its best, as when a person changes their mind. And after some good batches in a
# row the rules are frozen and nobody is asked any more.
#
# ### How rules decide
#
# A rule such as *Prefer material steel over anything else, except for bowls* compares
# two options: $+w$ if the first has steel and the second has not, $-w$ the other way
# round, 0 if it is silent. Of the rules that compare two options on one dimension only
# the most specific count (those for named families before those for all, those over a
# named value before those over anything else). The **margin** is the sum over
# dimensions,
#
# $$
# m(a, b) = \sum_{\text{dimensions}}\; \sum_{\text{most specific rules } r}
#   w_r \operatorname{cmp}_r(a, b) = -m(b, a) .
# $$
#
# If all rules on a dimension say *over anything else*, with weights $w_v$ (0 for values
# without a rule), this is $w_{v(a)} - w_{v(b)}$: a utility, and the option with the
# highest sum wins. But rules are edited and learnt one by one, and may well go round in
# a circle. Each option's score is therefore its **worst margin**,
#
# $$
# \operatorname{score}(a) = \min_{b \ne a} m(a, b) .
# $$
#
# An option that nothing beats has a score of at least 0, and if only one beats all others
# it is taken. In elections this is Simpson's rule {cite:p}`simpson1969`, also minimax,
# and $m$ is the difference in votes. It is what is used where majorities can be
# circular.

# %% tags=["nbval-check-output"]
def of_materials(*materials, family="mugs"):
    options = [Option(f"{m} mug", {"material": m}) for m in materials]
    return Task("t", "", "Bring me a mug.", family, tuple(options))


circle = RuleSet.from_text("""
Prefer material steel over glass. (weight 3)
Prefer material glass over plastic. (weight 2)
Prefer material plastic over steel. (weight 1)
""")
mugs = of_materials("plastic", "glass", "steel")
print("margins, rows over columns: plastic, glass, steel")
print(circle.margins(mugs))
decision = circle.decide(mugs)
print("worst margins:", *(f"{score:g}" for score in decision.scores))
print("taken:", mugs.options[decision.index].name)

# Where rules are utilities, the highest utility is taken:
rng = np.random.default_rng(0)
worth = dict(zip("abcdef", rng.permutation(6), strict=True))
ranked = RuleSet(tuple(
    Rule("material", v, weight=w) for v, w in worth.items() if w > 0
))
for _ in range(200):
    few = rng.choice(list(worth), 3, replace=False)
    best = max(few, key=worth.get)
    at = ranked.decide(of_materials(*few)).index
    assert few[at] == best
print("200 draws from utilities: the best is always taken")

# %% [markdown]
# Each of the three is beaten by one. Steel is beaten by least.
#
# ### Refinement, case by case
#
# When the gate opens, the user is shown a few decisions that were rejected and says what
# was wanted, and perhaps why. Each correction has a **lesson**: the user's reason if it
# can be read as a rule, else a rule on a dimension on which the two options differ. The
# rules on that dimension that spoke for the decision are to blame. Then:

# %% tags=["nbval-check-output"]
steel_taken = of_materials("steel", "glass", family="bowls")
CASES = {
    "nothing spoke: add": "",
    "a weak rule was wrong: delete":
        "Prefer material steel over glass. (1 for, 0 against)",
    "a strong rule was wrong here: except":
        "Prefer material steel over glass. (5 for, 0 against)",
    "two families say so: generalise":
        "Prefer material steel over glass. (2 for, 0 against)\n"
        "For cups, prefer material glass over steel. (4 for, 0 against)",
}
for name, text in CASES.items():
    before = RuleSet.from_text(text)
    correction = Correction(steel_taken, decided=0, chosen=1)
    after = revise(before, [correction], RefinementSettings())
    assert after.decide(steel_taken).index == 1
    print(f"{name}\n   before:")
    show(before or "(no rules)", "      ")
    print("   glass was wanted, of bowls:")
    show(after, "      ")

# %% [markdown]
# A fifth case: if a lesson is right and another dimension still outweighs it, its weight
# is raised until the wanted option wins. Support and what is against a rule are counted,
# with an upper limit, so that a change of mind can win in time. A rule learnt from one
# contradiction and a rule that has held twenty times are not treated alike.
#
# ## Build it in forty lines
#
# Now the loop by hand, in forty-odd lines: what to ask, what follows, what to do. For
# one family, so that an attribute needs one column only. An option is a dictionary of attributes, a user a row
# of utilities, and imagined users who would have answered otherwise are dropped. (So a
# question that was asked is worth nothing any more.)

# %%
VALUES = {
    "material": ("ceramic", "steel", "glass"),
    "size": ("small", "large"),
    "finish": ("plain", "patterned"),
}
EVERY = [(d, v) for d, values in VALUES.items() for v in values]
COLUMN = {item: at for at, item in enumerate(EVERY)}


# %%
def phi(option):
    return np.array([float(option.get(d) == v) for d, v in COLUMN])


def take(users, options):
    """What each user takes; one past the last if all are equal."""
    worth = users @ np.stack([phi(o) for o in options], axis=1)
    equal = np.ptp(worth, axis=1) == 0
    return np.where(equal, len(options), worth.argmax(1))


def bits(*labels):
    """Entropy of labels, together."""
    mixed = sum(100**k * label for k, label in enumerate(labels))
    p = np.unique(mixed, return_counts=True)[1] / len(mixed)
    return -(p @ np.log2(p))


def told(y, choices):
    found = [bits(y) + bits(z) - bits(y, z) for z in choices]
    return round(sum(found) / len(found), 9)


def converse(user, users, questions, tasks, n):
    said = {}  # the answer by question
    for _ in range(n):
        choices = [take(users, task) for task in tasks]
        values = [told(take(users, q), choices) for q in questions]
        q = int(np.argmax(values))
        said[q] = int(take(user, questions[q])[0])
        users = users[take(users, questions[q]) == said[q]]
    return said


def fit(pairs, c):
    x = np.stack([phi(better) - phi(worse) for better, worse in pairs])
    b, step = 0 * x[0], 4 / (c * np.linalg.norm(x, 2) ** 2)
    for _ in range(10_000):  # a step along the slope, then shrink
        b = b + step * c * x.T @ expit(-x @ b)
        b = np.sign(b) * np.maximum(abs(b) - step, 0)
    return x, b


def write(b, threshold):
    rules = []
    for d, values in VALUES.items():
        worth = {v: b[COLUMN[d, v]] for v in values}
        low = min(worth, key=worth.get)
        over = low if len(values) == 2 else None
        rules += [(d, v, over, round(w - worth[low], 1))
                  for v, w in worth.items() if w - worth[low] >= threshold]
    return rules


def margin(rules, a, b):
    return sum(w * ((a[d] == v) - (b[d] == v)) for d, v, over, w in rules
               if a[d] != b[d] and over in (None, a[d], b[d]))


def decide(rules, options):
    margins = [[margin(rules, a, b) for b in options if b is not a]
               for a in options]
    ranks = [(round(min(m), 9), round(sum(m), 9)) for m in margins]
    return ranks.index(max(ranks))


# %% [markdown]
# Now let it run, with two dozen example tasks about mugs, two thousand imagined users, and a
# person who likes ceramic best, then steel, and small ones a little more than large. The
# finish does not matter to this person.

# %% tags=["nbval-check-output"]
def draw_tasks(n, seed):
    """Tasks of two to four different mugs, as ftlib has them."""
    rng = np.random.default_rng(seed)
    shelf_ = [dict(zip(VALUES, v, strict=True))
              for v in product(*VALUES.values())]
    drawn = []
    for number in range(n):
        at = rng.choice(len(shelf_), int(rng.integers(2, 5)), replace=False)
        options = [Option(" ".join(shelf_[i].values()), shelf_[i])
                   for i in at]
        drawn.append(Task(f"{seed}-{number}", "", "Bring me a mug.", "mugs",
                          tuple(options)))
    return drawn


def bare(task):
    return [option.attributes for option in task.options]


examples, later = draw_tasks(24, 1000), draw_tasks(300, 1001)
offered = [bare(task) for task in examples]
asked_for = [*dimension_questions(examples), *task_questions(examples)]
menus = [question.choices for question in asked_for]
me = np.zeros((1, len(COLUMN)))
for item, utility in {("material", "ceramic"): 2.0,
                      ("material", "steel"): 1.0,
                      ("size", "small"): 0.4}.items():
    me[0, COLUMN[item]] = utility
rng = np.random.default_rng(0)
imagined = rng.standard_normal((2000, len(COLUMN)))
for dimension in VALUES:  # half of the users do not care about it
    at = [COLUMN[item] for item in EVERY if item[0] == dimension]
    imagined[np.ix_(rng.random(2000) < 0.5, at)] = 0

talk = converse(me, imagined, menus, offered, n=8)


def learn_by_hand(n):
    """Rules from the first n answers, and how they were come by."""
    said = dict(list(talk.items())[:n])
    pairs = [
        (menus[q][answer], other)
        for q, answer in said.items() if answer < len(menus[q])
        for other in menus[q] if other is not menus[q][answer]
    ]
    x, b = fit(pairs, C)
    return said, x, b, write(b, SynthesisSettings().threshold)


said, x, b, mine = learn_by_hand(5)
for q, answer in said.items():
    show(asked_for[q].text)
    print("   ", [*asked_for[q].values, "it does not matter"][answer])
print()
for dimension, value, over, weight in mine:
    print(f"prefer {dimension} {value} over {over or 'anything else'}"
          f" ({weight:.1f})")


def liked(option):
    return me[0] @ phi(option)


for n in (1, 3, 5, 8):
    rules, right = learn_by_hand(n)[-1], 0
    for options in map(bare, later):
        taken = options[decide(rules, options)]
        right += liked(taken) == max(map(liked, options))
    print(f"{n} question{'s' * (n > 1)}:"
          f" {right / len(later):.0%} of {len(later)} new tasks right")

# %% [markdown]
# One question is not enough, and a few are. Then it stands still: a question is judged
# by the example tasks, and when all imagined users who are left choose alike in these,
# no question is worth anything. What the examples do not have in them cannot be asked.
#
# And there is a rule on the finish, which does not matter to this person. A few answers
# can always be explained in more than one way.
#
# Five checks. The same questions and answers go to `ftlib`, whose imagined users we
# replace by ours; the L1 fit to scikit-learn's; information to a sum over every pair of
# labels; rules and decisions, one by one, to `ftlib`'s.

# %% tags=["nbval-check-output"]
exact = replace(BRIEF, error=0.0, few=0.0)
columns = Belief(examples, exact).columns
ours = imagined[:, None, [COLUMN[item] for item in columns]]
belief, history = Belief(examples, exact, utilities=ours), History()
users = imagined
for q, answer in said.items():
    values = [belief.information(question) for question in asked_for]
    choices = [take(users, options) for options in offered]
    by_hand = [told(take(users, menu), choices) for menu in menus]
    np.testing.assert_allclose(values, by_hand, rtol=0, atol=1e-9)
    spoken = [*asked_for[q].values, None][answer]
    reply = Answer(str(spoken), spoken, indifferent=spoken is None)
    belief.update(asked_for[q], reply)
    history = history.add(asked_for[q], reply)
    users = users[take(users, menus[q]) == answer]
print("1. every question is worth the same at every turn;"
      f" {len(users)} of {len(imagined)} users are left")

y, z = take(imagined, menus[0]), take(imagined, offered[0])
summed = 0.0
for a, c in product(range(y.max() + 1), range(z.max() + 1)):
    both = np.mean((y == a) & (z == c))
    if both:
        alone = np.mean(y == a) * np.mean(z == c)
        summed += both * math.log2(both / alone)
one_hot = [np.eye(labels.max() + 1)[labels] for labels in (y, z)]
found = mutual_information(*one_hot, np.ones(len(y)))
np.testing.assert_allclose(found, summed)
np.testing.assert_allclose(bits(y) + bits(z) - bits(y, z), summed)
print(f"2. information, pair by pair: {summed:.3f} bits")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # newer versions rename the penalty
    lasso = LogisticRegression(
        penalty="l1", solver="liblinear", C=C, fit_intercept=False,
        tol=1e-10, max_iter=100_000,
    )
    # It wants both labels: b lost to a as a won over b, each at half.
    lasso.fit(np.concatenate([x, -x]), np.repeat([1, 0], len(x)),
              np.full(2 * len(x), 0.5))


def cost(b):
    return abs(b).sum() + C * np.logaddexp(0, -x @ b).sum()


faster = lasso_bradley_terry(x, C)
for other in (faster, lasso.coef_[0]):
    np.testing.assert_allclose(x @ b, x @ other, atol=2e-3)
    np.testing.assert_allclose(cost(b), cost(other), rtol=1e-6)
print(f"3. the same minimum three times: {cost(b):.4f}")

fitted = fit_preferences(comparisons(history), SynthesisSettings())
theirs = RuleSet(tuple(rounded(fitted, SynthesisSettings().threshold)))
assert {(r.dimension, r.preferred, r.over, r.weight) for r in theirs} == {
    (d, v, over, float(w)) for d, v, over, w in mine
}
print(f"4. the same {len(mine)} rules")
same = [decide(mine, bare(t)) == theirs.decide(t).index for t in later]
assert all(same)
print(f"5. the same decision in {sum(same)} of {len(later)} new tasks")

counted = synthesise(history, RuleSet(), SynthesisSettings())
print("\nwithout rules that more answers speak against than for:")
show(counted, "  ")
assert "finish" not in {rule.dimension for rule in counted}

# %% [markdown]
# The count in the end is what `ftlib` does on top: how many comparisons agree with a
# rule, and how many do not. It takes the false rule away. Besides it has families, with
# the second column of each attribute and exceptions; answers that may be wrong; and new
# imagined users when few are left. From here on we use it.
#
# ## Use ftlib's
#
# ### Ten lines for tasks and a model of yours
#
# Bring tasks. Here they are trips: to town, to work, to your parents; by train, bus or
# ferry, early or late, at the window or the aisle. Trips to the sea are a family that
# nobody will speak of. A model brings its own tokenizer; a Llama with random weights
# stands for yours, so that this runs anywhere.

# %% tags=["hide-input"]
GOALS = {"town": "Get me to town.", "work": "Get me to work.",
         "parents": "Get me to my parents.", "sea": "Get me to the sea."}
TRIP = {"vehicle": ("train", "bus", "ferry"), "start": ("early", "late"),
        "seat": ("window", "aisle")}


def trips(n, families, seed):
    """Tasks of three trips each, the families in turn."""
    rng = np.random.default_rng(seed)
    every = [Option(" ".join(v), dict(zip(TRIP, v, strict=True)))
             for v in product(*TRIP.values())]
    return [
        Task(f"{seed}-{at}", "", GOALS[family], family,
             tuple(every[i] for i in rng.choice(len(every), 3, False)))
        for at in range(n) for family in [families[at % len(families)]]
    ]


def random_llama(seed):
    """Two layers that read bytes, and know nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(words.BPE(
        {x: at for at, x in enumerate(["<end>", *letters])}, []
    ))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(letters) + 1, hidden_size=32, intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, bos_token_id=0,
        eos_token_id=0, max_position_embeddings=8192,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", pad_token="<end>",
        padding_side="right",
    )
    return LlamaForCausalLM(config).eval(), tokenizer


met = ["town", "work", "parents"]
trips_to_talk_about, trips_to_decide = trips(9, met, 1), trips(48, met, 2)
trips_to_test, trips_to_the_sea = trips(60, met, 3), trips(60, ["sea"], 4)
model, tokenizer = random_llama(seed=0)
traveller = SimulatedUser(RuleSet.from_text("""
Prefer vehicle train over anything else. (weight 2)
Prefer start late over early.
"""))

# %% tags=["nbval-check-output"]
# From here on it is your code.
settings = Settings(conversation=ConversationSettings(candidates=500))
reasoner = SymbolicReasoner(settings, seed=1000)
state = learn(
    reasoner, traveller, trips_to_talk_about, trips_to_decide, settings
)
show(state.rules)
for name, tasks in {"new trips": trips_to_test,
                    "to the sea": trips_to_the_sea}.items():
    share = accuracy(state.rules.decide, traveller.right, tasks)
    print(f"{name}: {share:.0%} right")
print(f"{state.turns} turns of the user, {state.usage.calls} calls")

# %% [markdown]
# That was without a model. Any causal language model can take the place of the reasoner,
# or of a part of it. Here it decides by the rules that were learnt without it:

# %%
vocabulary = Vocabulary.of(trips_to_talk_about)
decider = PromptedReasoner(
    LocalModel(model, tokenizer), vocabulary, by="name", calibrated=True
)
decided = decider.decide_all(trips_to_test[:8], state.rules)
share = np.mean([
    traveller.right(task, decision.index)
    for task, decision in zip(trips_to_test, decided, strict=False)
])
used = decider.usage
print(f"random weights: {share:.0%} of {len(decided)} right;"
      f" {used.calls} calls, {used.prompt_tokens:,} tokens read")

# %% [markdown]
# Random weights know nothing: whatever share came out of eight trips is luck. With `LocalModel.load("…")` or your
# own model in their place it is the same three lines. SmolLM2 with 135 million weights
# is the smallest model here that was tuned to follow instructions. Two trips, to see what goes in and
# out; it measures nothing.

# %%
if models.available("smollm2-135m", fetch=True):
    small = PromptedReasoner(
        LocalModel.load("smollm2-135m"), vocabulary, by="letter"
    )
    show(prompts.choice(trips_to_test[0], state.rules.to_text()))
    print()
    for task in trips_to_test[:2]:
        decision = small.decide(task, state.rules)
        names = [option.name for option in task.options]
        scored = ", ".join(
            f"{name} {score:.1f}"
            for name, score in zip(names, decision.scores, strict=True)
        )
        good = traveller.right(task, decision.index)
        show(f"-> {names[decision.index]} ({'right' if good else 'wrong'});"
             f" log p: {scored}")
else:
    print("smollm2-135m is not here: `ftlib models` says where to get it")

# %% [markdown]
# Models as small as this mostly take the first letter, whatever the rules say.
# `by="name"` and `calibrated=True`, as above, take away what a model likes in any case,
# for more calls. A prompt is a function of a task and of a text, so it can be printed and read. All five
# prompts are in `ftlib.clipr.prompts`, in our words.
#
# ### Rules are text
#
# What was learnt is a page. Print it, change a line as you would in an editor, read it
# back. A mistake is told with its line and what was probably meant:

# %% tags=["nbval-check-output"]
page = state.rules.to_text()
lines = page.splitlines()
assert RuleSet.from_text(page) == state.rules
edited = [*lines, "For sea, prefer vehicle ferry over anything else"
          " (weight 9)"]
everything = Vocabulary.of([*trips_to_talk_about, *trips_to_the_sea])
by_hand = RuleSet.from_text("\n".join(edited), everything)
flips = sum(
    state.rules.decide(task).index != by_hand.decide(task).index
    for task in trips_to_the_sea
)
print("one line was added:")
show(by_hand[-1].to_text(), "  ")
print(f"  decisions that it changes: {flips} of {len(trips_to_the_sea)}")
for line in ("Prefer vehicle trian over bus.", "I like trains.",
             "Prefer vehicle train over train."):
    try:
        RuleSet.from_text("\n".join([*lines, line]), everything)
    except RuleError as error:
        print()
        show(f"{line}  ->  {error}")

# %% [markdown]
# People and models do not keep to one form. These are read too, and what a line says and
# how much speaks for it is kept through text, JSON and back:

# %% tags=["nbval-check-output"]
LOOSE = """
2. When sea, always prefer seat: aisle rather than window;
- prefer start LATE instead of early unless for town
* If work or town, prefer vehicle bus (weight 2, 3 for, 1 against)
# a remark
"""
loose = RuleSet.from_text(LOOSE, everything)
show(loose)
assert RuleSet.from_json(json.loads(json.dumps(loose.to_json()))) == loose


# %% [markdown]
#
# ### A person at the keyboard
#
# A user is whatever has `answer`, `accepts` and `correct`. A person can be one. Any of the three may return `None`: no answer today. Then nothing more is asked,
# and what was learnt until then is used.

# %%
@dataclass
class Person:
    """Types the number of an option, or same, or nothing at all."""

    read: object = input
    turns: int = 0
    reactions: int = 0

    def answer(self, question):
        typed = self.read(f"{question.text} ").strip()
        self.turns += bool(typed)
        if typed == "same":
            return Answer(typed, indifferent=True)
        values = dict(enumerate(question.values, start=1))
        value = values.get(int(typed)) if typed.isdecimal() else None
        return Answer(value or typed, value) if typed else None

    def accepts(self, task, index):
        typed = self.read(f"{task.options[index].name}: all right? ")
        self.reactions += bool(typed)
        return {"y": True, "n": False}.get(typed)

    def correct(self, task, index):
        typed = self.read("Which one, then? ").strip()
        self.turns += bool(typed)
        if not typed.isdecimal():
            return None
        return Correction(task, index, int(typed) - 1)


# %% tags=["nbval-check-output"]
def typing(*lines):
    """Somebody who types these lines, and then goes for a walk."""
    left = iter(lines)

    return lambda prompt: next(left, "")


visitor = Person(typing("1", "2", "same"))
patient = replace(LIVE, conversation=replace(BRIEF, questions=6))
visited = learn(
    SymbolicReasoner(patient), visitor, trips_to_talk_about[:4],
    trips_to_decide[:8], patient,
)
for turn in visited.history:
    show(f"Q: {turn.question.text}")
    print("A:", turn.answer.text if turn.answer else "…")
print(f"\n{visitor.turns} answers; decided nevertheless:"
      f" {len(visited.decisions)}; reactions: {visited.reactions}; rules:")
show(visited.rules or "(none)")

# %% [markdown]
# ### Who reasons
#
# Behind one protocol of four methods (`ask`, `synthesise`, `revise`, `decide`) there may
# be
#
# * no model: `SymbolicReasoner`, as above;
# * a model on this machine: `PromptedReasoner(LocalModel(…))`;
# * a model behind an OpenAI-compatible address: `PromptedReasoner(Endpoint(…))`;
# * replies that a model once gave: `PromptedReasoner(RecordedReplies(…))`.
#
# They can be mixed, since rules are text: let a large model write them and a small one
# decide. All count what they use. A record answers the very prompts that it holds, and
# nothing else. A prompt that differs by a comma is a miss, and a miss is an error, never
# a guess:

# %% tags=["nbval-check-output"]
task = trips_to_test[0]
prompt = prompts.choice(task, state.rules.to_text())
replayed = PromptedReasoner(RecordedReplies({prompt: "B, I think."}))
decision = replayed.decide(task, state.rules)
print("recorded:", task.options[decision.index].name, decision.scores)
try:
    replayed.decide(task, by_hand)  # one rule more in the prompt
except ReplyNotRecordedError as error:
    show(str(error))
print(f"calls {replayed.usage.calls}, tokens {replayed.usage.tokens}"
      f" (estimated), problems {replayed.usage.problems}")


# %% [markdown]
# ### A server that fails half-way
#
# A long conversation with a model that is paid by the token should survive a bad night.
# Here is a small server. It takes option B always, and after ten
# requests it says 500.

# %%
class StandIn(BaseHTTPRequestHandler):
    """A chat endpoint that takes B always, as long as it works."""

    works = 10  # requests

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        StandIn.works -= 1
        broken = StandIn.works < 0
        message = {"message": {"content": "B"}}
        body = {"error": "out of memory"} if broken else {
            "choices": [message],
            "usage": {"prompt_tokens": 250, "completion_tokens": 1},
        }
        self.send_response(500 if broken else 200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *args):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"

# %% [markdown]
# The rules from above are its start, it decides by them, and nobody is asked questions.
# `Endpoint` writes each reply to a file before it is used. `learn` raises one error,
# `LearningInterrupted`, whatever went wrong inside, and the error has the state.

# %% tags=["nbval-check-output"]
folder = tempfile.TemporaryDirectory()
replies = Path(folder.name) / "replies.jsonl"
quiet = replace(LIVE, conversation=replace(BRIEF, questions=0), batch=6)
quick = Patience(attempts=2, delay=0.01)
queue = trips_to_decide[:24]


def over_there():
    """A reasoner at the server, as after a restart."""
    return PromptedReasoner(Endpoint(
        url, "stand-in", cache=replies, patience=quick,
        budget=Budget(calls=100),
    ), vocabulary)


begin = State(rules=state.rules)
reasoner = over_there()
fresh = partial(SimulatedUser, traveller.rules)
try:
    learn(reasoner, fresh(), [], queue, quiet, begin)
except LearningInterrupted as interrupted:
    kept, cause = interrupted.state, interrupted.__cause__
    show(interrupted)
assert isinstance(cause, EndpointError)
kept.save(Path(folder.name) / "state.json")
print(f"kept: {len(kept.decisions)} decisions, {len(kept.batches)} batch,"
      f" {len(kept.rules)} rules; {reasoner.model.paid.calls} requests")

StandIn.works = 1000  # somebody has restarted it
kept = State.load(Path(folder.name) / "state.json")
reasoner = over_there()
after = learn(reasoner, fresh(), [], queue, quiet, kept)
print(f"resumed: {len(after.decisions)} decisions,"
      f" {reasoner.model.paid.calls} more requests")

again = over_there()
never_failed = learn(again, fresh(), [], queue, quiet, begin)
assert never_failed.decisions == after.decisions
assert never_failed.rules == after.rules
print(f"once more from the start: the same decisions and rules,"
      f" {again.model.paid.calls} requests, all from the file")

# %% tags=["hide-input"]
server.shutdown()
server.server_close()
folder.cleanup()


# %% [markdown]
# A budget works in the same way: `Budget(calls=…, tokens=…)` is checked before anything
# is sent, and what is over it raises.
#
# ### What else goes wrong
#
# A model may write anything. It is read line by line, and never run. What is no rule is
# left out, counted as a problem, and kept in `notes` for those who want to look:

# %% tags=["nbval-check-output"]
class Scripted:
    """A model that writes what it is told to."""

    def __init__(self, *replies):
        self.replies, self.usage = list(replies), Usage()

    def complete(self, prompt, *, max_tokens, stop=()):
        self.usage.calls += 1
        return self.replies.pop(0)

    def score(self, prompt, options):
        reply = self.complete(prompt, max_tokens=16)
        return votes(reply, options, self.usage)

    def score_all(self, questions):
        return [self.score(*question) for question in questions]


odd = PromptedReasoner(Scripted("""Sure! Here are the rules:
1. **Prefer vehicle train over bus.**
- for town, prefer start LATE rather than early
Prefer vehicle rocket over bus.
import shutil; shutil.rmtree("/")
""", "It depends on the weather.", "C) since it is late"), vocabulary)
written = odd.synthesise(state.history, RuleSet())
print("rules:")
show(written, "  ")
print("left out:")
show("\n".join(odd.notes), "  ")
for _ in range(2):
    decision = odd.decide(task, written)
    print("scores:", *(f"{score:.1f}" for score in decision.scores),
          "-> option", "ABC"[decision.index])
print(f"problems counted: {odd.usage.problems}, in {odd.usage.calls} calls")

# %% [markdown]
# *It depends on the weather* names no option, so all tie and the first is taken. A
# rule about rockets is well formed, and left out since no option has one: `vocabulary`
# is the names that rules may use.
#
# **Ties.** Rules may say nothing about a task. `best` then returns several options, and
# the first is taken. **Contradictions.** A user who says one thing and then another, of
# one family, leaves an empty middle: the utilities cancel, and no rule is written.
# **Silence.** A user whose patience ends is not asked again, and the loop goes on
# without reactions.

# %% tags=["nbval-check-output"]
only_seats = RuleSet.from_text("Prefer seat aisle over window.")
tied = next(t for t in trips_to_test if len(only_seats.best(t)) > 1)
print("tie:", [tied.options[at].name for at in only_seats.best(tied)],
      "-> the first:", tied.options[only_seats.decide(tied).index].name)

vehicle = Question.about_dimension("town", "vehicle", ("bus", "train"))
said_so = History()
for number, value in enumerate(["bus", "train", "bus"], start=1):
    said_so = said_so.add(vehicle, Answer(f"I prefer {value}.", value))
    found = synthesise(said_so, RuleSet(), SynthesisSettings())
    described = found.to_text() or "no rule"
    print(f"after answer {number}, {value}: {described}")

weary = replace(fresh(), patience=4)
short = learn(
    SymbolicReasoner(LIVE, 1000), weary, trips_to_talk_about,
    trips_to_decide, LIVE,
)
print(f"patience of 4: {short.turns} turns, {len(short.decisions)} decided,"
      f" {short.reactions} reactions; phase {short.phase}")

# %% [markdown]
# ### Rules that a real model wrote: TidyBot
#
# TidyBot {cite:p}`wu2023tidybot` is one of the paper's baselines, and the only one whose
# model we can hear: what text-davinci-003 wrote for its 96 rooms is recorded in its
# repository. A person shows where some things go; the model writes the rule behind it;
# other things are then placed by the rule. One room:

# %% tags=["nbval-check-output"]
recorded = data.tidybot_replies()
rooms, asks = tidybot.scenarios(), tidybot.Prompts.recorded(recorded)
spoke = RecordedReplies(recorded)
room = rooms[0]
print("shown:")
for thing_, place in room.seen:
    print(f"  {thing_} -> {place}")
print("the model's rule, and where it puts other things:")
show(tidybot.run(room, "llm-rule", asks, spoke), "  ")

# %% [markdown]
# And all 96 of them, in each of four conditions: common sense alone; the examples in the
# prompt; the rule that the model wrote; the rule that the person wrote.

# %% tags=["nbval-check-output"]
EXACT = {"zero-shot": (1751, 3840), "examples": (377, 480),
         "llm-rule": (10507, 11520), "human-rule": (5617, 5760)}
table = [["told", "placed right", "theirs, %", "mean of rooms", "exactly"]]
spoke = RecordedReplies(recorded)
for condition, (over, under) in EXACT.items():
    trials = [tidybot.run(r, condition, asks, spoke) for r in rooms]
    share = tidybot.accuracy(trials)
    quoted = paper["tidybot"].value(condition, column="accuracy")
    assert (share.numerator, share.denominator) == (over, under)
    assert round(100 * float(share), 1) == quoted
    right = sum(trial.right for trial in trials)
    every = sum(trial.asked for trial in trials)
    table.append([condition, f"{right} of {every}", f"{quoted}",
                  f"{float(share):.3f}", str(share)])
print(results.markdown_table(table))

# %% [markdown]
# To the last thing as reported, with no model asked. (A room of ten things counts as much
# as one of four.) To the same model a rule that it wrote itself is worth more than the
# examples that it wrote it from. That is the older half of the idea: what is written
# down in general words carries over. A person's own rule is better still. What TidyBot
# does not do is ask, or change a rule that was wrong.
#
# ### Kitchens
#
# KitchenAmbig could not be found, so we made kitchens of our own. Nobody's texts are in
# them. A person has hidden rules about wares and foods; nine families are met, five are
# out of distribution. These have no dimension and no value that is not met in two
# families or more: only the thing itself, its `kind`, is new. Somebody who learns *rye
# bread* knows nothing of rice. Somebody who learns *whole grain* does. Every person has
# two exceptions, both in families that are met. So the rules themselves are simpler out
# of distribution.

# %% tags=["nbval-check-output"]
parts = kitchens.draw(
    seed=1000, train=90, validation=90, test=90, strange=50
)
host = SimulatedUser(kitchens.preferences(seed=1000))
task = next(t for t in parts.train if t.family == "chocolate")
show(task.scene)
print(task.goal)
for at, option in enumerate(task.options):
    mark = "*" if host.right(task, at) else " "
    described = ", ".join(f"{d} {v}" for d, v in option.attributes.items())
    show(f"{mark} {option.name}: {described}", "  ")
print("\nhidden rules of this person:")
show(host.rules, "  ")
for name, families in {"in distribution": kitchens.KNOWN,
                       "out of it": kitchens.STRANGE}.items():
    show(f"{name}: {', '.join(f.name for f in families)}")

# %% [markdown]
# ### Mobile Manipulation
#
# Requests to a robot, from KnowNo {cite:p}`ren2023knowno` in the form of introspective
# planning {cite:p}`liang2024introplan`; most likely the set of the paper's. Each can
# mean several of twenty objects. What upstream says was meant agrees with no steady
# person, so we keep the scene and the request, describe the objects by hand, and let a
# simulated user answer. Here too what is brought is in distribution, and what is thrown
# away, stored or heated is out of it.

# %%
try:
    requests = manipulation.object_tasks()
    divided = divide(requests, manipulation.STRANGE_OBJECT_FAMILIES)
    owner = SimulatedUser(manipulation.preferences(seed=1000))
    task = next(t for t in divided.train if len(t.options) > 2)
    show(f"{task.scene} {task.goal} ({task.family})")
    for at, option in enumerate(task.options):
        mark = "*" if owner.right(task, at) else " "
        described = ", ".join(option.attributes.values())
        show(f"{mark} {option.name}: {described}", "  ")
    print(f"\nthe first of this person's {len(owner.rules)} rules:")
    show("\n".join(rule.to_text() for rule in owner.rules[:4]), "  ")
    print()
    for name, those in divided._asdict().items():
        counted = Counter(t.family for t in those)
        most = ", ".join(f for f, _ in counted.most_common(3))
        show(f"{name}: {len(those)} requests of {len(counted)} families"
             f" ({most}, …)")
except data.DataUnavailable as missing:
    show(str(missing).splitlines()[0])

# %% [markdown]
# Of AmbiK {cite:p}`ivanova2025ambik` and Housekeep {cite:p}`kant2022housekeep` we found
# no licence, so they are not part of this book. `ftlib.data` reads their files if you
# have them: `data.ambik(path)`, `data.housekeep(path)`.

# %% [markdown]
# ### One conversation, step by step
#
# A person in a kitchen, six questions, forty decisions, and a gate. Step through it, with
# the buttons, the slider or the arrow keys: what was said, which rules follow, and what
# they decide about three tasks that are never spoken of. The last two are plates and
# rice, or their like: families that never occur in the conversation. It needs no kernel;
# where scripts do not run, it is a table.

# %%
around = kitchens.draw(
    seed=1002, train=48, validation=20, test=0, strange=5
)
guest = SimulatedUser(kitchens.preferences(seed=1002))
states = []
learn(
    SymbolicReasoner(LIVE), guest, around.train[:8], around.train[8:], LIVE,
    save=states.append,
)
walkthrough(
    states, around.train[8:], LIVE,
    watched=[around.validation[0], *around.strange[:2]], right=guest.right,
)

# %% [markdown]
# ## Train it against fair baselines
#
# Nobody may take more turns than the others. A method learns from one user within a
# budget of **turns**: answers to questions, and corrections of decisions. Then it decides
# new tasks without asking. What the peers are named after are methods of other papers,
# each rebuilt from its own idea. None of them asks a language model here, so what is
# compared is what they do with what they are told. *Ask first* has CLIPR's questions.
#
# | method | stands for | its turns go into | what it keeps |
# | --- | --- | --- | --- |
# | zero-shot | zero-shot | – | nothing |
# | nearest examples | examples in the prompt | tasks that the user decides | the tasks |
# | frozen summary | TidyBot {cite:p}`wu2023tidybot` | the same | rules, once |
# | ask first | GATE {cite:p}`li2023gate` | questions | the answers as they are |
# | memory | CIPHER {cite:p}`gao2024cipher` | corrections | a rule of each, with its task |
# | reward | RLHF, a stand-in | tasks that the user decides | a Bradley–Terry reward |
# | reward, corrected | the same | corrections | the same, of all corrections |
# | rules, refitted | ours | corrections | rules, fitted anew to all corrections |
# | CLIPR | | questions | rules |
# | Adaptive-CLIPR | | questions, then corrections | rules, and nothing else |
# | hidden rules | the upper bound | – | the user's own rules |
#
# Methods that are corrected decide a stream of tasks and see which decisions are
# accepted. Such **reactions** cost the user less than a turn and are counted apart. A
# correction also says why, in a few words: *prefer material steel over glass*. So these
# methods are told more. Two controls are there for that reason: they get corrections of
# the same kind as Adaptive-CLIPR, without rules, or with rules that are fitted to all of
# them at once.
#
# Here is one seed, live: twenty users in kitchens, twelve turns of each.

# %%
turns, seed, population = 12, 0, Population()
live = {
    name: try_with_all(make, population, turns, seed)
    for name, make in methods(turns).items()
}

# %% tags=["hide-input"]
records = results.load("clipr", "cpu")
LABELS = {
    "zero-shot": "zero-shot",
    "nearest examples": "nearest examples",
    "frozen summary": "frozen summary",
    "ask first": "ask first",
    "memory": "memory",
    "reward": "reward",
    "corrected reward": "reward, corrected",
    "corrected summary": "rules, refitted",
    "CLIPR": "CLIPR",
    "Adaptive-CLIPR": "Adaptive-CLIPR",
    "hidden rules": "hidden rules",
}
FIXED = ("zero-shot", "hidden rules")


def arm_of(name, turns):
    """The name under which a method is recorded."""
    return name if name in FIXED else f"{name} {turns}"


rows = [["one seed, twelve turns", "in", "out", "turns", "reactions",
         "rules"]]
for name, found in live.items():
    same = records.select("kitchens", arm_of(name, turns))[seed].metrics
    for test in ("id", "ood"):  # ties may break otherwise elsewhere
        assert abs(found[test].value - same[test].value) < 0.05, name
    rows.append([
        LABELS[name],
        *(f"{100 * found[test].value:.0f}" for test in ("id", "ood")),
        f"{found['turns'].value:.0f}",
        f"{found['reactions'].value:.0f}",
        f"{found['rules'].value:.0f}" if found["rules"].value else "",
    ])
Markdown(results.markdown_table(rows))

# %% [markdown]
# *In* is the share of right decisions, in percent, in families that the tasks to learn
# from are of: mugs, bread. *Out* is the same in other families: plates, rice. Each user
# has 100 new tasks of either kind. This is the first of the five seeds that are recorded;
# the cell has checked that it comes out as it did then, to within five points.

# %% [markdown]
# ## Evaluate it
#
# Five seeds have twenty users each. Users are drawn apart from one another, so we take
# the hundred as the sample: intervals are over users, and comparisons are between two
# methods with the same user.
#
# ### What a turn is worth

# %% mystnb={"image": {"alt": "Four panels of right decisions against turns of the user, in kitchens. In the upper two, of methods that are told about tasks, all begin near 64 percent with six turns; the frozen summary and the reward rise to about 90 and more with 48 turns, CLIPR lies on their line and ends at 21 turns below 80, nearest examples and ask first stay below. In the lower two, of methods that are corrected, refitted rules rise to 97 percent at 18 turns, the corrected reward to 94 at 20, Adaptive-CLIPR to 90 at 23 and 92 at 31; the memory reaches 89 in distribution and 81 out of it."}} tags=["hide-input"]
ANSWERED = ("CLIPR", "frozen summary", "reward", "ask first",
            "nearest examples")
CORRECTED = ("Adaptive-CLIPR", "corrected reward", "corrected summary",
             "memory")
STYLE = {name: plots.arm_style(i)
         for i, name in enumerate((*ANSWERED, *CORRECTED))}
TESTS = {"id": "in distribution", "ood": "out of distribution"}


def each(experiment, arm, test):
    """The share right of every user, in percent: (users,)."""
    return 100 * by_person(records.select(experiment, arm), test)


def average(experiment, arm, metric):
    """The mean of a metric over seeds."""
    return records.select(experiment, arm).values(metric).mean()


def curve(ax, world, name, test):
    """Draw a method's accuracy against the turns that it used."""
    arms = [f"{name} {turns}" for turns in BUDGETS]
    x = [average(world, arm, "turns") for arm in arms]
    found = [results.bootstrap(each(world, arm, test)) for arm in arms]
    mean, low, high, _ = zip(*found, strict=True)
    ax.plot(x, mean, label=LABELS[name], **STYLE[name])
    ax.fill_between(x, low, high, color=STYLE[name]["color"], alpha=0.13,
                    linewidth=0)


def curves(world):
    """All methods: rows by what their turns go into, columns by test."""
    fig, axes = plt.subplots(2, 2, figsize=(7.2, 6), sharex=True,
                             sharey=True)
    for row, names in zip(axes, (ANSWERED, CORRECTED), strict=True):
        for ax, (test, title) in zip(row, TESTS.items(), strict=True):
            for name in names:
                curve(ax, world, name, test)
            ax.axhline(each(world, "zero-shot", test).mean(), color="grey",
                       linewidth=1, linestyle=":")
            ax.set_title(title, fontsize=9)
        row[0].set_ylabel("right decisions (%)")
        row[1].legend(fontsize=8, loc="lower right")
    for ax in axes[1]:
        ax.set_xlabel("turns of the user")
    plt.show()


curves("kitchens")

# %% [markdown]
# Above are methods that are told about tasks and things, below those that are told
# where they were wrong. The dotted line is the first option, whatever it is. Many lines
# end before the budget does. A conversation ends by itself when next to nothing is left
# to learn about its 24 tasks; who is corrected has no more than 144 tasks to be wrong in
# (Adaptive-CLIPR 120, after the 24). Then *at most 24 turns* is 18 or 20.
#
# The same in Mobile Manipulation, with tasks that others have written
# {cite:p}`ren2023knowno,liang2024introplan` and users that are ours. All users have the
# same 45 and 112 test tasks here, so the intervals hold for other users and not for other
# tasks.

# %% mystnb={"image": {"alt": "The same four panels in Mobile Manipulation. In the upper two the reward leads with 91 and 95 percent at 48 turns, and CLIPR ends near 77 and 87 percent with 20 turns, with ask first close to it. In the lower two the corrected reward leads with 93 and 96 percent from 11 turns on; Adaptive-CLIPR, the memory and refitted rules lie close together near 90 and 93 percent."}} tags=["hide-input"]
curves("manipulation")

# %% tags=["hide-input"]
WORLDS = {"kitchens": "kitchens", "manipulation": "manipulation"}


def shown(found, digits=1):
    """A mean with its interval."""
    m, low, high = (
        f"{x:.{digits}f}".replace("-", "−") for x in found[:3]
    )
    return f"{m} [{low}, {high}]"


rows = [["at most 24 turns",
         *(f"{w}, {t}" for w in WORLDS for t in ("in", "out"))]]
for name, label in LABELS.items():
    rows.append([label, *(
        shown(results.bootstrap(each(w, arm_of(name, MAIN_BUDGET), t)))
        for w in WORLDS for t in TESTS
    )])
Markdown(results.markdown_table(rows))


# %% [markdown]
# User by user: CLIPR minus another method, at most 12 turns each, and Adaptive-CLIPR
# minus another method, at most 24 turns each, in points.

# %% tags=["hide-input"]
def gap(world, arm, other, test):
    """One arm minus another, user by user, in points."""
    return results.paired_by_item(each(world, arm, test),
                                  each(world, other, test)).difference


def gaps(name, turns, others):
    """A table of differences."""
    rows = [[f"{name}, {turns} turns, minus …",
             *(f"{w}, {t}" for w in WORLDS for t in ("in", "out"))]]
    for other in others:
        rows.append([LABELS[other], *(
            shown(gap(w, f"{name} {turns}", arm_of(other, turns), t))
            for w in WORLDS for t in TESTS
        )])
    return results.markdown_table(rows)


Markdown(
    gaps("CLIPR", 12, [n for n in ANSWERED if n != "CLIPR"]) + "\n\n"
    + gaps("Adaptive-CLIPR", 24,
           [n for n in (*CORRECTED, *ANSWERED) if n != "Adaptive-CLIPR"])
)


# %% tags=["hide-input"]
def pc(world, arm, test="id"):
    """A mean over users, in percent."""
    return f"{each(world, arm, test).mean():.1f} %"


def by(world, arm, other, test="id"):
    """One arm minus another, with its interval."""
    return shown(gap(world, arm, other, test)) + " points"


def across(one, other, test="id"):
    """The same between experiments, each (experiment, arm)."""
    found = results.paired_by_item(each(*one, test), each(*other, test))
    return shown(found.difference) + " points"


K, M = "kitchens", "manipulation"
A24, C12 = "Adaptive-CLIPR 24", "CLIPR 12"
MUTE = ("feedback", "no reasons")
MUTE_REWARD = ("feedback", "corrected reward, no reasons")
Markdown(
    f"""
**A few answers are enough to be far from chance.** In kitchens the first
option is right in {pc(K, 'zero-shot')}. Six answers bring CLIPR to
{pc(K, 'CLIPR 6')}, twelve to {pc(K, C12)}, Adaptive-CLIPR with at most 24
turns to {pc(K, A24)}.

**What is learnt carries over.** Out of distribution CLIPR has
{pc(K, C12, 'ood')} with twelve turns and Adaptive-CLIPR
{pc(K, A24, 'ood')} with 24, no less than in distribution. So it should be:
in these kitchens a rule for all families is right in the new ones, and all
exceptions are in known families. The memory, which looks up what was said
about the most similar tasks, has {pc(K, 'memory 48')} in distribution with
its largest budget and {pc(K, 'memory 48', 'ood')} out of it. But carrying
over is no privilege of rules: the plain reward does it as well
({pc(K, 'reward 24')} and {pc(K, 'reward 24', 'ood')}).

**Well-chosen questions are worth no more than decided tasks.** With twelve
turns CLIPR is {by(K, C12, 'frozen summary 12')} from the frozen summary and
{by(K, C12, 'reward 12')} from the reward; out of distribution the reward is
ahead ({by(K, C12, 'reward 12', 'ood')}), and in Mobile Manipulation in
distribution too ({by(M, C12, 'reward 12')}). After trials we expected all
differences in kitchens within three points; before them we would have said
five for CLIPR.

**Being told where one is wrong, and why, is worth most.** In kitchens the
corrected reward is {by(K, 'corrected reward 24', 'reward 24')} ahead of the
plain one, refitted rules are {by(K, 'corrected summary 24',
'frozen summary 24')} ahead of the frozen summary, and Adaptive-CLIPR is
{by(K, A24, 'reward 24')} ahead of the plain reward. It takes over a hundred
reactions. And it takes reasons: without them Adaptive-CLIPR is level with
the plain reward ({across(MUTE, (K, 'reward 24'))}). The corrected reward
keeps most of its lead without ({across(MUTE_REWARD, (K, 'reward 24'))}).

**Adaptive-CLIPR makes less of it than others do.** We expected it first
with 24 turns, and the reward with the same feedback within three points.
It is behind: {by(K, A24, 'corrected reward 24')}, in Mobile Manipulation
{by(M, A24, 'corrected reward 24')}.

**The form of rules is not to blame.** Fitted to all corrections at once,
rules are right in {pc(K, 'corrected summary 24')} of the kitchens' tasks
and {pc(K, 'corrected summary 24', 'ood')} out of distribution, with
{average(K, 'corrected summary 24', 'turns'):.0f} turns: above every other
method. (Mind that these users' preferences are rules of just this form. In
Mobile Manipulation refitted rules are level with Adaptive-CLIPR in
distribution, {by(M, 'corrected summary 24', A24)}, and ahead out of it,
{by(M, 'corrected summary 24', A24, 'ood')}; the corrected reward, which
rounds nothing, is best.) What Adaptive-CLIPR lacks may be the old
corrections, of which it keeps only its rules, or the rest of each: it
learns from the reason alone, and a fit from both whole options as well. We
did not take the two apart.
"""
)

# %% [markdown]
# ### What a decision costs
#
# CLIPR's paper counts calls of a model. Here is what each method would ask of one: calls
# to learn, calls for a decision, and the tokens of the prompt in which a decision is
# asked for, estimated at four characters each. Of the calls to learn, one for each
# reaction is left out, for that decision would have been made anyway. Reading all that
# was said costs more with every turn. Reading rules costs far less, and grows slowly.

# %% tags=["hide-input"]
decisions = 1000


def calls(name, turns, decisions, world="kitchens"):
    """Calls of a model in all."""
    arm = arm_of(name, turns)
    return (average(world, arm, "learning calls")
            + decisions * average(world, arm, "calls"))


rows = [["24 turns, kitchens", "turns", "reactions", "calls to learn",
         "calls a decision", f"calls for {decisions:,}",
         "tokens a decision"]]
for name, label in LABELS.items():
    arm = arm_of(name, MAIN_BUDGET)
    if name in ("reward", "corrected reward", "hidden rules"):
        continue  # no model reads anything
    rows.append([
        label,
        *(f"{average('kitchens', arm, m):.0f}"
          for m in ("turns", "reactions", "learning calls", "calls")),
        f"{calls(name, MAIN_BUDGET, decisions):,.0f}",
        f"{average('kitchens', arm, 'tokens'):,.0f}",
    ])
Markdown(results.markdown_table(rows))

# %% mystnb={"image": {"alt": "Two panels with accuracy out of distribution, in kitchens, one line a method, from 6 to 48 turns. Left, against calls of a model to learn: nearest examples take none and the frozen summary one, CLIPR, Adaptive-CLIPR, ask first and refitted rules 5 to 28, the memory 20 to 176. Right, against tokens read for a decision: methods with rules climb steeply from 280 to 550 tokens and from 64 to 97 percent; nearest examples and ask first rise slowly, to 3,500 and 1,250 tokens, and end below 80 percent; the memory stays at 207 tokens."}} tags=["hide-input"]
READ = [n for n in STYLE if n not in ("reward", "corrected reward")]
PRICES = {
    "learning calls": ("calls of a model to learn", "symlog",
                       (0, 1, 10, 100)),
    "tokens": ("tokens read for a decision", "log", (200, 500, 1000, 3000)),
}
fig, axes = plt.subplots(1, 2, figsize=(7.2, 4.2), sharey=True)
for ax, (metric, (label, scale, ticks)) in zip(
    axes, PRICES.items(), strict=True
):
    for name in READ:
        arms = [f"{name} {turns}" for turns in BUDGETS]
        ax.plot([average("kitchens", arm, metric) for arm in arms],
                [each("kitchens", arm, "ood").mean() for arm in arms],
                label=LABELS[name], **STYLE[name])
    ax.set(xscale=scale, xlabel=label)
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.minorticks_off()
axes[0].set_ylabel("right, out of distribution (%)")
fig.legend(*axes[0].get_legend_handles_labels(), ncols=4, fontsize=8,
           loc="outside upper center")
plt.show()

# %% tags=["hide-input"]
saved = 1 - calls("CLIPR", 24, decisions) / calls("memory", 24, decisions)
saved_learning = 1 - (average(K, "CLIPR 48", "learning calls")
                      / average(K, "memory 48", "learning calls"))
fewer_tokens = 1 - (average(K, "Adaptive-CLIPR 24", "tokens")
                    / average(K, "nearest examples 24", "tokens"))
Markdown(
    f"""
**Calls.** For {decisions:,} decisions CLIPR asks the model
{calls('CLIPR', 24, decisions):,.0f} times and the memory
{calls('memory', 24, decisions):,.0f} times: {saved:.0%} fewer. Against the
others it saves none; it takes some twenty calls to learn, the frozen
summary one. We expected half at most, and it is half and a little, since
the memory needs two calls for each decision while it learns as well.
Counted so, {fewer:g} % would take a peer that asks a model some seventeen
times for each decision. Counted until learning ends, and with the largest
budget, CLIPR saves {saved_learning:.0%} of the memory's calls. What the
paper counts we do not know.

**Tokens.** Here is what rules do save. With 24 turns Adaptive-CLIPR reads
{average(K, 'Adaptive-CLIPR 24', 'tokens'):,.0f} tokens for a decision, of
which {average(K, 'zero-shot', 'tokens'):,.0f} are the task itself; with all
examples in the prompt it would be
{average(K, 'nearest examples 24', 'tokens'):,.0f}, so {fewer_tokens:.0%}
are saved, and with the conversation as it was
{average(K, 'ask first 24', 'tokens'):,.0f}. The frozen summary saves as
much. (The memory's column has the call that decides. The other one, which
merges what was looked up, comes on top.)

**Turns.** In kitchens CLIPR's own conversation ends after
{average(K, 'CLIPR 48', 'turns'):.0f} turns, when next to nothing is left to
learn about its own 24 tasks, at {pc(K, 'CLIPR 48')}. To know when one knows
enough is worth something to the person; here it ends too early.
Adaptive-CLIPR with {average(K, A24, 'turns'):.0f} turns is level with the
plain reward with 48 ({by(K, A24, 'reward 48')}): half the turns, for
{average(K, A24, 'reactions'):.0f} reactions and the reasons.
"""
)

# %% [markdown]
# ### Rules that change hands
#
# Rules are words, so whoever reads can use them. First TidyBot's 96 rooms. A large model
# wrote a rule for each; here a small one reads them, SmolLM2 with 135 million weights.
# It is asked place by place whether a thing goes there, and the place with the highest
# probability of *yes* is taken; *calibrated* is by how much the rule raises it. Beside
# it are two methods with word embeddings and no language model.

# %% tags=["hide-input"]
WORDS = "tidybot words smollm2-135m"
ROOMS = {
    "the large model, no rule": ("tidybot", "zero-shot, unseen"),
    "the large model, examples": ("tidybot", "examples, unseen"),
    "the large model, its rule": ("tidybot", "llm-rule, unseen"),
    "the large model, the person's rule": ("tidybot", "human-rule, unseen"),
    "SmolLM2, no rule": (WORDS, "no rule"),
    "SmolLM2, the large model's rule": (WORDS, "rule"),
    "the same, calibrated": (WORDS, "rule, calibrated"),
    "embeddings: most similar thing": (WORDS, "nearest seen"),
    "embeddings: most similar place": (WORDS, "nearest name"),
}
rows = [["who, told what", "placed right, %", "rooms"]]
for label, (experiment, arm) in ROOMS.items():
    shares = each(experiment, arm, "accuracy")
    rows.append([label, shown(results.bootstrap(shares)), len(shares)])
Markdown(results.markdown_table([[str(x) for x in row] for row in rows]))

# %% [markdown]
# Then kitchens: rules that were learnt without a model from twelve questions, read by
# others than the one that wrote them. These are five users only, with a dozen tasks of
# either kind each, for SmolLM2 takes a second or more for each decision here.

# %% tags=["hide-input"]
HANDED = "reasoners smollm2-135m"
READERS = {
    "symbolic": "the rules' own reading",
    "embeddings": "embeddings",
    "by letter": "SmolLM2, by letter",
    "by name": "SmolLM2, by name",
    "by name, no rules": "SmolLM2, by name, no rules",
    "by name, calibrated": "SmolLM2, by name, calibrated",
    "one by one": "SmolLM2, one by one",
    "one by one, no rules": "SmolLM2, one by one, no rules",
    "one by one, calibrated": "SmolLM2, one by one, calibrated",
    "alone": "SmolLM2 asks, writes and decides",
}
rows = [["reader", "in", "out", "tokens a decision"]]
for arm, label in READERS.items():
    rows.append([
        label,
        *(shown(results.bootstrap(each(HANDED, arm, t)), 0) for t in TESTS),
        f"{average(HANDED, arm, 'tokens'):,.0f}",
    ])
Markdown(results.markdown_table(rows))


# %% tags=["hide-input"]
def read_by(arm, test="id"):
    return f"{each(HANDED, arm, test).mean():.0f} %"


def placed(experiment, arm):
    return f"{each(experiment, arm, 'accuracy').mean():.0f} %"


def more(experiment, arm, other, test):
    return shown(results.paired_by_item(each(experiment, arm, test),
                                        each(experiment, other, test))
                 .difference)


alone = records.select(HANDED, "alone")
wrote = alone.values("rules").sum()
bad = alone.values("learning problems").sum()
Markdown(
    f"""
**A large model reads rules.** By its own it places
{placed("tidybot", "llm-rule, unseen")} right, by a person's
{placed("tidybot", "human-rule, unseen")}. With the examples in place of a
rule it has {placed("tidybot", "examples, unseen")}, no more than word
embeddings that put each thing where the most similar one lies
({placed(WORDS, "nearest seen")}). What is above both is the written rule.

**SmolLM2 does not**, as far as this can tell. In TidyBot's rooms the
rule changes the share that SmolLM2 places right by {more(WORDS, "rule",
"no rule", "accuracy")} points as it is and by {more(WORDS,
"rule, calibrated", "no rule", "accuracy")} calibrated. In kitchens the
rules' own reading is right in {read_by("symbolic")} in distribution,
embeddings in {read_by("embeddings")}, SmolLM2 by letter in
{read_by("by letter")}. One by one, calibrated, it has
{read_by("one by one, calibrated")},
{more(HANDED, "one by one, calibrated", "one by one, no rules", "id")}
points more than without rules, which five users cannot tell from nothing.
Left alone it wrote {wrote:g} readable rules, and {bad:g} lines that are
none.

So rules change hands as far as the hands can read. Between two different
large models we have measured nothing.
"""
)

# %% [markdown]
# ### From rules to weights
#
# Rules can be carried in the prompt of every decision, or put into weights once. The
# rules from twelve questions label tasks that nobody was asked about, and a small model
# learns from the labels, with a LoRA adapter for this user
# {cite:p}`hu2022lora`. The student is `stories15m`, whose 15 million weights know
# stories for children. It reads one option at a time; with
# $s_j = \log p(\text{yes} \mid \text{request, option } j)$ the loss is
#
# $$
# -\sum_j q_j \log \frac{e^{s_j}}{\sum_k e^{s_k}} ,
# $$
#
# where $q$ is 1 at the option that the rules take, and is shared out if several are
# equally good. For two options this is Bradley and Terry's model again, with a language
# model for its utility. Tasks about which the rules are silent are left out.
#
# Beside it: the student with the rules in its prompt; tuned on twelve choices of the
# user, as many turns as the questions took; and taught by the hidden rules, which is
# what it can learn at all.

# %% mystnb={"image": {"alt": "Two panels of right decisions, in and out of distribution, one row for each way to use rules and a point for each of ten users. Untrained and with rules in its prompt the student is near 36 to 49 percent. Tuned on twelve choices it is near 70, taught by learnt rules near 75, which is where the learnt rules themselves are, and taught by hidden rules near 84. Users differ by twenty points and more."}} tags=["hide-input"]
TAUGHT = "distillation stories15m"
STUDENTS = {
    "student, untrained": "student, untrained",
    "rules in the prompt": "rules in its prompt",
    "taught by own choices": "tuned on 12 choices",
    "taught by learnt rules": "taught by learnt rules",
    "learnt rules, symbolic": "the learnt rules themselves",
    "taught by hidden rules": "taught by hidden rules",
}
fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.1), sharex=True, sharey=True)
for ax, (test, title) in zip(axes, TESTS.items(), strict=True):
    for row, arm in enumerate(STUDENTS):
        values = each(TAUGHT, arm, test)
        m, low, high, _ = results.bootstrap(values)
        style = plots.arm_style(row)
        ax.scatter(values, np.full(len(values), row), s=16, alpha=0.5,
                   color=style["color"], linewidths=0,
                   marker=style["marker"])
        ax.errorbar(m, row, xerr=[[m - low], [high - m]],
                    fmt=style["marker"], color=style["color"], markersize=6,
                    markeredgecolor="black")
    ax.set(xlabel="right decisions (%)")
    ax.set_title(title, fontsize=9)
axes[0].set_yticks(range(len(STUDENTS)), STUDENTS.values())
axes[0].invert_yaxis()
plt.show()

# %% tags=["hide-input"]
rows = [["", "in", "out", "as the rules, in", "as the rules, out",
         "tokens a decision"]]
for arm, label in STUDENTS.items():
    rows.append([
        label,
        *(shown(results.bootstrap(each(TAUGHT, arm, t)), 0) for t in TESTS),
        *(f"{each(TAUGHT, arm, f'agreement {t}').mean():.0f}"
          for t in TESTS),
        f"{average(TAUGHT, arm, 'tokens'):,.0f}"
        if "symbolic" not in arm else "",
    ])
Markdown(results.markdown_table(rows))


# %% tags=["hide-input"]
def taught(arm, test="id"):
    return f"{each(TAUGHT, arm, test).mean():.0f} %"


less = 1 - (average(TAUGHT, "taught by learnt rules", "tokens")
            / average(TAUGHT, "rules in the prompt", "tokens"))
seconds = average(TAUGHT, "taught by learnt rules", "learn")
trained = average(TAUGHT, "taught by learnt rules", "trained")
students = records.select(TAUGHT, "taught by learnt rules")
n_users = len(each(TAUGHT, "taught by learnt rules", "id"))
Markdown(
    f"""
**In the prompt they are lost on it.** With rules the student is right in
{taught("rules in the prompt")}, without in {taught("student, untrained")},
and chance is about that. Out of distribution they even do harm
({shown(gap(TAUGHT, "rules in the prompt", "student, untrained",
"ood"))} points). It knows stories.

**In the weights they are not.** Taught by
{students.values("lessons").mean():.0f} tasks that learnt rules labelled, it
is right in {taught("taught by learnt rules")} in distribution and
{taught("taught by learnt rules", "ood")} out of it, where the rules
themselves have {taught("learnt rules, symbolic")} and
{taught("learnt rules, symbolic", "ood")}. We expected it ten points below
them out of distribution; it is level
({shown(gap(TAUGHT, "taught by learnt rules", "learnt rules, symbolic",
            "ood"))} points). It decides as they do in
{taught("taught by learnt rules", "agreement id")} and
{taught("taught by learnt rules", "agreement ood")} of the tasks, and where
the two differ neither is right much more often. Nobody is asked for any of
it: {trained:,.0f} weights in {seconds:.0f} seconds of one core for a
user.

**Tokens.** Its decisions read {less:.0%} less than with rules in the
prompt: {average(TAUGHT, "taught by learnt rules", "tokens"):.0f} against
{average(TAUGHT, "rules in the prompt", "tokens"):.0f} tokens. (We had
expected that no more than a third would be left. Each option is a call of
its own, with rules two, for the reading without them is subtracted.)

**The limit is the rules, and then the student.** Hidden rules teach it
{taught("taught by hidden rules")}. And rules are not the only way into the
weights: tuned on the user's own twelve choices it has
{taught("taught by own choices")} and
{taught("taught by own choices", "ood")}; the student of the rules is
{shown(gap(TAUGHT, "taught by learnt rules", "taught by own choices",
           "id"))} points ahead in distribution. With ten users that is no
difference; we expected ten points and more. What rules have on top is that
they can be read, mended, and handed on. These are {n_users} users with 40
tasks of either kind each: few, and the intervals say so.
"""
)

# %% [markdown]
# ## Turn one knob
#
# ### The gate, the reasons, the conversation
#
# Adaptive-CLIPR with 24 turns, with one part at a time taken away or turned up:

# %% tags=["hide-input"]
PARTS = {
    "Adaptive-CLIPR": "Adaptive-CLIPR",
    "gate always open": "gate always open",
    "no conversation": "no conversation",
    "no reasons": "corrections without reasons",
}
rows = [["", "in", "out", "turns", "in, minus the first", "out, minus"]]
for arm, label in PARTS.items():
    rows.append([
        label,
        *(f"{each('feedback', arm, t).mean():.1f}" for t in TESTS),
        f"{average('feedback', arm, 'turns'):.1f}",
        *("" if arm == "Adaptive-CLIPR"
          else shown(gap("feedback", arm, "Adaptive-CLIPR", t))
          for t in TESTS),
    ])
Markdown(results.markdown_table(rows))

# %% tags=["hide-input"]
without_reasons = results.paired_by_item(
    each("feedback", "corrected reward, no reasons", "id"),
    each(K, "corrected reward 24", "id"),
)
Markdown(
    f"""
Reasons are what matters: without them a correction says that one option is
better, and not why ({by('feedback', 'no reasons', 'Adaptive-CLIPR')} in
distribution). Our users always know why, and say it in the very words that
rules are made of; real people may not. The reward loses less without
reasons ({shown(without_reasons.difference)} points).

The gate changes nothing at this budget. Open after every batch, it uses
{average('feedback', 'gate always open', 'turns'):.1f} turns, and with its
tests {average('feedback', 'Adaptive-CLIPR', 'turns'):.1f}: at the accuracy
that 24 turns buy, it has every reason to be open. And the conversation
before the first decision buys nothing either
({by('feedback', 'no conversation', 'Adaptive-CLIPR')} without it, with
{average('feedback', 'no conversation', 'turns'):.1f} turns). All three are
as we expected.
"""
)

# %% [markdown]
# ### Poor rules to begin with
#
# The paper is said to show that CLIPR recovers from a poor set of rules. We begin with
# nothing, with another person's rules, and with the user's own rules turned around,
# each as trusted as rules with three answers behind them. They are then kept as they
# are (dotted lines), or there is a conversation of twelve turns, or the gate with 24, or
# both: that is Adaptive-CLIPR.

# %% mystnb={"image": {"alt": "Accepted decisions by batch of eight, from three sets of rules to begin with. With the gate alone nothing and another's rules begin near 45 percent and inverted ones near 8; after ten batches the first two are at about 87 percent and the last at 82. With a conversation before, all begin between 62 and 72 percent and the inverted ones stay some five points below."}} tags=["hide-input"]
STARTS = ("nothing", "another's", "inverted")
VARIANTS = {"gate": "gate alone", "both": "conversation and gate"}


def accepted(experiment, arm):
    """The share of accepted decisions by batch, in percent: (batches,)."""
    found = [
        [m.value for name, m in r.metrics.items()
         if name.startswith(f"{PACKED_PREFIX}accepted/")]
        for r in records.select(experiment, arm)
    ]
    return 100 * np.mean(found, axis=0)


fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.4), sharey=True)
for ax, (variant, title) in zip(axes, VARIANTS.items(), strict=True):
    for i, start in enumerate(STARTS):
        share = accepted("recovery", f"{start}, {variant}")
        ax.plot(np.arange(1, len(share) + 1), share, label=start,
                **plots.arm_style(i))
        kept = each("recovery", f"{start}, kept", "id").mean()
        ax.axhline(kept, color=plots.colour(i), linewidth=1, linestyle=":")
    ax.set(xlabel="batch of 8 decisions")
    ax.set_title(title, fontsize=9)
axes[0].set_ylabel("accepted decisions (%)")
axes[1].legend(title="begun with", title_fontsize=9)
plt.show()

# %% tags=["hide-input"]
HOW = {"kept": "kept", "conversation": "conversation", "gate": "gate",
       "both": "both"}
rows = [["begun with", *(f"{how}, {t}" for how in ("kept", "conversation")
                         for t in ("in", "out")), "gate, in / out",
         "both, in / out"]]
for start in STARTS:
    cell = {
        (how, t): each("recovery", f"{start}, {how}", t).mean()
        for how in HOW for t in TESTS
    }
    rows.append([
        start,
        *(f"{cell[how, t]:.1f}" for how in ("kept", "conversation")
          for t in TESTS),
        *(f"{cell[how, 'id']:.1f} / {cell[how, 'ood']:.1f}"
          for how in ("gate", "both")),
    ])
Markdown(results.markdown_table(rows))

# %% tags=["hide-input"]
Markdown(
    f"""
**It recovers, and not quite.** Rules turned around are right in
{pc('recovery', 'inverted, kept')}, far below chance. Adaptive-CLIPR comes
from them to {pc('recovery', 'inverted, both')}, and from nothing to
{pc('recovery', 'nothing, both')}
({by('recovery', 'inverted, both', 'nothing, both')}; out of distribution
{by('recovery', 'inverted, both', 'nothing, both', 'ood')}). With the gate
alone it is {by('recovery', 'inverted, gate', 'nothing, gate')}, and out of
distribution {by('recovery', 'inverted, gate', 'nothing, gate', 'ood')}. We
expected a difference of five points at most. A wrong rule that was trusted
is first given exceptions, family by family, and goes only when as many
answers are against it as for it. In families that nobody spoke of it is
still there.

**Another person's rules do some harm**
({by('recovery', "another's, both", 'nothing, both')}; out of distribution
{by('recovery', "another's, both", 'nothing, both', 'ood')}), and no good.

**A conversation alone does not repair** inverted rules
({pc('recovery', 'inverted, conversation')} against
{pc('recovery', 'nothing, conversation')} from nothing): wrong rules stay
that nobody spoke about. As expected.
"""
)

# %% [markdown]
# ### Users as they are
#
# A user may err, tire or change. *Changes* becomes another person after 60 reactions,
# and is tested as that person; those who get no reactions have learnt from the first
# one alone.

# %% mystnb={"image": {"alt": "Two panels, in and out of distribution: seven methods with ideal users, users who err in a tenth and in a fifth of what they say, users who fall silent after six turns, and users who change. Errors cost every method; refitted rules and the corrected reward stay on top with 84 to 98 percent. With six turns all are between 62 and 73 percent. After a change the corrected reward and refitted rules are near 73 to 76 percent, Adaptive-CLIPR and the memory near 50 to 56, the others at chance."}} tags=["hide-input"]
TEMPERS = ("ideal", "a tenth wrong", "a fifth wrong", "silent after 6",
           "changes")
TRIED = ("Adaptive-CLIPR", "corrected reward", "corrected summary",
         "memory", "CLIPR", "frozen summary", "reward")


def tempered(name, temper):
    """Experiment and arm of a method with users of a temper, 24 turns."""
    if temper == "ideal":
        return "kitchens", f"{name} {MAIN_BUDGET}"
    return "tempers", f"{name}, {temper}"


fig, axes = plt.subplots(2, 1, figsize=(7.2, 6), sharex=True)
for ax, (test, title) in zip(axes, TESTS.items(), strict=True):
    for i, name in enumerate(TRIED):
        style = STYLE[name]
        for x, temper in enumerate(TEMPERS):
            m, low, high, _ = results.bootstrap(
                each(*tempered(name, temper), test))
            ax.errorbar(
                x + (i - 3) * 0.1, m, [[m - low], [high - m]],
                color=style["color"], marker=style["marker"], markersize=5,
                markeredgecolor="black", markeredgewidth=0.6,
                label=LABELS[name] if x == 0 else None,
            )
    ax.set(ylabel=f"right, {title} (%)")
    ax.grid(axis="x", visible=False)
axes[1].set_xticks(range(len(TEMPERS)), TEMPERS)
fig.legend(*axes[0].get_legend_handles_labels(), ncols=4, fontsize=8,
           loc="outside upper center")
plt.show()


# %% tags=["hide-input"]
def lost(name, temper, test="id"):
    """Points that a temper costs a method."""
    found = results.paired_by_item(
        each(*tempered(name, "ideal"), test),
        each(*tempered(name, temper), test),
    )
    return shown(found.difference)


def of(name, temper, test="id"):
    """A method's accuracy with users of a temper."""
    return pc(*tempered(name, temper), test)


Markdown(
    f"""
**Errors.** With a fifth of all that is said wrong Adaptive-CLIPR loses
{lost('Adaptive-CLIPR', 'a fifth wrong')} points, CLIPR
{lost('CLIPR', 'a fifth wrong')}, the reward
{lost('reward', 'a fifth wrong')} and the corrected one
{lost('corrected reward', 'a fifth wrong')}. We expected ten or more of the
first, and less of the rewards, which weigh all answers together; the plain
one loses as much.

**Silence.** With six turns nobody knows much. Adaptive-CLIPR falls back to
what CLIPR has ({of('Adaptive-CLIPR', 'silent after 6')} and
{of('CLIPR', 'silent after 6')}), for its six turns went into questions; the
corrected reward, which began with corrections, has
{of('corrected reward', 'silent after 6')}.

**Change.** Who learns once is back at chance. Adaptive-CLIPR comes to
{of('Adaptive-CLIPR', 'changes')} in distribution and
{of('Adaptive-CLIPR', 'changes', 'ood')} out of it: by the time of the
change most of its turns are spent, and old rules with many answers behind
them give way slowly. The corrected reward, which had spent fewer, comes to
{of('corrected reward', 'changes')} and
{of('corrected reward', 'changes', 'ood')}. Nobody comes back to where they
were. That much we expected; not that old answers, kept for good, would hurt
less than old rules.
"""
)

# %% [markdown]
# ## Paper beside ours
#
# ### What there is to compare with

# %% tags=["hide-input"]
UNKNOWN = {
    "AmbiK": "the split; which of its requests; who played the user",
    "Housekeep": "how rankings of places became choices; of how many"
    " places; whose answer is right (its annotators cannot be told apart)",
    "Mobile Manipulation": "whether what upstream says was meant is the"
    " right answer; how many options",
    "KitchenAmbig, out of distribution": "the set itself; what is strange"
    " about it",
    "KitchenAmbig, in distribution": "the set itself",
}
rows = [["data set", "theirs, %", "not known"]]
for (name,), (value,) in reported.rows.items():
    rows.append([name, f"{value:g}", UNKNOWN[name]])
Markdown(
    f"""
{results.markdown_table(rows)}

Of all five we do not know the variant (CLIPR or Adaptive-CLIPR), the model,
the number of questions, the seeds, nor a single number of a baseline. Of
the up to {fewer:g} % fewer calls we do not know fewer than what: a summary
ties it to baselines that need several rounds of feedback. Of the about
{gain:g} % more accuracy we do not know whether it is points or parts. Of
the study with {asked_people:g} people we know the number of people.
"""
)

# %% [markdown]
# One of these invites a conclusion that should not be drawn. The number on Housekeep
# looks low, and it may well be high: in a room with many places people mostly name
# different best ones. Without the number of options an accuracy says little. We give the chance level beside each of ours.
#
# And one of them is odd: on KitchenAmbig the number out of distribution is *above* the
# one in distribution. It may be that those tasks are easier, or that the gate has
# learned more by then, or that the numbers belong to different variants. We cannot tell.

# %% [markdown]
# Ours, on other tasks, with simulated users and without a large model. The two columns
# are no comparison; they are side by side so that nobody has to look for them.

# %% tags=["hide-input"]
values = {name: value for (name,), (value,) in reported.rows.items()}
rows = [["", "theirs, %", "ours: Adaptive-CLIPR, 24 turns, %", "chance"]]
for label, name, (world, test) in (
    ("kitchens, in", "KitchenAmbig, in distribution", (K, "id")),
    ("kitchens, out", "KitchenAmbig, out of distribution", (K, "ood")),
    ("Mobile Manipulation, in", "Mobile Manipulation", (M, "id")),
    ("Mobile Manipulation, out", None, (M, "ood")),
):
    rows.append([
        label, f"{values[name]:g}" if name else "",
        shown(results.bootstrap(each(world, A24, test))),
        f"{each(world, 'zero-shot', test).mean():.0f}",
    ])
Markdown(results.markdown_table(rows))

# %% [markdown]
# *Chance* is the first option. Ours on Mobile Manipulation being higher than theirs says
# nothing: our users are steady, and what upstream says was meant is not.
#
# ### The verdicts

# %% tags=["hide-input"]
verdicts = [
    ["", "claim", "here", "measured"],
    ["clipr‑1", "Latent preferences are inferred from a few"
     " conversations",
     "**holds**, with users whose preferences are rules",
     f"Chance {pc(K, 'zero-shot')}; twelve answers {pc(K, C12)}, at most 24"
     f" answers and corrections {pc(K, A24)}; Mobile Manipulation"
     f" {pc(M, 'zero-shot')}, {pc(M, C12)} and {pc(M, A24)}. With a fifth"
     f" of all answers wrong {of('Adaptive-CLIPR', 'a fifth wrong')}."],
    ["clipr‑2", "What is learned transfers to new tasks",
     "**holds**, and not for rules alone",
     f"In families never met {pc(K, A24, 'ood')}, in those met"
     f" {pc(K, A24)}; the reward's {pc(K, 'reward 24', 'ood')} and"
     f" {pc(K, 'reward 24')}. A memory of corrections falls to"
     f" {pc(K, 'memory 24', 'ood')} from {pc(K, 'memory 24')}. After"
     " inverted rules a scar stays out of distribution."],
    ["clipr‑3", "Ahead of its peers on three data sets",
     "**not here**; their data sets could not be had",
     "In kitchens, with twelve turns, CLIPR minus frozen summary"
     f" {by(K, C12, 'frozen summary 12')}, minus reward"
     f" {by(K, C12, 'reward 12')}. Adaptive-CLIPR is ahead of all that are"
     " not corrected, and of the memory"
     f" ({by(K, A24, 'memory 24')}), thanks to reasons; it is behind a"
     " reward with corrections of the same kind"
     f" ({by(K, A24, 'corrected reward 24')}). In Mobile Manipulation it"
     f" is level with the memory ({by(M, A24, 'memory 24')}) and, out of"
     " distribution, with the plain reward"
     f" ({by(M, A24, 'reward 24', 'ood')})."],
    ["clipr‑4", "Fewer interactions, lower inference cost",
     "**in part**",
     f"Calls for {decisions:,} decisions: {saved:.0%} fewer than the"
     " memory, none fewer than the others; until learning ends"
     f" {saved_learning:.0%} fewer than the memory. Tokens:"
     f" {fewer_tokens:.0%} fewer than with all examples in the prompt."
     " Turns: none fewer for CLIPR; for Adaptive-CLIPR half of the plain"
     " reward's, with reactions and reasons on top. How the paper's"
     f" {fewer:g} % were counted is not known."],
]
Markdown(results.markdown_table(verdicts))

# %% [markdown]
# ## What did not reproduce, and why
#
# * **No number of theirs could be checked.** Two of the data sets have no licence that we
#   could find, one could not be found at all, and how any of them was turned into
#   choices is not known. What we test are sentences, on a method whose questions, rules,
#   gate and refinement are our reconstruction. If ours falls short, that is the first
#   suspect.
# * **The one thing of a baseline that could be checked was**: TidyBot's four rows come
#   out of its recorded replies exactly.
# * **Our users are simulated, and kind.** They have rules of just the form that is
#   learnt, and name a dimension when they correct. Real people do not always know why.
#   What a simulated user shows is an upper bound on what is easy.

# %% tags=["hide-input"]
Markdown(
    f"""
**What came out other than we expected**, apart from them:

* *Corrections are worth more than the method that asks for them.* We
  expected Adaptive-CLIPR first, and the reward with the same feedback
  close behind. It is the other way round, in both worlds.
* *Rules can hold more than a reward.* Refitted to all corrections they are
  {by(K, 'corrected summary 24', 'corrected reward 24')} ahead of the
  corrected reward in kitchens, and in Mobile Manipulation
  {by(M, 'corrected summary 24', 'corrected reward 24')} from it. We
  expected three at most.
* *The plain reward is behind Adaptive-CLIPR out of distribution too*, by
  {by(K, A24, 'reward 24', 'ood')}; we expected them level. With 48 turns
  we expected the memory to lose ten points out of distribution; it has
  {pc(K, 'memory 48', 'ood')} there and {pc(K, 'memory 48')} in.
* *In kitchens a conversation never passes 85 %* out of distribution,
  neither CLIPR's nor that of *ask first*, which we expected of all with 48
  turns. It stops early.
* *Mobile Manipulation is not nearer to chance, and its differences are not
  smaller.* Seven dimensions that matter sound hard, but many pairs of
  options differ in one of them only.
* *After a change of mind* we expected all that go on learning above half;
  out of distribution Adaptive-CLIPR is at
  {of('Adaptive-CLIPR', 'changes', 'ood')}.
* *Small models.* A student of hidden rules loses nothing out of
  distribution (we expected ten to twenty points), and twelve choices teach
  one {taught("taught by own choices")} (we expected fifty to sixty). For
  SmolLM2 in TidyBot's rooms we expected half of all things placed right
  without a rule ({placed(WORDS, "no rule")}) and five to fifteen points
  more with one; of the embeddings of places half
  ({placed(WORDS, "nearest name")}). Rules in the prompt of `stories15m` we
  expected to change nothing; they do harm. As expected, SmolLM2 is at
  chance by letter, and writes no rules.

Why might ours differ from theirs? A large model that revises rules reads
all corrections that fit into its prompt; ours forgets each when its case is
mended. It knows from the start what people like; ours imagines users at
random. Its questions may be better than those about one dimension or one
task. And we do not know what its peers were told. CIPHER is made for
corrections; whether it got as many as Adaptive-CLIPR, and whether a reward
got any, no summary says. **The same feedback without the method** is the
comparison that we would ask for first, of any method that learns from
people.
"""
)

# %% [markdown]
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/clipr.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/clipr.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# [The reference](../book/api/clipr.md) describes all of `ftlib.clipr`.
#
# **1. A line edited by hand.** Learn the rules of a person in the kitchens, in six
# questions and without a gate. Turn the rule of the highest weight around. Which share
# of the decisions on validation flips, and in which families? How much accuracy does it
# cost?

# %% tags=["hide-cell", "nbval-check-output"]
fixed = replace(LIVE, adaptive=False)
learned = learn(
    SymbolicReasoner(fixed, seed=1000), host, parts.train[:30], [], fixed
).rules
heaviest = max(learned, key=lambda rule: rule.weight)
values = Vocabulary.of(parts.train).values[heaviest.dimension]
other = heaviest.over or next(v for v in values if v != heaviest.preferred)
turned = replace(heaviest, preferred=other, over=heaviest.preferred)
edited = RuleSet(tuple(turned if r is heaviest else r for r in learned))
show(heaviest.to_text())
show(f"-> {turned.to_text()}")
flipped = Counter(
    task.family for task in parts.validation
    if learned.decide(task).index != edited.decide(task).index
)
total = len(parts.validation)
print(f"{sum(flipped.values())} of {total} decisions flip:",
      ", ".join(f"{n} of {name}" for name, n in flipped.most_common()))
for name, rules in {"before": learned, "after": edited}.items():
    share = accuracy(rules.decide, host.right, parts.validation)
    print(f"{name}: {share:.0%} right")


# %% [markdown]
# A rule's reach can be seen before it is used: replay what was decided. Families without
# its dimension do not move at all.
#
# **2. Two rules that tie.** *Prefer vehicle train over anything else. Prefer start late
# over early.* An early train and a late bus. Who wins? Make the weights 2 and 1, then 1
# and 2. In how many trips did the tie decide?

# %% tags=["hide-cell", "nbval-check-output"]
def two_rules(train, late):
    return RuleSet((
        Rule("vehicle", "train", weight=train),
        Rule("start", "late", "early", weight=late),
    ))


early_train = Option("early train", {"vehicle": "train", "start": "early"})
late_bus = Option("late bus", {"vehicle": "bus", "start": "late"})
trip = Task("t", "", "Get me there.", "work", (early_train, late_bus))
for weights in ((1, 1), (2, 1), (1, 2)):
    rules = two_rules(*weights)
    decision = rules.decide(trip)
    names = [trip.options[at].name for at in rules.best(trip)]
    print(f"weights {weights}: margin {decision.margin + 0.0:g},"
          f" best: {' and '.join(names)}")
even, tipped = two_rules(1, 1), two_rules(2, 1)
ties = [t for t in trips_to_test if len(even.best(t)) > 1]
changed = [
    t for t in trips_to_test
    if not set(tipped.best(t)) <= set(even.best(t))
]
print(f"{len(ties)} of {len(trips_to_test)} trips tie with equal weights;"
      f" the weight 2 overrules {len(changed)} that did not")
assert not changed


# %% [markdown]
# With equal weights the order of the options decides, which is no reason. A weight
# matters only where two rules disagree; here all it does is break ties.
#
# **3. An attribute that nobody wrote down.** A person likes mugs with a handle, and
# `handle` is in no option's attributes. How good can rules become? Write it down, and
# learn again.

# %% tags=["hide-cell", "nbval-check-output"]
def with_handles(task, seed):
    """The same task, with an attribute that is drawn for each option."""
    rng = np.random.default_rng((seed, int(task.id.split("-")[1])))
    return replace(task, options=tuple(
        replace(option, attributes={
            **option.attributes, "handle": str(rng.choice(["yes", "no"])),
        })
        for option in task.options
    ))


likes = SimulatedUser(RuleSet.from_text(
    "Prefer handle yes over no. (weight 2)\nPrefer size small over large."
))


whole = [with_handles(task, 5) for task in later]
for name, seen in {
    "not written down": later, "written down": whole,
}.items():
    history = History()
    for there, task in zip(whole[:6], seen, strict=False):
        reply = likes.answer(Question.about_task(there))
        history = history.add(Question.about_task(task), reply)
    rules = synthesise(history, RuleSet(), SynthesisSettings())
    right = np.mean([
        likes.right(there, rules.decide(task).index)
        for there, task in zip(whole, seen, strict=True)
    ])
    print(f"{name}: {right:.0%} right")
    show(rules, "    ")

# %% [markdown]
# What is not written down is explained by what is: rules on size or finish that happen
# to fit six answers. They are false, and nothing in the conversation says so. The gate
# would: decisions are rejected, and corrections contradict the rules.
#
# **4. A user who contradicts himself.** Of twelve answers to *bus or train?* let $m$ be
# wrong. What utility difference has the fit, and which counts does the rule have? Derive
# the first.

# %% tags=["hide-cell", "nbval-check-output"]
for wrong in (0, 1, 3, 5, 6):
    x = np.array([[1.0, -1.0]] * (12 - wrong) + [[-1.0, 1.0]] * wrong)
    found = lasso_bradley_terry(x, C)
    d = found[0] - found[1]
    share = (C * (12 - wrong) - 1) / (C * 12)
    expected = max(0.0, math.log(share / (1 - share)))
    np.testing.assert_allclose(d, expected, atol=1e-5)
    said_so = History()
    for at in range(12):
        value = "train" if at < wrong else "bus"
        said_so = said_so.add(vehicle, Answer(value, value))
    found = synthesise(said_so, RuleSet(), SynthesisSettings())
    print(f"{wrong:2} wrong: d = {expected:.2f},",
          found.to_text() or "no rule")


# %% [markdown]
# With $w$ wins and $l$ losses the slope of $d + wC\log(1+e^{-d}) + lC\log(1+e^{d})$ is
# zero where $\sigma(d) = (wC - 1)/(wC + lC)$: the share of wins, less what the penalty
# takes. So the weight of a rule says how sure, the counts say of how much.
#
# **5. The entropy of a question, by hand.** Four kinds of people, equally many: they like
# steel or glass mugs, and large or small ones. The example tasks are two: a steel or a
# glass mug; a small or a large bowl. What is the entropy of *steel or glass?*, of *small
# or large?*, and of *which month were you born in?* What are they worth? And if all who
# like steel like large ones?

# %% tags=["hide-cell", "nbval-check-output"]
def worth_of(crowd, answers, kinds):
    """Entropy of the answers, and bits on a choice, the mean."""
    y = [answers(*p) for p in crowd]

    def bits(labels):
        shares = [n / len(labels) for n in Counter(labels).values()]
        return -sum(p * math.log2(p) for p in shares)

    value = np.mean([
        bits(y) + bits(z) - bits(list(zip(y, z, strict=True)))
        for z in ([choice(*p) for p in crowd] for choice in kinds)
    ])
    return bits(y), value


by_material, by_size = (lambda m, s, b: m), (lambda m, s, b: s)
asks_about = {"steel or glass?": by_material, "small or large?": by_size,
          "which month?": lambda m, s, b: b}
WORLDS = {
    "independent": [*product(("steel", "glass"), ("small", "large"),
                             range(12))],
    "steel goes with large": [
        (m, s, b) for m, s in (("steel", "large"), ("glass", "small"))
        for b in range(12)
    ],
}
for name, crowd in WORLDS.items():
    print(name)
    for text, answers in asks_about.items():
        h, value = worth_of(crowd, answers, (by_material, by_size))
        print(f"  {text:16} entropy {h:.2f} bits, worth {value:.2f}")

# %% [markdown]
# The month has the highest entropy and no value. And where two things go together, one
# question answers both tasks.
#
# **6. A rule that says too much.** Somebody was asked about two families, and they
# disagree: for town a bus, for work a train. What will the rules say of a trip to the
# sea? What can they? Now ask of a third family.

# %% tags=["hide-cell", "nbval-check-output"]
sea = Task("s", "", "Get me to the sea.", "sea", tuple(
    Option(v, {"vehicle": v}) for v in ("bus", "train")
))
said_so = History()
for family, value in (("town", "bus"), ("work", "train"),
                      ("parents", "train")):
    asked_now = Question.about_dimension(
        family, "vehicle", ("bus", "train")
    )
    said_so = said_so.add(asked_now, Answer(value, value))
    rules = synthesise(said_so, RuleSet(), SynthesisSettings())
    best = " or ".join(sea.options[at].name for at in rules.best(sea))
    print(f"and for {family} a {value}:")
    show(rules, "    ")
    print("    to the sea:", best)

# %% [markdown]
# After one answer the rule speaks for the whole world. After two that disagree there is
# no rule left, not even for town. After three there is a majority and an exception. None of this knows whether the sea is like town or like
# work. That a preference is common is an assumption, and out of distribution it is all
# there is: ask, or watch.
#
# ## Run it at scale `gpu`

# %% [markdown]
# `ftlib run clipr --scale gpu` takes real models in the places that small ones have
# above: SmolLM2 with 135 million weights, and Qwen2.5 with 494 million where a hub can be
# reached. Each reads rules that were learnt without it, by letter, by name and one by
# one; asks, writes and decides alone; reads the large model's rules for TidyBot's rooms;
# and is the student of ten users a seed, with a hundred tasks of either kind each.
# `make gpu` runs SmolLM2. The learning rates there are guesses until
# `distillation-learning-rate MODEL` has run. A model behind an address needs no GPU at
# all: `PromptedReasoner(Endpoint(…))` goes wherever a reasoner does.

# %% [markdown]
# **What it can show**: whether language models as reasoners, in place of our symbolic
# one, ask better questions and write rules that carry further, at which number of
# calls. **What it cannot**: the paper's numbers, for its models, prompts and splits are
# not known.

# %% tags=["hide-input"]
try:
    gpu = results.load("clipr", "gpu")
    minutes = sum(r.seconds for r in gpu) / 60
    memory = max(r.peak_memory_bytes for r in gpu) / 2**30
    text = (
        f"Recorded on {gpu[0].device}: {len(gpu)} runs, "
        f"{minutes:.0f} minutes, at most {memory:.0f} GiB.\n\n"
    )
    for name in gpu.experiments():
        if "-learning-rate " in name:
            continue
        columns = {"accuracy": "placed right"} if "tidybot" in name else {
            "id": "in", "ood": "out", "tokens": "tokens"
        }
        rows = results.table(gpu.select(experiment=name), columns)
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
# * The paper: {cite:t}`hyk2026clipr`, a preprint, version 1; an earlier version was at a
#   workshop.
# * What it is compared with: {cite:t}`wu2023tidybot` (TidyBot), {cite:t}`li2023gate`
#   (GATE), {cite:t}`gao2024cipher` (CIPHER), {cite:t}`liang2024introplan` (introspective
#   planning).
# * The pieces: {cite:t}`bradley1952` (paired comparisons), {cite:t}`tibshirani1996lasso`
#   (the L1 penalty), {cite:t}`simpson1969` (the worst margin).
# * Data: {cite:t}`wu2023tidybot` (TidyBot, MIT licence), {cite:t}`ren2023knowno` and
#   {cite:t}`liang2024introplan` (Mobile Manipulation), {cite:t}`ivanova2025ambik`
#   (AmbiK), {cite:t}`kant2022housekeep` (Housekeep).
