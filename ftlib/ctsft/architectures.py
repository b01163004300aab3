"""What a transformers model is made of, for those who decompose and ablate its heads.

:func:`describe` returns the parts of a model in one vocabulary: blocks of an attention
and an MLP, with their norms and projections. One small adapter for each family knows
where they are; nothing is guessed. What no adapter knows is refused, because a wrong
guess gives numbers that look right.

=================================  ====================================================
family                             what is special
=================================  ====================================================
GPT-2                              one matrix, transposed, projects q, k and v
Llama, Mistral, Qwen2, Qwen3       RMSNorm, gated MLP, RoPE, shared k and v; Qwen3 norms
                                   q and k
Gemma 3, text                      also norms what attention and MLP give, before the
                                   sums; norms store their scale minus 1; the window and
                                   the RoPE of a layer depend on its type
BERT                               the norms come after the sums (post-norm)
T5's encoder                       RMSNorm, unscaled scores, relative position bias
=================================  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ftlib.ops.decomposition import Activation

SUPPORTED = (
    "GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 3's text models, BERT, and T5's encoder"
    " (T5EncoderModel, T5ForTokenClassification, or get_encoder() of an"
    " encoder-decoder)"
)

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_FUSED = ("query_key_value", "qkv_proj", "Wqkv", "in_proj")


@dataclass(frozen=True)
class Projection:
    """A linear map: some of the outputs of a linear layer.

    Attributes:
        module: ``nn.Linear``, or GPT-2's ``Conv1D``, whose weight is transposed.
        start: the first of its outputs that belongs to the projection.
        stop: one past the last.
    """

    module: Any
    start: int
    stop: int

    @property
    def is_transposed(self) -> bool:
        """Whether the parameter's rows are inputs."""
        return isinstance(self.module, Conv1D)

    @property
    def weight(self) -> Tensor:
        """A view of the weight, (outputs, inputs)."""
        weight = self.module.weight
        whole = weight.T if self.is_transposed else weight
        return whole[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """A view of the bias, (outputs,), if there is one."""
        bias = self.module.bias
        return None if bias is None else bias[self.start : self.stop]


@dataclass(frozen=True)
class Norm:
    """A norm over features.

    Attributes:
        module: has ``weight`` and, for ``layer``, perhaps ``bias``.
        kind: ``layer`` subtracts the mean and divides by the standard deviation;
            ``rms`` divides by the root of the mean square.
        eps: what is added to the variance or the mean square.
        stores_minus_one: whether the module's ``weight`` is the scale minus 1.
    """

    module: Any
    kind: Literal["layer", "rms"]
    eps: float
    stores_minus_one: bool = False

    @property
    def weight(self) -> Tensor:
        """The scale, (features,); a new tensor if the module stores it minus 1."""
        weight = self.module.weight
        if not self.stores_minus_one:
            return weight
        # Next to 1, bf16 would round most of a small weight away.
        return 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))

    @property
    def bias(self) -> Tensor | None:
        """The shift, (features,), if there is one."""
        return getattr(self.module, "bias", None)


@dataclass(frozen=True)
class Attention:
    """An attention; its heads lie beside each other in q's rows and o's columns.

    Attributes:
        module: what returns the attention's probabilities.
        probabilities: their place in what it returns, when it runs eagerly.
        q: projects the queries, (heads · head_dim, features).
        k: projects the keys, (kv_heads · head_dim, features).
        v: projects the values, likewise.
        o: projects what the heads have gathered, z, (features, heads · head_dim).
        heads: number of query heads.
        kv_heads: number of heads of k and v. Query head h reads the one of index
            h // (heads / kv_heads).
        head_dim: features of a head.
        scaling: multiplies the scores.
        position_bias: the place of T5's relative position bias in what the module
            returns.
        q_norm: norm over each head's query.
        k_norm: norm over each head's key.
        output_norm: norm over what o gives, before it is added to the stream.
    """

    module: nn.Module
    probabilities: int
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    heads: int
    kv_heads: int
    head_dim: int
    scaling: float
    position_bias: int | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    output_norm: Norm | None = None


