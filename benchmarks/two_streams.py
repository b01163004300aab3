"""Contextual decomposition with two streams, in plain torch: what ours is timed beside.

Both parts go through every module, as in the released code, and nothing is fused but
what torch fuses by itself. The functions are written to be compiled as well: only where
a source begins, which the released code does in hooks, is left to the model's loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ftlib.ctsft.decomposition import Rules
from ftlib.ctsft.heads import Head

EPS, HEAD = 1e-5, 64
# Sources that the released code stacks along the batch.
STACKED = 64

Streams = tuple[Tensor, Tensor]
"""β and γ, (..., features) each."""
Layer = tuple[Tensor, Tensor]
"""Weight (out, in) and bias (out)."""


class Block(NamedTuple):
    """The weights of a block of GPT-2; those of a norm are (features) each."""

    first_norm: Layer
    qkv: Layer
    out: Layer
    second_norm: Layer
    up: Layer
    down: Layer


# --- rules ---------------------------------------------------------------------------


def bias_shares(beta: Tensor, gamma: Tensor, bias: Tensor, rules: Rules) -> Streams:
    """Return what of a bias each part is given."""
    if rules.bias == "irrelevant":
        return torch.zeros_like(bias), bias
    whole = beta.abs() + gamma.abs()
    share = torch.where(whole == 0, 0, beta.abs() / whole)
    return bias * share, bias * (1 - share)


def norm(beta: Tensor, gamma: Tensor, layer: Layer, rules: Rules) -> Streams:
    weight, bias = layer
    scale = ((beta + gamma).var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    shares = bias_shares(beta, gamma, bias, rules)
    return (
        (beta - beta.mean(-1, keepdim=True)) * scale * weight + shares[0],
        (gamma - gamma.mean(-1, keepdim=True)) * scale * weight + shares[1],
    )


def linear(beta: Tensor, gamma: Tensor, layer: Layer, rules: Rules) -> Streams:
    weight, bias = layer
    beta, gamma = beta @ weight.T, gamma @ weight.T
    shares = bias_shares(beta, gamma, bias, rules)
    return beta + shares[0], gamma + shares[1]


def clean(beta: Tensor, gamma: Tensor, rules: Rules) -> Streams:
    if not rules.clean_up:
        return beta, gamma
    total, opposite = beta + gamma, beta * gamma < 0
    larger = beta.abs() >= gamma.abs()
    kept = torch.where(opposite, torch.where(larger, total, 0), beta)
    return kept, torch.where(opposite, torch.where(larger, 0, total), gamma)


def activation(beta: Tensor, gamma: Tensor) -> Streams:
    rest = F.gelu(gamma, approximate="tanh")
    return F.gelu(beta + gamma, approximate="tanh") - rest, rest


def gate(beta_g: Tensor, gamma_g: Tensor, beta_u: Tensor, gamma_u: Tensor) -> Tensor:
    rest = F.silu(gamma_g) * gamma_u
    return F.silu(beta_g + gamma_g) * (beta_u + gamma_u) - rest


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (..., T, heads · 64), with no padding."""
    # Fused attention, and the compiler, know four dimensions and not five.
    shape = v.shape
    rows = (x.reshape(-1, *x.shape[-2:]) for x in (q, k, v))
    q, k, v = (x.unflatten(-1, (-1, HEAD)).transpose(1, 2) for x in rows)
    z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return z.transpose(1, 2).reshape(shape)


# --- a block -------------------------------------------------------------------------


def gathered(weights: Block, beta: Tensor, gamma: Tensor, rules: Rules) -> Streams:
    """Return what the heads gather, before the output projection."""
    normed = norm(beta, gamma, weights.first_norm, rules)
    parts = linear(*normed, weights.qkv, rules)
    q, k, v = (parts[0] + parts[1]).chunk(3, -1)
    beta_q, beta_k, beta_v = parts[0].chunk(3, -1)
    if rules.attention == "frozen":
        return attend(q, k, beta_v), attend(q, k, v - beta_v)
    z = attend(beta_q, beta_k, beta_v)
    return z, attend(q, k, v) - z


def behind_heads(
    weights: Block, beta: Tensor, gamma: Tensor, z: Streams, rules: Rules
) -> Streams:
    """Return a block's output from its input and what its heads gathered."""
    parts = linear(*z, weights.out, rules)
    beta, gamma = beta + parts[0], gamma + parts[1]
    parts = linear(*norm(beta, gamma, weights.second_norm, rules), weights.up, rules)
    parts = linear(*activation(*clean(*parts, rules)), weights.down, rules)
    parts = clean(*parts, rules)
    return clean(beta + parts[0], gamma + parts[1], rules)


