# %% [markdown]
# # Scaling out: from one process to a cluster
#
# Every training in this book so far fitted into one process. The methods do not stop
# there. A model of seven billion weights does not fit on a GPU of 80 GB once it is trained
# in full, and a data set can be larger than the memory of any machine.
#
# This chapter takes the same `train` to several processes, counts what each of them has
# to hold, and reads data that it never holds. Two processes are started here, live, on
# the CPU. Nothing larger was run: what the chapter says about 7 and 70 billion weights
# is **projected** from counts, and marked so.

# %% [markdown]
# ## What you will be able to do
#
# * start one training on one, two or sixty-four processes, and check that it is the
#   same training;
# * say what fills a GPU: weights, gradients, the optimiser's state, activations,
#   logits; and how many bytes each takes, before you rent the GPU;
# * choose between full fine-tuning, adapters and a circuit, and between copies and
#   shards of the model, from a table of gigabytes;
# * train on a file that is larger than memory;
# * know the ways in which several processes silently become one, or become another
#   training.
#
# You need: the chapters' `train`, and what AdamW keeps. No GPU and no cluster.

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
import io
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from bisect import bisect_left
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import psutil
import torch
from accelerate import notebook_launcher
from IPython.display import Markdown
from safetensors.torch import load_file
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import Qwen2Config, Qwen2ForCausalLM

from ftlib import footprint as fp
from ftlib import plots, results
from ftlib.footprint import footprint, measured_peak, train_flops
from ftlib.training import TrainingSettings, example_ids

# The processes of this chapter are processes on the CPU, here as on a
# machine with GPUs, and talk to each other over the loopback interface.
os.environ |= {
    "FTLIB_DEVICE": "cpu",
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
}
torch.set_num_threads(1)
# transformers is about to rename the switch for checkpoints.
warnings.filterwarnings("ignore", ".*checkpointing", FutureWarning)
plots.use_style()
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## The idea in one picture
#
# What one process holds in a step of training Qwen2.5-7B, counted by `ftlib.footprint`.
# Each process works on one sequence of 4,096 tokens, and the optimiser is PyTorch's AdamW
# with its default settings. The dashed lines are GPUs. Eight copies of the model (DDP) do
# not help: each process holds all of it, and the gradients a second time, in the buffers
# that are exchanged.
# Spread over processes (FSDP), weights, gradients and optimiser shrink; the activations
# do not, for every process has its own tokens.

# %% mystnb={"image": {"alt": "Stacked horizontal bars of gigabytes in each process, for six ways to train Qwen2.5-7B, with dashed lines for three GPUs. Full fine-tuning on one GPU and with DDP on eight reach past the last line. With FSDP on eight processes the bar is a fraction of these, on 64 shorter still. LoRA and a circuit on one GPU are short and alike, almost all of them weights."}} tags=["hide-input"]
QWEN, LLAMA = fp.SHAPES.values()
TOKENS = 4096
GPU_GB = {"A10G": 24, "H100": 80, "H200": 141}


def step_of(decoder, way, processes=1, stage=3, tokens=TOKENS):
    """The footprint of a way to train, with checkpoints, without logits."""
    trained, precision = {
        "full": (fp.everything(decoder), fp.AUTOCAST),
        "LoRA": (fp.lora(decoder, rank=16), fp.BF16_WITH_MASTER),
        "circuit": (fp.circuit(decoder, 32, 16), fp.BF16_WITH_MASTER),
    }[way]
    return footprint(
        decoder, trained, tokens, precision, checkpointing=True,
        stores_logits=False, processes=processes, stage=stage,
    )


ways = {
    "full, 1 process": step_of(QWEN, "full"),
    "full, DDP on 8": step_of(QWEN, "full", 8, stage=0),
    "full, FSDP on 8": step_of(QWEN, "full", 8),
    "full, FSDP on 64": step_of(QWEN, "full", 64),
    "LoRA, 1 process": step_of(QWEN, "LoRA"),
    "circuit, 1 process": step_of(QWEN, "circuit"),
}


def at_peak(parts):
    """The parts that are there at the larger of the two moments."""
    head = max(parts.head, parts.recomputed)
    if parts.saved + head > parts.gradients + parts.update:
        late = {"activations": parts.saved + head}
    else:
        late = {"gradients": parts.gradients, "update": parts.update}
    standing = {
        "weights": parts.weights,
        "optimiser": parts.optimizer,
        "exchanged": parts.exchanged,
    }
    return standing | late


KINDS = "weights optimiser exchanged gradients update activations".split()
fig, ax = plt.subplots(figsize=(7, 4.2))
left = np.zeros(len(ways))
for i, kind in enumerate(KINDS):
    size = np.array([at_peak(p).get(kind, 0) / 1e9 for p in ways.values()])
    ax.barh(
        list(ways), size, left=left, color=plots.colour(i), label=kind,
        hatch=("", "//", "..", "xx", "\\\\", "--")[i], edgecolor="white",
    )
    left += size
for name, size in GPU_GB.items():
    ax.axvline(size, color="black", linestyle="--", linewidth=1)
    ax.text(size + 1, -0.55, f"{name}, {size} GB", fontsize=8, va="bottom")
ax.set_ylim(len(ways) - 0.5, -0.9)
ax.set_xlabel("GB in each process, projected")
fig.legend(loc="outside lower center", ncols=6)
plt.show()

# %% tags=["hide-input"]
alone = ways["full, 1 process"]
fused = replace(alone, update=0).peak / 1e9
fitting = [name for name, size in GPU_GB.items() if fused < size]
Markdown(
    f"""
With PyTorch's default AdamW, full fine-tuning in one process takes
{alone.peak / 1e9:.0f} GB, more than any of these GPUs has. Of these,
{alone.update / 1e9:.1f} GB are a copy of the second moments, which the
default step on a GPU makes for all weights at once. With `fused=True` there
is no copy, and {fused:.0f} GB are left. That fits on:
{", ".join(fitting) or "none of them"}.
"""
)