@dataclass(frozen=True)
class MLP:
    """``down(activation(up(x)))``, or ``down(activation(gate(x)) · up(x))``.

    An ``output_norm`` is over what that gives, before it is added to the stream.
    """

    up: Projection
    down: Projection
    activation: Activation
    gate: Projection | None = None
    output_norm: Norm | None = None


@dataclass(frozen=True)
class Block:
    """An attention and an MLP, each with the norm before it, or after its sum."""

    attention: Attention
    attention_norm: Norm
    mlp: MLP
    mlp_norm: Norm


Stage = Projection | Norm | Callable[[Tensor], Tensor]
"""A step from the last hidden states to the logits; a callable is elementwise."""


@dataclass(frozen=True)
class Architecture:
    """The parts of a model.

    Attributes:
        base: the model without its head.
        blocks: in order.
        is_post_norm: whether the norms come after the sums, as in BERT: x ← norm(x +
            f(x)) instead of x ← x + f(norm(x)).
        final_norm: what follows the last block.
        head: the steps from the base's last hidden states to the logits; empty if the
            model has none.
        reads_first: whether the head reads the first position of an example.
    """

    base: Any
    blocks: tuple[Block, ...]
    is_post_norm: bool
    final_norm: Norm | None
    head: tuple[Stage, ...] = ()
    reads_first: bool = False

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def heads(self) -> int:
        """Number of query heads of each block."""
        return self.blocks[0].attention.heads

    @property
    def head_dim(self) -> int:
        """Features of a head."""
        return self.blocks[0].attention.head_dim

    @property
    def norms(self) -> tuple[Norm, ...]:
        """The norms of blocks and head; BERT has one more at its embeddings."""
        parts: list[Any] = [self.final_norm, *self.head]
        for block in self.blocks:
            attention = block.attention
            parts += [block.attention_norm, attention.q_norm, attention.k_norm]
            parts += [attention.output_norm, block.mlp_norm, block.mlp.output_norm]
        return tuple(part for part in parts if isinstance(part, Norm))


def describe(model: Any) -> Architecture:
    """Return the parts of a model.

    Args:
        model: of transformers, with or without a head for tokens or labels.

    Raises:
        ValueError: its family, its head, or a variant of one of its parts is not
            supported, or it is wrapped by PEFT.
    """
    base = getattr(model, "base_model", None)
    adapter = _FAMILIES.get(type(base).__name__)
    if adapter is None or hasattr(model, "peft_config"):
        raise _unknown(model)
    architecture = adapter(model, base)
    _check_heads(model, architecture)
    return architecture


def _unknown(model: Any) -> ValueError:
    name = type(model).__name__
    why = f"{name} is not supported"
    if hasattr(model, "peft_config"):
        why = f"{name} has adapters of PEFT: merge_and_unload() them first"
    elif getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        why = f"{name} is an encoder-decoder, of which only the encoder is supported"
    elif isinstance(model, nn.Module):
        names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
        if fused := names.intersection(_FUSED):
            why = (
                f"{name} projects q, k and v by one matrix, {min(fused)}, which cannot"
                " be split here"
            )
    return ValueError(f"{why}. Supported are {SUPPORTED}.")


def _refuse(what: str) -> ValueError:
    return ValueError(f"{what} is not supported. Supported are {SUPPORTED}.")


def _check_heads(model: nn.Module, architecture: Architecture) -> None:
    """Refuse attentions whose parts do not have the sizes of their heads."""
    first = architecture.blocks[0].attention
    sizes = (first.heads, first.kv_heads, first.head_dim)
    for layer, block in enumerate(architecture.blocks):
        attention = block.attention
        inner = attention.heads * attention.head_dim
        shared = attention.kv_heads * attention.head_dim
        outputs = [len(p.weight) for p in (attention.q, attention.k, attention.v)]
        fits = [*outputs, attention.o.weight.shape[1]] == [inner, shared, shared, inner]
        same = sizes == (attention.heads, attention.kv_heads, attention.head_dim)
        if not fits or not same or attention.heads % attention.kv_heads:
            raise ValueError(
                f"{type(model).__name__} has heads of mixed sizes: the projections of"
                f" layer {layer} have {outputs} outputs, not {attention.heads} ·"
                f" {attention.head_dim} for q and {attention.kv_heads} ·"
                f" {attention.head_dim} for k and v, as in all other layers. Models"
                " with pruned heads are not supported."
            )


