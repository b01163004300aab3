# %% [markdown]
# # Kernels: the vocabulary head
#
# The last layer of a language model turns a vector of about a thousand numbers into
# one score for each of about a hundred thousand words (or pieces of words). Those scores
# are the **logits**.
# Everything that fine-tuning asks of the model passes through them: the probability of
# the right word, the entropy of the prediction, a penalty on confidence. So this one
# layer decides how much memory a training step takes and often how long.
#
# This chapter builds an operation that answers those questions and never holds the
# table of all logits. It is the one chapter about an operation and not about a method.
# Every method of this book ends in that layer.

# %% [markdown]
# ## What you will be able to do
#
# * count bytes and floating-point operations (FLOPs) of an operation, and say from the
#   two numbers how fast it can be;
# * compute a softmax and its moments in one pass, block by block, and write that pass
#   as a Triton kernel, which runs on your CPU under Triton's interpreter;
# * derive one formula for the gradient of log-probability, entropy, collision
#   probability, mean logit and varentropy;
# * say why a training step takes four matrix products or three, and which of the two
#   modes of `ftlib.ops.vocabulary_head` a loss allows;
# * add a statistic of your own.
#
# You need: softmax, the chain rule, PyTorch. No CUDA, and no GPU.

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
import importlib.util
import math
import os
import time
from functools import partial
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown, display

from ftlib import plots, results, runtime

# Without a GPU for Triton the kernels are interpreted. Triton reads this
# when it is first imported.
COMPILED = runtime.triton_supported()
if not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"
KERNEL_DEVICE = "cuda" if COMPILED else "cpu"

plots.use_style()

# %% [markdown]
# ## The idea in one picture
#
# $N$ tokens and a vocabulary of $V$ words make $N \times V$ logits. Training code in
# 16-bit precision usually holds them three times: as they come (2 bytes each), as a
# 32-bit copy for the softmax (4 bytes), and as their gradient (2 bytes). The lines
# below are these 8 bytes per logit, for five models. The thick line is what needs to
# be kept instead: a block of logits that is used again and again, and a handful of
# numbers per token.

# %% mystnb={"image": {"alt": "Gigabytes against the number of tokens in a batch, both axes logarithmic. Five straight lines for five models rise in proportion to the number of tokens, the one of Gemma 2 2B highest. They cross the horizontal lines of a T4's, an A100's and an H200's memory. A thick black line, what is kept instead, stays at half a gigabyte for all numbers of tokens."}} tags=["hide-input"]
MODELS = {  # vocabulary V and hidden width D, from the models' configs
    "Gemma 2 2B": (256_000, 2304),
    "Qwen2.5-1.5B": (151_936, 1536),
    "Llama 3 8B": (128_256, 4096),
    "SmolLM2-135M": (49_152, 576),
    "Flan-T5-base": (32_128, 768),
}
GPUS = {"T4, 16 GB": 16, "A100, 80 GB": 80, "H200, 141 GB": 141}
BLOCK_BYTES = 512 * 2**20
tokens = np.geomspace(512, 2**18, 50)
fig, ax = plt.subplots(figsize=(7, 4.4))
for i, (name, (V, _)) in zip((0, 1, 2, 3, 6), MODELS.items(), strict=True):
    style = plots.arm_style(i)
    ax.plot(
        tokens, 8 * tokens * V / 1e9, color=style["color"],
        linestyle=style["linestyle"], label=f"{name}: V = {V:,}",
    )
kept = BLOCK_BYTES + 6 * 4 * tokens
ax.plot(
    tokens, kept / 1e9, color="black", linewidth=4,
    label="kept instead: 512 MiB + 24 B a token",
)
for name, size in GPUS.items():
    ax.axhline(size, color="grey", linewidth=1)
    ax.text(540, size * 1.05, name, va="bottom", fontsize=9)
ax.set(
    xscale="log", yscale="log", ylim=(0.1, 1000), xlim=(512, 2**18),
    xlabel="tokens in a batch, N", ylabel="memory (GB)",
)
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %% tags=["hide-input"]
V, D = MODELS["Gemma 2 2B"]
reach = 80e9 / (8 * V)
Markdown(
    f"""
With a vocabulary of {V:,}, an A100 is full of logits at {reach:,.0f}
tokens, and the model itself has not been counted yet. The block does not
grow with the batch.
"""
)

# %% [markdown]
# ## What the libraries claim
#
# There is no paper behind this chapter. There are libraries, and they publish numbers.
# All numbers in this table are **theirs**, on their hardware; none was measured by us.
#
# | | claim | source |
# | --- | --- | --- |
# | k‑1 | Never storing the logits cuts the loss of Gemma 2 2B from 24 GB to 1 MB, and the whole head from 28 GB to 1 GB, without slowing training (A100, 8,192 tokens) | Cut Cross-Entropy (CCE) {cite:p}`wijmans2025cut` |
# | k‑2 | Gradients formed in the forward pass, block by block, save memory and cost time: 4.5 GB and 167 ms against 9.2 GB and 112 ms (A100, $D$ = 4,096, $V$ = 128,256, 8,192 tokens) | benchmark file of Liger-Kernel {cite:p}`hsu2024liger` |
# | k‑3 | On an H100 with $V$ = 151,936 and $D$ = 4,096, 8,192 tokens forward and backward: the bare matrix products 42 ms, plain PyTorch 59 ms and 19.9 GiB, Liger 192 ms and 6.1 GiB, the trainer's own chunks 167 ms and 13.1 GiB | [TRL issue 7244](https://github.com/huggingface/trl/issues/7244) |
# | k‑4 | One kernel for log-probability and entropy takes 0.89 ms where two PyTorch functions take 12.8 ms (same sizes, logits given, forward) | [TRL issue 7244](https://github.com/huggingface/trl/issues/7244) |
# | k‑5 | Log-probability and entropy from hidden states, both differentiable, without the logits | [verl](https://github.com/verl-project/verl/pull/462), later [TRL](https://github.com/huggingface/trl) 1.16 and Liger 0.8.2 |
#
# Read k‑2 and k‑3 twice. Saving memory is easy. Saving it without losing time is the
# task. What none of them offers, as of the versions read for this chapter: gradients of
# *all* the statistics below, and entropy in the mode with three matrix products.

# %% [markdown]
# ## The equations
#
# ### Count first
#
# Let $X$ be the hidden states, $N \times D$, and $W$ the output weights, $V \times D$.
# The logits are $Z = X W^\top$. One such product is $2NDV$ FLOPs. Training needs three:
# $Z$ itself, and from its gradient $G$ the two others, $\partial X = G W$ and
# $\partial W = G^\top X$.
#
# An operation cannot be faster than its FLOPs divided by the machine's rate, nor faster
# than the bytes it moves divided by the memory's. Which of the two binds depends on
# their ratio, the **arithmetic intensity** in FLOPs per byte; the picture of it is
# called a roofline {cite:p}`williams2009roofline`. For an H200 we take two ceilings as
# given, 790 TFLOP/s for products of 16-bit matrices and 4.3 TB/s for a copy. We did not
# measure them. Everything derived from them here is arithmetic.
#
# Plain PyTorch, 16-bit logits and a 32-bit loss, passes over the table many times:

# %% tags=["hide-input", "nbval-check-output"]
FLOPS, BYTES = 790e12, 4.3e12  # per second: given, not measured
PASSES = {  # bytes per logit of an eager cross-entropy, forward and back
    "the product writes 16-bit logits": 2,
    "cast to 32 bits: read, write": 2 + 4,
    "log-softmax: read, write": 4 + 4,
    "gradient of picking the target: write": 4,
    "gradient of log-softmax: read two, write": 4 + 4 + 4,
    "cast back to 16 bits: read, write": 4 + 2,
    "the two products of the gradient read": 2 + 2,
}
for name, size in PASSES.items():
    print(f"{name:42} {size:2} B")
print(f"{'together':42} {sum(PASSES.values()):2} B per logit")

# %% mystnb={"image": {"alt": "A roofline on two logarithmic axes, FLOPs per byte against TFLOP per second. A slope of 4.3 terabytes a second meets a flat roof of 790 at 184 FLOPs per byte. The softmax passes lie far left on the slope, below one TFLOP per second. Plain training steps lie on the slope for Flan-T5-base and under the roof's edge for wider models. With a block of logits, and with no logits stored at all, every model lies under the flat roof."}} tags=["hide-input"]
N = 8192
RIDGE = FLOPS / BYTES
PLAIN = sum(PASSES.values())
BLOCK = 2 + 2 + (2 + 2) + (2 + 2)  # write, fold, overwrite, two products
STAGES = ("softmax passes", "plain step", "block of logits", "no logits")


def intensities(V, D):
    """FLOPs per byte of the softmax passes and of three kinds of step."""
    products = 6 * N * D * V
    operands = 3 * 2 * (N * D + D * V)  # X and W, in each product
    return np.array(
        [
            5 / (PLAIN - 6),  # some five FLOPs a logit, no matrix product
            products / (PLAIN * N * V + operands),
            products / (BLOCK * N * V + operands),
            products / operands,
        ]
    )


