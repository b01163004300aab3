"""How much memory and how much arithmetic a training step takes, from shapes alone.

The decoders are those of the Llama kind in transformers: rotary positions, RMSNorm, a
gated MLP, grouped keys and values, attention that never stores its scores. Everything
is a count, and the tests compare each with what a real step does. Bytes are bytes and
FLOPs are floating-point operations, a multiply-add being two of them.

What sets the peak is one of two moments. At the **head**, all that the forward pass has
saved is there, and the logits on top. At the **update**, activations are gone, and all
gradients are there, with a copy of the second moments that AdamW makes. In between one
falls as the other rises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ftlib import runtime
from ftlib.ops.tiles import WORKSPACE_BYTES

Stage = Literal[0, 1, 2, 3]

LOGIT_BYTES = 12
"""Per logit, at the peak of transformers' own loss: three tables in float32, which are
the log-probabilities, the gradient by them, and the gradient by the logits."""


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder-only model.

    Attributes:
        vocabulary: tokens V.
        layers: blocks L.
        width: hidden size D.
        heads: query heads H.
        kv_heads: heads K of keys and of values.
        head_width: features d of a head.
        mlp_width: hidden size F of the gated MLP.
        is_tied: whether the head's weight is the embedding's.
        has_bias: whether queries, keys and values have a bias.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    is_tied: bool = False
    has_bias: bool = False

    @classmethod
    def from_config(cls, config: Any) -> Decoder:
        """Read the shape from a configuration of transformers.

        Raises:
            ValueError: the model is neither a Llama nor a Qwen2.
        """
        if config.model_type not in ("llama", "qwen2"):
            raise ValueError(
                f"no formulas for a {config.model_type}: take a llama or a qwen2, or"
                " measure with measured_peak"
            )
        heads = config.num_attention_heads
        return cls(
            vocabulary=config.vocab_size,
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp_width=config.intermediate_size,
            is_tied=config.tie_word_embeddings,
            has_bias=config.model_type == "qwen2",
        )

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head: V D."""
        return self.vocabulary * self.width

    @property
    def root(self) -> int:
        """Weights outside the layers."""
        return self.table * (1 if self.is_tied else 2) + self.width

    @property
    def queries(self) -> int:
        """Weights of a layer's query matrix; its output matrix has as many."""
        return self.width * self.heads * self.head_width

    @property
    def matrices(self) -> int:
        """Weights of a layer's matrices, each of which is a product."""
        keys = self.width * self.kv_heads * self.head_width
        return 2 * (self.queries + keys) + 3 * self.width * self.mlp_width

    @property
    def layer(self) -> int:
        """Weights of a layer: its matrices, two norms, and biases if it has any."""
        bias = (self.heads + 2 * self.kv_heads) * self.head_width * self.has_bias
        return self.matrices + 2 * self.width + bias

    @property
    def weights(self) -> int:
        """Weights of the model."""
        return self.layers * self.layer + self.root

    @property
    def products(self) -> int:
        """Weights that a token is multiplied with; looking one up is no product."""
        return self.layers * self.matrices + self.table


SHAPES: Mapping[str, Decoder] = {
    "Qwen2.5-7B": Decoder(152_064, 28, 3584, 28, 4, 128, 18_944, has_bias=True),
    "Llama 3 70B": Decoder(128_256, 80, 8192, 64, 8, 128, 28_672),
}
"""From ``config.json`` of Qwen/Qwen2.5-7B and meta-llama/Meta-Llama-3-70B."""


class Precision(NamedTuple):
    """Bytes per number.

    Attributes:
        weight: of a weight, and of its gradient.
        compute: of what a matrix product reads and writes.
        moment: of each of AdamW's two moments.
        master: of a second, more precise copy of a trained weight, if there is one.
    """

    weight: int
    compute: int
    moment: int
    master: int = 0


FP32 = Precision(weight=4, compute=4, moment=4)
"""Everything in float32."""
AUTOCAST = Precision(weight=4, compute=2, moment=4)
"""Weights in float32, products in bf16: what :func:`ftlib.training.train` does."""
BF16 = Precision(weight=2, compute=2, moment=2)
"""Everything in bf16, the moments of AdamW too."""
BF16_WITH_MASTER = Precision(weight=2, compute=2, moment=4, master=4)
"""bf16, with a float32 copy of the weights beside float32 moments, as in ZeRO."""


class Trained(NamedTuple):
    """Which weights a method trains.

    Attributes:
        weights: that the optimiser moves and keeps a state for.
        gradients: that the backward pass gives a gradient.
        products: among those, the weights of matrices.
        unit: of the gradients, those of the largest unit that FSDP shards: a layer, or
            all that is outside the layers.
        has_head: whether the head is among them.
    """

    weights: int
    gradients: int
    products: int
    unit: int
    has_head: bool = False


