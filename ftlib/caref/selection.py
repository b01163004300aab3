"""Which weights are trained: CAREF's variants, and the adapters they are compared with.

The paper trains parts of Flan-T5-large, which it names by their share of the weights:

========  ======  ==============================================================
variant   share   weights
========  ======  ==============================================================
``BASE``  100 %   all
``DEC``   52.23   the decoder, without the embedding and the head
``AQKV``  19.28   query, key and value of 48 attentions
``LAQ``   6.44    query of 48 attentions, and every layer norm
``AQ``    6.43    query of 48 attentions
========  ======  ==============================================================

The shares follow from the model's shape, and they hold for these weights alone. The 48
attentions are among 72, and no share says which (``attentions``): those of the
**decoder**, to itself and to the encoder, as the author's page and the released pattern
for AQ have it; or the **self**-attentions of encoder and decoder, as in SparseFit,
whose variants these resemble.

The released patterns (:data:`RELEASED_PATTERNS`) select something else for two of three
variants: ``q|k|v`` finds the k of "block", hence nearly everything, and ``q`` finds the
queries of all 72 attentions.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

from peft import AdaLoraConfig, LoraConfig
from torch import nn

Variant = Literal["BASE", "DEC", "AQKV", "LAQ", "AQ"]
Attentions = Literal["decoder", "self"]

PUBLISHED_SHARES: Mapping[Variant, float] = {
    "BASE": 1.0,
    "DEC": 0.5223,
    "AQKV": 0.1928,
    "LAQ": 0.0644,
    "AQ": 0.0643,
}
"""Shares of Flan-T5-large's weights, from the paper's main table."""

RELEASED_PATTERNS: Mapping[Variant, str] = {
    "AQKV": "q|k|v",
    "LAQ": "q",
    "AQ": "decoder.*q",
}
"""What the released code searches parameter names for."""

_NORMS = r"norm[^.]*\.(weight|bias)$"
_DECODER = r"^(.*\.)?decoder\.(?!embed)"
# A matrix of a model that projects query, key and value at once, such as GPT-2's.
_FUSED = r"\.(c_attn|qkv_proj|query_key_value|Wqkv|in_proj)\."


class Selection(NamedTuple):
    """Some of a model's parameters.

    Attributes:
        names: of the parameters, in the model's order.
        parameters: how many weights they hold.
        total: how many weights the model holds; tied ones count once.
    """

    names: tuple[str, ...]
    parameters: int
    total: int

    @property
    def share(self) -> float:
        """Selected weights among all, from 0 to 1."""
        return self.parameters / self.total


def select(
    model: nn.Module, variant: Variant, *, attentions: Attentions = "decoder"
) -> Selection:
    """Let a variant's parameters be trained, and freeze the others.

    Args:
        model: an encoder-decoder or a decoder-only model of transformers. The latter
            has no ``DEC``, and all its attentions are selected.
        variant: the name of the variant.
        attentions: which attentions of an encoder-decoder ``AQKV``, ``LAQ`` and ``AQ``
            are about.

    Returns:
        What is now trained.

    Raises:
        ValueError: there is no such variant, or the model has no such parameters.
    """
    selection = matching(model, _patterns(model, variant, attentions))
    return train_only(model, selection)


def train_only(model: nn.Module, selection: Selection) -> Selection:
    """Let the selected parameters be trained, freeze the others; return the selection.

    Raises:
        ValueError: the model lacks a selected parameter.
    """
    chosen = set(selection.names)
    if missing := chosen - dict(model.named_parameters()).keys():
        raise ValueError(
            f"the model has no {', '.join(sorted(missing)[:3])}: make the selection"
            " from this model"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return selection


def matching(model: nn.Module, patterns: Iterable[str]) -> Selection:
    """Select the parameters in whose names one of the patterns is found.

    Args:
        model: any model.
        patterns: regular expressions; ``^`` and ``$`` tie them to the name's ends.

    Raises:
        ValueError: a pattern finds nothing; the message lists names close to it.
    """
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in sizes if re.search(pattern, name)}
        if not hits:
            raise ValueError(_nothing_found(pattern, sizes))
        found |= hits
    names = tuple(name for name in sizes if name in found)
    return Selection(names, sum(sizes[n] for n in names), sum(sizes.values()))


def _patterns(model: Any, variant: str, attentions: str) -> tuple[str, ...]:
    if variant not in get_args(Variant):
        near = difflib.get_close_matches(variant.upper(), get_args(Variant), cutoff=0.4)
        raise ValueError(
            f"there is no variant {variant!r}: choose from"
            f" {', '.join(near or get_args(Variant))}"
        )
    if attentions not in get_args(Attentions):
        raise ValueError(f"attentions is {attentions!r}: choose decoder or self")
    if variant == "BASE":
        return (r"",)
    is_encoder_decoder = model.config.is_encoder_decoder
    if variant == "DEC":
        if not is_encoder_decoder:
            raise ValueError(
                f"{type(model).__name__} has no encoder, so DEC would be the whole of"
                " it: choose BASE"
            )
        return (_DECODER,)
    where = ""
    if is_encoder_decoder:
        where = r"(SelfAttention|self_attn)" if attentions == "self" else _DECODER
    letters = "qkv" if variant == "AQKV" else "q"
    # T5 calls its matrices q, k and v; most others q_proj, k_proj and v_proj.
    found = [rf"{where}(.*)\.{letter}(_proj)?\.(weight|bias)$" for letter in letters]
    return (*found, _NORMS) if variant == "LAQ" else tuple(found)


def _nothing_found(pattern: str, names: Iterable[str]) -> str:
    """Say that a pattern found nothing, and what is close to it."""
    names = list(names)
    message = f"no parameter's name matches {pattern!r}"
    if fused := next((n for n in names if re.search(_FUSED, n)), None):
        return (
            f"{message}: the model projects query, key and value with one matrix"
            f" ({fused}), and a part of a parameter cannot be trained alone. Choose"
            " BASE, or an adapter."
        )
    kinds = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    near = difflib.get_close_matches(pattern, kinds, cutoff=0.3) or kinds[:3]
    return f"{message}. Names close to it: {', '.join(near)}"


# --- adapters --------------------------------------------------------------------


def lora(rank: int, *, alpha: int = 32, dropout: float = 0.1) -> LoraConfig:
    """Return LoRA on every linear layer but the head, as the paper compares with.

    With ranks 4 and 128 the adapters have the published 0.58 and 15.74 % of the weights
    of Flan-T5-large, base and adapters together, and only on all linear layers do they.
    α and dropout are those of SPLINT's script for rank 4.

    Args:
        rank: r.
        alpha: the adapters are scaled by α/r.
        dropout: of the adapters' inputs.
    """
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules="all-linear"
    )


def adalora(
    steps: int,
    *,
    rank: int = 32,
    target_rank: int = 8,
    alpha: int = 32,
    dropout: float = 0.1,
) -> AdaLoraConfig:
    """Return AdaLoRA on every linear layer but the head.

    Rank 32 is our reconstruction: it has the published 4.46 %. The other values are
    peft's and those of :func:`lora`. Ranks are taken away only if the training calls
    ``model.base_model.update_and_allocate(step)`` while the gradients of each step are
    there; and the penalty that keeps the factors orthogonal is part of the model's own
    loss, not of :func:`ftlib.caref.objective.caref_loss`.

    Args:
        steps: of the training.
        rank: r of every layer at the start.
        target_rank: r at the end, on average.
        alpha: the adapters are scaled by α/r.
        dropout: of the adapters' inputs.
    """
    return AdaLoraConfig(
        init_r=rank,
        target_r=target_rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        total_step=steps,
        target_modules="all-linear",
    )