shown = ["Flan-T5-base", "Qwen2.5-1.5B", "Llama 3 8B"]
fig, ax = plt.subplots(figsize=(7, 4.2))
x = np.geomspace(0.05, 3e4, 400)
ax.plot(x, np.minimum(x * BYTES, FLOPS) / 1e12, color="black")
ax.axvline(RIDGE, color="grey", linewidth=1, linestyle=":")
ax.text(
    RIDGE * 0.9, 0.13, f"ridge: {RIDGE:.0f} FLOP/byte", fontsize=9,
    rotation=90, ha="right",
)
ax.text(2.6, 22, "4.3 TB/s", rotation=38, fontsize=9)
ax.text(0.06, 850, "790 TFLOP/s", fontsize=9)
ax.axhline(FLOPS / 1e12, color="grey", linewidth=1, linestyle=":")
for i, name in enumerate(shown):
    at = intensities(*MODELS[name])
    style = plots.arm_style(i)
    ax.plot(
        at, np.minimum(at * BYTES, FLOPS) / 1e12, style["marker"],
        color=style["color"], markersize=8 - i, markeredgecolor="black",
        label=f"{name}: D = {MODELS[name][1]:,}",
    )
middle = intensities(*MODELS["Qwen2.5-1.5B"])
places = [(8, -24), (6, -70), (14, -38), (0, -38)]
for x, stage, place in zip(middle, STAGES, places, strict=True):
    y = min(x * BYTES, FLOPS) / 1e12
    ax.annotate(
        stage, (x, y), xytext=place, textcoords="offset points",
        ha="left" if x < 1 else "center", fontsize=9, style="italic",
        arrowprops={"arrowstyle": "-", "color": "grey"},
    )
ax.set(
    xscale="log", yscale="log", ylim=(0.1, 2500), xlim=(0.05, 3e4),
    xlabel="arithmetic intensity (FLOP/byte)",
    ylabel="attainable (TFLOP/s)",
)
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# The softmax passes do almost no arithmetic, so the memory sets their pace. A roofline
# supposes that moving and computing overlap. In plain code they do not: one operation
# ends before the next begins, and their times add. For 8,192 tokens:

# %% tags=["hide-input"]
lines = [
    [
        "model", "V", "D", "3 products (ms)", "4 products (ms)",
        "plain passes (ms)", "block passes (ms)",
    ]
]
for name, (V, D) in MODELS.items():
    product = 2 * N * D * V / FLOPS * 1e3
    passes = [size * N * V / BYTES * 1e3 for size in (PLAIN, BLOCK)]
    cells = [3 * product, 4 * product, *passes]
    lines.append([name, f"{V:,}", f"{D:,}", *(f"{c:.1f}" for c in cells)])
Markdown(results.markdown_table(lines))

# %% [markdown]
# This is arithmetic from the two ceilings, not a measurement. It says where to look:
# the narrower the model, the more the passes weigh against the products. “Block passes”
# are those of a block that is written, folded, overwritten with its gradient and read
# by two products.
#
# ### A softmax in one pass
#
# A row of logits $z_1 \dots z_V$ arrives in blocks. With the maximum $m$ of what has
# been seen and $s = \sum e^{z_k - m}$ over it, the log-sum-exp is $m + \log s$. When a
# block brings a new maximum $m' \ge m$, put $d = m - m' \le 0$. Since
# $e^{z - m'} = e^{d}\, e^{z - m}$,
#
# $$
# s \leftarrow e^{d} s + \sum_{\text{block}} e^{z_k - m'} .
# $$
#
# This is the online softmax {cite:p}`milakov2018online`. Exponents are never positive,
# so nothing overflows.
#
# ### The moment for the entropy
#
# Let $u_j = \log p_j = (z_j - m) - \log s$. The entropy is $H = -\sum p_j u_j$. With
# $t = \sum e^{z_k - m}(z_k - m)$,
#
# $$
# H = \log s - \frac{t}{s}.
# $$
#
# The usual form is $\log\!\sum e^{z} - \sum p\,z$. It is the same number on paper. In
# floating point it subtracts two numbers of the size of the logits to get one that may
# be near zero, while $\log s$ and $t/s$ are small when $H$ is. We call the two forms
# **raw** and **shifted**. The shifted moment moves with the maximum too, since
# $z - m' = (z - m) + d$:
#
# $$
# t \leftarrow e^{d}(t + d\,s) + \sum_{\text{block}} e^{z_k - m'}(z_k - m') ,
# $$
#
# with the old $s$ on the right. For the **varentropy** $v$, the variance of $u$ under
# $p$, one more moment with $(z-m)^2$ is folded in the same way; $v$ does not change when
# $z$ is shifted, so no logarithm enters. The **collision probability**
# $q = \sum p_j^2$, the chance that two draws agree, needs $\sum e^{2(z-m)}$.
#
# ### One gradient
#
# Most of the statistics are made of sums $S = \sum_k \varphi(p_k)$. The softmax has
# $\partial p_k / \partial z_j = p_k(\mathbf 1[k = j] - p_j)$, and so
#
# $$
# \frac{\partial S}{\partial z_j} = p_j\big(\varphi'(p_j) - R\big),
# \qquad R = \sum_k p_k\, \varphi'(p_k).
# $$
#
# One rule. Now insert each:
#
# | statistic | $\varphi'(p)$, with $u = \log p$ | $R$ | $\partial S/\partial z_j$ |
# | --- | --- | --- | --- |
# | entropy $H$ | $-u - 1$ | $H - 1$ | $-p_j(u_j + H)$ |
# | collision probability $q$ | $2p$ | $2q$ | $2p_j(p_j - q)$ |
# | $\sum p\,u^2 = v + H^2$ | $u^2 + 2u$ | $v + H^2 - 2H$ | $p_j(u_j^2 + 2u_j - v - H^2 + 2H)$ |
#
# The varentropy is the last row minus $H^2$, whose gradient is $2H$ times the first row:
# $p_j\big(u_j^2 + 2(1+H)u_j + 2H + H^2 - v\big)$. The others are known: $\log p_y$ has
# $\mathbf 1[j=y] - p_j$, the log-sum-exp has $p_j$, the mean logit $1/V$. Let a loss
# have the derivatives $g$ by these six statistics, for one token. All terms have the
# same shape:
#
# $$
# \frac{\partial \ell}{\partial z_j} =
# p_j\,\big(A + B\,u_j + C\,p_j + E\,u_j^2\big) + F + g_{\log p}\,\mathbf 1[j=y]
# $$
#
# $$
# \begin{aligned}
# A &= g_{\mathrm{lse}} - g_{\log p} - H g_H - 2q\,g_q + (2H + H^2 - v)\,g_v, \\
# B &= 2(1+H)\,g_v - g_H, \quad C = 2 g_q, \quad E = g_v, \quad F = g_{\bar z}/V .
# \end{aligned}
# $$
#
# Six numbers per token describe the gradient by a hundred thousand logits. That is why
# the table of logits need not be kept: the logits can be made again block by block, and
# each becomes its own gradient on the spot.
#
# One of this book's methods, CAREF, adds a term that is a sum over $\varphi$ too,
# $\varphi(p) = |p \log(pV)|^{\alpha}(1-p)^{\beta}$, but whose $\varphi'$ is no polynomial
# in $u$ and $p$. The rule still holds; the formula gets one more summand,
# $\lambda p_j(\varphi'(p_j) - R)$.
#
# ### Why u and not z
#
# The same gradient can be written with $z_j$ in place of $u_j$, and some libraries do.
# Then $A$ and $B z_j$ both have the size of the logits' offset, $E z_j^2$ of its square,
# and they cancel. Nothing ties that offset to zero: adding a constant to all logits
# changes no probability. The form with $u$ does not see it.
#
# ### Four products or three
#
# The forward pass makes the logits (product 1) and forgets them. The backward pass has
# to make them **again** (2) before it can form their gradient $G$ and multiply it twice
# (3, 4). That is **autograd mode**: four products, and any loss.
#
# If $G$ can be formed while the block of logits is still there, the second making is
# saved: three products. That needs all $g$ as soon as the row has been folded. It works
# when the loss of a token is a known function of *its own* statistics. That is
# **loss-known mode**. The loss's own upstream gradient is one number, and scales the
# result afterwards.
#
# | method | loss of a token | its coefficients | mode |
# | --- | --- | --- | --- |
# | CFT | $-\log p_y$ where the mask is 1 | the mask, known before | loss-known |
# | CAREF | $-\log p_y + \lambda_1 \sum\varphi(p) + \lambda_2(\log V - H)$ | functions of the row's own statistics | loss-known |
# | CGM, in chunks | $-w_i \log p_y$ | $w_i = -c_i$ from a first pass without gradients | loss-known |
# | CGM, in one pass | $c_i \log p_y$ | $c_i$ depend on all samples of the batch | autograd |
# | a target for the mean entropy of a batch | $(\bar H - h)^2$ | depends on all tokens | autograd |
#
# CGM's two rows need the same number of products, four: one and three, or one and three
# more. The choice is about the model's body, which the first way runs twice and the
# second way keeps.