def everything(decoder: Decoder) -> Trained:
    """Return full fine-tuning."""
    weights, unit = decoder.weights, max(decoder.root, decoder.layer)
    return Trained(weights, weights, decoder.products, unit, has_head=True)


def lora(decoder: Decoder, rank: int) -> Trained:
    """Return low-rank adapters on all seven matrices of every layer (Hu et al., 2022).

    A matrix of m inputs and n outputs gets rank · (m + n) weights.
    """
    heads = decoder.heads * decoder.head_width
    keys = decoder.kv_heads * decoder.head_width
    sides = 4 * decoder.width + 2 * heads + 2 * keys  # of q, k, v and o
    sides += 3 * (decoder.width + decoder.mlp_width)
    layer = rank * sides
    weights = layer * decoder.layers
    return Trained(weights, weights, weights, unit=layer)


def queries(decoder: Decoder) -> Trained:
    """Return the query matrices of all layers, as in CAREF's variant AQ."""
    weights = decoder.layers * decoder.queries
    return Trained(weights, weights, weights, unit=decoder.queries)


def circuit(decoder: Decoder, heads: int, layers: int) -> Trained:
    """Return the query and output weights of some heads, as in CT-SFT.

    The backward pass makes the gradient of a whole matrix, whichever of its heads are
    wanted. :class:`ftlib.ops.HeadAdamW` keeps moments for the heads alone.

    Args:
        decoder: the model.
        heads: of the circuit.
        layers: that these lie in.
    """
    weights = 2 * heads * decoder.width * decoder.head_width
    layer = 2 * decoder.queries
    whole = layers * layer
    return Trained(weights, whole, whole, unit=layer)


@dataclass(frozen=True)
class Footprint:
    """Bytes in one process, by what they are.

    Attributes:
        weights: all weights of the process.
        exchanged: what is held to be sent or received. With DDP, a second copy of the
            gradients. With FSDP, what is whole for a while: the weights outside the
            layers and of two layers, trained or not, and the largest unit's gradient.
        optimizer: its state.
        gradients: the gradients.
        update: the copy of the second moments that AdamW makes in its step, as it does
            on GPUs unless told otherwise; with ``fused=True`` there is none.
        saved: what the forward pass keeps for the backward pass.
        recomputed: what one layer makes again, with checkpoints.
        head: the logits and their gradient, or what stands in for them.
    """

    weights: int
    exchanged: int
    optimizer: int
    gradients: int
    update: int
    saved: int
    recomputed: int
    head: int

    @property
    def peak(self) -> int:
        """Bytes at the larger of the two moments: the head, and the update."""
        at_head = self.saved + max(self.head, self.recomputed)
        at_update = self.gradients + self.update
        standing = self.weights + self.exchanged + self.optimizer
        return standing + max(at_head, at_update)


