"""Attention heads, and the weights that belong to them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from ftlib.ctsft.architectures import Architecture, Projection, describe
from ftlib.ops.head_adamw import WeightSlice

HeadTensor = Literal["q", "k", "v", "o"]


class Head(NamedTuple):
    """An attention head.

    Attributes:
        layer: of the block, from 0.
        index: among the query heads of the block.
    """

    layer: int
    index: int  # type: ignore[assignment]  # of tuple, whose method nobody needs here


def all_heads(model: Any) -> list[Head]:
    """Return the heads of a model, layer by layer.

    Raises:
        ValueError: see :func:`ftlib.ctsft.architectures.describe`.
    """
    parts = describe(model)
    return [Head(a, b) for a in range(parts.layers) for b in range(parts.heads)]


def check_heads(architecture: Architecture, heads: Iterable[Head]) -> None:
    """Refuse heads that a model does not have.

    Raises:
        ValueError: names the first such head.
    """
    sizes = (architecture.layers, architecture.heads)
    for head in heads:
        if not (0 <= head.layer < sizes[0] and 0 <= head.index < sizes[1]):
            raise ValueError(
                f"there is no {head}: the model has {sizes[0]} layers of {sizes[1]}"
                " heads, counted from 0"
            )


def head_slices(
    model: Any,
    heads: Collection[Head],
    tensors: Collection[HeadTensor] = ("q", "o"),
) -> list[WeightSlice]:
    """Return the weights of heads, as :class:`ftlib.ops.HeadAdamW` takes them.

    A head has rows of W_q, W_k and W_v, with their biases, and columns of W_o, whose
    bias belongs to all heads. Where several query heads share k and v, asking for
    ``k`` or ``v`` gives what the chosen heads read, once, although heads that were not
    chosen may read it too. The default leaves k and v out for that reason: it is our
    choice, the paper does not say which tensors it trains.

    Args:
        model: see :func:`ftlib.ctsft.architectures.describe`.
        heads: a circuit; a head that occurs twice counts once.
        tensors: which of q, k, v and o.

    Raises:
        ValueError: there are no heads or tensors, or the model does not have them.
    """
    parts = describe(model)
    check_heads(parts, heads)
    if not heads or not tensors:
        raise ValueError(
            "the circuit is empty: choose at least one head, and one tensor of it"
        )
    if unknown := set(tensors) - set(get_args(HeadTensor)):
        raise ValueError(f"a head has no tensor {min(unknown)!r}: choose from q k v o")
    slices = [
        piece
        for head in sorted(set(heads))
        for name in sorted(set(tensors))
        for piece in _slices(parts, head, name)
    ]
    # Query heads that share k and v name the same slices.
    unique = {(id(s.parameter), *s[1:]): s for s in slices}
    return list(unique.values())


def _slices(parts: Architecture, head: Head, name: HeadTensor) -> Iterator[WeightSlice]:
    attention = parts.blocks[head.layer].attention
    projection: Projection = getattr(attention, name)
    index = head.index
    if name in ("k", "v"):
        index //= attention.heads // attention.kv_heads
    start = projection.start * (name != "o") + index * attention.head_dim
    stop = start + attention.head_dim
    dim = int(name == "o") ^ int(projection.is_transposed)
    yield WeightSlice(projection.module.weight, dim, start, stop)
    if name != "o" and projection.module.bias is not None:
        yield WeightSlice(projection.module.bias, 0, start, stop)


def norm_parameters(model: Any) -> list[nn.Parameter]:
    """Return the weights and biases of all of a model's LayerNorms or RMSNorms.

    Raises:
        ValueError: see :func:`ftlib.ctsft.architectures.describe`.
    """
    kinds = {type(norm.module) for norm in describe(model).norms}
    return [
        parameter
        for module in model.modules()
        if type(module) in kinds
        for parameter in module.parameters()
    ]