def block(weights: Block, beta: Tensor, gamma: Tensor, rules: Rules) -> Streams:
    z = gathered(weights, beta, gamma, rules)
    return behind_heads(weights, beta, gamma, z, rules)


# --- a model -------------------------------------------------------------------------


class Weights(NamedTuple):
    """What the decomposition reads of a GPT-2; ``head`` is (vocabulary, features)."""

    blocks: list[Block]
    final_norm: Layer
    head: Tensor


def weights_of(model: Any) -> Weights:
    """Return views of the weights of transformers' ``GPT2LMHeadModel``."""

    def layer(module: Any) -> Layer:
        return module.weight.detach(), module.bias.detach()

    def transposed(module: Any) -> Layer:
        weight, bias = layer(module)
        return weight.T, bias

    base = model.transformer
    blocks = [
        Block(
            layer(b.ln_1),
            transposed(b.attn.c_attn),
            transposed(b.attn.c_proj),
            layer(b.ln_2),
            transposed(b.mlp.c_fc),
            transposed(b.mlp.c_proj),
        )
        for b in base.h
    ]
    return Weights(blocks, layer(base.ln_f), model.lm_head.weight.detach())


class Parts(NamedTuple):
    """The two halves of a block, plain or compiled."""

    gathered: Callable[..., Streams] = gathered
    behind_heads: Callable[..., Streams] = behind_heads


def compiled_parts() -> Parts:
    """Return both halves compiled, once for all blocks."""
    return Parts(*(torch.compile(half, dynamic=False) for half in Parts()))


@torch.no_grad()
def propagate(
    model: Any,
    ids: Tensor,
    sources: Sequence[Head],
    means: Tensor,
    tokens: Tensor,
    rules: Rules,
    *,
    is_cached: bool,
    parts: Parts,
) -> Streams:
    """Return both parts of some logits behind the last position, (S, B, tokens) each.

    Args:
        model: a ``GPT2LMHeadModel`` in evaluation mode.
        ids: (B, T), without padding.
        sources: sorted by layer; each 64 of them are stacked along the batch.
        means: of every head, (layers, heads, 64).
        tokens: whose logits are formed; int64.
        rules: of which the one for MLPs is ``irrelevant_alone``.
        is_cached: whether 64 sources begin in the layer of the first of them, from
            activations of a plain pass; otherwise they begin in the first layer.
        parts: of a block.
    """
    hidden = model.transformer(ids, output_hidden_states=True).hidden_states
    through = functools.partial(
        _stacked, weights_of(model), hidden, means, tokens, rules, parts
    )
    chunks = [sources[i : i + STACKED] for i in range(0, len(sources), STACKED)]
    found = [through(chunk, chunk[0].layer if is_cached else 0) for chunk in chunks]
    betas, gammas = zip(*found, strict=True)
    return torch.cat(betas), torch.cat(gammas)


def _stacked(
    weights: Weights,
    hidden: Sequence[Tensor],
    means: Tensor,
    tokens: Tensor,
    rules: Rules,
    parts: Parts,
    sources: Sequence[Head],
    first: int,
) -> Streams:
    """Return :func:`propagate` of sources that are stacked, from a first layer on."""
    examples = len(hidden[0])
    gamma = hidden[first].repeat(len(sources), 1, 1)
    beta = torch.zeros_like(gamma)
    for layer in range(first, len(weights.blocks)):
        z = parts.gathered(weights.blocks[layer], beta, gamma, rules)
        for i, source in enumerate(sources):
            if source.layer == layer:
                rows = slice(i * examples, (i + 1) * examples)
                _begin(source, means, *(part[rows] for part in z))
        beta, gamma = parts.behind_heads(weights.blocks[layer], beta, gamma, z, rules)
    beta, gamma = norm(beta[:, -1], gamma[:, -1], weights.final_norm, rules)
    head = weights.head[tokens].T
    shape = (len(sources), examples, len(tokens))
    return (beta @ head).view(shape), (gamma @ head).view(shape)


def _begin(source: Head, means: Tensor, beta: Tensor, gamma: Tensor) -> None:
    """Let a source begin, in place: its head's mean is irrelevant, the rest is not."""
    columns = slice(source.index * HEAD, (source.index + 1) * HEAD)
    mean = means[source]
    beta[..., columns] += gamma[..., columns] - mean
    gamma[..., columns] = mean
