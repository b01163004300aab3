"""The heads that are compared: ours, the plain one, and those of other libraries.

Each is loaded by a function that takes the device and returns what the head can do
there: for each task a run, from a :class:`Problem` to named tensors. A peer is imported
only then. One that cannot be had raises :class:`AbsentError`, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ftlib.ops import TokenLoss, vocabulary_head
from ftlib.ops.statistics import Statistic
from ftlib.runtime import triton_supported

FORWARD, LOG_PROB, AUTOGRAD = "forward", "log_prob", "autograd"
CROSS_ENTROPY, WITH_ENTROPY = "loss: cross-entropy", "loss: CE+entropy"
CAREF = "loss: CAREF"
# The last is CAREF's, with the weights of its authors' code.
LOSSES = {
    CROSS_ENTROPY: TokenLoss(),
    WITH_ENTROPY: TokenLoss(entropy=0.1),
    CAREF: TokenLoss(kl_to_uniform=0.1, sced=0.1),
}
TASKS = (FORWARD, LOG_PROB, AUTOGRAD, *LOSSES)
STATISTICS: tuple[str, ...] = get_args(Statistic)
PAIR = ("log_prob", "entropy")

# The width of TRL's own trainers.
TRL_CHUNK = 32768
# Of Liger's and fla's arguments: rows with this target are left out; there are none.
IGNORE_INDEX = -100


class Problem(NamedTuple):
    """What every head is given.

    Attributes:
        hidden: (N, D).
        weight: (V, D), of the same dtype.
        targets: (N,), int64.
        upstream: the gradient by log-probability and by entropy, (2, N), float32.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor


Outputs = dict[str, Tensor]
Run = Callable[[Problem], Outputs]
Tasks = dict[str, Run]
Statistics = Callable[[Tensor, Tensor, Tensor, tuple[str, ...]], Outputs]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


class AbsentError(RuntimeError):
    """An implementation cannot be had here; the message says why."""


class Implementation(NamedTuple):
    """A head that takes part.

    Attributes:
        load: takes the device and returns the runs by task.
        distribution: the installed package whose version is recorded.
        slow: whether it compiles for so long at each size that it comes late.
    """

    load: Callable[[torch.device], Tasks]
    distribution: str
    slow: bool = False


# --- from a library's function to tasks ------------------------------------------


def forward_of(statistics: Statistics, names: tuple[str, ...]) -> Run:
    """Take statistics without a gradient."""

    def run(problem: Problem) -> Outputs:
        with torch.no_grad():
            return statistics(*problem[:3], names)

    return run


def autograd_of(statistics: Statistics) -> Run:
    """Differentiate log-probability and entropy with the problem's upstream."""

    def run(problem: Problem) -> Outputs:
        hidden, weight = _leaves(problem)
        outputs = statistics(hidden, weight, problem.targets, PAIR)
        return _differentiated(outputs, (hidden, weight), problem.upstream)

    return run


def loss_of(loss: Loss) -> Run:
    """Differentiate a scalar loss."""

    def run(problem: Problem) -> Outputs:
        hidden, weight = _leaves(problem)
        value = loss(hidden, weight, problem.targets)
        return _differentiated(
            {"loss": value}, (hidden, weight), [torch.ones_like(value)]
        )

    return run


def _leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    hidden, weight = (tensor.detach().requires_grad_() for tensor in problem[:2])
    return hidden, weight


def _differentiated(
    outputs: Outputs, leaves: tuple[Tensor, Tensor], upstream: Sequence[Tensor] | Tensor
) -> Outputs:
    """Return outputs without their graph, and the gradients beside them."""
    values = list(outputs.values())
    cast = [g.to(value.dtype) for g, value in zip(upstream, values, strict=True)]
    hidden, weight = torch.autograd.grad(values, leaves, cast)
    detached = {name: value.detach() for name, value in outputs.items()}
    return detached | {"grad_hidden": hidden, "grad_weight": weight}