# --- families --------------------------------------------------------------------


def _gpt2(model: Any, base: Any) -> Architecture:
    config = base.config
    if config.add_cross_attention:
        raise _refuse("GPT-2 with cross-attention")
    blocks = tuple(_gpt2_block(block, config) for block in base.h)
    head = _linear_head(model, base)
    return Architecture(base, blocks, False, _layer_norm(base.ln_f), head)


def _gpt2_block(block: Any, config: Any) -> Block:
    attention, mlp, width = block.attn, block.mlp, block.attn.embed_dim
    fused = attention.c_attn
    attention = Attention(
        attention,
        1,
        _projection(fused, 0, width),
        _projection(fused, width, 2 * width),
        _projection(fused, 2 * width, 3 * width),
        _projection(attention.c_proj),
        attention.num_heads,
        attention.num_heads,
        attention.head_dim,
        attention.scaling,
    )
    activation = _activation(config.activation_function)
    return Block(
        attention,
        _layer_norm(block.ln_1),
        MLP(_projection(mlp.c_fc), _projection(mlp.c_proj), activation),
        _layer_norm(block.ln_2),
    )


def _llama(model: Any, base: Any) -> Architecture:
    blocks = tuple(_llama_block(block, base.config) for block in base.layers)
    head = _linear_head(model, base)
    return Architecture(base, blocks, False, _rms_norm(base.norm), head)


def _llama_block(block: Any, config: Any) -> Block:
    return Block(
        _llama_attention(block.self_attn, config, _rms_norm),
        _rms_norm(block.input_layernorm),
        _llama_mlp(block.mlp, config.hidden_act),
        _rms_norm(block.post_attention_layernorm),
    )


def _llama_attention(
    attention: Any, config: Any, as_norm: Callable[[Any], Norm]
) -> Attention:
    norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    return Attention(
        attention,
        1,
        _projection(attention.q_proj),
        _projection(attention.k_proj),
        _projection(attention.v_proj),
        _projection(attention.o_proj),
        config.num_attention_heads,
        config.num_key_value_heads,
        attention.head_dim,
        attention.scaling,
        None,
        *(None if norm is None else as_norm(norm) for norm in norms),
    )


def _llama_mlp(mlp: Any, activation: str) -> MLP:
    return MLP(
        _projection(mlp.up_proj),
        _projection(mlp.down_proj),
        _activation(activation),
        _projection(mlp.gate_proj),
    )


def _gemma3(model: Any, base: Any) -> Architecture:
    config = base.config
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise _refuse("Gemma 3 with softcapping")
    blocks = tuple(_gemma3_block(block, config) for block in base.layers)
    head = _linear_head(model, base)
    return Architecture(base, blocks, False, _gemma3_norm(base.norm), head)


def _gemma3_block(block: Any, config: Any) -> Block:
    attention = _llama_attention(block.self_attn, config, _gemma3_norm)
    mlp = _llama_mlp(block.mlp, config.hidden_activation)
    behind_attention = _gemma3_norm(block.post_attention_layernorm)
    behind_mlp = _gemma3_norm(block.post_feedforward_layernorm)
    return Block(
        replace(attention, output_norm=behind_attention),
        _gemma3_norm(block.input_layernorm),
        replace(mlp, output_norm=behind_mlp),
        _gemma3_norm(block.pre_feedforward_layernorm),
    )


def _bert(model: Any, base: Any) -> Architecture:
    config = base.config
    if config.add_cross_attention or config.chunk_size_feed_forward:
        raise _refuse("BERT with cross-attention or chunk_size_feed_forward")
    blocks = tuple(_bert_block(block, config) for block in base.encoder.layer)
    name = type(model).__name__
    head: tuple[Stage, ...]
    if name == "BertForSequenceClassification":
        pooler = base.pooler
        head = (
            _projection(pooler.dense),
            pooler.activation,
            _projection(model.classifier),
        )
        return Architecture(base, blocks, True, None, head, reads_first=True)
    if name in ("BertForMaskedLM", "BertLMHeadModel"):
        transform = model.cls.predictions.transform
        head = (
            _projection(transform.dense),
            transform.transform_act_fn,
            _layer_norm(transform.LayerNorm),
            _projection(model.cls.predictions.decoder),
        )
        return Architecture(base, blocks, True, None, head)
    return Architecture(base, blocks, True, None, _linear_head(model, base))