# %% [markdown]
# ## Build it in forty lines
#
# Triton {cite:p}`tillet2019triton` is a language inside Python for GPU kernels. A kernel
# is a function that runs many times at once, as *programs* with numbers 0, 1, 2 …, and
# each works on small arrays. Without a GPU, Triton's interpreter runs the programs one
# after the other with NumPy: slow, and good enough to see that they are right. Triton
# has builds for Linux alone. Elsewhere the four steps below say that they were skipped,
# and all other cells run.

# %%
TRITON = importlib.util.find_spec("triton") is not None
if TRITON:
    import triton
    import triton.language as tl
else:  # stand-ins, so that the cells below can be read and passed over
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=int)
    print("There is no Triton here: the four steps are skipped.")


def with_triton(check):
    """Run a check at once, if there is a Triton to run it."""
    if TRITON:
        check()
    else:
        print("skipped: no Triton")


def random_logits(rows, columns, scale=3.0, offset=0.0, seed=0):
    torch.manual_seed(seed)
    z = scale * torch.randn(rows, columns) + offset
    return z.to(KERNEL_DEVICE)


# %% [markdown]
# **Step 1: a row at a time, all of it at once.** Program number `row` loads its row.
# Block sizes are powers of two, and $V$ is not, so the columns beyond $V$ must not
# count. They are loaded as $-\infty$: they never win the maximum, and $e^{-\infty} = 0$.

# %% tags=["nbval-check-output"]
@triton.jit
def whole_row(z_ptr, lse_ptr, V, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * V + j, j < V, float("-inf"))
    m = tl.max(z, 0)
    s = tl.sum(tl.exp(z - m), 0)
    tl.store(lse_ptr + row, m + tl.log(s))


@with_triton
def step_1():
    z = random_logits(4, 1000)
    lse = torch.empty(4, device=z.device)
    whole_row[(4,)](z, lse, 1000, BLOCK=1024)
    torch.testing.assert_close(
        lse.double(), z.double().logsumexp(1), rtol=1e-6, atol=1e-5
    )
    print("step 1 equals float64 torch:", tuple(lse.shape))


# %% [markdown]
# **Step 2: block by block.** A row of 150,000 logits does not fit in the registers of a
# program. The loop carries $m$ and $s$ and applies the online update.