def tasks_of(statistics: Statistics, gives: tuple[str, ...]) -> Tasks:
    """Return all that follows from differentiable log-probability and entropy."""
    return {
        FORWARD: forward_of(statistics, gives),
        LOG_PROB: forward_of(statistics, ("log_prob",)),
        AUTOGRAD: autograd_of(statistics),
        CROSS_ENTROPY: loss_of(_mean_of(statistics, ("log_prob",), 0)),
        WITH_ENTROPY: loss_of(_mean_of(statistics, PAIR, LOSSES[WITH_ENTROPY].entropy)),
    }


def _mean_of(statistics: Statistics, names: tuple[str, ...], entropy: float) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = statistics(hidden, weight, targets, names)
        each = -found["log_prob"]
        if entropy:
            each = each + entropy * found["entropy"]
        # Multiplied by a tensor, since kernels want a contiguous upstream gradient
        # and that of mean() is one number expanded.
        return (each * torch.full_like(each, 1 / len(each))).sum()

    return loss


# --- the plain head --------------------------------------------------------------


def plain_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return all logits, at least in float32 as training code has them."""
    logits = hidden @ weight.T
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def plain_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
) -> Outputs:
    """Return statistics from all logits, each by its definition."""
    logits = plain_logits(hidden, weight)
    if names == ("log_prob",):
        return {"log_prob": -F.cross_entropy(logits, targets, reduction="none")}
    log_p = logits.log_softmax(-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(-1)
    formulas: dict[str, Callable[[], Tensor]] = {
        "log_prob": lambda: log_p.gather(-1, targets[:, None])[:, 0],
        "entropy": lambda: entropy,
        "log_sum_exp": lambda: logits.logsumexp(-1),
        "collision_prob": lambda: p.square().sum(-1),
        "mean_logit": lambda: logits.mean(-1),
        "varentropy": lambda: (p * (log_p + entropy[:, None]).square()).sum(-1),
        "argmax": lambda: logits.argmax(-1),
        "top1_hit": lambda: logits.argmax(-1) == targets,
    }
    return {name: formulas[name]() for name in names}


def plain_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, terms: TokenLoss
) -> Tensor:
    """Return the mean loss from all logits; of the terms, those in :data:`LOSSES`."""
    logits = plain_logits(hidden, weight)
    loss = terms.cross_entropy * F.cross_entropy(logits, targets)
    if terms.entropy or terms.kl_to_uniform or terms.sced:
        log_p = logits.log_softmax(-1)
        p, from_uniform = log_p.exp(), log_p + math.log(len(weight))
        loss = loss - terms.entropy * (p * log_p).sum(-1).mean()
        loss = loss + terms.kl_to_uniform * (p * from_uniform).sum(-1).mean()
    if terms.sced:
        sced = (p * from_uniform).abs() ** terms.alpha * (1 - p) ** terms.beta
        loss = loss + terms.sced * sced.sum(-1).mean()
    return loss


def load_plain(device: torch.device, compiled: bool = False) -> Tasks:
    """Load the plain head, eager or through torch.compile."""
    statistics, mean_loss = plain_statistics, plain_loss
    if compiled:
        # Past eight shapes of one function, dynamo would run it uncompiled.
        torch.compiler.reset()
        statistics = torch.compile(plain_statistics, dynamic=False)
        mean_loss = torch.compile(plain_loss, dynamic=False)
    losses = {
        task: loss_of(functools.partial(mean_loss, terms=terms))
        for task, terms in LOSSES.items()
    }
    return tasks_of(statistics, STATISTICS) | losses


# --- ours ------------------------------------------------------------------------


def load_ours(
    device: torch.device, backend: Literal["torch", "chunked", "fused"]
) -> Tasks:
    """Load one back end of ours; only those with tiles have losses."""
    if backend != "torch" and not (triton_supported(device) or _interpreted()):
        raise AbsentError("its Triton kernels need a GPU of compute capability 8.0")

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: Any
    ) -> Outputs:
        output = vocabulary_head(
            hidden, weight, targets, statistics=names, backend=backend
        )
        return {name: getattr(output, name) for name in names}

    def loss(
        hidden: Tensor, weight: Tensor, targets: Tensor, terms: TokenLoss
    ) -> Tensor:
        output = vocabulary_head(hidden, weight, targets, loss=terms, backend=backend)
        assert output.loss is not None
        return output.loss

    tasks = tasks_of(statistics, STATISTICS)
    if backend == "fused":
        return {task: tasks[task] for task in (FORWARD, LOG_PROB, AUTOGRAD)}
    return tasks | {
        task: loss_of(functools.partial(loss, terms=terms))
        for task, terms in LOSSES.items()
    }


# --- other libraries -------------------------------------------------------------


def load_trl(device: torch.device) -> Tasks:
    """Load TRL's chunked log-probabilities; without a GPU, their twin in torch."""
    # The backward pass takes one function from here, which does nothing without
    # DeepSpeed. The module itself imports pandas, datasets and accelerate.
    utils: Any = ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
    sys.modules.setdefault(utils.__name__, utils)
    function = _import("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    theirs = {
        "entropy": "entropy",
        "collision_prob": "log_sum_sq_probs",
        "mean_logit": "mean_logits",
        "top1_hit": "is_top1",
    }

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
    ) -> Outputs:
        asked = tuple(theirs[name] for name in names if name in theirs)
        log_prob, entropy, log_squares, mean_logit, top1_hit = function.apply(
            hidden, weight, None, targets, 1.0, TRL_CHUNK, None, 1.0, asked
        )
        found = {
            "log_prob": log_prob,
            "entropy": entropy,
            "collision_prob": None if log_squares is None else log_squares.exp(),
            "mean_logit": mean_logit,
            "top1_hit": top1_hit,
        }
        return {name: found[name] for name in names}

    return tasks_of(statistics, ("log_prob", *theirs))