def footprint(
    decoder: Decoder,
    trained: Trained,
    tokens: int,
    precision: Precision = AUTOCAST,
    *,
    checkpointing: bool = False,
    stores_logits: bool = True,
    processes: int = 1,
    stage: Stage = 0,
) -> Footprint:
    """Return what a step takes in each process.

    Where only some weights are trained, ``saved`` is still that of full fine-tuning:
    an upper bound, since a frozen matrix need not keep its input.

    Args:
        decoder: the model.
        trained: what is trained of it.
        tokens: of a chunk in one process.
        precision: bytes per number.
        checkpointing: whether every layer keeps its input alone, and is run again
            in the backward pass (Chen et al., 2016).
        stores_logits: whether the loss is taken from a table of all logits;
            otherwise by :func:`ftlib.ops.vocabulary_head`, in its loss-known mode.
        processes: that the batch is divided among.
        stage: what else is divided (Rajbhandari et al., 2020): 0 nothing, as in
            DDP; 1 the optimiser's state; 2 gradients too; 3 weights too, as in FSDP.

    Raises:
        ValueError: there are no tokens or no processes.
    """
    if tokens < 1 or processes < 1:
        raise ValueError(
            f"tokens is {tokens} and processes is {processes}: both are at least 1"
        )

    def share(size: int, of_stage: int) -> int:
        return -(-size // processes) if stage >= of_stage else size

    moved = share(trained.weights, 1)
    saved, recomputed = _activations(decoder, tokens, precision, checkpointing)
    is_whole = stage < 3 or processes == 1
    return Footprint(
        weights=precision.weight * share(decoder.weights, 3),
        exchanged=_exchanged(decoder, trained, precision, processes, stage),
        optimizer=(2 * precision.moment + precision.master) * moved,
        gradients=precision.weight * share(trained.gradients, 2),
        update=precision.moment * moved,
        saved=saved + is_whole * _casts(decoder, precision),
        recomputed=recomputed,
        head=_head(decoder, trained, tokens, precision, stores_logits),
    )


def saved_per_token(decoder: Decoder, precision: Precision) -> int:
    """Return the bytes per token that a layer keeps for its backward pass.

    Each of the two norms keeps its input and the inverse of its size in float32 and
    the normalised vector. What it returns is kept for the products that read it: once,
    or once for each of the five where autocast casts it for each. The attention keeps
    queries, keys, values, its output and one float32 per head, but no scores. The MLP
    keeps both of its products, the gate behind its activation, and the result.
    """
    width, compute = decoder.width, precision.compute
    norms = 2 * (4 * width + 4 + precision.weight * width)
    inputs = compute * width * (5 if _is_cast(precision) else 2)
    attention = 2 * (decoder.heads + decoder.kv_heads) * decoder.head_width
    mlp = 4 * decoder.mlp_width
    return norms + inputs + compute * (attention + mlp) + 4 * decoder.heads


def _is_cast(precision: Precision) -> bool:
    return precision.compute != precision.weight


def _activations(
    decoder: Decoder, tokens: int, precision: Precision, checkpointing: bool
) -> tuple[int, int]:
    """Return the bytes that are saved, and those that one layer makes again."""
    layer = tokens * saved_per_token(decoder, precision)
    if not checkpointing:
        return decoder.layers * layer, 0
    return decoder.layers * tokens * precision.weight * decoder.width, layer


def _casts(decoder: Decoder, precision: Precision) -> int:
    """Return the bytes of the weights that autocast has cast, kept until used again."""
    return precision.compute * decoder.products * _is_cast(precision)


def _exchanged(
    decoder: Decoder,
    trained: Trained,
    precision: Precision,
    processes: int,
    stage: Stage,
) -> int:
    """Return the bytes that DDP and FSDP hold for the exchange."""
    if processes == 1:
        return 0
    if stage == 0:
        return precision.weight * trained.gradients
    units = decoder.root + 2 * decoder.layer + trained.unit
    return precision.compute * units * (stage == 3)


def _head(
    decoder: Decoder,
    trained: Trained,
    tokens: int,
    precision: Precision,
    stores_logits: bool,
) -> int:
    if stores_logits:
        return LOGIT_BYTES * tokens * decoder.vocabulary
    tile = min(precision.compute * tokens * decoder.vocabulary, WORKSPACE_BYTES)
    by_weight = 4 * decoder.table * trained.has_head
    return tile + by_weight + precision.compute * tokens * decoder.width


def train_flops(
    decoder: Decoder,
    trained: Trained,
    sequences: int,
    length: int,
    *,
    checkpointing: bool = False,
) -> int:
    """Return the FLOPs of a step, forward and backward.

    Every token is multiplied with every matrix: 2 FLOPs per weight forward, 2 more for
    the gradient by the input, and 2 per trained weight for its own. With all weights
    trained these are the 6 of Kaplan et al. (2020). Attention adds its scores and its
    sums, in which every pair of tokens counts, masked or not, and twice as much in the
    backward pass; kernels that do not store the scores make them again, which is not
    counted. What adapters add to the forward pass is left out.

    Args:
        decoder: the model.
        trained: what is trained of it.
        sequences: in the batch.
        length: tokens of a sequence.
        checkpointing: whether the layers are run a second time.
    """
    tokens = sequences * length
    pairs = sequences * length**2 * decoder.heads * decoder.head_width
    attention = decoder.layers * 4 * pairs
    flops = 2 * tokens * (2 * decoder.products + trained.products)
    flops += 3 * attention
    if checkpointing:
        # Up to the last product, whose result is not needed a second time.
        again = decoder.matrices - decoder.width * decoder.mlp_width
        flops += 2 * tokens * decoder.layers * again + attention
    return flops


def measured_peak(step: Callable[[], object], *owners: nn.Module | Optimizer) -> int:
    """Run a step and return the most bytes that tensors held meanwhile.

    On CUDA, where :func:`ftlib.runtime.device` chooses it, this is the allocator's own
    count. The CPU keeps none, so every operation is watched there for new storages:
    what an operation uses inside is not seen.

    Args:
        step: the step.
        owners: whose tensors are there before the step. On CUDA these are counted
            anyhow, and so is all else that is there.
    """
    if runtime.device().type == "cuda":
        runtime.reset_peak_memory()
        step()
        return runtime.peak_memory()
    with _Storages() as storages:
        for owner in owners:
            for tensor in _tensors(owner):
                storages.note(tensor)
        step()
    return storages.peak


def _tensors(owner: nn.Module | Optimizer) -> Iterator[Tensor]:
    """Yield the tensors that a module or an optimiser's state holds."""
    if isinstance(owner, nn.Module):
        yield from owner.buffers()
        for parameter in owner.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
    else:
        for state in owner.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))


class _Storages(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, from when they are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._alive:
            self._alive[id(storage)] = storage.nbytes()
            weakref.finalize(storage, self._alive.pop, id(storage))
            self.peak = max(self.peak, sum(self._alive.values()))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note(leaf)
        return result