# %% [markdown]
# ## What the papers claim
#
# All numbers in this table are **theirs**.
#
# | | claim | source |
# | --- | --- | --- |
# | s‑1 | Mixed-precision Adam holds 16 bytes per weight. Over 64 processes, a model of 7.5 billion weights falls from 120 GB each to 31.4, 16.6 or 1.9 GB, as optimiser, gradients and weights are divided one after the other | ZeRO {cite:p}`rajbhandari2020zero` |
# | s‑2 | FSDP trains as DDP does and divides all three; it scales near-linearly in TFLOPS | {cite:t}`zhao2023fsdp` |
# | s‑3 | Keeping only some activations and making the others again costs about one more forward pass | {cite:t}`chen2016sublinear` |
# | s‑4 | A layer keeps $sbh\,(34 + 5as/h)$ bytes of activations, for $s$ tokens, $b$ sequences, width $h$ and $a$ heads; the second term is the table of attention scores | {cite:t}`korthikanti2023reducing` |
# | s‑5 | Training takes 6 FLOPs per weight and token | {cite:t}`kaplan2020scaling` |
# | s‑6 | With GPT-3, LoRA takes memory from 1.2 TB to 350 GB | {cite:t}`hu2022lora` |
# | s‑7 | 38 to 43 % of the hardware's FLOPs are used by the model, on up to 16,384 H100 | {cite:t}`grattafiori2024llama` |

# %% [markdown]
# ## The equations
#
# ### Why several processes can be one training
#
# `train` asks of a loss that it is a mean over the examples of its batch. A global batch
# of $B$ examples with losses $\ell_i$ is cut into $n$ equal shares $S_1 \dots S_n$. Then
#
# $$
# \frac1B \sum_{i=1}^{B} \nabla \ell_i
# = \frac1n \sum_{p=1}^{n} \Big( \frac{n}{B} \sum_{i \in S_p} \nabla \ell_i \Big) .
# $$
#
# On the right, the bracket is what process $p$ computes alone, and the outer mean is
# what the processes exchange. The two sides are one number on paper. In floating point
# the sums have another order, so they agree to rounding and not bit for bit. If the
# shares are not equal, or the loss is a mean over something else, the identity is gone
# (exercise 3).
#
# Clipping needs one more thing. The norm has to be that of the whole gradient, whose
# parts may lie in different processes: $\lVert g \rVert^2 = \sum_p \lVert g_p \rVert^2$.
#
# ### Bytes
#
# For $P$ weights of which $T$ are trained, with $w$ bytes per weight and $n$ processes:
#
# | what | bytes | divided by $n$ from stage |
# | --- | --- | --- |
# | weights | $wP$ | 3 |
# | gradients | $wT$ | 2 |
# | state of AdamW: two moments, and a 32-bit copy if $w = 2$ | $8T$, or $12T$ | 1 |
# | activations of $L$ layers | $L \cdot a \cdot$ tokens | never |
# | logits | $12 V \cdot$ tokens | never |
#
# The stages are ZeRO's. DDP is stage 0, FSDP is stage 3. What a layer keeps, $a$ bytes
# per token, can be read from its code. With width $D$, $H$ query heads and $K$ key heads
# of $d$ features, an MLP of width $F$, and $e$ bytes per number in a product:
#
# $$
# \begin{aligned}
# a &= 2(4D + 4 + wD + eD) && \text{two norms} \\
#   &\quad + e\,(2H + 2K)\,d + 4H && \text{attention} \\
#   &\quad + 4eF && \text{MLP}
# \end{aligned}
# $$
#
# There is no $s^2$ in it: attention kernels keep one number per head and token, not the
# scores. Autocast casts the input of each of five products and keeps all five, so that
# $5eD$ stands there in place of $2eD$. With checkpoints a layer keeps $wD$, its input,
# and one layer at a time makes the rest again.
#
# ### The peak
#
# These do not all exist at once. Activations are complete when the head is reached, and
# have gone when the last gradient is made. So the peak is one of two moments. (The copy in
# the update is that of AdamW's `foreach` step, the default on a GPU.)
#
# $$
# \begin{aligned}
# &\text{weights} + \text{state} \\
# &+ \max\begin{cases}
# \text{activations} + \text{logits} \\
# \text{gradients} + \text{copy in the update}
# \end{cases}
# \end{aligned}
# $$
#
# ### FLOPs
#
# A token meets every matrix once forward, at 2 FLOPs per weight. The backward pass asks
# for the gradient by the input, 2 more, and by the weight, 2 more where it is trained.
# So full training takes 6 per weight and token, adapters a little over 4, checkpoints
# add nearly 2. Attention adds $4\,s^2 H d$ per layer and sequence forward, and twice
# that backward.

# %% [markdown]
# ## Build it
#
# The step of full training in 32 bits, by hand. Then the same numbers from `ftlib`, which
# knows the other precisions, subsets and stages too.

# %% tags=["nbval-check-output"]
CONFIG = LlamaConfig(
    vocab_size=1024, hidden_size=64, intermediate_size=160,
    num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    bos_token_id=None, eos_token_id=None, tie_word_embeddings=False,
)


def weights_by_hand(c):
    d = c.hidden_size // c.num_attention_heads
    attention = 2 * c.hidden_size * d
    attention *= c.num_attention_heads + c.num_key_value_heads
    layer = attention + 3 * c.hidden_size * c.intermediate_size
    norms = (2 * c.num_hidden_layers + 1) * c.hidden_size
    tables = 2 * c.vocab_size * c.hidden_size
    return c.num_hidden_layers * layer + norms + tables