def load_verl(device: torch.device) -> Tasks:
    """Load verl's kernels, which give log-probability and entropy together."""
    _need_triton(device)
    kernels = _verl_kernels()

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Any:
            log_prob, entropy, *sums = kernels.efficient_entropy_forward(*inputs, 0)
            ctx.save_for_backward(*inputs, *sums)
            return log_prob, entropy

        @staticmethod
        def backward(ctx: Any, *upstream: Tensor) -> Any:
            saved = ctx.saved_tensors
            return *kernels.efficient_entropy_backward(*upstream, *saved, 0), None

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
    ) -> Outputs:
        both = dict(
            zip(PAIR, LinearCrossEntropy.apply(hidden, weight, targets), strict=True)
        )
        return {name: both[name] for name in names}

    return tasks_of(statistics, PAIR)


@functools.cache
def _verl_kernels() -> ModuleType:
    """Load the one file: verl itself imports ray, hydra and more."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        raise AbsentError("No module named 'verl'")
    name = "verl.utils.device"
    device: Any = ModuleType(name)
    device.is_cuda_available = torch.cuda.is_available()
    device.get_device_capability = torch.cuda.get_device_capability
    device.get_device_name = lambda: "cuda"
    device.get_torch_device = lambda: torch.cuda
    sys.modules.setdefault(name, device)
    root = Path(package.submodule_search_locations[0])
    path = root / "utils" / "kernel" / "kernels.py"
    spec = importlib.util.spec_from_file_location("verl_kernels", path)
    if spec is None or spec.loader is None or not path.exists():
        raise AbsentError(f"this verl has no {path.relative_to(root)}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_liger(device: torch.device, chunk: int, sums: torch.dtype | None) -> Tasks:
    """Load Liger's fused linear cross-entropy in Triton.

    Args:
        device: where it is to run.
        chunk: its ``chunk_mem_const``; 16 makes fewer and larger chunks than 1.
        sums: what the gradient by the weight is summed in; ``None`` is its own dtype.
    """
    _need_triton(device)
    module = _import("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def apply(
        hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str
    ) -> Tensor:
        before = (None, None, IGNORE_INDEX, 0.0, 0.0, reduction, None, False)
        after = (False, False, False, None, None, chunk)
        inputs = (hidden, weight, targets)
        loss: Tensor = function.apply(*inputs, *before, sums, *after)[0]
        return loss

    return _cross_entropy_tasks(apply)


def load_scaled(device: torch.device, cute: bool) -> Tasks:
    """Load Liger's scaled cross-entropy, in CuTe on Hopper and in torch elsewhere."""
    module = _import("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (
        9,
        0,
    )
    if cute != hopper:
        raise AbsentError(
            "Liger takes CuTe on compute capability 9.0, and torch everywhere else"
        )
    if cute:
        _import("liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
    ) -> Outputs:
        with_entropy = "entropy" in names
        found = function.apply(
            hidden, weight, targets, 1.0, IGNORE_INDEX, 1, with_entropy
        )
        if not with_entropy:
            return {"log_prob": -found}
        return {"log_prob": -found[0], "entropy": found[1]}

    return tasks_of(statistics, PAIR)


