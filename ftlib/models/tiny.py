"""Tiny models with random weights, defined through transformers' own classes."""

from __future__ import annotations

from transformers import GPT2Config, GPT2LMHeadModel


def tiny_gpt(
    vocab_size: int,
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    context: int = 32,
) -> GPT2LMHeadModel:
    """Return a GPT-2 of a few thousand parameters, without dropout.

    The weights are drawn from torch's global generator: seed it first.

    Args:
        vocab_size: number of token ids, all of them free for the caller's use.
        width: hidden size, a multiple of ``heads``.
        layers: number of transformer blocks.
        heads: attention heads a block.
        context: longest sequence in tokens.

    Raises:
        ValueError: ``width`` is not a multiple of ``heads``.
    """
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}")
    config = GPT2Config(
        vocab_size=vocab_size,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_positions=context,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,  # GPT-2's own ids lie outside a small vocabulary
        eos_token_id=None,
    )
    return GPT2LMHeadModel(config)