def peak_by_hand(c, tokens):
    """Full training, 32 bits, no checkpoints, a table of logits."""
    P = weights_by_hand(c)
    D, F = c.hidden_size, c.intermediate_size
    H, K = c.num_attention_heads, c.num_key_value_heads
    a = 2 * (4 * D + 4 + 8 * D) + 4 * (2 * H + 2 * K) * (D // H)
    a += 4 * H + 16 * F
    at_head = tokens * (c.num_hidden_layers * a + 12 * c.vocab_size)
    at_update = 4 * P + 4 * P  # gradients, and AdamW's copy
    return 4 * P + 8 * P + max(at_head, at_update)


tiny = fp.Decoder.from_config(CONFIG)
whole = fp.everything(tiny)
with torch.device("meta"):
    model = LlamaForCausalLM(CONFIG)
assert weights_by_hand(CONFIG) == tiny.weights == model.num_parameters()
for tokens in (48, 384, 1152):
    by_hand = peak_by_hand(CONFIG, tokens)
    assert by_hand == footprint(tiny, whole, tokens, fp.FP32).peak
    print(f"{tokens:5} tokens: {by_hand:,} bytes")
print(f"{tiny.weights:,} weights, as in the model itself")

# %% [markdown]
# ## Use `ftlib`'s, and check it against what happens
#
# A formula for memory is worth what its comparison with memory is worth. On a GPU the
# allocator keeps the peak. On the CPU `measured_peak` watches every operation and counts
# the storages that are alive. We train the small model above for two steps in each way,
# and measure the second, when the optimiser's state is there.

# %%
PRECISIONS = {"fp32": fp.FP32, "autocast": fp.AUTOCAST, "bf16": fp.BF16}


def measured(name, checkpointing, sequences, length=48):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    if name == "bf16":
        model.bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    ids = torch.zeros(sequences, length, dtype=torch.int64)

    def step():
        on = name == "autocast"
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return measured_peak(step, model, optimizer)


def counted(name, checkpointing, sequences, length=48):
    return footprint(
        tiny, whole, sequences * length, PRECISIONS[name],
        checkpointing=checkpointing,
    ).peak


cases = [
    (name, checkpointing, sequences)
    for name in PRECISIONS
    for checkpointing in (False, True)
    for sequences in (1, 8, 24)
]
pairs = {case: (counted(*case), measured(*case)) for case in cases}

# %% tags=["hide-input"]
table = [
    ["precision", "checkpoints", "tokens", "counted", "measured", "ratio"]
]
for (name, checkpointing, sequences), (a, b) in pairs.items():
    table.append(
        [
            name, "yes" if checkpointing else "no", str(48 * sequences),
            f"{a / 1e6:.2f} MB", f"{b / 1e6:.2f} MB", f"{a / b:.3f}",
        ]
    )
Markdown(results.markdown_table(table))

# %% tags=["nbval-check-output"]
worst = max(abs(a / b - 1) for a, b in pairs.values())
assert worst < 0.05, pairs
print(f"{len(pairs)} steps, each counted to within 5 %: {worst < 0.05}")

# %% tags=["hide-input"]
few = max(abs(a / b - 1) for case, (a, b) in pairs.items() if case[2] == 1)
text = f"""
The largest error is {worst:.1%}. The counts lie a little low with many
tokens: buffers of single operations are left out. With few tokens the peak
is the update, and the count is off by {few:.2%} at most.
"""
Markdown(text)


# %% [markdown]
# ### At the width of a real model
#
# The small model is narrow. PyTorch can run a step without memory: its *fake* tensors
# have shapes and no contents. So the widths can be real. Here are two of the 28 layers of
# Qwen2.5-7B with their full vocabulary, and one sequence of 4,096 tokens. Nothing is
# computed, but every storage that the step would ask for is asked for and counted.

# %% tags=["nbval-check-output"]
def fake_step(decoder, tokens):
    """Peak of a forward and backward pass under autocast."""
    config = Qwen2Config(
        vocab_size=decoder.vocabulary, hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.kv_heads, tie_word_embeddings=False,
    )
    with FakeTensorMode():
        model = Qwen2ForCausalLM(config).train()
        ids = torch.zeros(1, tokens, dtype=torch.int64)

        def step():
            with torch.autocast("cpu", torch.bfloat16):
                out = model(input_ids=ids, labels=ids, use_cache=False)
            loss = out.loss
            del out
            loss.backward()

        return measured_peak(step, model)


two = replace(QWEN, layers=2)
full = fp.everything(two)
with_state = footprint(two, full, TOKENS, fp.AUTOCAST)
expected = replace(with_state, optimizer=0, update=0).peak
found = fake_step(two, TOKENS)
assert abs(expected / found - 1) < 0.05
print(f"counted {expected / 1e9:.1f} GB, asked for {found / 1e9:.1f} GB")


# %% [markdown]
# ### FLOPs
#
# PyTorch counts those of every product. The formula has to agree to the last one.

# %% tags=["nbval-check-output"]
def flops_of_torch(checkpointing):
    model = LlamaForCausalLM._from_config(
        CONFIG, attn_implementation="eager"  # whose products are counted
    ).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.zeros(2, 48, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


for checkpointing in (False, True):
    by_formula = train_flops(
        tiny, whole, 2, 48, checkpointing=checkpointing
    )
    assert by_formula == flops_of_torch(checkpointing)
    name = "with" if checkpointing else "without"
    print(f"{name:7} checkpoints: {by_formula:,} FLOPs")

# %% [markdown]
# ## The same training on two processes
#
# This is a whole training script. The model is small and in 64 bits, so that rounding
# stays out of the way; the loss is this book's, through
# [the vocabulary head](vocabulary_head.ipynb). Nothing in it says how many processes
# there are.

# %%
SCRIPT = '''\
"""Train a small model, on however many processes there are."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from ftlib.models.tiny import tiny_gpt
from ftlib.ops import TokenLoss, output_head, vocabulary_head
from ftlib.training import (
    Learner, TrainingSettings, default_accelerator, train,
)

SETTINGS = TrainingSettings(
    steps=6, batch_size=8, learning_rate=1e-2, max_grad_norm=0.5,
    accumulate=2,
)


def next_token(model, ids):
    """Mean over examples, since all are of one length."""
    head = output_head(model, input_ids=ids, use_cache=False)
    return vocabulary_head(
        head.hidden[:, :-1], head.weight, ids[:, 1:], loss=TokenLoss(),
        logit_scale=head.logit_scale,
    ).loss


def main(out, accelerator=None):
    accelerator = accelerator or default_accelerator()
    torch.manual_seed(0)
    model = tiny_gpt(vocab_size=32, width=32, context=16).double()
    learner = Learner(model, next_token)
    ids = torch.randint(32, (64, 16))
    history = train(
        learner, list(ids), lambda learner, batch: learner(ids=batch),
        SETTINGS, accelerator=accelerator,
    )
    state = accelerator.get_state_dict(learner)  # all processes take part
    shards = [getattr(p, "_local_tensor", p) for p in learner.parameters()]
    if accelerator.is_main_process:
        found = {name: tensor.clone() for name, tensor in state.items()}
        for name in ("loss", "grad_norm"):
            column = history.column(name)
            found[name] = torch.tensor(column, dtype=torch.float64)
        sizes = [accelerator.num_processes, sum(s.numel() for s in shards)]
        found["processes, weights held"] = torch.tensor(sizes)
        save_file(found, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
'''
(folder / "train_tiny.py").write_text(SCRIPT)
sys.path.insert(0, str(folder))


# %% [markdown]
# ### From the notebook
#
# `notebook_launcher` forks the notebook: each process begins with all that has been
# defined above. It has to come first. Once an `Accelerator` was made here, or a GPU was
# used, the notebook cannot be forked, and Accelerate refuses.

# %%
def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


import train_tiny

if torch.cuda.is_initialized():
    print("A GPU is in use here, so this notebook cannot be forked.")
else:
    with redirect_stdout(io.StringIO()):  # it would announce "CUDAs"
        notebook_launcher(
            train_tiny.main, (folder / "ddp.safetensors",),
            num_processes=2, use_port=free_port(),
        )

# %% [markdown]
# ### From the command line
#
# This is how it is done on a machine of your own and on a cluster: the same script on four
# GPUs with DDP, and a script for a large model with FSDP.
#
# ```bash
# accelerate launch --multi_gpu --num_processes 4 train_tiny.py out.safetensors
# accelerate launch --config_file book/cluster/fsdp.yaml train.py
# ```
#
# `batch_size` has to divide into processes times `accumulate`; `train` says so if it does
# not.
#
# FSDP wants a GPU for each process. Asked for it on CPUs, Accelerate goes on with DDP and
# says nothing. PyTorch's own FSDP has no such condition. So a second file tells Accelerate
# that it may. From there on it is the same sharding code as on GPUs, but neither bf16, nor
# checkpoints, nor NCCL, which carries the data there.

# %%
ON_CPUS = '''\
"""Train with FSDP on CPUs, for which Accelerate has no setting."""

import sys
from pathlib import Path

from accelerate import (
    Accelerator, DistributedType, FullyShardedDataParallelPlugin,
)
from accelerate.state import AcceleratorState, PartialState

import train_tiny

accelerator = Accelerator(cpu=True)
PartialState().distributed_type = DistributedType.FSDP
AcceleratorState().fsdp_plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["GPT2Block"],
)
train_tiny.main(Path(sys.argv[1]), accelerator)
accelerator.end_training()
'''
(folder / "fsdp_on_cpus.py").write_text(ON_CPUS)


def launch(kind, *script):
    """Launch a script on two processes; return what it prints."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", kind,
        "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", free_port(), *script,
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_ = launch("--multi_gpu", "fsdp_on_cpus.py", "fsdp.safetensors")

# %% [markdown]
# ### Ask what was started
#
# Two launches go wrong without a word. The first asks for two processes on the CPU, the
# second for FSDP there. So ask the `Accelerator` what it is.

# %% tags=["nbval-check-output"]
WHO = '''\
from accelerate import Accelerator, FullyShardedDataParallelPlugin

plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
accelerator.print(
    "processes:", accelerator.num_processes,
    " kind:", accelerator.distributed_type.value,
)
accelerator.end_training()
'''
(folder / "who.py").write_text(WHO)
for kind in ("--cpu", "--multi_gpu"):
    print(f"{kind:12}", launch(kind, "who.py"))

# %% [markdown]
# With `--cpu` two processes are one. With the second launch there are two, but their kind
# is `MULTI_CPU`, which is DDP: the plugin for FSDP was dropped.

# %% [markdown]
# ### Is it the same training?
#
# One process, here in the notebook, is what the two are held against: every loss, every
# norm of a gradient, every weight.

# %%
train_tiny.main(folder / "one.safetensors")
runs = {
    path.stem: load_file(path) for path in folder.glob("*.safetensors")
}
one = runs.pop("one")
sizes = {
    name: run.pop("processes, weights held").tolist()
    for name, run in (runs | {"one": one}).items()
}
LIMIT = 1e-12  # of float64, whose rounding is 1e-16, after six steps
for run in runs.values():
    torch.testing.assert_close(run, one, rtol=LIMIT, atol=LIMIT)


# %% tags=["hide-input"]
def largest(run, keys):
    return max((run[k] - one[k]).abs().max().item() for k in keys)


columns = ["loss", "grad_norm"]
weights = [key for key in one if key not in columns]
table = [["", "processes", "weights held by one", "loss, norm", "weights"]]
for name in ("one", *sorted(runs)):
    run = runs.get(name, one)
    differences = [largest(run, columns), largest(run, weights)]
    table.append(
        [
            {"one": "alone", "ddp": "DDP", "fsdp": "FSDP"}[name],
            *(f"{n:,}" for n in sizes[name]),
            *(f"{d:.0e}" if d else "–" for d in differences),
        ]
    )
Markdown(
    results.markdown_table(table)
    + "\n\nThe last two columns are the largest differences from one "
    "process."
)

# %% tags=["nbval-check-output"]
norms = one["grad_norm"]
print("FSDP on", sizes["fsdp"][0], "processes equals one process")
print("share of the weights in one of them:",
      f"{sizes['fsdp'][1] / sizes['one'][1]:.2f}")
print("gradients were clipped in every step:",
      bool((norms > train_tiny.SETTINGS.max_grad_norm).all()))

# %% [markdown]
# Three things had to be right for this table: the loss is a mean over examples, the norm
# that clips is that of the whole gradient, and every process works on its own part of
# the global batch. The first is the method's task, the others are `train`'s.
#
# ## Data larger than memory
#
# `train` takes any sequence that has a length and gives one example by its number. It
# never asks for more than a batch. So nothing forces the data into memory: a file that is
# **mapped** looks like an array, and the operating system reads the pages that are
# touched and drops them when it needs the room. `datasets` of Hugging Face work this way
# and can be passed to `train` as they are. For tokens, a `.npy` file and NumPy are enough.

# %%
LENGTH = 1024


class TokenFile:
    """A map-style sequence of windows of tokens, in a .npy file."""

    def __init__(self, path, mapped=True):
        self.tokens = np.load(path, mmap_mode="r" if mapped else None)

    def __len__(self):
        return len(self.tokens) // LENGTH

    def __getitem__(self, index):
        window = self.tokens[index * LENGTH : (index + 1) * LENGTH]
        return torch.from_numpy(window.astype(np.int64))


def write_tokens(path, megabytes):
    """Write random tokens, a megabyte at a time."""
    rng = np.random.default_rng(0)
    chunk = 2**19  # of two bytes each
    file = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint16, shape=(megabytes * chunk,)
    )
    for start in range(0, len(file), chunk):
        file[start : start + chunk] = rng.integers(
            50_000, size=chunk, dtype=np.uint16
        )
    file.flush()


for megabytes in (32, 256):
    write_tokens(folder / f"{megabytes}.npy", megabytes)


# %% [markdown]
# We read every example once, in the order of a training, and look at the memory of this
# process that no file stands behind. (Pages of the file are counted apart: they are a
# cache, and the system takes them back.)

# %%
def owned():
    """Resident bytes of this process, without pages of files."""
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def growth(megabytes, mapped):
    before = owned()
    data = TokenFile(folder / f"{megabytes}.npy", mapped)
    settings = TrainingSettings(
        steps=len(data) // 32, batch_size=32, learning_rate=1.0
    )
    highest = before
    for ids in example_ids(len(data), settings):
        batch = torch.stack([data[i] for i in ids])
        highest = max(highest, owned())
    assert batch.shape == (32, LENGTH)
    return (highest - before) / 2**20


grown = {
    (megabytes, mapped): growth(megabytes, mapped)
    for mapped in (True, False)
    for megabytes in (32, 256)
}
assert max(grown[32, True], grown[256, True]) < 16
assert grown[256, False] > 200

# %% tags=["hide-input"]
table = [["file", "mapped: memory grows by", "loaded: memory grows by"]]
for megabytes in (32, 256):
    cells = [grown[megabytes, mapped] for mapped in (True, False)]
    table.append([f"{megabytes} MiB", *(f"{c:.0f} MiB" for c in cells)])
Markdown(results.markdown_table(table))

# %% [markdown]
# ### Who reads what
#
# The examples of a step are a function of the seed and the step alone. Every process
# computes the same list and takes its own contiguous part. Nobody has to be told
# anything, and a run that goes on at step 1,000 asks for the list of step 1,000.

# %% tags=["nbval-check-output"]
settings = TrainingSettings(steps=1200, batch_size=8, learning_rate=1.0)
straight = list(example_ids(5000, settings))
resumed = list(example_ids(5000, settings, after=1000))
assert resumed == straight[1000:]

processes = 2
share = settings.batch_size // processes
for process in range(processes):
    part = straight[1000][process * share : (process + 1) * share]
    print(f"step 1001, process {process}: examples {part}")

# %% [markdown]
# The order of an epoch is a permutation: 8 bytes per example in every process. For a
# billion examples that is 8 GB, and a file in pre-shuffled shards, read with
# `shuffle=False`, is the better plan.
#
# ## Turn one knob: the tokens of a step
#
# Qwen2.5-7B on one GPU, adapters of rank 16, 16-bit weights that stay frozen. More tokens
# in a step make better use of the GPU. What stops you?

# %% mystnb={"image": {"alt": "Gigabytes against tokens in a step, both axes logarithmic, for LoRA on Qwen2.5-7B, with grey lines for three GPUs. Four lines start close together on the left. The line with neither checkpoints nor the vocabulary head rises first, the line with the vocabulary head alone soon after. With checkpoints alone the rise comes much later, and with both last."}} tags=["hide-input"]
tokens = np.geomspace(512, 2**18, 40).astype(int)
KNOBS = {
    "neither": {},
    "vocabulary head": {"stores_logits": False},
    "checkpoints": {"checkpointing": True},
    "both": {"checkpointing": True, "stores_logits": False},
}
adapters = fp.lora(QWEN, rank=16)


def gigabytes(tokens, **knobs):
    parts = footprint(QWEN, adapters, tokens, fp.BF16_WITH_MASTER, **knobs)
    return parts.peak / 1e9


fig, ax = plt.subplots(figsize=(7, 4))
for i, (name, knobs) in enumerate(KNOBS.items()):
    style = plots.arm_style(i)
    ax.plot(
        tokens, [gigabytes(int(n), **knobs) for n in tokens],
        color=style["color"], linestyle=style["linestyle"], label=name,
    )
for name, size in GPU_GB.items():
    ax.axhline(size, color="grey", linewidth=1)
    ax.text(530, size * 1.04, f"{name}, {size} GB", fontsize=8)
ax.set(
    xscale="log", yscale="log", xlabel="tokens in a step",
    ylabel="GB, projected", ylim=(12, 600),
)
ticks = (20, 50, 100, 200, 500)
ax.set_yticks(ticks, map(str, ticks))
ax.minorticks_off()
fig.legend(loc="outside lower center", ncols=4)
plt.show()


# %% tags=["hide-input"]
def rounded(number):
    """A number to two digits."""
    return f"{float(f'{number:.2g}'):,.0f}"


def most_tokens(**knobs):
    """The most tokens that take less than 80 GB, by bisection."""
    too_many = bisect_left(
        range(2**20), 80, lo=1, key=lambda n: gigabytes(n, **knobs)
    )
    return too_many - 1


reach = {
    name: rounded(most_tokens(**knobs)) for name, knobs in KNOBS.items()
}
Markdown(
    f"""
On 80 GB about {reach["neither"]} tokens fit with neither,
{reach["vocabulary head"]} without the table of logits,
{reach["checkpoints"]} with checkpoints, and {reach["both"]} with both.
Once the layers keep only their inputs, the logits are most of what is left:
the two belong together.
"""
)

# %% [markdown]
# ## Speed, measured here and projected
#
# First what this machine does: a training step of the small model, its FLOPs by the
# formula, its time by the clock.

# %%
torch.manual_seed(0)
model = LlamaForCausalLM(CONFIG).train()
ids = torch.zeros(8, 128, dtype=torch.int64)


def seconds_of_step():
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return time.perf_counter() - begin


seconds_of_step()
seconds = min(seconds_of_step() for _ in range(5))
flops = train_flops(tiny, whole, *ids.shape)

# %% tags=["hide-input"]
Markdown(
    f"""
{ids.numel() / seconds:,.0f} tokens and {flops / seconds / 1e9:.1f} GFLOP a
second on one core, for {tiny.weights:,} weights.
"""
)

# %% [markdown]
# For a GPU the same quotient is turned around: tokens per second are the peak rate,
# times the share of it that a training reaches, divided by the FLOPs of a token. That
# share is measured, never computed, and it is the one number below that decides
# everything. We borrow it from Llama 3's pre-training, claim s‑7, where it is reported as
# **model FLOPs utilisation** (MFU). MFU leaves out what checkpoints repeat. We count the
# repeated FLOPs too, and suppose that they run at the same share of the peak.

# %%
ASSUMED = {
    "peak": 989e12,  # FLOP/s of an H100 SXM in bf16, from its data sheet
    "share of peak": 0.40,  # the middle of what Llama 3 reports
    "tokens": TOKENS,  # of one sequence, in each process
    "checkpoints": True,  # whose second forward pass is work like other
    "network": "keeps up",  # exercise 2 asks whether it does
}


def tokens_per_second(decoder, way):
    trained = {
        "full": fp.everything(decoder),
        "LoRA": fp.lora(decoder, rank=16),
        "circuit": fp.circuit(decoder, 32, 16),
    }[way]
    flops = train_flops(
        decoder, trained, 1, ASSUMED["tokens"],
        checkpointing=ASSUMED["checkpoints"],
    )
    rate = ASSUMED["peak"] * ASSUMED["share of peak"]
    return rate * ASSUMED["tokens"] / flops


# %% [markdown]
# ## Projected: 7 and 70 billion weights
#
# GB in each process, every process with one sequence of 4,096 tokens, checkpoints, no
# table of logits. Full training keeps 32-bit weights and autocasts. LoRA has rank 16 on
# all matrices. The circuit has 32 heads in 16 layers. Both keep 16-bit weights, frozen.
# AdamW has its default settings.
# With more than one process everything is sharded. **None of this was run.**

# %% tags=["hide-input"]
table = [
    [
        "model", "trained", "1 GPU", "8", "64",
        "tokens/s per GPU, arithmetic",
    ]
]
for name, decoder in fp.SHAPES.items():
    for way in ("full", "LoRA", "circuit"):
        cells = []
        for n in (1, 8, 64):
            size = step_of(decoder, way, n).peak / 1e9
            mark = "**" if size < 80 else ""
            cells.append(f"{mark}{size:,.0f}{mark}")
        speed = tokens_per_second(decoder, way)
        table.append([name, way, *cells, f"{speed:,.0f}"])
Markdown(
    results.markdown_table(table)
    + "\n\nBold fits in 80 GB, with nothing to spare for fragments, "
    "buffers of the network and the CUDA context, which take a few GB more."
    "\n\nThe last column is arithmetic alone, the same for 1, 8 and 64 "
    "GPUs: what one of them does if the network keeps up. Exercise 2 shows "
    "where it does not."
)

# %% tags=["nbval-check-output"]
full7 = [step_of(QWEN, "full", n).peak / 1e9 for n in (1, 8, 64)]
full70 = [step_of(LLAMA, "full", n).peak / 1e9 for n in (1, 8, 64)]
print("7 B in full:", *(f"{size:,.1f} GB" for size in full7))
print("70 B in full:", *(f"{size:,.1f} GB" for size in full70))

# %% tags=["hide-input"]
gathered = step_of(LLAMA, "full", 64).exchanged / 1e9
Markdown(
    f"""
Two things stand out. Sharding over 64 does not divide by 64: of the
{full70[2]:.0f} GB of the large model, {gathered:.0f} GB are units that FSDP
holds whole for a moment, and these do not shrink. And a circuit costs
nearly what LoRA costs, in memory and in time: both are dominated by the
frozen weights and by the products with them.
"""
)

# %% [markdown]
# ## The claims beside ours

# %% tags=["hide-input"]
ZERO = fp.Trained(int(7.5e9), int(7.5e9), 0, 0)
EMPTY = fp.Decoder(0, 1, 0, 1, 1, 0, 0)


def zero_gigabytes(stage, n=64):
    parts = footprint(
        EMPTY, ZERO, 1, fp.BF16_WITH_MASTER, processes=n, stage=stage
    )
    weights = 2 * 7.5e9 / (n if stage == 3 else 1)
    return (weights + parts.gradients + parts.optimizer) / 1e9


ours_zero = [
    zero_gigabytes(0, n=1), *(zero_gigabytes(stage) for stage in (1, 2, 3))
]
full_flops = {
    name: train_flops(d, fp.everything(d), 1, TOKENS) / TOKENS / d.weights
    for name, d in fp.SHAPES.items()
}
once, again = (
    train_flops(QWEN, fp.everything(QWEN), 1, TOKENS, checkpointing=twice)
    for twice in (False, True)
)
per_width = {
    name: fp.saved_per_token(QWEN, precision) / QWEN.width
    for name, precision in (("bf16", fp.BF16), ("autocast", fp.AUTOCAST))
}
saving = step_of(QWEN, "full").peak / step_of(QWEN, "LoRA").peak
verdicts = [
    ["", "claim", "verdict", "ours"],
    [
        "s‑1", "120 GB to 31.4, 16.6, 1.9", "**holds**, by count",
        ", ".join(f"{size:.1f}" for size in ours_zero) + " GB",
    ],
    [
        "s‑2", "FSDP is DDP, divided", "**equal: holds**; speed not tested",
        f"{sizes['fsdp'][1] / sizes['one'][1]:.0%} of the weights in each "
        "of two processes; they differ by "
        f"{largest(runs['fsdp'], weights):.0e}",
    ],
    [
        "s‑3", "one more forward pass", "**holds, a little less**",
        f"{again / once - 1:.0%} more FLOPs for Qwen2.5-7B, where a whole "
        f"forward pass is {1 / 3:.0%}: the head and each layer's last "
        "product are not repeated",
    ],
    [
        "s‑4", "34 bytes per token and width, and the scores",
        "**another model**",
        f"{per_width['bf16']:.0f} in bf16, {per_width['autocast']:.0f} "
        "under autocast, for Qwen2.5-7B, whose MLP is wider; no scores",
    ],
    [
        "s‑5", "6 FLOPs per weight and token", "**holds** nearly",
        ", ".join(f"{f:.2f} for {name}" for name, f in full_flops.items()),
    ],
    [
        "s‑6", "LoRA: 1.2 TB to 350 GB, 3.4 times less",
        "**projected only**",
        f"{saving:.1f} times less for Qwen2.5-7B, with AdamW's default "
        "step",
    ],
    [
        "s‑7", "38 to 43 % MFU", "**not tested here**",
        "borrowed as share of the peak",
    ],
]
Markdown(results.markdown_table(verdicts))


# %% [markdown]
# ## What went wrong, and what is not known
#
# * **`train` did not run under FSDP.** The norm of a sharded gradient is itself in parts,
#   and our loop asked for its value. It would have stopped at the first step on any
#   cluster. The two CPU processes above found it; nothing else had ever run that line.
# * **Two processes that are one, and FSDP that is DDP.** Both are shown above. The losses
#   are right in both cases, so only a count of processes, or of the weights that one of
#   them holds, tells.
# * **A loss outside the wrapper.** FSDP gathers the weights of a module when it is
#   called. A loss that takes a weight and multiplies by itself, as the vocabulary head
#   does, belongs inside the call of the outermost module. `Learner` puts it there, which
#   is why the script uses it.
# * **Autocast keeps five copies.** We had counted the input of queries, keys and values
#   once. Autocast casts it for each of them, and for both products of the MLP, and keeps
#   every cast. The tolerance of our own test told us.
# * **Checkpoints of a sharded run.** `train` refuses a `directory` with FSDP: its
#   checkpoints hold whole weights. Save with `accelerator.get_state_dict` at the end, and
#   plan runs that end.
#
# Not known: bf16, checkpoints and NCCL under FSDP, for the two CPU processes ran the same
# sharding code without them; the speed of any of this on a GPU; fragmentation of its
# memory, which adds to every count; what the units gathered by FSDP add in practice, for
# which the count supposes two layers at a time. Not counted: the biases and norms among the
# products, the adapters' own activations, the buffers of the network.

# %% [markdown]
# ## Exercises
#
# Each has a solution below it that has been run. To try first, take this chapter
# [without its solutions](https://github.com/finetuning-book/finetuning-book/blob/main/notebooks/exercises/scaling_out.ipynb), [on Colab](https://colab.research.google.com/github/finetuning-book/finetuning-book/blob/main/notebooks/exercises/scaling_out.ipynb) if you like: each is a stub that
# says what the solution prints.
#
# **1. Accumulation.** A step of two chunks begins its second forward pass while the first
# chunk's gradients wait. Which term of the peak moves? Count it, then measure it.

# %% tags=["hide-cell", "nbval-check-output"]
def peak_of_chunks(chunks, sequences=8):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).train()
    ids = torch.zeros(sequences, 48, dtype=torch.int64)

    def step():
        for _ in range(chunks):
            out = model(input_ids=ids, labels=ids, use_cache=False)
            loss = out.loss
            del out
            loss.backward()

    return measured_peak(step, model)


parts = footprint(tiny, whole, 8 * 48, fp.FP32)
more = peak_of_chunks(2) - peak_of_chunks(1)
assert abs(more / parts.gradients - 1) < 0.05
print("the gradients join what is always there:",
      f"{more / parts.gradients:.2f} of their bytes at the head")

# %% [markdown]
# **2. When does the network bind?** FSDP sends each process the weights twice in a step,
# and gradients once, 2 bytes each. At which number of tokens per process does this take
# as long as the FLOPs of full fine-tuning in the table, at 50 GB/s between machines and
# 450 GB/s within one? Does the number depend on the size of the model?

# %% tags=["hide-cell", "nbval-check-output"]
for name, decoder in fp.SHAPES.items():
    speed = tokens_per_second(decoder, "full")
    for bandwidth in (50e9, 450e9):
        network = 3 * 2 * decoder.weights / bandwidth  # seconds
        print(f"{name:12} at {bandwidth / 1e9:3.0f} GB/s: "
              f"{network * speed:6,.0f} tokens, "
              f"{network * speed / TOKENS:.1f} sequences")

# %% [markdown]
# Hardly: bytes and FLOPs both grow with the weights. It depends on the ratio of the
# machine's rate to the network's. Below these numbers the GPU waits. One sequence in each
# process is enough within a machine. Between machines it is not: there the network takes
# longer than the arithmetic, and the table's tokens per second are out of reach.
#
# **3. A mean over tokens.** Two examples, one of 2 target tokens and one of 8, go to two
# processes. The loss of each is a mean over *its tokens*, as in transformers. Is the mean
# of the two what one process computes? What does `train` ask for instead?

# %% tags=["hide-cell", "nbval-check-output"]
losses = [torch.full((2,), 4.0), torch.full((8,), 1.0)]  # per token
together = torch.cat(losses).mean()
apart = torch.stack([part.mean() for part in losses]).mean()
print(f"over tokens: one process {together:.2f}, two {apart:.2f}")

by_example = torch.stack([part.mean() for part in losses])
halves = torch.stack([half.mean() for half in by_example.chunk(2)])
print(f"over examples: one process {by_example.mean():.2f}, "
      f"two {halves.mean():.2f}")


# %% [markdown]
# The mean over tokens gives a token in a short example more weight as soon as the batch
# is divided, and it depends on who got which example. A mean over examples does not care.
#
# **4. The last table.** With LoRA and checkpoints, at how many tokens do stored logits
# outweigh everything else that Qwen2.5-7B holds? And Llama 3 70B?

# %% tags=["hide-cell", "nbval-check-output"]
def logits_outweigh(tokens, decoder):
    parts = footprint(
        decoder, fp.lora(decoder, rank=16), tokens, fp.BF16_WITH_MASTER,
        checkpointing=True,
    )
    return parts.head > parts.weights + parts.optimizer + parts.saved


for name, decoder in fp.SHAPES.items():
    outweigh = partial(logits_outweigh, decoder=decoder)
    first = bisect_left(range(2**20), True, lo=1, key=outweigh)
    print(f"{name}: from about {rounded(first)} tokens on")

# %% [markdown]
# ## Run it on a cluster
#
# Three files in
# [`book/cluster`](https://github.com/finetuning-book/finetuning-book/tree/main/book/cluster)
# are a beginning. One machine with eight GPUs, a copy of the model on each:
#
# ```{literalinclude} ../book/cluster/ddp.yaml
# :language: yaml
# ```
#
# Eight machines, everything spread over 64 GPUs:
#
# ```{literalinclude} ../book/cluster/fsdp.yaml
# :language: yaml
# ```
#
# And the job that starts it under Slurm:
#
# ```{literalinclude} ../book/cluster/slurm.sh
# :language: bash
# ```
#
# The tests hold these files against the options that Accelerate has. They were never
# submitted: names of partitions, accounts and network interfaces are your cluster's. Before
# the first long run, print `accelerator.num_processes`, train ten steps on one process and
# on two, and compare the losses. With DDP, pass `train` a `directory` on a disk that all
# processes share: a job that was stopped and is submitted again goes on from there.

# %%
shutil.rmtree(folder)

# %% [markdown]
# ## References
#
# * Shards of optimiser, gradients and weights: {cite:t}`rajbhandari2020zero`; in PyTorch:
#   {cite:t}`zhao2023fsdp`.
# * Activations: {cite:t}`korthikanti2023reducing`; checkpoints: {cite:t}`chen2016sublinear`.
# * FLOPs of a training: {cite:t}`kaplan2020scaling`; how many of them a cluster reaches:
#   {cite:t}`grattafiori2024llama`.
# * Adapters: {cite:t}`hu2022lora`.
# * Accelerate <https://github.com/huggingface/accelerate>, its
#   [configuration files](https://huggingface.co/docs/accelerate/package_reference/cli).