def _bert_block(block: Any, config: Any) -> Block:
    attention, out = block.attention.self, block.attention.output
    attention = Attention(
        attention,
        1,
        _projection(attention.query),
        _projection(attention.key),
        _projection(attention.value),
        _projection(out.dense),
        attention.num_attention_heads,
        attention.num_attention_heads,
        attention.attention_head_size,
        attention.scaling,
    )
    up, down = block.intermediate.dense, block.output.dense
    return Block(
        attention,
        _layer_norm(out.LayerNorm),
        MLP(_projection(up), _projection(down), _activation(config.hidden_act)),
        _layer_norm(block.output.LayerNorm),
    )


def _t5(model: Any, base: Any) -> Architecture:
    stack = getattr(base, "encoder", base)
    config = stack.config
    if stack.is_decoder:
        raise _refuse("T5's decoder")
    blocks = tuple(_t5_block(block, config) for block in stack.block)
    head = _linear_head(model, base)
    return Architecture(base, blocks, False, _rms_norm(stack.final_layer_norm), head)


def _t5_block(block: Any, config: Any) -> Block:
    first, last = block.layer
    attention, mlp = first.SelfAttention, last.DenseReluDense
    attention = Attention(
        attention,
        2,
        _projection(attention.q),
        _projection(attention.k),
        _projection(attention.v),
        _projection(attention.o),
        attention.n_heads,
        attention.n_heads,
        attention.key_value_proj_dim,
        attention.scaling,
        position_bias=1,
    )
    activation, down = _activation(config.dense_act_fn), _projection(mlp.wo)
    if config.is_gated_act:
        gated = MLP(_projection(mlp.wi_1), down, activation, _projection(mlp.wi_0))
    else:
        gated = MLP(_projection(mlp.wi), down, activation)
    return Block(
        attention, _rms_norm(first.layer_norm), gated, _rms_norm(last.layer_norm)
    )


_FAMILIES: dict[str, Callable[[Any, Any], Architecture]] = {
    "GPT2Model": _gpt2,
    "LlamaModel": _llama,
    "MistralModel": _llama,
    "Qwen2Model": _llama,
    "Qwen3Model": _llama,
    "Gemma3TextModel": _gemma3,
    "BertModel": _bert,
    "T5EncoderModel": _t5,
    "T5Stack": _t5,
}


# --- parts -----------------------------------------------------------------------


def _linear_head(model: Any, base: Any) -> tuple[Stage, ...]:
    """Return the head of a model that applies one linear layer to each position."""
    if model is base:
        return ()
    for name in ("lm_head", "score", "classifier"):
        if hasattr(model, name):
            return (_projection(getattr(model, name)),)
    raise _refuse(f"the head of {type(model).__name__}")


def _projection(module: Any, start: int = 0, stop: int | None = None) -> Projection:
    # A subclass, such as an adapter or a quantised layer, may compute something else.
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        raise ValueError(
            f"{type(module).__module__}.{type(module).__qualname__} is not a plain"
            " linear layer: merge adapters, and load the model in floating point"
        )
    width = module.nf if isinstance(module, Conv1D) else module.out_features
    return Projection(module, start, width if stop is None else stop)


def _layer_norm(module: Any) -> Norm:
    return Norm(module, "layer", module.eps)


def _rms_norm(module: Any) -> Norm:
    return Norm(module, "rms", module.variance_epsilon)


def _gemma3_norm(module: Any) -> Norm:
    return Norm(module, "rms", module.eps, stores_minus_one=True)


def _activation(name: Any) -> Activation:
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"the activation {name!r} is not supported: choose from"
            f" {', '.join(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[name]
