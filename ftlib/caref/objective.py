r"""The objective of CAREF: cross-entropy, SCED, and the divergence from uniform.

With P_t the model's distribution over V tokens at target position t, and U = 1/V::

    L = L_CE + λ_SCED · L_SCED + λ_KL · L_KL
    L_SCED = mean_t Σ_v |P_tv log(P_tv / U)|^α (1 − P_tv)^β
    L_KL = mean_t Σ_v P_tv log(P_tv / U) = mean_t (log V − H(P_t))

(arXiv 2605.27835). The paper's page sums over t; its code takes the mean over the
target tokens of the batch, and so do we. V is the width of the logits, with the rows
that pad a vocabulary, as in the code: 32,128 for T5, whose tokenizer has 32,100 tokens.

How the terms of a batch are averaged is a choice (:mod:`ftlib.sequences`): over
its target tokens, as in the paper's code, or over its examples, which is the default.

In a training of your own, with the logits never stored::

    loss = caref_loss(model, **batch).loss  # batch: input_ids, attention_mask, labels
    loss.backward()

With the ``Trainer`` of transformers, which computes the logits itself. An
encoder-decoder gets its ``decoder_input_ids`` from the collator, because the trainer
keeps the labels from the model::

    trainer = Seq2SeqTrainer(
        model, arguments, train_dataset=data,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_loss_func=trainer_loss(model, CAREF),
    )
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ftlib import training
from ftlib.ops import HeadOutput, OutputHead, TokenLoss
from ftlib.ops.rows import accumulator, sced_value
from ftlib.ops.statistics import Statistic, Statistics
from ftlib.sequences import (
    IGNORED,
    Mean,
    head_and_targets,
    token_weights,
    weighted_loss,
)
from ftlib.training import Metrics

CAREF = TokenLoss(sced=0.1, kl_to_uniform=0.1, alpha=2.0, beta=1.0)
"""The weights of the released code, which says that they are the paper's."""

# Logits that one chunk may hold, beside which a handful of tensors of its size exist.
CHUNK_LOGITS = 2**24

STATISTICS: tuple[Statistic, ...] = (
    "log_prob",
    "entropy",
    "collision_prob",
    "top1_hit",
)
"""What a loss also says about the distributions it was taken of."""