def load_cut(device: torch.device, filtered: bool) -> Tasks:
    """Load cut-cross-entropy; filtered, it leaves out tiles of small gradients."""
    _need_triton(device)
    eps = "high" if filtered else None
    function = _import("cut_cross_entropy").linear_cross_entropy
    return _cross_entropy_tasks(
        lambda *inputs: function(*inputs[:3], reduction=inputs[3], filter_eps=eps)
    )


def load_cut_compiled(device: torch.device) -> Tasks:
    """Load what cut-cross-entropy falls back to, the plain loss compiled."""
    function = _import("cut_cross_entropy").linear_cross_entropy
    torch.compiler.reset()
    return _cross_entropy_tasks(
        lambda *inputs: function(*inputs[:3], reduction=inputs[3], impl="torch_compile")
    )


def load_fla(device: torch.device, sums: bool) -> Tasks:
    """Load flash-linear-attention's fused loss, its sums in float32 or not."""
    _need_triton(device)
    module = _import("fla.modules.fused_linear_cross_entropy")

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        value: Tensor = module.fused_linear_cross_entropy_loss(
            hidden, targets, weight, accumulate_grad_in_fp32=sums
        )
        return value

    return {CROSS_ENTROPY: loss_of(loss)}


def _cross_entropy_tasks(apply: Callable[..., Tensor]) -> Tasks:
    """Return the tasks of a cross-entropy that takes a reduction, and no more."""

    def statistics(
        hidden: Tensor, weight: Tensor, targets: Tensor, names: tuple[str, ...]
    ) -> Outputs:
        return {"log_prob": -apply(hidden, weight, targets, "none")}

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return apply(hidden, weight, targets, "mean")

    return {
        LOG_PROB: forward_of(statistics, ("log_prob",)),
        CROSS_ENTROPY: loss_of(loss),
    }


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AbsentError(str(error)) from error


def _need_triton(device: torch.device) -> None:
    if device.type != "cuda" and not _interpreted():
        raise AbsentError("its Triton kernels need a GPU")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _named(
    load: Callable[..., Tasks], distribution: str, **settings: Any
) -> Implementation:
    return Implementation(functools.partial(load, **settings), distribution)


IMPLEMENTATIONS = {
    "ours (torch)": _named(load_ours, "ftlib", backend="torch"),
    "ours (chunked)": _named(load_ours, "ftlib", backend="chunked"),
    "ours (fused)": _named(load_ours, "ftlib", backend="fused"),
    "naive": _named(load_plain, "torch"),
    "TRL": _named(load_trl, "trl"),
    "verl": _named(load_verl, "verl"),
    "Liger scaled CE (CuTe)": _named(load_scaled, "liger-kernel", cute=True),
    "Liger scaled CE (torch)": _named(load_scaled, "liger-kernel", cute=False),
    **{
        f"Liger FLCE (chunk {chunk}{', fp32 sums' if sums else ''})": _named(
            load_liger, "liger-kernel", chunk=chunk, sums=sums
        )
        for chunk in (1, 16)
        for sums in (torch.float32, None)
    },
    "CCE (filtered)": _named(load_cut, "cut-cross-entropy", filtered=True),
    "CCE (exact)": _named(load_cut, "cut-cross-entropy", filtered=False),
    "fla (fp32 sums)": _named(load_fla, "fla-core", sums=True),
    "fla": _named(load_fla, "fla-core", sums=False),
    "torch.compile": _named(load_plain, "torch", compiled=True)._replace(slow=True),
    "CCE (torch.compile)": _named(load_cut_compiled, "cut-cross-entropy")._replace(
        slow=True
    ),
}