# %% tags=["nbval-check-output"]
@triton.jit
def online_row(z_ptr, lse_ptr, V: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    m = float("-inf")
    s = 0.0
    for start in range(0, V, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + row * V + j, j < V, float("-inf"))
        new = tl.maximum(m, tl.max(z, 0))
        s = tl.exp(m - new) * s + tl.sum(tl.exp(z - new), 0)
        m = new
    tl.store(lse_ptr + row, m + tl.log(s))


@with_triton
def step_2():
    z = random_logits(4, 1000)
    lse = torch.empty(4, device=z.device)
    online_row[(4,)](z, lse, 1000, BLOCK=128)
    torch.testing.assert_close(
        lse.double(), z.double().logsumexp(1), rtol=1e-6, atol=1e-5
    )
    print("step 2 equals float64 torch, in 8 blocks of 128")


# %% [markdown]
# **Step 3: the moment for the entropy.** Two traps now open. At the start $m = -\infty$,
# so $d = -\infty$ and $d \cdot s = -\infty \cdot 0$ is not a number; $d$ has to be 0
# there. And in the columns beyond $V$, $e^{-\infty} \cdot (-\infty)$ is not a number
# either. The update becomes a function of its own, for a tile of several rows.

# %% tags=["nbval-check-output"]
@triton.jit
def fold(m, s, t, z, valid):
    """Take a tile of logits (rows, columns) into the rows' m, s and t."""
    new = tl.maximum(m, tl.max(tl.where(valid, z, float("-inf")), 1))
    d = tl.where(m == float("-inf"), 0.0, m - new)
    shifted = tl.where(valid, z - new[:, None], 0.0)
    e = tl.where(valid, tl.exp(shifted), 0.0)
    t = tl.exp(d) * (t + d * s) + tl.sum(e * shifted, 1)
    s = tl.exp(d) * s + tl.sum(e, 1)
    return new, s, t


@triton.jit
def moments_of_rows(
    z_ptr, out_ptr, N,
    V: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    t = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, BLOCK):
        j = start + tl.arange(0, BLOCK)
        valid = j[None, :] < V
        at = i[:, None] * V + j[None, :]
        z = tl.load(z_ptr + at, (i[:, None] < N) & valid, 0.0)
        m, s, t = fold(m, s, t, z, valid)
    tl.store(out_ptr + i, m + tl.log(s), i < N)
    tl.store(out_ptr + N + i, tl.log(s) - t / s, i < N)


def exact(z):
    """Log-sum-exp and entropy in float64, shape (2, N)."""
    u = z.double().log_softmax(1)
    return torch.stack((z.double().logsumexp(1), -(u.exp() * u).sum(1)))


@with_triton
def step_3():
    for offset in (0.0, -300.0, 1000.0):
        z = random_logits(6, 1000, offset=offset)
        out = torch.empty(2, 6, device=z.device)
        moments_of_rows[(2,)](z, out, 6, 1000, ROWS=4, BLOCK=128)
        error = (out[1].double() - exact(z)[1]).abs().max()
        assert error < 5e-6, error
        print(f"step 3, logits around {offset:5.0f}: entropy within 5e-6")


# %% [markdown]
# **Step 4: the matrix product moves in.** Until here the logits had to exist. Now each
# tile of them is made from $X$ and $W$ inside the kernel, folded, and forgotten. No
# logit is ever written to memory. (`ieee` asks a GPU for float32 products; left to itself
# it would round the factors first.)

# %% tags=["nbval-check-output"]
@triton.jit
def moments_from_hidden(
    x_ptr, w_ptr, out_ptr, N, V: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    s = tl.zeros([ROWS], tl.float32)
    t = tl.zeros([ROWS], tl.float32)
    for start in range(0, V, BLOCK):
        j = start + tl.arange(0, BLOCK)
        z = tl.zeros([ROWS, BLOCK], tl.float32)
        for k in range(0, D, WIDTH):
            d = k + tl.arange(0, WIDTH)
            x_at = i[:, None] * D + d[None, :]
            w_at = j[None, :] * D + d[:, None]
            x_in = (i[:, None] < N) & (d[None, :] < D)
            w_in = (j[None, :] < V) & (d[:, None] < D)
            x = tl.load(x_ptr + x_at, x_in, 0.0)
            w = tl.load(w_ptr + w_at, w_in, 0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        m, s, t = fold(m, s, t, z, j[None, :] < V)
    tl.store(out_ptr + i, m + tl.log(s), i < N)
    tl.store(out_ptr + N + i, tl.log(s) - t / s, i < N)


@with_triton
def step_4():
    N, D, V = 19, 50, 1000
    torch.manual_seed(0)
    x = torch.randn(N, D, device=KERNEL_DEVICE)
    w = torch.randn(V, D, device=KERNEL_DEVICE) / 3
    out = torch.empty(2, N, device=KERNEL_DEVICE)
    sizes = {"ROWS": 16, "BLOCK": 64, "WIDTH": 32}
    moments_from_hidden[(2,)](x, w, out, N, V, D, **sizes)
    logits = x.double() @ w.double().T
    torch.testing.assert_close(
        out.double(), exact(logits), rtol=1e-5, atol=2e-5
    )
    print(f"step 4 equals float64 torch, with no {N} x {V} table")


# %% [markdown]
# Less than forty lines, counting `fold` and the last kernel. `ftlib`'s kernel adds the remaining
# moments, splits the vocabulary over programs so that a small batch fills a GPU, and
# takes the target's logit by a dot product of its own, because a search for it inside
# the tile costs registers.
#
# **The gradient, in plain torch.** First the statistics, as one would write them; they
# serve as the specification. Then the formula. Autograd in float64 is the judge.

# %%
NAMES = (
    "log_prob", "entropy", "log_sum_exp", "collision_prob", "mean_logit",
    "varentropy",
)


def statistics(z, y):
    """The six statistics of each row of logits, by name."""
    u = z.log_softmax(1)
    p = u.exp()
    entropy = -(p * u).sum(1)
    values = (
        u.gather(1, y[:, None])[:, 0], entropy, z.logsumexp(1),
        p.square().sum(1), z.mean(1),
        (p * u.square()).sum(1) - entropy.square(),
    )
    return dict(zip(NAMES, values, strict=True))


def logit_gradient(z, y, g):
    """Gradient by z of Σ g · statistic, from the one formula."""
    u = z.log_softmax(1)
    at = {name: value[:, None] for name, value in statistics(z, y).items()}
    g = {name: value[:, None] for name, value in g.items()}
    H, q, v = at["entropy"], at["collision_prob"], at["varentropy"]
    C, E = 2 * g["collision_prob"], g["varentropy"]
    A = g["log_sum_exp"] - g["log_prob"] - H * g["entropy"]
    A = A - q * C + (2 * H + H**2 - v) * E
    B = 2 * (1 + H) * E - g["entropy"]
    p = u.exp()
    dz = p * (A + B * u + C * p + E * u**2) + g["mean_logit"] / z.shape[1]
    return dz.scatter_add(1, y[:, None], g["log_prob"])


# %% tags=["nbval-check-output"]
torch.manual_seed(0)
z = (4 * torch.randn(5, 300).double()).requires_grad_()
y = torch.randint(300, (5,))
upstream = {name: torch.randn(5).double() for name in NAMES}

for name in NAMES:  # each alone, then all at once
    alone = {n: g * (n == name) for n, g in upstream.items()}
    value = (upstream[name] * statistics(z, y)[name]).sum()
    (wanted,) = torch.autograd.grad(value, z)
    found = logit_gradient(z.detach(), y, alone)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    print(f"{name:15} formula equals autograd")
value = sum((upstream[n] * s).sum() for n, s in statistics(z, y).items())
(wanted,) = torch.autograd.grad(value, z)
found = logit_gradient(z.detach(), y, upstream)
torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
print("all at once     formula equals autograd")


# %% [markdown]
# CAREF's term, as the rule says, with $\varphi'$ taken by autograd so that no algebra of
# ours is trusted:

# %% tags=["nbval-check-output"]
def sced(p, alpha=2.0, beta=1.0):
    """φ(p) of CAREF, elementwise."""
    return (p * (p * p.shape[1]).log()).abs() ** alpha * (1 - p) ** beta


def by_rule(phi, z):
    """Gradient by z of Σ φ(p): p (φ'(p) − R)."""
    p = z.softmax(1).detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi(p).sum(), p)
    R = (p * slope).sum(1, keepdim=True)
    return (p * (slope - R)).detach()


(wanted,) = torch.autograd.grad(sced(z.softmax(1)).sum(), z)
torch.testing.assert_close(by_rule(sced, z), wanted, rtol=1e-9, atol=1e-12)
print("p (φ' − R) equals autograd for CAREF's term")

# %% [markdown]
# ## Use ftlib's
#
# ### Autograd mode
#
# Ask for statistics, make any loss of them, call `backward`. On a small tensor,
# `ftlib` and the code above agree:

# %% tags=["nbval-check-output"]
from ftlib.ops import TokenLoss, rows, tiles, vocabulary_head
from ftlib.ops.reference import vocabulary_head_reference

N, D, V = 6, 16, 500
torch.manual_seed(0)
hidden = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
weight = torch.randn(V, D, dtype=torch.float64, requires_grad=True)
y = torch.randint(V, (N,))
upstream = {name: torch.randn(N).double() for name in NAMES}

out = vocabulary_head(hidden, weight, y, statistics=NAMES)
wanted = statistics(hidden @ weight.T, y)
for name in NAMES:
    torch.testing.assert_close(getattr(out, name), wanted[name])
sum((upstream[n] * getattr(out, n)).sum() for n in NAMES).backward()
dz = logit_gradient((hidden @ weight.T).detach(), y, upstream)
torch.testing.assert_close(hidden.grad, (dz @ weight).detach())
torch.testing.assert_close(weight.grad, (dz.T @ hidden).detach())
print("six statistics and both gradients agree with the code above")

# %% [markdown]
# A loss that needs the whole batch, here a mean entropy of two nats, is one line:

# %% tags=["nbval-check-output"]
hidden.grad = weight.grad = None
out = vocabulary_head(
    hidden, weight, y, statistics=("log_prob", "entropy")
)
loss = -out.log_prob.mean() + (out.entropy.mean() - 2.0) ** 2
loss.backward()

z = hidden @ weight.T
plain = statistics(z, y)
same = -plain["log_prob"].mean() + (plain["entropy"].mean() - 2.0) ** 2
(dx,) = torch.autograd.grad(same, hidden)
torch.testing.assert_close(hidden.grad, dx)
print("a loss of batch statistics: gradient equals that of all logits")

# %% [markdown]
# ### Loss-known mode
#
# Describe the loss of a token by a `TokenLoss` and it is computed and differentiated
# in the same pass. `weights` are the factors of the tokens: CFT's mask, or CGM's
# $w_i = -c_i$. Tokens whose target is −100 are left out altogether. What comes back
# beside the loss is for logging and carries no gradient. The mean is over the tokens that
# are not left out, whatever their weights.

# %% tags=["nbval-check-output"]
masked = y.clone()
masked[4] = -100  # a token of the prompt
factors = torch.tensor([1.0, 1.0, 0.5, -2.0, 1.0, 0.0])
token_loss = TokenLoss(cross_entropy=1.0, entropy=-0.01, z_loss=1e-4)
hidden.grad = weight.grad = None
out = vocabulary_head(
    hidden, weight, masked, loss=token_loss, weights=factors,
    statistics=("entropy", "top1_hit"),
)
out.loss.backward()

twin = vocabulary_head_reference(
    hidden, weight, masked, loss=token_loss, weights=factors
)
wanted = torch.autograd.grad(twin.loss, (hidden, weight))
torch.testing.assert_close(hidden.grad, wanted[0])
torch.testing.assert_close(weight.grad, wanted[1])
print("loss and gradients equal the reference with all logits")
print("entropy carries a gradient:", out.entropy.requires_grad)
print("gradient of the ignored token:", hidden.grad[4].abs().sum().item())

# %% [markdown]
# CAREF's loss is `TokenLoss(sced=0.1, kl_to_uniform=0.1)`.
#
# ### A real model's head
#
# Do not read `model.lm_head.weight`. T5 scales its hidden states, Gemma 2 caps its
# logits, and a LoRA adapter on the head is not in that tensor. `output_head` runs the
# model up to its head and measures what the head and the model do after it, or says
# that it cannot.

# %% tags=["nbval-check-output"]
from transformers import Gemma2Config, Gemma2ForCausalLM

from ftlib.ops import output_head

config = Gemma2Config(
    vocab_size=300, hidden_size=32, intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
    head_dim=16, final_logit_softcapping=2.0,
)
torch.manual_seed(0)
model = Gemma2ForCausalLM(config)
ids = torch.randint(3, 300, (2, 12))

head = output_head(model, input_ids=ids)
out = vocabulary_head(
    head.hidden[:, :-1], head.weight, ids[:, 1:], loss=TokenLoss(),
    logit_scale=head.logit_scale, softcap=head.softcap,
)
out.loss.backward()
ours = model.lm_head.weight.grad.clone()

model.zero_grad()
theirs = model(input_ids=ids, labels=ids).loss
theirs.backward()
torch.testing.assert_close(out.loss, theirs, rtol=1e-5, atol=1e-6)
torch.testing.assert_close(
    ours, model.lm_head.weight.grad, rtol=1e-4, atol=1e-6
)
print(f"softcap found by measuring: {head.softcap:.1f}")
print("loss and gradients equal the model's own")


# %% [markdown]
# Note the shift. `targets[i]` is the token that `hidden[i]` predicts, so a decoder's
# hidden states lose their last position and the ids their first. An encoder-decoder's
# labels are not shifted.
#
# ### Under torch.compile
#
# The passes are registered with `torch.library`, so a compiler sees each as one node
# and does not look inside.

# %% tags=["nbval-check-output"]
def objective(hidden, weight, y):
    out = vocabulary_head(hidden, weight, y, statistics=NAMES[:2])
    return (out.entropy - out.log_prob).sum()


whole = torch.compile(objective, fullgraph=True, backend="aot_eager")
eager = torch.autograd.grad(objective(hidden, weight, y), hidden)
compiled = torch.autograd.grad(whole(hidden, weight, y), hidden)
torch.testing.assert_close(compiled, eager)
print("one graph, same gradient")

# %% [markdown]
# ### Your own statistic
#
# First see whether you need one. The perplexity of the prediction is
# `out.entropy.exp()`, the effective number of words $1/\sum p^2$ is
# `1 / out.collision_prob`, and autograd does the rest. If you need a new one, write it as
# $\sum_k \varphi(p_k)$ and take $\varphi'$.
#
# * If $\varphi'$ is made of $1$, $u$, $p$ and $u^2$, nothing in the backward pass changes:
#   it is $\varphi'$ that gives $B$, $C$ and $E$, and $-R$ with its constant that gives
#   $A$. Add a moment to `row_moments`, and a line to `logit_gradient`.
# * If not, as with CAREF's term, the tile's gradient needs one more summand
#   $g\,p_j(\varphi'(p_j) - R)$: in `row_gradient_`, in PyTorch first. The kernel of the same
#   name repeats it.
#
# Exercise 6 does this for $\sum p^3$.

# %% [markdown]
# ## Run it against fair baselines
#
# The same loss, cross-entropy minus a hundredth of the entropy, four ways:
#
# * **plain**: all logits, autograd. What most training code does;
# * **checkpointed chunks**: plain PyTorch with `torch.utils.checkpoint` over slices of
#   the batch. It stores no logits either, in ten lines, and is the baseline to beat;
# * **`ftlib`, autograd mode**;
# * **`ftlib`, loss-known mode**.
#
# What we expected, written before the run. Products: 3 for plain, 4 for checkpointed
# chunks and autograd mode, 3 for loss-known. Memory: plain grows in proportion to $N$,
# with several copies of the table; the other three stay flat. Time on a CPU, where a
# product is slow and memory close: no large differences, plain ahead of autograd mode
# because of the fourth product, loss-known level with plain.
#
# `ftlib`'s workspace is lowered from 512 MiB for this, so that a tile has 128 rows like a
# checkpointed chunk. First the products, counted by the profiler:

# %%
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler announces itself
DEVICE = runtime.device()
WIDTH, WORDS, ENTROPY = 64, 8192, 0.01
CHUNK = 128  # rows of a tile; on a CPU up to TWIN_COPIES of it at once
COPIES = 1 if COMPILED else tiles.TWIN_COPIES
SMALL_WORKSPACE = COPIES * 4 * WORDS * CHUNK


def plain_loss(x, w, y):
    u = functional.linear(x, w).log_softmax(-1)
    entropy = -(u.exp() * u).sum(-1)
    return (functional.nll_loss(u, y, reduction="none")
            - ENTROPY * entropy).sum()


def checkpointed_loss(x, w, y):
    parts = zip(x.split(CHUNK), y.split(CHUNK), strict=True)
    return sum(
        checkpoint(plain_loss, a, w, b, use_reentrant=False)
        for a, b in parts
    )


def autograd_mode(x, w, y, backend=None):
    out = vocabulary_head(
        x, w, y, statistics=("log_prob", "entropy"), backend=backend
    )
    return -(out.log_prob + ENTROPY * out.entropy).sum()


def loss_known(x, w, y, backend=None):
    return vocabulary_head(
        x, w, y, loss=TokenLoss(entropy=-ENTROPY), reduction="sum",
        backend=backend,
    ).loss


WAYS = {
    "plain": plain_loss,
    "checkpointed chunks": checkpointed_loss,
    "ftlib, autograd mode": autograd_mode,
    "ftlib, loss-known mode": loss_known,
}


def inputs(n, device=DEVICE, seed=0):
    torch.manual_seed(seed)
    x, w = torch.randn(n, WIDTH), torch.randn(WORDS, WIDTH) / 4
    y = torch.randint(WORDS, (n,))
    x, w, y = x.to(device), w.to(device), y.to(device)
    return x.requires_grad_(), w.requires_grad_(), y


def products(way, n=256):
    """Matrix products of a step, in units of 2NDV FLOPs, on the CPU."""
    x, w, y = inputs(n, "cpu")
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True
    ) as trace:
        way(x, w, y).backward()
    flops = 0
    for event in trace.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            a, b = [s for s in event.input_shapes if len(s) == 2][-2:]
            flops += 2 * a[0] * a[1] * b[1]
    return flops / (2 * n * WIDTH * WORDS)


# %% tags=["nbval-check-output"]
whole_workspace = tiles.WORKSPACE_BYTES
tiles.WORKSPACE_BYTES = SMALL_WORKSPACE
counted = {name: products(way) for name, way in WAYS.items()}
for name, count in counted.items():
    print(f"{name:22} {count:.0f} products")
assert list(counted.values()) == [3, 4, 4, 3]


# %% [markdown]
# Then memory and time. On a CPU the profiler's log of every allocation gives the peak;
# on a GPU, PyTorch's own counter does. Time on a CPU is that of one core, spent in this
# process, so that a busy neighbour disturbs it little.

# %%
def peak_bytes(call):
    """Peak of what a call allocates, in bytes, beyond what was there."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True
    ) as trace:
        call()
    events = trace.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in events
        if event.name() == "[memory]"
    ]
    return int(np.cumsum([size for _, size in sorted(changes)]).max())


def train_step(way, x, w, y):
    x.grad = w.grad = None
    way(x, w, y).backward()


def seconds(call, repeats=2):
    """Best of a few after one to warm up; on a CPU, of one core."""
    cuda = DEVICE.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    found = []
    for _ in range(repeats + 1):
        begin = clock()
        call()
        if cuda:
            torch.cuda.synchronize()
        found.append(clock() - begin)
    return min(found[1:])


threads = torch.get_num_threads()
torch.set_num_threads(1)
SIZES = (256, 512, 1024, 2048)
memory = {name: [] for name in WAYS}
duration = {name: [] for name in WAYS}
for n in SIZES:
    x, w, y = inputs(n)
    gradients = []
    for name, way in WAYS.items():
        step = partial(train_step, way, x, w, y)
        duration[name].append(seconds(step))
        x.grad = w.grad = None
        memory[name].append(peak_bytes(step))
        gradients.append((x.grad, w.grad))
    for other in gradients[1:]:
        torch.testing.assert_close(
            other, gradients[0], rtol=1e-3, atol=1e-3
        )
print("all four ways give the same gradients at every size")

# %% mystnb={"image": {"alt": "Two panels against the number of tokens from 256 to 2048, all axes logarithmic. Left, peak memory: the line of plain code rises in proportion to the tokens to several hundred megabytes, the three others stay nearly flat at a few tens of megabytes. Right, time of a step: all four rise together, in proportion to the tokens."}} tags=["hide-input"]
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.6))
for i, name in enumerate(WAYS):
    style = plots.arm_style(i)
    left.plot(SIZES, np.array(memory[name]) / 1e6, label=name, **style)
    right.plot(SIZES, np.array(duration[name]) * 1e3, **style)
left.set(ylabel="peak memory (MB)")
right.set(ylabel="time of a step (ms)")
for ax in (left, right):
    ax.set(xscale="log", yscale="log", xlabel="tokens, N")
    low, high = np.log10(ax.get_ylim())
    ax.set_ylim(10 ** math.floor(low), 10 ** math.ceil(high))
    ax.set_xticks(SIZES, map(str, SIZES))
    ax.minorticks_off()
fig.legend(loc="outside lower center", ncols=2)
plt.show()

# %% tags=["hide-input"]
table_bytes = 4 * SIZES[-1] * WORDS
plain_time = duration["plain"][-1]
times = {name: t[-1] / plain_time for name, t in duration.items()}
growth = {name: m[-1] / m[0] for name, m in memory.items()}
size = f"{SIZES[-1]:,} tokens, {DEVICE.type}"
table = [[size, "tables of logits", "growth", "time / plain's"]]
for name in WAYS:
    copies = memory[name][-1] / table_bytes
    cells = [copies, growth[name], times[name]]
    table.append([name, *(f"{cell:.2f}" for cell in cells)])
Markdown(
    results.markdown_table(table)
    + "\n\nPeak memory is given in tables of N × V float32 logits. "
    f"*Growth* is its ratio to that at {SIZES[0]} tokens, "
    f"{SIZES[-1] // SIZES[0]} times fewer."
)

# %% tags=["nbval-check-output"]
print("plain grows with N:      ", growth["plain"] > 6)
print("loss-known mode is flat: ", growth["ftlib, loss-known mode"] < 2)
tiles.WORKSPACE_BYTES = whole_workspace

# %% [markdown]
# Products and memory came out as expected. For the time, see the last column: we expected
# plain code ahead of autograd mode by one product in four. On a CPU the passes over
# several tables weigh more than that. They leave the caches, and a tile of 128 rows
# does not. Checkpointed chunks make the same four products as autograd mode and take
# about its time; what they cannot do is save the fourth. About a GPU these times
# say nothing.

# %% [markdown]
# ## Evaluate it, over five seeds
#
# Accuracy is what can be measured without a GPU. The rows of logits below are float32
# numbers, taken as exact, and the truth is their entropy in float64. Three ways to
# compute it in float32: the raw moment, with the maximum subtracted in the exponents as
# everybody does; PyTorch's `log_softmax`, then $-\sum pu$; and `vocabulary_head`, given
# the logits exactly by hidden states that are rows of the identity. And one that is no
# way of summing: the logits are first rounded to bf16, as a 16-bit matrix product rounds
# them, and then summed by `vocabulary_head`. Four kinds of rows, $V = 32{,}128$:

# %%
KINDS = ("ordinary", "peaked", "offset +1000", "offset −300")
ROWS, T5_WORDS = 16, 32_128


def rows_of_logits(kind, seed):
    z = random_logits(ROWS, T5_WORDS, seed=seed).cpu()
    if kind != "ordinary":
        z = z / 3
        z[:, 7] = 20.0  # one word nearly certain
    offset = {"offset +1000": 1000.0, "offset −300": -300.0}
    return z + offset.get(kind, 0.0)


def raw_entropy(z):
    m = z.amax(1)
    e = (z - m[:, None]).exp()
    s = e.sum(1)
    return m + s.log() - (e * z).sum(1) / s


def softmax_entropy(z):
    u = z.log_softmax(1)
    return -(u.exp() * u).sum(1)


def head_entropy(z):
    eye = torch.eye(len(z), dtype=z.dtype)
    y = torch.zeros(len(z), dtype=torch.int64)
    found = vocabulary_head(
        eye, z.T.contiguous(), y, statistics=("entropy",)
    )
    return found.entropy


ENTROPIES = {
    "raw moment": raw_entropy,
    "log_softmax": softmax_entropy,
    "vocabulary_head": head_entropy,
    "from bf16 logits": lambda z: head_entropy(z.bfloat16().float()),
}
worst, true_entropy = {}, {}
for kind in KINDS:
    for seed in range(5):
        z = rows_of_logits(kind, seed)
        truth = softmax_entropy(z.double())
        true_entropy[kind] = float(truth.mean())
        for name, entropy in ENTROPIES.items():
            error = (entropy(z).double() - truth).abs().max()
            worst.setdefault((kind, name), []).append(float(error))

# %% mystnb={"image": {"alt": "Largest error of the entropy in nats on a logarithmic axis, for four kinds of rows and four ways to compute it, with a dot for each of five seeds. The raw moment is near one millionth for ordinary rows and near one thousandth with an offset of 1000. Log-softmax stays below one hundred thousandth, vocabulary_head below one millionth throughout. From bf16 logits the error is one fiftieth for ordinary rows and near one thousandth with an offset."}} tags=["hide-input"]
fig, ax = plt.subplots(figsize=(7, 4))
for i, name in enumerate(ENTROPIES):
    for k, kind in enumerate(KINDS):
        plots.seed_points(
            ax, k + 0.18 * (i - 1.5), worst[kind, name], index=i,
            label=name if k == 0 else None,
        )
ticks = [f"{kind}\nH ≈ {true_entropy[kind]:.2g}" for kind in KINDS]
ax.set_xticks(range(len(KINDS)), ticks)
ax.set(
    yscale="log", ylabel="largest error of the entropy (nats)",
    ylim=(1e-7, 1e-1),
)
fig.legend(loc="outside lower center", ncols=4)
plt.show()

# %% tags=["nbval-check-output"]
for kind in KINDS:
    error = max(worst[kind, "vocabulary_head"])
    assert error < 2e-5, (kind, error)
    print(f"{kind:13} vocabulary_head within 2e-5 nats, five seeds")

# %% tags=["hide-input"]
share = np.mean(worst["offset +1000", "raw moment"])
share /= true_entropy["offset +1000"]
Markdown(
    f"With an offset of 1,000 the raw moment is off by {share:.0%} of the "
    "entropy of these peaked rows. Without an offset it is not bad."
)

# %% [markdown]
# The last way shows a limit that no kernel lifts. Near 1,000 neighbouring bf16 numbers
# are 4 apart, and what rounding took is gone before the first sum. So the shifted moment
# earns its keep where logits are float32: in float32 training, and in a kernel that
# folds the accumulator of the product before anything is rounded (step 4).

# %% [markdown]
# ## Turn one knob
#
# ### The offset of the logits
#
# A constant added to all logits of a row changes no probability. Here it grows from 1
# to 10,000. Left, the error of the entropy of a peaked row. Right, the error of the
# entropy's gradient by the logits, by the formula in $u$ and by the same formula
# written in $z$, as $-p_j\,(z_j - \sum p z)$ with each sum in float32.

# %% mystnb={"image": {"alt": "Two panels against the offset of the logits from 1 to 10,000, all axes logarithmic. Left, error of the entropy: the raw moment's error rises with the offset by about three orders of magnitude, the shifted one stays level below one millionth. Right, relative error of the gradient: the form in z rises with the offset, the form in u stays level."}} tags=["hide-input"]
offsets = np.array([1, 3, 10, 30, 100, 300, 1000, 3000, 10_000])
errors = {name: [] for name in ("raw", "shifted", "in z", "in u")}
for offset in offsets:
    z = rows_of_logits("peaked", 0) + float(offset)
    exact_u = z.double().log_softmax(1)
    exact_p = exact_u.exp()
    H = -(exact_p * exact_u).sum(1)
    gradient = -exact_p * (exact_u + H[:, None])

    moments = rows.row_moments(z, rows.Logits(), rows.MomentFlags())
    s, t = moments.sum_exp, moments.first
    shifted = s.log() - t / s
    u = z - moments.maximum[:, None] - s.log()[:, None]
    p = (z - moments.maximum[:, None]).exp() / s[:, None]
    mean = (p * z).sum(1, keepdim=True)
    for name, found in [("raw", raw_entropy(z)), ("shifted", shifted)]:
        errors[name].append(float((found.double() - H).abs().mean()))
    for name, found in [
        ("in z", -p * (z - mean)),
        ("in u", -u.exp() * (u + shifted[:, None])),
    ]:
        error = (found.double() - gradient).norm() / gradient.norm()
        errors[name].append(float(error))

fig, panels = plt.subplots(1, 2, figsize=(7, 3.4))
labels = {
    "raw": "raw: log Σeᶻ − Σpz",
    "shifted": "shifted: log s − t/s",
    "in z": "written in z",
    "in u": "written in u",
}
pairs = [("raw", "shifted"), ("in z", "in u")]
for ax, pair in zip(panels, pairs, strict=True):
    for i, name in enumerate(pair):
        style = plots.arm_style(1 - i)
        ax.plot(offsets, errors[name], label=labels[name], **style)
    ax.set(xscale="log", yscale="log", xlabel="offset added to all logits")
    ax.legend(loc="upper left")
low, high = min(errors["shifted"]), max(errors["raw"])
panels[0].set(
    ylabel="error of the entropy (nats)", ylim=(low / 3, high * 30)
)
low, high = min(errors["in u"]), max(errors["in z"])
panels[1].set(
    ylabel="relative error of its gradient", ylim=(low / 3, high * 30)
)
plt.show()

# %% tags=["nbval-check-output"]
at_1000 = list(offsets).index(1000)
for bad, good in [("raw", "shifted"), ("in z", "in u")]:
    ratio = errors[bad][at_1000] / errors[good][at_1000]
    print(f"offset 1000: {bad} is over 10 times worse than {good}:",
          ratio > 10)

# %% [markdown]
# ### The workspace
#
# A larger tile means fewer, larger products. A smaller one means less memory. The
# knob is `ftlib.ops.tiles.WORKSPACE_BYTES`; here for 1,024 tokens in loss-known mode.

# %% mystnb={"image": {"alt": "Two panels against the workspace from 1 to 256 MiB on logarithmic axes. Left, the peak memory of a step: level while the workspace is small, then rising in proportion to it. Right, the time of a step."}} tags=["hide-input"]
spaces = 4 ** np.arange(5)
x, w, y = inputs(1024)
peak, clock = [], []
for space in spaces:
    tiles.WORKSPACE_BYTES = int(space) * 2**20
    step = partial(train_step, loss_known, x, w, y)
    clock.append(seconds(step) * 1e3)
    x.grad = w.grad = None
    peak.append(peak_bytes(step) / 2**20)
tiles.WORKSPACE_BYTES = whole_workspace
torch.set_num_threads(threads)
fig, (left, right) = plt.subplots(1, 2, figsize=(7, 3.2))
left.plot(spaces, peak, "o-", label="measured")
left.plot(spaces, spaces, "--", color="grey", label="the workspace")
right.plot(spaces, clock, "o-")
for ax in (left, right):
    ax.set(xscale="log", xlabel="workspace (MiB)")
    ax.set_xticks(spaces, map(str, spaces))
    ax.minorticks_off()
left.set(yscale="log", ylabel="peak memory of a step (MiB)")
left.legend()
right.set(ylabel="time of a step (ms)", ylim=(0, None))
plt.show()

# %% [markdown]
# The workspace is a bound, and most of the time the twins stay well below it. A small
# one saves nothing more once the gradients themselves are what is left. A tiny one costs
# time: the float32 sum for $\partial W$ is passed over once for every tile.

# %% [markdown]
# ## Peers beside ours
#
# The comparison on a GPU is made by `benchmarks/vocabulary_head.py`, which records it.
# Each head first has to agree with a reference in higher precision. Then its time is
# divided by its **floor**: the time of the matrix products that its task cannot do
# without, at the rate that the same device reaches on plain large products. The floor
# is measured there, not taken from a data sheet. A head with a ratio of 1 would have
# nothing left to gain.
#
# The goals were set from the ceilings above before anything was measured, for an H200,
# 8,192 tokens and bf16:

# %% tags=["hide-input"]
GOALS = {  # milliseconds by task, for T5-base, Qwen2.5-1.5B and D = 2,048
    "forward": (0.90, 6.5, 8.6),
    "loss: CE+entropy": (2.6, 21, 28),
}
GOAL_SIZES = [(32_128, 768), (151_936, 1536), (151_936, 2048)]
SHOWN = ("forward", "autograd", "loss: CE+entropy")
rows_shown = [["task", *(f"V = {v:,}, D = {d:,}" for v, d in GOAL_SIZES)]]
for task, limits in GOALS.items():
    count = 1 if task == "forward" else 3
    cells = []
    for ms, (v, d) in zip(limits, GOAL_SIZES, strict=True):
        floor = count * 2 * 8192 * d * v / FLOPS * 1e3
        cells.append(f"≤ {ms} ms, {ms / floor:.2f} × floor")
    rows_shown.append([task, *cells])
rows_shown.append(["autograd", *["≤ 1.40 × floor"] * 3])
Markdown(results.markdown_table(rows_shown))


# %% tags=["hide-input"]
def peer_records():
    """The GPU's records, else the CPU's, else none."""
    for scale in ("gpu", "cpu"):
        try:
            return scale, results.load("kernels", scale)
        except results.NotRecordedError:
            continue
    return None, results.Results([])


def fault(record):
    if "failed" in record.settings:
        return "it failed"
    differing = record.settings["differing"]
    return f"differs in {', '.join(differing)}" if differing else ""


peer_scale, peers = peer_records()
COMMAND = "`make gpu`, or `python benchmarks/vocabulary_head.py` alone"
if peer_scale == "gpu":
    text = f"Recorded on {peers[0].device}, with {COMMAND}."
else:
    text = (
        "**The GPU figures are still to be measured.** No time of ours on "
        "a GPU is known. A GPU of compute capability 8.0 or more makes "
        f"them with {COMMAND}; this section then draws them."
    )
    if peer_scale == "cpu":
        text += (
            f"\n\nBelow is the record of a CPU ({peers[0].device}), where "
            "only what runs there takes part. It shows that the comparison "
            "runs, and not how a GPU would answer."
        )
Markdown(text)


# %% mystnb={"image": {"alt": "One panel for each of three tasks: forward, autograd and loss with entropy. One row for each head, of ours and of other libraries. The horizontal axis, logarithmic, is the time divided by the floor, which is a line at one. A marker for each size of the problem."}} tags=["hide-input"]
def size_of(record):
    return record.settings["columns"], record.settings["hidden"]


TICKS = (1, 2, 4, 8, 16, 32)
good = [
    record
    for record in peers
    if record.settings["task"] in SHOWN
    and record.settings["data"] == "peaked"
    and not fault(record)
    and (peer_scale == "cpu" or size_of(record) in GOAL_SIZES)
]
if good:
    heads = sorted(
        {r.arm for r in good}, key=lambda name: (name[:4] != "ours", name)
    )
    sizes = sorted({size_of(record) for record in good})
    slowest = max(1 / r.metrics["floor_fraction"].value for r in good)
    fig, panels = plt.subplots(
        1, len(SHOWN), figsize=(7, 1.9 + 0.24 * len(heads)), sharey=True
    )
    for ax, task in zip(panels, SHOWN, strict=True):
        for i, (v, d) in enumerate(sizes):
            of_size = [
                record
                for record in good
                if record.settings["task"] == task
                and size_of(record) == (v, d)
            ]
            ax.plot(
                [1 / r.metrics["floor_fraction"].value for r in of_size],
                [heads.index(r.arm) for r in of_size],
                plots.arm_style(i)["marker"],
                color=plots.colour(i),
                markeredgecolor="black",
                label=f"V = {v:,}, D = {d:,}",
            )
        ax.axvline(1, color="black", linewidth=1)
        ax.set(xscale="log", xlabel="time / floor", title=task)
        ax.set_xticks(TICKS, map(str, TICKS))
        ax.minorticks_off()
        ax.set_xlim(0.85, 1.2 * slowest)
        ax.set_yticks(range(len(heads)), heads)
        ax.set_ylim(len(heads) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=3)
    plt.show()


# %% tags=["hide-input"]
def milliseconds(record):
    return record.metrics["milliseconds"].value


compared = [
    ["task", "V", "D", "ours", "ms", "× floor", "best peer", "peer / ours"]
]
for task in SHOWN:
    for v, d in sorted({size_of(record) for record in good}):
        here = [
            record
            for record in good
            if record.settings["task"] == task and size_of(record) == (v, d)
        ]
        ours = [r for r in here if r.arm.startswith("ours")]
        theirs = [r for r in here if not r.arm.startswith("ours")]
        if not (ours and theirs):
            continue
        best = min(ours, key=milliseconds)
        peer = min(theirs, key=milliseconds)
        compared.append(
            [
                task, f"{v:,}", f"{d:,}", best.arm,
                f"{milliseconds(best):.3g}",
                f"{1 / best.metrics['floor_fraction'].value:.2f}",
                peer.arm, f"{milliseconds(peer) / milliseconds(best):.2f}",
            ]
        )
left_out = sorted({f"{r.arm} ({fault(r)})" for r in peers if fault(r)})
text = results.markdown_table(compared) if len(compared) > 1 else ""
if left_out:
    text += "\n\nLeft out of the figure: " + "; ".join(left_out) + "."
if text:
    display(Markdown(text))

# %% [markdown]
# ### Verdicts

# %% tags=["hide-input"]
later = "time not measured here"
if peer_scale == "gpu":
    later = "see the table above"
known = growth["ftlib, loss-known mode"]
verdicts = [
    ["", "claim", "verdict", "what we can say"],
    [
        "k‑1",
        "not storing the logits saves the memory, without slowing training",
        "**memory: holds**",
        f"peak grows by {known:.2f} where plain's grows by "
        f"{growth['plain']:.1f}; {later}",
    ],
    [
        "k‑2",
        "gradients in the forward pass save memory and cost time",
        f"**memory: holds**; {later}",
        f"{counted['ftlib, loss-known mode']:.0f} products, as many as "
        "plain code: they do not explain a loss of time (exercise 5)",
    ],
    [
        "k‑3",
        "42, 59, 192 and 167 ms on an H100",
        "**not tested here**",
        "none of it was run by us; exercise 5 reads it as rates",
    ],
    [
        "k‑4",
        "one kernel for log-probability and entropy, 14 times faster",
        "**not tested here**",
        f"the passes over the logits fall from {PLAIN} to {BLOCK} bytes a "
        f"logit in a training step, by count; {later}",
    ],
    [
        "k‑5",
        "log-probability and entropy differentiable without the logits",
        "**holds, and goes further**",
        f"all {len(NAMES)} statistics are differentiable, checked against "
        "autograd in float64",
    ],
]
Markdown(results.markdown_table(verdicts))

# %% [markdown]
# ## What went wrong, and what is not known
#
# Mistakes of others are instructive because their authors are good.
#
# * **Columns that do not exist.** verl's kernel loaded the columns beyond $V$ as zeros,
#   and a zero is a logit like any other. The tests drew small uniform numbers and a
#   round $V$, so nothing showed; in training, log-probabilities above zero did
#   ([2656](https://github.com/verl-project/verl/issues/2656),
#   [2899](https://github.com/verl-project/verl/issues/2899), mended in
#   [5349](https://github.com/verl-project/verl/pull/5349)). T5's 32,128 is not a multiple
#   of 256 either.
# * **A maximum that starts at zero.** When verl 0.9.1 merges its parts, the running
#   maximum begins at 0. We ran its forward kernel in the interpreter: with logits around
#   −80 it is right, around −120 the entropy is not a number (exercise 2).
# * **The raw moment.** TRL 1.16 takes the entropy as $\log\sum e^z - \sum pz$. TRL's authors
#   found another thing worth copying: rounding each block's part of $\partial W$ to bf16
#   made the entropy drift within a few dozen steps. `ftlib` sums it in float32.
# * **Skipped gradients.** CCE's filter leaves out blocks of small entries; small is not
#   negligible when the prediction is flat (exercise 7).
# * **An adapter that is ignored.** A fused head that reads `lm_head.weight` trains as if
#   the LoRA adapter on the head were not there, and says nothing
#   ([TRL 4612](https://github.com/huggingface/trl/issues/4612)). This is why `output_head`
#   measures.
# * **Row offsets.** 8,192 tokens × 262,144 words are $2^{31}$ logits, one more than a
#   32-bit integer can count.
# * **The interpreter is not a GPU.** It computes bf16 wrongly, so our kernels refuse
#   bf16 there and are tested in float32 and float16 ([Triton 10945](https://github.com/triton-lang/triton/issues/10945)).
#   With Triton 3.6 and NumPy 2.4 or later a `range` with a bound known only at run time
#   fails ([9171](https://github.com/triton-lang/triton/issues/9171)), so $V$ is a
#   `tl.constexpr` in the steps above. And programs run one after the other there, so it
#   can never show a race.
#
# Not known, or not as good as it may sound:
#
# * Which back end wins at which width. `ftlib` folds in the product's own kernel up to
#   $D$ = 1,024 and uses a tile above; that border is arithmetic, to be measured.
# * The tile is in the precision of the hidden states. In bf16 training its logits are
#   rounded like everybody's, with the error of the last way in the figure over seeds.
# * The workspace is not all: in 16-bit training the gradient of $W$ is summed in float32,
#   4 bytes for each of its $V D$ entries.
# * Loss-known mode cannot express a loss of several tokens together. It does not warn
#   about a wrong coefficient either: `weights` are taken as constants.
# * The vocabulary is in one place. Split over GPUs, the moments merge as in exercise 4;
#   `ftlib` does not do that yet.

# %% [markdown]
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/vocabulary_head.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/vocabulary_head.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# [The reference](../book/api/ops.md) describes all of `ftlib.ops`.
#
# **1. The varentropy.** It is $v = \sum p\,u^2 - H^2$. Derive its gradient from the one
# rule, and check it with `by_rule`, which takes $\varphi'$ by autograd.

# %% tags=["hide-cell", "nbval-check-output"]
z = 4 * torch.randn(
    5, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
)
y = torch.zeros(5, dtype=torch.int64)
u, p = z.log_softmax(1), z.softmax(1)
at = statistics(z, y)
H, v = at["entropy"][:, None], at["varentropy"][:, None]

second = by_rule(lambda p: p * p.log() ** 2, z)  # of Σ p u²
first = by_rule(lambda p: -p * p.log(), z)  # of H
derived = p * (u**2 + 2 * (1 + H) * u + 2 * H + H**2 - v)
torch.testing.assert_close(second - 2 * H * first, derived)
print("dv/dz = p (u² + 2(1+H)u + 2H + H² − v)")


# %% [markdown]
# **2. A maximum that starts at zero.** The online pass starts with $m = -\infty$. Start
# it at 0 instead, which looks harmless. Find logits for which the entropy is not a
# number.

# %% tags=["hide-cell", "nbval-check-output"]
def online_entropy(z, start, block=128):
    m = torch.full((len(z),), start)
    s, t = torch.zeros(len(z)), torch.zeros(len(z))
    for tile in z.split(block, dim=1):
        new = torch.maximum(m, tile.amax(1))
        d = torch.where(m.isinf(), 0.0, m - new)
        shifted = tile - new[:, None]
        t = d.exp() * (t + d * s) + (shifted.exp() * shifted).sum(1)
        s = d.exp() * s + shifted.exp().sum(1)
        m = new
    return s.log() - t / s


for offset in (0.0, -80.0, -120.0):
    z = random_logits(4, 1000, scale=1.0, offset=offset).cpu()
    wrong = online_entropy(z, start=0.0).isfinite().all().item()
    right = online_entropy(z, start=-math.inf).isfinite().all().item()
    print(f"logits around {offset:4.0f}: finite from 0: {wrong!s:5}  "
          f"from −∞: {right}")

# %% [markdown]
# Below about −88 (−103 with denormal numbers), $e^{z}$ is 0 in float32, so $s = 0$ and
# $t/s = 0/0$. Nothing in a model keeps its logits above that.
#
# **3. The z-loss.** It is $\zeta\,(\log\sum e^z)^2$ and holds the scale of the logits.
# Which coefficients does it need? Check against `TokenLoss`.

# %% tags=["hide-cell", "nbval-check-output"]
torch.manual_seed(0)
zeta = 1e-2
x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
w = torch.randn(300, 16, dtype=torch.float64)
y = torch.randint(300, (6,))
z = (x @ w.T).detach()
A = 2 * zeta * z.logsumexp(1, keepdim=True)  # g_lse = 2 ζ lse, and no more
vocabulary_head(
    x, w, y, loss=TokenLoss(cross_entropy=0.0, z_loss=zeta),
    reduction="sum",
).loss.backward()
torch.testing.assert_close(x.grad, (A * z.softmax(1)) @ w)
print("z-loss: A = 2 ζ lse; B, C, E, F and g are zero")


# %% [markdown]
# **4. Two halves of a vocabulary.** On a GPU several programs share a row, and so do
# several GPUs in tensor-parallel training. Each has $(m, s, t)$ of its part. Merge them.
# Does the order matter?

# %% tags=["hide-cell", "nbval-check-output"]
def part_moments(z):
    m = z.amax(1)
    shifted = z - m[:, None]
    return m, shifted.exp().sum(1), (shifted.exp() * shifted).sum(1)


def merge(a, b):
    m = torch.maximum(a[0], b[0])
    s = t = 0.0
    for m_part, s_part, t_part in (a, b):
        d = m_part - m
        s = s + d.exp() * s_part
        t = t + d.exp() * (t_part + d * s_part)
    return m, s, t


z = random_logits(4, 999).double().cpu()
a, b, c = (part_moments(part) for part in z.split(333, dim=1))
whole = part_moments(z)
for order in ((a, b, c), (c, a, b), (b, c, a)):
    merged = merge(merge(order[0], order[1]), order[2])
    torch.testing.assert_close(merged, whole, rtol=1e-12, atol=1e-12)
print("three thirds in any order give the moments of the whole")

# %% [markdown]
# **5. Read the claims as rates.** From k‑3, at which rate did the bare products run, and
# which part of the 192 ms and of the 59 ms are they? If a design makes the logits again
# once for $\partial X$ and once for $\partial W$, how many products does it need?

# %% tags=["hide-cell", "nbval-check-output"]
flops = 6 * 8192 * 4096 * 151_936
print(f"bare products: {flops / 42e-3 / 1e12:.0f} TFLOP/s")
for name, ms in {"Liger": 192, "plain PyTorch": 59}.items():
    print(f"{name:14} {42 / ms:.0%} of its time are products, "
          f"at most {flops / ms * 1e3 / 1e12:.0f} TFLOP/s")
print("again for each gradient: 1 + 2 + 2 = 5 products,",
      f"{5 / 3:.2f} times the least")


# %% [markdown]
# **6. Your own statistic.** Take $\sum_k p_k^3$, the chance that three draws agree. Why
# does it not fit the formula? Which summand is missing?

# %% tags=["hide-cell", "nbval-check-output"]
def agree(p):
    return p**3


z = random_logits(5, 300, seed=2).double().cpu()
p = z.softmax(1)
R = 3 * (p**3).sum(1, keepdim=True)  # φ'(p) = 3 p², so R = 3 Σ p³
summand = p * (3 * p**2 - R)
torch.testing.assert_close(by_rule(agree, z), summand)
design = torch.stack((p, p * p.log(), p**2, p * p.log() ** 2), dim=-1)
fit = design @ torch.linalg.lstsq(design, summand[..., None]).solution
left_over = (fit[..., 0] - summand).norm() / summand.norm()
print("p (3p² − R) equals autograd")
print("four coefficients leave something over:", bool(left_over > 1e-3))


# %% [markdown]
# $\varphi' = 3p^2$ is none of $1, u, p, u^2$. The formula needs a summand $G\,p_j^3$ with
# $G = 3g$, and $A$ gets $-3g\sum p^3$.
#
# **7. Skipping small gradients.** CCE skips a block of the gradient when all its entries
# lie below $\varepsilon = 2^{-12}$. How much of the gradient of a cross-entropy goes
# missing, for a model at its start and for a trained one? Use blocks of 128 × 128.

# %% tags=["hide-cell", "nbval-check-output"]
def skipped(scale, n=256, side=128):
    """Shares of the blocks, and of Σ|dz|, that fall below the threshold."""
    z = random_logits(n, 251 * side, scale=scale).cpu()
    p = z.softmax(1)
    y = torch.multinomial(p, 1)
    dz = p.scatter_add(1, y, -torch.ones(n, 1)).abs()
    blocks = dz.view(n // side, side, -1, side)
    small = blocks.amax((1, 3)) < 2.0**-12
    lost = (blocks.sum((1, 3)) * small).sum() / dz.sum()
    return small.double().mean().item(), lost.item()


states = [(0.1, "at the start"), (2.0, "spread"), (6.0, "peaked")]
for scale, name in states:
    blocks, mass = skipped(scale)
    print(f"{name:13} skips {blocks:4.0%} of the blocks, "
          f"with {mass:4.0%} of the gradient")

# %% [markdown]
# What is skipped is the push on the many words that were *not* the target. It is small
# in each and not small in sum when the prediction is flat. CCE's exact mode
# (`filter_eps=None`) is the fair peer for a new model; the filtered one for a trained
# model whose probabilities, sorted, leave whole blocks empty.

# %% [markdown]
# ## Run it at scale `gpu`
#
# `make gpu` times the vocabulary head and its peers too; alone it is
#
# ```bash
# python benchmarks/vocabulary_head.py
# ```
#
# It needs a GPU of compute capability 8.0 or more. Peers that are not installed are
# left out and named; `make bench` installs them first.

# %% tags=["hide-input"]
if peer_scale == "gpu":
    minutes = sum(record.seconds for record in peers) / 60
    memory_used = max(record.peak_memory_bytes for record in peers) / 2**30
    text = (
        f"Recorded on {peers[0].device}: {len(peers)} arms, {minutes:.0f} "
        f"minutes, at most {memory_used:.0f} GiB."
    )
else:
    text = (
        "No `gpu` run is recorded yet: minutes and memory of this scale "
        "are still to be measured."
    )
Markdown(text)

# %% [markdown]
# ## References
#
# * The head without logits: {cite:t}`wijmans2025cut`; its code:
#   <https://github.com/apple/ml-cross-entropy>.
# * Gradients in the forward pass: {cite:t}`hsu2024liger`; code and benchmark file:
#   <https://github.com/linkedin/Liger-Kernel>.
# * The online softmax: {cite:t}`milakov2018online`.
# * The roofline: {cite:t}`williams2009roofline`.
# * Triton: {cite:t}`tillet2019triton`.
# * TRL <https://github.com/huggingface/trl>, verl <https://github.com/verl-project/verl>.