class RowLoss(Protocol):
    """A loss that :class:`ftlib.ops.TokenLoss` has no terms for; see ``baselines``."""

    def of_logits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each row, (n,), of logits (n, V) and targets (n,)."""

    def of_head(self, head: OutputHead, targets: Tensor, weights: Tensor) -> HeadOutput:
        """Return Σ weight · loss with ``STATISTICS``, never storing all logits.

        Args:
            head: the factors of the logits, hidden states (..., D).
            targets: int64 (...), −100 where there is none.
            weights: (...), 0 where there is no target.
        """


Loss = TokenLoss | RowLoss


class CarefLoss(NamedTuple):
    """A loss over the target tokens of a batch, with what diagnosis needs; scalars.

    All but the counts are averaged over tokens as the loss is.

    Attributes:
        loss: with gradient.
        tokens: number of target tokens, int64.
        examples: number of examples, int64.
        accuracy: share of target tokens that had the largest logit.
        target_prob: p_y, the probability of the target token.
        entropy: H = −Σ p log p, in nats; the divergence from uniform is log V − H.
        collision_prob: Σ p², the probability that is expected of a sampled token.
    """

    loss: Tensor
    tokens: Tensor
    examples: Tensor
    accuracy: Tensor
    target_prob: Tensor
    entropy: Tensor
    collision_prob: Tensor


def caref_loss(
    model: nn.Module,
    labels: Tensor,
    loss: Loss = CAREF,
    *,
    mean: Mean = "example",
    **inputs: Any,
) -> CarefLoss:
    """Return the mean loss of the labels that are not −100.

    The logits are never stored: see :func:`ftlib.ops.vocabulary_head`. An example
    without target tokens adds 0 to the mean over examples and counts as one of them; a
    batch without any has a loss of 0 with a gradient of 0.

    Args:
        model: an encoder-decoder or a decoder-only model of transformers, wrapped by
            PEFT or not. Under several processes or in mixed precision, wrap it in
            :class:`Learner`.
        labels: int64 (rows, T), −100 where there is no target. For an encoder-decoder,
            what its decoder should write, from the first token on. For a decoder-only
            model, aligned with ``input_ids``: the label of a token is predicted from
            those before it.
        loss: of a token.
        mean: what the loss is a mean over.
        inputs: what else the model takes, such as ``input_ids`` and
            ``attention_mask``. An encoder-decoder's ``decoder_input_ids`` are made from
            the labels, as the model does it, unless they are given.

    Raises:
        ValueError: labels and token ids, or the mean's name, do not fit; or the
            decoder's inputs are neither given nor to be made.
        TypeError: see :func:`ftlib.ops.output_head`.
    """
    head, targets = head_and_targets(model, labels, inputs)
    weights = token_weights(head, targets, mean)
    if isinstance(loss, TokenLoss):
        out = weighted_loss(loss, head, targets, weights, STATISTICS)
    else:
        out = loss.of_head(head, targets, weights)
    assert out.loss is not None
    return CarefLoss(
        out.loss,
        (targets != IGNORED).sum(),
        labels.new_tensor(len(labels)),
        *_averages(out, weights),
    )


def _averages(out: HeadOutput, weights: Tensor) -> tuple[Tensor, ...]:
    """Return the averages that :class:`CarefLoss` ends with."""
    assert out.top1_hit is not None
    assert out.log_prob is not None
    assert out.entropy is not None
    assert out.collision_prob is not None
    values = (out.top1_hit, out.log_prob.exp(), out.entropy, out.collision_prob)
    return tuple((weights * value).sum() for value in values)


# --- for ftlib.training ----------------------------------------------------------


class Learner(training.Learner):
    """A model together with :func:`caref_loss`, for :func:`ftlib.training.train`.

    Args:
        model: the model, whose weights are trained.
        loss: of a token.
        mean: what the loss is a mean over.
    """

    def __init__(
        self, model: nn.Module, loss: Loss = CAREF, mean: Mean = "example"
    ) -> None:
        super().__init__(model, partial(caref_loss, loss=loss, mean=mean))


def training_loss(learner: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Metrics]:
    """Return a batch's loss with its metrics, as :func:`ftlib.training.train` takes it.

    ``target_tokens`` is their number per example, so that like every metric it is a
    mean over examples.
    """
    out: CarefLoss = learner(**batch)
    return out.loss, {
        "accuracy": out.accuracy,
        "target_prob": out.target_prob,
        "entropy": out.entropy,
        "collision_prob": out.collision_prob,
        "target_tokens": out.tokens / out.examples,
    }


# --- from logits -----------------------------------------------------------------

TrainerLoss = Callable[..., Tensor]


def trainer_loss(model: Any, loss: Loss = CAREF) -> TrainerLoss:
    """Return a loss for ``transformers.Trainer(compute_loss_func=...)``.

    It is a mean over the target tokens of all batches that make an update, as
    transformers' own loss is.

    Args:
        model: what is trained. It says whether labels are shifted: those of a
            decoder-only model are.
        loss: of a token.
    """
    shifted = not model.config.is_encoder_decoder

    def compute_loss(
        outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        # Soft prompts of PEFT stand before the tokens and have no labels.
        logits = outputs.logits[:, -labels.shape[1] :]
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return loss_from_logits(logits, labels, loss, tokens=num_items_in_batch)

    return compute_loss


def loss_from_logits(
    logits: Tensor,
    labels: Tensor,
    loss: Loss = CAREF,
    *,
    tokens: Tensor | int | None = None,
) -> Tensor:
    """Return the mean loss of the labels that are not −100, from logits that exist.

    The plain-torch twin of what :func:`caref_loss` computes from the hidden states. It
    works in float32 (float64 for float64), through chunks of positions that are
    computed again in the backward pass, so that beside the logits and their gradient
    only one chunk's tensors exist at a time.

    Args:
        logits: any float dtype, (..., V). Nothing is shifted.
        labels: int64 (...), −100 where there is no target.
        loss: of a token.
        tokens: what the sum is divided by; by default the number of targets, at
            least 1.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)}, labels {tuple(labels.shape)}:"
            " give one label for each position"
        )
    step = max(1, CHUNK_LOGITS // logits.shape[-1])
    chunks = zip(
        logits.flatten(0, -2).split(step), labels.flatten().split(step), strict=True
    )
    parts = [in_chunk(_sum_of_chunk, *chunk, loss) for chunk in chunks]
    if tokens is None:
        tokens = (labels != IGNORED).sum().clamp(min=1)
    return torch.stack(parts).sum() / tokens


def in_chunk(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function whose intermediate tensors the backward pass makes again."""
    return checkpoint(
        function, *arguments, use_reentrant=False, preserve_rng_state=False
    )


def _sum_of_chunk(logits: Tensor, targets: Tensor, loss: Loss) -> Tensor:
    # Ignored rows are left out, not multiplied by 0: what they hold may be infinite.
    kept = targets != IGNORED
    rows, targets = logits[kept].to(accumulator(logits.dtype)), targets[kept]
    if isinstance(loss, TokenLoss):
        return token_loss_of_logits(loss, rows, targets).sum()
    return loss.of_logits(rows, targets).sum()


def token_loss_of_logits(loss: TokenLoss, logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of each row, (n,), from its definition and by autograd.

    Args:
        loss: the terms.
        logits: float32 or float64, (n, V).
        targets: int64 (n,), each in [0, V).
    """
    columns = logits.shape[-1]
    # Of large logits, torch's logsumexp has a gradient that does not add up to one.
    offset = logits.detach().amax(-1)
    log_p = logits.log_softmax(-1)
    zero = torch.zeros_like(log_p[:, 0])
    at = Statistics(
        log_prob=log_p.gather(1, targets[:, None])[:, 0],
        entropy=-(log_p.exp() * log_p).sum(-1),
        log_sum_exp=offset + (logits - offset[:, None]).logsumexp(-1),
        collision_prob=zero,
        mean_logit=logits.mean(-1),
        varentropy=zero,
    )
    if not loss.sced:
        return loss.value(at, 0.0, columns)
    # At p = 1 the slope of (1 − p)^β may be infinite, but SCED's by the logits is 0.
    below_one = log_p.clamp(max=-torch.finfo(log_p.dtype).tiny)
    sced = sced_value(below_one, columns, loss.alpha, loss.beta).sum(-1)
    return loss.value(at, sced, columns)
